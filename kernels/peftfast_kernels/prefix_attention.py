"""Attention over a learned prefix and the sequence, without their concatenation.

    x = cap(scale q [g pk; k]^T) + masks      lse = log sum exp x      y = exp(x - lse) [g pv; v]

A program of the forward owns BLOCK_M queries of one head: its loop over keys reads the tiles of the
prefix, which all rows of the batch share, and then those of the sequence, with an online softmax.
It reads q, k, v and the prefix, and writes y and lse: beyond the same attention without a prefix,
it reads the prefix alone, P (D + Dv) elements a key-value head, from the L2 cache after the first
row of the batch. With few queries (decoding), BLOCK_M rows are the queries of a whole group.

With `o_ptr` the sequence's part is given, as o and lse, by another attention, and the kernel adds
the prefix to it: an online softmax that begins at (lse, 1, o). It reads and writes one y more.

The backward reads delta = sum(dy y), with p = exp(x - lse):

    dv = p^T dy     dp = dy v^T     dx = p (dp - delta)     dq = scale dx k     dk = scale dx^T q

in three kernels: dq, which also leaves delta and the gate's sums; dk and dv of the sequence; and
those of the prefix, where a program has BLOCK_N rows of the prefix and a span of the queries of
the whole batch and group. Sums over spans go through a float32 workspace [splits, ...], written
and read once and summed in a fixed order: no atomics. lse and y are those of the whole row, so the
sequence's part may be another attention's backward as well: dq is then added to.

In the form "relu" the prefix's part is g relu(q pk^T) pv, without scale, masks or dropout, added to
the attention over the sequence. y minus that part may be the difference of two large numbers:
where k and v are at hand, delta is summed again, as p dp, in a pass of its own over them.

A prefix may be float32 beside 16-bit q: products take it rounded to q's dtype, as a concatenation
would have it, sums are float32, and its gradients are rounded once, to its own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles, workspace
from peftfast_kernels.lane import skinny_mma
from peftfast_kernels.launch import Launch, launch, recording
from peftfast_kernels.philox import keep_scale, keep_tile, limit
from peftfast_kernels.prefix_logits import (
    LOG2E,
    cap_logits,
    gate_of,
    hide,
    load_tile,
    logit_factors,
    prefix_of,
    probabilities,
)
from peftfast_kernels.split_reduce import split_reduce
from peftfast_kernels.variant import Variant

# The order of `needs` and of the gradients, as in `peftfast.reference.prefix_attention`.
GRADIENTS = ("q", "k", "v", "prefix_k", "prefix_v", "sinks", "gate")


@triton.jit
def _accumulate(x, v, acc, total, top, kept, keep, g, DROPOUT: tl.constexpr, GATED: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """One step of the online softmax: the sums and the running maximum with a tile's in them."""
    new_top = tl.maximum(top, tl.max(x, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - base)
    p = tl.exp2(x - base[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    if DROPOUT:
        p = tl.where(kept, p * keep, 0.0)
    if GATED:
        p = p * g
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top


@triton.jit(do_not_specialize=["S", "T", "P", "limit", "window"])
def _prefix_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    mask_ptr,
    prefix_mask_ptr,
    sinks_ptr,
    index_ptr,
    lengths_ptr,
    gate_ptr,
    seed_ptr,
    o_ptr,
    o_lse_ptr,
    y_ptr,
    lse_ptr,
    S,
    T,
    P,
    D,
    heads,
    group,
    blocks,
    scale,
    cap,
    window,
    limit,
    keep,
    stride_gate,
    q_strides,
    k_strides,
    v_strides,
    prefix_k_strides,
    prefix_v_strides,
    mask_strides,
    prefix_mask_strides,
    o_strides,
    y_strides,
    RELU: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    PREFIX_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    PACK: tl.constexpr,
    EVEN_D: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    block = blocks - 1 - pid % blocks  # under a causal mask, the longest first
    b = (pid // blocks // (heads // PACK)).to(tl.int64)
    head = (pid // blocks % (heads // PACK)) * PACK
    kv_head = (head // group).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    s = rows // PACK
    h = (head + rows % PACK).to(tl.int64)
    inside = s < S
    first, last = (
        block * BLOCK_M // PACK,
        tl.minimum((block * BLOCK_M + BLOCK_M - 1) // PACK, S - 1),
    )
    rd = tl.arange(0, HEAD_BLOCK)
    place = (b * heads + h) * S + s
    q_rows = b * q_strides[0] + h * q_strides[1] + s.to(tl.int64) * q_strides[2]
    q = load_tile(q_ptr, q_rows, inside, rd, q_strides[3], D, EVEN_D)
    n, length = prefix_of(index_ptr, lengths_ptr, b, P)
    g = gate_of(gate_ptr, stride_gate, b)
    offset = T - S

    acc = tl.zeros((BLOCK_M, HEAD_BLOCK), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    if o_ptr is not None:
        o_rows = b * o_strides[0] + h * o_strides[1] + s.to(tl.int64) * o_strides[2]
        acc = load_tile(o_ptr, o_rows, inside, rd, o_strides[3], D, EVEN_D).to(tl.float32)
        top = tl.load(o_lse_ptr + place, mask=inside, other=float("-inf")) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)

    prefix_k_ptr += n * prefix_k_strides[0] + kv_head * prefix_k_strides[1]
    prefix_v_ptr += n * prefix_v_strides[0] + kv_head * prefix_v_strides[1]
    if not RELU:
        factor, unit = logit_factors(scale, g, cap, CAPPED)
        start = 0
        if WINDOW:
            start = tl.maximum(0, first + offset + length - window + 1) // BLOCK_N * BLOCK_N
        for j0 in range(start, length, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            there = j < length
            j_rows = j.to(tl.int64)
            pk = load_tile(
                prefix_k_ptr,
                j_rows * prefix_k_strides[2],
                there,
                rd,
                prefix_k_strides[3],
                D,
                EVEN_D,
            ).to(q.dtype)
            pv = load_tile(
                prefix_v_ptr,
                j_rows * prefix_v_strides[2],
                there,
                rd,
                prefix_v_strides[3],
                D,
                EVEN_D,
            ).to(q.dtype)
            products = tl.dot(q, tl.trans(pk), input_precision=PRECISION)
            x = cap_logits(products, factor, unit, CAPPED)
            visible = inside[:, None] & there[None, :]
            if WINDOW:
                visible = visible & (s[:, None] + (offset + length) - j[None, :] < window)
            m_rows = b * prefix_mask_strides[0] + h * prefix_mask_strides[1]
            m_rows = (m_rows + s.to(tl.int64) * prefix_mask_strides[2])[:, None]
            m_columns = (j_rows * prefix_mask_strides[3])[None, :]
            x = hide(x, visible, prefix_mask_ptr, m_rows, m_columns, PREFIX_MASK)
            kept = visible
            if DROPOUT:
                kept = keep_tile(tl.load(seed_ptr), limit, place, j0, P + T, BLOCK_M, BLOCK_N)
            acc, total, top = _accumulate(
                x, pv, acc, total, top, kept, keep, g, DROPOUT, gate_ptr is not None, PRECISION
            )

    if k_ptr is not None:
        k_ptr += b * k_strides[0] + kv_head * k_strides[1]
        v_ptr += b * v_strides[0] + kv_head * v_strides[1]
        factor, unit = logit_factors(scale, 1.0, cap, CAPPED)
        shift = 0
        if DROPOUT:  # tiles begin where a call of the generator does
            shift = P % 8
        start = 0
        if WINDOW:
            start = tl.maximum(0, first + offset - window + 1) // BLOCK_N * BLOCK_N
        stop = T
        if CAUSAL:
            stop = tl.minimum(T, last + offset + 1)
        for j0 in range(start - shift, stop, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            there = j < T
            if DROPOUT:
                there = there & (j >= 0)
            j_rows = j.to(tl.int64)
            k = load_tile(k_ptr, j_rows * k_strides[2], there, rd, k_strides[3], D, EVEN_D)
            v = load_tile(v_ptr, j_rows * v_strides[2], there, rd, v_strides[3], D, EVEN_D)
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            x = cap_logits(products, factor, unit, CAPPED)
            visible = inside[:, None] & there[None, :]
            if CAUSAL:
                visible = visible & (j[None, :] <= s[:, None] + offset)
            if WINDOW:
                visible = visible & (s[:, None] + offset - j[None, :] < window)
            m_rows = b * mask_strides[0] + h * mask_strides[1]
            m_rows = (m_rows + s.to(tl.int64) * mask_strides[2])[:, None]
            m_columns = (j_rows * mask_strides[3])[None, :]
            x = hide(x, visible, mask_ptr, m_rows, m_columns, MASK)
            kept = visible
            if DROPOUT:
                kept = keep_tile(tl.load(seed_ptr), limit, place, P + j0, P + T, BLOCK_M, BLOCK_N)
            acc, total, top = _accumulate(
                x, v, acc, total, top, kept, keep, 1.0, DROPOUT, False, PRECISION
            )

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.exp2(sink - base)
        acc = acc * shrink[:, None]
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    lse = tl.where(empty, float("inf"), (top + tl.log2(total)) / LOG2E)
    tl.store(lse_ptr + place, lse, mask=inside)

    if RELU:
        for j0 in range(0, length, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            there = j < length
            j_rows = j.to(tl.int64)
            pk = load_tile(
                prefix_k_ptr,
                j_rows * prefix_k_strides[2],
                there,
                rd,
                prefix_k_strides[3],
                D,
                EVEN_D,
            ).to(q.dtype)
            pv = load_tile(
                prefix_v_ptr,
                j_rows * prefix_v_strides[2],
                there,
                rd,
                prefix_v_strides[3],
                D,
                EVEN_D,
            ).to(q.dtype)
            hidden = tl.dot(q, tl.trans(pk), input_precision=PRECISION)
            hidden = tl.where(hidden < 0.0, 0.0, hidden) * g
            acc = tl.dot(hidden.to(q.dtype), pv, acc, input_precision=PRECISION)

    y_rows = b * y_strides[0] + h * y_strides[1] + s.to(tl.int64) * y_strides[2]
    y_mask = inside[:, None]
    if not EVEN_D:
        y_mask = y_mask & (rd[None, :] < D)
    y_place = y_rows[:, None] + rd[None, :] * y_strides[3]
    tl.store(y_ptr + y_place, acc.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["S", "T", "P", "limit", "window"])
def _prefix_attention_grad_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    mask_ptr,
    prefix_mask_ptr,
    index_ptr,
    lengths_ptr,
    gate_ptr,
    seed_ptr,
    y_ptr,
    dy_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dgate_ptr,
    S,
    T,
    P,
    D,
    heads,
    group,
    blocks,
    scale,
    cap,
    window,
    limit,
    keep,
    stride_gate,
    q_strides,
    k_strides,
    v_strides,
    prefix_k_strides,
    prefix_v_strides,
    mask_strides,
    prefix_mask_strides,
    y_strides,
    dy_strides,
    dq_strides,
    RELU: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    PREFIX_MASK: tl.constexpr,
    ADDED: tl.constexpr,
    FROM_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    block = blocks - 1 - pid % blocks
    b = (pid // blocks // heads).to(tl.int64)
    h = (pid // blocks % heads).to(tl.int64)
    kv_head = h // group
    s = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = s < S
    first, last = block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M - 1, S - 1)
    s_rows = s.to(tl.int64)
    rd = tl.arange(0, HEAD_BLOCK)
    place = (b * heads + h) * S + s
    y_ptr += b * y_strides[0] + h * y_strides[1]
    dy_ptr += b * dy_strides[0] + h * dy_strides[1]
    dy = load_tile(dy_ptr, s_rows * dy_strides[2], inside, rd, dy_strides[3], D, EVEN_D)
    delta = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if FROM_Y:
        y = load_tile(y_ptr, s_rows * y_strides[2], inside, rd, y_strides[3], D, EVEN_D)
        delta += tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
    dgate = tl.zeros((BLOCK_M,), dtype=tl.float32)
    offset = T - S

    if dq_ptr is not None or dgate_ptr is not None or RELU:
        q_ptr += b * q_strides[0] + h * q_strides[1]
        q = load_tile(q_ptr, s_rows * q_strides[2], inside, rd, q_strides[3], D, EVEN_D)
        lse = tl.load(lse_ptr + place, mask=inside, other=float("inf")) * LOG2E
        n, length = prefix_of(index_ptr, lengths_ptr, b, P)
        g = gate_of(gate_ptr, stride_gate, b)
        dq = tl.zeros((BLOCK_M, HEAD_BLOCK), dtype=tl.float32)
        prefix_k_ptr += n * prefix_k_strides[0] + kv_head * prefix_k_strides[1]
        prefix_v_ptr += n * prefix_v_strides[0] + kv_head * prefix_v_strides[1]
        factor, unit = logit_factors(scale, g, cap, CAPPED)
        start = 0
        if WINDOW and not RELU:
            start = tl.maximum(0, first + offset + length - window + 1) // BLOCK_N * BLOCK_N
        for j0 in range(start, length, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            there = j < length
            j_rows = j.to(tl.int64)
            pk = load_tile(
                prefix_k_ptr,
                j_rows * prefix_k_strides[2],
                there,
                rd,
                prefix_k_strides[3],
                D,
                EVEN_D,
            ).to(q.dtype)
            pv = load_tile(
                prefix_v_ptr,
                j_rows * prefix_v_strides[2],
                there,
                rd,
                prefix_v_strides[3],
                D,
                EVEN_D,
            ).to(q.dtype)
            products = tl.dot(q, tl.trans(pk), input_precision=PRECISION)
            dp = tl.dot(dy, tl.trans(pv), input_precision=PRECISION)
            if RELU:
                dgate += tl.sum(tl.where(products < 0.0, 0.0, products) * dp, axis=1)
                dx = tl.where(products > 0.0, dp * g, 0.0)
            else:
                x = cap_logits(products, factor, unit, CAPPED)
                if CAPPED:
                    slope = 1.0 - (x / unit) * (x / unit)
                visible = inside[:, None] & there[None, :]
                if WINDOW:
                    visible = visible & (s[:, None] + (offset + length) - j[None, :] < window)
                m_rows = b * prefix_mask_strides[0] + h * prefix_mask_strides[1]
                m_rows = (m_rows + s_rows * prefix_mask_strides[2])[:, None]
                m_columns = (j_rows * prefix_mask_strides[3])[None, :]
                x = hide(x, visible, prefix_mask_ptr, m_rows, m_columns, PREFIX_MASK)
                p = probabilities(x, lse[:, None])
                if DROPOUT:
                    kept = keep_tile(tl.load(seed_ptr), limit, place, j0, P + T, BLOCK_M, BLOCK_N)
                    dp = tl.where(kept, dp * keep, 0.0)
                dx = p * (dp * g - delta[:, None])
                if CAPPED:
                    dx = dx * slope
                if gate_ptr is not None:
                    dgate += tl.sum(p * dp + dx * products * scale, axis=1)
                    dx = dx * g
            dq = tl.dot(dx.to(q.dtype), pk, dq, input_precision=PRECISION)

        if RELU and FROM_Y:
            delta -= dgate * g

        if (dq_ptr is not None or not FROM_Y) and k_ptr is not None:
            FIRST: tl.constexpr = 1 if FROM_Y else 0
            k_ptr += b * k_strides[0] + kv_head * k_strides[1]
            v_ptr += b * v_strides[0] + kv_head * v_strides[1]
            factor, unit = logit_factors(scale, 1.0, cap, CAPPED)
            shift = 0
            if DROPOUT:
                shift = P % 8
            start = 0
            if WINDOW:
                start = tl.maximum(0, first + offset - window + 1) // BLOCK_N * BLOCK_N
            stop = T
            if CAUSAL:
                stop = tl.minimum(T, last + offset + 1)
            # y holds more than the softmax's part in the form "relu": delta is summed first.
            for step in tl.static_range(FIRST, 2):
                for j0 in range(start - shift, stop, BLOCK_N):
                    j = j0 + tl.arange(0, BLOCK_N)
                    there = j < T
                    if DROPOUT:
                        there = there & (j >= 0)
                    j_rows = j.to(tl.int64)
                    k = load_tile(k_ptr, j_rows * k_strides[2], there, rd, k_strides[3], D, EVEN_D)
                    v = load_tile(v_ptr, j_rows * v_strides[2], there, rd, v_strides[3], D, EVEN_D)
                    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    x = cap_logits(products, factor, unit, CAPPED)
                    if CAPPED:
                        slope = 1.0 - (x / unit) * (x / unit)
                    visible = inside[:, None] & there[None, :]
                    if CAUSAL:
                        visible = visible & (j[None, :] <= s[:, None] + offset)
                    if WINDOW:
                        visible = visible & (s[:, None] + offset - j[None, :] < window)
                    m_rows = b * mask_strides[0] + h * mask_strides[1]
                    m_rows = (m_rows + s_rows * mask_strides[2])[:, None]
                    m_columns = (j_rows * mask_strides[3])[None, :]
                    x = hide(x, visible, mask_ptr, m_rows, m_columns, MASK)
                    p = probabilities(x, lse[:, None])
                    dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
                    if DROPOUT:
                        kept = keep_tile(
                            tl.load(seed_ptr), limit, place, P + j0, P + T, BLOCK_M, BLOCK_N
                        )
                        dp = tl.where(kept, dp * keep, 0.0)
                    if step == 0:
                        delta += tl.sum(p * dp, axis=1)
                    elif dq_ptr is not None:
                        dx = p * (dp - delta[:, None])
                        if CAPPED:
                            dx = dx * slope
                        if RELU:
                            dx = dx * scale
                        dq = tl.dot(dx.to(q.dtype), k, dq, input_precision=PRECISION)

        if dq_ptr is not None:
            if not RELU:
                dq = dq * scale
            dq_rows = b * dq_strides[0] + h * dq_strides[1] + s_rows * dq_strides[2]
            dq_mask = inside[:, None]
            if not EVEN_D:
                dq_mask = dq_mask & (rd[None, :] < D)
            dq_place = dq_rows[:, None] + rd[None, :] * dq_strides[3]
            if ADDED:
                dq += tl.load(dq_ptr + dq_place, mask=dq_mask, other=0.0).to(tl.float32)
            tl.store(dq_ptr + dq_place, dq.to(dq_ptr.dtype.element_ty), mask=dq_mask)
        if dgate_ptr is not None:
            tl.store(dgate_ptr + pid, tl.sum(tl.where(inside, dgate, 0.0), axis=0))
    tl.store(delta_ptr + place, delta, mask=inside)


@triton.jit
def _key_step(
    q, k, v, dy, x, lse, delta, kept, keep, g, slope, dk, dv,
    DROPOUT: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, up to g of k's, with a tile of queries in them.

    x, kept, slope: [keys, queries].
    """
    p = probabilities(x, lse[None, :])
    dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        dropped = tl.where(kept, p * keep, 0.0)
        dp = tl.where(kept, dp * keep, 0.0)
    dv = tl.dot((dropped * g).to(q.dtype), dy, dv, input_precision=PRECISION)
    dx = p * (dp * g - delta[None, :])
    if CAPPED:
        dx = dx * slope
    dk = tl.dot((dx * g).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["S", "T", "P", "limit", "window"])
def _prefix_attention_grad_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    seed_ptr,
    dy_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    S,
    T,
    P,
    D,
    heads,
    group,
    blocks,
    scale,
    cap,
    window,
    limit,
    keep,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    dy_strides,
    dk_strides,
    dv_strides,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    block = pid % blocks
    kv_heads = heads // group
    b = (pid // blocks // kv_heads).to(tl.int64)
    kv_head = (pid // blocks % kv_heads).to(tl.int64)
    j0 = block * BLOCK_N
    if DROPOUT:  # as in the forward
        j0 -= P % 8
    j = j0 + tl.arange(0, BLOCK_N)
    there = j < T
    if DROPOUT:
        there = there & (j >= 0)
    j_rows = j.to(tl.int64)
    rd = tl.arange(0, HEAD_BLOCK)
    k_ptr += b * k_strides[0] + kv_head * k_strides[1]
    v_ptr += b * v_strides[0] + kv_head * v_strides[1]
    k = load_tile(k_ptr, j_rows * k_strides[2], there, rd, k_strides[3], D, EVEN_D)
    v = load_tile(v_ptr, j_rows * v_strides[2], there, rd, v_strides[3], D, EVEN_D)
    dk = tl.zeros((BLOCK_N, HEAD_BLOCK), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_BLOCK), dtype=tl.float32)
    factor, unit = logit_factors(scale, 1.0, cap, CAPPED)
    offset = T - S
    start, stop = 0, S
    if CAUSAL:
        start = tl.maximum(0, j0 - offset) // BLOCK_M * BLOCK_M
    if WINDOW:
        stop = tl.minimum(S, tl.maximum(0, j0 + BLOCK_N - 1 - offset + window))

    for i in range(0, group):
        h = kv_head * group + i
        of_q = q_ptr + b * q_strides[0] + h * q_strides[1]
        of_dy = dy_ptr + b * dy_strides[0] + h * dy_strides[1]
        for m0 in range(start, stop, BLOCK_M):
            s = m0 + tl.arange(0, BLOCK_M)
            inside = s < S
            s_rows = s.to(tl.int64)
            place = (b * heads + h) * S + s
            q = load_tile(of_q, s_rows * q_strides[2], inside, rd, q_strides[3], D, EVEN_D)
            dy = load_tile(of_dy, s_rows * dy_strides[2], inside, rd, dy_strides[3], D, EVEN_D)
            lse = tl.load(lse_ptr + place, mask=inside, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
            x = cap_logits(products, factor, unit, CAPPED)
            slope = x
            if CAPPED:
                slope = 1.0 - (x / unit) * (x / unit)
            visible = inside[None, :] & there[:, None]
            if CAUSAL:
                visible = visible & (j[:, None] <= s[None, :] + offset)
            if WINDOW:
                visible = visible & (s[None, :] + offset - j[:, None] < window)
            m_rows = b * mask_strides[0] + h * mask_strides[1]
            m_rows = (m_rows + s_rows * mask_strides[2])[None, :]
            m_columns = (j_rows * mask_strides[3])[:, None]
            x = hide(x, visible, mask_ptr, m_rows, m_columns, MASK)
            kept = visible
            if DROPOUT:
                kept = tl.trans(
                    keep_tile(tl.load(seed_ptr), limit, place, P + j0, P + T, BLOCK_M, BLOCK_N)
                )
            dk, dv = _key_step(
                q, k, v, dy, x, lse, delta, kept, keep, 1.0, slope, dk, dv,
                DROPOUT, CAPPED, PRECISION,
            )  # fmt: skip

    out_mask = there[:, None]
    if not EVEN_D:
        out_mask = out_mask & (rd[None, :] < D)
    if dk_ptr is not None:
        dk_ptr += b * dk_strides[0] + kv_head * dk_strides[1]
        dk_place = (j_rows * dk_strides[2])[:, None] + rd[None, :] * dk_strides[3]
        tl.store(dk_ptr + dk_place, (dk * scale).to(dk_ptr.dtype.element_ty), mask=out_mask)
    if dv_ptr is not None:
        dv_ptr += b * dv_strides[0] + kv_head * dv_strides[1]
        dv_place = (j_rows * dv_strides[2])[:, None] + rd[None, :] * dv_strides[3]
        tl.store(dv_ptr + dv_place, dv.to(dv_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["B", "S", "T", "P", "span", "limit", "window"])
def _prefix_attention_grad_prefix_kernel(
    q_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    prefix_mask_ptr,
    index_ptr,
    lengths_ptr,
    gate_ptr,
    seed_ptr,
    dy_ptr,
    lse_ptr,
    delta_ptr,
    sums_ptr,
    B,
    S,
    T,
    P,
    D,
    heads,
    group,
    size,
    blocks,
    span,
    scale,
    cap,
    window,
    limit,
    keep,
    stride_gate,
    q_strides,
    prefix_k_strides,
    prefix_v_strides,
    prefix_mask_strides,
    dy_strides,
    RELU: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PREFIX_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    j0 = pid % blocks * BLOCK_N
    kv_head = (pid // blocks % kv_heads).to(tl.int64)
    n = (pid // blocks // kv_heads).to(tl.int64)
    length = P
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + n).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), P)
    j = j0 + tl.arange(0, BLOCK_N)
    there = j < length
    j_rows = j.to(tl.int64)
    rd = tl.arange(0, HEAD_BLOCK)
    compute = q_ptr.dtype.element_ty
    prefix_k_ptr += n * prefix_k_strides[0] + kv_head * prefix_k_strides[1]
    prefix_v_ptr += n * prefix_v_strides[0] + kv_head * prefix_v_strides[1]
    pk = load_tile(
        prefix_k_ptr, j_rows * prefix_k_strides[2], there, rd, prefix_k_strides[3], D, EVEN_D
    ).to(compute)
    pv = load_tile(
        prefix_v_ptr, j_rows * prefix_v_strides[2], there, rd, prefix_v_strides[3], D, EVEN_D
    ).to(compute)
    dk = tl.zeros((BLOCK_N, HEAD_BLOCK), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_BLOCK), dtype=tl.float32)
    offset = T - S
    tiles = tl.cdiv(S, BLOCK_M)  # of one head's queries

    for i in range(split * span, tl.minimum(split * span + span, B * group * tiles)):
        b = (i // (group * tiles)).to(tl.int64)
        h = kv_head * group + i // tiles % group
        m0 = (i % tiles * BLOCK_M).to(tl.int32)
        used = True
        if index_ptr is not None:
            used = tl.load(index_ptr + b).to(tl.int64) == n
        if WINDOW and not RELU:
            used = used & (m0 + offset + length - (j0 + BLOCK_N - 1) < window)
        if used:
            s = m0 + tl.arange(0, BLOCK_M)
            inside = s < S
            s_rows = s.to(tl.int64)
            place = (b * heads + h) * S + s
            of_q = q_ptr + b * q_strides[0] + h * q_strides[1]
            of_dy = dy_ptr + b * dy_strides[0] + h * dy_strides[1]
            q = load_tile(of_q, s_rows * q_strides[2], inside, rd, q_strides[3], D, EVEN_D)
            dy = load_tile(of_dy, s_rows * dy_strides[2], inside, rd, dy_strides[3], D, EVEN_D)
            g = gate_of(gate_ptr, stride_gate, b)
            products = tl.dot(pk, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
            if RELU:
                hidden = tl.where(products < 0.0, 0.0, products) * g
                dv = tl.dot(hidden.to(compute), dy, dv, input_precision=PRECISION)
                dp = tl.dot(pv, tl.trans(dy), input_precision=PRECISION)
                dx = tl.where(products > 0.0, dp * g, 0.0)
                dk = tl.dot(dx.to(compute), q, dk, input_precision=PRECISION)
            else:
                lse = tl.load(lse_ptr + place, mask=inside, other=float("inf")) * LOG2E
                delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
                factor, unit = logit_factors(scale, g, cap, CAPPED)
                x = cap_logits(products, factor, unit, CAPPED)
                slope = x
                if CAPPED:
                    slope = 1.0 - (x / unit) * (x / unit)
                visible = inside[None, :] & there[:, None]
                if WINDOW:
                    visible = visible & (s[None, :] + (offset + length) - j[:, None] < window)
                m_rows = b * prefix_mask_strides[0] + h * prefix_mask_strides[1]
                m_rows = (m_rows + s_rows * prefix_mask_strides[2])[None, :]
                m_columns = (j_rows * prefix_mask_strides[3])[:, None]
                x = hide(x, visible, prefix_mask_ptr, m_rows, m_columns, PREFIX_MASK)
                kept = visible
                if DROPOUT:
                    kept = tl.trans(
                        keep_tile(tl.load(seed_ptr), limit, place, j0, P + T, BLOCK_M, BLOCK_N)
                    )
                dk, dv = _key_step(
                    q, pk, pv, dy, x, lse, delta, kept, keep, g, slope, dk, dv,
                    DROPOUT, CAPPED, PRECISION,
                )  # fmt: skip

    if not RELU:
        dk = dk * scale
    sums_ptr += split * 2 * size + (n * kv_heads + kv_head) * P * D
    out_mask = (j < P)[:, None]
    if not EVEN_D:
        out_mask = out_mask & (rd[None, :] < D)
    out_place = (j_rows * D)[:, None] + rd[None, :]
    tl.store(sums_ptr + out_place, dk, mask=out_mask)
    tl.store(sums_ptr + size + out_place, dv, mask=out_mask)


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
    """The output and the merged log-sum-exp, as
    `peftfast.reference.prefix_attention.prefix_attention_forward` gives them, of the same
    arguments; v's heads are as wide as k's.
    """
    call = _Call(
        q, k, v, prefix_k, prefix_v, attn_mask, prefix_mask, is_causal, scale, window, softcap,
        sinks, prefix_index, prefix_lengths, gate, form, dropout_p, seed,
    )  # fmt: skip
    batch, heads, queries, width = q.shape
    y = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if q.numel() == 0:
        return y, lse
    with device.current(q):
        o = o_lse = None
        if call.merges:
            o, o_lse = _library_forward(call)
        pack = tiles.packed_heads(call.group, queries)
        tile = tiles.prefix_attention_tile(call.arch, call.head_block, q.element_size(), call.heavy)
        tile = tiles.fewer_rows(tile, queries * pack)
        blocks = triton.cdiv(queries * pack, tile.block_m)
        launch(
            _prefix_attention_kernel,
            (blocks * batch * (heads // pack),),
            q,
            *((None, None) if call.merges else (k, v)),
            prefix_k,
            prefix_v,
            *call.masks,
            sinks,
            prefix_index,
            prefix_lengths,
            gate,
            seed if call.drops else None,
            o,
            o_lse,
            y,
            lse,
            *call.sizes,
            width,
            heads,
            call.group,
            blocks,
            *call.numbers,
            *call.strides,
            (0, 0, 0, 0) if o is None else o.stride(),
            y.stride(),
            mma=call.mma,
            RELU=form == "relu",
            **call.switches,
            PACK=pack,
            **_blocks(tile, call.head_block, width),
        )
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
    """The gradients asked for, as
    `peftfast.reference.prefix_attention.prefix_attention_backward` gives them, of the same
    arguments.
    """
    call = _Call(
        q, k, v, prefix_k, prefix_v, attn_mask, prefix_mask, is_causal, scale, window, softcap,
        sinks, prefix_index, prefix_lengths, gate, form, dropout_p, seed,
    )  # fmt: skip
    want = dict(zip(GRADIENTS, needs, strict=True))
    grads: dict[str, Tensor] = {}
    if q.numel() == 0:
        for name, one in (("q", q), ("k", k), ("v", v)):
            grads[name] = torch.zeros_like(one)
        for name, one in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
            grads[name] = one.new_zeros(one.shape, dtype=torch.float32)
        grads["sinks"] = q.new_zeros(q.shape[1], dtype=torch.float32)
        grads["gate"] = q.new_zeros(q.shape[0], dtype=torch.float32)
        return [grads[name] for name in GRADIENTS if want[name]]
    with device.current(q):
        added = call.merges and (want["q"] or want["k"] or want["v"])
        if added:
            grads["q"], grads["k"], grads["v"] = _library_backward(call, dy, y, lse)
        elif want["q"]:
            grads["q"] = torch.empty_like(q)
        delta = torch.empty_like(lse)
        _grad_q(call, dy, y, lse, delta, grads.get("q") if want["q"] else None, added, want, grads)
        if want["sinks"]:
            assert sinks is not None
            of_sink = torch.exp(sinks.float()[:, None] - lse) * delta
            grads["sinks"] = -of_sink.sum((0, 2))
        if not added and (want["k"] or want["v"]):
            for name, one in (("k", k), ("v", v)):
                if want[name]:
                    grads[name] = torch.empty_like(one)
            _grad_kv(call, dy, lse, delta, grads)
        if want["prefix_k"] or want["prefix_v"]:
            _grad_prefix(call, dy, lse, delta, grads)
    return [grads[name] for name in GRADIENTS if want[name]]


@dataclass(frozen=True)
class _Call:
    """What every kernel takes of a call's operands."""

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
    sinks: Tensor | None
    prefix_index: Tensor | None
    prefix_lengths: Tensor | None
    gate: Tensor | None
    form: str
    dropout_p: float
    seed: Tensor | None

    @property
    def arch(self) -> int:
        return device.arch(self.q.device)

    @property
    def group(self) -> int:
        """Heads of q to one of k."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def head_block(self) -> int:
        return tiles.head_block(self.q.shape[3])

    @property
    def drops(self) -> bool:
        return self.dropout_p > 0

    @property
    def heavy(self) -> bool:
        """Whether logits take more registers than products and their limits do."""
        return self.drops or self.attn_mask is not None or self.prefix_mask is not None

    @property
    def merges(self) -> bool:
        """Whether torch's attention computes the sequence's part."""
        plain = self.attn_mask is None and self.window is None and self.softcap is None
        queries, keys = self.q.shape[2], self.k.shape[2]
        square = not self.is_causal or queries in (1, keys)
        serves = plain and square and not self.drops and self.form == "softmax" and keys > 0
        return serves and self.plan == "library"

    @property
    def plan(self) -> str:
        return tiles.prefix_attention_plan(
            self.q.dtype, self.q.shape[3], device.on_gpu(self.q.device)
        )

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        """As the kernels read them: a bool is a byte."""
        first, second = (
            one.view(torch.uint8) if one is not None and one.dtype == torch.bool else one
            for one in (self.attn_mask, self.prefix_mask)
        )
        return first, second

    @property
    def sizes(self) -> tuple[int, int, int]:
        """S, T and P."""
        return self.q.shape[2], self.k.shape[2], self.prefix_k.shape[2]

    @property
    def numbers(self) -> tuple[float, float, int, int, float, int]:
        """scale, cap, window, limit, keep and the gate's stride."""
        gate = 0 if self.gate is None else self.gate.stride(0)
        return (
            self.scale,
            float(self.softcap or 0.0),
            self.window or 0,
            limit(self.dropout_p),
            keep_scale(self.dropout_p),
            gate,
        )

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k, v, the prefix's two and the two masks."""
        dense = (self.q, self.k, self.v, self.prefix_k, self.prefix_v)
        return (
            *(one.stride() for one in dense),
            *(_mask_strides(one) for one in (self.attn_mask, self.prefix_mask)),
        )

    @property
    def mma(self) -> str:
        return skinny_mma(self.q.dtype, self.q.dtype)

    @property
    def switches(self) -> dict[str, Any]:
        return {
            "CAUSAL": self.is_causal,
            "WINDOW": self.window is not None,
            "CAPPED": self.softcap is not None,
            "DROPOUT": self.drops,
            "MASK": _mask_kind(self.attn_mask),
            "PREFIX_MASK": _mask_kind(self.prefix_mask),
            "PRECISION": device.matmul_precision(self.q.dtype),
        }


def _mask_kind(mask: Tensor | None) -> str:
    if mask is None:
        return "none"
    return "bool" if mask.dtype == torch.bool else "add"


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Of a mask that is broadcast: 0 where its size is 1."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(
        0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
    )


def _blocks(tile: tiles.Tile, head_block: int, width: int) -> dict[str, Any]:
    return {
        "EVEN_D": head_block == width,
        "HEAD_BLOCK": head_block,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _grad_q(
    call: _Call,
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor | None,
    added: bool,
    want: Mapping[str, bool],
    grads: dict[str, Tensor],
) -> None:
    """Fills delta, dq (or adds the prefix's part to it) and the gate's gradient."""
    batch, heads, queries, width = call.q.shape
    tile = tiles.prefix_attention_grad_tile(
        call.arch, call.head_block, call.q.element_size(), call.heavy
    )
    tile = tiles.fewer_rows(tile, queries)
    blocks = triton.cdiv(queries, tile.block_m)
    part = None
    if want["gate"]:
        part = workspace.allocate((batch, heads * blocks), call.q.device)
    launch(
        _prefix_attention_grad_q_kernel,
        (blocks * batch * heads,),
        call.q,
        *((None, None) if call.merges else (call.k, call.v)),
        call.prefix_k,
        call.prefix_v,
        *call.masks,
        call.prefix_index,
        call.prefix_lengths,
        call.gate,
        call.seed if call.drops else None,
        y,
        dy,
        lse,
        delta,
        dq,
        part,
        *call.sizes,
        width,
        heads,
        call.group,
        blocks,
        *call.numbers,
        *call.strides,
        y.stride(),
        dy.stride(),
        (0, 0, 0, 0) if dq is None else dq.stride(),
        mma=call.mma if dq is not None or part is not None or call.form == "relu" else "none",
        RELU=call.form == "relu",
        **call.switches,
        ADDED=added,
        FROM_Y=call.form == "softmax" or not (want["q"] or want["k"] or want["v"]),
        **_blocks(tile, call.head_block, width),
    )
    if part is not None:
        grads["gate"] = part.sum(1)


def _grad_kv(
    call: _Call, dy: Tensor, lse: Tensor, delta: Tensor, grads: Mapping[str, Tensor]
) -> None:
    """Fills the gradients of k and v that are in `grads`."""
    batch, heads, _, width = call.q.shape
    _, keys, rows = call.sizes
    if keys == 0:
        return
    tile = tiles.prefix_attention_grad_kv_tile(
        call.arch, call.head_block, call.q.element_size(), call.heavy
    )
    blocks = triton.cdiv(keys + (rows % 8 if call.drops else 0), tile.block_n)
    dk, dv = grads.get("k"), grads.get("v")
    of_q, of_k, of_v, _, _, of_mask, _ = call.strides
    launch(
        _prefix_attention_grad_kv_kernel,
        (blocks * batch * (heads // call.group),),
        call.q,
        call.k,
        call.v,
        call.masks[0],
        call.seed if call.drops else None,
        dy,
        lse,
        delta,
        dk,
        dv,
        *call.sizes,
        width,
        heads,
        call.group,
        blocks,
        *call.numbers[:-1],
        of_q,
        of_k,
        of_v,
        of_mask,
        dy.stride(),
        (0, 0, 0, 0) if dk is None else dk.stride(),
        (0, 0, 0, 0) if dv is None else dv.stride(),
        mma=call.mma,
        **{name: on for name, on in call.switches.items() if name != "PREFIX_MASK"},
        **_blocks(tile, call.head_block, width),
    )


def _grad_prefix(
    call: _Call, dy: Tensor, lse: Tensor, delta: Tensor, grads: dict[str, Tensor]
) -> None:
    """Makes both gradients of the prefix, [N, Hkv, P, D] in float32."""
    batch, heads, queries, width = call.q.shape
    prefixes, kv_heads, rows, _ = call.prefix_k.shape
    tile = tiles.prefix_attention_grad_kv_tile(
        call.arch, call.head_block, call.q.element_size(), call.heavy
    )
    blocks = triton.cdiv(rows, tile.block_n)
    programs = blocks * kv_heads * prefixes
    steps = batch * call.group * triton.cdiv(queries, tile.block_m)
    span, splits = tiles.prefix_splits(steps, programs, device.sm_count(call.q.device))
    out = call.q.new_empty(2, *call.prefix_k.shape, dtype=torch.float32)
    sums = out if splits == 1 else workspace.allocate((splits, out.numel()), out.device)
    of_q, _, _, of_prefix_k, of_prefix_v, _, of_mask = call.strides
    launch(
        _prefix_attention_grad_prefix_kernel,
        (programs, splits),
        call.q,
        call.prefix_k,
        call.prefix_v,
        call.masks[1],
        call.prefix_index,
        call.prefix_lengths,
        call.gate,
        call.seed if call.drops else None,
        dy,
        lse,
        delta,
        sums,
        batch,
        *call.sizes,
        width,
        heads,
        call.group,
        call.prefix_k.numel(),
        blocks,
        span,
        *call.numbers,
        of_q,
        of_prefix_k,
        of_prefix_v,
        of_mask,
        dy.stride(),
        mma=call.mma,
        RELU=call.form == "relu",
        **{name: on for name, on in call.switches.items() if name not in ("CAUSAL", "MASK")},
        **_blocks(tile, call.head_block, width),
    )
    if splits > 1:
        split_reduce([sums], [out])
    grads["prefix_k"], grads["prefix_v"] = out


def _library_forward(call: _Call) -> tuple[Tensor, Tensor]:
    """Torch's flash attention over the sequence alone: o and its log-sum-exp."""
    q, k, v = _for_library(call)
    causal = call.is_causal and call.q.shape[2] > 1
    if q.device.type == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=call.scale
        )
    else:
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=call.scale
        )
    return o, lse.contiguous()


def _library_backward(
    call: _Call, dy: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence's part of dq, and dk and dv: torch's backward with the whole row's y and lse."""
    q, k, v = _for_library(call)
    causal = call.is_causal and call.q.shape[2] > 1
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    if q.device.type == "cpu":
        of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads: Any = of_cpu(dy, q, k, v, y, lse, 0.0, causal, scale=call.scale)
    else:
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that isn't there
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dy, q, k, v, y, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, state, state,
            scale=call.scale,
        )  # fmt: skip
    dq, dk, dv = grads
    return dq, dk, dv


def _for_library(call: _Call) -> list[Tensor]:
    return [one if one.stride(-1) == 1 else one.contiguous() for one in (call.q, call.k, call.v)]


def record(
    arch: int,
    batch: int,
    queries: int,
    keys: int,
    rows: int,
    width: int,
    dtype: torch.dtype,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    prefix_dtype: torch.dtype | None = None,
    plan: str = "fused",
    backward: bool = True,
    causal: bool = True,
    mask: str = "none",
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    banked: bool = False,
    gated: bool = False,
    form: str = "softmax",
    dropout_p: float = 0.0,
    sm_count: int = 132,
) -> list[Launch]:
    """The launches of an attention's forward and backward, with all gradients, on any GPU.

    `mask`: "none", "bool" or "add", of the sequence and of the prefix; `banked`: four prefixes of
    several lengths, one of them for each row.
    """

    def empty(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    kind = torch.bool if mask == "bool" else dtype
    q, dy = empty(batch, heads, queries, width), empty(batch, heads, queries, width)
    k, v = empty(batch, kv_heads, keys, width), empty(batch, kv_heads, keys, width)
    prefix = (4 if banked else 1, kv_heads, rows, width)
    of_prefix = prefix_dtype or dtype
    operands = (q, k, v, empty(*prefix, like=of_prefix), empty(*prefix, like=of_prefix))
    settings: dict[str, Any] = {
        "attn_mask": None if mask == "none" else empty(batch, 1, queries, keys, like=kind),
        "prefix_mask": None if mask == "none" else empty(batch, 1, 1, rows, like=kind),
        "is_causal": causal,
        "scale": width**-0.5,
        "window": window,
        "softcap": softcap,
        "sinks": empty(heads) if sinks else None,
        "prefix_index": empty(batch, like=torch.int64) if banked else None,
        "prefix_lengths": empty(4, like=torch.int64) if banked else None,
        "gate": empty(batch) if gated else None,
        "form": form,
        "dropout_p": dropout_p,
        "seed": empty(1, like=torch.int64) if dropout_p else None,
    }
    needs = [True] * 5 + [sinks, gated]
    with tiles.forced_attention_plan(plan), recording(arch, sm_count) as launches:
        y, lse = prefix_attention_forward(*operands, **settings)
        if backward:
            prefix_attention_backward(dy, *operands, y, lse, **settings, needs=needs)
    return launches


def aot_variants(arch: int) -> Iterator[Variant]:
    """Every kernel with the tiles pinned for this architecture: narrow and wide heads, plain, with
    every kind of mask, with dropout; both plans, and decoding.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    rest: dict[str, Any] = {
        "mask": "add", "window": 1024, "softcap": 50.0, "sinks": True, "banked": True,
        "gated": True, "dropout_p": 0.1, "prefix_dtype": fp32,
    }  # fmt: skip
    relu = {"form": "relu", "gated": True, "prefix_dtype": fp32}
    cases: list[tuple[str, torch.dtype, int, dict[str, Any]]] = [
        ("bf16", bf16, 128, {}),
        ("bf16", bf16, 128, {"plan": "library"}),
        ("bf16", bf16, 128, {"mask": "bool", "causal": False}),
        ("bf16+fp32", bf16, 128, rest),
        ("bf16", bf16, 64, {}),
        ("bf16+fp32", bf16, 64, rest),
        ("bf16+fp32", bf16, 128, relu),
        ("bf16+fp32", bf16, 256, rest),
        ("fp32", fp32, 80, {**rest, "prefix_dtype": fp32}),
    ]
    if arch in (86, 89):  # sm_80's code with less shared memory: what takes the most of that
        cases = [case for case in cases if case[2] >= 128 and case[3] in ({}, rest)]
    launches = [
        (label, one)
        for label, dtype, width, options in cases
        for one in record(arch, 8, 2048, 2048, 128, width, dtype, **options)
    ]
    decoding = record(arch, 8, 1, 2048, 128, 128, bf16, backward=False)
    seen = set()
    for label, launched in [*launches, *(("bf16", one) for one in decoding)]:
        variant = launched.variant(label)
        run = (variant.num_warps, variant.num_stages)
        kind = repr((variant.name, variant.signature, variant.constexprs, variant.attrs, run))
        if "prefix_attention" in variant.name and kind not in seen:
            seen.add(kind)
            yield variant
