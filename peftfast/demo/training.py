"""The two fine-tunings: the same model, the same seed, with and without `peftfast.patch`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import peftfast
from peftfast.demo.classifier import Encoded, Settings, build
from peftfast.demo.measuring import Measured, measure

EVALUATION_BATCH = 64

Progress = Callable[[float], None]


@dataclasses.dataclass(frozen=True)
class Run(Measured):
    """One fine-tuning: its losses step by step, and what was measured of the trained model."""

    losses: list[float]
    accuracy: float
    trainable: int
    parameters: int


def train_pair(
    settings: Settings,
    data: Encoded,
    lora_dropout: float,
    progress: Callable[[str, int], contextlib.AbstractContextManager[Progress]],
) -> tuple[dict[str, Run], PeftModel]:
    """Fine-tune without and with `peftfast.patch`, and measure both side by side.

    Args:
        settings: what both share.
        data: the texts.
        lora_dropout: the adapters' dropout rate.
        progress: given a name and a number of steps, a context that takes each step's loss.

    Returns:
        The runs "plain" and "patched", and the patched model.
    """
    models, outcomes = {}, {}
    for name in ("plain", "patched"):
        model = build(settings, data, lora_dropout)
        if name == "patched":
            peftfast.patch(model, impl=settings.impl)
        with progress(name, settings.steps) as advance:
            outcomes[name] = _train(model, settings, data, advance)
        models[name] = model
    runs = {}
    for name, measured in measure(models, data, settings).items():
        losses, accuracy = outcomes[name]
        trainable, parameters = models[name].get_nb_trainable_parameters()
        runs[name] = Run(
            **dataclasses.asdict(measured),
            losses=losses,
            accuracy=accuracy,
            trainable=trainable,
            parameters=parameters,
        )
    return runs, models["patched"]


def _train(
    model: PeftModel, settings: Settings, data: Encoded, advance: Progress
) -> tuple[list[float], float]:
    """Every step's loss, and the accuracy on the test part afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=EVALUATION_BATCH,
            learning_rate=settings.learning_rate,
            adam_beta2=0.98,
            lr_scheduler_type="linear",
            warmup_steps=max(1, settings.steps // 20),
            train_sampling_strategy="group_by_length",
            seed=settings.seed,
            use_cpu=settings.device == "cpu",
            dataloader_pin_memory=settings.device != "cpu",
            label_names=["labels"],
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        # Trainer would spread the batches over every GPU of the machine.
        arguments._n_gpu = min(1, arguments.n_gpu)
        trainer = _RecordingTrainer(
            model=model,
            args=arguments,
            train_dataset=cast("Dataset[Any]", data.train),
            data_collator=DataCollatorWithPadding(data.tokenizer),
            preprocess_logits_for_metrics=_most_likely,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Advance(advance, trainer.losses))
        trainer.train()
        tested = trainer.predict(cast("Dataset[Any]", data.test))
    # Trainer may take the texts in an order of its own: the labels are those that it met.
    accuracy = float((np.asarray(tested.predictions) == np.asarray(tested.label_ids)).mean())
    return torch.stack(trainer.losses).tolist(), accuracy


def _most_likely(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Each text's label; encoder-decoder models return more than the logits, after them."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


class _RecordingTrainer(Trainer):
    """Keeps every training step's loss unrounded."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses: list[Tensor] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.losses.append((result[0] if isinstance(result, tuple) else result).detach())
        return result


class _Advance(TrainerCallback):
    """Reports each step's loss to the progress display."""

    def __init__(self, advance: Progress, losses: list[Tensor]) -> None:
        self.advance = advance
        self.losses = losses

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(self.losses[-1].item())
