"""The methods with prefixes on one layer of BERT, against the papers' formulae written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.methods import (
    Component,
    MAMConfig,
    MethodConfig,
    MultiHeadParallelAdapterConfig,
    PTuningV2Config,
    UnifiedConfig,
    UniPELTConfig,
)
from tests.methods.models import made
from tests.methods.test_families import logits, randomised

HEADS, WIDTH = 4, 32
Parameters = dict[str, Tensor]


class Layer:
    """The parameters of a BERT layer with adapters, and its formulae."""

    def __init__(self, layer: Any) -> None:
        self.values = dict(layer.named_parameters())

    def base(self, name: str, x: Tensor) -> Tensor:
        """A linear of the base model."""
        weight = self.values.get(f"{name}.weight", self.values.get(f"{name}.base_layer.weight"))
        bias = self.values.get(f"{name}.bias", self.values.get(f"{name}.base_layer.bias"))
        assert weight is not None and bias is not None, name
        return x @ weight.T + bias

    def own(self, component: str) -> Parameters:
        """The parameters of a component, by their names."""
        found = {
            name.rpartition(".")[2]: value
            for name, value in self.values.items()
            if f".peftfast_{component}.default." in name
        }
        assert found, component
        return found

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.values[f"{name}.LayerNorm.{end}"] for end in ("weight", "bias"))
        return F.layer_norm(x, (WIDTH,), weight, bias, 1e-12)


def split(x: Tensor) -> Tensor:
    """[B, S, d] as [B, H, S, D]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def gate(own: Parameters, x: Tensor) -> Tensor:
    """The mean over tokens of sigmoid(x w + b): [B, 1, 1]."""
    return torch.sigmoid(x @ own["gate_weight"].T + own["gate_bias"]).mean(1, keepdim=True)


def by_hand(layer: Layer, method: str, x: Tensor, mask: Tensor) -> Tensor:
    """A layer: attention, then feed-forward, with what the method puts there.

    mask: [B, S], which tokens are there.
    """
    q, k, v = (layer.base(f"attention.self.{name}", x) for name in ("query", "key", "value"))
    if method == "unipelt":
        for name in ("q", "v"):
            own = layer.own(f"attention_{name}_parallel")
            delta = x @ own["down_weight"].T @ own["up_weight"].T
            delta = gate(own, x) * 16.0 / 2 * delta
            q, v = (q + delta, v) if name == "q" else (q, v + delta)
    q, k, v = split(q), split(k), split(v)
    own = layer.own("attention_prefix")
    prefix_k, prefix_v = own["prefix_k"][None], own["prefix_v"][None]  # [1, H, P, D]
    added: Tensor | float = 0.0
    if method.startswith("heads"):
        scale = own["scaling_factor"] if method == "heads, learned" else 2.5
        added = scale * torch.relu(q @ prefix_k.mT) @ prefix_v
    else:
        if method in ("unipelt", "gated"):
            opened = gate(own, x)[..., None]
            prefix_k, prefix_v = opened * prefix_k, opened * prefix_v
        k, v = (
            torch.cat((prefix.expand(len(x), -1, -1, -1), held), 2)
            for prefix, held in ((prefix_k, k), (prefix_v, v))
        )
        mask = torch.cat((mask.new_ones(len(x), prefix_k.shape[2]), mask), 1)
    scores = q @ k.mT / (WIDTH // HEADS) ** 0.5
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    heads = scores.softmax(-1) @ v + added
    read = heads.transpose(1, 2).flatten(2)
    h = layer.norm("attention.output", layer.base("attention.output.dense", read) + x)
    hidden = F.gelu(layer.base("intermediate.dense", h))
    out = layer.base("output.dense", hidden)
    if method == "mam":
        own = layer.own("ffn_output_parallel")
        down = torch.relu(h @ own["down_weight"].T + own["down_bias"])
        out = out + 4.0 * (down @ own["up_weight"].T + own["up_bias"])
    elif method == "unipelt":
        own = layer.own("ffn_output")
        down = torch.relu(out @ own["down_weight"].T + own["down_bias"])
        out = out + gate(own, out) * (down @ own["up_weight"].T + own["up_bias"])
    return layer.norm("output", out + h)


METHODS: dict[str, Callable[[], MethodConfig]] = {
    "prefix": lambda: PTuningV2Config(num_virtual_tokens=3),
    "gated": lambda: UnifiedConfig(
        components=[Component("attention_heads", primitive="prefix", virtual_tokens=3, gate=True)]
    ),
    "mam": lambda: MAMConfig(num_virtual_tokens=5, bottleneck=6),
    "heads": lambda: MultiHeadParallelAdapterConfig(bottleneck=4, scaling=2.5),
    "heads, learned": lambda: MultiHeadParallelAdapterConfig(bottleneck=4, learned_scaling=True),
    "unipelt": lambda: UniPELTConfig(num_virtual_tokens=3, reduction=8, r=2),
}


def single(method: str) -> tuple[Any, Any]:
    """A model, in float64 with all that trains random, and its first layer."""
    model = peft.get_peft_model(made("bert"), METHODS[method]())
    randomised(model)
    layer = model.double().eval().base_model.model.bert.encoder.layer[0]
    return model, layer


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients(method: str) -> None:
    _, layer = single(method)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    weights = torch.randn_like(x)
    y = layer(x, attention_mask=mask[:, None, None].expand(-1, 1, 7, -1))
    expected = by_hand(Layer(layer), method, x, mask)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *trained.values()]
    found = torch.autograd.grad((y * weights).sum(), inputs)
    exact = torch.autograd.grad((expected * weights).sum(), inputs)
    for name, one, other in zip(("x", *trained), found, exact, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_unipelt_gates_are_of_each_sequence() -> None:
    """A closed gate takes its part away: all closed is the base model with a prefix of zeros."""
    model, layer = single("unipelt")
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    with torch.no_grad():
        opened = layer(x, attention_mask=mask)
        rows = torch.cat([layer(row[None], attention_mask=mask[:1]) for row in x])
        torch.testing.assert_close(opened, rows, rtol=1e-12, atol=1e-12)
        for name, value in layer.named_parameters():
            if name.endswith("gate_weight"):
                value.zero_()
            elif name.endswith("gate_bias"):
                value.fill_(-800.0)
        closed = layer(x, attention_mask=mask)
        for name, value in layer.named_parameters():
            if name.endswith(("prefix_k", "prefix_v", "up_weight", "up_bias")):
                value.zero_()
        torch.testing.assert_close(layer(x, attention_mask=mask), closed, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(closed, opened)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
def test_what_each_method_puts_where(family: str) -> None:
    """UniPELT's LoRA is on q and v, or on the linear of all three; every gate is there."""
    model = peft.get_peft_model(made(family), UniPELTConfig(num_virtual_tokens=2, r=2))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    components = {n.partition(".peftfast_")[2].partition(".")[0] for n in names}
    cross = {"cross_attention_prefix"} if family in ("t5", "bart") else set()
    lora = {"attention_qkv_parallel"} if family == "gpt2" else {
        "attention_q_parallel", "attention_v_parallel",
    }  # fmt: skip
    assert components == {"attention_prefix", "ffn_output"} | cross | lora
    gated = {n.partition(".peftfast_")[2].partition(".")[0] for n in names if "gate_weight" in n}
    assert gated == components


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
def test_the_multi_head_parallel_adapter_starts_as_the_base_model(family: str) -> None:
    base = made(family)
    plain = logits(base, family)
    model = peft.get_peft_model(base, MultiHeadParallelAdapterConfig(bottleneck=3)).eval()
    torch.testing.assert_close(logits(model, family), plain)
    randomised(model)
    assert not torch.allclose(logits(model, family), plain)
