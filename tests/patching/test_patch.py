"""What patch and unpatch change, what they leave, and how they refuse."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from peftfast.ops import ImplUnavailable
from peftfast.patching import patch, report, unpatch
from tests.patching.tiny import (
    adapted,
    copy_of,
    fused_layers,
    inputs_of,
    layers_of,
    left_layers,
    lora_linears,
    total_hits,
)


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that patch must not change, by identity."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = (id(module), type(module), module.training)
        for name, value in module.__dict__.items():
            found[f"{path}:{name}"] = (id(value), len(value) if isinstance(value, dict) else 0)
    for name, parameter in model.named_parameters():
        found[f"{name}!"] = (id(parameter), parameter._version, parameter.requires_grad)
    return found


def test_only_classes_configs_records_and_the_owner_of_the_head_change() -> None:
    model = adapted()
    before, keys = anatomy(model), list(model.state_dict())
    classes = {path: type(module) for path, module in model.named_modules()}
    configs = {path: vars(module).get("config") for path, module in model.named_modules()}
    patch(model)
    after = anatomy(model)
    assert list(model.state_dict()) == keys
    for path, module in model.named_modules():
        assert isinstance(module, classes[path])
        record = after.pop(f"{path}:_peftfast", None) or after.pop(f"{path}:_peftfast_head", None)
        if record is None:
            continue
        attention = path.endswith("self_attn")
        assert (type(module) is classes[path]) is attention
        after[path] = (id(module), classes[path], module.training)
        if attention:
            assert isinstance(module.config, type(configs[path]))
            assert vars(module.config) is vars(configs[path])
            after[f"{path}:config"] = before[f"{path}:config"]
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert {name.partition(":")[0] for name in changed} == {"base_model.model"}
    own = {name.partition(":")[2] for name in changed}  # hooks, and the loss while compiling
    assert all("_forward_" in name or name == "_loss_function" for name in own), own
    for path, module in lora_linears(model).items():
        assert type(module) is not lora.Linear, path
    unpatch(model)
    assert anatomy(model) == before


def test_idempotent_both_ways() -> None:
    model = adapted()
    before = anatomy(model)
    patch(model)
    once = anatomy(model)
    model(**inputs_of())
    hits = total_hits(model)
    patch(model)
    assert anatomy(model) == once
    assert total_hits(model) == hits  # what was observed stays
    unpatch(unpatch(model))
    assert anatomy(model) == before


def test_one_model_of_two() -> None:
    """Nothing outside the patched instances changes: not PEFT's class, not another model."""
    forward = lora.Linear.forward
    model, other = adapted(), adapted("gpt2")
    untouched = anatomy(other)
    patch(model)
    model(**inputs_of())
    assert lora.Linear.forward is forward
    assert anatomy(other) == untouched
    assert all(type(module) is lora.Linear for module in lora_linears(other).values())
    assert not fused_layers(other)


def test_part_of_a_model() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[0]
    patch(layer)
    fused = {entry.path for entry in fused_layers(model)}
    assert len(fused) == 7
    assert all(".layers.0." in path for path in fused)
    model(**inputs_of())
    assert total_hits(model) == 7


def test_a_lone_module() -> None:
    module = next(iter(lora_linears(adapted()).values()))
    x = torch.randn(3, module.in_features)
    expected = module(x)
    patch(module)
    torch.testing.assert_close(module(x), expected)
    assert fused_layers(module)[0].hits == 1


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["q_proj"], 2),
        (["mlp.down_proj", "k_proj"], 4),
        (["*.layers.0.*"], 7),
        (("*_proj",), 14),
        ({"base_model.model.model.layers.1.self_attn.o_proj"}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:nothing was fused")
def test_exclude(exclude: Any, left: int) -> None:
    model = patch(adapted(), exclude=exclude)
    found, left_out = report(model), left_layers(model)
    assert len(left_out) == left
    assert len(layers_of(found.fused)) == 14 - left
    assert all("excluded by" in entry.reasons[0] for entry in left_out)
    others = [entry for entry in found.not_fused if entry not in left_out]
    if left == 14:
        why = {reason for entry in others for reason in entry.reasons}
        assert "no layer of a method around is fused" in why
        assert not found.fused
    else:
        assert all("excluded by" in entry.reasons[0] for entry in others)
    patch(model)  # without: takes them too
    assert len(fused_layers(model)) == 14
    patch(model, exclude=exclude)  # and back
    assert report(model).not_fused == found.not_fused
    unpatch(model)
    assert not any("_peftfast" in module.__dict__ for module in model.modules())


def test_reasons_are_of_the_last_call() -> None:
    model = adapted()
    path, module = next(iter(lora_linears(model).items()))
    patch(model, exclude=[path])
    module.base_layer.register_forward_hook(lambda *_: None)
    patch(model)
    (left,) = left_layers(model)
    assert left.reasons == ("the base layer has hooks",)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exclude": ["q_proj", "no_such"]}, ValueError, "'no_such' matches none of the 26"),
        ({"exclude": ["proj"]}, ValueError, "'proj' matches none"),
        ({"exclude": "q_proj"}, TypeError, "exclude is a str"),
        ({"exclude": 3}, TypeError, "exclude is a int"),
        ({"exclude": [3]}, TypeError, "exclude holds a int"),
        ({"impl": "cuda"}, ValueError, "'cuda'.*'reference'"),
        ({"impl": "triton"}, ImplUnavailable, "dtype torch.float64"),
        ({"impl": "triton", "verify": False}, ImplUnavailable, "dtype torch.float64"),
    ],
)
def test_bad_arguments_change_nothing(arguments: Any, error: type[Exception], message: str) -> None:
    model = adapted().double()  # which no kernel takes
    before = anatomy(model)
    with pytest.raises(error, match=message):
        patch(model, **arguments)
    assert anatomy(model) == before


@pytest.mark.parametrize("function", [patch, unpatch, report])
def test_not_a_module(function: Any) -> None:
    with pytest.raises(TypeError, match="model is a dict; a torch.nn.Module is needed"):
        function({"model": 1})


def test_impl_is_the_ones_asked_for_last() -> None:
    model = patch(adapted(), impl="reference")
    assert {entry.impl for entry in fused_layers(model)} == {"reference"}
    patch(model)
    assert {entry.impl for entry in fused_layers(model)} == {"auto"}


def test_impl_reaches_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftfast.patching import lora_call

    asked = []
    run = lora_call.lora_linear
    monkeypatch.setattr(
        lora_call,
        "lora_linear",
        lambda *a, impl, **k: (asked.append(impl), run(*a, impl=impl, **k))[1],
    )
    model = patch(adapted(), impl="reference", verify=False)
    model(**inputs_of())
    assert set(asked) == {"reference"}


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: adapted("llama", use_dora=True)])
def test_nothing_to_fuse(make: Any) -> None:
    model = make()
    before = anatomy(model)
    with pytest.warns(UserWarning, match="nothing was fused"):
        assert patch(model) is model
    assert not fused_layers(model)
    with pytest.raises(RuntimeError, match="strict: nothing was fused"):
        patch(model, strict=True)
    assert anatomy(model) == before


def test_strict_names_what_stands_in_the_way() -> None:
    model = adapted()
    modules = lora_linears(model)
    hooked, replaced = list(modules)[1], list(modules)[4]
    modules[hooked].base_layer.register_forward_hook(lambda *_: None)
    modules[replaced].forward = lambda x: x
    before = anatomy(model)
    with pytest.raises(RuntimeError) as caught:
        patch(model, strict=True)
    assert anatomy(model) == before
    assert f"{hooked}: the base layer has hooks" in str(caught.value)
    assert f"{replaced}: its forward was replaced on the instance" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3

    patch(model, strict=True, exclude=[hooked, replaced])  # left out on purpose
    assert len(fused_layers(model)) == 12


def test_strict_does_not_ask_for_the_impossible() -> None:
    """A kind of layer that no op serves is reported, and is no failure."""
    model = adapted("llama", target_modules=["q_proj", "embed_tokens"])
    patch(model, strict=True)
    found = report(model)
    assert len(layers_of(found.fused)) == 2
    assert [entry.type for entry in found.not_fused] == ["peft.tuners.lora.layer.Embedding"]


def test_hooks_on_a_module_fire_with_its_values() -> None:
    model = adapted()
    path, module = list(lora_linears(model).items())[2]
    seen: list[str] = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, y: seen.append("after"))
    module.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    module.register_forward_hook(lambda m, args, y: y * 2)
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        expected, got = peft(**inputs_of()), model(**inputs_of())
        seen.clear()
        torch.testing.assert_close(got.logits, expected.logits)
        got.loss.backward()
        assert seen == ["backward"]
    seen.clear()
    model(**inputs_of())
    assert seen == ["before", "after"]


def test_unknown_subclass_is_not_fused() -> None:
    class Other(lora.Linear):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(x, *args, **kwargs) + 1

    model = adapted()
    path, module = next(iter(lora_linears(model).items()))
    module.__class__ = Other
    peft = copy_of(model)
    patch(model)
    assert type(module) is Other
    (left,) = [e for e in report(model).not_fused if e.path == path]
    assert left.path == path
    assert "subclass of peft's lora.Linear" in left.reasons[0]
    torch.testing.assert_close(model(**inputs_of()).logits, peft(**inputs_of()).logits)


def test_forward_replaced_on_the_class_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library's patch of PEFT's class: not fused, whatever it computes."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)

    monkeypatch.setattr(lora.Linear, "forward", forward)
    model = adapted()
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(model)
    assert "lora.Linear.forward was replaced" in report(model).not_fused[0].reasons[0]


def test_class_derived_afterwards_by_other_code() -> None:
    """FSDP2 derives a class from each module's: unpatch can't take that away, and says so."""
    model = patch(adapted())
    module = next(iter(lora_linears(model).values()))
    module.__class__ = type("Derived", (type(module),), {})
    x = torch.randn(2, module.in_features)
    expected = lora.Linear.forward(module, x)
    torch.testing.assert_close(module(x), expected)
    assert fused_layers(model)[0].hits == 1
    with pytest.warns(UserWarning, match="Derived was derived"):
        unpatch(model)
    assert not fused_layers(model)
    assert torch.equal(module(x), expected)


def test_multihead_attention_is_not_called_through_its_projection() -> None:
    """PEFT merges the weights of its out_proj: a class swapped there would never run."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.up = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.attention(x, x, x)[0])

    model = get_peft_model(Block(), LoraConfig(target_modules=["attention", "up"], r=2))
    peft = copy_of(model)
    patch(model, strict=True)
    found = report(model)
    assert [entry.path.rpartition(".")[2] for entry in layers_of(found.fused)] == ["up"]
    reasons = {entry.path.rpartition(".")[2]: entry.reasons[0] for entry in found.not_fused}
    assert "never calls it" in reasons["out_proj"]
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(model(x), peft(x))


def test_patching_draws_no_random_numbers_and_keeps_modes() -> None:
    model = adapted("llama", lora_dropout=0.3)
    list(lora_linears(model).values())[0].train()
    modes = [module.training for module in model.modules()]
    versions = [parameter._version for parameter in model.parameters()]
    values = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model)
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter._version for parameter in model.parameters()] == versions
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
