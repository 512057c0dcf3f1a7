"""Bottleneck adapters: norm, down-projection, activation, dropout, up-projection and residual.

    n = norm(x)    z = n Wd^T + bd    h = drop(act(z))    y = residual + s g (h Wu^T + bu)

A program of the forward owns BLOCK_M rows: it sums z over the columns of x, turns it into h in
registers, and walks over the columns of y. It reads x, Wd, Wu and the residual, and writes y and,
for the backward, z: x + y + z, the floor. Where x is the residual, or has a norm, it is read again
just after, in the reverse order, so that what was read last and is still in the L2 cache comes
first. Rows' statistics are sums about the mean of their first BLOCK_K elements, from which the
mean of all of them is at most sqrt(d / BLOCK_K) deviations away: nothing cancels.

The backward, with xhat for the normalised row, is two kernels. The first, over rows, reads dy:

    dz = s g mask / keep (dy Wu) act'(z)    e = (dy Wu) . h + dy . bu    dg = s e    ds = sum g e

and leaves dz and g h, [M, m] each. The second has a program for BLOCK_N columns and a span of rows;
it reads dy and x and writes dx, once each, while the sums over its rows stay in registers:

    dx = dnorm(dz Wd) (+ dy)      G = sum dz xhat      dWu = s sum dy (g h)      dbd, dbu

(where x isn't the residual, a launch for the columns of x and one for those of dy). What a norm's
gradient needs of whole rows comes out of the first kernel, without x,

    mean(w dn) = dz . (Wd w) / d            mean(w dn xhat) = dz . (z - bd - Wd b) / d

and its parameters out of the finished sums: dWd = G w + dbd b, dw = sum of Wd G, db = dbd Wd.
So the backward moves 2 dy + x + dx beside z, h and dz: 4 u with or without the norm, where a unit u
is one x. Sums over spans go through float32 workspaces [splits, ...], written and read once and
summed in a fixed order; one span without a norm needs none. The bytes of a workspace stay below
those of an x: `tiles.bottleneck_splits`.

The adapter may be float32 over 16-bit activations: z, dz and the products that make them and the
gradients of parameters are then float32, and what meets in y or dx is rounded first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles, workspace
from peftfast_kernels.activation import KERNEL_KINDS, activate, differentiate
from peftfast_kernels.dots import dot_adapter_right
from peftfast_kernels.lane import skinny_mma, triton_dtype
from peftfast_kernels.launch import Launch, launch, recording
from peftfast_kernels.philox import keep_scale, keep_tile, limit
from peftfast_kernels.split_reduce import split_reduce
from peftfast_kernels.variant import Variant

# The order of `needs` and of the gradients, as in `peftfast.reference.bottleneck`.
GRADIENTS = (
    "x", "down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias", "scaling", "gate",
)  # fmt: skip


@triton.jit
def _load_rows(x_ptr, rm, rk, M, K, stride_m, stride_k, EVEN_K: tl.constexpr, POLICY: tl.constexpr):
    """A tile of a matrix, zero outside of it."""
    mask = rm[:, None] < M
    if not EVEN_K:
        mask = mask & (rk[None, :] < K)
    position = rm[:, None] * stride_m + rk[None, :] * stride_k
    return tl.load(x_ptr + position, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit
def _load_columns(x_ptr, rm, rn, M, N, stride_m, stride_n, EVEN_N: tl.constexpr):
    """A tile of the transposed matrix, zero outside of it."""
    mask = rm[None, :] < M
    if not EVEN_N:
        mask = mask & (rn[:, None] < N)
    return tl.load(x_ptr + rm[None, :] * stride_m + rn[:, None] * stride_n, mask=mask, other=0.0)


@triton.jit
def _load_vector(v_ptr, rn, N):
    return tl.load(v_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)


@triton.jit
def _statistics(
    x_ptr,
    rm,
    M,
    K,
    eps,
    stride_xm,
    stride_xk,
    CENTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean (zero unless CENTER) and 1 / sqrt(variance + eps) of rows, the last columns last."""
    shift = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if CENTER:
        rk = tl.arange(0, BLOCK_K)
        head = _load_rows(x_ptr, rm, rk, M, K, stride_xm, stride_xk, EVEN_K, "evict_last")
        shift = tl.sum(head.to(tl.float32), axis=1) / tl.minimum(K, BLOCK_K)
    first = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        rk = k0 + tl.arange(0, BLOCK_K)
        x = _load_rows(x_ptr, rm, rk, M, K, stride_xm, stride_xk, EVEN_K, "evict_last")
        x = x.to(tl.float32)
        if CENTER:
            x = x - shift[:, None]
            if not EVEN_K:
                x = tl.where(rk[None, :] < K, x, 0.0)
            first += x
        second += x * x
    variance = tl.sum(second, axis=1) / K
    mean = shift
    if CENTER:
        beside = tl.sum(first, axis=1) / K
        mean = shift + beside
        variance = tl.maximum(variance - beside * beside, 0.0)
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def _hidden(
    z,
    seed_ptr,
    limit,
    keep,
    rm,
    R,
    KIND: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """drop(act(z)) in float32."""
    h = activate(z, KIND)
    if DROPOUT:
        kept = keep_tile(tl.load(seed_ptr), limit, rm, 0, R, BLOCK_M, RANK_BLOCK)
        h = tl.where(kept, h * keep, 0.0)
    return h


@triton.jit
def _row_factors(gate_ptr, rm, M, BLOCK_M: tl.constexpr):
    """The gate of each row, one without any."""
    if gate_ptr is not None:
        g = tl.load(gate_ptr + rm, mask=rm < M, other=0.0).to(tl.float32)
    else:
        g = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    return g


@triton.jit
def _scale(s_ptr, s):
    """s, times the learned factor where there is one."""
    if s_ptr is not None:
        s = s * tl.load(s_ptr).to(tl.float32)
    return s


@triton.jit(do_not_specialize=["M", "limit"])
def _bottleneck_kernel(
    x_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    gate_ptr,
    s_ptr,
    seed_ptr,
    y_ptr,
    z_ptr,
    statistics_ptr,
    M,
    K,
    N,
    R,
    s,
    eps,
    limit,
    keep,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    stride_un,
    stride_ur,
    stride_rm,
    stride_rn,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    CENTER: tl.constexpr,
    DROPOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    UP_COMPUTE: tl.constexpr,
    UP_PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rm = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rr = tl.arange(0, RANK_BLOCK)
    if NORM:
        mean, scale = _statistics(
            x_ptr, rm, M, K, eps, stride_xm, stride_xk, CENTER, EVEN_K, BLOCK_M, BLOCK_K
        )
        if statistics_ptr is not None:
            if CENTER:
                tl.store(statistics_ptr + rm, mean, mask=rm < M)
                tl.store(statistics_ptr + M + rm, scale, mask=rm < M)
            else:
                tl.store(statistics_ptr + rm, scale, mask=rm < M)

    z = tl.zeros((BLOCK_M, RANK_BLOCK), dtype=tl.float32)
    blocks = tl.cdiv(K, BLOCK_K)
    for i in range(0, blocks):
        if NORM:
            k0 = (blocks - 1 - i) * BLOCK_K
        else:
            k0 = i * BLOCK_K
        rk = k0 + tl.arange(0, BLOCK_K)
        x = _load_rows(x_ptr, rm, rk, M, K, stride_xm, stride_xk, EVEN_K, "evict_last")
        if NORM:
            x = x.to(tl.float32)
            if CENTER:
                x = x - mean[:, None]
            x = x * scale[:, None]
            if norm_weight_ptr is not None:
                x = x * _load_vector(norm_weight_ptr, rk, K)[None, :]
            if norm_bias_ptr is not None:
                x = x + _load_vector(norm_bias_ptr, rk, K)[None, :]
        down_mask = rr[None, :] < R
        if not EVEN_K:
            down_mask = down_mask & (rk[:, None] < K)
        down_position = rk[:, None] * stride_dk + rr[None, :] * stride_dr
        down = tl.load(down_ptr + down_position, mask=down_mask, other=0.0)  # [BK, RB]
        z = dot_adapter_right(x.to(COMPUTE), down.to(COMPUTE), z, PRECISION)
    if down_bias_ptr is not None:
        z += _load_vector(down_bias_ptr, rr, R)[None, :]
    z = z.to(COMPUTE)
    if z_ptr is not None:
        z_mask = (rm[:, None] < M) & (rr[None, :] < R)
        tl.store(z_ptr + rm[:, None] * R + rr[None, :], z, mask=z_mask)

    h = _hidden(
        z.to(tl.float32), seed_ptr, limit, keep, rm, R, KIND, DROPOUT, BLOCK_M, RANK_BLOCK
    ).to(UP_COMPUTE)
    factor = _row_factors(gate_ptr, rm, M, BLOCK_M) * _scale(s_ptr, s)
    blocks = tl.cdiv(N, BLOCK_N)
    for i in range(0, blocks):
        if NORM:
            n0 = i * BLOCK_N
        else:
            n0 = (blocks - 1 - i) * BLOCK_N
        rn = n0 + tl.arange(0, BLOCK_N)
        up_mask = rr[:, None] < R
        mask = rm[:, None] < M
        if not EVEN_N:
            up_mask = up_mask & (rn[None, :] < N)
            mask = mask & (rn[None, :] < N)
        up_position = rr[:, None] * stride_ur + rn[None, :] * stride_un
        up = tl.load(up_ptr + up_position, mask=up_mask, other=0.0)  # [RB, BN]
        y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        y = tl.dot(h, up.to(UP_COMPUTE), y, input_precision=UP_PRECISION)
        if up_bias_ptr is not None:
            y += _load_vector(up_bias_ptr, rn, N)[None, :]
        y = y * factor[:, None]
        if residual_ptr is not None:
            y += _load_rows(
                residual_ptr, rm, rn, M, N, stride_rm, stride_rn, EVEN_N, "evict_first"
            ).to(tl.float32)
        tl.store(y_ptr + rm[:, None] * N + rn[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "limit"])
def _bottleneck_grad_z_kernel(
    dy_ptr,
    z_ptr,
    up_ptr,
    up_bias_ptr,
    gate_ptr,
    s_ptr,
    seed_ptr,
    of_weight_ptr,
    of_bias_ptr,
    h_ptr,
    dz_ptr,
    means_ptr,
    dgate_ptr,
    ds_ptr,
    M,
    N,
    K,
    R,
    s,
    limit,
    keep,
    stride_dym,
    stride_dyn,
    stride_un,
    stride_ur,
    KIND: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_H: tl.constexpr,
    PER_ROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rm = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rr = tl.arange(0, RANK_BLOCK)
    place = rm[:, None] * R + rr[None, :]
    inside = (rm[:, None] < M) & (rr[None, :] < R)
    dh = tl.zeros((BLOCK_M, RANK_BLOCK), dtype=tl.float32)
    e = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if dz_ptr is not None or PER_ROW:
        for n0 in range(0, N, BLOCK_K):
            rn = n0 + tl.arange(0, BLOCK_K)
            dy = _load_rows(dy_ptr, rm, rn, M, N, stride_dym, stride_dyn, EVEN_N, "evict_last")
            up_mask = rr[None, :] < R
            if not EVEN_N:
                up_mask = up_mask & (rn[:, None] < N)
            up_position = rn[:, None] * stride_un + rr[None, :] * stride_ur
            up = tl.load(up_ptr + up_position, mask=up_mask, other=0.0)  # [BK, RB]
            dh = dot_adapter_right(dy.to(COMPUTE), up.to(COMPUTE), dh, PRECISION)
            if PER_ROW:
                if up_bias_ptr is not None:
                    up_bias = _load_vector(up_bias_ptr, rn, N)
                    e += tl.sum(dy.to(tl.float32) * up_bias[None, :], axis=1)

    z = tl.load(z_ptr + place, mask=inside, other=0.0).to(tl.float32)
    g = _row_factors(gate_ptr, rm, M, BLOCK_M)
    s = _scale(s_ptr, s)
    if NEED_H:
        h = _hidden(z, seed_ptr, limit, keep, rm, R, KIND, DROPOUT, BLOCK_M, RANK_BLOCK)
        if h_ptr is not None:
            tl.store(h_ptr + place, (h * g[:, None]).to(COMPUTE), mask=inside)
        if PER_ROW:
            e += tl.sum(dh * h, axis=1)
            if dgate_ptr is not None:
                tl.store(dgate_ptr + rm, e * s, mask=rm < M)
            if ds_ptr is not None:
                tl.store(ds_ptr + rm, e * g, mask=rm < M)
    if dz_ptr is not None:
        dz = dh * differentiate(z, KIND) * (g * s)[:, None]
        if DROPOUT:
            kept = keep_tile(tl.load(seed_ptr), limit, rm, 0, R, BLOCK_M, RANK_BLOCK)
            dz = tl.where(kept, dz * keep, 0.0)
        dz = dz.to(COMPUTE)
        tl.store(dz_ptr + place, dz, mask=inside)
        if means_ptr is not None:
            dz = dz.to(tl.float32)
            if of_bias_ptr is not None:
                z = z - _load_vector(of_bias_ptr, rr, R)[None, :]
            tl.store(means_ptr + rm, tl.sum(dz * z, axis=1) / K, mask=rm < M)
            if of_weight_ptr is not None:
                of_weight = _load_vector(of_weight_ptr, rr, R)
                mean = tl.sum(dz * of_weight[None, :], axis=1) / K
                tl.store(means_ptr + M + rm, mean, mask=rm < M)


@triton.jit(do_not_specialize=["M", "span"])
def _bottleneck_grad_kernel(
    x_ptr,
    dy_ptr,
    h_ptr,
    dz_ptr,
    down_ptr,
    norm_weight_ptr,
    statistics_ptr,
    means_ptr,
    gate_ptr,
    s_ptr,
    dx_ptr,
    ddown_ptr,
    dbias_ptr,
    dup_ptr,
    dup_bias_ptr,
    M,
    N,
    R,
    span,
    s,
    stride_xm,
    stride_xn,
    stride_dym,
    stride_dyn,
    stride_dr,
    stride_dk,
    NORM: tl.constexpr,
    CENTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    UP_PRECISION: tl.constexpr,
    X_COMPUTE: tl.constexpr,
    X_PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1).to(tl.int64)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rr = tl.arange(0, RANK_BLOCK)
    if dx_ptr is not None:
        down_mask = (rn[:, None] < N) & (rr[None, :] < R)
        down_position = rn[:, None] * stride_dk + rr[None, :] * stride_dr
        down = tl.load(down_ptr + down_position, mask=down_mask, other=0.0).to(X_COMPUTE)
    if norm_weight_ptr is not None:
        norm_weight = _load_vector(norm_weight_ptr, rn, N)
    if ddown_ptr is not None:
        ddown = tl.zeros((BLOCK_N, RANK_BLOCK), dtype=tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros((RANK_BLOCK,), dtype=tl.float32)
    if dup_ptr is not None:
        dup = tl.zeros((BLOCK_N, RANK_BLOCK), dtype=tl.float32)
    if dup_bias_ptr is not None:
        dup_bias = tl.zeros((BLOCK_N,), dtype=tl.float32)

    start = pid_s * span
    for m0 in range(start, tl.minimum(start + span, M), BLOCK_M):
        rm = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        place = rm[:, None] * R + rr[None, :]
        inside = (rm[:, None] < M) & (rr[None, :] < R)
        if dz_ptr is not None:
            dz = tl.load(dz_ptr + place, mask=inside, other=0.0)  # [BM, RB]
            if dbias_ptr is not None:
                dbias += tl.sum(dz.to(tl.float32), axis=0)
        if dy_ptr is not None:
            dy = _load_columns(dy_ptr, rm, rn, M, N, stride_dym, stride_dyn, EVEN_N)  # [BN, BM]
        if x_ptr is not None:
            x = _load_columns(x_ptr, rm, rn, M, N, stride_xm, stride_xn, EVEN_N)
            if NORM:
                if CENTER:
                    mean = tl.load(statistics_ptr + rm, mask=rm < M, other=0.0)
                    scale = tl.load(statistics_ptr + M + rm, mask=rm < M, other=0.0)
                    xhat = (x.to(tl.float32) - mean[None, :]) * scale[None, :]
                else:
                    scale = tl.load(statistics_ptr + rm, mask=rm < M, other=0.0)
                    xhat = x.to(tl.float32) * scale[None, :]
            else:
                xhat = x
        if ddown_ptr is not None:
            ddown = dot_adapter_right(xhat.to(COMPUTE), dz, ddown, PRECISION)
        if dx_ptr is not None:
            dx = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            dx = tl.dot(down, tl.trans(dz.to(X_COMPUTE)), dx, input_precision=X_PRECISION)
            if NORM:
                if norm_weight_ptr is not None:
                    dx = dx * norm_weight[:, None]
                dx -= xhat * tl.load(means_ptr + rm, mask=rm < M, other=0.0)[None, :]
                if CENTER:
                    dx -= tl.load(means_ptr + M + rm, mask=rm < M, other=0.0)[None, :]
                dx = dx * scale[None, :]
            if RESIDUAL:
                dx += dy.to(tl.float32)
            mask = rm[None, :] < M
            if not EVEN_N:
                mask = mask & (rn[:, None] < N)
            position = rm[None, :] * N + rn[:, None]
            tl.store(dx_ptr + position, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dup_bias_ptr is not None:
            g = _row_factors(gate_ptr, rm, M, BLOCK_M)
            dup_bias += tl.sum(dy.to(tl.float32) * g[None, :], axis=1)
        if dup_ptr is not None:
            h = tl.load(h_ptr + place, mask=inside, other=0.0)  # [BM, RB]
            dup = dot_adapter_right(dy.to(COMPUTE), h, dup, UP_PRECISION)

    inside = (rn[:, None] < N) & (rr[None, :] < R)
    if ddown_ptr is not None:
        place = pid_s * R * N + rr[None, :] * N + rn[:, None]
        tl.store(ddown_ptr + place, ddown.to(ddown_ptr.dtype.element_ty), mask=inside)
    if dup_ptr is not None:
        place = pid_s * R * N + rn[:, None] * R + rr[None, :]
        dup = dup * _scale(s_ptr, s)
        tl.store(dup_ptr + place, dup.to(dup_ptr.dtype.element_ty), mask=inside)
    across = pid_s * N + rn
    if dbias_ptr is not None:
        dbias = dbias.to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + pid_s * R + rr, dbias, mask=(rr < R) & (pid_n == 0))
    if dup_bias_ptr is not None:
        dup_bias = (dup_bias * _scale(s_ptr, s)).to(dup_bias_ptr.dtype.element_ty)
        tl.store(dup_bias_ptr + across, dup_bias, mask=rn < N)


@triton.jit
def _bottleneck_finish_kernel(
    product_ptr,
    dbias_ptr,
    down_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    ddown_ptr,
    dnorm_weight_ptr,
    dnorm_bias_ptr,
    N,
    R,
    splits,
    stride_dr,
    stride_dk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rn = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dnorm_weight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dnorm_bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if norm_weight_ptr is not None:
        norm_weight = _load_vector(norm_weight_ptr, rn, N)
    if norm_bias_ptr is not None:
        norm_bias = _load_vector(norm_bias_ptr, rn, N)
    for r0 in range(0, R, BLOCK_M):
        rr = r0 + tl.arange(0, BLOCK_M)
        inside = (rr[:, None] < R) & (rn[None, :] < N)
        place = rr[:, None] * N + rn[None, :]
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        dbias = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for split in range(splits):
            if product_ptr is not None:
                product += tl.load(product_ptr + split * R * N + place, mask=inside, other=0.0)
            if dbias_ptr is not None:
                dbias += _load_vector(dbias_ptr + split * R, rr, R)
        if dnorm_weight_ptr is not None or dnorm_bias_ptr is not None:
            position = rr[:, None] * stride_dr + rn[None, :] * stride_dk
            down = tl.load(down_ptr + position, mask=inside, other=0.0).to(tl.float32)
            dnorm_weight += tl.sum(down * product, axis=0)
            dnorm_bias += tl.sum(down * dbias[:, None], axis=0)
        if ddown_ptr is not None:
            if norm_weight_ptr is not None:
                product = product * norm_weight[None, :]
            if norm_bias_ptr is not None:
                product += dbias[:, None] * norm_bias[None, :]
            tl.store(ddown_ptr + place, product.to(ddown_ptr.dtype.element_ty), mask=inside)
    if dnorm_weight_ptr is not None:
        dnorm_weight = dnorm_weight.to(dnorm_weight_ptr.dtype.element_ty)
        tl.store(dnorm_weight_ptr + rn, dnorm_weight, mask=rn < N)
    if dnorm_bias_ptr is not None:
        dnorm_bias = dnorm_bias.to(dnorm_bias_ptr.dtype.element_ty)
        tl.store(dnorm_bias_ptr + rn, dnorm_bias, mask=rn < N)


@triton.jit
def _bottleneck_fold_kernel(
    down_ptr,
    down_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    of_weight_ptr,
    of_bias_ptr,
    K,
    stride_dr,
    stride_dk,
    BLOCK_K: tl.constexpr,
):
    """A row of Wd times a norm's weight (ones without it), and times its bias, plus bd."""
    row = tl.program_id(0).to(tl.int64)
    of_weight = tl.zeros((BLOCK_K,), dtype=tl.float32)
    of_bias = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        rk = k0 + tl.arange(0, BLOCK_K)
        position = row * stride_dr + rk * stride_dk
        down = tl.load(down_ptr + position, mask=rk < K, other=0.0).to(tl.float32)
        if norm_weight_ptr is not None:
            of_weight += down * _load_vector(norm_weight_ptr, rk, K)
        else:
            of_weight += down
        if norm_bias_ptr is not None:
            of_bias += down * _load_vector(norm_bias_ptr, rk, K)
    tl.store(of_weight_ptr + row, tl.sum(of_weight, axis=0))
    total = tl.sum(of_bias, axis=0)
    if down_bias_ptr is not None:
        total += tl.load(down_bias_ptr + row).to(tl.float32)
    tl.store(of_bias_ptr + row, total)


def bottleneck_forward(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str,
    scaling: float | Tensor,
    residual: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, d_out], z [M, m] and the norm's statistics, as
    `peftfast.reference.bottleneck.bottleneck_forward` gives them, of the same arguments.
    """
    rows, depth = x.shape
    columns, width = up.shape
    y = x.new_empty((rows, columns), dtype=dtype)
    z = x.new_empty((rows, width), dtype=down.dtype) if keep else None
    statistics = None
    if norm is not None and keep:
        statistics = x.new_empty((1 + (norm == "layer"), rows), dtype=torch.float32)
    if rows == 0:
        return y, z, statistics
    block = tiles.bottleneck_block(width)
    sms = device.sm_count(x.device)
    tile = tiles.bottleneck_tile(block, x.element_size(), down.element_size(), rows, sms)
    join = _narrower(down.dtype, dtype)
    pointer, factor = _factor(scaling)
    with device.current(x):
        launch(
            _bottleneck_kernel,
            (triton.cdiv(rows, tile.block_m),),
            x,
            down,
            _contiguous(down_bias),
            up,
            _contiguous(up_bias),
            residual,
            _contiguous(norm_weight),
            _contiguous(norm_bias),
            _contiguous(gate),
            pointer,
            seed,
            y,
            z,
            statistics,
            rows,
            depth,
            columns,
            width,
            factor,
            norm_eps,
            limit(dropout_p),
            keep_scale(dropout_p),
            *x.stride(),
            *down.stride(),
            *up.stride(),
            *((0, 0) if residual is None else residual.stride()),
            mma=skinny_mma(x.dtype, down.dtype),
            KIND=KERNEL_KINDS.get(activation, activation),
            NORM=norm is not None,
            CENTER=norm == "layer",
            DROPOUT=dropout_p > 0,
            COMPUTE=triton_dtype(down.dtype),
            PRECISION=_precision(x.dtype, down.dtype, norm is None),
            UP_COMPUTE=triton_dtype(join),
            UP_PRECISION=device.matmul_precision(join),
            EVEN_K=depth % tile.block_k == 0,
            EVEN_N=columns % tile.block_n == 0,
            RANK_BLOCK=block,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y, z, statistics


def bottleneck_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    statistics: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str,
    scaling: float | Tensor,
    sequential: bool,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients asked for, as `peftfast.reference.bottleneck.bottleneck_backward` gives them,
    of the same arguments.
    """
    want = dict(zip(GRADIENTS, needs, strict=True))
    rows = x.shape[0]
    parameters = {
        "down": down,
        "down_bias": down_bias,
        "up": up,
        "up_bias": up_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    grads = {
        name: one.new_empty(one.shape)
        for name, one in parameters.items()
        if want[name] and one is not None
    }
    if want["x"]:
        grads["x"] = x.new_empty(x.shape)
    if want["scaling"]:
        grads["scaling"] = z.new_empty(1, dtype=torch.float32)
    if want["gate"]:
        grads["gate"] = z.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return [grads[name].zero_() for name in GRADIENTS if want[name]]
    operands = _Operands(
        dy, x, z, statistics, down, down_bias, up, up_bias, activation, scaling, sequential, norm,
        norm_weight, norm_bias, gate, dropout_p, seed,
    )  # fmt: skip
    with device.current(x):
        hidden = _grad_z(operands, grads)
        if sequential:
            _grad_columns(operands, grads, hidden, grads.keys())
        else:
            _grad_columns(operands, grads, hidden, grads.keys() - {"up", "up_bias"})
            _grad_columns(operands, grads, hidden, grads.keys() & {"up", "up_bias"})
    return [grads[name] for name in GRADIENTS if want[name]]


@dataclass(frozen=True)
class _Operands:
    """What both kernels of the backward take."""

    dy: Tensor
    x: Tensor
    z: Tensor
    statistics: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    activation: str
    scaling: float | Tensor
    sequential: bool
    norm: str | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gate: Tensor | None
    dropout_p: float
    seed: Tensor | None

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the wider of dy and x."""
        return max(self.dy.element_size(), self.x.element_size())


@dataclass(frozen=True)
class _Hidden:
    """What the pass over rows leaves for the one over columns, where that reads it: g h and dz,
    [M, m], and a norm's two means of each row, [2, M].
    """

    h: Tensor | None = None
    dz: Tensor | None = None
    means: Tensor | None = None


def _grad_z(of: _Operands, grads: Mapping[str, Tensor]) -> _Hidden:
    """The pass over rows; fills the gradients of gate and scaling."""
    inner = any(name in grads for name in ("x", "down", "down_bias", "norm_weight", "norm_bias"))
    per_row = "gate" in grads or "scaling" in grads
    if not (inner or per_row or "up" in grads):
        return _Hidden()
    rows, width = of.z.shape
    h = torch.empty_like(of.z) if "up" in grads else None
    dz = torch.empty_like(of.z) if inner else None
    means = of_weight = of_bias = None
    if of.norm is not None and "x" in grads:
        means = workspace.allocate((1 + (of.norm == "layer"), rows), of.z.device)
        of_weight, of_bias = _fold(of)
    block = tiles.bottleneck_block(width)
    sms = device.sm_count(of.z.device)
    tile = tiles.bottleneck_tile(block, of.itemsize, of.up.element_size(), rows, sms)
    part = workspace.allocate((rows,), of.z.device) if "scaling" in grads else None
    pointer, factor = _factor(of.scaling)
    launch(
        _bottleneck_grad_z_kernel,
        (triton.cdiv(rows, tile.block_m),),
        of.dy,
        of.z,
        of.up,
        _contiguous(of.up_bias),
        _contiguous(of.gate),
        pointer,
        of.seed,
        of_weight,
        of_bias,
        h,
        dz,
        means,
        grads.get("gate"),
        part,
        rows,
        of.dy.shape[1],
        of.x.shape[1],
        width,
        factor,
        limit(of.dropout_p),
        keep_scale(of.dropout_p),
        *of.dy.stride(),
        *of.up.stride(),
        mma=skinny_mma(of.dy.dtype, of.up.dtype) if inner or per_row else "none",
        KIND=KERNEL_KINDS.get(of.activation, of.activation),
        DROPOUT=of.dropout_p > 0,
        NEED_H=per_row or h is not None,
        PER_ROW=per_row,
        COMPUTE=triton_dtype(of.up.dtype),
        PRECISION=_precision(of.dy.dtype, of.up.dtype, True),
        EVEN_N=of.dy.shape[1] % tile.block_k == 0,
        RANK_BLOCK=block,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if part is not None:
        torch.sum(part, 0, keepdim=True, out=grads["scaling"])
    return _Hidden(h, dz, means)


def _fold(of: _Operands) -> tuple[Tensor | None, Tensor | None]:
    """Wd times the norm's weight, for a norm with a mean, and bd plus Wd times its bias."""
    if of.norm != "layer" and of.norm_bias is None:
        return None, _contiguous(of.down_bias)
    width, depth = of.down.shape
    of_weight, of_bias = workspace.allocate((2, width), of.down.device)
    launch(
        _bottleneck_fold_kernel,
        (width,),
        of.down,
        _contiguous(of.down_bias),
        _contiguous(of.norm_weight),
        _contiguous(of.norm_bias),
        of_weight,
        of_bias,
        depth,
        *of.down.stride(),
        mma="none",
        BLOCK_K=1024,
        num_warps=4,
        num_stages=1,
    )
    return of_weight if of.norm == "layer" else None, of_bias


def _grad_columns(
    of: _Operands,
    grads: Mapping[str, Tensor],
    hidden: _Hidden,
    names: AbstractSet[str],
) -> None:
    """Fill the gradients named, of those of x, the projections, their biases and the norm."""
    wanted = {name: grads[name] for name in names if name not in ("gate", "scaling")}
    if not wanted:
        return
    rows, width = of.z.shape
    columns = of.dy.shape[1] if wanted.keys() <= {"up", "up_bias"} else of.x.shape[1]
    arch, sms = device.arch(of.z.device), device.sm_count(of.z.device)
    block = tiles.bottleneck_block(width)
    adapter_itemsize = of.down.element_size()
    tile = tiles.bottleneck_grad_tile(arch, block, of.itemsize, adapter_itemsize, columns)
    blocks = triton.cdiv(columns, tile.block_n)
    span, splits = tiles.bottleneck_splits(rows, width, blocks, tile.block_m, sms)

    # What is summed over rows, by the parameter whose gradient it is. A norm's weight and bias come
    # in when the sums are finished, and so do their gradients.
    late = of.norm_weight is not None or of.norm_bias is not None
    finished = wanted.keys() & {"down", "norm_weight", "norm_bias"} if late else set()
    kept = set()
    if finished & {"down", "norm_weight"}:
        kept.add("down")
    if finished and of.norm_bias is not None:
        kept.add("down_bias")
    sizes = {"down": width * columns, "down_bias": width, "up": width * columns, "up_bias": columns}
    sums = {
        name: wanted[name]
        if splits == 1 and name not in kept
        else workspace.allocate((splits, size), of.z.device)
        for name, size in sizes.items()
        if name in kept or name in wanted
    }
    added = of.sequential and "x" in wanted
    reads_x = "down" in sums or ("x" in wanted and of.norm is not None)
    join = _narrower(of.down.dtype, of.x.dtype)
    pointer, factor = _factor(of.scaling)
    launch(
        _bottleneck_grad_kernel,
        (blocks, splits),
        of.x if reads_x else None,
        of.dy if added or sums.keys() & {"up", "up_bias"} else None,
        hidden.h if "up" in sums else None,
        hidden.dz if wanted.keys() - {"up", "up_bias"} else None,
        of.down if "x" in wanted else None,
        _contiguous(of.norm_weight) if "x" in wanted else None,
        of.statistics if reads_x else None,
        hidden.means if "x" in wanted else None,
        _contiguous(of.gate) if "up_bias" in sums else None,
        pointer if sums.keys() & {"up", "up_bias"} else None,
        wanted.get("x"),
        sums.get("down"),
        sums.get("down_bias"),
        sums.get("up"),
        sums.get("up_bias"),
        rows,
        columns,
        width,
        span,
        factor,
        *of.x.stride(),
        *of.dy.stride(),
        *of.down.stride(),
        mma=skinny_mma(of.x.dtype, of.down.dtype)
        if "x" in wanted or sums.keys() & {"down", "up"}
        else "none",
        NORM=of.norm is not None,
        CENTER=of.norm == "layer",
        RESIDUAL=added,
        COMPUTE=triton_dtype(of.down.dtype),
        PRECISION=_precision(of.x.dtype, of.down.dtype, of.norm is None),
        UP_PRECISION=_precision(of.dy.dtype, of.down.dtype, True),
        X_COMPUTE=triton_dtype(join),
        X_PRECISION=device.matmul_precision(join),
        EVEN_N=columns % tile.block_n == 0,
        RANK_BLOCK=block,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if finished:
        _finish(of, wanted, sums, splits)
    pending = {
        name: one
        for name, one in sums.items()
        if name in wanted and name not in finished and one is not wanted[name]
    }
    if pending:
        split_reduce(
            [one.view(splits, -1) for one in pending.values()], [wanted[name] for name in pending]
        )


def _finish(
    of: _Operands, wanted: Mapping[str, Tensor], sums: Mapping[str, Tensor], splits: int
) -> None:
    """Fill the gradients of Wd and of the norm's parameters, of the sums over spans of rows."""
    width, columns = of.down.shape
    tile = tiles.bottleneck_finish_tile()
    launch(
        _bottleneck_finish_kernel,
        (triton.cdiv(columns, tile.block_n),),
        sums.get("down"),
        sums["down_bias"] if of.norm_bias is not None else None,
        of.down,
        _contiguous(of.norm_weight),
        _contiguous(of.norm_bias),
        wanted.get("down"),
        wanted.get("norm_weight"),
        wanted.get("norm_bias"),
        columns,
        width,
        splits,
        *of.down.stride(),
        mma="none",
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _factor(scaling: float | Tensor) -> tuple[Tensor | None, float]:
    """A learned factor and a number, whose product is s."""
    return (scaling, 1.0) if isinstance(scaling, Tensor) else (None, float(scaling))


def _narrower(adapter: torch.dtype, activations: torch.dtype) -> torch.dtype:
    """What a product is computed in whose result joins the activations."""
    return activations if adapter == torch.float32 else adapter


def _precision(activations: torch.dtype, adapter: torch.dtype, exact: bool) -> str:
    """`dots`' precision of a product in the adapter's dtype; `exact`: its operand is as read."""
    precision = device.adapter_precision(activations, adapter)
    return "tf32x3" if precision == "tf32x2" and not exact else precision


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def record(
    arch: int,
    rows: int,
    in_features: int,
    width: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    *,
    activation: str = "relu",
    norm: str | None = None,
    dropout_p: float = 0.0,
    gated: bool = False,
    out_features: int | None = None,
    sm_count: int = 132,
) -> list[Launch]:
    """The launches of an adapter's forward and backward, with all gradients, on any GPU.

    With `out_features` it is the parallel form, whose residual is not x; `gated`, it has a gate and
    a learned factor.
    """

    def empty(*shape: int, like: torch.dtype = adapter_dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    sequential, columns = out_features is None, out_features or in_features
    x, y = empty(rows, in_features, like=dtype), empty(rows, columns, like=dtype)
    projections = (
        empty(width, in_features), empty(width), empty(columns, width), empty(columns),
    )  # fmt: skip
    settings: dict[str, Any] = {
        "activation": activation,
        "scaling": empty(1) if gated else 1.0,
        "norm": norm,
        "norm_weight": None if norm is None else empty(in_features),
        "norm_bias": empty(in_features) if norm == "layer" else None,
        "norm_eps": 1e-5,
        "gate": empty(rows, like=dtype) if gated else None,
        "dropout_p": dropout_p,
        "seed": empty(1, like=torch.int64) if dropout_p else None,
    }
    needs = [True] * 5 + [norm is not None, norm == "layer", gated, gated]
    with recording(arch, sm_count) as launches:
        _, z, statistics = bottleneck_forward(
            x, *projections, residual=x if sequential else y, dtype=dtype, keep=True, **settings
        )
        assert z is not None
        bottleneck_backward(
            y, x, z, statistics, *projections, sequential=sequential, needs=needs, **settings
        )
    return launches


def aot_variants(arch: int) -> Iterator[Variant]:
    """Every kernel with the tiles pinned for this architecture: narrow and wide bottlenecks, with
    and without a norm, dropout and gate.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    all_on: dict[str, Any] = {
        "activation": "gelu", "norm": "layer", "dropout_p": 0.1, "gated": True,
    }  # fmt: skip
    gelu_norm = {"activation": "gelu", "norm": "layer"}
    cases: list[tuple[str, torch.dtype, torch.dtype, int, int, int, dict[str, Any]]] = [
        ("bf16", bf16, bf16, 8192, 4096, 64, {}),
        ("bf16", bf16, bf16, 8192, 4096, 64, all_on),
        ("bf16", bf16, bf16, 8192, 4096, 256, all_on),
        ("bf16", bf16, bf16, 8192, 4096, 128, {"activation": "silu", "norm": "rms"}),
        ("bf16", bf16, bf16, 512, 1000, 64, all_on),
        ("bf16+fp32", bf16, fp32, 8192, 4096, 64, all_on),
        ("bf16+fp32", bf16, fp32, 2048, 1024, 128, gelu_norm),
        ("bf16+fp32", bf16, fp32, 8192, 4096, 256, gelu_norm),
        ("fp32", fp32, fp32, 8192, 1000, 64, all_on),
        ("fp32", fp32, fp32, 8192, 4096, 256, gelu_norm),
    ]
    if arch in (86, 89):  # sm_80's code with less shared memory: what takes the most of that
        cases = [case for case in cases if case[0] != "fp32" and case[-1] == all_on]
    seen = set()
    for label, dtype, adapter_dtype, rows, features, width, options in cases:
        for launched in record(arch, rows, features, width, dtype, adapter_dtype, **options):
            variant = launched.variant(label)
            run = (variant.num_warps, variant.num_stages)
            kind = repr((variant.name, variant.signature, variant.constexprs, variant.attrs, run))
            if "bottleneck" in variant.name and kind not in seen:
                seen.add(kind)
                yield variant
