"""accelerate's hooks, before and after patching: they run, and the fused op where it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import (
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from peft.tuners import lora
from torch import nn

from peftfast.patching import patch, report, unpatch
from tests.patching.tiny import (
    adapted,
    copy_of,
    fused_layers,
    inputs_of,
    layers_of,
    lora_linears,
    step_is_as_good,
)


def dispatched(model: Any) -> Any:
    """Every submodule placed on a device by a hook, as `device_map` with several GPUs does it."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True, main_device="cpu")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of()).logits


def clean(model: nn.Module) -> None:
    """No trace of patching, in bound methods neither."""
    for module in model.modules():
        assert "_peftfast" not in module.__dict__
        for name in ("forward", "_old_forward"):
            method = module.__dict__.get(name)
            assert getattr(method, "__func__", None) is not FUSED_FORWARD


from peftfast.patching.peft_lora import FusedLoraLinear  # noqa: E402

FUSED_FORWARD = FusedLoraLinear.forward


@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_device_map(first: str) -> None:
    model = adapted()
    peft = dispatched(copy_of(model))
    if first == "hooks":
        patch(dispatched(model), strict=True)
    else:
        dispatched(patch(model, strict=True))
    for _ in range(3):
        step_is_as_good(model, peft, inputs_of())
    assert all(e.hits == 3 and not e.delegations for e in fused_layers(model))
    expected = logits(peft)
    unpatch(model)
    clean(model)
    assert torch.equal(logits(model), expected)
    assert all(type(module) is lora.Linear for module in lora_linears(model).values())


@pytest.mark.parametrize("order", ["unpatch, remove", "remove, unpatch"])
@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_hooks_removed(first: str, order: str) -> None:
    model = adapted()
    expected = logits(model)
    if first == "hooks":
        patch(dispatched(model))
    else:
        dispatched(patch(model))
    for step in order.split(", "):
        if step == "remove":
            remove_hook_from_submodules(model)
            torch.testing.assert_close(logits(model), expected)
        else:
            unpatch(model)
    clean(model)
    assert torch.equal(logits(model), expected)
    patch(model, strict=True)  # accelerate leaves the bound forward on the instance
    torch.testing.assert_close(logits(model), expected)
    assert all(entry.hits == 1 for entry in fused_layers(model))


class Doubling(ModelHook):
    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output * 2


@pytest.mark.parametrize("first", ["hook", "patch"])
def test_hook_on_a_fused_module(first: str) -> None:
    model = adapted()
    peft = copy_of(model)
    path = list(lora_linears(model))[3]
    if first == "patch":
        patch(model, strict=True)
    for m in (model, peft):
        add_hook_to_module(lora_linears(m)[path], Doubling())
    if first == "hook":
        patch(model, strict=True)
    for _ in range(3):
        step_is_as_good(model, peft, inputs_of())
    assert all(entry.hits == 3 for entry in fused_layers(model))
    unpatch(model)
    assert torch.equal(logits(model), logits(peft))
    remove_hook_from_module(lora_linears(model)[path])
    remove_hook_from_module(lora_linears(peft)[path])
    assert torch.equal(logits(model), logits(peft))
    clean(model)


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("first", ["hook", "patch"])
def test_hook_on_a_child(first: str, part: str) -> None:
    """A hook that does anything keeps its module with PEFT."""
    model = adapted()
    peft = copy_of(model)
    path = list(lora_linears(model))[3]

    def child(m: Any) -> nn.Module:
        found = getattr(lora_linears(m)[path], part)
        return found if part == "base_layer" else found["default"]

    if first == "patch":
        patch(model, strict=True)
    for m in (model, peft):
        add_hook_to_module(child(m), Doubling())
    if first == "hook":
        patch(model)
    torch.testing.assert_close(logits(model), logits(peft))
    found = report(model)
    if first == "patch":
        (reason,) = {e.path: e.delegations for e in layers_of(found.fused)}[path]
    else:
        ((reason,),) = [entry.reasons for entry in found.not_fused]
    assert "has a forward of its own on the instance" in reason


@pytest.mark.parametrize("first", ["offload", "patch"])
def test_cpu_offload(first: str) -> None:
    """Each weight is on the meta device unless its module runs: PEFT's forward calls each."""
    model = adapted()
    expected = logits(model)
    if first == "patch":
        patch(model, strict=True)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if first == "offload":
        with pytest.warns(UserWarning, match="nothing was fused"):
            patch(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    found = report(model)
    if first == "patch":
        assert all(
            entry.hits == 0 and len(entry.delegations) == 1 for entry in layers_of(found.fused)
        )
        assert "has a forward of its own" in next(iter(layers_of(found.fused)[0].delegations))
        unpatch(model)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    else:
        assert all("has a forward of its own" in e.reasons[0] for e in found.not_fused)


def test_offload_of_whole_modules_at_a_time() -> None:
    """`preload_module_classes`: the module's own hook brings every weight in, so the op can run."""
    model = patch(adapted(), strict=True)
    expected = logits(model)
    cpu_offload(
        model, execution_device=torch.device("cpu"), preload_module_classes=["FusedLoraLinear"]
    )
    assert next(iter(lora_linears(model).values())).base_layer.weight.device.type == "meta"
    torch.testing.assert_close(logits(model), expected)
    assert all(entry.hits == 2 and not entry.delegations for entry in fused_layers(model))


def test_wrapped_by_other_code() -> None:
    """An unknown wrapper put there before: left alone. Put there after: it wraps the op."""
    model = adapted()
    module = next(iter(lora_linears(model).values()))
    inner = module.forward
    module.forward = lambda x: inner(x) + 1
    peft = copy_of(model)
    patch(model)
    (left,) = report(model).not_fused
    assert "its forward was replaced on the instance" in left.reasons[0]
    assert "test_wrapped_by_other_code" in left.reasons[0]
    del peft

    model = patch(adapted(), strict=True)
    module = next(iter(lora_linears(model).values()))
    x = torch.randn(2, 32)
    expected = module(x)
    inner = module.forward
    module.forward = lambda x: inner(x) + 1
    torch.testing.assert_close(module(x), expected + 1)
    assert fused_layers(model)[0].hits == 2
    unpatch(model)
    torch.testing.assert_close(module(x), expected + 1)
