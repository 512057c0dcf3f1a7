"""What PEFT, bitsandbytes and torch do with a QLoRA model, done to a patched one and its copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_and_replace

from peftfast.patching import patch, report, unpatch
from tests.patching.quantised import (
    HALF,
    adapted_linears,
    base_model,
    linear4bit,
    linears4bit,
    qlora,
    step_is_as_good,
)
from tests.patching.tiny import FAMILIES, copy_of, fused_layers, inputs_of, randomise

TARGETS = list(FAMILIES["llama"].targets)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merge lora module", "ignore:Unmerge lora module", "ignore:Already"
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of()).logits


def same(model: Any, peft: Any) -> None:
    torch.testing.assert_close(logits(model), logits(peft), rtol=1e-4, atol=1e-5)


def both(**settings: Any) -> tuple[Any, Any]:
    """A patched model with a plain 4-bit linear a layer and two adapters, and its copy."""
    narrow = [name for name in TARGETS if name != "o_proj"]
    settings = {"compute_dtype": torch.float32, "lora": {"target_modules": narrow}, **settings}
    model = qlora("qwen2", **settings)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=narrow))
    randomise(model)
    peft = copy_of(model)
    return patch(model, strict=True), peft


def on_both(models: tuple[Any, Any], change: Callable[[Any], Any]) -> None:
    for model in models:
        change(model)


def all_fused(model: Any) -> bool:
    return all(not entry.delegations for entry in fused_layers(model))


def numbers(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_only_classes_change_and_come_back() -> None:
    model, peft = both()
    before = {path: (id(m), type(m)) for path, m in peft.named_modules()}
    assert equal(numbers(model), numbers(peft))
    for path, module in model.named_modules():
        assert isinstance(module, before[path][1])
    parameters = [id(p) for p in model.parameters()]
    unpatch(model)
    assert [type(m) for m in model.modules()] == [kind for _, kind in before.values()]
    assert [id(p) for p in model.parameters()] == parameters
    assert not any("_peftfast" in m.__dict__ for m in model.modules())
    assert torch.equal(logits(model), logits(peft))


def test_patching_changes_nothing_else() -> None:
    model = qlora("qwen2", compute_dtype=HALF, lora={"lora_dropout": 0.2}).train()
    base = next(iter(linears4bit(model).values()))
    base.eval()
    flags = [m.training for m in model.modules()]
    versions = [p._version for p in model.parameters()]
    attributes = {name: id(value) for name, value in vars(base).items()}
    statistics = {name: id(value) for name, value in vars(base.weight.quant_state).items()}
    state, values = torch.get_rng_state(), numbers(model)
    patch(model, strict=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert [p._version for p in model.parameters()] == versions
    assert {name: id(value) for name, value in vars(base).items()} == attributes
    found = {name: id(value) for name, value in vars(base.weight.quant_state).items()}
    assert found == statistics
    assert equal(numbers(model), values)


def test_set_adapter_and_several() -> None:
    models = both()
    for names in ("second", ["default", "second"], "default"):
        on_both(models, lambda m, names=names: m.base_model.set_adapter(names))  # type: ignore[misc]
        for _ in range(2):
            step_is_as_good(*models, inputs_of())
    assert all_fused(models[0])


def test_disable_adapter() -> None:
    model, peft = both()
    with model.disable_adapter(), peft.disable_adapter():
        same(model, peft)
    same(model, peft)
    delegated = {tuple(e.delegations) for e in fused_layers(model) if e.op == "lora_linear"}
    assert delegated == {("adapters are disabled",)}


@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(safe: bool) -> None:
    """PEFT dequantises, adds and quantises again: a new parameter each time."""
    models = both()
    on_both(models, lambda m: m.merge_adapter(safe_merge=safe))
    assert equal(numbers(models[0]), numbers(models[1]))
    same(*models)
    assert fused_layers(models[0])[0].delegations == {"adapters are merged": 1}
    on_both(models, lambda m: m.unmerge_adapter())
    assert equal(numbers(models[0]), numbers(models[1]))
    for _ in range(2):
        step_is_as_good(*models, inputs_of())
    assert fused_layers(models[0])[0].hits == 2


def test_merge_and_unload() -> None:
    model, peft = both()
    merged, expected = model.merge_and_unload(), peft.merge_and_unload()
    assert not adapted_linears(merged)
    assert equal(numbers(merged), numbers(expected))
    same(merged, expected)
    assert {entry.reasons for entry in report(merged).not_fused} == {
        ("added after patch; call peftfast.patch again",)
    }
    patch(merged, strict=True)
    assert {entry.op for entry in fused_layers(merged)} == {"nf4_linear"}
    same(merged, expected)


@pytest.mark.filterwarnings("ignore:Some weights")
def test_dequantised_merge(tmp_path: Path) -> None:
    """An adapter trained over 4 bits, merged into the dense weights that those stand for."""
    model, _ = both()
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    expected = logits(model)
    base = unpatch(model.unload())
    assert len(linears4bit(base)) == 14
    dequantize_and_replace(base, BitsAndBytesConfig(load_in_4bit=True))
    assert not linears4bit(base)
    merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_bases_dequantised_under_the_adapters() -> None:
    models = both()
    same(*models)
    on_both(models, lambda m: dequantize_and_replace(m, BitsAndBytesConfig(load_in_4bit=True)))
    for model in models:
        assert {type(m.base_layer) for m in adapted_linears(model).values()} == {nn.Linear}
    same(*models)
    assert all_fused(models[0])


def test_delete_and_add_adapters() -> None:
    models = both()
    with pytest.warns(UserWarning, match="default"):
        on_both(models, lambda m: m.delete_adapter("default"))
    step_is_as_good(*models, inputs_of())
    for m in models:
        torch.manual_seed(3)
        m.add_adapter("third", LoraConfig(r=2, target_modules=TARGETS))
        randomise(m)
        m.set_adapter("third")
    model = models[0]
    same(*models)
    assert {e.path.rpartition(".")[2] for e in report(model).not_fused} == {"o_proj"}
    patch(model, strict=True)
    assert {entry.op for entry in fused_layers(model)} == {"lora_linear"}
    for _ in range(2):
        step_is_as_good(*models, inputs_of())


def test_adapters_put_on_linears_that_are_fused_already() -> None:
    model = patch(base_model("qwen2", compute_dtype=torch.float32), strict=True)
    plain = copy_of(model)
    unpatch(plain)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    models = []
    for m in (model, plain):
        torch.manual_seed(3)
        models.append(randomise(get_peft_model(m, config)))
    same(*models)
    assert all(isinstance(m, Linear4bit) for m in adapted_linears(models[0]).values())
    assert len(adapted_linears(models[0])) == 4
    patch(models[0], strict=True)
    bases = {type(m.base_layer) for m in adapted_linears(models[0]).values()}
    assert bases == {bnb.nn.Linear4bit}
    for _ in range(2):
        step_is_as_good(*models, inputs_of())
    assert all_fused(models[0])
    unpatch(models[0])
    assert [type(m) for m in models[0].modules()] == [type(m) for m in models[1].modules()]
    same(*models)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, HALF)])
@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 7, "down_proj": 1}, "alpha_pattern": {"v_proj": 31}},
    ],
    ids=str,
)
def test_settings(lora: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rest, compute = dtypes
    targets = TARGETS
    if "lora_bias" in lora:  # which PEFT takes over linears with a bias
        targets = ["q_proj", "k_proj", "v_proj"]
    model = qlora("qwen2", rest, compute_dtype=compute, lora={"target_modules": targets, **lora})
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of())
    assert all_fused(model)
    assert len({entry.siblings for entry in fused_layers(model) if len(entry.siblings) == 3}) == 2


def test_biases_of_adapters_under_autocast() -> None:
    lora = {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True}
    model = qlora("qwen2", compute_dtype=HALF, lora=lora)
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        with torch.autocast("cpu", dtype=HALF):
            got, expected = logits(model), logits(peft)
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()
    assert all_fused(model)


def test_variants_are_named_and_left_alone() -> None:
    model = qlora(lora={"use_dora": True}, compute_dtype=torch.float32)
    peft = copy_of(model)
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(model)
    found = report(model)
    assert len(found.not_fused) == len(adapted_linears(model))  # their bases are not listed
    assert "DoraLinearVariant" in found.not_fused[0].reasons[0]
    assert torch.equal(logits(model), logits(peft))


def test_modules_to_save() -> None:
    lora = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    model = qlora("bert", compute_dtype=HALF, lora=lora)
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of("bert"))


def test_half_precision_adapters_over_a_float32_input_are_left_to_peft() -> None:
    model = qlora(compute_dtype=HALF, adapters=HALF)
    peft = copy_of(model)
    patch(model, strict=True)
    assert torch.equal(logits(model), logits(peft))
    assert {tuple(entry.delegations) for entry in fused_layers(model)} == {
        ("lora_A is torch.bfloat16, the input torch.float32",)
    }


def test_unknown_subclasses_are_not_fused() -> None:
    class Doubling(bnb.nn.Linear4bit):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = qlora(lora={"target_modules": ["q_proj"]}, compute_dtype=torch.float32)
    attention = model.base_model.model.model.layers[0].self_attn
    attention.k_proj.__class__ = attention.q_proj.base_layer.__class__ = Doubling
    peft = copy_of(model)
    with pytest.raises(RuntimeError, match="base layer is a Doubling"):
        patch(model, strict=True)
    patch(model)
    reasons = {e.path.rpartition(".")[2]: e.reasons[0] for e in report(model).not_fused}
    assert reasons == {
        "q_proj": "the base layer is a Doubling",
        "k_proj": f"{__name__}.{Doubling.__qualname__} is a subclass of bitsandbytes' Linear4bit"
        " with a forward that may differ",
    }
    same(model, peft)


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_a_replaced_forward_is_respected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = both()
    unpatch(model)
    kind = Linear4bit if name == "q_proj" else bnb.nn.Linear4bit

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)

    monkeypatch.setattr(kind, "forward", forward)
    patch(model)
    reasons = {e.path.rpartition(".")[2]: e.reasons[0] for e in report(model).not_fused}
    expected = "lora.Linear4bit.forward" if name == "q_proj" else "bitsandbytes' Linear4bit.forward"
    assert f"{expected} was replaced, by {__name__}" in reasons[name]


def test_hooks_on_bases_and_plain_linears() -> None:
    models = both()
    seen: list[str] = []
    for model in models:
        attention = model.base_model.model.model.layers[0].self_attn
        attention.q_proj.base_layer.register_forward_hook(lambda m, a, y: y * 2)
        attention.o_proj.register_forward_hook(lambda m, a, y: seen.append("o"))
    same(*models)
    assert seen == ["o", "o"]
    entries = {e.path.rpartition("layers.")[2]: e for e in fused_layers(models[0])}
    assert entries["0.self_attn.q_proj"].delegations == {"the base layer has hooks": 1}
    assert not entries["0.self_attn.o_proj"].delegations


@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_device_map(first: str) -> None:
    """accelerate's hooks on every module; the plain linears' wrap the fused forward."""
    model, peft = both()
    unpatch(model)
    on_each = dict(force_hooks=True, main_device="cpu")
    dispatch_model(peft, {"": "cpu"}, **on_each)
    if first == "hooks":
        patch(dispatch_model(model, {"": "cpu"}, **on_each), strict=True)
    else:
        dispatch_model(patch(model, strict=True), {"": "cpu"}, **on_each)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of())
    assert all(e.hits == 2 and not e.delegations for e in fused_layers(model))
    unpatch(model)
    assert torch.equal(logits(model), logits(peft))


# Files and copies


def test_save_and_load(tmp_path: Path) -> None:
    model, peft = both()
    for m, name in ((model, "patched"), (peft, "plain")):
        m.save_pretrained(tmp_path / name)
    for where in (Path(), Path("second")):
        files = [tmp_path / name / where for name in ("patched", "plain")]
        one, other = ((f / "adapter_model.safetensors").read_bytes() for f in files)
        assert one == other
    for source, target in (("patched", peft), ("plain", model)):
        fresh = copy_of(target)
        with torch.no_grad():
            for name, parameter in fresh.named_parameters():
                if "lora_" in name:
                    parameter.zero_()
        fresh.load_adapter(tmp_path / source / "second", "second")
        fresh.load_adapter(tmp_path / source, "default")
        same(fresh, peft)
    loaded = PeftModel.from_pretrained(peft.unload(), tmp_path / "patched")
    same(patch(loaded.eval(), strict=True), model)


def test_load_state_dict_both_ways() -> None:
    """bitsandbytes' statistics are in the state_dict; its modules load the packed weight alone."""
    model, peft = both()
    for source, target in ((peft, model), (model, peft)):
        torch.manual_seed(7)
        randomise(source)
        with torch.no_grad():
            for linear in linears4bit(source).values():
                linear.weight.copy_(linear.weight.roll(1, 0))
        keys = target.load_state_dict(source.state_dict(), strict=False)
        assert not keys.missing_keys
        same(model, peft)
    assert all_fused(model)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_patched_and_independent(how: str) -> None:
    model, peft = both()
    for _ in range(2):
        logits(model)
    other = COPIES[how](model)
    assert len(fused_layers(other)) == len(fused_layers(model))
    assert all(entry.hits == 0 for entry in fused_layers(other))
    unpatch(model)
    with torch.no_grad():
        for linear in linears4bit(model).values():
            linear.weight.zero_()
    for _ in range(2):
        step_is_as_good(other, peft, inputs_of())
    assert all_fused(other)


def test_casting_and_moving() -> None:
    """`.to(dtype)` casts biases and adapters, and leaves bitsandbytes' weights."""
    models = both()
    for dtype in (torch.float64, HALF, torch.float32):
        on_both(models, lambda m, dtype=dtype: m.to(dtype))  # type: ignore[misc]
        if dtype != torch.float64:  # which bitsandbytes can't compute in over float32 adapters
            torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=0.1, atol=0.1)
    assert all_fused(models[0])


def test_meta_input() -> None:
    module = patch(linear4bit(nn.Linear(64, 48)))
    assert module(torch.empty(2, 64, device="meta")).shape == (2, 48)
    assert fused_layers(module)[0].delegations == {"the input is torch.float32 on meta": 1}
