"""What a training step of several models takes, measured side by side."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from peftfast.demo.classifier import Encoded, Settings
from peftfast.memory import peak_bytes, saved_bytes

TIMED_BATCHES = 8
TIMED_ROUNDS = 3


@dataclass(frozen=True)
class Measured:
    """A model's forward and backward: its speed, padding not counted, and its bytes.

    The bytes are those of one batch, over what was there before it.
    """

    tokens_per_second: float
    saved_bytes: int
    peak_bytes: int


def measure(models: dict[str, PeftModel], data: Encoded, settings: Settings) -> dict[str, Measured]:
    """Measure each model in training mode, all on the same batches; their times taken in turns.

    Speed is that of batches from the shortest texts to the longest, bytes those of the longest.
    """
    batches = [
        data.batch(examples, settings.device)
        for examples in spread(data.train, settings.batch_size, TIMED_BATCHES)
    ]
    sizes = {name: _bytes(model, batches[-1], settings.device) for name, model in models.items()}
    seconds = _interleaved(models, batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {name: Measured(tokens / seconds[name], *sizes[name]) for name in models}


def spread(
    examples: list[dict[str, Any]], batch_size: int, count: int
) -> list[list[dict[str, Any]]]:
    """At most `count` batches of texts of like length, evenly from the shortest to the longest."""
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))
    available = max(1, len(by_length) // batch_size)
    ends = [len(by_length) - at * batch_size for at in reversed(range(available))]
    chosen = sorted({round(at) for at in np.linspace(0, available - 1, count)})
    return [by_length[max(0, ends[at] - batch_size) : ends[at]] for at in chosen]


def _bytes(model: PeftModel, batch: dict[str, Tensor], device: str) -> tuple[int, int]:
    """Saved and peak bytes."""
    model.train()
    model.zero_grad(set_to_none=True)
    saved = saved_bytes(functools.partial(_loss, model, batch), exclude=model)
    return saved, peak_bytes(functools.partial(_forward_and_backward, model, batch), device)


def _interleaved(
    models: dict[str, PeftModel], batches: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Seconds of forward and backward over the batches: each batch's best of some rounds."""
    best = {name: [float("inf")] * len(batches) for name in models}
    for round_ in range(TIMED_ROUNDS):
        for index, batch in enumerate(batches):
            order = list(models) if (round_ + index) % 2 == 0 else list(models)[::-1]
            for name in order:
                best[name][index] = min(best[name][index], _seconds(models[name], batch))
    return {name: sum(times) for name, times in best.items()}


def _seconds(model: PeftModel, batch: dict[str, Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    _synchronize(batch)
    began = time.perf_counter()
    _forward_and_backward(model, batch)
    _synchronize(batch)
    return time.perf_counter() - began


def _loss(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def _forward_and_backward(model: PeftModel, batch: dict[str, Tensor]) -> None:
    _loss(model, batch).backward()


def _synchronize(batch: dict[str, Tensor]) -> None:
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
