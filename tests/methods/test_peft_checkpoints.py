"""Checkpoints of PEFT's prefix and prompt methods and of ours, each loaded as the other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor

import peftfast
from peftfast.methods import (
    Component,
    MAMConfig,
    MultiHeadParallelAdapterConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    PTuningV2Config,
    UnifiedConfig,
)
from peftfast.methods.peft_checkpoints import load_from_peft, save_as_peft
from tests.patching.tiny import FAMILIES, inputs_of

CARTRIDGE = getattr(peft, "CartridgeConfig", None)  # since peft 0.19
TOKENS = 5
DECODERS = ("llama", "qwen3", "gpt2", "gemma3")
TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
OLD = not hasattr(PeftModel, "_adjust_prompt_learning_kwargs")  # peft 0.18


def skip_what_peft_mixes_up(family: str) -> None:
    if OLD and family == "gemma3":
        pytest.skip("peft 0.18 gives Gemma's layers each other's keys and values")


def base(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family].make().eval()


def theirs_saved(family: str, path: Path, kind: Any = PrefixTuningConfig, **settings: Any) -> Any:
    """A PeftModel of PEFT's own, saved."""
    task = TASKS.get(family, "CAUSAL_LM")
    model = get_peft_model(
        base(family), kind(task_type=task, num_virtual_tokens=TOKENS, **settings)
    )
    model.save_pretrained(path)
    return model.eval()


def padded(family: str) -> dict[str, Tensor]:
    inputs = inputs_of(family)
    masked = slice(-2, None) if family in TASKS else slice(0, 2)
    inputs["attention_mask"][0, masked] = 0
    del inputs["labels"]
    return inputs


def assert_same(ours: Any, theirs: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        got, expected = ours(**inputs).logits, theirs(**inputs).logits
    if got.ndim == 3:  # of tokens: not of prompts, and of padding nobody reads them
        there = inputs["attention_mask"].bool()
        got, expected = (logits[:, -there.shape[1] :][there] for logits in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def assert_same_tokens(ours: Any, theirs: Any, inputs: dict[str, Tensor]) -> None:
    if OLD:  # it generates with positions that count padding
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    for settings in ({}, {"num_beams": 3}):
        given: dict[str, Any] = {**inputs, "max_new_tokens": 9, "do_sample": False, **settings}
        assert torch.equal(ours.generate(**given), theirs.generate(**given)), settings


@pytest.mark.parametrize("family", [*DECODERS, "bert", "roberta"])
def test_peft_s_prefixes_are_read(family: str, tmp_path: Path) -> None:
    skip_what_peft_mixes_up(family)
    theirs = theirs_saved(family, tmp_path)
    ours = load_from_peft(base(family), tmp_path)
    assert type(ours) is type(theirs)
    assert isinstance(ours.peft_config["default"], PrefixConfig)
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    assert_same(ours, theirs, padded(family))
    if family in DECODERS:
        assert_same_tokens(ours, theirs, padded(family))


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_peft_reads_our_prefixes(family: str, tmp_path: Path) -> None:
    skip_what_peft_mixes_up(family)
    task = TASKS.get(family, "CAUSAL_LM")
    config = PrefixConfig(num_virtual_tokens=TOKENS, prefix_projection=True, task_type=task)
    ours = get_peft_model(base(family), config).eval()
    save_as_peft(ours, tmp_path / "saved")
    theirs = PeftModel.from_pretrained(base(family), str(tmp_path / "saved"))
    assert theirs.peft_config["default"].peft_type == "PREFIX_TUNING"
    assert_same(ours, theirs, padded(family))
    if family in DECODERS:
        assert_same_tokens(ours, theirs, padded(family))


def test_there_and_back_gives_the_same_bytes(tmp_path: Path) -> None:
    theirs_saved("llama", tmp_path / "a")
    save_as_peft(load_from_peft(base("llama"), tmp_path / "a"), tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first, second = (
        json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in "ab"
    )
    del first["encoder_hidden_size"], second["encoder_hidden_size"]  # of no network
    assert first == second


@pytest.mark.parametrize("how", ["projected", "cartridge"])
def test_what_a_network_or_a_cartridge_made_is_read_finished(how: str, tmp_path: Path) -> None:
    if how == "projected":
        theirs = theirs_saved("llama", tmp_path, prefix_projection=True, encoder_hidden_size=8)
    elif CARTRIDGE is None:
        pytest.skip("this peft has no CARTRIDGE")
    else:
        theirs = theirs_saved("llama", tmp_path, CARTRIDGE)
    ours = load_from_peft(base("llama"), tmp_path, "other")
    assert list(ours.peft_config) == ["other"]
    assert_same(ours, theirs, padded("llama"))


def test_a_loaded_prefix_trains_on(tmp_path: Path) -> None:
    theirs_saved("llama", tmp_path)
    ours = load_from_peft(base("llama"), tmp_path, is_trainable=True)
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("prefix_" in name for name in trained)
    ours(**inputs_of()).loss.backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def test_a_patched_model_s_prefix_is_read_too(tmp_path: Path) -> None:
    theirs = theirs_saved("llama", tmp_path / "unused")
    peftfast.patch(theirs).save_pretrained(tmp_path / "saved")
    assert_same(load_from_peft(base("llama"), tmp_path / "saved"), theirs, padded("llama"))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_peft_s_prompts_are_read(family: str, kind: Any, tmp_path: Path) -> None:
    settings = {"encoder_hidden_size": 8} if kind is PromptEncoderConfig else {}
    theirs = theirs_saved(family, tmp_path, kind, **settings)
    ours = load_from_peft(base(family), tmp_path)
    assert isinstance(ours.peft_config["default"], PromptConfig)
    inputs = inputs_of(family)
    del inputs["labels"]
    assert_same(ours, theirs, inputs)
    if family in DECODERS:
        assert_same_tokens(ours, theirs, inputs)


@pytest.mark.parametrize("config", [PromptConfig, PTuningConfig])
def test_peft_reads_our_prompts(config: Any, tmp_path: Path) -> None:
    ours = get_peft_model(
        base("llama"), config(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")
    ).eval()
    save_as_peft(ours, tmp_path / "saved")
    theirs = PeftModel.from_pretrained(base("llama"), str(tmp_path / "saved"))
    inputs = inputs_of()
    del inputs["labels"]
    assert_same(ours, theirs, inputs)
    assert_same_tokens(ours, theirs, inputs)


MISFITS = {
    "relu": (MultiHeadParallelAdapterConfig(bottleneck=4), "form is 'relu'"),
    "layers": (PrefixConfig(num_virtual_tokens=4, layers=[0]), "in 1 of 2 layers"),
    "positions": (PrefixConfig(num_virtual_tokens=4, shift_positions=False), "begin at 0"),
    "gate": (
        UnifiedConfig(
            components=[Component("attention_heads", primitive="prefix", virtual_tokens=4,
                                  gate=True)]
        ),
        "a gate",
    ),
    "tasks": (PromptConfig(num_virtual_tokens=4, tasks=2), "for 2 tasks"),
    "template": (PromptConfig(template=["[P]", "{x}", "[P]"]), "a template"),
    "position": (PromptConfig(num_virtual_tokens=4, position="end"), "position is 'end'"),
    "mixed": (MAMConfig(num_virtual_tokens=4, bottleneck=4), "made of bottleneck, prefix"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_peft_can_t_compute_is_not_written(case: str, tmp_path: Path) -> None:
    config, reason = MISFITS[case]
    model = get_peft_model(base("llama"), config)
    with pytest.raises(ValueError, match=reason):
        save_as_peft(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_encoders_with_decoders_have_other_prefixes(tmp_path: Path) -> None:
    theirs_saved("t5", tmp_path)
    model = base("t5")
    with pytest.raises(ValueError, match="a part of its prefix"):
        load_from_peft(model, tmp_path)
    ours = get_peft_model(model, PTuningV2Config(num_virtual_tokens=4))
    with pytest.raises(ValueError, match="in cross-attention too"):
        save_as_peft(ours, tmp_path / "saved")


def test_a_checkpoint_that_doesn_t_fit_changes_nothing(tmp_path: Path) -> None:
    theirs_saved("qwen3", tmp_path / "other")
    model = base("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="2 layers of 2 x 12; the model has 2 layers of 2 x 8"):
        load_from_peft(model, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_from_peft(model, tmp_path)
    get_peft_model(base("llama"), LoraConfig()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is of LORA"):
        load_from_peft(model, tmp_path / "lora")
    assert [name for name, _ in model.named_modules()] == names
    with pytest.raises(ValueError, match="the base model is needed"):
        load_from_peft(get_peft_model(base("llama"), LoraConfig()), tmp_path / "other")


def test_a_head_of_another_size_changes_nothing(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    get_peft_model(base("bert"), config).save_pretrained(tmp_path)
    settings = copy.deepcopy(base("bert").config)
    settings.num_labels = 7
    model = transformers.BertForSequenceClassification(settings).eval()
    modules = {name: (one, type(one)) for name, one in model.named_modules()}
    with pytest.raises(ValueError, match="doesn't fit the model"):
        load_from_peft(model, tmp_path)
    assert {name: (one, type(one)) for name, one in model.named_modules()} == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


def test_only_declared_methods_are_written(tmp_path: Path) -> None:
    model = get_peft_model(base("llama"), LoraConfig())
    with pytest.raises(ValueError, match="no adapter of a declared method"):
        save_as_peft(model, tmp_path / "saved")
