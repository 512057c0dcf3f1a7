"""Tiles of the LoRA kernels, one kernel's changed at a time, on a whole forward and backward.

The rows are what the tables in `peftfast_kernels.tiles` are tuned from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks.baselines import LoraShape
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.gates import GateFailed
from benchmarks.linear import Checked, Config, Step, frozen, inputs, ours, row, step
from benchmarks.plans import plan_forced
from benchmarks.registry import BenchmarkError, Outcome, Request, Row, timed
from benchmarks.timing import interleaved
from peftfast_kernels import tiles

Change = Mapping[str, int]

# By the function of `tiles` that pins a kernel's tile: changes to it; none is the pinned tile.
CANDIDATES: dict[str, list[Change]] = {
    "matmul_tile": [
        {},
        {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 3},
        {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3},
        {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 4},
        {"block_m": 128, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 3},
        {"block_m": 128, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 4},
        {"block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 4},
    ],
    "shrink_tile": [
        {},
        {"block_m": 16},
        {"block_m": 64},
        {"block_m": 128, "num_warps": 8},
        {"block_k": 64},
        {"block_k": 256},
        {"num_stages": 4},
    ],
    "grad_b_tile": [
        {},
        {"block_m": 16},
        {"block_m": 64},
        {"block_n": 64, "num_warps": 4},
        {"block_n": 128, "num_warps": 4},
        {"num_stages": 3},
    ],
    "grad_a_tile": [
        {},
        {"block_m": 16},
        {"block_m": 64},
        {"block_n": 64},
        {"block_n": 256, "num_warps": 8},
        {"num_stages": 3},
    ],
}


@contextmanager
def tile_changed(function: str, change: Change) -> Iterator[None]:
    """Has `tiles.<function>` give its own tile with `change` applied."""
    pinned = getattr(tiles, function)

    def changed(*args: Any, **kwargs: Any) -> tiles.Tile:
        return replace(pinned(*args, **kwargs), **change)

    setattr(tiles, function, changed)
    try:
        yield
    finally:
        setattr(tiles, function, pinned)


def label(change: Change) -> str:
    """ "pinned", or "block_m 64, num_warps 8"."""
    return ", ".join(f"{key} {value}" for key, value in change.items()) or "pinned"


def _changed(function: str, change: Change, call: Step) -> Step:
    def run(round_: int) -> object:
        with plan_forced("fused"), tile_changed(function, change):
            return call(round_)

    return run


@timed("lora_tiles", "other tiles for each LoRA kernel, to tune the tables (GPU)")
def time(request: Request) -> Iterator[Outcome]:
    """Each candidate that compiles, fits and is right, beside the pinned tile."""
    if request.device.type != "cuda":
        raise BenchmarkError("lora_tiles compares GPU kernels: it needs --device cuda")
    ceilings = measure_ceilings(request.device, torch.bfloat16)
    for p in (0.1,) if request.quick else (0.1, 0.0):
        config = Config(LoraShape(8192, 4096, 4096, 16), torch.bfloat16, p)
        for function, changes in CANDIDATES.items():
            if request.expired(f"{function}, {config.title}"):
                return
            yield _time_kernel(function, changes, config, request, ceilings)


def _time_kernel(
    function: str, changes: list[Change], config: Config, request: Request, ceilings: Ceilings
) -> Outcome:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    device = request.device
    pairs = inputs(config, device)
    base = frozen(config, device)
    chosen: list[Checked] = [base]
    calls = {base.case.variant: step(base.case, pairs)}
    refused: dict[str, str] = {}
    for change in changes:
        try:
            with plan_forced("fused"), tile_changed(function, change):
                checked = ours(config, config.dtype, device)
        except (OutOfResources, PTXASError, CompilationError, GateFailed) as error:
            refused[label(change)] = str(error).splitlines()[0]
            continue
        case = replace(checked.case, variant=label(change))
        chosen.append(Checked(case, checked.gate))
        calls[case.variant] = _changed(function, change, step(case, pairs))
    samples = 10 if request.quick else 30
    times = interleaved(calls, device, warmup=3, samples=samples, keep_queue_full=True)
    rows: list[Row] = []
    for one in chosen:
        measured = row(one, config, times[one.case.variant], ceilings)
        rows.append({**measured, "config": {**measured["config"], "tile": function}})
    return Outcome(rows, [], [f"{function}, {name}: {why}" for name, why in refused.items()])
