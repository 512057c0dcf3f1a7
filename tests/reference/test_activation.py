"""Activations in plain PyTorch: the bits of transformers' modules, and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from peftfast.reference import activation
from peftfast.reference.dropout import keep_mask, keep_scale

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}  # transformers', where it is another


@pytest.mark.parametrize("kind", activation.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_modules(kind: str, dtype: torch.dtype) -> None:
    module = ACT2FN[NAMES.get(kind, kind)]
    for x in (torch.randn(3, 501), torch.randn(40, 30).t(), torch.linspace(-20, 20, 999)):
        x = x.to(dtype)
        assert torch.equal(activation.activation(x, kind), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_gated_product(dtype: torch.dtype) -> None:
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=40)).to(dtype)
    gate, up = torch.randn(2, 5, 40).to(dtype), torch.randn(2, 5, 40).to(dtype)
    expected = mlp.act_fn(gate) * up
    assert torch.equal(activation.gated_activation(gate, up, "silu", 0.0, None), expected)
    assert torch.equal(activation.gated_activation_forward(gate, up, "silu", 0.0, None), expected)


@pytest.mark.parametrize("kind", activation.KINDS)
def test_gradients(kind: str) -> None:
    x = (torch.randn(6, 40, dtype=torch.float64) * 2).requires_grad_()
    y = activation.activation(x, kind)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, dy)
    with torch.no_grad():
        ours = activation.activation_backward(dy, x, kind)
    # gelu_fast cuts sqrt(2 / pi) off after ten digits
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(4, 13), (2, 3, 8), (5,), (0, 4)])
def test_gradients_of_the_gated_product(kind: str, p: float, shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    seed = torch.tensor([5]) if p else None
    h = activation.gated_activation(gate, up, kind, p, seed)
    dy = torch.randn_like(h)
    expected = torch.autograd.grad(h, (gate, up), dy)
    with torch.no_grad():
        assert torch.equal(activation.gated_activation_forward(gate, up, kind, p, seed), h)
        both = activation.gated_activation_backward(dy, gate, up, kind, p, seed, True, True)
        (first,) = activation.gated_activation_backward(dy, gate, up, kind, p, seed, True, False)
        (second,) = activation.gated_activation_backward(dy, gate, None, kind, p, seed, False, True)
    for ours, theirs in zip([*both, first, second], [*expected, *expected], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_of_the_product_is_the_masks() -> None:
    gate, up, seed = torch.randn(6, 20), torch.randn(6, 20), torch.tensor([9])
    whole = activation.gated_activation(gate, up, "silu", 0.0, None)
    dropped = activation.gated_activation(gate, up, "silu", 0.4, seed)
    expected = torch.where(keep_mask(seed, 6, 20, 0.4), whole * keep_scale(0.4), 0)
    assert torch.equal(dropped, expected)
    assert 0 < (dropped == 0).sum() < dropped.numel()
