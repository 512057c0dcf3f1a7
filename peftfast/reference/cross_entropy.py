"""Cross-entropy of a linear head's logits in plain PyTorch, without ever holding all logits.

For rows m of x [M, K], a head W [V, K] and targets c_m:

    l = x W^T + b + sum_i t_i B_i^T      t_i = scaling_i / keep_i * (mask_i * x) A_i^T
    z = logit_scale * l                  or softcap * tanh(logit_scale * l / softcap)
    loss_m = log sum_v exp(z_mv) - z_mc                                (0 where c_m is ignored)

and, with w_m the weight of row m,

    dz = w_m (softmax(z) - onehot(c_m))  dl = logit_scale * (1 - (z / softcap)^2) * dz
    dx = dl W + sum_i mask_i * (g_i A_i) g_i = scaling_i / keep_i * dl B_i
    db = sum over rows of dl             dB_i = dl^T t_i       dA_i = g_i^T (mask_i * x)

Rows are taken a chunk at a time: the logits of one chunk become their own gradient in place, which
is multiplied away before the next. Logits are in the dtype of the product, softmax and losses in
float32 (float64 for float64). Chunks over rows as in Hsu et al., "Liger Kernel" (2024); the cap as
in Gemma 2 (2024), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.reference.dropout import drop, keep_scale
from peftfast.reference.linear import base_gradient, base_linears
from peftfast.reference.lora import Drop, lora_linear

# As `row_losses`.
RowLosses = Callable[
    [Tensor, Tensor, Tensor | None, int, float | None, float | None, bool],
    tuple[Tensor, Tensor],
]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lora_a: Sequence[Tensor] = (),
    lora_b: Sequence[Tensor] = (),
    scaling: Sequence[float] = (),
    dropout_p: Sequence[float] = (),
    seed: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """The formula itself, differentiable by autograd: what everything else is tested against.

    Args:
        x: [M, K]; weight: [V, K]; bias: [V] or None; target: int64 [M].
        lora_a: I of [r_i, K]; lora_b: I of [V, r_i]; seed: int64 [I] where a dropout_p is not 0.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
    """
    owners = [0] * len(lora_a)
    (logits,) = lora_linear(
        x, [weight], [bias], lora_a, lora_b, owners, scaling, dropout_p, seed
    )  # fmt: skip
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    wide = logits.to(loss_dtype(logits.dtype))
    return F.cross_entropy(wide, target, ignore_index=ignore_index, reduction=reduction)


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    bias: bool
    lora_a: Sequence[bool]
    lora_b: Sequence[bool]

    def any(self) -> bool:
        return self.x or self.bias or any(self.lora_a) or any(self.lora_b)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and losses over logits of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def row_losses(
    logits: Tensor,
    target: Tensor,
    row_weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float | None,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses [C] of logits l [C, V], and dl, in place of the logits where that is asked for.

    Args:
        logits: is used up.
        target: int64 [C].
        row_weights: [C], by which each row's gradient is multiplied; None: ones.

    Returns:
        The losses, and dl in the logits' dtype (without `need_gradient`: nothing of use).
    """
    z = logits.to(loss_dtype(logits.dtype))
    if logit_scale is not None:
        z.mul_(logit_scale)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = torch.addcmul(z.new_ones(()), z, z, value=-1.0) if need_gradient else None
        z.mul_(softcap)
    ignored = target == ignore_index
    column = target.masked_fill(ignored, 0).unsqueeze(1)
    z.sub_(z.amax(1, keepdim=True))
    picked = z.gather(1, column).squeeze(1)
    total = z.exp_().sum(1)
    losses = total.log().sub_(picked).masked_fill_(ignored, 0.0)
    if not need_gradient:
        return losses, logits
    z.div_(total.unsqueeze(1))
    z.scatter_add_(1, column, z.new_full((), -1.0).expand(column.shape))
    factor = (~ignored).to(z.dtype)
    if row_weights is not None:
        factor = factor * row_weights
    if logit_scale is not None:
        factor = factor * logit_scale
    z.mul_(factor.unsqueeze(1))
    if slope is not None:
        z.mul_(slope)
    return losses, z if z.dtype == logits.dtype else logits.copy_(z)


def chunked_cross_entropy(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    target: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float | None,
    chunk_rows: int,
    needs: Needs,
    row_weights: Tensor | None = None,
    *,
    gemm_dtype: torch.dtype | None = None,
    drop: Drop = drop,
    row_losses: RowLosses = row_losses,
) -> tuple[Tensor, list[Tensor]]:
    """Losses [M] and the gradients of their sum, each row's weighted by `row_weights`, in the
    order x, bias, lora_a, lora_b, as far as `needs` asks for them.

    Args:
        x: [M, K]; target: int64 [M]; the other operands as in `linear_cross_entropy`.
        weights: the head's weight alone, which may be lazy, as `peftfast.reference.linear` says.
        chunk_rows: how many rows' logits are held at a time.
        gemm_dtype: a wider dtype for products of narrower operands, which are exact in it.
        drop, row_losses: as the functions of those names.
    """
    rows, wide = x.shape[0], loss_dtype(x.dtype)
    product = x.dtype if gemm_dtype is None else torch.promote_types(x.dtype, gemm_dtype)
    scales = [s * keep_scale(p) for s, p in zip(scaling, dropout_p, strict=True)]
    bottlenecks = []
    for i, a in enumerate(lora_a):
        own = torch.promote_types(a.dtype, product)
        inputs = _inputs(x.to(own), i, dropout_p, seed, drop)
        bottlenecks.append((torch.mm(inputs, a.to(own).t()) * scales[i]).to(own))
    ups = [b.to(t.dtype) for b, t in zip(lora_b, bottlenecks, strict=True)]
    losses = torch.zeros(rows, dtype=wide, device=x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs.x else None
    dbias = None if bias is None or not needs.bias else losses.new_zeros(bias.shape)
    dbs = [
        losses.new_zeros(b.shape) if need else None
        for b, need in zip(lora_b, needs.lora_b, strict=True)
    ]
    reads_g = [needs.x or need for need in needs.lora_a]
    gs = [torch.empty_like(t) if n else None for t, n in zip(bottlenecks, reads_g, strict=True)]
    for start in range(0, rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, rows))
        (logits,) = base_linears(x[part], weights, [bias], None)
        for t, b in zip(bottlenecks, ups, strict=True):
            logits.addmm_(t[part].to(logits.dtype), b.to(logits.dtype).t())
        losses[part], dl = row_losses(
            logits,
            target[part],
            None if row_weights is None else row_weights[part],
            ignore_index,
            softcap,
            logit_scale,
            needs.any(),
        )
        if dbias is not None:
            dbias += dl.sum(0, dtype=wide)
        if dx is not None:
            gradient = base_gradient([dl], x.dtype, weights, [dl.dtype])
            assert gradient is not None
            dx[part] = gradient
        for t, b, g, db in zip(bottlenecks, ups, gs, dbs, strict=True):
            if db is not None:
                db += torch.mm(dl.to(t.dtype).t(), t[part])
            if g is not None:
                torch.mm(dl.to(t.dtype), b, out=g[part])
        del logits, dl  # before the next chunk's
    das = []
    for i, g in enumerate(gs):
        if g is None:
            continue
        g.mul_(scales[i])
        if needs.lora_a[i]:
            das.append(torch.mm(g.t(), _inputs(x.to(g.dtype), i, dropout_p, seed, drop)))
        if dx is not None:
            delta = torch.mm(g, lora_a[i].to(g.dtype))
            dx += _inputs(delta, i, dropout_p, seed, drop).to(dx.dtype)
    found = [dx, None if dbias is None or bias is None else dbias.to(bias.dtype)]
    found += [da.to(a.dtype) for da, a in zip(das, _chosen(lora_a, needs.lora_a), strict=True)]
    found += [None if db is None else db.to(b.dtype) for db, b in zip(dbs, lora_b, strict=True)]
    return losses, [one for one in found if one is not None]


def _chosen(values: Sequence[Tensor], chosen: Sequence[bool]) -> list[Tensor]:
    return [value for value, yes in zip(values, chosen, strict=True) if yes]


def _inputs(x: Tensor, i: int, p: Sequence[float], seed: Tensor | None, drop: Drop) -> Tensor:
    """mask_i * x."""
    if p[i] == 0:
        return x
    assert seed is not None
    return drop(x, seed[i], p[i])
