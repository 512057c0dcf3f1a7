"""Bytes of a step of a model with PEFT's Prefix-Tuning, as it is and patched, and what the step
keeps for its backward a row of the batch, each beside the same model without a prefix.

In units of tokens x layers x hidden x itemsize. Inputs are embedded and need a gradient, so that
the first layer keeps as much without a prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

import peftfast
from benchmarks.cases import counted_row, short
from benchmarks.counting import TrafficCounter
from benchmarks.gates import GateFailed
from benchmarks.models import Size, base_model
from benchmarks.quantised import shared_state
from benchmarks.registry import CountedReport, Say, counted
from benchmarks.targets import Target
from peftfast.memory import saved_bytes

SIZE = Size("4 x 1024", 1024, 2816, 4, 16, 4, 1024, 8, 512)
TOKENS = 64
DTYPE = torch.float32
MOVED_LIMIT, GROWTH_LIMIT = 1.10, 1.02  # times the model without a prefix
PEFT, OURS, WITHOUT = "peft", "peftfast", "without a prefix"
_CLOSE = 1e-4
CPU = torch.device("cpu")

Forward = Callable[[int], Tensor]  # of how many rows, to a loss


@counted("prefix_model", "a step of PEFT's Prefix-Tuning: as it is, patched, and without a prefix")
def count(say: Say) -> CountedReport:
    """Bytes moved by a step, and kept for the backward by 16 rows more than 8 keep."""
    return report(SIZE, TOKENS, say)


def report(size: Size, tokens: int, say: Say) -> CountedReport:
    """The same of another size and prefix."""
    unit = size.tokens * size.layers * size.hidden * DTYPE.itemsize
    base = base_model(size, DTYPE, CPU)
    models = {PEFT: _prefixed(base, tokens), OURS: peftfast.patch(_prefixed(base, tokens))}
    _require_equal(models, replace(size, batch=2, sequence=16))
    rows, moved, growth = [], {}, {}
    for who, model in models.items():
        for beside in (False, True):
            name = f"{who}, {WITHOUT}" if beside else who
            say(name)
            forward = _forward(model, size, beside)
            forward(1).backward()
            with TrafficCounter() as traffic:
                forward(size.batch).backward()
            more, less = (_saved(forward, model, n * size.batch) for n in (2, 1))
            moved[who, beside], growth[who, beside] = traffic.total.moved, more - less
            row = counted_row(name, {}, traffic, unit)
            rows.append({**row, "saved_growth_u": (more - less) / unit})
    targets = [
        Target(f"{what}, times without a prefix", held[OURS, False] / held[OURS, True], limit)
        for what, held, limit in (
            ("bytes moved", moved, MOVED_LIMIT),
            (f"bytes kept for {size.batch} rows more", growth, GROWTH_LIMIT),
        )
    ]
    config = {"model": size.name, "batch": size.batch, "sequence": size.sequence}
    return CountedReport(
        {**config, "prefix": tokens, "dtype": short(DTYPE)}, unit, rows, {}, targets
    )


def _prefixed(base: nn.Module, tokens: int) -> Any:
    torch.manual_seed(0)
    config = PrefixTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base, shared_state(base)), config)


def _forward(model: Any, size: Size, without: bool) -> Forward:
    """Of the model, or of the one below, which has no prefix."""
    run = model.base_model if without else model

    def forward(rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = rows, size.sequence
        ids = torch.randint(size.vocabulary, shape, generator=generator)
        embedded = torch.randn(*shape, size.hidden, generator=generator).requires_grad_()
        loss: Tensor = run(inputs_embeds=embedded, labels=ids).loss
        return loss

    return forward


def _saved(forward: Forward, model: Any, rows: int) -> int:
    return saved_bytes(lambda: forward(rows), exclude=model, at_end=True)


def _require_equal(models: dict[str, Any], size: Size) -> None:
    """Losses and gradients of the prefix agree."""
    found = {}
    for who, model in models.items():
        loss = _forward(model, size, False)(size.batch)
        loss.backward()
        weight = model.prompt_encoder["default"].embedding.weight
        found[who] = loss.detach(), weight.grad
        weight.grad = None
    for theirs, ours in zip(found[PEFT], found[OURS], strict=True):
        apart = float((theirs - ours).norm() / theirs.norm())
        if not apart <= _CLOSE:
            raise GateFailed(f"the patched model's results differ from PEFT's by {apart:.2e}")
