"""Products of 16-bit activations with float32 adapters on tensor cores, at float32's precision.

A 16-bit activation is exact in TF32; the adapter's value is not, and is split into a TF32 head
and the rest. Two TF32 products then carry 22 bits of it or more, where rounding it would leave
11.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tf32_head(v):
    """float32 values rounded to TF32's ten fraction bits."""
    bits = v.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot_adapter_right(x, p, acc, PRECISION: tl.constexpr):
    """acc + x p, with the adapter's operand on the right; PRECISION is "tf32x2" for the split,
    else `tl.dot`'s.
    """
    if PRECISION == "tf32x2":
        head = tf32_head(p)
        acc = tl.dot(x, p - head, acc, input_precision="tf32")
        acc = tl.dot(x, head, acc, input_precision="tf32")
    else:
        acc = tl.dot(x, p, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_adapter_left(p, x, acc, PRECISION: tl.constexpr):
    """acc + p x, with the adapter's operand on the left."""
    if PRECISION == "tf32x2":
        head = tf32_head(p)
        acc = tl.dot(p - head, x, acc, input_precision="tf32")
        acc = tl.dot(head, x, acc, input_precision="tf32")
    else:
        acc = tl.dot(p, x, acc, input_precision=PRECISION)
    return acc
