"""Bytes of causal attention over a prefix and a sequence, in units u of one q."""

from __future__ import annotations

import contextlib

import torch

from benchmarks.cases import counted_row, short
from benchmarks.counting import Tally, TrafficCounter
from benchmarks.prefix_attention import (
    ALONE,
    CONCATENATED,
    OURS,
    AttentionShape,
    Forward,
    alone,
    attention_operands,
    concatenated,
    ours,
    step,
)
from benchmarks.registry import CountedReport, Say, counted
from benchmarks.targets import Target

SHAPE = AttentionShape(batch=4, tokens=256, prefix=32, heads=8, kv_heads=2, head_size=64)
FULL_SIZE = AttentionShape(batch=8, tokens=2048, prefix=128, heads=32, kv_heads=8, head_size=128)
DTYPE = torch.float16  # the interpreter computes bfloat16 wrong; the bytes are the same
# Of u, beyond the attention without a prefix. The forward: the prefix alone; or q and o read and y
# written. The step: q and dy three times instead of once, y, k and v once more; or, as well as in
# the forward, q and dy twice, y once, and dq each way.
FORWARD_LIMITS = {"fused": 0.15, "library": 3.2}
LIMITS = {"fused": 5.0, "library": 10.5}
WORKSPACE_LIMIT = 1.0
ARCH, SMS = 90, 132
CPU = torch.device("cpu")


@counted("prefix_attention", "attention over a prefix: none, concatenated, peftfast's two plans")
def count(say: Say) -> CountedReport:
    """The forward alone, then with the backward."""
    from peftfast_kernels import tiles

    unit = SHAPE.batch * SHAPE.tokens * SHAPE.heads * SHAPE.head_size * DTYPE.itemsize
    variants: list[tuple[str, str | None, Forward]] = [
        (ALONE, None, alone), (CONCATENATED, None, concatenated),
    ]  # fmt: skip
    variants += [(f"{OURS}, {plan}", plan, ours("triton")) for plan in LIMITS]
    rows, targets = [], []
    bases: dict[str, Tally] = {}
    for who, plan, forward in variants:
        say(who)
        of = attention_operands(SHAPE, DTYPE, CPU)
        chosen = tiles.forced_attention_plan(plan) if plan else contextlib.nullcontext()
        with chosen, TrafficCounter() as first:
            with torch.no_grad():
                forward(of)
        chosen = tiles.forced_attention_plan(plan) if plan else contextlib.nullcontext()
        with chosen, TrafficCounter() as both:
            step(forward, of)
        for what, traffic in (("forward", first), ("forward + backward", both)):
            base = bases.setdefault(what, traffic.total)
            row = counted_row(f"{who}, {what}", {}, traffic, unit, base)
            rows.append(row)
            if plan is not None:
                limits = FORWARD_LIMITS if what == "forward" else LIMITS
                targets.append(Target(f"{plan}, {what}: extra u", row["extra_u"], limits[plan]))
                used = row["workspace_u"]
                targets.append(Target(f"{plan}, {what}: workspace u", used, WORKSPACE_LIMIT))
    programs = programs_at_full_size()
    for kernel, number in programs.items():
        what = f"programs of {kernel} at {FULL_SIZE.tokens} tokens, sm_{ARCH}"
        targets.append(Target(what, number, SMS, at_least=True))
    return CountedReport({**SHAPE.as_dict(), "dtype": short(DTYPE)}, unit, rows, programs, targets)


def programs_at_full_size() -> dict[str, int]:
    """Programs of each kernel in bfloat16 on sm_90 with 132 processors."""
    from peftfast_kernels import prefix_attention

    of = FULL_SIZE
    launches = prefix_attention.record(
        ARCH, of.batch, of.tokens, of.tokens, of.prefix, of.head_size, torch.bfloat16,
        heads=of.heads, kv_heads=of.kv_heads, sm_count=SMS,
    )  # fmt: skip
    return {launch.name.strip("_"): launch.programs for launch in launches}
