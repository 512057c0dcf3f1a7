"""The LoRA linear, forward and backward, out of its kernels.

    t_i  = scale_i * (mask_i * x) A_i^T          lora_shrink   one read of x
    y_j  = x W_j^T + b_j + sum_i t_i B_i^T       lora_matmul   the GEMM's own traffic
    g_i  = scale_i * dy_j B_i, dB_i = dy_j^T t_i lora_grad_b   one read of dy
    dA_i = g_i^T (mask_i * x)                    lora_grad_a   one read of x
    dx   = sum_j dy_j W_j + sum_i mask_i * (g_i A_i)           lora_matmul

with scale_i = scaling_i / P(kept). Beyond the frozen linears' own traffic: x twice and dy once.
In the "library" plan (`tiles.gemm_plan`) torch's GEMM adds to the low-rank part instead: y and dx
are written once more and read once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast_kernels import device, tiles
from peftfast_kernels.lane import Lane, lanes_of, rank_views
from peftfast_kernels.launch import Launch, recording
from peftfast_kernels.lora_grad import lora_grad_a, lora_grad_b
from peftfast_kernels.lora_matmul import lora_matmul
from peftfast_kernels.lora_shrink import lora_shrink
from peftfast_kernels.variant import Variant


def lora_linear_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    owners: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Outputs y_j [M, N_j] and the bottlenecks t [M, sum r_i], side by side; x is [M, K]."""
    x = _plain(x)
    seed = None if seed is None else _plain(seed).contiguous()
    weights, lora_a, lora_b = (_all_plain(v) for v in (weights, lora_a, lora_b))
    biases = [None if b is None else _plain(b).contiguous() for b in biases]
    rows = x.shape[0]
    t = x.new_empty((rows, sum(a.shape[0] for a in lora_a)), dtype=_bottleneck_dtype(lora_a))
    ys = [x.new_empty((rows, w.shape[0])) for w in weights]
    if rows == 0:
        return ys, t
    lanes = lanes_of(lora_a, lora_b, owners, scaling, dropout_p, tiles.MAX_RANK_BLOCK)
    with device.current(x):
        lora_shrink(x, lanes, [lane.a for lane in lanes], t, seed)
        views = dict(zip(lanes, rank_views(t, lanes), strict=True))
        for j, (y, w, bias) in enumerate(zip(ys, weights, biases, strict=True)):
            own = [lane for lane in lanes if lane.owner == j]
            ts = [views[lane] for lane in own]
            us = [lane.b.t() for lane in own]
            if not own:
                ys[j] = F.linear(x, w, bias)
            elif _fused(x):
                lora_matmul(y, [x], [w.t()], bias, own, ts, us, None)
            else:
                lora_matmul(y, [], [], bias, own, ts, us, None)
                y.addmm_(x, w.t())
    return ys, t


def lora_linear_backward(
    dys: Sequence[Tensor | None],
    t: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    owners: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
    need_a: Sequence[bool],
    need_b: Sequence[bool],
) -> list[Tensor]:
    """The gradients asked for, in the order x, weights, biases, lora_a, lora_b.

    dys are [M, N_j], None for zero; t is the forward's.
    """
    x = _plain(x)
    seed = None if seed is None else _plain(seed).contiguous()
    weights, lora_a, lora_b = (_all_plain(v) for v in (weights, lora_a, lora_b))
    present = {j: _plain(dy) for j, dy in enumerate(dys) if dy is not None and dy.shape[0] > 0}
    lanes = lanes_of(lora_a, lora_b, owners, scaling, dropout_p, tiles.MAX_RANK_BLOCK)
    das = {i: _like(a, owners[i] in present) for i, a in enumerate(lora_a) if need_a[i]}
    with_b = {owners[i] for i, need in enumerate(need_b) if need}
    dbs = {i: _like(b, owners[i] in present) for i, b in enumerate(lora_b) if owners[i] in with_b}
    grads = []
    with device.current(x):
        gs = _pass_over_dy(present, t, lanes, das, dbs, need_x)
        live_a = [lane for lane in lanes if lane.index in das and lane.owner in present]
        if live_a:
            live_das = {lane.index: das[lane.index] for lane in live_a}
            lora_grad_a(x, live_a, [gs[lane] for lane in live_a], live_das, seed)
        if need_x:
            grads.append(_grad_x(x, present, weights, lanes, gs, seed))
    for j, w in enumerate(weights):
        if need_weights[j]:
            grads.append(torch.mm(present[j].t(), x) if j in present else torch.zeros_like(w))
    for j, w in enumerate(weights):
        if need_biases[j]:
            grads.append(present[j].sum(0) if j in present else w.new_zeros(w.shape[0]))
    grads.extend(das.values())
    grads.extend(db for i, db in dbs.items() if need_b[i])
    return grads


def _pass_over_dy(
    dys: Mapping[int, Tensor],
    t: Tensor,
    lanes: Sequence[Lane],
    das: Mapping[int, Tensor],
    dbs: Mapping[int, Tensor],
    need_x: bool,
) -> dict[Lane, Tensor]:
    """Fill every dB whose dy is there; returns g by lane, [M, rank], where it will be read."""
    ts = dict(zip(lanes, rank_views(t, lanes), strict=True))
    gs: dict[Lane, Tensor] = {}
    for j, dy in dys.items():
        own = [lane for lane in lanes if lane.owner == j]
        if not own:
            continue
        g = None
        if need_x or any(lane.index in das for lane in own):
            g = t.new_empty((dy.shape[0], sum(lane.rank for lane in own)))
            gs.update(zip(own, rank_views(g, own), strict=True))
        own_dbs = {lane.index: dbs[lane.index] for lane in own if lane.index in dbs}
        lora_grad_b(dy, own, [ts[lane] for lane in own], g, own_dbs)
    return gs


def _grad_x(
    x: Tensor,
    dys: Mapping[int, Tensor],
    weights: Sequence[Tensor],
    lanes: Sequence[Lane],
    gs: Mapping[Lane, Tensor],
    seed: Tensor | None,
) -> Tensor:
    if not dys:
        return x.new_zeros(x.shape)
    dx = x.new_empty(x.shape)
    live = [lane for lane in lanes if lane in gs]
    low_rank = (live, [gs[lane] for lane in live], [lane.a for lane in live], seed)
    ws = [weights[j] for j in dys]
    if _fused(x):
        lora_matmul(dx, list(dys.values()), ws, None, *low_rank)
        return dx
    lora_matmul(dx, [], [], None, *low_rank)
    for dy, w in zip(dys.values(), ws, strict=True):
        dx.addmm_(dy, w)
    return dx


def _fused(x: Tensor) -> bool:
    return tiles.gemm_plan(device.arch(x.device), x.dtype, device.on_gpu(x.device)) == "fused"


def _plain(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory: no pending negation, no zeros without storage."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def _all_plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_plain(tensor) for tensor in tensors]


def _like(parameter: Tensor, filled: bool) -> Tensor:
    """A contiguous gradient: to be filled, or zero where no gradient arrives."""
    return parameter.new_empty(parameter.shape) if filled else parameter.new_zeros(parameter.shape)


def _bottleneck_dtype(lora_a: Sequence[Tensor]) -> torch.dtype:
    """The dtype of t and g: the widest of the adapters'."""
    return functools.reduce(torch.promote_types, (a.dtype for a in lora_a))


def record(
    arch: int,
    rows: int,
    in_features: int,
    out_features: Sequence[int],
    ranks: Sequence[int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    *,
    dropout_p: float = 0.0,
    bias: bool = False,
    sm_count: int = 132,
) -> list[Launch]:
    """The launches of a forward and backward of sibling linears, an adapter each, on any GPU."""

    def empty(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    x = empty(rows, in_features)
    weights = [empty(n, in_features) for n in out_features]
    biases = [empty(n) if bias else None for n in out_features]
    lora_a = [empty(r, in_features, like=adapter_dtype) for r in ranks]
    lora_b = [empty(n, r, like=adapter_dtype) for n, r in zip(out_features, ranks, strict=True)]
    seed = empty(len(ranks), like=torch.int64) if dropout_p else None
    count = len(ranks)
    settings = (list(range(count)), [1.0] * count, [dropout_p] * count, seed)
    yes, no = [True] * count, [False] * count
    with recording(arch, sm_count) as launches:
        ys, t = lora_linear_forward(x, weights, biases, lora_a, lora_b, *settings)
        lora_linear_backward(
            ys, t, x, weights, biases, lora_a, lora_b, *settings, True, no, no, yes, yes
        )
    return launches


def programs(
    m: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    arch: int,
    sm_count: int = 132,
) -> dict[str, int]:
    """Programs in each launch of one linear's forward and backward, by kernel."""
    launches = record(
        arch, m, in_features, [out_features], [rank], dtype, dtype, dropout_p=0.1, sm_count=sm_count
    )
    counts: dict[str, int] = {}
    for launch in launches:
        name = launch.name.strip("_")
        again = sum(key.split(" #")[0] == name for key in counts)
        counts[f"{name} #{again + 1}" if again else name] = launch.programs
    return counts


def aot_variants(arch: int) -> Iterator[Variant]:
    """Every kernel as the tiles pinned for this architecture have it, both GEMM plans included."""
    bf16, fp32 = torch.bfloat16, torch.float32
    wide, qkv = [4096], [4096, 1024, 1024]
    cases = [
        ("bf16", bf16, bf16, 4096, wide, [16], 0.0),
        ("bf16", bf16, bf16, 4096, wide, [128], 0.1),
        ("bf16", bf16, bf16, 4096, qkv, [16, 16, 16], 0.1),
        ("bf16", bf16, bf16, 1000, [1000], [8], 0.1),
        ("bf16+fp32", bf16, fp32, 4096, wide, [16], 0.1),
        ("bf16+fp32", bf16, fp32, 4096, wide, [64], 0.0),
        ("fp32", fp32, fp32, 4096, wide, [16], 0.1),
    ]
    seen = set()
    for label, dtype, adapter_dtype, in_features, outs, ranks, p in cases:
        for plan in ("fused", "library"):
            with tiles.forced_gemm_plan(plan):
                launches = record(
                    arch,
                    8192,
                    in_features,
                    outs,
                    ranks,
                    dtype,
                    adapter_dtype,
                    dropout_p=p,
                    bias=True,
                )
            for variant in (launch.variant(label) for launch in launches):
                run = (variant.num_warps, variant.num_stages)
                kind = (variant.name, variant.signature, variant.constexprs, variant.attrs, run)
                if repr(kind) not in seen:
                    seen.add(repr(kind))
                    yield variant
