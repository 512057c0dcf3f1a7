"""Whole jobs: HF Trainer, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from peftfast.patching import patch, report
from tests.patching.tiny import VOCAB, adapted, copy_of, inputs_of, layers_of


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCAB, (9,), generator=generator)
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not"])
def test_trainer(checkpointing: bool | None, tmp_path: Path) -> None:
    """The same losses, step by step, and the same adapter in the end."""
    settings: dict[str, Any] = {}
    if checkpointing is not None:
        settings["gradient_checkpointing"] = True
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    model = adapted("qwen2")
    peft = copy_of(model)
    patch(model, strict=True)
    losses, states = [], []
    for m, name in ((peft, "plain"), (model, "patched")):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=5, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, logging_steps=1, learning_rate=0.01, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, **settings,
        )  # fmt: skip
        if checkpointing:
            m.enable_input_require_grads()
        trainer = Trainer(m, arguments, train_dataset=Sentences())
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        states.append({k: v for k, v in m.state_dict().items() if "lora_" in k})
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-2, atol=1e-3)
    found = report(model)
    assert len({entry.siblings for entry in layers_of(found.fused) if entry.siblings}) == 4
    assert all(entry.hits >= 10 and not entry.delegations for entry in layers_of(found.fused))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(family: str, beams: int) -> None:
    model = adapted(family)
    peft = copy_of(model)
    patch(model, strict=True)
    inputs = inputs_of(family)
    del inputs["labels"]
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=beams, min_new_tokens=6)
    for _ in range(2):
        assert torch.equal(
            model.generate(**inputs, **settings), peft.generate(**inputs, **settings)
        )
    found = report(model)
    assert all(entry.hits and not entry.delegations for entry in layers_of(found.fused))
    assert not any("given up" in entry.note for entry in layers_of(found.fused))
