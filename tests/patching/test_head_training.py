"""Trainers over heads that defer their logits, against the same jobs of the unpatched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.patching.heads import pair, record
from tests.patching.tiny import VOCAB


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sentences of two lengths, padded, their first tokens without labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCAB, (9,), generator=generator)
        labels = ids.clone()
        labels[: index % 4] = -100
        mask = torch.ones_like(ids)
        if index % 2:
            labels[6:] = -100
            mask[6:] = 0
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, logging_steps=1, learning_rate=0.01, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    return TrainingArguments(**{**given, **settings})


def same_jobs(model: nn.Module, plain: nn.Module, run: Any, apart: float = 1e-2) -> None:
    """The same losses step by step, and the same adapter in the end."""
    histories, states = [], []
    for m in (plain, model):
        trainer = run(m)
        trainer.train()
        histories.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        states.append({k: v for k, v in m.state_dict().items() if "lora_" in k})
    assert len(histories[0]) == 3
    assert histories[0] == pytest.approx(histories[1], abs=1e-3)
    theirs, ours = (torch.cat([v.flatten() for v in state.values()]) for state in states)
    assert (ours - theirs).norm() < apart * theirs.norm()


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"average_tokens_across_devices": False}])
def test_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    model, plain = pair()
    given = arguments(tmp_path, **settings)
    apart = 5e-2 if given.bf16 else 1e-2
    same_jobs(model, plain, lambda m: Trainer(m, given, None, Sentences()), apart)
    assert record(model).fused == 6 and record(model).made == 0


def test_label_smoothing_and_a_loss_function_of_the_users_read_the_logits(tmp_path: Path) -> None:
    model, plain = pair()
    settings = arguments(tmp_path, label_smoothing_factor=0.1)
    same_jobs(model, plain, lambda m: Trainer(m, settings, None, Sentences()))
    assert record(model).fused == 0

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits[:, :-1].reshape(-1, VOCAB)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))

    model, plain = pair()
    same_jobs(
        model,
        plain,
        lambda m: Trainer(m, arguments(tmp_path), None, Sentences(), compute_loss_func=loss),
    )


class Regularised(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        spread = outputs.logits.float().logsumexp(-1).pow(2).mean()
        loss = outputs.loss + 0.1 * spread
        return (loss, outputs) if return_outputs else loss


def test_a_compute_loss_that_reads_the_logits_too(tmp_path: Path) -> None:
    model, plain = pair()
    same_jobs(model, plain, lambda m: Regularised(m, arguments(tmp_path), None, Sentences()))
    assert record(model).fused == record(model).made == 6


@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation(bf16: bool, tmp_path: Path) -> None:
    model, plain = pair()
    found = []
    for m in (plain, model):
        seen: dict[str, Any] = {}

        def metrics(prediction: Any, seen: dict[str, Any] = seen) -> dict[str, float]:
            seen["logits"] = prediction.predictions
            return {"top": float((prediction.predictions.argmax(-1) == 5).mean())}

        settings = arguments(tmp_path, per_device_eval_batch_size=3, bf16_full_eval=bf16)
        trainer = Trainer(m, settings, eval_dataset=Sentences(), compute_metrics=metrics)
        found.append((trainer.evaluate(), seen["logits"]))
    (theirs, their_logits), (ours, our_logits) = found
    assert isinstance(our_logits, np.ndarray) and our_logits.shape == (8, 9, VOCAB)
    np.testing.assert_allclose(our_logits, their_logits, rtol=1e-2, atol=2e-2 if bf16 else 1e-4)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-2)
    assert record(model).fused == record(model).made == 3


def test_evaluation_of_the_loss_makes_no_logits(tmp_path: Path) -> None:
    model, plain = pair()
    settings = arguments(tmp_path)
    losses = [
        Trainer(m, settings, eval_dataset=Sentences()).evaluate()["eval_loss"]
        for m in (model, plain)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert record(model).fused == 1 and record(model).made == 0


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        pad_token="w0", eos_token="w2", bos_token="w1",
    )  # fmt: skip


@pytest.mark.slow
def test_trl(tmp_path: Path) -> None:
    """Its own forward reads the head's weight, and the loss is not the model's."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, plain = pair()
    rows = [{"input_ids": Sentences()[i]["input_ids"].tolist()} for i in range(8)]
    same_jobs(
        model,
        plain,
        lambda m: SFTTrainer(
            m,
            SFTConfig(
                output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2,
                gradient_accumulation_steps=2, logging_steps=1, learning_rate=0.01, report_to=[],
                save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        ),
    )  # fmt: skip


class Entropy(Trainer):
    """What TRL logs beside the loss."""

    entropies: list[float]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        with torch.no_grad():
            logits = outputs.logits[..., :-1, :].contiguous()
            logs = torch.nn.functional.log_softmax(logits, dim=-1)
            self.entropies.append(float(-(logs.exp() * logs).sum(-1).mean()))
            right = logits.argmax(-1) == inputs["labels"][..., 1:]
            self.entropies.append(float(right.float().mean()))
        return (loss, outputs) if return_outputs else loss


def test_metrics_of_the_logits_beside_the_loss(tmp_path: Path) -> None:
    model, plain = pair()
    trainers = []

    def run(m: Any) -> Any:
        trainers.append(Entropy(m, arguments(tmp_path), None, Sentences()))
        trainers[-1].entropies = []
        return trainers[-1]

    same_jobs(model, plain, run)
    assert trainers[0].entropies == pytest.approx(trainers[1].entropies, abs=1e-3)
    assert record(model).fused == record(model).made == 6
