"""What PEFT does with adapters, done to a patched model and to its unpatched copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners import lora

from peftfast.patching import patch, report, unpatch
from tests.patching.tiny import (
    FAMILIES,
    adapted,
    copy_of,
    fused_layers,
    inputs_of,
    layers_of,
    lora_linears,
    randomise,
    step_is_as_good,
    total_hits,
)

TARGETS = list(FAMILIES["llama"].targets)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of()).logits


def same(model: Any, peft: Any) -> None:
    torch.testing.assert_close(logits(model), logits(peft), rtol=1e-5, atol=1e-6)


def both(family: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """A patched model and its unpatched copy, each with two adapters; "default" is active."""
    model = adapted(family, **settings)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=TARGETS))
    randomise(model)
    peft = copy_of(model)
    return patch(model, strict=True), peft


def on_both(models: tuple[Any, Any], change: Callable[[Any], Any]) -> None:
    for model in models:
        change(model)


def all_fused(model: Any) -> bool:
    return all(not entry.delegations for entry in fused_layers(model))


def test_set_adapter() -> None:
    models = both()
    before = logits(models[0])
    on_both(models, lambda m: m.set_adapter("second"))
    same(*models)
    assert not torch.allclose(logits(models[0]), before, atol=1e-3)
    step_is_as_good(*models, inputs_of())
    on_both(models, lambda m: m.set_adapter("default"))
    torch.testing.assert_close(logits(models[0]), before)
    assert all_fused(models[0])


@pytest.mark.parametrize("names", [["default", "second"], ["second", "default"], ["default"] * 2])
def test_several_active_adapters(names: list[str]) -> None:
    models = both()
    on_both(models, lambda m: m.base_model.set_adapter(names))
    for _ in range(2):
        step_is_as_good(*models, inputs_of(rows=3))
    assert all_fused(models[0])


def test_disable_adapter() -> None:
    model, peft = both()
    with_adapter = logits(model)
    with model.disable_adapter(), peft.disable_adapter():
        assert torch.equal(logits(model), logits(peft))
        assert not torch.allclose(logits(model), with_adapter, atol=1e-3)
    torch.testing.assert_close(logits(model), with_adapter)
    assert fused_layers(model)[0].delegations == {"adapters are disabled": 2}


@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(safe: bool) -> None:
    models = both()
    on_both(models, lambda m: m.merge_adapter(safe_merge=safe))
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert fused_layers(models[0])[0].delegations == {"adapters are merged": 1}
    on_both(models, lambda m: m.unmerge_adapter())
    step_is_as_good(*models, inputs_of())
    assert fused_layers(models[0])[0].hits == 1


def test_patched_while_merged() -> None:
    model = adapted()
    model.merge_adapter()
    peft = copy_of(model)
    patch(model, strict=True)
    assert torch.equal(logits(model), logits(peft))
    on_both((model, peft), lambda m: m.unmerge_adapter())
    same(model, peft)
    assert total_hits(model) == 14


def test_unpatched_while_merged() -> None:
    model, peft = both()
    on_both((model, peft), lambda m: m.merge_adapter())
    unpatch(model)
    on_both((model, peft), lambda m: m.unmerge_adapter())
    assert torch.equal(logits(model), logits(peft))


def test_disabling_unmerges_as_in_peft() -> None:
    models = both()
    on_both(models, lambda m: m.merge_adapter())
    on_both(models, lambda m: m.base_model.disable_adapter_layers())
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert not next(iter(lora_linears(models[0]).values())).merged


def test_merge_and_unload() -> None:
    model, peft = both()
    merged, expected = model.merge_and_unload(), peft.merge_and_unload()
    assert not lora_linears(merged)
    assert torch.equal(logits(merged), logits(expected))
    assert list(merged.state_dict()) == list(expected.state_dict())


def test_added_adapter_runs_fused() -> None:
    """An adapter added to modules that are fused already."""
    model = patch(adapted())
    peft = unpatch(copy_of(model))
    for m in (model, peft):
        m.add_adapter("later", LoraConfig(r=2, target_modules=TARGETS))
        torch.manual_seed(3)
        randomise(m)
        m.set_adapter("later")
    step_is_as_good(model, peft, inputs_of())
    assert all_fused(model)
    assert len(fused_layers(model)) == 14


def test_modules_wrapped_after_patching() -> None:
    model = patch(adapted("llama", target_modules=["q_proj"]), strict=True)
    model.add_adapter("later", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    model.set_adapter("later")
    peft = unpatch(copy_of(model))
    found = report(model)
    assert {entry.path.rpartition(".")[2] for entry in layers_of(found.fused)} == {"q_proj"}
    assert {entry.path.rpartition(".")[2] for entry in found.not_fused} == {"v_proj"}
    assert {entry.reasons for entry in found.not_fused} == {
        ("added after patch; call peftfast.patch again",)
    }
    same(model, peft)
    patch(model, strict=True)
    assert not report(model).not_fused
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of())
    assert {entry.siblings[-1].rpartition(".")[2] for entry in fused_layers(model)} == {"v_proj"}


def test_adapter_missing_from_some_modules() -> None:
    """Where the active adapter has no weights, PEFT gives the base layer's output."""
    model = adapted()
    model.add_adapter("narrow", LoraConfig(r=2, target_modules=["v_proj"]))
    randomise(model)
    model.set_adapter("narrow")
    peft = copy_of(model)
    patch(model, strict=True)
    step_is_as_good(model, peft, inputs_of())
    delegated = {e.path.rpartition(".")[2]: e.delegations for e in fused_layers(model)}
    assert delegated.pop("v_proj") == {}
    assert {tuple(d) for d in delegated.values()} == {("no active adapter on this module",)}


def test_delete_adapter() -> None:
    models = both()
    with pytest.warns(UserWarning, match="default"):
        on_both(models, lambda m: m.delete_adapter("default"))
    step_is_as_good(*models, inputs_of())
    assert all_fused(models[0])


def test_deleting_the_only_adapter() -> None:
    model = adapted()
    peft = copy_of(model)
    patch(model)
    on_both((model, peft), lambda m: m.delete_adapter("default"))
    assert torch.equal(logits(model.base_model.model), logits(peft.base_model.model))


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_add_weighted_adapter(how: str) -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=9, target_modules=TARGETS))
    randomise(model)
    peft = copy_of(model)
    patch(model)
    on_both(
        (model, peft),
        lambda m: m.add_weighted_adapter(["default", "second"], [0.7, 0.4], "mix", how),
    )
    on_both((model, peft), lambda m: m.set_adapter("mix"))
    same(model, peft)
    assert all_fused(model)


def test_scaling_is_read_at_each_call() -> None:
    models = both()
    for module in [m for model in models for m in lora_linears(model).values()]:
        module.set_scale("default", 3.0)
    same(*models)
    for module in [m for model in models for m in lora_linears(model).values()]:
        module.scale_layer(0.5)
    same(*models)
    assert all_fused(models[0])


def test_parameters_are_read_at_each_call() -> None:
    models = both()
    for module in [m for model in models for m in lora_linears(model).values()]:
        torch.manual_seed(5)
        module.lora_A["default"].weight = torch.nn.Parameter(torch.randn(4, module.in_features))
        module.base_layer.weight.data = torch.randn(module.out_features, module.in_features) / 9
    step_is_as_good(*models, inputs_of())
    assert all_fused(models[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 7, "down_proj": 1}, "alpha_pattern": {"v_proj": 31}},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_settings(family: str, settings: dict[str, Any]) -> None:
    model = adapted(family, **settings)
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of())
    assert all_fused(model)


def test_lora_bias_gets_its_gradient() -> None:
    model = patch(adapted("qwen2", lora_bias=True))
    model(**inputs_of()).loss.backward()
    biases = [m.lora_B["default"].bias for m in lora_linears(model).values()]
    assert all(bias.grad is not None and bias.grad.any() for bias in biases)


def test_float32_lora_bias_over_half_precision() -> None:
    """In the op it would be rounded with the base's bias, and so would its gradient: it is added
    after, in float32.
    """
    model = adapted("qwen2", lora_bias=True).to(torch.bfloat16)
    for module in lora_linears(model).values():
        module.lora_A.float()
        module.lora_B.float()
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of())
    assert all_fused(model)
    biases = [m.lora_B["default"].bias for m in lora_linears(model).values()]
    assert all(bias.grad is not None and bias.grad.dtype == torch.float32 for bias in biases)


def test_modules_to_save() -> None:
    model = adapted("bert", target_modules=["query", "value"], modules_to_save=["classifier"])
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of("bert"))


def test_save_and_load(tmp_path: Path) -> None:
    model, peft = both()
    model.save_pretrained(tmp_path / "patched")
    peft.save_pretrained(tmp_path / "plain")
    for where in (Path(), Path("second")):
        patched, plain = tmp_path / "patched" / where, tmp_path / "plain" / where
        weights = "adapter_model.safetensors"
        assert (patched / weights).read_bytes() == (plain / weights).read_bytes()
        assert PeftConfig.from_pretrained(patched) == PeftConfig.from_pretrained(plain)

    loaded = PeftModel.from_pretrained(peft.unload(), tmp_path / "patched").eval()
    plain = copy_of(loaded)
    patch(loaded, strict=True)
    same(loaded, model)
    assert all_fused(loaded)
    on_both((loaded, plain), lambda m: m.load_adapter(tmp_path / "patched" / "second", "second"))
    on_both((loaded, plain), lambda m: m.set_adapter("second"))
    same(loaded, plain)


def test_load_state_dict_both_ways() -> None:
    model, peft = both()
    torch.manual_seed(7)
    randomise(peft)
    model.load_state_dict(peft.state_dict())
    same(model, peft)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"alora_invocation_tokens": [1, 2]}])
def test_variants_are_named_and_left_alone(settings: dict[str, Any]) -> None:
    model = adapted("llama", **settings)
    peft = copy_of(model)
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(model)
    expected = {"use_dora": "DoraLinearVariant", "alora_invocation_tokens": "ALoraLinearVariant"}
    (entry, *_) = report(model).not_fused
    assert expected[next(iter(settings))] in entry.reasons[0]
    assert type(next(iter(lora_linears(model).values()))) is lora.Linear
    assert torch.equal(logits(model), logits(peft))


def test_variant_beside_a_plain_adapter() -> None:
    """Fused for the plain adapter; while the variant is active, PEFT's forward runs."""
    model = adapted()
    model.add_adapter("dora", LoraConfig(r=4, target_modules=TARGETS, use_dora=True))
    randomise(model)
    peft = copy_of(model)
    patch(model, strict=True)
    same(model, peft)
    for names in ("dora", ["default", "dora"]):
        on_both((model, peft), lambda m, names=names: m.base_model.set_adapter(names))  # type: ignore[misc]
        assert torch.equal(logits(model), logits(peft))
    entry = fused_layers(model)[0]
    assert entry.hits == 1
    (reason,) = entry.delegations
    assert "DoraLinearVariant" in reason
    assert entry.delegations[reason] == 2


@pytest.mark.parametrize(
    ("targets", "kind"),
    [(["embed_tokens"], "Embedding"), (["lm_head", "embed_tokens"], "Embedding")],
)
def test_embeddings_are_reported(targets: list[str], kind: str) -> None:
    model = adapted("llama", target_modules=["q_proj", *targets])
    peft = copy_of(model)
    patch(model, strict=True)
    (entry,) = report(model).not_fused
    assert entry.type.endswith(kind)
    assert "LoRA over Embedding" in entry.reasons[0]
    step_is_as_good(model, peft, inputs_of())


def test_convolutions_and_other_tuners_are_reported() -> None:
    from peft import IA3Config, get_peft_model
    from torch import nn

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 8, 3)
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(x).transpose(1, 2))

    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["conv", "linear"]))
    patch(model, strict=True)
    (entry,) = report(model).not_fused
    assert entry.type == "peft.tuners.lora.layer.Conv1d"
    assert "LoRA over Conv1d" in entry.reasons[0]

    config = IA3Config(target_modules=["linear"], feedforward_modules=[])
    with pytest.warns(UserWarning, match="nothing was fused"):
        other = patch(get_peft_model(Mixed(), config))
    (entry,) = report(other).not_fused
    assert "peft.tuners.ia3.layer.Linear over Linear has no fused op" in entry.reasons[0]


def test_other_quantised_bases_are_reported() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import get_peft_model
    from torch import nn

    class Quantised(nn.Module):
        is_loaded_in_8bit = True

        def __init__(self) -> None:
            super().__init__()
            self.eight = bitsandbytes.nn.Linear8bitLt(32, 32, has_fp16_weights=False)
            self.bare = bitsandbytes.nn.Linear8bitLt(32, 32, has_fp16_weights=False)
            self.plain = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(self.bare(self.eight(x)))

    config = LoraConfig(r=2, target_modules=["eight", "plain"])
    model = get_peft_model(Quantised().to("cpu"), config)
    peft = copy_of(model)
    found = report(patch(model, strict=True))
    assert [entry.path.rpartition(".")[2] for entry in layers_of(found.fused)] == ["plain"]
    reasons = {entry.path.rpartition(".")[2]: entry.reasons for entry in found.not_fused}
    assert reasons == {
        "eight": ("LoRA over Linear8bitLt (peft.tuners.lora.bnb.Linear8bitLt) has no fused op",),
        "bare": ("bitsandbytes.nn.modules.Linear8bitLt has no fused op",),
    }
    x = torch.randn(3, 32)
    torch.testing.assert_close(model(x), peft(x))
