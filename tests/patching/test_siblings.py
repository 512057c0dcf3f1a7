"""Siblings are learned, computed in one call, and what is handed out is checked first."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peftfast.patching import patch, report
from peftfast.patching.state import state_of
from tests.patching.attention import Counted, attention, block, group_of, observed, same, waiting
from tests.patching.tiny import (
    adapted,
    copy_of,
    fused_layers,
    inputs_of,
    layers_of,
    lora_linears,
    randomise,
)


def test_learned_at_the_first_forward(calls: Counted) -> None:
    model, peft, x = attention()
    model(x)
    assert calls.take() == (4, 0)
    same(model, peft, x)
    assert calls.take() == (1, 1)
    found = {entry.path[-1]: [p[-1] for p in entry.siblings] for entry in fused_layers(model)}
    assert found == {"q": ["q", "k", "v"], "k": ["q", "k", "v"], "v": ["q", "k", "v"], "o": []}
    assert [state_of(getattr(block(model), n)).shared for n in "qkvo"] == [0, 1, 1, 0]
    assert waiting(model) == 0


def test_only_wrapped_ones(calls: Counted) -> None:
    model, peft, x = observed("qv")
    calls.take()
    same(model, peft, x)
    assert calls.take() == (0, 1)
    model, peft, x = observed("qo")  # two wrapped ones with inputs of their own
    calls.take()
    same(model, peft, x)
    assert calls.take() == (2, 0)
    assert state_of(block(observed("q")[0]).q).siblings is None


def test_a_sibling_patched_later(calls: Counted) -> None:
    model, peft, x = observed("qk")
    model(x)
    assert len(group_of(model).members) == 2
    for m in (model, peft):
        torch.manual_seed(1)
        m.add_adapter("wide", LoraConfig(r=2, target_modules=list("qkv")))
        randomise(m)
        m.set_adapter("wide")
    patch(model, strict=True)
    model(x)
    model(x)
    calls.take()
    same(model, peft, x)
    assert calls.take() == (0, 1)
    assert len(group_of(model).members) == 3


def test_two_groups_of_one_parent(calls: Counted) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x) * self.b(x)
            return self.c(h) * self.d(h)

    model = randomise(get_peft_model(Layer(), LoraConfig(target_modules=list("abcd"))))
    peft = copy_of(model)
    patch(model)
    x = torch.randn(3, 16, requires_grad=True)
    model(x)
    model(x)
    calls.take()
    same(model, peft, x)
    assert calls.take() == (0, 2)


@pytest.mark.parametrize("names", ["default", ["default", "second"], ["second"]])
def test_adapters_of_different_shape(names: Any) -> None:
    model, peft, x = observed("qkvo", rank_pattern={"k": 5}, lora_bias=True)
    for m in (model, peft):
        torch.manual_seed(4)
        m.add_adapter("second", LoraConfig(r=3, target_modules=["q", "k", "v"]))
        randomise(m)
        m.base_model.set_adapter(names)
    same(model, peft, x)
    assert group_of(model).active


def test_not_where_a_member_has_no_adapter_or_is_merged(calls: Counted) -> None:
    model, peft, x = observed()
    for m in (model, peft):
        block(m).k.merge()
    calls.take()
    same(model, peft, x)
    assert calls.take() == (3, 0)
    for m in (model, peft):
        block(m).k.unmerge()
    same(model, peft, x)
    assert calls.take() == (1, 1)
    assert not group_of(model).stopped


def between_inplace(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        x.mul_(2.0)


def between_scaling(model: Any, x: Tensor) -> None:
    block(model).k.scaling["default"] *= 3


def between_weight(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        block(model).v.base_layer.weight.mul_(2)


def between_lora_a(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        block(model).k.lora_A["default"].weight.add_(1)


def between_new_parameter(model: Any, x: Tensor) -> None:
    adapter = block(model).k.lora_B["default"]
    new = nn.Parameter(torch.ones(16, 2))
    with torch.no_grad():
        while new._version < adapter.weight._version:  # as many changes in place, by chance
            new.mul_(1.0)
    adapter.weight = new


def between_freeze(model: Any, x: Tensor) -> None:
    block(model).k.lora_A["default"].weight.requires_grad_(False)


def between_dropout(model: Any, x: Tensor) -> None:
    block(model).k.lora_dropout["default"] = nn.Dropout(1.0)


def between_disabled(model: Any, x: Tensor) -> None:
    block(model).k.enable_adapters(False)


def between_merge(model: Any, x: Tensor) -> None:
    if not block(model).v.merged:
        block(model).v.merge()


def between_hook(model: Any, x: Tensor) -> None:
    block(model).k.base_layer.register_forward_hook(lambda _, __, y: y * 2)


def between_pre_hook(model: Any, x: Tensor) -> None:
    if not block(model).k._forward_pre_hooks:
        block(model).k.register_forward_pre_hook(lambda _, args: (args[0] * 2,))


CHANGES = {
    between_inplace: "the input was changed in place",
    between_scaling: "a weight or an adapter changed",
    between_weight: "a weight or an adapter changed",
    between_lora_a: "a weight or an adapter changed",
    between_new_parameter: "a weight or an adapter changed",
    between_freeze: "a weight or an adapter changed",
    between_dropout: "a weight or an adapter changed",
    between_pre_hook: "the calls did not see one input",
    between_disabled: "",
    between_merge: "",
    between_hook: "",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_the_calls_is_seen(change: Callable[[Any, Tensor], None]) -> None:
    """Whatever happens after q's call, k and v are computed from what is there at theirs."""
    model, peft, _ = observed()
    models = (model, copy.deepcopy(peft))
    for m in models:
        block(m).between = lambda x, m=m: change(m, x)  # type: ignore[misc]
        if change is between_dropout:
            block(m).train()
    x = torch.randn(5, 16)
    got, expected = (m(x.clone()) for m in models)
    torch.testing.assert_close(got, expected)
    for y in (got, expected):
        if change not in (
            between_inplace,
            between_weight,
            between_lora_a,
        ):  # autograd refuses those
            y.sum().backward()
    assert CHANGES[change] in group_of(model).stopped
    assert bool(group_of(model).stopped) == bool(CHANGES[change])
    del got, expected, y
    gc.collect()
    assert waiting(model) == 0


def test_given_up_for_good(calls: Counted) -> None:
    model, peft, x = observed()
    block(model).between = lambda x: between_scaling(model, x)
    model(x)
    block(model).between = lambda x: None
    block(model).k.scaling["default"] = block(peft).k.scaling["default"]
    calls.take()
    for _ in range(3):
        same(model, peft, x)
    assert calls.take() == (12, 0)
    notes = {entry.path[-1]: entry.note for entry in fused_layers(model)}
    assert "siblings given up: a weight or an adapter changed" in notes["q"]
    assert "siblings" not in notes["o"]


def test_grad_mode_changed_between_the_calls() -> None:
    model, peft, x = observed()
    with torch.no_grad():
        first = block(model).q(x)
    assert block(model).k(x).grad_fn is not None
    assert "grad mode" in group_of(model).stopped

    model, _, x = observed()
    first = block(model).q(x)
    with torch.no_grad():
        assert block(model).k(x).grad_fn is None
    assert "grad mode" in group_of(model).stopped

    model, _, x = observed()
    y = x.detach()
    first = block(model).q(y)
    y.requires_grad_()
    block(model).k(y).sum().backward()
    assert y.grad is not None
    del first


def test_autocast_changed_between_the_calls() -> None:
    model, _, x = observed()
    first = block(model).q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(model).k(x).dtype == torch.bfloat16
    assert first.dtype == torch.float32
    assert "autocast" in group_of(model).stopped
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, peft, x = observed()
        torch.testing.assert_close(model(x), peft(x), rtol=0.05, atol=0.05)
        assert group_of(model).active
        assert waiting(model) == 0


def test_inference_mode_is_left_out(calls: Counted) -> None:
    """An inference tensor has no version: a change in place would not be seen."""
    model, peft, x = observed()
    calls.take()
    with torch.inference_mode():
        y = torch.randn(5, 16)
        for m in (model, peft):
            block(m).between = lambda x: x.mul_(2.0)
        torch.testing.assert_close(model(y.clone()), peft(y.clone()))
    assert calls.take() == (4, 0)
    for m in (model, peft):
        block(m).between = lambda x: None
    same(model, peft, x)
    assert calls.take() == (1, 1)


def test_no_grad(calls: Counted) -> None:
    model, peft, x = observed()
    calls.take()
    with torch.no_grad():
        torch.testing.assert_close(model(x), peft(x))
    assert calls.take() == (1, 1)
    assert waiting(model) == 0


def test_outputs_may_be_changed_in_place() -> None:
    model, peft, x = observed()
    results = []
    for m in (model, peft):
        b = block(m)
        m.zero_grad()
        q, k, v = b.q(x), b.k(x), b.v(x)
        q.mul_(2).add_(k)
        k.relu_()
        v[1:] = 0
        (q * k + v).sum().backward()
        results.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected)


def test_a_member_called_again() -> None:
    """Weight sharing: the second call with the same input is computed anew."""
    model, peft, x = observed()
    results = []
    for m in (model, peft):
        b = block(m)
        results.append(b.q(x) + b.k(x) + b.k(x) + b.v(x) + b.q(x) + b.k(x))
    torch.testing.assert_close(*results)
    gc.collect()


@pytest.mark.parametrize("backward", [False, True])
def test_hooks_on_members_fire_with_their_values(backward: bool) -> None:
    """torch hands each module with a backward hook a tensor of its own: no siblings there."""
    model, peft, x = observed()
    seen: dict[str, list[Tensor]] = {"got": [], "expected": []}
    for m, name in ((model, "got"), (peft, "expected")):
        block(m).q.register_forward_pre_hook(lambda _, a, n=name: seen[n].append(a[0].detach()))
        for child in "qkv":
            module = getattr(block(m), child)
            module.register_forward_hook(lambda _, a, y, n=name: seen[n].append(y.detach()))
            if backward:
                module.register_full_backward_hook(
                    lambda _, dx, dy, n=name: seen[n].extend(dx + dy)
                )
        m(x).sum().backward()
    assert len(seen["got"]) == (10 if backward else 4)
    for got, expected in zip(seen["got"], seen["expected"], strict=True):
        torch.testing.assert_close(got, expected)
    assert bool(group_of(model).stopped) is backward


def test_a_member_with_a_pre_hook_is_computed_after_it(calls: Counted) -> None:
    """What a pre-hook writes through `.data`, no version tells."""
    model, peft, x = observed()

    def shift(module: Any, _: Any) -> None:
        module.base_layer.weight.data.add_(1.0)

    for m in (model, peft):
        block(m).k.register_forward_pre_hook(shift)
    calls.take()
    torch.testing.assert_close(model(x), peft(x))
    assert calls.take() == (4, 0)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_in_families_every_group_is_used(family: str, calls: Counted) -> None:
    model = adapted(family)
    patch(model, verify=False)
    model(**inputs_of(family))
    model(**inputs_of(family))
    calls.take()
    model(**inputs_of(family))
    alone, grouped = calls.take()
    found = report(model)
    groups = {entry.siblings for entry in layers_of(found.fused) if entry.siblings}
    assert grouped == len(groups) > 0
    assert alone == len(lora_linears(model)) - sum(len(group) for group in groups)
