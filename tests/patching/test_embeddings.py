"""Frozen embeddings under `patch`: nothing of their output is kept, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import peftfast
from peftfast.memory import saved_bytes
from tests.patching.tiny import adapted, copy_of, inputs_of, step_is_as_good, train_step

WIDTH = 32


def _table(model: Any) -> Any:
    return model.get_base_model().get_input_embeddings()


def _saved(model: Any) -> int:
    inputs = inputs_of()
    return saved_bytes(lambda: model(**inputs).loss, exclude=model)


def test_the_first_layers_input_is_not_kept() -> None:
    ours, without = adapted().train(), adapted().train()
    peftfast.patch(ours)
    peftfast.patch(without, exclude=["embed_tokens"])
    for model in (ours, without):
        train_step(model, inputs_of())
    ids = inputs_of()["input_ids"]
    assert _saved(without) - _saved(ours) == ids.numel() * WIDTH * 4 - ids.nbytes
    found = {one.path: one for one in peftfast.report(ours).fused}
    (entry,) = [one for path, one in found.items() if path.endswith("embed_tokens")]
    assert entry.op == "embedding" and entry.hits == 2


def test_a_step_is_as_good_with_inputs_that_require_grad() -> None:
    peft = adapted().train()
    peft.enable_input_require_grads()
    step_is_as_good(peftfast.patch(copy_of(peft)), peft, inputs_of())


def test_a_trainable_table_is_left_alone() -> None:
    peft = adapted(modules_to_save=["embed_tokens"]).train()
    ours = peftfast.patch(copy_of(peft))
    fused = [one.path for one in peftfast.report(ours).fused if one.op == "embedding"]
    assert fused == ["base_model.model.model.embed_tokens.original_module"]
    step_is_as_good(ours, peft, inputs_of())


def test_one_that_becomes_trainable_is_trained() -> None:
    peft = adapted().train()
    ours = peftfast.patch(copy_of(peft))
    for model in (peft, ours):
        _table(model).weight.requires_grad_()
    step_is_as_good(ours, peft, inputs_of())
    (entry,) = [one for one in peftfast.report(ours).fused if one.op == "embedding"]
    assert entry.hits == 0 and list(entry.delegations) == ["its weight is trained"]


def test_a_hook_that_changes_the_output_is_seen() -> None:
    """As NEFTune's does."""
    peft = adapted().train()
    ours = peftfast.patch(copy_of(peft))
    for model in (peft, ours):
        _table(model).register_forward_hook(lambda module, args, output: output * 1.5)
    step_is_as_good(ours, peft, inputs_of())


def test_max_norm_is_not_touched() -> None:
    model = adapted()
    _table(model).max_norm = 1.0
    peftfast.patch(model)
    (entry,) = [
        one for one in peftfast.report(model).not_fused if one.path.endswith("embed_tokens")
    ]
    assert entry.reasons == ("it renormalises its weight (max_norm)",)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unpatch_gives_the_class_back(dtype: torch.dtype) -> None:
    model = peftfast.patch(adapted())
    assert type(_table(model)) is not nn.Embedding and isinstance(_table(model), nn.Embedding)
    ids = inputs_of()["input_ids"].to(dtype)
    expected = nn.functional.embedding(ids, _table(model).weight)
    assert torch.equal(_table(model)(ids), expected)
    assert type(_table(peftfast.unpatch(model))) is nn.Embedding
