"""QLoRA over a bitsandbytes model: a training step and a decode step, PEFT as it is and patched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peftfast
from benchmarks.cases import short
from benchmarks.ceilings import Ceilings, Floor, measure_ceilings
from benchmarks.gates import Gate, gate
from benchmarks.models import (
    RANK,
    SIZES,
    Size,
    base_model,
    loss_and_gradients,
    token_batches,
    trainable,
)
from benchmarks.quantised import dense, four_bit_bytes, quantised, shared_state
from benchmarks.registry import Outcome, Request, Row, timed
from benchmarks.targets import Target
from benchmarks.timed.train_step import Trainer
from benchmarks.timing import interleaved
from peftfast.memory import peak_bytes
from peftfast.ops import nf4
from peftfast.ops.scratch import scratch_bytes

SMALL = Size("4 x 1024", 1024, 2816, 4, 16, 4, 4096, 1, 128)
PROMPT = 64
BATCHES, SEED = 4, 3


@dataclass(frozen=True)
class Config:
    """A model, the dtype of what is not quantised and of the 4-bit layers' products, adapters'."""

    size: Size
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout_p: float = 0.0

    @property
    def title(self) -> str:
        """The configuration in a line."""
        return (
            f"{self.size.name}, {short(self.dtype)}, {short(self.adapter_dtype)} adapters,"
            f" dropout {self.dropout_p}"
        )

    def as_dict(self, mode: str) -> Row:
        """The fields that tell rows apart, for JSON."""
        return {
            "mode": mode,
            "model": self.size.name,
            "batch": self.size.batch,
            "sequence": self.size.sequence,
            "rank": RANK,
            "dtype": short(self.dtype),
            "adapters": short(self.adapter_dtype),
            "dropout": self.dropout_p,
        }


def configs(request: Request) -> list[Config]:
    """A model of four layers on a CPU; 1B and 8B on a GPU, of which `quick` takes the second."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if request.device.type == "cpu":
        found = [Config(SMALL, bf16, fp32), Config(SMALL, bf16, bf16)]
        return found if request.quick else [*found, Config(SMALL, fp32, fp32)]
    if request.quick:
        return [Config(SIZES["8B"], bf16, fp32)]
    return [
        Config(SIZES[name], bf16, adapters, p)
        for name in ("8B", "1B")
        for adapters in (fp32, bf16)
        for p in (0.0, 0.1)
    ]


def adapted(base: nn.Module, config: Config, *, patched: bool) -> nn.Module:
    """PEFT's LoRA over every linear of a copy of `base` that shares its weights; B is not zero."""
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=config.dropout_p, target_modules="all-linear"
    )
    other: Any = get_peft_model(copy.deepcopy(base, shared_state(base)), lora)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(other):
        values = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.data = values.to(parameter.device, config.adapter_dtype)
    if patched:
        peftfast.patch(other, strict=True)
    model: nn.Module = other.train()
    return model


def check(config: Config, device: torch.device) -> Gate:
    """Loss and gradients of the patched model, on two layers of the same widths, without dropout.

    The reference is the same model in float64 (float32 on a GPU) over dense weights of the very
    values, eager PyTorch is PEFT over bitsandbytes.
    """
    size = replace(config.size, layers=2, vocabulary=min(config.size.vocabulary, 4096))
    small = replace(config, size=size, dropout_p=0.0)
    (tokens,) = token_batches(size, device, 1)
    base = quantised(base_model(size, config.dtype, device), config.dtype)
    wide = torch.float32 if device.type == "cuda" else torch.float64
    truth = adapted(
        dense(base, config.dtype, wide), replace(small, adapter_dtype=wide), patched=False
    )
    exact = loss_and_gradients(truth, tokens, SEED)
    eager = loss_and_gradients(adapted(base, small, patched=False), tokens, SEED)
    ours = loss_and_gradients(adapted(base, small, patched=True), tokens, SEED)
    checked = gate(f"PyTorch at {short(wide)}", ours, eager, exact, config.dtype)
    checked.require("peftfast")
    return checked


@timed("train_step_qlora", "QLoRA over bitsandbytes: a training step, a decode step")
def time(request: Request) -> Iterator[Outcome]:
    """PEFT over bitsandbytes as it is, and patched."""
    ceilings: Ceilings | None = None
    for config in configs(request):
        if request.expired(config.title):
            return
        ceilings = ceilings or measure_ceilings(request.device, config.dtype)
        request.say(f"checking {config.title}")
        checked = check(config, request.device)
        base = quantised(base_model(config.size, config.dtype, request.device), config.dtype)
        models = {
            "peftfast": adapted(base, config, patched=True),
            "peft + bitsandbytes": adapted(base, config, patched=False),
        }
        yield _train(config, request, ceilings, checked, base, models)
        yield _decode(config, request, ceilings, checked, base, models)


def _train(
    config: Config,
    request: Request,
    ceilings: Ceilings,
    checked: Gate,
    base: nn.Module,
    models: dict[str, nn.Module],
) -> Outcome:
    device = request.device
    batches = token_batches(config.size, device, BATCHES)
    trainers = {name: Trainer(model, batches) for name, model in models.items()}
    calls: dict[str, Callable[[int], object]] = {n: t.step for n, t in trainers.items()}
    samples = 7 if request.quick else 15
    times = interleaved(calls, device, warmup=2, samples=samples)
    elements = sum(w.numel() for w in _matrices(base))
    least = Floor.of(4 * elements * config.size.tokens, 2 * four_bit_bytes(base), ceilings)
    rows = []
    for name, trainer in trainers.items():
        # The scratch buffer outlives a step: without it, the step that is watched allocates it.
        nf4.clear_scratch()
        static = trainer.static_bytes()
        row = _row(name, config, "train", times[name], least, ceilings, checked)
        peak = peak_bytes(partial(trainer.step, 0), device)
        row |= {"peak_bytes": static + peak, "static_bytes": static}
        row |= {"four_bit_bytes": four_bit_bytes(base), "scratch_bytes": scratch_bytes()}
        rows.append(row)
    ours, theirs = (row["time"]["median"] for row in rows)
    if config.dtype == torch.float32:
        limit = 1.0  # nothing is cast in either, and the products are the same
    else:
        limit = 1.25 if config.adapter_dtype == torch.float32 else 1.1
    peaks = rows[0]["peak_bytes"] / rows[1]["peak_bytes"]
    targets = [Target(f"{config.title}: peak memory, peftfast / PEFT", peaks, 1.0)]
    gain = Target(f"{config.title}: step, PEFT / peftfast", theirs / ours, limit, at_least=True)
    return Outcome(rows, [gain, *targets])


def _decode(
    config: Config,
    request: Request,
    ceilings: Ceilings,
    checked: Gate,
    base: nn.Module,
    models: dict[str, nn.Module],
) -> Outcome:
    """One token after a prompt, batch 1, with a cache."""
    device = request.device
    (prompt,) = token_batches(replace(config.size, batch=1, sequence=PROMPT), device, 1)
    calls: dict[str, Callable[[int], object]] = {}
    for name, model in models.items():
        calls[name] = _decoder(model.eval(), prompt)
    with torch.inference_mode():
        times = interleaved(calls, device, warmup=3, samples=10 if request.quick else 30)
    elements = sum(w.numel() for w in _matrices(base))
    least = Floor.of(2 * elements, four_bit_bytes(base), ceilings)
    rows = [
        _row(name, config, "decode", times[name], least, ceilings, checked, tokens=1)
        for name in models
    ]
    ours, theirs = (row["time"]["median"] for row in rows)
    gain = theirs / ours
    what = f"{config.title}: decode step, PEFT / peftfast"
    return Outcome(rows, [Target(what, gain, 1.5, at_least=True)])


def _decoder(model: Any, prompt: Tensor) -> Callable[[int], object]:
    with torch.inference_mode():
        cache = model(input_ids=prompt, use_cache=True).past_key_values

    def step(round_: int) -> object:
        out = model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)  # as it was: every step sees the same context
        return out

    return step


def _matrices(base: nn.Module) -> Iterator[Any]:
    """What a token is multiplied by: the 4-bit weights, as they once were, and the head."""
    decoder: Any = base
    for module in base.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield torch.empty(state.shape, device="meta")
    yield decoder.get_output_embeddings().weight


def _row(
    name: str,
    config: Config,
    mode: str,
    taken: Any,
    least: Floor,
    ceilings: Ceilings,
    checked: Gate,
    tokens: int | None = None,
) -> Row:
    return {
        "variant": name,
        "config": config.as_dict(mode),
        "time": taken.as_dict(),
        "back_to_back": None,
        "tokens_per_second": (tokens or config.size.tokens) / taken.median,
        "peak_bytes": None,
        "floor": least.as_dict(),
        "distance_to_floor": taken.median / least.seconds,
        "ceilings": ceilings.as_dict(),
        "gate": checked.as_dict() if name == "peftfast" else None,
    }
