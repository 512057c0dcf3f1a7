"""The down-projections of all adapters that read one x.

    t_i = scale_i * (mask_i * x) P_i^T, P_i [r_i, K]

x [M, K] is read once whatever the number of adapters, masks are regenerated in registers. Moves
x, the P_i and t once each: the floor. Where M alone gives too few programs the depth is split
through a float32 workspace [splits, M, sum r_i], written and read once.
"""

# The kernels grow tuples in unrolled loops, which mypy takes for a change of type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles, workspace
from peftfast_kernels.dots import dot_adapter_right
from peftfast_kernels.lane import (
    Lane,
    launches,
    rank_views,
    skinny_mma,
    strides,
    triton_dtype,
    with_dropout,
)
from peftfast_kernels.launch import launch
from peftfast_kernels.philox import keep_tile
from peftfast_kernels.split_reduce import split_reduce


@triton.jit(do_not_specialize=["M", "span"])
def _lora_shrink_kernel(
    x_ptr,
    p_ptrs,
    t_ptrs,
    seed_ptr,
    M,
    K,
    span,
    stride_xm,
    stride_xk,
    strides_pr,
    strides_pk,
    stride_ts,
    stride_tm,
    ranks,
    scales,
    limits,
    seeds,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1).to(tl.int64)
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rr = tl.arange(0, RANK_BLOCK)
    start = pid_s * span
    accs = ()
    for _ in tl.static_range(len(p_ptrs)):
        accs = accs + (tl.zeros((BLOCK_M, RANK_BLOCK), dtype=tl.float32),)
    for k0 in range(start, tl.minimum(start + span, K), BLOCK_K):
        rk = k0 + tl.arange(0, BLOCK_K)
        x_mask = rm[:, None] < M
        if not EVEN_K:
            x_mask = x_mask & (rk[None, :] < K)
        x = tl.load(
            x_ptr + rm[:, None] * stride_xm + rk[None, :] * stride_xk, mask=x_mask, other=0.0
        )
        updated = ()
        for i in tl.static_range(len(p_ptrs)):
            p_mask = rr[None, :] < ranks[i]
            if not EVEN_K:
                p_mask = p_mask & (rk[:, None] < K)
            position = rr[None, :] * strides_pr[i] + rk[:, None] * strides_pk[i]
            p = tl.load(p_ptrs[i] + position, mask=p_mask, other=0.0)  # [BK, RB]
            dropped = x
            if DROPOUT:
                seed = tl.load(seed_ptr + seeds[i])
                keep = keep_tile(seed, limits[i], rm, k0, K, BLOCK_M, BLOCK_K)
                dropped = tl.where(keep, x, 0.0)
            acc = dot_adapter_right(dropped.to(COMPUTE), p.to(COMPUTE), accs[i], PRECISION)
            updated = updated + (acc,)
        accs = updated
    for i in tl.static_range(len(p_ptrs)):
        position = pid_s * stride_ts + rm[:, None] * stride_tm + rr[None, :]
        t = (accs[i] * scales[i]).to(t_ptrs[i].dtype.element_ty)
        tl.store(t_ptrs[i] + position, t, mask=(rm[:, None] < M) & (rr[None, :] < ranks[i]))


def lora_shrink(
    x: Tensor, lanes: Sequence[Lane], projections: Sequence[Tensor], t: Tensor, seed: Tensor | None
) -> None:
    """Fill t.

    Args:
        x: [M, K], any strides.
        lanes: scale, dropout limit and seed of each projection.
        projections: one a lane, [rank, K], any strides.
        t: [M, sum of ranks], contiguous; its dtype is the one that the products are computed in.
        seed: int64, one an adapter; None switches dropout off.
    """
    rows, depth = x.shape
    portions = list(launches(lanes))
    block, _, first = portions[0]
    tile = tiles.shrink_tile(x.element_size(), t.element_size(), len(first), block)
    row_blocks = triton.cdiv(rows, tile.block_m)
    span, splits = tiles.depth_splits(depth, row_blocks, tile.block_k, device.sm_count(x.device))
    partial = t[None]
    if splits > 1:
        partial = workspace.allocate((splits, *t.shape), x.device)
    views = rank_views(partial, lanes)
    for _, start, portion in portions:
        here = slice(start, start + len(portion))
        dropping = with_dropout(portion, seed)
        launch(
            _lora_shrink_kernel,
            (row_blocks, splits),
            x,
            tuple(projections[here]),
            tuple(views[here]),
            seed,
            rows,
            depth,
            span,
            x.stride(0),
            x.stride(1),
            strides(projections[here], 0),
            strides(projections[here], 1),
            partial.stride(0),
            partial.stride(1),
            tuple(lane.rank for lane in portion),
            tuple(lane.scale for lane in portion),
            tuple(lane.limit for lane in dropping),
            tuple(lane.index for lane in dropping),
            mma=skinny_mma(x.dtype, t.dtype),
            COMPUTE=triton_dtype(t.dtype),
            PRECISION=device.adapter_precision(x.dtype, t.dtype),
            DROPOUT=bool(dropping),
            EVEN_K=depth % tile.block_k == 0,
            RANK_BLOCK=block,
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if splits > 1:
        split_reduce([partial.view(splits, -1)], [t])
