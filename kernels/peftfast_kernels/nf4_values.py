"""4-bit values inside a kernel: tables, nibbles and block scales.

A byte holds element 2i in its high nibble and element 2i + 1 in its low one; element e of the flat
weight belongs to block e // block_size. Blocks are 32 elements or more, so the eight elements of
four bytes that start at a multiple of four share a block.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (NeurIPS 2023), sections 2 and 3:
the NF4 values, and scales that are quantised themselves ("double quantisation").
"""

from __future__ import annotations

import triton
import triton.language as tl

ELEMENTS = 8  # that a word of four bytes holds
NESTED_BLOCK = 256  # scales that share one scale of their own


@triton.jit
def table(NF4: tl.constexpr):
    """float32 [16]: the value of each code, NF4's or FP4's."""
    code = tl.arange(0, 16)
    if NF4:
        value = tl.where(code == 0, -1.0, 1.0)
        value = tl.where(code == 1, -0.6961928009986877, value)
        value = tl.where(code == 2, -0.5250730514526367, value)
        value = tl.where(code == 3, -0.39491748809814453, value)
        value = tl.where(code == 4, -0.28444138169288635, value)
        value = tl.where(code == 5, -0.18477343022823334, value)
        value = tl.where(code == 6, -0.09105003625154495, value)
        value = tl.where(code == 7, 0.0, value)
        value = tl.where(code == 8, 0.07958029955625534, value)
        value = tl.where(code == 9, 0.16093020141124725, value)
        value = tl.where(code == 10, 0.24611230194568634, value)
        value = tl.where(code == 11, 0.33791524171829224, value)
        value = tl.where(code == 12, 0.44070982933044434, value)
        value = tl.where(code == 13, 0.5626170039176941, value)
        value = tl.where(code == 14, 0.7229568362236023, value)
    else:
        size = code & 7
        value = tl.where(size == 0, 0.0, 0.25)
        value = tl.where(size == 1, 0.0052083334885537624, value)
        value = tl.where(size == 2, 0.6666666865348816, value)
        value = tl.where(size == 3, 1.0, value)
        value = tl.where(size == 4, 0.3333333432674408, value)
        value = tl.where(size == 5, 0.5, value)
        value = tl.where(size == 6, 0.1666666716337204, value)
        value = tl.where(code > 8, -value, value)
    return value


@triton.jit
def words_of(packed):
    """int32 [n] from bytes [n, 4], the first of them lowest: no instruction beyond the load."""
    places = (tl.arange(0, 4) * 8)[None, :]
    return tl.sum(packed.to(tl.uint32) << places, axis=1).to(tl.int32, bitcast=True)


@triton.jit
def codes_of(words):
    """int32 [n, 8]: the codes of eight elements in their order, from int32 words [n]."""
    shifts = ((tl.arange(0, 8) ^ 1) * 4)[None, :]
    return (words[:, None] >> shifts) & 15


@triton.jit
def look_up(values, codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """values[codes] for codes [ROWS, COLUMNS].

    The 16 values lie in shared memory, each in a bank of its own: an element costs a shift, a mask
    and one load without conflicts. A tree of selects is 15 instructions, byte permutations with
    their transposition 6.
    """
    flat = tl.reshape(codes, ROWS * COLUMNS)
    return tl.reshape(tl.gather(values, flat, 0), ROWS, COLUMNS)


@triton.jit
def unnest(codes, nested_code_ptr, nested_absmax, offset, inside):
    """float32 block scales of quantised ones: nested_code[codes] * nested_absmax + offset, rounded
    twice. A product and a sum would be contracted to one FMA; adding 0.0 in the first FMA changes
    no value of the sum and can't be dropped, as it makes 0.0 of -0.0.
    """
    values = tl.load(nested_code_ptr + codes.to(tl.int32), mask=inside, other=0.0)
    return tl.fma(values, nested_absmax, 0.0) + offset


@triton.jit
def round_to(values, VALUE: tl.constexpr, WIDE: tl.constexpr):
    """float32 values rounded to VALUE; float32 again where WIDE."""
    if WIDE and VALUE == tl.bfloat16:
        # Spelled out for the interpreter, which truncates.
        bits = values.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        rounded = tl.where(values == values, even, bits).to(tl.float32, bitcast=True)
    else:
        rounded = values.to(VALUE)
        if WIDE:
            rounded = rounded.to(tl.float32)
    return rounded
