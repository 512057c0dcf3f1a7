"""rms_norm and layer_norm: bad operands, the bits of the modules, gradients against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peftfast.ops import ImplUnavailable, layer_norm, norm, recipes, rms_norm
from peftfast.reference import norm as reference
from tests.tolerance import assert_within

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
IMPLS = ["reference", "triton"]
LOW = torch.bfloat16 if CUDA else torch.float16
MIXES = [(torch.float32, torch.float32), (LOW, LOW), (LOW, torch.float32), (torch.float32, LOW)]
EPS = 1e-3
MODULES = {
    "llama": LlamaRMSNorm,
    "t5": T5LayerNorm,
    "gemma": Gemma3RMSNorm,
    "float": Olmo2RMSNorm,
    "torch": nn.RMSNorm,
}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make torch.empty and new_empty give NaN."""
    new_empty, empty = Tensor.new_empty, torch.empty

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    yield


BAD = [
    ({"x": [1.0]}, TypeError, "x is list"),
    ({"x": torch.tensor(1.0)}, ValueError, "x is a scalar"),
    ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x is torch.int64"),
    ({"x": torch.ones(3, 8).to_sparse()}, TypeError, "x is of layout torch.sparse_coo"),
    ({"weight": torch.ones(7)}, ValueError, r"weight is \[7\]; x \[3, 8\] needs \[8\]"),
    ({"weight": torch.ones(1, 8)}, ValueError, r"weight is \[1, 8\]"),
    ({"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta"),
    ({"weight": 1.0}, TypeError, "weight is float"),
    ({"eps": "1e-5"}, TypeError, "eps is str"),
    ({"eps": torch.tensor(1e-5)}, TypeError, "eps is Tensor"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
]


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_operand_is_named(
    kind: str, change: dict[str, Any], error: type, message: str
) -> None:
    good: dict[str, Any] = {"x": torch.randn(3, 8), "weight": torch.ones(8), "eps": 1e-5}
    run: Any = rms_norm
    if kind == "layer_norm":
        good["bias"], run = torch.ones(8), layer_norm
    run(**good)
    with pytest.raises(error, match=message):
        run(**(good | change))


def test_bad_forms_and_dtypes_are_named() -> None:
    x, w = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="form is 'mistral'; allowed: 'llama', 't5'"):
        rms_norm(x, w, 1e-5, form="mistral")
    with pytest.raises(ValueError, match=r"bias is \[9\]"):
        layer_norm(x, w, torch.ones(9), 1e-5)
    with pytest.raises(TypeError, match="weight is torch.float16, x is torch.float32"):
        layer_norm(x, w.half(), None, 1e-5)
    with pytest.raises(TypeError, match="bias is torch.float16, weight is torch.float32"):
        layer_norm(x.half(), w, w.half(), 1e-5)


def test_an_implementation_that_can_not_serve_says_why() -> None:
    x, w = torch.randn(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with pytest.raises(ImplUnavailable, match="rms_norm has no native implementation"):
        rms_norm(x, w, 1e-5, impl="native")
    with pytest.raises(ImplUnavailable, match="dtype torch.float64"):
        layer_norm(x.double(), w.double(), None, 1e-5, impl="triton")
    long = torch.randn(2, 20_000, device=DEVICE)
    with pytest.raises(ImplUnavailable, match="a row has 20000 elements; 16384 is the most"):
        rms_norm(long, None, 1e-5, impl="triton")
    with pytest.raises(ImplUnavailable, match="8192 is the most"):
        layer_norm(long, None, None, 1e-5, impl="triton")
    rms_norm(long, None, 1e-5)
    device = torch.device(DEVICE)
    assert norm.norm_reasons("triton", device, torch.float32, 4096) == []
    assert norm.norm_reasons("auto", device, torch.float64, 1 << 20) == []
    assert "8192" in norm.norm_reasons("triton", device, torch.float32, 10_000)[0]
    assert norm.norm_reasons("native", device, torch.float32, 8) == [
        "norms have no native implementation"
    ]


@pytest.mark.skipif(CUDA, reason="bits are those of a CPU")
@pytest.mark.parametrize("form", norm.FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_bits_of_the_modules(form: str, dtype: torch.dtype, autocast: bool) -> None:
    module: Any = MODULES[form](40, eps=EPS).to(dtype)
    nn.init.normal_(module.weight)
    x = torch.randn(3, 7, 40).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = module(x)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                ours = rms_norm(x, module.weight, EPS, form=form)
            assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.skipif(CUDA, reason="bits are those of a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
@pytest.mark.parametrize("autocast", [False, True])
def test_bits_of_layer_norm(
    dtype: torch.dtype, parameters: torch.dtype | None, autocast: bool
) -> None:
    module = nn.LayerNorm(40, EPS).to(parameters or dtype)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    x = torch.randn(3, 7, 40).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = module(x)
        ours = layer_norm(x, module.weight, module.bias, EPS)
        bare = layer_norm(x, None, None, EPS)
        assert torch.equal(bare, F.layer_norm(x, (40,), eps=EPS))
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_torch_on_a_gpu(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64, device="cuda").to(dtype)
    w, b = torch.randn(2, 64, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = F.layer_norm(x, (64,), w, b), F.rms_norm(x, (64,), w, EPS)
        ours = layer_norm(x, w, b, 1e-5), rms_norm(x, w, EPS, form="torch")
        assert rms_norm(x, w, EPS, form="float").dtype == dtype
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs)


class Case:
    """Operands exact in their dtypes."""

    def __init__(self, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        self.dtypes = dtypes
        x, parameter = dtypes

        def draw(size: Any, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, device=DEVICE).to(dtype).double()

        self.x, self.dy = draw(shape, x), draw(shape, LOW)
        self.w, self.b = draw(shape[-1], parameter), draw(shape[-1], parameter)

    def run(self, how: str, form: str, parameters: int, wide: bool = False) -> dict[str, Tensor]:
        """Output and gradients; `how` is an impl, or "formula" for eager PyTorch."""
        dtype, parameter = (torch.float64,) * 2 if wide else self.dtypes
        x = self.x.to(dtype).requires_grad_()
        w, b = (v.to(parameter).requires_grad_() for v in (self.w, self.b))
        leaves = dict(list({"x": x, "w": w, "b": b}.items())[: 1 + parameters])
        weight, bias = leaves.get("w"), leaves.get("b")
        if form == "layer":
            y = (
                reference.layer_norm_forward(x, weight, bias, EPS)
                if how == "formula"
                else layer_norm(x, weight, bias, EPS, impl=how)
            )
        elif how == "formula":
            y = reference.rms_norm(x, weight, EPS, form)
        else:
            y = rms_norm(x, weight, EPS, form=form, impl=how)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        return {"y": y, **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}


def check(
    impl: str,
    shape: tuple[int, ...],
    form: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    parameters: int,
) -> None:
    """Hold an implementation to the tolerance, on several draws where a case is small."""
    size = max(1, min(math.prod(shape[:-1]), shape[-1]))
    cases = [Case(shape, dtypes) for _ in range(min(8, -(-64 // size)))]
    runs = [
        [case.run(how, form, parameters, wide) for case in cases]
        for how, wide in ((impl, False), ("formula", False), ("formula", True))
    ]
    for name in runs[0][0]:
        values = [torch.stack([one[name] for one in run]) for run in runs]
        assert values[0].dtype == values[1].dtype, name
        assert_within(*values, what=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", reference.FORMS)
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("columns", [1, 130, 1000])
def test_rms_norm_within_tolerance(
    impl: str, form: str, dtypes: tuple[torch.dtype, torch.dtype], columns: int
) -> None:
    check(impl, (3, 11, columns), form, dtypes, 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", MIXES[:3], ids=str)
@pytest.mark.parametrize("columns", [2, 64, 1000])
@pytest.mark.parametrize("parameters", [0, 1, 2])
def test_layer_norm_within_tolerance(
    impl: str, dtypes: tuple[torch.dtype, torch.dtype], columns: int, parameters: int
) -> None:
    check(impl, (3, 11, columns), "layer", dtypes, parameters)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=12)
@given(
    rows=st.integers(0, 300),
    columns=st.integers(2, 300),
    form=st.sampled_from([*reference.FORMS, "layer"]),
    dtypes=st.sampled_from(MIXES[:3]),
    parameters=st.integers(0, 2),
)
def test_drawn_sizes(impl, rows, columns, form, dtypes, parameters) -> None:
    check(
        impl, (rows, columns), form, dtypes, parameters if form == "layer" else min(parameters, 1)
    )


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_the_gradient_from_a_recipe(kind: str) -> None:
    x = torch.randn(4, 24, device=DEVICE, requires_grad=True)
    w = torch.randn(24, device=DEVICE)
    y = rms_norm(x, w, EPS) if kind == "rms_norm" else layer_norm(x, w, w, EPS)
    found = recipes.source(y, kind)
    assert found is not None and found[2][0] is x
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(norm.input_gradient(kind, dy, found[2], found[1]), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_with_no_eps_are_as_in_torch(impl: str) -> None:
    x = torch.randn(5, 24, device=DEVICE)
    x[2] = 0
    y = rms_norm(x, None, 0.0, form="float", impl=impl)
    assert torch.equal(y.isnan(), F.rms_norm(x, (24,), eps=0.0).isnan())
    assert y[2].isnan().all() and not y[3].isnan().any()
