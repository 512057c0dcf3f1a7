"""Time and memory of a training step of Llama-shaped models: forward, backward, AdamW."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftfast
from benchmarks.cases import short
from benchmarks.ceilings import Ceilings, Floor, measure_ceilings
from benchmarks.gates import Gate, gate
from benchmarks.models import (
    RANK,
    SIZES,
    Size,
    base_model,
    compile_layers,
    loss_and_gradients,
    token_batches,
    trainable,
    with_adapters,
)
from benchmarks.registry import Outcome, Request, Row, timed
from benchmarks.targets import Target
from benchmarks.timing import interleaved
from peftfast.memory import peak_bytes

BATCHES = 4
SEED = 3


@dataclass(frozen=True)
class Config:
    """One configuration of the benchmark."""

    size: Size
    dtype: torch.dtype
    dropout_p: float
    compiled: bool

    @property
    def title(self) -> str:
        """The configuration in a line."""
        return f"{self.size.name}, {short(self.dtype)}, dropout {self.dropout_p}"

    def as_dict(self) -> Row:
        """The fields that tell rows apart, for JSON."""
        return {
            "model": self.size.name,
            "batch": self.size.batch,
            "sequence": self.size.sequence,
            "rank": RANK,
            "dtype": short(self.dtype),
            "dropout": self.dropout_p,
        }


@dataclass(frozen=True)
class Variant:
    """What is done to a base model: `widened` adapters are float32 over a 16-bit base."""

    name: str
    widened: bool = False
    patched: bool = False
    compiled: bool = False

    def apply(self, base: nn.Module, dropout_p: float) -> nn.Module:
        """A model of this variant that shares the weights of `base`."""
        model = with_adapters(base, dropout_p, widened=self.widened)
        if self.patched:
            peftfast.patch(model)
        if self.compiled:
            compile_layers(model)
        return model


def configs(request: Request) -> list[Config]:
    """A tiny model on a CPU; 160M to 8B on a GPU, of which `quick` takes the ends."""
    if request.device.type == "cpu":
        cases = [(torch.float32, 0.0), (torch.float32, 0.1)]
        cases += [] if request.quick else [(torch.bfloat16, 0.0)]
        return [Config(SIZES["tiny"], dtype, p, compiled=not request.quick) for dtype, p in cases]
    names = ("160M", "8B") if request.quick else ("160M", "1B", "3B", "8B")
    probabilities = (0.1,) if request.quick else (0.1, 0.0)
    return [
        Config(SIZES[name], torch.bfloat16, p, compiled=not request.quick or name == "160M")
        for name in names
        for p in probabilities
    ]


def variants(config: Config) -> list[Variant]:
    """peftfast and PEFT with adapters of the base's dtype, with float32 ones, and PEFT compiled."""
    native = short(config.dtype)
    found = [
        Variant(f"peftfast, {native} adapters", patched=True),
        Variant(f"peft, {native} adapters"),
    ]
    if config.compiled:
        found.append(Variant(f"peft compiled, {native} adapters", compiled=True))
    if config.dtype != torch.float32:
        found.append(Variant("peftfast, float32 adapters", widened=True, patched=True))
        found.append(Variant("peft, float32 adapters", widened=True))
    return found


class Trainer:
    """A model, its optimizer, and the step that is timed."""

    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        self.model = model
        self.batches = batches
        fused = batches[0].is_cuda
        self.optimizer = torch.optim.AdamW(trainable(model), lr=1e-4, fused=fused)

    def gradients(self, round_: int) -> Tensor:
        tokens = self.batches[round_ % len(self.batches)]
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    def step(self, round_: int) -> None:
        self.gradients(round_)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def static_bytes(self) -> int:
        """Bytes of the parameters and of the optimizer's state, which live between steps."""
        state = [
            value
            for values in self.optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        return sum(t.numel() * t.element_size() for t in [*self.model.parameters(), *state])


def check(config: Config, variant: Variant, device: torch.device) -> Gate:
    """Loss and adapter gradients of the variant on a model of two layers of the same widths.

    The reference is the same model in float64 (float32 on a GPU); with dropout it is peftfast's
    reference implementation, which draws the same masks, and PEFT, whose masks can't be
    predicted, is checked without.
    """
    size = replace(
        config.size, layers=2, vocabulary=min(config.size.vocabulary, 4096), batch=1, sequence=256
    )
    exact_dtype = torch.float32 if device.type == "cuda" else torch.float64
    (tokens,) = token_batches(size, device, 1)
    base = base_model(size, config.dtype, device)
    dropout_p = config.dropout_p if variant.patched else 0.0

    def reference(weights: nn.Module, widened: bool) -> dict[str, Tensor]:
        model = with_adapters(weights, dropout_p, widened=widened)
        if dropout_p > 0:
            peftfast.patch(model, impl="reference")
        return loss_and_gradients(model, tokens, SEED)

    exact = reference(copy.deepcopy(base).to(exact_dtype), False)
    eager = reference(base, variant.widened)
    results = loss_and_gradients(variant.apply(base, dropout_p), tokens, SEED)
    checked = gate(f"PyTorch at {short(exact_dtype)}", results, eager, exact, config.dtype)
    checked.require(variant.name)
    return checked


def floor(base: nn.Module, trainer: Trainer, ceilings: Ceilings) -> Floor:
    """FLOPs of one forward and backward as PyTorch counts them; bytes: the weights, read twice."""
    with FlopCounterMode(display=False) as counter:
        trainer.gradients(0)
    trainer.optimizer.zero_grad(set_to_none=True)
    weights = sum(p.numel() * p.element_size() for p in base.parameters() if p.ndim == 2)
    return Floor.of(counter.get_total_flops(), 2 * weights, ceilings)


@timed("train_step", "a training step of Llama-shaped models: peftfast, PEFT, PEFT compiled")
def time(request: Request) -> Iterator[Outcome]:
    """A tiny model on a CPU; 160M to 8B on a GPU."""
    ceilings: Ceilings | None = None
    for config in configs(request):
        if request.expired(config.title):
            return
        ceilings = ceilings or measure_ceilings(request.device, config.dtype)
        yield _time_config(config, request, ceilings)


def _time_config(config: Config, request: Request, ceilings: Ceilings) -> Outcome:
    device = request.device
    chosen = variants(config)
    gates = {}
    for variant in chosen:
        request.say(f"checking {variant.name}")
        gates[variant.name] = check(config, variant, device)
    base = base_model(config.size, config.dtype, device)
    batches = token_batches(config.size, device, BATCHES)
    trainers = {v.name: Trainer(v.apply(base, config.dropout_p), batches) for v in chosen}
    calls: dict[str, Callable[[int], object]] = {n: t.step for n, t in trainers.items()}
    samples = 5 if request.quick else 15 if device.type == "cuda" else 9
    times = interleaved(calls, device, warmup=2 if request.quick else 3, samples=samples)
    least = floor(base, trainers[f"peft, {short(config.dtype)} adapters"], ceilings)
    rows: list[Row] = []
    for name, trainer in trainers.items():
        taken = times[name]
        static = trainer.static_bytes()
        rows.append(
            {
                "variant": name,
                "config": config.as_dict(),
                "time": taken.as_dict(),
                "back_to_back": None,
                "tokens_per_second": config.size.tokens / taken.median,
                "peak_bytes": static + peak_bytes(partial(trainer.step, 0), device),
                "static_bytes": static,
                "floor": least.as_dict(),
                "distance_to_floor": taken.median / least.seconds,
                "ceilings": ceilings.as_dict(),
                "gate": gates[name].as_dict(),
                **_fused(trainer.model, name),
            }
        )
    return Outcome(rows, list(_targets(config, device, {row["variant"]: row for row in rows})))


def _fused(model: nn.Module, name: str) -> dict[str, Any]:
    if not name.startswith("peftfast"):
        return {}
    report = peftfast.report(model)
    return {"fused": len(report.fused), "not_fused": len(report.not_fused)}


def _targets(config: Config, device: torch.device, rows: dict[str, Row]) -> Iterator[Target]:
    limit = 1.1 if device.type == "cpu" and config.dropout_p > 0 else 1.0
    for adapters in dict.fromkeys((short(config.dtype), "float32")):
        us, peft = (rows[f"{who}, {adapters} adapters"] for who in ("peftfast", "peft"))
        where = f"{config.title}, {adapters} adapters"
        ratio = us["time"]["median"] / peft["time"]["median"]
        yield Target(f"{where}: time, peftfast / PEFT", ratio, limit)
        peaks = us["peak_bytes"] / peft["peak_bytes"]
        yield Target(f"{where}: peak memory, peftfast / PEFT", peaks, 1.0)
