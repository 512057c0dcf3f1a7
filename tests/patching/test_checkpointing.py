"""Gradient checkpointing: a recomputation goes its forward's way, with the same masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftfast.patching import patch, unpatch
from peftfast.patching.state import state_of
from tests.patching.tiny import (
    adapted,
    copy_of,
    fused_layers,
    inputs_of,
    step_is_as_good,
    train_step,
)

MODES = {"reentrant": True, "non-reentrant": False}


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def groups_of(model: Any) -> set[Any]:
    states = [state_of(module) for module in model.modules()]
    return {state.group for state in states if state is not None and state.group is not None}


def groups(model: Any) -> set[tuple[str, ...]]:
    return {entry.siblings for entry in fused_layers(model) if entry.siblings}


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_as_good_as_peft(family: str, reentrant: bool) -> None:
    model = adapted(family)
    peft = checkpointed(copy_of(model), reentrant)
    checkpointed(patch(model, strict=True), reentrant)
    for _ in range(4):
        step_is_as_good(model, peft, inputs_of(family))
    hits = {entry.hits for entry in fused_layers(model)}
    assert hits <= {4, 8}  # forward and recomputation
    assert 8 in hits


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
def test_dropout_masks_are_drawn_again(reentrant: bool) -> None:
    """With one generator state, steps with and without checkpointing are the same.

    At the first step modules run alone, and siblings are seen; a recomputation that ran them
    together already would draw other masks (reentrant), or save other tensors (non-reentrant).
    """
    model = adapted("llama", lora_dropout=0.4)
    plain = copy_of(model)
    plain.enable_input_require_grads()
    patch(plain).train()
    checkpointed(patch(model), reentrant)
    for step in range(4):
        torch.manual_seed(step)
        expected = train_step(plain, inputs_of())
        torch.manual_seed(step)
        got = train_step(model, inputs_of())
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert len(groups(model)) == 4  # and they did run together in the end


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
@pytest.mark.parametrize("forwards", [2, 3])
def test_several_forwards_before_the_backwards(forwards: int, reentrant: bool) -> None:
    """Pipelines and sums of losses: the first forward is recomputed after later ones have run."""
    model = adapted("llama", lora_dropout=0.4)
    plain = copy_of(model)
    plain.enable_input_require_grads()
    patch(plain).train()
    checkpointed(patch(model), reentrant)
    batches = [inputs_of(columns=5 + i) for i in range(forwards)]
    for _ in range(3):
        results = []
        for m in (plain, model):
            torch.manual_seed(0)
            m.zero_grad()
            losses = [m(**batch).loss for batch in batches]
            for loss in reversed(losses):
                loss.backward()
            results.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
def test_given_up_between_forward_and_recomputation(reentrant: bool) -> None:
    """A group that misses in a forward stays a group in that forward's recomputation."""
    model = adapted("llama", lora_dropout=0.4)
    plain = copy_of(model)
    plain.enable_input_require_grads()
    patch(plain).train()
    checkpointed(patch(model), reentrant)
    results = []
    for m in (plain, model):
        for _ in range(3):
            m(**inputs_of()).loss.backward()
        assert len(groups(m)) == 4
        attention = m.base_model.model.model.layers[0].self_attn
        scaling = attention.k_proj.scaling
        attention.q_proj.register_forward_hook(lambda *_, s=scaling: s.update(default=2.0))
        attention.k_proj.register_forward_hook(lambda *_, s=scaling: s.update(default=1.5))
        torch.manual_seed(0)
        results.append(train_step(m, inputs_of()))
        assert "an adapter changed" in fused_layers(m)[0].note
        assert len(groups(m)) == 3
        torch.manual_seed(0)
        results.append(train_step(m, inputs_of()))
    for first, second in ((0, 2), (1, 3)):
        for name, value in results[first].items():
            torch.testing.assert_close(results[second][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_outputs_held_over_the_next_forward() -> None:
    """A loop that keeps the last output: what its backward has freed holds nothing up."""
    model = checkpointed(patch(adapted()), reentrant=False)
    for _ in range(3):
        output = model(**inputs_of())
        output.loss.backward()
    assert len(groups(model)) == 4
    assert output.logits is not None
    assert all(group.active for group in groups_of(model))


def test_forward_that_is_never_differentiated() -> None:
    """An abandoned checkpointed forward does not hold siblings up once it is gone."""
    model = checkpointed(patch(adapted()), reentrant=False)
    model(**inputs_of())
    model(**inputs_of()).loss.backward()
    model(**inputs_of()).loss.backward()
    assert len(groups_of(model)) == 4
    assert all(group.active for group in groups_of(model))


def test_early_stop_inside_a_group() -> None:
    """A checkpoint of q, k, v alone stops recomputing once the first has saved everything."""
    model = patch(adapted())
    attention = model.base_model.model.model.layers[0].self_attn
    peft = unpatch(copy_of(attention))

    def project(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return m.q_proj(x), m.k_proj(x), m.v_proj(x)

    for _ in range(4):
        gradients = []
        for m in (attention, peft):
            x = torch.arange(96.0).view(3, 32).div(50).requires_grad_()
            m.zero_grad()
            q, k, v = checkpoint(project, m, x, use_reentrant=False)
            attention.o_proj(torch.randn(2, 32))
            (q.sum() + k.pow(2).sum() * v.sum()).backward()
            gradients.append([x.grad] + [p.grad for p in m.parameters() if p.grad is not None])
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected)


def test_half_a_group_inside_a_checkpoint() -> None:
    """q recomputed, k and v not: each still gets its own gradient."""
    model = patch(adapted())
    attention = model.base_model.model.model.layers[0].self_attn
    peft = unpatch(copy_of(attention))
    for reentrant in (True, False, True, False):
        gradients = []
        for m in (attention, peft):
            x = torch.arange(96.0).view(3, 32).div(50).requires_grad_()
            m.zero_grad()
            q = checkpoint(m.q_proj, x, use_reentrant=reentrant)
            k, v = m.k_proj(x), m.v_proj(x)
            m.o_proj(torch.ones(2, 32))
            (q.sum() + k.pow(2).sum() * v.sum()).backward()
            gradients.append([x.grad] + [p.grad for p in m.parameters() if p.grad is not None])
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected)
