"""A text classifier trained and tested: one loop for every method."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Samples
from peftfast.memory import peak_bytes

EVALUATION_BATCH = 128
WINDOW = 50  # batches whose examples are sorted by length together
CLIP = 1.0

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Example:
    """A text as token ids, and the index of its label."""

    ids: list[int]
    label: int


class Classifier(nn.Module):
    """An encoder, the mean of its outputs over a text's tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [texts, labels]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        logits: Tensor = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        return logits


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW without weight decay, linear warmup and decay. The classifier,
    which is new, takes a rate of its own where the rest has a lower one.
    """

    epochs: int
    batch: int
    learning_rate: float
    seed: int
    classifier_rate: float = 3e-3
    warmup: float = 0.06

    def steps(self, examples: int) -> int:
        """Optimiser steps over so many examples."""
        return self.epochs * -(-examples // self.batch)

    def scale(self, step: int, steps: int) -> float:
        """The share of the learning rate that step `step` of `steps` takes, from 0."""
        rising = max(1, round(self.warmup * steps))
        return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


@dataclass(frozen=True)
class Trained:
    """What a training gave: each epoch's mean loss, the steps' seconds, and how long it took."""

    losses: list[float]
    steps: Samples
    seconds: float
    tokens_per_second: float


def collate(
    examples: Sequence[Example], pad: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """The examples padded to the longest, and their labels."""
    width = max(len(example.ids) for example in examples)
    rows = [example.ids + [pad] * (width - len(example.ids)) for example in examples]
    masks = [[1] * len(example.ids) + [0] * (width - len(example.ids)) for example in examples]
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    labels = torch.tensor([example.label for example in examples])
    return {name: value.to(device) for name, value in inputs.items()}, labels.to(device)


def shuffled_batches(
    examples: Sequence[Example], batch: int, draw: random.Random
) -> list[list[Example]]:
    """One epoch in a drawn order, in batches of texts of similar length."""
    order = draw.sample(list(examples), len(examples))
    batches: list[list[Example]] = []
    for start in range(0, len(order), WINDOW * batch):
        window = sorted(order[start : start + WINDOW * batch], key=lambda e: len(e.ids))
        batches += [window[at : at + batch] for at in range(0, len(window), batch)]
    draw.shuffle(batches)
    return batches


def train(
    model: nn.Module, examples: Sequence[Example], pad: int, recipe: Recipe, advance: Advance
) -> Trained:
    """Trains what requires a gradient; `advance` is called with each step's loss.

    The seconds of a step are the processor's on a CPU, which other work on the machine changes
    little, and those of the clock on a GPU.
    """
    device = next(model.parameters()).device
    clock = process_time if device.type == "cpu" else perf_counter
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups(model, recipe), weight_decay=0.0, fused=True)
    highest = [group["lr"] for group in optimizer.param_groups]
    steps = recipe.steps(len(examples))
    draw = random.Random(recipe.seed)
    model.train()
    means: list[float] = []
    seconds: list[float] = []
    tokens = 0
    began = perf_counter()
    for _ in range(recipe.epochs):
        losses = []
        for batch in shuffled_batches(examples, recipe.batch, draw):
            start = clock()
            inputs, labels = collate(batch, pad, device)
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * recipe.scale(len(seconds), steps)
            loss = _gradients(model, inputs, labels)
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(clock() - start)
            tokens += inputs["input_ids"].numel()
            advance(losses[-1])
        means.append(sum(losses) / len(losses))
    taken = Samples.of(seconds)
    return Trained(means, taken, perf_counter() - began, tokens / sum(seconds))


def groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """What is trained, with its highest learning rate: the classifier and the rest."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if is_classifier(name)]
    body = [p for name, p in trained if not is_classifier(name)]
    rates = max(recipe.classifier_rate, recipe.learning_rate), recipe.learning_rate
    return [
        {"params": chosen, "lr": rate}
        for chosen, rate in zip((head, body), rates, strict=True)
        if chosen
    ]


def is_classifier(name: str) -> bool:
    """Whether a parameter of a `Classifier` is of its last layer."""
    return name.startswith("classifier.")


@torch.no_grad()
def accuracy(model: nn.Module, examples: Sequence[Example], pad: int) -> float:
    """The share of the examples whose label is the most likely one."""
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example.ids))
    was_training = model.training
    model.eval()
    right = 0
    for start in range(0, len(ordered), EVALUATION_BATCH):
        inputs, labels = collate(ordered[start : start + EVALUATION_BATCH], pad, device)
        right += int((model(**inputs).argmax(-1) == labels).sum())
    model.train(was_training)
    return right / len(ordered)


def memory(model: nn.Module, examples: Sequence[Example], pad: int, batch: int) -> tuple[int, int]:
    """Bytes of a step's gradients and activations at their peak, on the `batch` longest texts; and
    of what lives between steps: the parameters, and two moments of each trained one.
    """
    device = next(model.parameters()).device
    longest = sorted(examples, key=lambda example: -len(example.ids))[:batch]
    inputs, labels = collate(longest, pad, device)
    peak = peak_bytes(partial(_gradients, model, inputs, labels), device)
    model.zero_grad(set_to_none=True)
    held = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return peak, sum(size * (3 if trained else 1) for size, trained in held)


def _gradients(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(**inputs), labels)
    loss.backward()
    return loss.detach()
