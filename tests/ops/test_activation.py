"""activation and gated_activation: bad operands, the bits of the modules, gradients against
float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

from peftfast.memory import saved_bytes
from peftfast.native import library
from peftfast.ops import ImplUnavailable, activation, dropout, gated_activation
from peftfast.ops.dropout import dropout_reasons
from peftfast.reference import activation as reference
from tests.tolerance import assert_within

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(CUDA or library.missing("cpu") is not None, reason="no library"),
)
IMPLS = ["reference", "triton"]
LOW = torch.bfloat16 if CUDA else torch.float16
DTYPES = [torch.float32, LOW]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make new_empty give NaN."""
    new_empty = Tensor.new_empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        tensor = new_empty(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    yield


BAD = [
    ({"gate": [1.0]}, TypeError, "gate is list"),
    ({"gate": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "gate is torch.int64"),
    ({"up": torch.ones(3, 7)}, ValueError, r"up is torch.float32 \[3, 7\] on"),
    ({"up": torch.ones(3, 8).half()}, ValueError, "up is torch.float16"),
    ({"up": torch.ones(3, 8, device="meta")}, ValueError, r"up is torch.float32 \[3, 8\] on meta"),
    ({"kind": "swiglu"}, ValueError, "kind is 'swiglu'; allowed: 'relu', 'gelu'"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p is str"),
    ({"seed": torch.tensor([1.0])}, TypeError, "seed is torch.float32"),
    ({"seed": 3}, TypeError, "seed is int"),
    ({"seed": torch.tensor([1, 2])}, ValueError, r"seed is \[2\]"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_operand_is_named(change: dict[str, Any], error: type, message: str) -> None:
    good: dict[str, Any] = {"gate": torch.randn(3, 8), "up": torch.randn(3, 8), "kind": "silu"}
    gated_activation(**good)
    with pytest.raises(error, match=message):
        gated_activation(**(good | change))


def test_an_implementation_that_can_not_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["peftfast.ops.activation"]  # the package has the function of that name
    x = torch.randn(2, 8, device=DEVICE)
    with pytest.raises(ImplUnavailable, match="activation has no native implementation"):
        activation(x, "silu", impl="native")
    with pytest.raises(ImplUnavailable, match="dtype torch.float64"):
        gated_activation(x.double(), x.double(), "silu", impl="triton")
    device = torch.device(DEVICE)
    assert module.activation_reasons("native", device, torch.float32) == [
        "activations have no native implementation"
    ]
    for reasons in (module.activation_reasons, module.gated_activation_reasons, dropout_reasons):
        assert reasons("triton", device, torch.float32) == []
        assert reasons("auto", device, torch.float64) == []
        assert "torch.float64" in reasons("triton", device, torch.float64)[0]
    monkeypatch.setattr(library, "missing", lambda kind: "the library was not built")
    why = "csrc has no elementwise" if CUDA else "the library was not built"
    with pytest.raises(ImplUnavailable, match=why):
        gated_activation(x, x, "silu", impl="native")
    assert why in module.gated_activation_reasons("native", device, torch.float32)[0]
    with pytest.raises(ValueError, match="kind is 'swish'"):
        activation(x, "swish")
    with pytest.raises(TypeError, match="x is int"):
        activation(1, "silu")  # type: ignore[arg-type]


@pytest.mark.skipif(CUDA, reason="bits are those of a CPU")
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_bits_of_the_modules(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    act = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(kind, kind)]
    gate, up = (torch.randn(4, 3, 50) * 3).to(dtype).chunk(2, dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                assert torch.equal(activation(gate, kind), act(gate))
                assert torch.equal(gated_activation(gate, up, kind), act(gate) * up)


class Case:
    """Operands exact in `dtype`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
        self.dtype, self.p = dtype, p
        self.seed = torch.tensor([11], device=DEVICE) if p else None
        self.gate, self.up, self.dy = (
            (torch.randn(shape, device=DEVICE) * scale).to(dtype).double() for scale in (2, 1, 1)
        )

    def run(self, how: str, kind: str, gated: bool, wide: bool = False) -> dict[str, Tensor]:
        """Output and gradients; `how` is an impl, or "formula" for eager PyTorch."""
        dtype = torch.float64 if wide else self.dtype
        gate, up = (v.to(dtype).requires_grad_() for v in (self.gate, self.up))
        leaves = {"gate": gate, "up": up} if gated else {"gate": gate}
        if gated and how == "formula":
            y = reference.gated_activation(gate, up, kind, self.p, self.seed)
        elif gated:
            y = gated_activation(gate, up, kind, dropout_p=self.p, seed=self.seed, impl=how)
        else:
            formula = how == "formula"
            y = reference.activation(gate, kind) if formula else activation(gate, kind, impl=how)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype))
        return {"y": y, **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}


def check(
    impl: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype, p: float, gated: bool
) -> None:
    """Hold an implementation to the tolerance, on several draws where a case is small."""
    draws = min(16, -(-400 // max(1, math.prod(shape))))
    cases = [Case(shape, dtype, p) for _ in range(draws)]
    runs = [
        [case.run(how, kind, gated, wide) for case in cases]
        for how, wide in ((impl, False), ("formula", False), ("formula", True))
    ]
    for name in runs[0][0]:
        values = [torch.stack([one[name] for one in run]) for run in runs]
        assert values[0].dtype == values[1].dtype, name
        assert_within(*values, what=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_kinds_within_tolerance(impl: str, kind: str, dtype: torch.dtype, gated: bool) -> None:
    check(impl, (5, 170), kind, dtype, 0.0, gated)


@pytest.mark.parametrize("impl", [*IMPLS, NATIVE])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 129), (400,), (70, 9)])
def test_dropped_products_within_tolerance(
    impl: str, dtype: torch.dtype, p: float, shape: tuple[int, ...]
) -> None:
    check(impl, shape, "silu", dtype, p, True)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=15)
@given(
    rows=st.integers(0, 90),
    columns=st.integers(1, 300),
    kind=st.sampled_from(reference.KINDS),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.3]),
)
def test_drawn_sizes(impl, rows, columns, kind, dtype, p) -> None:
    check(impl, (rows, columns), kind, dtype, p, True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_far_values_and_those_that_are_not_finite(impl: str, kind: str) -> None:
    x = torch.tensor([-200.0, -30.0, -0.0, 0.0, 1e-30, 30.0, 200.0, torch.nan], device=DEVICE)
    x.requires_grad_()
    y = activation(x, kind, impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    expected = reference.activation(wide, kind)
    (true_dx,) = torch.autograd.grad(expected.sum(), wide)
    for ours, truth in ((y, expected), (dx, true_dx)):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("impl", [*IMPLS, NATIVE])
def test_every_implementation_drops_the_same_elements(impl: str) -> None:
    gate, up = torch.randn(2, 9, 77, device=DEVICE).unbind()
    seed = torch.tensor([5], device=DEVICE)
    dropped = gated_activation(gate, up, "silu", dropout_p=0.4, seed=seed, impl=impl)
    ones = dropout(torch.ones_like(gate), 0.4, seed=seed, impl="reference")
    assert torch.equal(dropped == 0, ones == 0)


def test_the_seed_comes_from_torchs_generator() -> None:
    gate, up = torch.randn(2, 9, 77, device=DEVICE).unbind()
    runs = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        runs.append(gated_activation(gate, up, "silu", dropout_p=0.4))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_chain_keeps_what_the_first_was_given() -> None:
    gate, up = torch.randn(2, 9, 64, device=DEVICE).unbind()
    gate.requires_grad_()
    weight = torch.randn(64, device=DEVICE)

    def chain() -> Tensor:
        h = gated_activation(gate, up, "silu", dropout_p=0.2)
        return gated_activation(activation(dropout(h, 0.1), "gelu"), up * weight, "relu")

    assert saved_bytes(chain) == gate.nbytes * 3 + 2 * 8  # gate, up, up * weight, two seeds
