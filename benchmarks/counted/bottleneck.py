"""Bytes of one bottleneck adapter, forward and backward, in units u of one activation tensor."""

from __future__ import annotations

import torch

from benchmarks.bottleneck import (
    EAGER,
    NORMS,
    OURS,
    AdapterShape,
    adapter_operands,
    eager,
    ours,
    step,
)
from benchmarks.cases import counted_row, short
from benchmarks.counting import TrafficCounter
from benchmarks.registry import CountedReport, Say, counted
from benchmarks.targets import Target

SHAPE = AdapterShape(rows=2048, features=1024, bottleneck=64)
FULL_SIZE = AdapterShape(rows=8192, features=4096, bottleneck=64)
DTYPE = torch.float16  # the interpreter computes bfloat16 wrong; the bytes are the same
FORWARD_LIMIT, LIMIT, WORKSPACE_LIMIT = 2.3, 7.0, 1.0  # u; of the step, workspaces apart
ARCH, SMS = 90, 132
CPU = torch.device("cpu")


@counted("bottleneck", "one bottleneck adapter, forward and backward: eager, peftfast")
def count(say: Say) -> CountedReport:
    """With and without a LayerNorm inside; the forward alone, then with the backward."""
    unit = SHAPE.rows * SHAPE.features * DTYPE.itemsize
    rows, targets = [], []
    for norm in NORMS:
        for who, forward in ((EAGER, eager(norm)), (OURS, ours(norm, "triton"))):
            of = adapter_operands(SHAPE, DTYPE, CPU)
            inside = "LayerNorm inside" if norm is not None else "no norm"
            say(f"{who}, {inside}")
            with TrafficCounter() as alone:
                forward(of)
            with TrafficCounter() as both:
                step(forward, of, norm)
            for what, traffic, limit in (
                ("forward", alone, FORWARD_LIMIT),
                ("forward + backward", both, LIMIT),
            ):
                row = counted_row(f"{who}, {what}, {inside}", {}, traffic, unit)
                rows.append(row)
                if who == OURS:
                    name = f"{what}, {inside}"
                    targets.append(Target(f"{name}: u", row["total_u"], limit))
                    used = row["workspace_u"]
                    targets.append(Target(f"{name}: workspace u", used, WORKSPACE_LIMIT))
    programs = programs_at_full_size()
    for kernel, number in programs.items():
        what = f"programs of {kernel} at M={FULL_SIZE.rows}, d={FULL_SIZE.features}, sm_{ARCH}"
        targets.append(Target(what, number, 0.9 * SMS, at_least=True))
    return CountedReport({**SHAPE.as_dict(), "dtype": short(DTYPE)}, unit, rows, programs, targets)


def programs_at_full_size() -> dict[str, int]:
    """Programs of each kernel over rows and columns at M=8192, d=4096, m=64, bf16, on sm_90 with
    132 processors.
    """
    from peftfast_kernels import bottleneck

    low = torch.bfloat16
    shape = FULL_SIZE
    launches = bottleneck.record(
        ARCH, shape.rows, shape.features, shape.bottleneck, low, low, sm_count=SMS
    )
    return {launch.name.strip("_"): launch.programs for launch in launches}
