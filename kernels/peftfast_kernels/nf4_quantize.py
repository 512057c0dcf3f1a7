"""Dense weights to 4 bits, and their scales to 8, bit-equal with bitsandbytes 0.50.

    absmax[b] = max |w| over a block        q = nearest table entry of w / absmax
    code = nearest of 256 values of (absmax - offset) / its own block's largest magnitude

Each pass reads its input once and writes codes and scales once: the floor.

bitsandbytes rounds differently on a GPU and on a CPU, so there are two sets of rules. On a GPU
every block multiplies by 1 / absmax, a subnormal number counts as 0 (its kernels are compiled with
--use_fast_math), FP4 compares magnitudes with thresholds of seven digits, and scales are found by
bisection. On a CPU a last, incomplete block divides by absmax, all thresholds are midpoints, and
scales are looked up on a grid of 65,536 points.
"""

# The kernels grow tuples in unrolled loops, which mypy takes for a change of type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles
from peftfast_kernels.launch import launch
from peftfast_kernels.nf4_values import NESTED_BLOCK

# Between the sorted values of the tables; NF4's are bitsandbytes' on both.
_NF4_BOUNDS = (
    -0.8480963706970215, -0.6106328964233398, -0.4599952697753906, -0.33967941999435425,
    -0.23460739850997925, -0.13791173696517944, -0.045525018125772476, 0.03979014977812767,
    0.120255246758461, 0.2035212516784668, 0.2920137643814087, 0.3893125355243683,
    0.5016634464263916, 0.6427869200706482, 0.8614784479141235,
)  # fmt: skip
_FP4_MIDPOINTS = (
    0.0026041667442768812, 0.0859375, 0.2083333432674408, 0.2916666865348816,
    0.4166666865348816, 0.5833333730697632, 0.8333333730697632,
)  # fmt: skip
_FP4_CPU_BOUNDS = (*(-v for v in reversed(_FP4_MIDPOINTS)), 0.0, *_FP4_MIDPOINTS)
_FP4_GPU_BOUNDS = (
    0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333,
)  # fmt: skip


@triton.jit
def _reciprocal(v, FAST_MATH: tl.constexpr):
    if FAST_MATH:
        v = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        v = 1.0 / v
    return v


@triton.jit
def _product(v, w, FAST_MATH: tl.constexpr):
    if FAST_MATH:
        v = tl.inline_asm_elementwise(
            "mul.ftz.f32 $0, $1, $2;", "=f,f,f", [v, w], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        v = v * w
    return v


@triton.jit
def _largest(v, FAST_MATH: tl.constexpr):
    """The largest magnitude of each row of v [rows, columns]."""
    largest = tl.max(tl.abs(v), axis=1)
    if FAST_MATH:
        largest = tl.inline_asm_elementwise(
            "max.ftz.f32 $0, $1, 0fFF7FFFFF;",
            "=f,f",
            [largest],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return largest


@triton.jit
def _rank(v, bounds):
    """How many of the ascending bounds, 7 or 15 of them, are below v; none for a NaN."""
    rank = tl.zeros(v.shape, dtype=tl.int32)
    between = bounds
    for _ in tl.static_range(4 if len(bounds) == 15 else 3):
        above = v > between[len(between) // 2]
        rank = rank * 2 + above.to(tl.int32)
        halved = ()
        for i in tl.static_range(len(between) // 2):
            upper = between[len(between) // 2 + 1 + i]
            halved = halved + (tl.where(above, upper, between[i]),)
        between = halved
    return rank


@triton.jit
def _fp4_code(magnitude, negative):
    """The code of the table's entry of that rank by magnitude, 0 to 7, and sign."""
    code = (0x32547610 >> (magnitude * 4)) & 7
    return tl.where(negative, code + 8, code)


@triton.jit(do_not_specialize=["n"])
def _nf4_quantize_kernel(
    w_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    bounds,
    NF4: tl.constexpr,
    GPU_RULES: tl.constexpr,
    FAST_MATH: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program has BLOCK_M blocks of BLOCK_N elements; elements after the last count as 0.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    left = tl.minimum(n - first * BLOCK_N, BLOCK_M * BLOCK_N).to(tl.int32)
    block = tl.arange(0, BLOCK_M)
    element = block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    byte = block[:, None] * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
    if EVEN_N:
        has_element = (block * BLOCK_N < left)[:, None]
        has_byte = has_element
    else:
        has_element = element < left
        has_byte = byte * 2 < left
    w = tl.load(w_ptr + first * BLOCK_N + element, mask=has_element, other=0.0).to(tl.float32)
    absmax = _largest(w, FAST_MATH)
    if GPU_RULES:
        inverse = _reciprocal(absmax, FAST_MATH)
        scaled = _product(w, tl.broadcast_to(inverse[:, None], BLOCK_M, BLOCK_N), FAST_MATH)
    else:
        least = tl.maximum(absmax, tl.full((BLOCK_M,), 1e-38, tl.float32))
        whole = (block + 1) * BLOCK_N <= left
        absmax = tl.where(whole, absmax, least)
        scaled = tl.where(whole[:, None], w * (1.0 / least)[:, None], w / least[:, None])
        scaled = tl.minimum(tl.maximum(scaled, -1.0), 1.0)
    compared = scaled
    if GPU_RULES and not NF4:
        compared = tl.abs(scaled)
    code = _rank(compared, bounds)
    if not NF4:
        if GPU_RULES:
            code = _fp4_code(code, scaled < 0.0)
        else:
            # bitsandbytes' sorted order has the two zeros the other way round: 0, then 8.
            negative = (code < 7) | (code == 8)
            code = _fp4_code(tl.where(code < 8, 7 - code, code - 8), negative)
    high, low = tl.split(tl.reshape(code, BLOCK_M, BLOCK_N // 2, 2))
    packed = ((high << 4) | low).to(tl.uint8)
    tl.store(packed_ptr + first * (BLOCK_N // 2) + byte, packed, mask=has_byte)
    tl.store(absmax_ptr + first + block, absmax, mask=block * BLOCK_N < left)


@triton.jit(do_not_specialize=["count"])
def _nf4_quantize_absmax_kernel(
    values_ptr,
    nested_code_ptr,
    codes_ptr,
    nested_absmax_ptr,
    count,
    GPU_RULES: tl.constexpr,
    FAST_MATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    place = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = place < count
    values = tl.load(values_ptr + place, mask=inside, other=0.0)  # [1, BLOCK]
    absmax = _largest(values, FAST_MATH)
    divisor = absmax
    if not GPU_RULES:
        divisor = tl.where(absmax == 0.0, 1.0, absmax)
    inverse = _reciprocal(divisor, FAST_MATH)
    v = _product(values, tl.broadcast_to(inverse[:, None], 1, BLOCK), FAST_MATH)
    if GPU_RULES:
        pivot = tl.full((1, BLOCK), 127, dtype=tl.int32)
        low = tl.zeros((1, BLOCK), dtype=tl.int32)
        high = tl.full((1, BLOCK), 255, dtype=tl.int32)
        value = tl.load(nested_code_ptr + pivot)
        for i in tl.static_range(7):
            above = v > value
            low = tl.where(above, pivot, low)
            high = tl.where(above, high, pivot)
            pivot += tl.where(above, 64 >> i, -(64 >> i))
            value = tl.load(nested_code_ptr + pivot)
        up = v > (tl.load(nested_code_ptr + high) + value) * 0.5
        down = v < (tl.load(nested_code_ptr + low) + value) * 0.5
        code = tl.where(v > value, tl.where(up, high, pivot), tl.where(down, low, pivot))
    else:
        # The nearest of 65,536 points, then the nearest code to that. A product and a sum in one
        # rounding: both are exact in float64.
        half = (tl.minimum(tl.maximum(v, -1.0), 1.0) + 1.0) * 0.5
        point = (half.to(tl.float64) * 65535.0 + 0.5).to(tl.float32).to(tl.int32)
        v = tl.div_rn(2.0 * point.to(tl.float32), tl.full((1, BLOCK), 65535.0, tl.float32)) - 1.0
        code = tl.zeros((1, BLOCK), dtype=tl.int32)
        for i in tl.static_range(8):
            middle = code + (128 >> i)
            pair = tl.load(nested_code_ptr + middle - 1) + tl.load(nested_code_ptr + middle)
            code = tl.where(0.5 * pair < v, middle, code)
        code = tl.where(absmax[:, None] == 0.0, 0, code)
    tl.store(codes_ptr + place, code.to(tl.uint8), mask=inside)
    tl.store(nested_absmax_ptr + pid + tl.arange(0, 1), absmax)


def quantize_blocks(
    w: Tensor, block_size: int, quant_type: str, *, gpu_rules: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a contiguous tensor.

    Args:
        w: n elements of float32, float16 or bfloat16.
        block_size: a power of two, 32 to 4096.
        quant_type: "nf4" or "fp4".
        gpu_rules: whether to round as bitsandbytes does on a GPU; None: where w is on one.

    Returns:
        packed: uint8 [(n + 1) // 2]; absmax: float32 [ceil(n / block_size)].
    """
    n = w.numel()
    packed = w.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = w.new_empty(triton.cdiv(n, block_size), dtype=torch.float32)
    if n == 0:
        return packed, absmax
    on_gpu = device.on_gpu(w.device)
    gpu_rules = on_gpu if gpu_rules is None else gpu_rules
    tile = tiles.quantize_tile(block_size)
    nf4 = quant_type == "nf4"
    bounds = _NF4_BOUNDS if nf4 else _FP4_GPU_BOUNDS if gpu_rules else _FP4_CPU_BOUNDS
    with device.current(w):
        launch(
            _nf4_quantize_kernel,
            (triton.cdiv(absmax.numel(), tile.block_m),),
            w,
            packed,
            absmax,
            n,
            bounds,
            mma="none",
            NF4=nf4,
            GPU_RULES=gpu_rules,
            FAST_MATH=on_gpu and gpu_rules,
            EVEN_N=n % block_size == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return packed, absmax


def quantize_absmax(
    values: Tensor, nested_code: Tensor, *, gpu_rules: bool | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit codes of scales, from which the offset is taken off, and the scales of those.

    Args:
        values: float32 [blocks], contiguous.
        nested_code: float32 [256], ascending.
        gpu_rules: as in `quantize_blocks`.

    Returns:
        codes: uint8 [blocks]; nested_absmax: float32 [ceil(blocks / 256)].
    """
    count = values.numel()
    codes = torch.empty_like(values, dtype=torch.uint8)
    nested_absmax = values.new_empty(triton.cdiv(count, NESTED_BLOCK))
    if count == 0:
        return codes, nested_absmax
    on_gpu = device.on_gpu(values.device)
    gpu_rules = on_gpu if gpu_rules is None else gpu_rules
    with device.current(values):
        launch(
            _nf4_quantize_absmax_kernel,
            (nested_absmax.numel(),),
            values,
            nested_code,
            codes,
            nested_absmax,
            count,
            mma="none",
            GPU_RULES=gpu_rules,
            FAST_MATH=on_gpu and gpu_rules,
            BLOCK=NESTED_BLOCK,
            num_warps=4,
            num_stages=1,
        )
    return codes, nested_absmax
