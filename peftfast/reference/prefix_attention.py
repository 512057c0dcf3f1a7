"""Attention over learned rows before a sequence's own keys and values, in plain PyTorch.

For one query q, the prefix's rows (K', V') and the sequence's (K, V), with c = scale:

    y = sum over both of p v,   p = exp(s - L),   L = log of the sum over both of exp(s)
    s = c q k + mask            (softcap: a tanh(c q k / a) + mask)

Each part alone gives o_i and L_i, and together y = sum of exp(L_i - L) o_i, L = logaddexp of the
L_i. In the backward p = exp(s - L) with the merged L, and D = dy . y, as in any attention:

    dv = p^T dy      ds = p (dy v - D)      dq = c ds K      dk = c ds^T q

so each part needs q, its own keys and values, and the merged y and L, and no gradient goes through
L. A sink is a logit without a value: dsink = - sum of exp(sink - L) D. A gate g multiplies K' and
V': dg = sum of ds c q k' + p (dy v').

With form "relu" the prefix is outside of the softmax: y = softmax part + g relu(q K'^T) V'.

Li & Liang, "Prefix-Tuning" (ACL 2021), section 4; Liu et al., "P-Tuning v2" (ACL 2022), section 3;
He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning" (ICLR 2022), sections
3.1 and 3.3 (relu: the multi-head parallel adapter); Mao et al., "UniPELT" (ACL 2022), section 3.2
(gate); Dao et al., "FlashAttention" (NeurIPS 2022), appendix B.2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.reference.dropout import keep_mask, keep_scale

FORMS = ("softmax", "relu")
# The order of `needs` and of the gradients of `prefix_attention_backward`.
GRADIENTS = ("q", "k", "v", "prefix_k", "prefix_v", "sinks", "gate")
_BLOCK = 1 << 19  # scores, or numbers of a query or an output, in a block


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    gate: Tensor | None = None,
    form: str = "softmax",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention over the concatenation, differentiable by autograd, one op per symbol: what
    everything else is tested against. Arguments as of `peftfast.ops.prefix_attention`.
    """
    batch, heads, queries, width = q.shape
    keys, rows = k.shape[2], prefix_k.shape[-2]
    scale = width**-0.5 if scale is None else scale
    if prefix_k.ndim == 3:
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    index = torch.zeros(batch, dtype=torch.long, device=q.device)
    if prefix_index is not None:
        index = prefix_index.long()
    held = index.clamp(min=0)
    lengths = torch.full((prefix_k.shape[0],), rows, device=q.device)
    if prefix_lengths is not None:
        lengths = prefix_lengths.long()
    length = lengths[held].view(batch, 1, 1, 1)
    row = torch.arange(rows, device=q.device)
    present = (row < length) & (index >= 0).view(batch, 1, 1, 1)  # [B, 1, 1, P]
    own_k = prefix_k[held].repeat_interleave(heads // prefix_k.shape[1], 1)  # [B, Hq, P, D]
    own_v = prefix_v[held].repeat_interleave(heads // prefix_v.shape[1], 1)
    k = k.repeat_interleave(heads // k.shape[1], 1)
    v = v.repeat_interleave(heads // v.shape[1], 1)
    gate = torch.ones((), device=q.device) if gate is None else gate.reshape(-1, 1, 1, 1)
    dtype = torch.promote_types(q.dtype, prefix_k.dtype)
    apart: Any = 0.0
    if form == "relu":
        hidden = torch.relu(q.to(dtype) @ own_k.to(dtype).transpose(-1, -2)) * present
        apart = gate * (hidden @ own_v.to(dtype))
    else:
        own_k, own_v = gate * own_k, gate * own_v
    scores = q.to(dtype) @ torch.cat([own_k, k], dim=2).to(dtype).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    before = torch.arange(queries, device=q.device)[:, None] + keys - queries  # of each query
    distance = before - torch.arange(keys, device=q.device)  # [S, T]
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen_prefix = present.expand(batch, 1, queries, rows)
    if is_causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
        seen_prefix = seen_prefix & (before + length - row < window)
    if form == "relu":
        seen_prefix = torch.zeros_like(seen_prefix)
    size = (batch, heads, queries)
    both = torch.cat([seen_prefix.expand(*size, rows), seen.expand(*size, keys)], dim=-1)
    zeros = [torch.zeros(*size, n, device=q.device, dtype=dtype) for n in (rows, keys)]
    for at, mask in enumerate((prefix_mask, attn_mask)):
        if mask is not None and mask.dtype == torch.bool:
            zeros[at] = zeros[at].masked_fill(~mask, -math.inf)
        elif mask is not None:
            zeros[at] = (zeros[at] + mask.to(dtype)).masked_fill(hides(mask), -math.inf)
    if form == "relu":
        zeros[0] = torch.zeros_like(zeros[0])
    scores = (scores + torch.cat(zeros, dim=-1)).masked_fill(~both, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(-1, 1, 1).expand(*size, 1)], dim=-1)
    visible = (scores > -math.inf).any(-1, keepdim=True)
    p = torch.softmax(torch.where(visible, scores, 0.0), dim=-1) * visible
    p = p[..., : rows + keys]
    if dropout_p > 0:
        assert seed is not None
        kept = keep_mask(seed, math.prod(size), rows + keys, dropout_p).view(p.shape)
        p = p * kept * keep_scale(dropout_p)
    y = p @ torch.cat([own_v, v], dim=2).to(dtype) + apart
    return y.to(q.dtype)


def hides(mask: Tensor) -> Tensor:
    """Where an additive mask shows nothing: at -inf, and at a dtype's least value, which models'
    own masks have in its place and which scores are lost beside.
    """
    return mask <= torch.finfo(mask.dtype).min / 2


def prefix_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    attn_mask: Tensor | None,
    prefix_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    gate: Tensor | None,
    form: str,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output and the merged log-sum-exp, in blocks: nothing of size S x T or B x P is made.

    Args:
        q: [B, Hq, S, D]; k: [B, Hkv, T, D]; v: [B, Hkv, T, Dv].
        prefix_k: [N, Hkv, P, D]; prefix_v: [N, Hkv, P, Dv]. N is 1 without prefix_index.
        attn_mask: four dimensions, each that of [B, Hq, S, T] or 1; bool or additive.
        prefix_mask: the same of [B, Hq, S, P].
        sinks: [Hq] or None. gate: [B] or None. prefix_index: [B] or None. prefix_lengths: [N] or
            None.
        seed: int64 [1], None where dropout_p is 0.

    Returns:
        y [B, Hq, S, Dv] in q's dtype, dense as [B, S, Hq, Dv]; and L [B, Hq, S], contiguous, of
        float32 (float64 for float64), sinks included; +inf where a row sees nothing, so that
        exp(s - L) is 0.
    """
    call = _Call(
        q, k, v, prefix_k, prefix_v, attn_mask, prefix_mask, is_causal, scale, window, softcap,
        sinks, prefix_index, prefix_lengths, gate, form, dropout_p, seed,
    )  # fmt: skip
    batch, heads, queries, _ = q.shape
    width = v.shape[-1]
    y = q.new_empty_strided((batch, heads, queries, width), _strides(heads, queries, width))
    lse = q.new_empty((batch, heads, queries), dtype=call.wide)
    flash = _flash(call) if serves_sequence(call) else None
    if flash is not None and flash[0].stride() == y.stride():
        y = flash[0]
    if flash is not None and call.is_plain:
        _merge(call, *flash, y, lse)
        return y, lse
    for block in call.blocks(flash is None):
        read = call.queries(block, q)
        parts: list[tuple[_Part, Tensor]] = []
        if flash is None:
            of_sequence, total, parts = None, None, [call.sequence(block, read)]
        else:
            of_sequence, total = (call.block_of(block, one) for one in flash)
        if form == "softmax":
            parts.append(call.prefix(block, read))
        of_parts = [scores.logsumexp(-1) for _, scores in parts]
        if sinks is not None:
            of_parts.append(call.sinks())
        before = total
        for one in of_parts:
            total = one if total is None else torch.logaddexp(total, one)
        assert total is not None
        total = torch.where(total == -math.inf, math.inf, total)
        out: Any = None
        if of_sequence is not None:
            assert before is not None
            out = of_sequence * torch.exp(before - total).unsqueeze(-1)
        for part, scores in parts:
            p = torch.exp_(scores.sub_(total.unsqueeze(-1)))
            p = call.dropped(block, part, p)
            product = _times(call.gated(block, part, p), part.values)
            out = product if out is None else out + product
        if form == "relu":
            out = out + call.apart(block, read)[0]
        call.block_of(block, y).copy_(out)
        call.block_of(block, lse).copy_(total)
    return y, lse


def prefix_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    y: Tensor,
    lse: Tensor,
    *,
    attn_mask: Tensor | None,
    prefix_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    gate: Tensor | None,
    form: str,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, in the order of `GRADIENTS`.

    Args:
        dy: [B, Hq, S, Dv], any strides; y, lse: as the forward returned them. The others as there.

    Returns:
        Each of its tensor's shape: those of q, k and v in its dtype, the others in that of lse.
    """
    call = _Call(
        q, k, v, prefix_k, prefix_v, attn_mask, prefix_mask, is_causal, scale, window, softcap,
        sinks, prefix_index, prefix_lengths, gate, form, dropout_p, seed,
    )  # fmt: skip
    asked = dict(zip(GRADIENTS, needs, strict=True))
    of_prefix = any(asked[name] for name in ("prefix_k", "prefix_v", "gate", "q"))
    of_sequence = any(asked[name] for name in ("q", "k", "v"))
    flash = serves_sequence(call)
    made: dict[str, Tensor] = {}
    # What the softmax gives. Of form "relu" it is made anew: y less the prefix's part has lost its
    # digits where that part is large.
    softmax_y: Tensor | None = y
    if form == "relu":
        softmax_y = None
        if flash and (of_sequence or asked["sinks"]):
            softmax_y, own = _flash(call)
            softmax_y = softmax_y * torch.exp(own - lse).unsqueeze(-1).to(softmax_y.dtype)
    if flash and of_sequence:
        assert softmax_y is not None
        made["q"], made["k"], made["v"] = _flash_backward(call, dy, softmax_y, lse)
    elif of_sequence:
        made["q"] = torch.empty_like(q)
        made["k"] = k.new_zeros(k.shape, dtype=call.wide)
        made["v"] = v.new_zeros(v.shape, dtype=call.wide)
    made["prefix_k"] = prefix_k.new_zeros(prefix_k.shape, dtype=call.wide)
    made["prefix_v"] = prefix_v.new_zeros(prefix_v.shape, dtype=call.wide)
    made["sinks"] = q.new_zeros(q.shape[1], dtype=call.wide)
    made["gate"] = q.new_zeros(q.shape[0], dtype=call.wide)
    if flash and call.is_plain:
        _merge_backward(call, dy, y, lse, made, asked)
        return [made[name] for name, need in asked.items() if need]
    for block in call.blocks(not flash):
        read, of_y = call.queries(block, q), call.queries(block, dy)
        total = call.block_of(block, lse)
        dq: Any = None
        if form == "relu":
            _, hidden = call.apart(block, read)
            part = call.prefix_part(block)
            de = _times(of_y, part.values.transpose(-1, -2))
            _add(made, block, part, "v", _pair(call.gated(block, part, hidden), of_y, part))
            made["gate"][block.batch] += (hidden * de).sum((1, 2, 3, 4))
            ds = call.gated(block, part, de.mul_(hidden > 0))
            _add(made, block, part, "k", _pair(ds, read, part))
            dq = _times(ds, part.keys)
        if softmax_y is not None:
            delta = (of_y * call.block_of(block, softmax_y)).sum(-1)
        elif of_sequence or asked["sinks"]:
            part, scores = call.sequence(block, read)
            p = call.dropped(block, part, torch.exp_(scores.sub_(total.unsqueeze(-1))))
            delta = (of_y * _times(p, part.values)).sum(-1)
        if sinks is not None and asked["sinks"]:
            of_sink = torch.exp(call.sinks() - total) * delta
            made["sinks"] -= of_sink.sum((0, 3)).view(-1)
        parts = []
        if not flash and of_sequence:
            parts.append(call.sequence(block, read, backward=True))
        if of_prefix and form == "softmax":
            parts.append(call.prefix(block, read, backward=True))
        for part, scores in parts:
            assert part.raw is not None
            p = torch.exp_(scores.sub_(total.unsqueeze(-1)))
            de = _times(of_y, part.values.transpose(-1, -2))
            dropped, dp = call.dropped(block, part, p), call.dropped(block, part, de)
            _add(made, block, part, "v", _pair(call.gated(block, part, dropped), of_y, part))
            ds = p * (call.gated(block, part, dp) - delta.unsqueeze(-1))
            if part.slope is not None:
                ds = ds * part.slope
            if part.is_prefix:
                of_gate = (ds * part.raw).sum((1, 2, 3, 4)) + (dropped * de).sum((1, 2, 3, 4))
                made["gate"][block.batch] += of_gate
            ds = call.gated(block, part, ds).mul_(scale)
            _add(made, block, part, "k", _pair(ds, read, part))
            more = _times(ds, part.keys)
            dq = more if dq is None else dq + more
        if dq is not None and asked["q"]:
            into = call.block_of(block, made["q"])
            into.copy_(dq + into if flash else dq)
    for name, given in (("k", k), ("v", v)):
        if asked[name]:
            made[name] = made[name].to(given.dtype)
    return [made[name] for name, need in asked.items() if need]


class _Block(NamedTuple):
    batch: slice
    query: slice
    first: int  # of the batch
    row: int  # first query


class _Part(NamedTuple):
    """The keys and values of a block: [1 | nb, Hkv, n, D]."""

    is_prefix: bool
    keys: Tensor
    values: Tensor
    which: Tensor | None  # which prefix each row of the block has
    raw: Tensor | None = None  # c q k
    slope: Tensor | None = None  # the derivative of the soft-capping


class _Call(NamedTuple):
    """A call's operands, and the parts of it that a block needs.

    Blocks have five dimensions: [nb, Hkv, G, ns, n], with G query heads to one of the keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    attn_mask: Tensor | None
    prefix_mask: Tensor | None
    is_causal: bool
    scale: float
    window: int | None
    softcap: float | None
    of_sinks: Tensor | None
    prefix_index: Tensor | None
    prefix_lengths: Tensor | None
    gate: Tensor | None
    form: str
    dropout_p: float
    seed: Tensor | None

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def is_plain(self) -> bool:
        """Whether every query sees the same prefix, all of it, as it is."""
        special = (self.prefix_mask, self.window, self.prefix_index, self.prefix_lengths, self.gate)
        return self.form == "softmax" and all(one is None for one in special)

    def blocks(self, with_sequence: bool) -> Iterator[_Block]:
        batch, heads, queries, width = self.q.shape
        columns = max(width, self.v.shape[-1], self.prefix_k.shape[2])
        if with_sequence:
            columns = max(columns, self.k.shape[2])
        several = max(1, _BLOCK // max(1, heads * queries * columns))
        rows = max(1, min(queries, _BLOCK // max(1, heads * columns)))
        for first in range(0, batch, several):
            at = slice(first, min(first + several, batch))
            for row in range(0, queries, rows):
                yield _Block(at, slice(row, min(row + rows, queries)), first, row)

    def block_of(self, block: _Block, x: Tensor) -> Tensor:
        """The block of x [B, Hq, S, ...]."""
        groups = (self.k.shape[1], x.shape[1] // self.k.shape[1])
        return x[block.batch, :, block.query].unflatten(1, groups)

    def queries(self, block: _Block, x: Tensor) -> Tensor:
        return self.block_of(block, x).to(self.wide)

    def sinks(self) -> Tensor:
        assert self.of_sinks is not None
        return self.of_sinks.to(self.wide).view(1, self.k.shape[1], -1, 1)

    def gated(self, block: _Block, part: _Part, x: Tensor) -> Tensor:
        if self.gate is None or not part.is_prefix:
            return x
        return x * self.gate[block.batch].to(self.wide).view(-1, 1, 1, 1, 1)

    def dropped(self, block: _Block, part: _Part, x: Tensor) -> Tensor:
        """x with the mask of dropout, scaled."""
        if self.dropout_p == 0.0:
            return x
        assert self.seed is not None
        _, heads, queries, _ = self.q.shape
        rows = self.prefix_k.shape[2]
        count = rows + self.k.shape[2]
        columns = slice(0, rows) if part.is_prefix else slice(rows, count)
        size = block.query.stop - block.row
        if size == queries:  # all rows of some samples
            spans = [(block.first * heads * queries, x.shape[0] * heads * queries)]
        else:
            pairs = itertools.product(range(block.first, block.batch.stop), range(heads))
            spans = [((row * heads + head) * queries + block.row, size) for row, head in pairs]
        masks = [
            keep_mask(self.seed, span, count, self.dropout_p, first=first)[:, columns]
            for first, span in spans
        ]
        return x * torch.cat(masks).view(x.shape) * keep_scale(self.dropout_p)

    def sequence(self, block: _Block, read: Tensor, backward: bool = False) -> tuple[_Part, Tensor]:
        """The sequence's part, and its scores with every mask."""
        keys, values = (one[block.batch].to(self.wide) for one in (self.k, self.v))
        part, scores = self._scores(block, _Part(False, keys, values, None), read, backward)
        scores = self._masked(block, scores, self.attn_mask)
        hidden = _hidden(self, block.row, block.query.stop)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return part, scores

    def prefix_part(self, block: _Block) -> _Part:
        keys, values, index = self.prefix_k, self.prefix_v, None
        if self.prefix_index is not None:
            index = self.prefix_index[block.batch].long()
            held = index.clamp(min=0)
            keys, values = keys[held], values[held]
        return _Part(True, keys.to(self.wide), values.to(self.wide), index)

    def prefix(self, block: _Block, read: Tensor, backward: bool = False) -> tuple[_Part, Tensor]:
        """The prefix's part, and its scores with every mask."""
        part, scores = self._scores(block, self.prefix_part(block), read, backward)
        scores = self._masked(block, scores, self.prefix_mask)
        present, length = self._present(part)
        if present is not None:
            scores = scores.masked_fill(~present, -math.inf)
        if self.window is not None:
            device = scores.device
            row = torch.arange(self.prefix_k.shape[2], device=device)
            query = torch.arange(block.row, block.query.stop, device=device)[:, None]
            distance = query + self.k.shape[2] - self.q.shape[2] + length - row
            scores = scores.masked_fill(distance >= self.window, -math.inf)
        return part, scores

    def apart(self, block: _Block, read: Tensor) -> tuple[Tensor, Tensor]:
        """What the prefix adds with form "relu", and relu(q K'^T)."""
        part = self.prefix_part(block)
        hidden = torch.relu_(_times(read, part.keys.transpose(-1, -2)))
        present, _ = self._present(part)
        if present is not None:
            hidden = hidden * present
        return _times(self.gated(block, part, hidden), part.values), hidden

    def _present(self, part: _Part) -> tuple[Tensor | None, Any]:
        """Which rows of its prefix each row of the batch has, None for all, and how many."""
        rows = self.prefix_k.shape[2]
        length: Any = rows
        present = None
        if self.prefix_lengths is not None:
            length = self.prefix_lengths.long()
            length = length if part.which is None else length[part.which.clamp(min=0)]
            length = length.view(-1, 1, 1, 1, 1)
            present = torch.arange(rows, device=self.q.device) < length
        if part.which is not None:
            some = (part.which >= 0).view(-1, 1, 1, 1, 1)
            present = some if present is None else present & some
        return present, length

    def _scores(
        self, block: _Block, part: _Part, read: Tensor, backward: bool
    ) -> tuple[_Part, Tensor]:
        raw = _times(read, part.keys.transpose(-1, -2)).mul_(self.scale)
        scores = self.gated(block, part, raw)
        if self.softcap is not None:
            inner = torch.tanh(scores / self.softcap)
            scores = self.softcap * inner
            if backward:
                part = part._replace(slope=1 - inner.square())
        if backward:
            part = part._replace(raw=raw.clone() if scores is raw else raw)
        return part, scores

    def _masked(self, block: _Block, scores: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return scores
        mask = mask[block.batch] if mask.shape[0] > 1 else mask
        mask = mask[:, :, block.query] if mask.shape[2] > 1 else mask
        groups = self.k.shape[1] if mask.shape[1] > 1 else 1
        mask = mask.unflatten(1, (groups, -1))
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, -math.inf)
        return (scores + mask.to(scores.dtype)).masked_fill(hides(mask), -math.inf)


def _hidden(call: _Call, start: int, stop: int) -> Tensor | None:
    """Which keys some queries don't see by their distance [ns, T]; None: they see all."""
    if not call.is_causal and call.window is None:
        return None
    queries, keys = call.q.shape[2], call.k.shape[2]
    device = call.q.device
    query = torch.arange(start, stop, device=device)[:, None] + keys - queries
    distance = query - torch.arange(keys, device=device)
    if call.window is None:
        return distance < 0
    beyond = distance >= call.window
    return beyond | (distance < 0) if call.is_causal else beyond


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x [nb, Hkv, G, ns, a] times weight [1 | nb, Hkv, a, c]: [nb, Hkv, G, ns, c]."""
    batch, heads, groups, rows, inner = x.shape
    if weight.shape[0] == batch:
        flat = x.reshape(batch, heads, groups * rows, inner)
        return torch.matmul(flat, weight).unflatten(2, (groups, rows))
    flat = x.transpose(0, 1).reshape(heads, batch * groups * rows, inner)
    return torch.bmm(flat, weight[0]).unflatten(1, (batch, groups, rows)).transpose(0, 1)


def _pair(x: Tensor, y: Tensor, part: _Part) -> Tensor:
    """x^T y over the rows that share keys: [1 | nb, Hkv, a, c]."""
    batch, heads, groups, rows, _ = x.shape
    if part.keys.shape[0] == batch:
        flat = [one.reshape(batch, heads, groups * rows, one.shape[-1]) for one in (x, y)]
        return torch.matmul(flat[0].transpose(-1, -2), flat[1])
    each = batch * groups * rows
    flat = [one.transpose(0, 1).reshape(heads, each, one.shape[-1]) for one in (x, y)]
    return torch.bmm(flat[0].transpose(-1, -2), flat[1])[None]


def _add(made: dict[str, Tensor], block: _Block, part: _Part, name: str, more: Tensor) -> None:
    """Add a block's gradient of keys or values to the whole one."""
    if not part.is_prefix:
        made[name][block.batch] += more
        return
    into = made[f"prefix_{name}"]
    if part.which is None:
        into += more
        return
    # A product instead of an index_add, whose order is not fixed on every device.
    chosen = part.which == torch.arange(into.shape[0], device=into.device)[:, None]  # [N, nb]
    into += (chosen.to(more.dtype) @ more.flatten(1)).view(into.shape)


def _strides(heads: int, queries: int, width: int) -> tuple[int, ...]:
    """Of [B, Hq, S, D] that is dense as [B, S, Hq, D]."""
    return queries * heads * width, width, heads * width, 1


# The sequence's part by torch's own attention for CPUs, which gives and takes the log-sum-exp.


def serves_sequence(call: _Call) -> bool:
    """Whether torch's kernel computes the sequence's part, and the prefix is merged into it.

    Always on a CPU, where no one kernel has both: merged, attention to S = 1024 and P = 20 takes 16
    to 21% more than without a prefix, over the concatenation 35 to 56%. But that kernel has no
    dropout, no soft-capping and no two head sizes, and divides by zero where something is empty.
    """
    q, k, v = call.q, call.k, call.v
    return (
        q.device.type == "cpu"
        and call.dropout_p == 0.0
        and call.softcap is None
        and v.shape[-1] == q.shape[-1]
        and all(size > 0 for size in (*q.shape, *k.shape))
    )


def _flash_operands(call: _Call) -> tuple[list[Tensor], bool, Tensor | None]:
    """q, k and v, whether a triangle is the mask, and the mask otherwise."""
    tensors = [_dense(one) for one in (call.q, call.k, call.v)]
    queries, keys = call.q.shape[2], call.k.shape[2]
    mask = call.attn_mask
    # The kernel aligns at the upper left, and multiplies what its triangle hides by the scale; one
    # query is the last in time.
    triangle = call.is_causal and queries == keys and call.scale > 0
    if mask is None and call.window is None and (triangle or not call.is_causal):
        return tensors, call.is_causal, None
    if queries == 1 and call.window is None and mask is None:
        return tensors, False, None
    dtype = call.q.dtype
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)
    elif mask is not None:
        mask = mask.to(dtype).masked_fill(hides(mask), -math.inf)
    hidden = _hidden(call, 0, queries)
    if hidden is not None:
        base = torch.zeros(1, 1, 1, 1, dtype=dtype) if mask is None else mask
        mask = base.masked_fill(hidden, -math.inf)
    return tensors, False, mask


def _flash(call: _Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the sequence alone, -inf where a row sees none of it."""
    (q, k, v), triangle, mask = _flash_operands(call)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, triangle, attn_mask=mask, scale=call.scale
    )
    if mask is not None:  # for a row without a key the kernel says 0
        lse = lse.masked_fill((mask == -math.inf).all(-1), -math.inf)
    return out, lse


def _flash_backward(call: _Call, dy: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    (q, k, v), triangle, mask = _flash_operands(call)
    grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _dense(dy), q, k, v, y, lse, 0.0, triangle, attn_mask=mask, scale=call.scale
    )
    return grads


def _dense(x: Tensor) -> Tensor:
    """x with its last dimension as the kernel reads it."""
    return x if x.stride(-1) == 1 else x.contiguous()


# A plain prefix by the same kernel, with the queries of all samples of a block as one sample's: so
# the gradients of its keys and values come summed over the batch.


def _as_one(block: _Block, x: Tensor, wide: torch.dtype) -> Tensor:
    """The block of x [B, Hq, S, n], or [B, Hq, S], as [1, Hq, nb ns, n]; often a view."""
    flat = x[block.batch, :, block.query].to(wide).transpose(1, 2).flatten(0, 1)
    flat = flat.unsqueeze(0).transpose(1, 2)
    return _dense(flat) if flat.ndim == 4 else flat


def _as_many(block: _Block, x: Tensor, samples: int) -> Tensor:
    """The inverse of `_as_one`."""
    return x.squeeze(0).unflatten(1, (samples, -1)).transpose(0, 1)


def _merge(call: _Call, of_sequence: Tensor, its_lse: Tensor, y: Tensor, lse: Tensor) -> None:
    """Write the output and log-sum-exp of both parts; y may be `of_sequence` itself."""
    keys, values = (_dense(one.to(call.wide)) for one in (call.prefix_k, call.prefix_v))
    for block in call.blocks(False):
        read = _as_one(block, call.q, call.wide)
        out, own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            read, keys, values, scale=call.scale
        )
        at = (block.batch, slice(None), block.query)
        samples = its_lse[at].shape[0]
        out, own = _as_many(block, out, samples), _as_many(block, own, samples)
        before = its_lse[at].to(call.wide)
        share = torch.sigmoid(own - before).unsqueeze(-1)
        total = torch.logaddexp(before, own)
        made = of_sequence[at].to(call.wide)  # in float32 itself, to be changed in place
        made.lerp_(out, share)
        if call.of_sinks is not None:
            both, sinks = total, call.of_sinks.to(call.wide).view(-1, 1)
            total = torch.logaddexp(both, sinks)
            made.mul_(torch.exp(both - total).unsqueeze(-1))
        if y is not of_sequence or y.dtype != call.wide:
            y[at] = made
        lse[at] = total


def _merge_backward(
    call: _Call,
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    made: dict[str, Tensor],
    asked: dict[str, bool],
) -> None:
    """Add the prefix's part to what is there of dq, and to its own gradients and the sinks'."""
    keys, values = (_dense(one.to(call.wide)) for one in (call.prefix_k, call.prefix_v))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for block in call.blocks(False):
        at = (block.batch, slice(None), block.query)
        read, of_y, out = (_as_one(block, one, call.wide) for one in (call.q, dy, y))
        total = _as_one(block, lse, call.wide)
        if asked["q"] or asked["prefix_k"] or asked["prefix_v"]:
            dq, dk, dv = backward(
                of_y, read, keys, values, out, total, 0.0, False, scale=call.scale
            )
            made["prefix_k"] += dk
            made["prefix_v"] += dv
            if asked["q"]:
                made["q"][at] += _as_many(block, dq, lse[at].shape[0])
        if asked["sinks"]:
            delta = (of_y * out).sum(-1).squeeze(0)  # [Hq, rows]
            assert call.of_sinks is not None
            sinks = call.of_sinks.to(call.wide).unsqueeze(1)
            made["sinks"] -= (torch.exp(sinks - total.squeeze(0)) * delta).sum(1)
