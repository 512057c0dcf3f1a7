"""A small encoder with adapters, and scores of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peftfast.methods import HoulsbyConfig

LAYERS = 3
TOKENS = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(7))


def classifier() -> Any:
    """BERT of three narrow layers, with a head of three labels."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        initializer_range=0.4,
    )
    return BertForSequenceClassification(config)


def adapted(**options: Any) -> Any:
    """The classifier with adapters whose values are random, so that each changes the output."""
    options = {"bottleneck": 4, "task_type": "SEQ_CLS", "init_std": 0.5, **options}
    return get_peft_model(classifier(), HoulsbyConfig(**options))


@torch.no_grad()
def score(model: nn.Module) -> float:
    """A number that every adapter and every weight changes."""
    return float(model(input_ids=TOKENS).logits.double().pow(2).sum())


def failing(after: int) -> Callable[[nn.Module], float]:
    """A score that raises KeyError at its call number `after`, from 0."""
    calls = iter(range(1000))

    def scored(model: nn.Module) -> float:
        if next(calls) == after:
            raise KeyError("the metric failed")
        return score(model)

    return scored
