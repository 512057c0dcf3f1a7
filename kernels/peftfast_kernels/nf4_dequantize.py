"""4-bit weights to dense ones, in one launch whatever the scales' form.

    out[e] = round(table[q_e] * absmax[e // block_size])
    absmax[b] = round(round(nested_code[code_b] * nested_absmax[b // 256]) + offset)

Moves n / 2 bytes of codes, the scales (n / block_size bytes, four times that where they are plain)
and out once each: 2.52 bytes an element for 16-bit values in blocks of 64, the floor.

A thread reads four bytes, 128 contiguous ones a warp, and writes their eight values, 16 contiguous
bytes a thread and 512 a warp: no value changes threads. Reading 16 bytes a thread instead sends
the words through shared memory, five barriers and 5% more instructions, for the same sectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles
from peftfast_kernels.lane import triton_dtype
from peftfast_kernels.launch import launch
from peftfast_kernels.nf4_values import (
    ELEMENTS,
    codes_of,
    look_up,
    round_to,
    table,
    unnest,
    words_of,
)


@triton.jit(do_not_specialize=["n", "shift"])
def _nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,
    n,
    shift,
    NF4: tl.constexpr,
    NESTED: tl.constexpr,
    VALUE: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program's words start at a multiple of the longest block, and its blocks share the scale of
    # their scales: everything that leaves 32 bits is a scalar.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(n - start * 8, BLOCK * 8).to(tl.int32)  # elements
    first = start >> shift
    word = tl.arange(0, BLOCK)
    inside = word * 8 < left
    byte = word[:, None] * 4 + tl.arange(0, 4)[None, :]
    element = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    if EVEN_N:
        has_byte = inside[:, None]
        has_element = inside[:, None]
    else:
        has_byte = byte * 2 < left
        has_element = element < left
    packed = tl.load(packed_ptr + start * 4 + byte, mask=has_byte, other=0)
    scales = tl.load(absmax_ptr + first + (word >> shift), mask=inside, other=0)
    if NESTED:
        outer = tl.load(nested_absmax_ptr + (first >> 8))
        scales = unnest(scales, nested_code_ptr, outer, tl.load(offset_ptr), inside)
    values = look_up(table(NF4), codes_of(words_of(packed)), BLOCK, 8)
    values = round_to(values * scales[:, None], VALUE, out_ptr.dtype.element_ty != VALUE)
    tl.store(out_ptr + start * 8 + element, values, mask=has_element)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Fill out with the weight's values, rounded to `dtype`.

    Args:
        packed: uint8 [(n + 1) // 2].
        absmax: float32 [blocks], or uint8 codes beside nested_absmax, float32 [blocks / 256],
            nested_code, float32 [256], and offset, float32, a scalar; these are None otherwise.
        block_size: a power of two, 32 to 4096.
        quant_type: "nf4" or "fp4".
        out: n elements, contiguous, of `dtype` or float32.
    """
    n = out.numel()
    if n == 0:
        return
    tile = tiles.dequantize_tile()
    words = tile.block_m
    with device.current(out):
        launch(
            _nf4_dequantize_kernel,
            (triton.cdiv(n, words * ELEMENTS),),
            packed,
            absmax,
            nested_absmax,
            nested_code,
            offset,
            out,
            n,
            (block_size // ELEMENTS).bit_length() - 1,
            mma="none",
            NF4=quant_type == "nf4",
            NESTED=nested_absmax is not None,
            VALUE=triton_dtype(dtype),
            EVEN_N=n % ELEMENTS == 0,
            BLOCK=words,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
