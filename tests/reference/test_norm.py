"""Norms in plain PyTorch: the bits of the modules they stand for, and gradients in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peftfast.reference import norm

EPS = 1e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODULES = [
    ("llama", LlamaRMSNorm),
    ("t5", T5LayerNorm),
    ("gemma", Gemma3RMSNorm),
    ("float", Olmo2RMSNorm),
    ("float", nn.RMSNorm),
]
MIXES = [
    (form, module, dtype, weight_dtype)
    for form, module in MODULES
    for dtype in DTYPES
    for weight_dtype in DTYPES
    if module is not nn.RMSNorm or dtype == weight_dtype
]


def _inputs(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    if layout == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize(("form", "module", "dtype", "weight_dtype"), MIXES)
@pytest.mark.parametrize("shape", [(3, 5, 64), (33, 1000), (1, 77), (2, 4096), (0, 8)])
def test_rms_norm_has_the_bits_of_its_module(
    form: str, module: Any, dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    theirs = module(shape[-1], eps=EPS).to(weight_dtype)
    nn.init.normal_(theirs.weight)
    for layout in ("plain", "transposed", "strided"):
        x = _inputs(shape, layout, dtype)
        expected = theirs(x)
        ours = norm.rms_norm_forward(x, theirs.weight.detach(), EPS, form)
        assert ours.dtype == expected.dtype == norm.rms_norm_dtype(dtype, theirs.weight, form)
        assert torch.equal(ours, expected) and ours.is_contiguous()
        assert torch.equal(norm.rms_norm(x, theirs.weight, EPS, form), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_without_a_weight(dtype: torch.dtype) -> None:
    x = torch.randn(6, 40).to(dtype)
    for form in norm.FORMS:
        ours = norm.rms_norm_forward(x, None, EPS, form)
        assert torch.equal(ours, F.rms_norm(x, (40,), eps=EPS))
        assert torch.equal(norm.rms_norm(x, None, EPS, form), ours)


@pytest.mark.parametrize("form", norm.FORMS)
@pytest.mark.parametrize("shape", [(7,), (4, 9), (2, 3, 16), (0, 5)])
@pytest.mark.parametrize("has_weight", [True, False])
def test_gradients_of_rms_norm(form: str, shape: tuple[int, ...], has_weight: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True) if has_weight else None
    y = norm.rms_norm(x, w, EPS, form)
    dy = torch.randn_like(y)
    leaves = [v for v in (x, w) if v is not None]
    expected = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        ours = norm.rms_norm_backward(dy, x, w, EPS, form, True, has_weight)
        assert len(norm.rms_norm_backward(dy, x, w, EPS, form, False, has_weight)) == has_weight
        assert len(norm.rms_norm_backward(dy, x, w, EPS, form, True, False)) == 1
    assert len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_formula_passes_gradcheck() -> None:
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 8), (8,)))
    for form in norm.FORMS:
        assert torch.autograd.gradcheck(lambda *v, f=form: norm.rms_norm(*v, EPS, f), (x, w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("shape", [(3, 5, 64), (33, 1000), (1, 77), (0, 8)])
def test_layer_norm_has_the_bits_of_its_module(
    dtype: torch.dtype, weight_dtype: torch.dtype | None, shape: tuple[int, ...]
) -> None:
    module = nn.LayerNorm(shape[-1], EPS).to(weight_dtype or dtype)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    for layout in ("plain", "transposed", "strided"):
        x = _inputs(shape, layout, dtype)
        ours = norm.layer_norm_forward(x, module.weight, module.bias, EPS)
        assert torch.equal(ours, module(x)) and ours.is_contiguous()


@pytest.mark.parametrize("shape", [(7,), (4, 9), (2, 3, 16), (0, 5)])
@pytest.mark.parametrize("parameters", [0, 1, 2])
def test_gradients_of_layer_norm(shape: tuple[int, ...], parameters: int) -> None:
    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, requires_grad=True)

    x, w, b = draw(*shape), draw(shape[-1]), draw(shape[-1])
    operands = [w if parameters else None, b if parameters > 1 else None]
    y = norm.layer_norm_forward(x, *operands, EPS)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, w, b][: 1 + parameters], dy)
    needs = (True, parameters > 0, parameters > 1)
    with torch.no_grad():
        ours = norm.layer_norm_backward(dy, x, operands[0], EPS, *needs, b.dtype)
    assert len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
