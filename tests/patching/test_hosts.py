"""The project's own adapters under patch: counted, told which implementation, and what surrounds
them is rewired as around LoRA layers.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peftfast.memory import saved_bytes
from peftfast.methods import (
    AdapterHost,
    CompacterConfig,
    Component,
    HoulsbyConfig,
    MethodConfig,
    ParallelAdapterConfig,
    PfeifferConfig,
    UnifiedConfig,
    hosts,
)
from peftfast.nn import BottleneckAdapter, KroneckerAdapter
from peftfast.ops.dispatch import ImplUnavailable
from peftfast.patching import patch, report, unpatch
from peftfast.patching.state import state_of
from tests.patching.hosts import adapters, with_method
from tests.patching.tiny import FAMILIES, copy_of, inputs_of, step_is_as_good


def unified() -> MethodConfig:
    heads = Component("attention_heads", insertion="parallel", bottleneck=3, norm="layer", depth=2)
    hidden = Component("ffn_hidden", bottleneck=4, form="silu", norm="rms", gate=True)
    leaving = Component("attention_output", bottleneck=5, learned_scaling=True, scaling=2.0)
    return UnifiedConfig(components=[heads, hidden, leaving])


CASES = [
    ("llama", lambda: HoulsbyConfig(bottleneck=4)),
    ("llama", lambda: ParallelAdapterConfig(bottleneck=4)),
    ("llama", unified),
    ("phi3", unified),
    ("bert", lambda: HoulsbyConfig(bottleneck=4, task_type="SEQ_CLS")),
    ("gpt2", lambda: CompacterConfig(bottleneck=4)),
    ("t5", lambda: PfeifferConfig(bottleneck=4, norm="layer")),
    ("qwen3_moe", lambda: HoulsbyConfig(bottleneck=4)),
]
MLPS = ("llama", "phi3", "t5")


@pytest.mark.parametrize(("family", "make"), CASES)
def test_a_step_with_what_surrounds_them_rewired(family: str, make: Any) -> None:
    plain = with_method(make(), family)
    model = patch(copy_of(plain), strict=True)
    inputs = inputs_of(family, columns=12)
    step_is_as_good(model, plain, inputs)
    found = report(model)
    served = {one.path: one for one in found.fused if one.op == "bottleneck"}
    assert served.keys() == adapters(model).keys() and served
    assert all(one.hits == 1 and not one.delegations for one in served.values())
    assert {one.op for one in found.fused} >= {"sdpa", "bottleneck"}
    assert ("gated_activation" in {one.op for one in found.fused}) == (family in MLPS)
    assert not [one for one in found.fused if one.delegations and one.op != "linear_cross_entropy"]
    assert not [one for one in found.not_fused if "AdapterHost" in one.type]
    inside = tuple(f"{path}." for path in served)
    assert not [one for one in found.fused + found.not_fused if one.path.startswith(inside)]
    ours, theirs = (
        saved_bytes(lambda m=m: m(**inputs).loss, exclude=m, at_end=True) for m in (model, plain)
    )
    assert ours <= theirs


def test_unpatch_gives_everything_back() -> None:
    model = with_method(unified())
    kinds = {path: type(m) for path, m in model.named_modules()}
    attributes = {path: dict(m.__dict__) for path, m in model.named_modules()}
    keys = list(model.state_dict())
    patch(model, impl="reference")
    assert {m.impl for m in adapters(model).values()} == {"reference"}
    assert list(model.state_dict()) == keys and isinstance(model, PeftModel)
    unpatch(model)
    assert {path: type(m) for path, m in model.named_modules()} == kinds
    assert {m.impl for m in adapters(model).values()} == {"auto"}
    assert {path: dict(m.__dict__) for path, m in model.named_modules()} == attributes


def test_an_adapter_by_itself_keeps_its_own_implementation() -> None:
    model = nn.Sequential(BottleneckAdapter(8, 3, impl="reference"), KroneckerAdapter(8, 4))
    patch(model, strict=True)
    assert [m.impl for m in model] == ["reference", "auto"]
    patch(model, impl="native")
    assert [m.impl for m in model] == ["native", "native"]
    model[1].impl = "reference"
    assert [one.impl for one in report(model).fused] == ["native", "native"]
    x = torch.randn(2, 5, 8)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x), model(x))
        assert [one.hits for one in report(copied).fused] == [1, 1]
        assert [m.impl for m in unpatch(copied)] == ["reference", "reference"]
        assert [type(m) for m in copied] == [BottleneckAdapter, KroneckerAdapter]
    with pytest.raises(ImplUnavailable, match="float64"):
        patch(nn.Sequential(BottleneckAdapter(8, 3, dtype=torch.float64)), impl="triton")


def test_residuals_and_compiled_calls() -> None:
    own = BottleneckAdapter(8, 3)
    module = patch(copy.deepcopy(own))
    x, residual = torch.randn(2, 4, 8)
    for given in (True, False, residual):
        assert torch.equal(module(x, residual=given), own(x, given))
    assert state_of(module).hits == 3
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, residual), own(x, residual))
    assert state_of(module).hits == 3


class Other(BottleneckAdapter):
    def forward(self, x: Tensor, residual: bool | Tensor = True) -> Tensor:
        return super().forward(x, residual) + 1


def test_what_is_not_the_adapters_own_forward_is_not_counted() -> None:
    replaced = BottleneckAdapter(8, 3)
    replaced.forward = lambda x: x  # type: ignore[method-assign,assignment]
    model = nn.ModuleList([Other(8, 3), replaced])
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(model)
    first, second = report(model).not_fused
    assert "is a subclass of peftfast's BottleneckAdapter" in first.reasons[0]
    assert "its forward was replaced on the instance" in second.reasons[0]


def test_several_adapters_and_none() -> None:
    model = with_method(HoulsbyConfig(bottleneck=4, train_norms=False))
    model.add_adapter("other", PfeifferConfig(bottleneck=3))
    plain = copy_of(model)
    patch(model)
    inputs = inputs_of()

    def ran() -> dict[str, int]:
        found: dict[str, int] = {}
        for one in report(model).fused:
            if one.op == "bottleneck":
                name = one.path.rpartition(".")[2]
                found[name] = found.get(name, 0) + one.hits
        return found

    for m in (model, plain):
        m.set_adapter("other")
    torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss)
    assert ran() == {"default": 0, "other": 2}
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss)
    assert ran() == {"default": 0, "other": 2}
    model.delete_adapter("other")
    model.add_adapter("late", PfeifferConfig(bottleneck=3))
    (left,) = {one.reasons for one in report(model).not_fused}
    assert left == ("added after patch; call peftfast.patch again",)
    assert all(state_of(m) is not None for m in adapters(patch(model)).values())


def test_a_dropout_that_an_adapter_is_on() -> None:
    config = FAMILIES["bert"].make().config
    config.hidden_dropout_prob = 0.2
    base = type(FAMILIES["bert"].make())(config)
    model = patch(with_method(HoulsbyConfig(bottleneck=4), base)).train()
    assert any(isinstance(host.base_layer, nn.Dropout) for host in hosts(model))
    model(**inputs_of("bert")).loss.backward()
    dropouts = [one for one in report(model).fused if one.op == "dropout"]
    hosted = [one for one in dropouts if one.path.endswith(".dropout.base_layer")]
    assert len(hosted) == 4 and all(one.hits == 1 for one in hosted)
    assert all(p.grad is not None for m in adapters(model).values() for p in m.parameters())


class GatedMLP(nn.Module):
    """With a dropout, before the last linear or after it, that a host is around."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down, self.act = nn.Linear(12, 8), nn.SiLU()
        self.drop, self.after = AdapterHost(nn.Dropout(0.5), None), after

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.gate(x)) * self.up(x)
        y: Tensor = self.drop(self.down(h)) if self.after else self.down(self.drop(h))
        return y


class Model(nn.Module):
    def __init__(self, after: bool) -> None:
        super().__init__()
        self.lora, self.mlp = nn.Linear(8, 8), GatedMLP(after)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.lora(x))
        return y


@pytest.mark.parametrize("after", [True, False])
def test_a_host_in_a_gated_mlp(after: bool) -> None:
    model = patch(get_peft_model(Model(after), LoraConfig(target_modules=["lora"])).eval())
    plain = copy_of(model)
    unpatch(plain)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), plain(x))
    ops = {one.path.rpartition(".")[2]: one.op for one in report(model).fused}
    assert ops.get("mlp") == ("gated_activation" if after else None)
    assert ops["base_layer"] == "dropout" and ops.get("act") == (None if after else "activation")
