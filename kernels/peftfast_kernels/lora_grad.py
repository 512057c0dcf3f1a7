"""Gradients of the adapters, and the bottleneck's: one pass over dy, one over x.

    g_i  = scale_i * dy B_i      dB_i = dy^T t_i              (pass over dy [M, N])
    dA_i = g_i^T (mask_i * x)                                 (pass over x [M, K])

A program owns BLOCK_N columns and a span of rows: the sums over rows stay in registers, the
partial results go to float32 workspaces [splits, ...], written and read once and summed in a
fixed order. g is a sum over columns, so the dy pass leaves it in [N / BLOCK_N, M, sum r_i] parts;
above some rank reading dy twice is cheaper (`join_dy_passes`). Moves dy, B_i, t_i, g, dB_i and x,
g, dA_i once each, beside the workspaces.
"""

# The kernels grow tuples in unrolled loops, which mypy takes for a change of type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles, workspace
from peftfast_kernels.dots import dot_adapter_left, dot_adapter_right
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
from peftfast_kernels.lora_shrink import lora_shrink
from peftfast_kernels.philox import keep_tile
from peftfast_kernels.split_reduce import split_reduce


@triton.jit(do_not_specialize=["M", "span"])
def _lora_grad_b_kernel(
    dy_ptr,
    b_ptrs,
    t_ptrs,
    g_ptrs,
    db_ptrs,
    M,
    N,
    span,
    stride_ym,
    stride_yn,
    strides_bn,
    strides_br,
    strides_tm,
    stride_gs,
    stride_gm,
    stride_ds,
    strides_dn,
    ranks,
    scales,
    NEED_G: tl.constexpr,
    NEED_B: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1).to(tl.int64)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rr = tl.arange(0, RANK_BLOCK)
    start = pid_s * span
    bs = ()
    accs = ()
    for i in tl.static_range(len(t_ptrs)):
        if NEED_G:
            b_position = rn[:, None] * strides_bn[i] + rr[None, :] * strides_br[i]
            b_inside = (rn[:, None] < N) & (rr[None, :] < ranks[i])
            bs = bs + (tl.load(b_ptrs[i] + b_position, mask=b_inside, other=0.0).to(COMPUTE),)
        if NEED_B:
            accs = accs + (tl.zeros((BLOCK_N, RANK_BLOCK), dtype=tl.float32),)
    for m0 in range(start, tl.minimum(start + span, M), BLOCK_M):
        rm = m0 + tl.arange(0, BLOCK_M)
        position = rm[:, None] * stride_ym + rn[None, :] * stride_yn
        inside = (rm[:, None] < M) & (rn[None, :] < N)
        dy = tl.load(dy_ptr + position, mask=inside, other=0.0).to(COMPUTE)  # [BM, BN]
        updated = ()
        for i in tl.static_range(len(t_ptrs)):
            mask = (rm[:, None] < M) & (rr[None, :] < ranks[i])
            if NEED_G:
                g = tl.zeros((BLOCK_M, RANK_BLOCK), dtype=tl.float32)
                g = dot_adapter_right(dy, bs[i], g, PRECISION) * scales[i]
                place = pid_n * stride_gs + rm[:, None] * stride_gm + rr[None, :]
                tl.store(g_ptrs[i] + place, g, mask=mask)
            if NEED_B:
                t = tl.load(
                    t_ptrs[i] + rm[:, None] * strides_tm[i] + rr[None, :], mask=mask, other=0.0
                )
                acc = dot_adapter_right(tl.trans(dy), t.to(COMPUTE), accs[i], PRECISION)
                updated = updated + (acc,)
        accs = updated
    if NEED_B:
        for i in tl.static_range(len(t_ptrs)):
            db_position = pid_s * stride_ds + rn[:, None] * strides_dn[i] + rr[None, :]
            db_inside = (rn[:, None] < N) & (rr[None, :] < ranks[i])
            tl.store(db_ptrs[i] + db_position, accs[i], mask=db_inside)


@triton.jit(do_not_specialize=["M", "span"])
def _lora_grad_a_kernel(
    x_ptr,
    g_ptrs,
    da_ptrs,
    seed_ptr,
    M,
    K,
    span,
    stride_xm,
    stride_xk,
    strides_gm,
    stride_ds,
    ranks,
    limits,
    seeds,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_k = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1).to(tl.int64)
    rk = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    rr = tl.arange(0, RANK_BLOCK)
    start = pid_s * span
    accs = ()
    for _ in tl.static_range(len(g_ptrs)):
        accs = accs + (tl.zeros((RANK_BLOCK, BLOCK_N), dtype=tl.float32),)
    for m0 in range(start, tl.minimum(start + span, M), BLOCK_M):
        rm = m0 + tl.arange(0, BLOCK_M)
        position = rm[:, None] * stride_xm + rk[None, :] * stride_xk
        inside = (rm[:, None] < M) & (rk[None, :] < K)
        x = tl.load(x_ptr + position, mask=inside, other=0.0)  # [BM, BN]
        updated = ()
        for i in tl.static_range(len(g_ptrs)):
            dropped = x
            if DROPOUT:
                seed = tl.load(seed_ptr + seeds[i])
                keep = keep_tile(seed, limits[i], rm, pid_k * BLOCK_N, K, BLOCK_M, BLOCK_N)
                dropped = tl.where(keep, x, 0.0)
            mask = (rm[:, None] < M) & (rr[None, :] < ranks[i])
            g = tl.load(g_ptrs[i] + rm[:, None] * strides_gm[i] + rr[None, :], mask=mask, other=0.0)
            g_rows = tl.trans(g.to(COMPUTE))  # [RB, BM]
            acc = dot_adapter_left(g_rows, dropped.to(COMPUTE), accs[i], PRECISION)
            updated = updated + (acc,)
        accs = updated
    for i in tl.static_range(len(g_ptrs)):
        place = pid_s * stride_ds + rr[:, None] * K + rk[None, :]
        tl.store(da_ptrs[i] + place, accs[i], mask=(rr[:, None] < ranks[i]) & (rk[None, :] < K))


def lora_grad_b(
    dy: Tensor,
    lanes: Sequence[Lane],
    ts: Sequence[Tensor],
    g: Tensor | None,
    dbs: Mapping[int, Tensor],
) -> None:
    """Fill g and the dB of one linear's adapters.

    Args:
        dy: [M, N], any strides.
        lanes: the linear's.
        ts: one a lane, [M, rank], unit inner stride; their dtype is the one that products are
        computed in.
        g: [M, sum of ranks], contiguous, to be filled; None where it isn't needed.
        dbs: by adapter, [N, r], contiguous, to be filled; empty where none is needed.
    """
    rows, columns = dy.shape
    portions = list(launches(lanes))
    block, _, first = portions[0]
    tile = tiles.grad_b_tile(len(first), block)
    rank = sum(lane.rank for lane in lanes)
    if g is not None and not (dbs and tiles.join_dy_passes(rank, tile.block_n, dy.element_size())):
        lora_shrink(dy, lanes, [lane.b.t() for lane in lanes], g, None)
        g = None
    if g is None and not dbs:
        return
    blocks = triton.cdiv(columns, tile.block_n)
    span, splits = tiles.row_splits(rows, blocks, tile.block_m, device.sm_count(dy.device))
    db_parts = _Parts(dbs, splits, dy.device)
    partial, outs = db_parts.partial(), list(dbs.values())
    db_views = (
        [db_parts.first(lane.index)[:, lane.row : lane.row + lane.rank] for lane in lanes]
        if dbs
        else []
    )
    g_views: list[Tensor] = []
    strides_g = (0, 0)
    if g is not None:
        g_part = workspace.allocate((blocks, *g.shape), dy.device)
        g_views = rank_views(g_part, lanes)
        strides_g = (g_part.stride(0), g_part.stride(1))
        partial, outs = [*partial, g_part.view(blocks, -1)], [*outs, g]
    for _, start, portion in portions:
        here = slice(start, start + len(portion))
        bs = [lane.b for lane in portion]
        launch(
            _lora_grad_b_kernel,
            (blocks, splits),
            dy,
            tuple(bs),
            tuple(ts[here]),
            tuple(g_views[here]),
            tuple(db_views[here]),
            rows,
            columns,
            span,
            dy.stride(0),
            dy.stride(1),
            strides(bs, 0),
            strides(bs, 1),
            strides(ts[here], 0),
            *strides_g,
            db_parts.stride,
            strides(db_views[here], 0),
            tuple(lane.rank for lane in portion),
            tuple(lane.scale for lane in portion),
            mma=skinny_mma(dy.dtype, ts[0].dtype),
            NEED_G=g is not None,
            NEED_B=bool(dbs),
            COMPUTE=triton_dtype(ts[0].dtype),
            PRECISION=device.adapter_precision(dy.dtype, ts[0].dtype),
            RANK_BLOCK=block,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    split_reduce(partial, outs)


def lora_grad_a(
    x: Tensor,
    lanes: Sequence[Lane],
    gs: Sequence[Tensor],
    das: Mapping[int, Tensor],
    seed: Tensor | None,
) -> None:
    """Fill the dA of every adapter that reads x.

    Args:
        x: [M, K], any strides.
        lanes: of the adapters in `das`.
        gs: one a lane, [M, rank], unit inner stride; their dtype is the one that products are
        computed in.
        das: by adapter, [r, K], contiguous, to be filled.
        seed: int64, one an adapter; None switches dropout off.
    """
    rows, columns = x.shape
    portions = list(launches(lanes))
    block, _, first = portions[0]
    tile = tiles.grad_a_tile(device.arch(x.device), len(first), block)
    blocks = triton.cdiv(columns, tile.block_n)
    span, splits = tiles.row_splits(rows, blocks, tile.block_m, device.sm_count(x.device))
    parts = _Parts(das, splits, x.device)
    views = [parts.first(lane.index)[lane.row : lane.row + lane.rank] for lane in lanes]
    for _, start, portion in portions:
        here = slice(start, start + len(portion))
        dropping = with_dropout(portion, seed)
        launch(
            _lora_grad_a_kernel,
            (blocks, splits),
            x,
            tuple(gs[here]),
            tuple(views[here]),
            seed,
            rows,
            columns,
            span,
            x.stride(0),
            x.stride(1),
            strides(gs[here], 0),
            parts.stride,
            tuple(lane.rank for lane in portion),
            tuple(lane.limit for lane in dropping),
            tuple(lane.index for lane in dropping),
            mma=skinny_mma(x.dtype, gs[0].dtype),
            COMPUTE=triton_dtype(gs[0].dtype),
            PRECISION=device.adapter_precision(x.dtype, gs[0].dtype),
            DROPOUT=bool(dropping),
            RANK_BLOCK=block,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    split_reduce(parts.partial(), list(das.values()))


class _Parts:
    """One workspace [splits, n] for the partial sums of several outputs, laid side by side."""

    def __init__(self, outs: Mapping[int, Tensor], splits: int, device: torch.device):
        self._outs = outs
        sizes = [out.numel() for out in outs.values()]
        self._columns: dict[int, Tensor] = {}
        self.stride = sum(sizes)
        if outs:
            columns = workspace.allocate((splits, self.stride), device).split(sizes, dim=1)
            self._columns = dict(zip(outs, columns, strict=True))

    def partial(self) -> list[Tensor]:
        """Each output's columns, [splits, numel]."""
        return list(self._columns.values())

    def first(self, index: int) -> Tensor:
        """The first split of an output, in the output's shape."""
        return self._columns[index][0].view(self._outs[index].shape)
