"""A few rows times a 4-bit weight, decoded in registers: out = x W^T + bias.

    W[n, k] = round(table[q] * absmax[block]), e = n K + k, block = e // block_size

Moves the codes and scales of W once (K N / 2 bytes and the scales), x and out: the floor. x is
read again by every program, from the caches. A program owns BLOCK_N rows of W, its warps
different parts of K; they meet in registers at the end. Tensor cores take any x of up to 16 rows
at one price: seven to ten instructions an element of W, of which one is the look-up in shared
memory, two cut out the code and a half each rounds and moves it to where the tensor cores read it.
Sums of products come to eight at one row and to 13 at four. Where N alone gives too few programs,
K is split through a float32 workspace [splits, M, N], written and read once and summed in a fixed
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles, workspace
from peftfast_kernels.launch import launch
from peftfast_kernels.nf4_values import (
    codes_of,
    look_up,
    table,
    unnest,
    words_of,
)
from peftfast_kernels.split_reduce import split_reduce

GROUP = 32  # elements of a thread's 16-byte load; no block is shorter


@triton.jit(do_not_specialize=["M", "shift"])
def _nf4_gemv_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    span,
    stride_os,
    shift,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    GROUPS: tl.constexpr = BLOCK_K // 32
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid_n = (tl.program_id(0) % blocks_n).to(tl.int64)
    pid_m = (tl.program_id(0) // blocks_n).to(tl.int64)
    pid_s = tl.program_id(1).to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    part = tl.arange(0, WARPS)[:, None, None]
    row = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start = pid_s * span  # a multiple of the step below
    values = table(NF4)
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
    acc = tl.zeros((WARPS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k0 in range(start, tl.minimum(start + span, K), WARPS * BLOCK_K):
        rk = k0 + part * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]  # [W, 1, BK]
        if EVEN_K:
            # Groups of 32 elements start at multiples of 32 of the flat weight: one block each.
            k = k0 + part * BLOCK_K + tl.arange(0, GROUPS)[None, None, :] * 32
            inside = (row < N) & (k < K)
            place = (row * K + k) // 32
            byte = place[:, :, :, None] * 16 + tl.arange(0, 16)[None, None, None, :]
            packed = tl.load(packed_ptr + byte, mask=inside[:, :, :, None], other=0)
            words = words_of(tl.reshape(packed, WARPS * BLOCK_N * GROUPS * 4, 4))
            codes = codes_of(words)
        else:
            k = rk
            inside = (row < N) & (k < K)
            place = row * K + k
            packed = tl.load(packed_ptr + place // 2, mask=inside, other=0).to(tl.int32)
            codes = (packed >> ((1 - (place & 1).to(tl.int32)) * 4)) & 15
        block = place >> shift
        scales = tl.load(absmax_ptr + block, mask=inside, other=0)
        if NESTED:
            outer = tl.load(nested_absmax_ptr + (block >> 8), mask=inside, other=0.0)
            scales = unnest(scales, nested_code_ptr, outer, offset, inside)
            scales = tl.where(inside, scales, 0.0)
        if EVEN_K:
            w = look_up(values, codes, WARPS * BLOCK_N * GROUPS * 4, 8)
            w = tl.reshape(w, WARPS, BLOCK_N, GROUPS, 32) * scales[:, :, :, None]
        else:
            w = tl.gather(values, tl.reshape(codes, WARPS * BLOCK_N * BLOCK_K), 0)
            w = tl.reshape(w, WARPS, BLOCK_N, BLOCK_K) * scales
        w = tl.reshape(w.to(dtype), WARPS, BLOCK_N, BLOCK_K)
        x_mask = (rm[None, :, None] < M) & (rk < K)
        x = tl.load(x_ptr + rm[None, :, None] * K + rk, mask=x_mask, other=0.0)  # [W, BM, BK]
        acc = tl.dot(w, tl.permute(x, 0, 2, 1), acc, input_precision=PRECISION)
    y = tl.trans(tl.sum(acc, axis=0))  # [BM, BN]
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        if pid_s == 0:
            y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    position = pid_s * stride_os + rm[:, None] * N + rn[None, :]
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(out_ptr + position, y.to(out_ptr.dtype.element_ty), mask=mask)


def gemv(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    quant_type: str,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Fill out with x W^T + bias, summed in float32 and rounded once.

    Args:
        x: [M, K], contiguous.
        packed, absmax, nested_absmax, nested_code, offset, block_size, quant_type: W [N, K] as in
            `dequantize`; its values are rounded to x's dtype.
        bias: [N] of x's dtype, contiguous, or None.
        out: [M, N] of x's dtype, contiguous.
    """
    rows, depth = x.shape
    columns = out.shape[1]
    if out.numel() == 0:
        return
    if depth == 0:
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return
    sms = device.sm_count(x.device)
    even = depth % GROUP == 0
    tile = tiles.gemv_tile(rows, columns, x.element_size(), even, sms)
    blocks = triton.cdiv(columns, tile.block_n) * triton.cdiv(rows, tile.block_m)
    step = tile.num_warps * tile.block_k
    span, splits = tiles.depth_splits(depth, blocks, step, sms)
    precision = device.matmul_precision(x.dtype)
    full = x.dtype == torch.float32 and precision == "ieee"
    with device.current(x):
        partial = out[None]
        if splits > 1:
            partial = workspace.allocate((splits, rows, columns), x.device)
        launch(
            _nf4_gemv_kernel,
            (blocks, splits),
            x,
            packed,
            absmax,
            nested_absmax,
            nested_code,
            offset,
            bias,
            partial,
            rows,
            columns,
            depth,
            span,
            partial.stride(0),
            block_size.bit_length() - (GROUP.bit_length() if even else 1),
            mma="none" if full else "any",
            NF4=quant_type == "nf4",
            NESTED=nested_absmax is not None,
            HAS_BIAS=bias is not None,
            PRECISION=precision,
            EVEN_K=even,
            WARPS=tile.num_warps,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if splits > 1:
            split_reduce([partial.view(splits, -1)], [out.view(-1)])
