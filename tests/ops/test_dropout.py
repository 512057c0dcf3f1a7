"""dropout: bad operands, its bits in each implementation, what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast.memory import saved_bytes
from peftfast.native import library
from peftfast.ops import ImplUnavailable, activation, dropout, recipes
from peftfast.reference.dropout import dropout as formula

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LOW = torch.bfloat16 if CUDA else torch.float16
IMPLS = [
    "reference",
    "triton",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(CUDA or library.missing("cpu") is not None, reason="no library"),
    ),
]


def _seed(value: int = 3) -> Tensor:
    return torch.tensor([value], device=DEVICE)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is list"),
        ({"x": torch.ones(3, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"p": 1.1}, ValueError, "^p is 1.1; a probability"),
        ({"p": float("nan")}, ValueError, "^p is nan"),
        ({"p": "0.1"}, TypeError, "^p is str"),
        ({"seed": torch.tensor([1.0])}, TypeError, "seed is torch.float32"),
        ({"seed": torch.tensor(1)}, ValueError, r"seed is \[\]"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
    ],
)
def test_a_bad_operand_is_named(change: dict[str, Any], error: type, message: str) -> None:
    good: dict[str, Any] = {"x": torch.randn(3, 8), "p": 0.1}
    dropout(**good)
    with pytest.raises(error, match=message):
        dropout(**(good | change))


def test_triton_says_why_it_can_not_serve() -> None:
    with pytest.raises(ImplUnavailable, match="dtype torch.float64"):
        dropout(torch.randn(2, 8, device=DEVICE).double(), 0.1, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 129), (70, 9), (3, 3000)])
def test_bits(impl: str, dtype: torch.dtype, p: float, shape: tuple[int, ...]) -> None:
    x, dy = torch.randn(2, *shape, device=DEVICE).to(dtype).unbind()
    x.requires_grad_()
    y = dropout(x, p, seed=_seed(), impl=impl)
    assert torch.equal(y, formula(x, _seed(), p))
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, formula(dy, _seed(), p))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tensor_that_is_not_contiguous(impl: str) -> None:
    x = torch.randn(24, 10, device=DEVICE).t()
    expected = dropout(x.contiguous(), 0.5, seed=_seed(), impl=impl)
    assert torch.equal(dropout(x, 0.5, seed=_seed(), impl=impl), expected)


def test_no_dropout_is_the_tensor_itself() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    assert dropout(x, 0.0) is x


def test_only_the_seed_is_kept() -> None:
    x = torch.randn(30, 80, device=DEVICE, requires_grad=True)
    assert saved_bytes(lambda: dropout(x, 0.1)) == 8


def test_a_recipe_only_where_nothing_more_is_kept_for_it() -> None:
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    assert recipes.keep(dropout(x, 0.1)).spec == 0
    assert recipes.keep(dropout(activation(x, "relu"), 0.1)).spec != 0
    y = x * 1
    recipes.mark_saved(y)
    assert recipes.keep(dropout(y, 0.1)).spec != 0
    assert recipes.keep(dropout(y, 0.1, recipe=False)).spec == 0


def test_draws_differ_and_follow_the_generator() -> None:
    x = torch.ones(40, 40, device=DEVICE)
    torch.manual_seed(4)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(4)
    assert torch.equal(first, dropout(x, 0.5)) and not torch.equal(first, second)
    assert 0.45 < (first == 0).float().mean() < 0.55 and first.max() == 2
