"""Dropout on a CPU, for each instruction set, bit for bit against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftfast.native import dropout, library
from peftfast.reference import dropout as reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

drawn = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(-(1 << 63), (1 << 63) - 1).map(torch.tensor)
rows = st.integers(0, 6)
cols = st.integers(0, 400)
probabilities = st.one_of(
    st.sampled_from((0.0, 2**-16, 0.1, 0.5, 1 - 2**-16, 1.0)), st.floats(0, 1)
)


@drawn
@given(seeds, rows, cols, probabilities)
def test_mask_is_the_references(isa: str, seed: Tensor, rows: int, cols: int, p: float) -> None:
    found = dropout.keep_mask(seed, rows, cols, p)
    assert torch.equal(found, reference.keep_mask(seed, rows, cols, p))
    assert found.view(torch.uint8).le(1).all()


@drawn
@given(seeds, rows, cols, probabilities, st.sampled_from(DTYPES), st.integers(0, 3))
def test_masked_copy_is_the_references(
    isa: str, seed: Tensor, rows: int, cols: int, p: float, dtype: torch.dtype, gap: int
) -> None:
    x = torch.randn(rows, cols + gap).to(dtype)[:, :cols]
    kept = reference.keep_mask(seed, rows, cols, p)
    before = x.clone()
    found = dropout.drop(x, seed, p)
    assert torch.equal(found, torch.where(kept, x, torch.zeros((), dtype=dtype)))
    assert found.is_contiguous() and torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_numbers_are_zero_whatever_they_were(isa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([torch.nan, torch.inf, -1.0, -0.0]).repeat(3, 50).to(dtype)
    seed = torch.tensor(11)
    kept = reference.keep_mask(seed, 3, 200, 0.5)
    found = dropout.drop(x, seed, 0.5)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert (found.view(bits)[~kept] == 0).all()
    assert torch.equal(found.view(bits)[kept], x.view(bits)[kept])


def test_a_transposed_operand(isa: str) -> None:
    x = torch.randn(40, 30).t()
    seed = torch.tensor([5])
    assert torch.equal(dropout.drop(x, seed, 0.3), reference.drop(x, seed[0], 0.3))


def test_one_of_several_seeds() -> None:
    seeds = torch.tensor([5, 6, 7])
    found = dropout.keep_mask(seeds[1], 4, 100, 0.5)
    assert torch.equal(found, reference.keep_mask(torch.tensor(6), 4, 100, 0.5))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_in_place_with_strides_and_nothing_outside(isa: str, p: float) -> None:
    memory = torch.randn(5, 160)
    seed = torch.tensor(3)
    expected = memory.clone()
    expected[:, 7:140] = reference.drop(memory[:, 7:140], seed, p)
    at = memory[:, 7:140].data_ptr()
    limit = reference.threshold(p) - (1 << 15)
    status = library.cpu().pf_cpu_dropout_apply(
        seed.data_ptr(), limit, 5, 133, 4, at, 160, at, 160, 1
    )
    assert status == 0
    assert torch.equal(memory, expected)


def test_threads_give_the_same_bits(isa: str) -> None:
    before = torch.get_num_threads()
    x, seed = torch.randn(300, 1001), torch.tensor(1)
    try:
        torch.set_num_threads(2)
        mask, copy = dropout.keep_mask(seed, 300, 1001, 0.2), dropout.drop(x, seed, 0.2)
    finally:
        torch.set_num_threads(before)
    truth = reference.keep_mask(seed, 300, 1001, 0.2)
    assert torch.equal(mask, truth)
    assert torch.equal(copy, torch.where(truth, x, 0.0))


def test_an_element_size_that_is_not_supported_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="code or size"):
        dropout.drop(torch.zeros(2, 8, dtype=torch.int8), torch.tensor(1), 0.5)
