"""4-bit weights on a CPU, for each instruction set: bits against bitsandbytes, products against
float64.
"""

from __future__ import annotations

import bitsandbytes.functional as F
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftfast.native import library, nf4
from peftfast.reference import nf4 as reference
from tests.native import bnb
from tests.tolerance import assert_within

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NESTED_CODE = reference.nested_code(torch.device("cpu"))

# Hypothesis calls a test many times under one `isa`, which no example changes.
drawn = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from(DTYPES)
block_sizes = st.sampled_from(reference.BLOCK_SIZES)
quant_types = st.sampled_from(("nf4", "fp4"))
shapes = st.tuples(st.integers(1, 9), st.integers(1, 700))


def draw_weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers of very different sizes a row, with zeros among them and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    w *= 10 ** torch.empty(shape[0], 1).uniform_(-3, 2, generator=generator)
    w.view(-1)[:: 1 + seed % 17] *= 0
    w[seed % (2 * shape[0]) :][:1] = 0
    return w.to(dtype)


def dequantized(quantized: bnb.Quantized, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    out = torch.full(quantized.shape, float("nan"), dtype=out_dtype)
    nf4.dequantize(
        quantized.packed,
        *quantized.statistics,
        quantized.block_size,
        quantized.quant_type,
        dtype,
        out,
    )
    return out


@drawn
@given(shapes, dtypes, block_sizes, quant_types, st.booleans(), st.booleans(), st.integers(0, 99))
def test_dequantized_bits_are_bitsandbytes(
    isa: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
    nested: bool,
    wide: bool,
    seed: int,
) -> None:
    quantized = bnb.quantize(
        draw_weight(shape, torch.float32, seed), block_size, quant_type, nested
    )
    out_dtype = torch.float32 if wide else dtype
    found = dequantized(quantized, dtype, out_dtype)
    assert torch.equal(found, quantized.dequantized(dtype).to(out_dtype))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_weight_of_many_blocks_on_threads(isa: str, threads: int) -> None:
    quantized = bnb.quantize(torch.randn(129, 1024), 64, "nf4", True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = dequantized(quantized, torch.bfloat16, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, quantized.dequantized(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_values_at_the_ends_of_a_dtype(isa: str, dtype: torch.dtype, wide: bool) -> None:
    """Overflow, subnormals, infinity and NaN are rounded as torch rounds them."""
    absmax = torch.tensor([7e4, 65519.0, 65520.0, 3.4e38, 1e-4, 6e-8, 2e-8, 1e-40, torch.inf])
    absmax = torch.cat([absmax, torch.tensor([torch.nan])])
    packed = torch.randint(256, (absmax.numel() * 16,), dtype=torch.uint8)
    out_dtype = torch.float32 if wide else dtype
    found = torch.zeros(packed.numel() * 2, dtype=out_dtype)
    nf4.dequantize(packed, absmax, None, None, None, 32, "nf4", dtype, found)
    indices = torch.stack([packed >> 4, packed & 15], 1).view(-1, 32).int()
    exact = torch.tensor(reference.TABLES["nf4"])[indices] * absmax[:, None]
    torch.testing.assert_close(
        found, exact.to(dtype).to(out_dtype).view(-1), rtol=0, atol=0, equal_nan=True
    )


def test_nothing_is_written_outside(isa: str) -> None:
    for n in (1, 33, 95, 4097):
        quantized = bnb.quantize(torch.randn(1, n), 32, "nf4", False)
        for dtype in DTYPES:
            memory = torch.full((n + 128,), 7.0, dtype=dtype)
            nf4.dequantize(
                quantized.packed, *quantized.statistics, 32, "nf4", dtype, memory[64 : 64 + n]
            )
            assert (memory[:64] == 7).all() and (memory[64 + n :] == 7).all()


@drawn
@given(shapes, dtypes, block_sizes, quant_types, st.integers(0, 99))
def test_quantized_bits_are_bitsandbytes(
    isa: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
    seed: int,
) -> None:
    w = draw_weight(shape, dtype, seed)
    truth = bnb.quantize(w, block_size, quant_type, nested=False)
    packed, absmax = nf4.quantize_blocks(w, block_size, quant_type)
    assert torch.equal(packed, truth.packed)
    assert torch.equal(absmax, truth.scales)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_numbers_at_midpoints_are_quantized_as_bitsandbytes_does(isa: str, quant_type: str) -> None:
    values = torch.tensor(sorted(reference.TABLES[quant_type]))
    middles = (values[1:] + values[:-1]) / 2
    above, below = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = torch.cat([middles, middles.nextafter(above), middles.nextafter(below), values])
    w = torch.cat([near, torch.zeros(64 - near.numel() % 64)])
    truth = bnb.quantize(w.view(1, -1), 64, quant_type, nested=False)
    assert torch.equal(nf4.quantize_blocks(w, 64, quant_type)[0], truth.packed)


@pytest.mark.parametrize("count", [64, 61], ids=["full block", "incomplete block"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_numbers_near_scaled_midpoints(isa: str, quant_type: str, count: int) -> None:
    """Where the last bit of the quotient decides: full blocks multiply by the inverse, an
    incomplete one divides.
    """
    values = torch.tensor(sorted(reference.TABLES[quant_type]))
    middles = (values[1:] + values[:-1]) / 2
    for size in torch.rand(100) + 0.5:
        near = middles * size
        up, down = near.nextafter(torch.tensor(1.0)), near.nextafter(torch.tensor(-1.0))
        w = torch.cat([size[None], near, up, down, size.expand(count)])[:count]
        truth = bnb.quantize(w.view(1, -1), 64, quant_type, nested=False)
        packed, absmax = nf4.quantize_blocks(w, 64, quant_type)
        assert torch.equal(packed, truth.packed)
        assert torch.equal(absmax, truth.scales)


@drawn
@given(st.integers(1, 1500), st.floats(-6, 3), st.booleans(), st.integers(0, 99))
def test_statistics_are_quantized_as_bitsandbytes_does(
    count: int, size: float, with_zeros: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 10**size
    if with_zeros:
        values[:256] = 0
    codes, absmax = nf4.quantize_absmax(values, NESTED_CODE)
    truth, state = F.quantize_blockwise(values, code=NESTED_CODE, blocksize=256)
    assert torch.equal(codes, truth)
    assert torch.equal(absmax, state.absmax)


def test_statistics_between_the_points_of_bitsandbytes_grid() -> None:
    """On both sides of the middle between each two of the 65,536 points: the last bit counts."""
    middles = (torch.arange(1, 65536, dtype=torch.float64) - 0.5) / 65535 * 2 - 1
    points = torch.cat([middles + k * 2.0**-25 for k in (-2, -1, 0, 1, 2)]).float()
    blocks = points[: points.numel() // 255 * 255].view(-1, 255)
    values = torch.nn.functional.pad(blocks, (0, 1), value=1.0).reshape(-1)
    codes, _ = nf4.quantize_absmax(values, NESTED_CODE)
    truth, _ = F.quantize_blockwise(values, code=NESTED_CODE, blocksize=256)
    assert torch.equal(codes, truth)


def product(x: Tensor, quantized: bnb.Quantized, bias: Tensor | None) -> Tensor:
    out = torch.full((x.shape[0], quantized.shape[0]), float("nan"), dtype=x.dtype)
    nf4.gemv(
        x,
        quantized.packed,
        *quantized.statistics,
        quantized.block_size,
        quantized.quant_type,
        bias,
        out,
    )
    return out


@drawn
@given(
    st.integers(1, 9),
    st.tuples(st.integers(1, 20), st.integers(1, 400)),
    dtypes,
    block_sizes,
    quant_types,
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_products_with_few_rows(
    isa: str,
    rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
    nested: bool,
    with_bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    quantized = bnb.quantize(torch.randn(shape), block_size, quant_type, nested)
    x = torch.randn(rows, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if with_bias else None
    w = quantized.dequantized(dtype)
    eager = torch.nn.functional.linear(x, w, bias)
    truth = x.double() @ w.double().t() + (0 if bias is None else bias.double())
    assert_within(product(x, quantized, bias), eager, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(64, 1024), (33, 2048), (70, 1000), (64, 1001)])
def test_products_on_threads_and_in_batches_are_the_same_bits(
    isa: str, dtype: torch.dtype, n: int, k: int
) -> None:
    """k of 1000 and 1001: blocks straddle rows, rows begin inside bytes. 70 rows of x are more
    than are converted at a time.
    """
    quantized = bnb.quantize(torch.randn(n, k), 64, "nf4", True)
    x = torch.randn(70, k).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = product(x, quantized, None)
        torch.set_num_threads(2)
        shared = product(x, quantized, None)
        single = torch.cat([product(row[None], quantized, None) for row in x[:9]])
        pairs = product(x[64:67], quantized, None)
    finally:
        torch.set_num_threads(before)
    assert torch.isfinite(alone).all()
    assert torch.equal(alone, shared)
    assert torch.equal(alone[:9], single)
    assert torch.equal(alone[64:67], pairs)
    w = quantized.dequantized(dtype)
    assert_within(alone, x @ w.t(), x.double() @ w.double().t())


def test_a_product_without_input_features_is_the_bias(isa: str) -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    bias, out = torch.randn(5), torch.full((2, 5), float("nan"))
    x, absmax = torch.empty(2, 0), torch.empty(0)
    nf4.gemv(x, empty, absmax, None, None, None, 64, "nf4", bias, out)
    assert torch.equal(out, bias.expand(2, 5))


def test_an_argument_that_the_library_does_not_take_is_an_error() -> None:
    quantized = bnb.quantize(torch.randn(2, 64), 64, "nf4", False)
    out = torch.empty(2, 64)
    with pytest.raises(RuntimeError, match="code or size"):
        nf4.dequantize(
            quantized.packed, quantized.scales, None, None, None, 48, "nf4", torch.float32, out
        )
    with pytest.raises(RuntimeError, match="code or size"):
        half_nested = (quantized.scales, quantized.scales, None, None)
        nf4.dequantize(quantized.packed, *half_nested, 64, "nf4", torch.float32, out)


def test_few_rows_follows_the_instruction_set(isa: str) -> None:
    """Vectors make products cheap in comparison; large weights gain by them, other devices not."""
    cpu = torch.device("cpu")
    limit = nf4.few_rows(cpu, torch.bfloat16, 4096, 4096)
    assert limit >= 4
    assert nf4.few_rows(cpu, torch.float64, 4096, 4096) == 0
    library.use_isa("portable")
    assert nf4.few_rows(cpu, torch.bfloat16, 4096, 4096) <= limit
