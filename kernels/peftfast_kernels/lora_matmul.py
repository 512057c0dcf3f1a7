"""A GEMM, or a sum of GEMMs, with adapters' up-projections inside:

    out = base + sum_g x_g W_g + bias + sum_i mask_i * (t_i U_i)

Forward: one x, W^T, U_i = B_i^T, no mask. Gradient of x: the siblings' dy_g and W_g, U_i = A_i,
masks as in the forward. The low-rank part initialises the accumulator, so out is written once and
never read; siblings' gradients of x meet in registers instead of in memory. Moves x_g, W_g, bias,
t_i, U_i and out once each: the GEMMs' own traffic plus t and U. Without any x_g the kernel is the
up-projection alone (the library plan adds torch's GEMM to it).

The base, if any, is read once: a product that is there already, or out itself. x_g and W_g may be
narrower than out: everything meets in float32 and is rounded once, to out's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles
from peftfast_kernels.lane import Lane, strides, with_dropout
from peftfast_kernels.launch import launch
from peftfast_kernels.philox import keep_tile


@triton.jit(do_not_specialize=["M"])
def _lora_matmul_kernel(
    out_ptr,
    x_ptrs,
    w_ptrs,
    bias_ptr,
    base_ptr,
    t_ptrs,
    u_ptrs,
    seed_ptr,
    M,
    N,
    depths,
    stride_om,
    strides_xm,
    strides_xk,
    strides_wk,
    strides_wn,
    strides_tm,
    strides_ur,
    strides_un,
    ranks,
    limits,
    seeds,
    HAS_BIAS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs that share columns of W run next to each other, GROUP_M row blocks at a time.
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    band = pid // (GROUP_M * blocks_n)
    height = tl.minimum(blocks_m - band * GROUP_M, GROUP_M)
    pid_m = (band * GROUP_M + (pid % (GROUP_M * blocks_n)) % height).to(tl.int64)
    pid_n = ((pid % (GROUP_M * blocks_n)) // height).to(tl.int64)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Out-of-range rows and columns wrap around: their loads need no mask, and they are not stored.
    rm = rows % M
    rn = cols % N

    dtype = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    rr = tl.arange(0, RANK_BLOCK)
    for i in tl.static_range(len(u_ptrs)):
        low_rank = acc
        if DROPOUT:
            low_rank = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r0 in tl.range(0, ranks[i], RANK_BLOCK, num_stages=1):
            left = ranks[i] - r0
            t_position = rm[:, None] * strides_tm[i] + (r0 + rr)[None, :]
            u_position = (r0 + rr)[:, None] * strides_ur[i] + rn[None, :] * strides_un[i]
            t = tl.load(t_ptrs[i] + t_position, mask=rr[None, :] < left, other=0.0)
            u = tl.load(u_ptrs[i] + u_position, mask=rr[:, None] < left, other=0.0)
            low_rank = tl.dot(t.to(dtype), u.to(dtype), low_rank, input_precision=RANK_PRECISION)
        if DROPOUT:
            seed = tl.load(seed_ptr + seeds[i])
            keep = keep_tile(seed, limits[i], rows, pid_n * BLOCK_N, N, BLOCK_M, BLOCK_N)
            acc += tl.where(keep, low_rank, 0.0)
        else:
            acc = low_rank

    rk = tl.arange(0, BLOCK_K)
    for g in tl.static_range(len(x_ptrs)):
        x_pos = x_ptrs[g] + rm[:, None] * strides_xm[g] + rk[None, :] * strides_xk[g]
        w_pos = w_ptrs[g] + rk[:, None] * strides_wk[g] + rn[None, :] * strides_wn[g]
        for k0 in range(0, depths[g], BLOCK_K):
            if EVEN_K:
                x = tl.load(x_pos)
                w = tl.load(w_pos)
            else:
                left = depths[g] - k0
                x = tl.load(x_pos, mask=rk[None, :] < left, other=0.0)
                w = tl.load(w_pos, mask=rk[:, None] < left, other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            x_pos += BLOCK_K * strides_xk[g]
            w_pos += BLOCK_K * strides_wk[g]

    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn).to(tl.float32)[None, :]
    if HAS_BASE:
        acc += tl.load(base_ptr + rm[:, None] * stride_om + rn[None, :]).to(tl.float32)
    out = out_ptr + rows[:, None] * stride_om + cols[None, :]
    tl.store(out, acc.to(dtype), mask=(rows[:, None] < M) & (cols[None, :] < N))


def lora_matmul(
    out: Tensor,
    xs: Sequence[Tensor],
    ws: Sequence[Tensor],
    bias: Tensor | None,
    lanes: Sequence[Lane],
    ts: Sequence[Tensor],
    us: Sequence[Tensor],
    seed: Tensor | None,
    base: Tensor | None = None,
) -> None:
    """Fill out.

    Args:
        out: [M, N], contiguous.
        xs, ws: pairs of [M, K_g] and [K_g, N], any strides, of one dtype, out's or a narrower one;
            none: the other parts alone.
        bias: [N], contiguous, or None.
        lanes: dropout limit and seed of each low-rank term.
        ts, us: one a lane, [M, rank] with unit inner stride and [rank, N].
        seed: int64, one an adapter; None switches dropout off.
        base: [M, N], contiguous, of any dtype, added; out itself to add in place.
    """
    rows, columns = out.shape
    dropping = with_dropout(lanes, seed)
    dtype = xs[0].dtype if xs else out.dtype
    arch, itemsize = device.arch(out.device), dtype.itemsize
    precision = device.matmul_precision(dtype)
    rank_precision = device.matmul_precision(out.dtype)
    widened = itemsize < out.element_size()
    if widened and rank_precision == "ieee":
        rank_precision = "tf32x3"  # float32's accuracy without leaving the tensor cores
    if xs:
        aligned = all(
            16 in (math.gcd(16, v.stride(0)), math.gcd(16, v.stride(1))) for v in (*xs, *ws)
        )
        tile = tiles.matmul_tile(arch, itemsize, bool(dropping), aligned, widened)
    else:
        widest = max(itemsize, 0 if base is None else base.element_size())
        tile = tiles.expand_tile(widest, bool(dropping))
    block = tiles.matmul_rank_block([lane.rank for lane in lanes], widened)
    if itemsize == 4 and precision == "ieee":
        mma = "none"
    else:
        mma = "native" if xs else "any"
    grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n),)
    launch(
        _lora_matmul_kernel,
        grid,
        out,
        tuple(xs),
        tuple(ws),
        bias,
        base,
        tuple(ts),
        tuple(us),
        seed,
        rows,
        columns,
        tuple(x.shape[1] for x in xs),
        out.stride(0),
        strides(xs, 0),
        strides(xs, 1),
        strides(ws, 0),
        strides(ws, 1),
        strides(ts, 0),
        strides(us, 0),
        strides(us, 1),
        tuple(lane.rank for lane in lanes),
        tuple(lane.limit for lane in dropping),
        tuple(lane.index for lane in dropping),
        mma=mma,
        HAS_BIAS=bias is not None,
        HAS_BASE=base is not None,
        PRECISION=precision,
        RANK_PRECISION=rank_precision,
        DROPOUT=bool(dropping),
        EVEN_K=all(x.shape[1] % tile.block_k == 0 for x in xs),
        RANK_BLOCK=block,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
