"""Time and memory of causal attention over a prefix and a sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.cases import short
from benchmarks.ceilings import Ceilings, Floor, cache_bytes, measure_ceilings
from benchmarks.gates import Gate, gate
from benchmarks.prefix_attention import (
    ALONE,
    CONCATENATED,
    OURS,
    AttentionOperands,
    AttentionShape,
    Forward,
    alone,
    attention_operands,
    concatenated,
    ours,
    step,
)
from benchmarks.registry import Outcome, Request, Row, timed
from benchmarks.targets import Target
from benchmarks.timing import interleaved
from peftfast.memory import peak_bytes, saved_bytes
from peftfast.reference import prefix_attention as reference

FORWARD, STEP = "forward", "forward + backward"
HEADLINE = AttentionShape(8, 2048, 128, 32, 8, 128)
PLANS = ("fused", "library")
LIMIT = 1.25  # of the time without a prefix, whose keys are 12% of the headline's


@dataclass(frozen=True)
class Config:
    """Sizes, dtype, and what is done: `FORWARD`, without a graph, or `STEP`."""

    mode: str
    shape: AttentionShape
    dtype: torch.dtype

    def as_dict(self) -> Row:
        """The fields, for JSON."""
        return {"mode": self.mode, **self.shape.as_dict(), "dtype": short(self.dtype)}

    @property
    def title(self) -> str:
        """The configuration in a line."""
        return ", ".join(f"{key} {value}" for key, value in self.as_dict().items())


def configs(request: Request) -> list[Config]:
    """The headline shape first; further ones unless `quick`."""
    if request.device.type == "cpu":
        shapes, dtypes = [AttentionShape(1, 256, 20, 8, 2, 64)], [torch.float32]
        if not request.quick:
            shapes = [AttentionShape(1, 1024, 20, 8, 2, 64), AttentionShape(2, 256, 128, 8, 8, 64)]
            dtypes = [torch.float32, torch.bfloat16]
    else:
        shapes, dtypes = [HEADLINE], [torch.bfloat16]
        if not request.quick:
            shapes += [
                AttentionShape(8, 512, 20, 32, 8, 128),
                AttentionShape(2, 2048, 2048, 32, 8, 128),
            ]
            shapes += [AttentionShape(32, 512, 64, 12, 12, 64)]
    modes = (STEP, FORWARD)
    return [Config(mode, shape, dtype) for shape in shapes for dtype in dtypes for mode in modes]


@timed("prefix_attention", "attention over a prefix: without it, concatenated, peftfast")
def time(request: Request) -> Iterator[Outcome]:
    """Torch's attention without the prefix and over the concatenation, and peftfast."""
    ceilings: dict[torch.dtype, Ceilings] = {}
    for config in configs(request):
        if request.expired(config.title):
            return
        if config.dtype not in ceilings:
            ceilings[config.dtype] = measure_ceilings(request.device, config.dtype)
        yield _time_config(config, request, ceilings[config.dtype])


def floor(config: Config, ceilings: Ceilings) -> Floor:
    """The products, half of the sequence's for its triangle: 2 in the forward, 5 more in the
    backward; each tensor read or written once a pass.
    """
    of = config.shape
    pairs = of.tokens * (of.tokens + 1) // 2 + of.tokens * of.prefix
    products = 2 if config.mode == FORWARD else 7
    queries = of.batch * of.heads * of.tokens * of.head_size
    keys = of.kv_heads * (of.batch * of.tokens + of.prefix) * of.head_size
    forward = 2 * queries + 2 * keys
    elements = forward if config.mode == FORWARD else forward + 4 * queries + 4 * keys
    flops = products * 2 * of.batch * of.heads * pairs * of.head_size
    return Floor.of(flops, elements * config.dtype.itemsize, ceilings)


def variants(device: torch.device) -> dict[str, Forward]:
    """By name; on a GPU each of peftfast's plans beside the one that its rule chooses."""
    found = {ALONE: alone, CONCATENATED: concatenated, OURS: ours()}
    if device.type == "cuda":
        found |= {f"{OURS}, {plan}": ours() for plan in PLANS}
    return found


def _plan_of(name: str) -> contextlib.AbstractContextManager[None]:
    """What a variant's forward and backward run under."""
    plan = name.removeprefix(OURS).removeprefix(", ")
    if plan not in PLANS:
        return contextlib.nullcontext()
    from peftfast_kernels import tiles

    return tiles.forced_attention_plan(plan)


def _time_config(config: Config, request: Request, ceilings: Ceilings) -> Outcome:
    device, shape = request.device, config.shape
    first = attention_operands(shape, config.dtype, device)
    nbytes = sum(one.nbytes for one in (first.q, first.k, first.v, first.dy))
    count = 1 + -(-2 * cache_bytes(device) // nbytes)  # out of the cache in a round
    sets = [attention_operands(shape, config.dtype, device, seed) for seed in range(count)]
    forwards = variants(device)
    gates = _gates(first, forwards, device, config.dtype)
    calls = {name: _call(config, name, forward, sets) for name, forward in forwards.items()}
    times = interleaved(
        calls, device, warmup=3, samples=10 if request.quick else 25, keep_queue_full=True
    )
    least = floor(config, ceilings)
    rows: list[Row] = []
    for name, forward in forwards.items():
        taken = times[name]
        rows.append(
            {
                "variant": name,
                "config": config.as_dict(),
                "time": taken.as_dict(),
                "back_to_back": None,
                "tokens_per_second": shape.batch * shape.tokens / taken.median,
                "peak_bytes": peak_bytes(partial(calls[name], 0), device),
                "saved_bytes": saved_bytes(
                    partial(forward, first), exclude=first.leaves().values(), at_end=True
                ),
                "floor": least.as_dict(),
                "distance_to_floor": taken.median / least.seconds,
                "ceilings": ceilings.as_dict(),
                "gate": gates[name].as_dict(),
            }
        )
    return Outcome(rows, list(_targets(config, {row["variant"]: row for row in rows})))


def _gates(
    first: AttentionOperands,
    forwards: dict[str, Forward],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Gate]:
    """Each variant against its formula, on the first row of the batch."""
    wide = torch.float64 if device.type == "cpu" else torch.float32

    def formula(of: AttentionOperands) -> torch.Tensor:
        return reference.prefix_attention(
            of.q, of.k, of.v, of.prefix_k, of.prefix_v, is_causal=True
        )

    def unprefixed(of: AttentionOperands) -> torch.Tensor:
        return reference.prefix_attention(
            of.q, of.k, of.v, of.prefix_k, of.prefix_v, is_causal=True,
            prefix_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
        )  # fmt: skip

    few, exact = first.at(dtype, 1), first.at(wide, 1)
    gates = {}
    for name, forward in forwards.items():
        truth = unprefixed if name == ALONE else formula
        with _plan_of(name):
            results = step(forward, few)
        of_truth = {key: one for key, one in step(truth, exact).items() if key in results}
        gates[name] = gate(f"formula at {short(wide)}", results, step(truth, few), of_truth)
        gates[name].require(name)
    return gates


def _call(
    config: Config, name: str, forward: Forward, sets: list[AttentionOperands]
) -> Callable[[int], object]:
    def run(round_: int) -> object:
        of = sets[round_ % len(sets)]
        with _plan_of(name):
            if config.mode == STEP:
                return step(forward, of)
            with torch.no_grad():
                return forward(of)

    return run


def _targets(config: Config, rows: dict[str, Row]) -> Iterator[Target]:
    medians = {name: row["time"]["median"] for name, row in rows.items()}
    if config.mode == STEP and config.shape == HEADLINE:
        ratio = medians[OURS] / medians[ALONE]
        yield Target(f"{config.title}: time, {OURS} / {ALONE}", ratio, LIMIT)
    ratio = medians[OURS] / medians[CONCATENATED]
    yield Target(f"{config.title}: time, {OURS} / {CONCATENATED}", ratio, 1.0)
    if config.mode == STEP:
        share = rows[OURS]["saved_bytes"] / rows[CONCATENATED]["saved_bytes"]
        yield Target(f"{config.title}: saved bytes, {OURS} / {CONCATENATED}", share, 1.0)
