"""Training jobs over declared methods: Trainer, gradient checkpointing, a 4-bit base, resuming,
accelerate, TRL."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import Trainer, TrainingArguments

from peftfast.methods import (
    CompacterConfig,
    Component,
    HoulsbyConfig,
    ParallelAdapterConfig,
    UnifiedConfig,
)
from tests.patching.quantised import HALF, base_model, linears4bit
from tests.patching.test_training import Sentences
from tests.patching.tiny import FAMILIES, VOCAB

STEPS = 6

CONFIGS: dict[str, Any] = {
    "houlsby": lambda: HoulsbyConfig(bottleneck=4, dropout=0.1, init_std=0.1),
    "parallel": lambda: ParallelAdapterConfig(
        bottleneck=4, sublayers=["attention", "ffn"], learned_scaling=True
    ),
    "compacter": lambda: CompacterConfig(bottleneck=4, init_std=0.5),
}


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def four_bit(config: Any) -> Any:
    """A Llama in 4 bits with adapters, its projections random."""
    model = prepare_model_for_kbit_training(
        base_model("llama", HALF, compute_dtype=HALF), use_gradient_checkpointing=False
    )
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("method", CONFIGS)
def test_checkpointed_training_over_a_4_bit_base_resumes_as_if_never_stopped(
    method: str, tmp_path: Path
) -> None:
    def job(folder: Path, **settings: Any) -> Trainer:
        model = four_bit(CONFIGS[method]())
        assert linears4bit(model)
        settings["gradient_checkpointing"] = True
        return Trainer(model, arguments(folder, **settings), train_dataset=Sentences())

    whole = job(tmp_path / "whole")
    whole.train()
    expected = losses(whole)
    assert len(expected) == STEPS and len(set(expected)) == STEPS
    interrupted = job(tmp_path / "cut", save_strategy="steps", save_steps=3)
    interrupted.train()
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    resumed = job(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == expected
    trained = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
    again = dict(resumed.model.named_parameters())
    assert trained and all(torch.equal(again[name], value) for name, value in trained.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    base = FAMILIES["bert"].make()
    components = [
        Component("attention_output", bottleneck=4, dropout=0.2),
        Component("ffn_output", insertion="parallel", bottleneck=4, gate=True, norm="layer"),
    ]
    model = peft.get_peft_model(base, UnifiedConfig(components=components)).train()
    inputs = {
        "input_ids": torch.randint(3, VOCAB, (2, 9)),
        "labels": torch.tensor([0, 2]),
    }
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(7)
        model(**inputs).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert any(value.abs().max() > 0 for value in found[0].values())


def test_an_8_bit_base_trains() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = FAMILIES["llama"].make().to(torch.float16)
    for path, module in list(base.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in path:
            made = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False
            )
            made.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False)
            base.set_submodule(path, made.to("cpu"))
    base.is_loaded_in_8bit = True
    model = peft.get_peft_model(base, HoulsbyConfig(bottleneck=4, train_norms=False))
    adapters = [p for n, p in model.named_parameters() if ".peftfast_" in n]
    assert {p.dtype for p in adapters} == {torch.float32}
    tokens = torch.randint(3, VOCAB, (2, 6))
    model(input_ids=tokens, labels=tokens).loss.float().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapters)
    with pytest.raises(ValueError, match="can't be merged"):
        model.merge_and_unload()


def test_trl_and_accelerate(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from accelerate import Accelerator

    model = peft.get_peft_model(FAMILIES["llama"].make(), CONFIGS["parallel"]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    accelerator = Accelerator(cpu=True)
    ready, optimizer = accelerator.prepare(copy.deepcopy(model), optimizer)
    tokens = torch.randint(3, VOCAB, (2, 6))
    accelerator.backward(ready(input_ids=tokens, labels=tokens).loss)
    accelerator.save_state(str(tmp_path / "state"))

    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in tokens.repeat(4, 1)])
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_length=16,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    from tests.patching.test_head_training import tokenizer  # type: ignore[attr-defined]

    trainer = trl.SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer())
    trainer.train()
    assert len(losses(trainer)) == 2
