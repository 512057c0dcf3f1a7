"""Outputs and gradients of lora_linear against float64, in the reference and in Triton.

Every freshly allocated output is poisoned with NaN, so that an element that no kernel writes
shows. The full product of sizes runs with PEFTFAST_EXHAUSTIVE=1; otherwise each pair of rank and
widths runs once, with rows and dropout taking turns.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftfast.native import library
from peftfast.ops import lora_linear, lora_linear_group
from peftfast.reference import lora as reference
from tests.tolerance import assert_within

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NATIVE_MISSING = library.missing("cpu")
IMPLS = [
    "reference",
    "triton",
    pytest.param(
        "native", marks=pytest.mark.skipif(CUDA or NATIVE_MISSING is not None, reason="no library")
    ),
]
RANKS, WIDTHS, ROWS, DROPOUTS = (
    (1, 3, 8, 16, 64, 200),
    (64, 96, 130, 1000 if CUDA else 392),  # the interpreter takes minutes over the widest
    (0, 1, 17, 300),
    (0.0, 0.1),
)
# The interpreter computes bfloat16 wrong; on a GPU it is the dtype that matters most.
LOW = torch.bfloat16 if CUDA else torch.float16
DTYPES = [(torch.float32, torch.float32), (LOW, LOW), (LOW, torch.float32)]


def _sizes() -> list[tuple[int, int, int, int, float]]:
    if os.environ.get("PEFTFAST_EXHAUSTIVE") == "1":
        return list(itertools.product(RANKS, WIDTHS, WIDTHS, ROWS, DROPOUTS))
    # 96 pairs of rank and widths; their rows and dropout walk through all eight combinations.
    turns = list(itertools.product(ROWS, DROPOUTS))
    pairs = itertools.product(RANKS, WIDTHS, WIDTHS)
    return [(*pair, *turns[(i + i // 8) % 8]) for i, pair in enumerate(pairs)]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make torch.empty and new_empty give NaN."""
    new_empty, empty = Tensor.new_empty, torch.empty

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    yield


class Case:
    """Operands of sibling linears, exact in `dtype`, with random up-projections that are not
    zero.
    """

    def __init__(
        self,
        rows: int,
        in_features: int,
        outs: Sequence[int],
        ranks: Sequence[Sequence[int]],
        dropout_p: float,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        bias: bool = True,
    ):
        self.dtype, self.adapter_dtype, self.ranks = dtype, adapter_dtype, ranks
        self.owners = [j for j, own in enumerate(ranks) for _ in own]
        flat = [r for own in ranks for r in own]
        self.scaling = [0.7 + 0.2 * i for i in range(len(flat))]
        self.dropout_p = [dropout_p] * len(flat)
        self.seed = torch.arange(10, 10 + len(flat), device=DEVICE) if dropout_p else None

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=DEVICE) * scale).to(dtype).double()

        def matrix(rows: int, cols: int) -> Tensor:
            return draw(rows, cols, scale=cols**-0.5)

        self.x = draw(rows, in_features)
        self.weights = [matrix(n, in_features) for n in outs]
        self.biases = [draw(n) if bias else None for n in outs]
        self.lora_a = [matrix(r, in_features) for r in flat]
        self.lora_b = [matrix(outs[j], r) for j, r in zip(self.owners, flat, strict=True)]
        self.dys = [draw(rows, n) for n in outs]

    def run(self, how: str, wide: bool = False) -> dict[str, Tensor]:
        """Outputs and gradients; `how` is an impl, or "formula" for eager PyTorch."""
        dtype = torch.float64 if wide else self.dtype
        adapter_dtype = torch.float64 if wide else self.adapter_dtype

        def leaf(tensor: Tensor, kind: torch.dtype) -> Tensor:
            return tensor.to(kind).requires_grad_()

        x = leaf(self.x, dtype)
        weights = [leaf(w, dtype) for w in self.weights]
        biases = [None if b is None else leaf(b, dtype) for b in self.biases]
        lora_a = [leaf(a, adapter_dtype) for a in self.lora_a]
        lora_b = [leaf(b, adapter_dtype) for b in self.lora_b]
        if how == "formula":
            ys = reference.lora_linear(
                x,
                weights,
                biases,
                lora_a,
                lora_b,
                self.owners,
                self.scaling,
                self.dropout_p,
                self.seed,
            )
        else:
            ys = lora_linear_group(
                x,
                weights,
                biases,
                self._nested(lora_a),
                self._nested(lora_b),
                self._nested(self.scaling),
                dropout_p=self._nested(self.dropout_p),
                seed=self.seed,
                impl=how,
            )
        leaves = {"x": x}
        for name, values in (("w", weights), ("bias", biases), ("a", lora_a), ("b", lora_b)):
            leaves |= {f"{name}{i}": v for i, v in enumerate(values) if v is not None}
        dys = [dy.to(dtype) for dy in self.dys]
        grads = torch.autograd.grad(ys, list(leaves.values()), dys)
        results = {f"y{j}": y for j, y in enumerate(ys)}
        return results | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}

    def _nested(self, values: Sequence) -> list[list]:
        flat = iter(values)
        return [[next(flat) for _ in own] for own in self.ranks]


def check(
    impl: str,
    rows: int,
    in_features: int,
    outs: Sequence[int],
    ranks: Sequence[Sequence[int]],
    *args: Any,
) -> None:
    """Hold an implementation to the tolerance on one case, or on several draws of a small one.

    With few rows, ranks or columns a gradient hangs on one or two rounded sums, whose error is a
    matter of luck in either implementation; over several draws it isn't.
    """
    narrowest = rows * min(in_features, *outs, *(r for own in ranks for r in own))
    draws = 1 if rows == 0 else min(16, -(-64 // narrowest))
    cases = [Case(rows, in_features, outs, ranks, *args) for _ in range(draws)]
    truth = [case.run("formula", wide=True) for case in cases]
    eager = [case.run("formula") for case in cases]
    ours = [case.run(impl) for case in cases]
    for name in ours[0]:
        values = [torch.stack([run[name] for run in runs]) for runs in (ours, eager, truth)]
        assert values[0].dtype == values[1].dtype, name
        assert_within(*values, what=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rank", "k", "n", "rows", "dropout_p"), _sizes())
def test_sizes(impl: str, rank: int, k: int, n: int, rows: int, dropout_p: float) -> None:
    dtypes = DTYPES[(rank + k + n) % len(DTYPES)]
    check(impl, rows, k, [n], [[rank]], dropout_p, *dtypes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 1.0])
def test_dtypes(impl: str, dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float) -> None:
    check(impl, 70, 96, [130], [[5]], dropout_p, *dtypes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", ["fused", "library"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_groups_of_siblings_with_several_adapters(
    impl: str, plan: str, dropout_p: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTFAST_LORA_GEMM", plan)
    ranks = [[8, 3], [], [16], [1, 200]]
    check(impl, 37, 72, [64, 24, 40, 33], ranks, dropout_p, LOW, torch.float32, bias)


@pytest.mark.parametrize("impl", IMPLS)
def test_more_adapters_than_one_launch_holds(impl: str) -> None:
    check(impl, 33, 40, [24, 32], [[2] * 9, [130, 4]], 0.1, torch.float32, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=25 if CUDA else 12)
@given(
    rows=st.integers(0, 70),
    k=st.integers(1, 150),
    outs=st.lists(st.integers(1, 140), min_size=1, max_size=3),
    rank=st.integers(1, 40),
    dropout_p=st.sampled_from([0.0, 0.01, 0.1, 0.9]),
    dtypes=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_drawn_sizes(impl, rows, k, outs, rank, dropout_p, dtypes, bias) -> None:
    check(impl, rows, k, outs, [[rank]] * len(outs), dropout_p, *dtypes, bias)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "layout", ["transposed", "strided", "expanded", "three dimensions", "one dimension"]
)
def test_layouts_of_x_and_weight(impl: str, layout: str) -> None:
    k, n, r = 48, 40, 4
    make = {
        "transposed": lambda: torch.randn(k, 20, device=DEVICE).t(),
        "strided": lambda: torch.randn(20, 2 * k, device=DEVICE)[:, ::2],
        "expanded": lambda: torch.randn(1, k, device=DEVICE).expand(20, k),
        "three dimensions": lambda: torch.randn(4, 5, k, device=DEVICE).transpose(0, 1),
        "one dimension": lambda: torch.randn(k, device=DEVICE),
    }
    x = make[layout]()
    weight = torch.randn(k, n, device=DEVICE).t()  # as transformers' Conv1D stores it
    a, b = torch.randn(r, k, device=DEVICE), torch.randn(n, r, device=DEVICE)
    results = []
    for how in (impl, "formula"):
        leaves = [v.detach().requires_grad_() for v in (x, weight, a, b)]
        seed = torch.tensor([3], device=DEVICE)
        if how == "formula":
            operands = ([leaves[1]], [None], [leaves[2]], [leaves[3]], [0], [2.0], [0.2], seed)
            (y,) = reference.lora_linear(leaves[0], *operands)
        else:
            y = lora_linear(
                leaves[0], leaves[1], None, *leaves[2:], 2.0, dropout_p=0.2, seed=seed, impl=how
            )
        dy = torch.ones((), device=DEVICE).expand(y.shape)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["fused", "library"])
def test_addresses_beyond_31_bits(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # 4 GiB need no poison
    monkeypatch.setenv("PEFTFAST_LORA_GEMM", plan)
    k = 16
    storage = torch.empty((1 << 31) + k, dtype=torch.float16, device=DEVICE)
    x = storage.as_strided((2, k), (1 << 31, 1))
    x.copy_(torch.randn(2, k))
    w, a, b = (torch.randn(s, device=DEVICE).half() for s in ((24, k), (4, k), (24, 4)))
    results = []
    for inputs in (x, x.contiguous()):
        leaves = [inputs.detach().requires_grad_(), a.requires_grad_(), b.requires_grad_()]
        y = lora_linear(leaves[0], w, None, *leaves[1:], 1.0, impl="triton")
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for far, close in zip(*results, strict=True):
        torch.testing.assert_close(far, close)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_call_gives_the_same_bits(impl: str) -> None:
    case = Case(300, 64, [48], [[16]], 0.1, LOW, torch.float32)
    first, second = case.run(impl), case.run(impl)
    assert all(torch.equal(first[name], second[name]) for name in first)
