"""What the kernels of prefix-extended attention share: tiles of operands and of logits."""

from __future__ import annotations

import triton
import triton.language as tl

from peftfast_kernels.activation import _tanh

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(base, offsets, inside, rd, stride_d, D, EVEN_D: tl.constexpr):
    """Rows at `offsets` of a matrix of D columns, zero outside: [rows, HEAD_BLOCK]."""
    mask = inside[:, None]
    if not EVEN_D:
        mask = mask & (rd[None, :] < D)
    return tl.load(base + offsets[:, None] + rd[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def prefix_of(index_ptr, lengths_ptr, b, P):
    """The number of row b's prefix (-1: none) and how many rows of it count."""
    n = b * 0
    length = P
    if index_ptr is not None:
        n = tl.load(index_ptr + b).to(tl.int64)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + tl.maximum(n, 0)).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), P)
    if index_ptr is not None:
        length = tl.where(n < 0, 0, length)
    return n, length


@triton.jit
def gate_of(gate_ptr, stride_gate, b):
    """The number that row b's prefix is multiplied by."""
    if gate_ptr is not None:
        g = tl.load(gate_ptr + b * stride_gate).to(tl.float32)
    else:
        g = 1.0
    return g


@triton.jit
def logit_factors(scale, g, cap, CAPPED: tl.constexpr):
    """What q k^T is multiplied by, and the cap: of logits in units of log 2."""
    if CAPPED:
        factor = scale * g / cap
        unit = cap * LOG2E
    else:
        factor = scale * g * LOG2E
        unit = 1.0
    return factor, unit


@triton.jit
def cap_logits(products, factor, unit, CAPPED: tl.constexpr):
    """Logits, in units of log 2, of the products of queries and keys."""
    x = products * factor
    if CAPPED:
        x = _tanh(x) * unit
    return x


@triton.jit
def hide(
    x,
    visible,
    mask_ptr,
    mask_rows,
    mask_columns,
    MASK: tl.constexpr,
):
    """Logits with -inf where a key is not visible, and with a mask's values; any orientation."""
    if MASK == "bool":
        kept = tl.load(mask_ptr + (mask_rows + mask_columns), mask=visible, other=0)
        visible = visible & (kept != 0)
    if MASK == "add":
        bias = tl.load(mask_ptr + (mask_rows + mask_columns), mask=visible, other=0.0)
        x = x + bias.to(tl.float32) * LOG2E
    return tl.where(visible, x, float("-inf"))


@triton.jit
def probabilities(x, lse):
    """exp2 of logits above the row's log-sum-exp, both in units of log 2; +inf for empty rows."""
    return tl.exp2(x - lse)
