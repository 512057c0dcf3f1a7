"""Tiny models with adapters of the project."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from peftfast.methods import MethodConfig
from peftfast.nn import BottleneckAdapter
from tests.patching.tiny import FAMILIES, randomise


def adapters(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if isinstance(m, BottleneckAdapter)}


def with_method(config: MethodConfig, base: Any = "llama") -> Any:
    """A tiny model with adapters that matter, in evaluation mode."""
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES[base].make() if isinstance(base, str) else base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for adapter in adapters(model).values():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.2)
    return randomise(model).eval()
