"""Parts of a model trained as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peftfast.analysis import head_only, norms_only, top_layers
from tests.analysis.adapted import classifier

HEAD = {"classifier.weight", "classifier.bias"}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_head_alone_on_a_copy() -> None:
    model = classifier()
    copied = head_only(model)
    assert trained(copied) == HEAD
    assert len(trained(model)) == len(list(model.parameters()))
    with torch.no_grad():
        copied.classifier.weight.zero_()
    assert model.classifier.weight.any()
    pooled = head_only(model, head=["classifier", "bert.pooler"])
    assert trained(pooled) == HEAD | {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_every_norm_and_the_head() -> None:
    found = trained(norms_only(classifier()))
    assert found > HEAD
    assert all("LayerNorm" in name for name in found - HEAD)
    assert len(found - HEAD) == 2 * (1 + 2 * 3)


def test_the_last_layers_and_the_head() -> None:
    model = classifier()
    found = trained(top_layers(model, 2))
    layers = {f"bert.encoder.layer.{index}." for index in (1, 2)}
    assert found == HEAD | {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(layer) for layer in layers)
    }


def test_a_head_that_shares_its_weights() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8)
    )
    copied = head_only(model)
    assert trained(copied) == {"transformer.wte.weight"}
    assert copied.lm_head.weight is copied.transformer.wte.weight


def test_what_cannot_be_is_refused() -> None:
    model = classifier()
    with pytest.raises(ValueError, match="count is 4; BertForSequenceClassification has 3 layers"):
        top_layers(model, 4)
    with pytest.raises(ValueError, match="has no module 'score'"):
        head_only(model, head=["score"])
    with pytest.raises(TypeError, match="head is a string"):
        head_only(model, head="classifier")
    with pytest.raises(ValueError, match=r"BertModel has no head .* head=\[\.\.\.\]"):
        head_only(model.bert)
    with pytest.raises(ValueError, match="Linear has no LayerNorm"):
        norms_only(nn.Linear(2, 2), head=["weight"])
    model.classifier.weight = nn.Parameter(
        torch.zeros(3, 16, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"classifier.weight is torch.uint8 and can't be trained"):
        head_only(model)
