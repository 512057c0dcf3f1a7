"""Time and memory of one LoRA linear, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.baselines import LoraShape
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.linear import (
    FROZEN,
    Checked,
    Config,
    frozen,
    inputs,
    ours,
    peft,
    row,
    step,
    variant_name,
)
from benchmarks.registry import Outcome, Request, Row, timed
from benchmarks.targets import Target
from benchmarks.timing import back_to_back, interleaved
from peftfast.memory import peak_bytes

HEADLINE = LoraShape(8192, 4096, 4096, 16)


def configs(request: Request) -> list[Config]:
    """The headline shape first; further shapes of 8B models on a GPU unless `quick`."""
    if request.device.type == "cpu":
        shapes = [LoraShape(256 if request.quick else 2048, 1024, 1024, 16)]
        return [Config(shape, torch.float32, p) for shape in shapes for p in (0.0, 0.1)]
    shapes = [HEADLINE]
    if not request.quick:
        shapes += [
            LoraShape(8192, 4096, 14336, 16),
            LoraShape(8192, 14336, 4096, 16),
            LoraShape(2048, 4096, 4096, 16),
            LoraShape(8192, 4096, 4096, 64),
        ]
    return [Config(shape, torch.bfloat16, p) for shape in shapes for p in (0.1, 0.0)]


@timed("lora_linear", "one LoRA linear, forward + backward: frozen alone, PEFT, peftfast")
def time(request: Request) -> Iterator[Outcome]:
    """Frozen alone; peftfast and PEFT with adapters of x's dtype and float32; PEFT compiled."""
    ceilings: Ceilings | None = None
    for config in configs(request):
        if request.expired(config.title):
            return
        ceilings = ceilings or measure_ceilings(request.device, config.dtype)
        yield _time_config(config, request, ceilings)


def variants(config: Config, device: torch.device, *, quick: bool) -> Iterator[Checked]:
    """Every variant, each of which has passed its gate."""
    yield frozen(config, device)
    yield ours(config, config.dtype, device)
    yield peft(config, config.dtype, device)
    if not quick:
        yield peft(config, config.dtype, device, compiled=True)
    if config.dtype != torch.float32:
        yield ours(config, torch.float32, device)
        yield peft(config, torch.float32, device)


def _time_config(config: Config, request: Request, ceilings: Ceilings) -> Outcome:
    device = request.device
    on_gpu = device.type == "cuda"
    chosen = list(variants(config, device, quick=request.quick))
    pairs = inputs(config, device)
    calls = {one.case.variant: step(one.case, pairs) for one in chosen}
    samples = 10 if request.quick else 40 if on_gpu else 15
    times = interleaved(calls, device, warmup=4, samples=samples, keep_queue_full=True)
    streamed = back_to_back(calls, device, calls=10, rounds=5) if on_gpu else {}
    rows = []
    for one in chosen:
        name = one.case.variant
        peak = peak_bytes(one.case.step, device)
        rows.append(row(one, config, times[name], ceilings, streamed.get(name), peak))
    return Outcome(rows, list(_targets(config, device, {row["variant"]: row for row in rows})))


def _targets(config: Config, device: torch.device, rows: dict[str, Row]) -> Iterator[Target]:
    us, peft = (rows[variant_name(who, config.dtype)] for who in ("peftfast", "peft"))
    our_time, peft_time = us["time"]["median"], peft["time"]["median"]
    where = f"dropout {config.dropout_p}"
    if device.type == "cpu":
        limit = 1.1 if config.dropout_p > 0 else 1.0
        yield Target(f"{where}: time, peftfast / PEFT", our_time / peft_time, limit)
    elif config.shape == HEADLINE:
        frozen_time = rows[FROZEN]["time"]["median"]
        yield Target(f"{where}: time, peftfast / frozen linear", our_time / frozen_time, 1.18)
        what = f"{where}: time, PEFT / peftfast, both with bfloat16 adapters"
        yield Target(what, peft_time / our_time, 1.22, at_least=True)
    peaks = us["peak_bytes"] / peft["peak_bytes"]
    yield Target(f"{where}: peak memory, peftfast / PEFT", peaks, 1.0)
