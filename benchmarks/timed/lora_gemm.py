"""The two plans of a LoRA linear's GEMM: the up-projection inside Triton's GEMM, or the library's
GEMM beside it.

The rows are what the dispatch rule, `peftfast_kernels.tiles.gemm_plan`, is tuned from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.baselines import LoraShape
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.linear import Checked, Config, Step, frozen, inputs, ours, row, step
from benchmarks.plans import PLANS, VARIABLE, plan_forced
from benchmarks.registry import BenchmarkError, Outcome, Request, timed
from benchmarks.timing import interleaved

ROWS = (512, 2048, 8192)
WIDTHS = ((1024, 1024), (4096, 4096), (4096, 14336), (14336, 4096))


def _planned(plan: str, call: Step) -> Step:
    def run(round_: int) -> object:
        with plan_forced(plan):
            return call(round_)

    return run


@timed("lora_gemm", "fused against library GEMM over shapes, to tune the dispatch rule (GPU)")
def time(request: Request) -> Iterator[Outcome]:
    """Frozen linear, and peftfast under either plan, dropout 0.1 and 0."""
    if request.device.type != "cuda":
        raise BenchmarkError("lora_gemm compares GPU kernels: it needs --device cuda")
    if VARIABLE in os.environ:
        raise BenchmarkError(f"{VARIABLE} is set; unset it: this benchmark sets both plans")
    ceilings = measure_ceilings(request.device, torch.bfloat16)
    for k, n in WIDTHS:
        for m in reversed(ROWS):
            for p in (0.1,) if request.quick else (0.1, 0.0):
                config = Config(LoraShape(m, k, n, 16), torch.bfloat16, p)
                if request.expired(config.title):
                    return
                yield _time_config(config, request, ceilings)


def _time_config(config: Config, request: Request, ceilings: Ceilings) -> Outcome:
    device = request.device
    pairs = inputs(config, device)
    base = frozen(config, device)
    chosen: list[Checked] = [base]
    calls = {base.case.variant: step(base.case, pairs)}
    for plan in PLANS:
        with plan_forced(plan):
            checked = ours(config, config.dtype, device)
        case = replace(checked.case, variant=f"{plan} GEMM")
        chosen.append(Checked(case, checked.gate))
        calls[case.variant] = _planned(plan, step(case, pairs))
    samples = 10 if request.quick else 30
    times = interleaved(calls, device, warmup=3, samples=samples, keep_queue_full=True)
    rows = [row(one, config, times[one.case.variant], ceilings) for one in chosen]
    return Outcome(rows, [])
