"""Measured bytes against cases counted by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftfast.memory import peak_bytes, saved_bytes
from peftfast.memory.storages import storages

FLOAT = 4


def test_linear_saves_its_input_and_not_its_weight() -> None:
    linear = nn.Linear(16, 8)
    x = torch.randn(5, 16)
    assert saved_bytes(lambda: linear(x), exclude=linear) == 5 * 16 * FLOAT


def test_nothing_excluded_counts_the_weight_too() -> None:
    linear = nn.Linear(16, 8)
    x = torch.randn(5, 16, requires_grad=True)
    assert saved_bytes(lambda: linear(x)) == (5 * 16 + 8 * 16) * FLOAT


def test_frozen_linear_saves_nothing_but_its_excluded_weight() -> None:
    linear = nn.Linear(16, 8).requires_grad_(False)
    x = torch.randn(5, 16, requires_grad=True)
    assert saved_bytes(lambda: linear(x), exclude=linear) == 0


def test_siblings_on_one_input_save_it_once() -> None:
    first, second = nn.Linear(16, 8), nn.Linear(16, 8)
    x = torch.randn(5, 16)
    parameters = [*first.parameters(), *second.parameters()]
    assert saved_bytes(lambda: (first(x), second(x)), exclude=parameters) == 5 * 16 * FLOAT


def test_a_view_keeps_its_whole_storage() -> None:
    linear = nn.Linear(16, 8)
    x = torch.randn(10, 16)
    assert saved_bytes(lambda: linear(x[:1]), exclude=linear) == 10 * 16 * FLOAT


def test_buffers_are_excluded_with_their_module() -> None:
    module = nn.Module()
    module.register_buffer("mask", torch.ones(5, 16))
    x = torch.randn(5, 16, requires_grad=True)
    assert saved_bytes(lambda: x * module.mask, exclude=module) == 0


def test_element_size_counts() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(lambda: x.exp()) == 7 * 3 * 8


def test_without_gradients_nothing_is_kept() -> None:
    linear = nn.Linear(16, 8)
    x = torch.randn(5, 16)
    with torch.no_grad():
        assert saved_bytes(lambda: linear(x)) == 0


def test_backward_frees_before_the_next_forward_saves() -> None:
    x = torch.randn(6, 4, requires_grad=True)

    def two_steps() -> None:
        for _ in range(2):
            x.exp().sum().backward()

    assert saved_bytes(two_steps) == 6 * 4 * FLOAT


def test_what_is_left_at_the_end_of_a_forward() -> None:
    """The graph of what is returned is kept, and what was saved on the way and let go is not."""
    x = torch.ones(100, requires_grad=True)

    def forward() -> Tensor:
        (x * x).sin().cos()  # nobody takes it: x * x and its sine were saved
        return (x * 2).sin()

    assert saved_bytes(forward, [x], at_end=True) == 400
    assert saved_bytes(forward, [x]) == 800
    assert saved_bytes(lambda: forward().sum().backward(), at_end=True) == 0


@pytest.mark.parametrize("reentrant, kept", [(False, 2), (True, 4)])
def test_checkpointed_blocks(reentrant: bool, kept: int) -> None:
    x = torch.randn(6, 4, requires_grad=True)

    def block(value: torch.Tensor) -> torch.Tensor:
        return value.exp().exp()

    def checkpointed(value: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, value, use_reentrant=reentrant)

    assert saved_bytes(lambda: block(block(x))) == 4 * 24 * FLOAT
    # Both blocks' inputs, and in the backward of the reentrant kind two outputs of exp besides.
    assert saved_bytes(lambda: checkpointed(checkpointed(x))) == 2 * 24 * FLOAT
    assert saved_bytes(lambda: checkpointed(checkpointed(x)).sum().backward()) == kept * 24 * FLOAT


def test_what_a_step_computes_is_unchanged_while_measured() -> None:
    linear = nn.Linear(16, 8)
    x = torch.randn(5, 16)
    linear(x).square().sum().backward()
    expected = linear.weight.grad
    linear.zero_grad()
    saved_bytes(lambda: linear(x).square().sum().backward())
    assert torch.equal(linear.weight.grad, expected)
    linear.zero_grad()
    peak_bytes(lambda: linear(x).square().sum().backward(), device="cpu")
    assert torch.equal(linear.weight.grad, expected)


def test_excluding_something_else_than_tensors_is_refused() -> None:
    with pytest.raises(TypeError, match=r"exclude\[1\] is a str"):
        saved_bytes(lambda: None, exclude=[torch.ones(1), "weight"])  # type: ignore[list-item]


def test_sparse_tensors_are_measured_by_their_parts() -> None:
    dense = torch.eye(4)
    sizes = [storage.nbytes() for storage in storages(dense.to_sparse())]
    assert sizes == [2 * 4 * 8, 4 * FLOAT]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        compressed = dense.to_sparse_csr()
    rows, columns, values = [storage.nbytes() for storage in storages(compressed)]
    assert (rows, values) == (5 * 8, 4 * FLOAT)
    assert columns >= 4 * 8  # a view into the indices that it was made from


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is without mkldnn")
def test_an_opaque_layout_is_refused() -> None:
    with pytest.raises(TypeError, match="mkldnn"):
        list(storages(torch.ones(2, 2).to_mkldnn()))


def test_peak_of_a_chain_that_frees_as_it_goes() -> None:
    x = torch.randn(1000)

    def chain() -> None:
        value = x
        for _ in range(5):
            value = value + 1  # the old value lives until the new one is there

    assert peak_bytes(chain, device="cpu") == 2 * 1000 * FLOAT


def test_peak_of_tensors_that_are_kept() -> None:
    x = torch.randn(1000)
    kept = []
    assert peak_bytes(lambda: kept.extend(x + i for i in range(3)), device="cpu") == 3000 * FLOAT


def test_peak_leaves_out_what_was_there_before() -> None:
    x = torch.randn(1000)
    assert peak_bytes(lambda: x.add_(1).view(10, 100).t(), device="cpu") == 0


def test_peak_outlasts_the_python_object_of_a_storage() -> None:
    x = torch.randn(1000, requires_grad=True)

    def forward() -> None:
        value = (x * 2).exp().exp()  # both outputs of exp live in the graph alone
        value.sum()

    # x * 2, freed once its exp is there, and the two outputs of exp, the first kept by the graph.
    assert peak_bytes(forward, device="cpu") == 2 * 1000 * FLOAT + FLOAT


def test_peak_of_forward_and_backward() -> None:
    x = torch.randn(1000, requires_grad=True)

    def step() -> None:
        x.exp().sum().backward()

    # exp's output, the sum and its gradient of one element each, and x's gradient; the expanded
    # gradient of the sum shares its one element.
    assert peak_bytes(step, device="cpu") == 2 * 1000 * FLOAT + 2 * FLOAT


def test_peak_counts_new_tensors_and_resized_ones() -> None:
    assert peak_bytes(lambda: torch.tensor([1.0, 2.0, 3.0]), device="cpu") == 3 * FLOAT
    x = torch.ones(1000)
    out = []

    def into_an_empty_tensor() -> None:
        out.append(torch.empty(0))
        torch.add(x, 1, out=out[0])

    assert peak_bytes(into_an_empty_tensor, device="cpu") == 1000 * FLOAT


def test_peak_refuses_a_device_that_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="not meta"):
        peak_bytes(lambda: None, device="meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_on_a_gpu_is_the_allocator_s() -> None:
    x = torch.randn(1 << 20, device="cuda")

    def chain() -> None:
        value = x
        for _ in range(5):
            value = value + 1

    assert peak_bytes(chain) == 2 * (1 << 20) * FLOAT
    kept: list[torch.Tensor] = []
    assert peak_bytes(lambda: kept.append(x + 1), device="cuda") == (1 << 20) * FLOAT
