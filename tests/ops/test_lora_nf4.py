"""lora_linear over 4-bit weights: outputs and gradients against float64, and what is saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from peftfast.native import library
from peftfast.ops import lora_linear, lora_linear_group, nf4
from peftfast.ops.nf4 import NF4Weight
from peftfast.ops.nf4_weight import Weight, flatten
from peftfast.reference.dropout import drop
from tests.tolerance import assert_within

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NATIVE_MISSING = library.missing("cpu")
native = pytest.param(
    "native", marks=pytest.mark.skipif(CUDA or NATIVE_MISSING is not None, reason="no library")
)
IMPLS = ["reference", "triton", native]
LOW = torch.bfloat16 if CUDA else torch.float16
DTYPES = [(torch.float32, torch.float32), (LOW, LOW), (LOW, torch.float32)]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make torch.empty and new_empty give NaN, and the scratch buffer hold it."""
    new_empty, empty = Tensor.new_empty, torch.empty

    def poisoned(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            return tensor.fill_(255)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    nf4.clear_scratch()
    yield


class Case:
    """Siblings of which some have 4-bit weights, with an adapter each or none."""

    def __init__(
        self,
        rows: int,
        columns: int,
        outs: Sequence[int],
        ranks: Sequence[int],
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        compute: torch.dtype | None = None,
        dense: Sequence[int] = (),
        dropout_p: float = 0.0,
        bias: bool = True,
    ) -> None:
        def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=DEVICE).to(kind)

        self.dtype, self.compute, self.dropout_p = dtype, compute or dtype, dropout_p
        self.x = draw(rows, columns)
        ws = [draw(n, columns) * columns**-0.5 for n in outs]
        self.weights: list[Weight] = [
            w if j in dense else nf4.quantize(w).with_compute_dtype(compute)
            for j, w in enumerate(ws)
        ]
        self.biases = [draw(n) if bias else None for n in outs]
        self.lora_a = [
            draw(r, columns, kind=adapter_dtype) * columns**-0.5 if r else None for r in ranks
        ]
        self.lora_b = [
            draw(n, r, kind=adapter_dtype) * r**-0.5 if r else None
            for n, r in zip(outs, ranks, strict=True)
        ]
        self.dys = [draw(rows, n) for n in outs]
        self.seed = torch.arange(sum(r > 0 for r in ranks), device=DEVICE) + 7

    def ours(self, impl: str) -> dict[str, Tensor]:
        x, biases, a, b = self._leaves(None)
        ys = lora_linear_group(
            x,
            self.weights,
            biases,
            [[v] if v is not None else [] for v in a],
            [[v] if v is not None else [] for v in b],
            [0.7] * len(a),
            dropout_p=self.dropout_p,
            seed=self.seed,
            impl=impl,
        )
        return self._results(ys, x, biases, a, b, self.dys)

    def plain(self, wide: bool) -> dict[str, Tensor]:
        """The same in PyTorch alone: at the dtypes given, or in float64 on what the base rounds."""
        x, biases, a, b = self._leaves(torch.float64 if wide else None)
        ys, index = [], 0
        for j, w in enumerate(self.weights):
            compute = self.compute if isinstance(w, NF4Weight) else self.dtype
            values = nf4.dequantize(w, compute, impl="reference") if _is4(w) else w
            product = torch.float64 if wide else compute
            bias = biases[j]
            base_x = _Round.apply(x, compute, product)
            b0 = None if bias is None else _Round.apply(bias, compute, product)
            y = torch.nn.functional.linear(base_x, values.to(product), b0)
            y = _Round.apply(y, product, x.dtype)
            if (up := b[j]) is not None and (down := a[j]) is not None:
                inputs = x
                if self.dropout_p:
                    keep = drop(torch.ones_like(x), self.seed[index], self.dropout_p)
                    inputs = x * keep / (1 - round(self.dropout_p * 65536) / 65536)
                index += 1
                t = torch.nn.functional.linear(inputs.to(down.dtype), down)
                y = y + (torch.nn.functional.linear(t, up) * 0.7).to(y.dtype)
            ys.append(y)
        dys = [dy.to(torch.float64) for dy in self.dys] if wide else self.dys
        return self._results(ys, x, biases, a, b, dys)

    def _leaves(self, dtype: torch.dtype | None) -> Any:
        def leaf(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.detach().to(dtype or v.dtype).requires_grad_()

        lists = [[leaf(v) for v in vs] for vs in (self.biases, self.lora_a, self.lora_b)]
        return (leaf(self.x), *lists)

    @staticmethod
    def _results(ys: Any, x: Tensor, biases: Any, a: Any, b: Any, dys: Any) -> dict[str, Tensor]:
        leaves = {"x": x}
        for name, values in (("bias", biases), ("a", a), ("b", b)):
            leaves |= {f"{name}{j}": v for j, v in enumerate(values) if v is not None}
        grads = torch.autograd.grad(ys, list(leaves.values()), dys)
        results = {f"y{j}": y for j, y in enumerate(ys)}
        return results | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


class _Round(torch.autograd.Function):
    """A value rounded to a dtype and held in another, and the gradient on its way back likewise."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, dtype: torch.dtype, held: torch.dtype) -> Tensor:
        ctx.dtype, ctx.source = dtype, v.dtype
        return v.to(dtype).to(held)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.source), None, None


def _is4(w: Weight) -> bool:
    return isinstance(w, NF4Weight)


def check(impl: str, *args: Any, **options: Any) -> None:
    cases = [Case(*args, **options) for _ in range(4)]
    runs = [[c.ours(impl) for c in cases], [c.plain(False) for c in cases]]
    truths = [c.plain(True) for c in cases]
    for name in truths[0]:
        ours, eager = (torch.stack([r[name] for r in run]) for run in runs)
        assert ours.dtype == eager.dtype, name
        assert_within(ours, eager, torch.stack([r[name] for r in truths]), name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "columns", "outs"), [(40, 128, 96), (33, 130, 65)])
def test_one_linear(
    impl: str, dtypes: Any, dropout_p: float, rows: int, columns: int, outs: int
) -> None:
    check(impl, rows, columns, [outs], [5], *dtypes, dropout_p=dropout_p)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_few_rows(impl: str, rows: int) -> None:
    check(impl, rows, 128, [96, 64], [4, 8], torch.float32, torch.float32)
    check(impl, rows, 128, [96], [4], LOW, torch.float32, bias=False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", ["fused", "library"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dense", [(), (1,), (0, 2)])
def test_siblings(
    impl: str, plan: str, dropout_p: float, dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTFAST_LORA_GEMM", plan)
    options = {"dense": dense, "dropout_p": dropout_p}
    check(impl, 37, 128, [64, 40, 33], [8, 0, 20], LOW, torch.float32, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "compute"),
    [
        (torch.float32, torch.float32, LOW),
        (LOW, LOW, torch.float32),
        (LOW, torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("rows", [2, 40])
def test_a_compute_dtype_of_its_own(
    impl: str, dtype: torch.dtype, adapter_dtype: torch.dtype, compute: torch.dtype, rows: int
) -> None:
    check(impl, rows, 128, [96, 40], [4, 8], dtype, adapter_dtype, compute, dropout_p=0.1)


@pytest.mark.skipif(CUDA, reason="covered by the others there")
@pytest.mark.parametrize("impl", ["reference", native])
@pytest.mark.parametrize("compute", [None, torch.float32])
def test_bfloat16_on_a_cpu(impl: str, compute: torch.dtype | None) -> None:
    check(impl, 40, 128, [96, 40], [4, 8], torch.bfloat16, torch.bfloat16, compute)
    check(impl, 40, 128, [96], [4], torch.float32, torch.float32, torch.bfloat16)


def _operands() -> tuple[Tensor, NF4Weight, Tensor, Tensor]:
    w4 = nf4.quantize(torch.randn(96, 128, device=DEVICE) * 0.1)
    x = torch.randn(40, 128, device=DEVICE, requires_grad=True)
    a = torch.randn(4, 128, device=DEVICE, requires_grad=True)
    b = torch.randn(96, 4, device=DEVICE, requires_grad=True)
    return x, w4, a, b


def test_no_dense_weight_is_saved() -> None:
    x, w4, a, b = _operands()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora_linear(x, w4, None, a, b, 0.5, dropout_p=0.1)
    known = {t.data_ptr() for t in (*w4.parts, x, a, b)}
    others = [t for t in kept if t.data_ptr() not in known]
    assert sum(t.numel() * t.element_size() for t in others) == 40 * 4 * 4 + 8  # t and the seed
    assert known <= {t.data_ptr() for t in kept}
    y.sum().backward()


def test_without_an_adapter_it_is_the_linear() -> None:
    x, w4, *_ = _operands()
    assert torch.equal(lora_linear(x, w4, None, [], [], 1.0), nf4.linear(x, w4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_the_same(reentrant: bool) -> None:
    x, w4, a, b = _operands()

    def run(x: Tensor) -> Tensor:
        return lora_linear(x, w4, None, a, b, 0.5, dropout_p=0.3)

    torch.manual_seed(3)
    plain = torch.autograd.grad(run(x).sum(), [x, a, b])
    torch.manual_seed(3)
    checkpoint(run, x, use_reentrant=reentrant).sum().backward()
    for leaf, grad in zip((x, a, b), plain, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w, a, b: (x, w.to("meta"), None, a, b), ValueError, "weight is on meta"),
        (lambda x, w, a, b: (x[:, :5], w, None, a, b), ValueError, "in is 128 in one, 5"),
        (lambda x, w, a, b: (x, w, a, a, b), ValueError, r"bias is \[4, 128\]"),
        (lambda x, w, a, b: (x, w, x.int()[0], a, b), TypeError, "bias is torch.int32"),
        (lambda x, w, a, b: (x, w, None, a, b[1:]), ValueError, r"lora_b is \[95, 4\]"),
        (lambda x, w, a, b: (x, w.packed, None, a, b), ValueError, "weight is"),
    ],
)
@pytest.mark.skipif(CUDA, reason="the same on every device")
def test_bad_operands(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_linear(*change(*_operands()), 1.0)


def test_opcheck() -> None:
    x, w4, a, b = _operands()
    dense = torch.randn(40, 128, device=DEVICE, requires_grad=True)
    b2 = torch.randn(40, 4, device=DEVICE, requires_grad=True)
    parts, spec = flatten([w4, dense])
    bias = torch.randn(40, device=DEVICE, requires_grad=True)
    settings = ([0, 1], [0.5, 2.0], [0.1, 0.0], torch.tensor([5, 6], device=DEVICE))
    arguments = (
        x,
        parts,
        spec,
        [bias],
        [a, a],
        [b, b2],
        *settings,
        [0, 1],
        [],
        "",
        False,
        "reference",
    )
    opcheck(torch.ops.peftfast.lora_linear.default, arguments)
