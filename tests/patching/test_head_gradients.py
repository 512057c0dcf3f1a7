"""Whoever looks at gradients between the final norm and the loss sees what PEFT shows, or is told
that there is nothing to see.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfast
from peftfast.memory import saved_bytes
from tests.patching.tiny import adapted, copy_of, inputs_of, train_step

FAMILIES = ["llama", "gpt2", "gemma3", "opt"]


def _norm(model: Any) -> Any:
    """The norm whose output the head reads."""
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    return norms[-1]


def _backbone(model: Any) -> Any:
    owner = model.get_base_model()
    return owner.get_decoder() if hasattr(owner.base_model, "decoder") else owner.base_model


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -0.5 * dy


def _tripled(module: Any, gradients: Any, *others: Any) -> Any:
    return (gradients[0] * 3,)


def _watch_output(module: Any, args: Any, output: Tensor) -> None:
    output.register_hook(lambda gradient: gradient * 2)


def _watch_view(module: Any, args: Any, output: Tensor) -> Tensor:
    view = output.view(output.shape)
    view.register_hook(lambda gradient: gradient * 2)
    return view


def _watch_last(module: Any, args: Any, output: Any) -> None:
    output.last_hidden_state.register_hook(lambda gradient: gradient * 2)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "full backward": lambda model: _norm(model).register_full_backward_hook(_tripled),
    "full backward pre": lambda model: _norm(model).register_full_backward_pre_hook(_tripled),
    "of the output": lambda model: _norm(model).register_forward_hook(_watch_output),
    "of a view": lambda model: _norm(model).register_forward_hook(_watch_view),
    "of the backbone's": lambda model: _backbone(model).register_forward_hook(_watch_last),
    "reversal": lambda model: _norm(model).register_forward_hook(
        lambda m, a, y: _Reversed.apply(y)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_between_norm_and_loss(family: str, hook: str) -> None:
    peft = adapted(family)
    ours = peftfast.patch(copy_of(peft))
    plain = train_step(copy_of(peft), inputs_of(family))
    for model in (peft, ours):
        HOOKS[hook](model)
    expected, got = train_step(peft, inputs_of(family)), train_step(ours, inputs_of(family))
    changed = [
        name
        for name in expected
        if not torch.allclose(expected[name], plain[name], rtol=0.1, atol=1e-9)
    ]
    assert changed, "the hook changes nothing in PEFT's model either"
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-3, atol=2e-5)


class _Around(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("where", ["beside", "around", "another model's"])
def test_hooks_after_a_step(where: str) -> None:
    """The modules around the norm are looked for once, and again where one has moved."""
    peft = adapted()
    ours = peftfast.patch(copy_of(peft))
    train_step(ours, inputs_of())
    record = ours.get_base_model().lm_head.__dict__["_peftfast_head"]
    found = record.around
    train_step(ours, inputs_of())
    assert record.around is found
    models = [peft, ours]
    if where == "another model's":
        models[1] = copy_of(ours)
    for model in models:
        norm = _norm(model)
        if where == "around":
            norm = model.get_base_model().model.norm = _Around(norm)
        norm.register_full_backward_hook(_tripled)
    expected, got = (train_step(model, inputs_of()) for model in models)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-3, atol=2e-5)
    assert (record.around is found) == (where != "around")


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_that_are_returned_have_gradients(family: str) -> None:
    peft = adapted(family)
    ours = peftfast.patch(copy_of(peft))
    found = []
    for model in (peft, ours):
        output = model(**inputs_of(family), output_hidden_states=True)
        last = output.hidden_states[-1]
        last.retain_grad()
        last.register_hook(lambda gradient: gradient * 2)
        (asked,) = torch.autograd.grad(output.loss, last, retain_graph=True)
        output.loss.backward()
        found.append([asked, last.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-5)


def test_hidden_states_by_the_configuration() -> None:
    peft = adapted()
    peft.get_base_model().config.output_hidden_states = True
    output = peftfast.patch(copy_of(peft))(**inputs_of())
    (asked,) = torch.autograd.grad(output.loss, output.hidden_states[-1])
    assert bool(asked.any())


def test_without_them_neither_side_of_the_norm_is_kept() -> None:
    """What this is for: one tensor of the norm's size, not two."""
    plain, watched = (peftfast.patch(adapted().train()) for _ in range(2))
    _norm(watched).register_forward_hook(lambda module, args, output: None)
    inputs = inputs_of(rows=4, columns=16)
    kept = []
    for model in (plain, watched):
        train_step(model, inputs)
        kept.append(saved_bytes(lambda m=model: m(**inputs).loss, exclude=model, at_end=True))
    assert kept[1] - kept[0] == 4 * 16 * 32 * 4


def test_a_hook_on_logits_after_the_loss_is_refused() -> None:
    output = peftfast.patch(adapted())(**inputs_of())
    with pytest.raises(RuntimeError, match="no gradient passes through them"):
        output.logits.register_hook(lambda gradient: gradient * 2)


def test_logits_of_a_frozen_adapter_that_changed_are_refused() -> None:
    model = adapted(target_modules=["q_proj", "lm_head"])
    adapters = [p for name, p in model.named_parameters() if "lm_head.lora" in name]
    for parameter in adapters:
        parameter.requires_grad_(False)
    output = peftfast.patch(model)(**inputs_of())
    with torch.no_grad():
        adapters[0].mul_(3)
    with pytest.raises(RuntimeError, match="a frozen parameter of it was changed in place"):
        output.logits.sum()


@pytest.mark.parametrize("read", [False, True])
def test_detached_logits_keep_no_graph(read: bool) -> None:
    model = peftfast.patch(adapted())
    seen: list[weakref.ref[Tensor]] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(weakref.ref(output.grad_fn))  # type: ignore[arg-type]

    model.get_base_model().model.layers[0].mlp.register_forward_hook(watch)
    output = model(**inputs_of())
    logits = output.logits.detach()
    if read:
        assert bool(logits.isfinite().all())
    assert seen[0]() is not None
    del output
    gc.collect()
    assert seen[0]() is None
    assert logits.shape == (2, 7, 60) and bool(logits.any())
