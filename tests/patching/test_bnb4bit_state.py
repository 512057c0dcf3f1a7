"""What a patched 4-bit linear keeps of its weight, when it looks again, and what it refuses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peftfast.ops.nf4 import NF4Weight
from peftfast.patching import patch, unpatch
from peftfast.patching.state import state_of
from tests.patching.quantised import HALF, linear4bit, linears4bit
from tests.patching.tiny import copy_of, fused_layers, randomise

KINDS = ["lora", "plain"]


def one(kind: str, **settings: Any) -> Any:
    """A single 4-bit linear, under LoRA or alone."""
    torch.manual_seed(0)
    settings.setdefault("compute_dtype", torch.float32)
    model: Any = nn.Sequential(linear4bit(nn.Linear(64, 128), **settings))
    if kind == "lora":
        model.is_loaded_in_4bit = True
        model = randomise(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
    return model.eval()


def pair(kind: str, **settings: Any) -> tuple[Any, Any]:
    model = one(kind, **settings)
    own = copy_of(model)
    return patch(model, strict=True), own


def base_of(model: Any) -> Any:
    return next(iter(linears4bit(model).values()))


def fused_module(model: Any) -> Any:
    return next(m for m in model.modules() if state_of(m) is not None)


def delegations(model: Any) -> dict[str, int]:
    return fused_layers(model)[0].delegations


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each time that a weight's values are looked at."""
    found: list[None] = []
    look = NF4Weight.from_bnb.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(None)
        return look(cls, *args, **kwargs)

    monkeypatch.setattr(NF4Weight, "from_bnb", classmethod(counted))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_looked_at_once(kind: str, looks: list[None]) -> None:
    model, own = pair(kind)
    looks.clear()
    x = torch.randn(3, 64)
    for _ in range(4):
        torch.testing.assert_close(model(x), own(x))
    assert not looks  # patch has looked


def moved(m: Any) -> None:
    m.to("cpu").to(torch.device("cpu"))
    m.half().float()


def replaced_parameter(m: Any) -> None:
    base = base_of(m)
    torch.manual_seed(3)
    base.weight = linear4bit(nn.Linear(64, 128)).weight


def replaced_data(m: Any) -> None:
    base_of(m).weight.data = base_of(m).weight.data.flip(0).contiguous()


def replaced_scales(m: Any) -> None:
    state = base_of(m).weight.quant_state
    state.absmax = state.absmax.flip(0).contiguous()


def replaced_second_scales(m: Any) -> None:
    state = base_of(m).weight.quant_state
    state.state2.absmax = state.state2.absmax * 2


def replaced_quant_state(m: Any) -> None:
    torch.manual_seed(3)
    base_of(m).weight.quant_state = linear4bit(nn.Linear(64, 128)).weight.quant_state


def written_scales(m: Any) -> None:
    base_of(m).weight.quant_state.state2.absmax.mul_(2)


def written_offset(m: Any) -> None:
    base_of(m).weight.quant_state.offset.add_(0.5)


CHANGES = {
    moved: False,
    replaced_parameter: True,
    replaced_data: True,
    replaced_scales: True,
    replaced_second_scales: True,
    replaced_quant_state: True,
    written_scales: True,
    written_offset: True,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_looked_at_again(
    change: Callable[[Any], None], kind: str, looks: list[None]
) -> None:
    model, own = pair(kind)
    x = torch.randn(3, 64)
    before = model(x)
    looks.clear()
    for m in (model, own):
        change(m)
    for _ in range(2):
        torch.testing.assert_close(model(x), own(x), rtol=1e-5, atol=1e-5)
    assert len(looks) == 1
    assert torch.allclose(model(x), before, atol=1e-2) is not CHANGES[change]
    assert fused_layers(model)[0].hits == 4
    assert not delegations(model)


def test_packed_values_written_in_place_are_seen(looks: list[None]) -> None:
    """As by load_state_dict: the memory is the parameter's own."""
    model, own = pair("plain")
    model(torch.randn(3, 64))
    looks.clear()
    for m in (model, own):
        with torch.no_grad():
            base_of(m).weight.copy_(base_of(m).weight.flip(0))
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), own(x))
    assert not looks


@pytest.mark.parametrize("kind", KINDS)
def test_no_memory_is_kept_that_the_layer_has_given_up(kind: str) -> None:
    model, _ = pair(kind)
    model(torch.randn(3, 64))
    checked = state_of(fused_module(model)).checked
    old = weakref.ref(checked.outcome.packed)
    del checked
    base_of(model).weight = linear4bit(nn.Linear(64, 128)).weight
    gc.collect()
    assert old() is None  # no call has come since
    model(torch.randn(3, 64))
    old = weakref.ref(state_of(fused_module(model)).checked.outcome.packed)
    model.to(torch.float64).float()
    assert old() is None
    model(torch.randn(3, 64))
    old = weakref.ref(state_of(fused_module(model)).checked.outcome.packed)
    unpatch(model)
    assert old() is None


def test_another_parameter_over_the_same_memory() -> None:
    """The end of the one that is in use is waited for, not of the one that was."""
    model, own = pair("plain")
    first = base_of(model).weight
    base_of(model).weight = bnb.nn.Params4bit(
        first.data, quant_state=first.quant_state, bnb_quantized=True
    )
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), own(x))
    old = weakref.ref(state_of(fused_module(model)).checked.outcome.packed)
    base_of(model).weight = linear4bit(nn.Linear(64, 128)).weight
    gc.collect()
    assert old() is None
    assert first.numel()  # and the one that was is still there


# Weights that are not as they should be


def truncated_scales(state: Any) -> None:
    state.absmax = state.absmax[:-1]


def wrong_dtype(state: Any) -> None:
    state.absmax = state.absmax.float()


def wrong_code(state: Any) -> None:
    state.code = state.code.flip(0)


def code_written(state: Any) -> None:
    state.code[3] = 0.77


def not_finite(state: Any) -> None:
    state.state2.absmax[0] = float("nan")


def other_nesting(state: Any) -> None:
    state.state2.blocksize = 128


def transposed(state: Any) -> None:
    state.shape = torch.Size((64, 128))


def other_dimensions(state: Any) -> None:
    state.shape = torch.Size((2, 64, 64))


def truncated_data(state: Any) -> None:
    state.shape = torch.Size((130, 64))


DAMAGES: dict[Callable[[Any], None], str] = {
    truncated_scales: r"absmax is \[127\]; \[128\] is needed",
    wrong_dtype: "absmax is torch.float32; torch.uint8",
    wrong_code: "quant_state.code is not the table of nf4",
    code_written: "quant_state.code is not the table of nf4",
    not_finite: "nested_absmax is not finite",
    other_nesting: "blocks of 128; 256 is needed",
    transposed: r"was quantised as \[64, 128\]; \[out, in\] is \[128, 64\]",
    other_dimensions: r"was quantised as \[2, 64, 64\]",
    truncated_data: r"packed is \[4096\]; \[4160\] is needed",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_weight_reaches_no_op(
    damage: Callable[[Any], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged before patching, it is not fused; afterwards, its call is left to bitsandbytes."""
    model = one(kind)
    damage(base_of(model).weight.quant_state)
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(model)
    with pytest.raises(RuntimeError, match=DAMAGES[damage]):
        patch(model, strict=True)

    model, _ = pair(kind)
    x, asked = torch.randn(3, 64), []

    def product(x: Tensor, *_: Any, **__: Any) -> Tensor:
        asked.append(None)  # in place of bitsandbytes' own, which may read beyond the end
        return x.new_zeros(3, 128)

    monkeypatch.setattr(bnb, "matmul_4bit", product)
    model(x)
    assert not asked
    damage(base_of(model).weight.quant_state)
    model(x)
    assert len(asked) == 1
    assert fused_layers(model)[0].hits == 1
    assert sum(delegations(model).values()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_not_quantised_yet(kind: str) -> None:
    """Params4bit quantises when it is moved to a device."""
    model: Any = nn.Sequential(bnb.nn.Linear4bit(64, 128, quant_type="nf4"))
    if kind == "lora":
        model.is_loaded_in_4bit = True
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="not quantised yet"):
        patch(model)
    model.to("cpu")
    own = copy_of(model)
    patch(model, strict=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), own(x))


def plain_parameter(m: Any) -> None:
    base_of(m).weight = nn.Parameter(base_of(m).weight.data, requires_grad=False)


def no_state(m: Any) -> None:
    base_of(m).weight.quant_state = None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [plain_parameter, no_state])
def test_a_lost_quant_state_comes_back(loss: Callable[[Any], None], kind: str) -> None:
    """The linear has kept it; bitsandbytes' own forward makes a parameter of its kind again."""
    x = torch.randn(3, 64)
    model, own = pair(kind)
    for m in (model, own):
        loss(m)
    torch.testing.assert_close(model(x), own(x))
    assert not delegations(model)
    assert type(base_of(model).weight) is type(base_of(own).weight) is bnb.nn.Params4bit

    for m in (unpatch(model), own):
        loss(m)
    lost = base_of(model).weight
    patch(model, strict=True)
    assert base_of(model).weight is lost
    assert getattr(lost, "quant_state", None) is None
    torch.testing.assert_close(model(x), own(x))
    assert fused_layers(model)[0].hits == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_of_another_kind(kind: str) -> None:
    class Sharded(nn.Parameter):
        pass

    model, _ = pair(kind)
    base_of(model).weight = Sharded(base_of(model).weight.data, requires_grad=False)
    model(torch.randn(3, 64))
    ((reason, _),) = delegations(model).items()
    assert reason.endswith("weight is a Sharded")


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind: str) -> None:
    model, own = pair(kind)
    x = torch.randn(3, 64, dtype=torch.float64)
    assert torch.equal(model(x), own(x))
    assert delegations(model) == {"the input is torch.float64, over a 4-bit weight": 1}


def test_compute_dtype_that_no_op_has() -> None:
    model = one("plain", compute_dtype=torch.float64)
    with pytest.warns(UserWarning, match="is to be computed with in torch.float64"):
        patch(model)


def test_inputs_as_wide_as_the_output() -> None:
    """bitsandbytes takes such a weight for a transposed one."""
    model, own = pair("plain")
    for m in (model, own):
        base_of(m).bias = None
    x = torch.randn(3, 128)
    with pytest.warns(DeprecationWarning, match="matmul_4bit"):
        assert torch.equal(model(x), own(x))
    assert delegations(model) == {
        "the input has as many features as the base layer puts out": 1,
    }
    with pytest.raises(ValueError, match="64 in one, 65 in the other"):
        model(torch.randn(3, 65))


# bitsandbytes' other packing, for inference on a CPU with avx512_bf16


def supported(*models: Any) -> None:
    """As on such a CPU: in evaluation mode bitsandbytes' forward repacks the weight in place."""
    for model in models:
        base_of(model).support_avx512bf16_for_cpu = True


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_layer_is_not_repacked(kind: str) -> None:
    model = one(kind, compute_dtype=HALF)
    own = copy_of(model).train()
    supported(model, own)
    weight = base_of(model).weight.data
    patch(model, strict=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), own(x), rtol=1e-2, atol=1e-2)
    assert base_of(model).weight.data.data_ptr() == weight.data_ptr()
    assert not getattr(base_of(model).weight.quant_state, "packing_format_for_cpu", False)
    assert fused_layers(model)[0].hits == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_was_repacked(kind: str) -> None:
    """Left to bitsandbytes until the layer's state_dict has turned it back."""
    model, own = pair(kind, compute_dtype=HALF)
    for m in (model, own):
        weight = base_of(m).weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
            weight.data, weight.quant_state
        )
    x = torch.randn(3, 64)
    assert torch.equal(model(x), own(x))
    ((reason, _),) = delegations(model).items()
    assert "weight is in bitsandbytes' packing for CPUs" in reason
    with pytest.raises(RuntimeError, match="packing for CPUs"):
        patch(own, strict=True)
    for m in (model, own):
        base_of(m).state_dict()
    torch.testing.assert_close(model(x), own(x), rtol=1e-2, atol=1e-2)
    assert fused_layers(model)[0].hits == 1


def test_disabled_adapters_repack_as_bitsandbytes_does() -> None:
    model, own = pair("lora", compute_dtype=HALF)
    supported(model, own)
    x = torch.randn(3, 64)
    with model.disable_adapter(), own.disable_adapter():
        assert torch.equal(model(x), own(x))
    assert torch.equal(model(x), own(x))
    assert len(delegations(model)) == 2
