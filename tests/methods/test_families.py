"""Every method on every family: where it lands, what it trains, how it starts, and that it comes
back from disk in another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from peftfast.methods import (
    AdapterHost,
    CompacterConfig,
    Component,
    HoulsbyConfig,
    MethodConfig,
    ParallelAdapterConfig,
    PfeifferConfig,
    ScaledParallelAdapterConfig,
    UnifiedConfig,
    find_norms,
    hosts,
)
from tests.methods.models import inputs_of, made
from tests.methods.places import EXPECTED, expected_points

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("bert", "roberta", "gpt2", "llama", "qwen3", "t5", "bart", "vit")

_ATTENTION = ("attention_output", "cross_attention_output")
_HEADS = ("attention_heads", "cross_attention_heads")
_FFN = ("ffn_output",)


def houlsby(**options: Any) -> Callable[[], MethodConfig]:
    return lambda: HoulsbyConfig(**{"bottleneck": 4, "train_norms": False, **options})


# A configuration, and the sites that it changes.
METHODS: dict[str, tuple[Callable[[], MethodConfig], tuple[str, ...]]] = {
    "houlsby": (lambda: HoulsbyConfig(bottleneck=4), _ATTENTION + _FFN),
    "attention only": (houlsby(sublayers=["attention"]), _ATTENTION),
    "before the projection": (houlsby(attention_position="before"), _HEADS + _FFN),
    "layer norm": (houlsby(norm="layer"), _ATTENTION + _FFN),
    "batch norm": (houlsby(norm="batch"), _ATTENTION + _FFN),
    "rms norm after": (houlsby(norm="rms", norm_position="after"), _ATTENTION + _FFN),
    "deep": (houlsby(depth=2, activation="tanh"), _ATTENTION + _FFN),
    "multiplied": (houlsby(composition="multiply"), _ATTENTION + _FFN),
    "gated": (houlsby(gate=True), _ATTENTION + _FFN),
    "pfeiffer": (PfeifferConfig, _FFN),
    "parallel": (lambda: ParallelAdapterConfig(bottleneck=4), _FFN),
    "parallel attention": (
        lambda: ParallelAdapterConfig(bottleneck=4, sublayers=["attention"]),
        _HEADS,
    ),
    "scaled parallel": (lambda: ScaledParallelAdapterConfig(bottleneck=4), _FFN),
    "learned scale": (
        lambda: ScaledParallelAdapterConfig(bottleneck=4, learned_scaling=True),
        _FFN,
    ),
    "compacter": (lambda: CompacterConfig(bottleneck=4), _ATTENTION + _FFN),
    "unified": (
        lambda: UnifiedConfig(
            components=[
                Component("attention_heads", insertion="parallel", bottleneck=3, init="lora"),
                Component("ffn_output", insertion="parallel", bottleneck=5, scaling=4.0),
                Component("ffn_hidden", form="gelu", bottleneck=2),
            ]
        ),
        ("attention_heads", "ffn_output", "ffn_hidden"),
    ),
}


def adapted(family: str, method: str, base: Any = None) -> Any:
    torch.manual_seed(2)
    model = made(family) if base is None else base
    return peft.get_peft_model(model, METHODS[method][0]()).eval()


def randomised(model: nn.Module) -> None:
    """Random values for all that trains, so that it matters."""
    generator = torch.Generator().manual_seed(3)
    for value in model.parameters():
        if value.requires_grad:
            value.data = torch.randn(value.shape, generator=generator) * 0.2


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    return model(**inputs_of(family)).logits


def expected_places(family: str, method: str) -> set[tuple[str, str]]:
    """The module and the site of every adapter."""
    return {
        (f"{stack.blocks}.{layer}.{expected_points(stack)[site][0]}", site)
        for stack in EXPECTED[family]
        for layer in range(2)
        for site in METHODS[method][1]
        if site in expected_points(stack)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_lands_and_trains_where_it_says(family: str, method: str) -> None:
    model = adapted(family, method)
    base = model.base_model.model
    places = {
        (name, placement.component.site)
        for name, host in base.named_modules()
        if isinstance(host, AdapterHost)
        for placement, _ in host.components("default")
    }
    expected = expected_places(family, method)
    assert places == expected

    starts = tuple(f"{name}.peftfast_" for name, _ in expected)
    if model.peft_config["default"].train_norms:
        starts += tuple(f"{name}.modules_to_save." for name in find_norms(base))
    trained = {name for name, value in base.named_parameters() if value.requires_grad}
    of_method = {name for name, _ in base.named_parameters() if name.startswith(starts)}
    assert trained == of_method and all(
        any(name.startswith(start) for name in trained) for start in starts
    )

    randomised(model)
    model.train()
    loss = model(**inputs_of(family)).logits.square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    for name, value in base.named_parameters():
        if name in trained:
            assert value.grad is not None and torch.isfinite(value.grad).all(), name
            assert value.grad.count_nonzero(), name
        else:
            assert value.grad is None, name
