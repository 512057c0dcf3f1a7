"""The LoRA linear, forward and backward, out of its kernels.

    t_i  = scale_i * (mask_i * x) A_i^T          lora_shrink   one read of x
    y_j  = x W_j^T + b_j + sum_i t_i B_i^T       lora_matmul   the GEMM's own traffic
    g_i  = scale_i * dy_j B_i, dB_i = dy_j^T t_i lora_grad_b   one read of dy
    dA_i = g_i^T (mask_i * x)                    lora_grad_a   one read of x
    dx   = sum_j dy_j W_j + sum_i mask_i * (g_i A_i)           lora_matmul

with scale_i = scaling_i / P(kept). Beyond the frozen linears' own traffic: x twice and dy once.
In the "library" plan (`tiles.gemm_plan`) torch's GEMM adds to the low-rank part instead: y and dx
are written once more and read once.

Weights may be transient, dequantised into one buffer when they are read: then each is used up
before the next, and the siblings' parts of dx are added one by one, which reads and writes dx once
more for each. A base product may have a dtype C of its own: x and dy are rounded to C, the library
plan's product is written in C, and the low-rank part joins it in float32.
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

# The lanes of a launch, their bottlenecks, the factors that these meet, and the dropout seeds.
LowRank = tuple[Sequence[Lane], Sequence[Tensor], Sequence[Tensor], Tensor | None]


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
    *,
    compute_dtypes: Sequence[torch.dtype | None] | None = None,
    base_ys: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Outputs y_j [M, N_j] and the bottlenecks t [M, sum r_i], side by side; x is [M, K].

    Args:
        weights: [N_j, K] each, of linear j's compute dtype. They may be lazy, with an attribute
            `transient` that is true: a weight is then valid until the next one is read.
        compute_dtypes: dtype of linear j's own product, to which x and b are rounded; None: x's.
        base_ys: x W_j^T + b_j, contiguous, in x's dtype, where that is computed already: the
            low-rank part is added in place, and weights are not read.
    """
    x = _plain(x)
    seed = None if seed is None else _plain(seed).contiguous()
    lora_a, lora_b = _all_plain(lora_a), _all_plain(lora_b)
    dtypes = _compute_dtypes(x, compute_dtypes, len(biases))
    rows = x.shape[0]
    t = x.new_empty((rows, sum(a.shape[0] for a in lora_a)), dtype=_bottleneck_dtype(lora_a))
    if rows == 0:
        if base_ys is not None:
            return list(base_ys), t
        return [x.new_empty((0, weights[j].shape[0])) for j in range(len(biases))], t
    lanes = lanes_of(lora_a, lora_b, owners, scaling, dropout_p, tiles.MAX_RANK_BLOCK)
    ys = []
    inputs = {x.dtype: x}
    with device.current(x):
        lora_shrink(x, lanes, [lane.a for lane in lanes], t, seed)
        views = dict(zip(lanes, rank_views(t, lanes), strict=True))
        for j, bias in enumerate(biases):
            own = [lane for lane in lanes if lane.owner == j]
            low_rank = (own, [views[lane] for lane in own], [lane.b.t() for lane in own], None)
            if base_ys is None:
                if dtypes[j] not in inputs:
                    inputs[dtypes[j]] = x.to(dtypes[j])
                bias = None if bias is None else _plain(bias).to(dtypes[j]).contiguous()
                y = _linear(inputs[dtypes[j]], _plain(weights[j]), bias, low_rank, x.dtype)
            else:
                y = base_ys[j]
                if own:
                    lora_matmul(y, [], [], None, *low_rank, base=y)
            ys.append(y)
    return ys, t


def _linear(
    x: Tensor, w: Tensor, bias: Tensor | None, low_rank: LowRank, dtype: torch.dtype
) -> Tensor:
    """x W^T + bias, computed in their dtype, plus the low-rank part, in `dtype`."""
    if not low_rank[0]:
        return F.linear(x, w, bias).to(dtype)
    y = x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)
    if _fused(x.device, x.dtype):
        lora_matmul(y, [x], [w.t()], bias, *low_rank)
    elif x.dtype != dtype:
        lora_matmul(y, [], [], None, *low_rank, base=F.linear(x, w, bias))
    else:
        lora_matmul(y, [], [], bias, *low_rank)
        y.addmm_(x, w.t())
    return y


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
    *,
    compute_dtypes: Sequence[torch.dtype | None] | None = None,
) -> list[Tensor]:
    """The gradients asked for, in the order x, weights, biases, lora_a, lora_b.

    dys are [M, N_j], None for zero; t is the forward's, and so is every other argument.
    """
    x = _plain(x)
    seed = None if seed is None else _plain(seed).contiguous()
    lora_a, lora_b = _all_plain(lora_a), _all_plain(lora_b)
    dtypes = _compute_dtypes(x, compute_dtypes, len(dys))
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
            grads.append(_grad_x(x, present, weights, dtypes, lanes, gs, seed))
    for j, need in enumerate(need_weights):
        if need:
            dy = present.get(j)
            grads.append(torch.zeros_like(weights[j]) if dy is None else torch.mm(dy.t(), x))
    for j, need in enumerate(need_biases):
        if need:
            dy = present.get(j)
            grads.append(x.new_zeros(weights[j].shape[0]) if dy is None else dy.sum(0))
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
    dtypes: Sequence[torch.dtype],
    lanes: Sequence[Lane],
    gs: Mapping[Lane, Tensor],
    seed: Tensor | None,
) -> Tensor:
    if not dys:
        return x.new_zeros(x.shape)
    dx = x.new_empty(x.shape)
    live = [lane for lane in lanes if lane in gs]
    low_rank = (live, [gs[lane] for lane in live], [lane.a for lane in live], seed)
    if all(_fused(x.device, dtypes[j]) for j in dys):
        _add_fused(dx, dys, weights, dtypes, low_rank)
    elif all(dtypes[j] == x.dtype for j in dys):
        lora_matmul(dx, [], [], None, *low_rank)
        for j, dy in dys.items():
            dx.addmm_(dy, _plain(weights[j]))
    else:
        sums: dict[torch.dtype, Tensor] = {}
        for j, dy in dys.items():
            dtype, dy = dtypes[j], dy.to(dtypes[j])
            if dtype in sums:
                sums[dtype].addmm_(dy, _plain(weights[j]))
            else:
                sums[dtype] = torch.mm(dy, _plain(weights[j]))
        first, *others = sums.values()
        lora_matmul(dx, [], [], None, *low_rank, base=first)
        for other in others:
            dx.add_(other)
    return dx


def _add_fused(
    dx: Tensor,
    dys: Mapping[int, Tensor],
    weights: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    low_rank: LowRank,
) -> None:
    """Fill dx with the low-rank part and every dy_j W_j, in as few launches as weights allow."""
    alike = len({dtypes[j] for j in dys}) == 1
    first, *others = dys
    if alike and not getattr(weights, "transient", False):
        rounded = [dy.to(dtypes[first]) for dy in dys.values()]
        lora_matmul(dx, rounded, [_plain(weights[j]) for j in dys], None, *low_rank)
        return
    lora_matmul(dx, [dys[first].to(dtypes[first])], [_plain(weights[first])], None, *low_rank)
    for j in others:
        dy, w = dys[j].to(dtypes[j]), _plain(weights[j])
        if dtypes[j] == dx.dtype:
            dx.addmm_(dy, w)
        else:
            lora_matmul(dx, [dy], [w], None, [], [], [], None, base=dx)


def _fused(where: torch.device, dtype: torch.dtype) -> bool:
    return tiles.gemm_plan(device.arch(where), dtype, device.on_gpu(where)) == "fused"


def _compute_dtypes(
    x: Tensor, compute_dtypes: Sequence[torch.dtype | None] | None, linears: int
) -> list[torch.dtype]:
    """The dtype of each linear's own product."""
    return [dtype or x.dtype for dtype in compute_dtypes or [None] * linears]


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
    compute_dtype: torch.dtype | None = None,
    with_base: bool = False,
    sm_count: int = 132,
) -> list[Launch]:
    """The launches of a forward and backward of sibling linears, an adapter each, on any GPU.

    With a `compute_dtype`, the base's, the weights are transient as 4-bit ones are; `with_base`,
    the base's outputs are there already, and only the forward is recorded.
    """

    def empty(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    x = empty(rows, in_features)
    weights: Sequence[Tensor] = [
        empty(n, in_features, like=compute_dtype or dtype) for n in out_features
    ]
    if compute_dtype is not None:
        weights = _Transient(weights)
    biases = [empty(n) if bias else None for n in out_features]
    lora_a = [empty(r, in_features, like=adapter_dtype) for r in ranks]
    lora_b = [empty(n, r, like=adapter_dtype) for n, r in zip(out_features, ranks, strict=True)]
    seed = empty(len(ranks), like=torch.int64) if dropout_p else None
    count = len(ranks)
    settings = (list(range(count)), [1.0] * count, [dropout_p] * count, seed)
    yes, no = [True] * count, [False] * count
    operands = (x, weights, biases, lora_a, lora_b, *settings)
    dtypes = [compute_dtype] * count
    base_ys = [empty(rows, n) for n in out_features] if with_base else None
    with recording(arch, sm_count) as launches:
        ys, t = lora_linear_forward(*operands, compute_dtypes=dtypes, base_ys=base_ys)
        if with_base:
            return launches
        lora_linear_backward(ys, t, *operands, True, no, no, yes, yes, compute_dtypes=dtypes)
    return launches


class _Transient(tuple[Tensor, ...]):
    transient = True


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
    """Every kernel as the tiles pinned for this architecture have it: both GEMM plans over dense
    weights, the architecture's own over 4-bit ones.
    """
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
                if (kind := _kind(variant)) not in seen:
                    seen.add(kind)
                    yield variant
    # Beside the dense weights' kernels: products narrower than x, siblings one by one, and outputs
    # of few rows, which are there already.
    pair, ranks = [4096, 4096], [16, 16]
    cast = record(
        arch, 8192, 4096, pair, ranks, fp32, fp32, dropout_p=0.1, bias=True, compute_dtype=bf16
    )
    few = record(arch, 8, 4096, wide, [16], bf16, fp32, with_base=True)
    for label, launches in (("fp32/bf16", cast), ("bf16+fp32", few)):
        for variant in (launch.variant(label) for launch in launches):
            kind = _kind(variant)
            if variant.name == "_lora_matmul_kernel" and kind not in seen:
                seen.add(kind)
                yield variant


def _kind(variant: Variant) -> str:
    """What makes a variant's machine code its own."""
    run = (variant.num_warps, variant.num_stages)
    return repr((variant.name, variant.signature, variant.constexprs, variant.attrs, run))
