"""Time and memory of one bottleneck adapter, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.bottleneck import (
    EAGER,
    NORMS,
    OURS,
    AdapterOperands,
    AdapterShape,
    Forward,
    adapter_operands,
    eager,
    ours,
    step,
)
from benchmarks.cases import short
from benchmarks.ceilings import Ceilings, Floor, cache_bytes, measure_ceilings
from benchmarks.gates import gate
from benchmarks.registry import Outcome, Request, Row, timed
from benchmarks.targets import Target
from benchmarks.timing import back_to_back, interleaved
from peftfast.memory import peak_bytes, saved_bytes

FORWARD, STEP = "forward", "forward + backward"
HEADLINE = AdapterShape(8192, 4096, 64)


@dataclass(frozen=True)
class Config:
    """Sizes, dtype, norm, and what is done: `FORWARD`, without a graph, or `STEP`."""

    mode: str
    shape: AdapterShape
    dtype: torch.dtype
    norm: str | None

    def as_dict(self) -> Row:
        """The fields, for JSON."""
        settings = {"dtype": short(self.dtype), "norm": self.norm or "none"}
        return {"mode": self.mode, **self.shape.as_dict(), **settings}

    @property
    def title(self) -> str:
        """The configuration in a line."""
        return ", ".join(f"{key} {value}" for key, value in self.as_dict().items())


def configs(request: Request) -> list[Config]:
    """The headline shape first; further ones on a GPU unless `quick`."""
    if request.device.type == "cpu":
        shapes = [AdapterShape(256, 768, 64)]
        if not request.quick:
            shapes = [AdapterShape(2048, 768, 64), AdapterShape(512, 384, 64)]
        dtypes = [torch.float32, torch.bfloat16]
    else:
        shapes, dtypes = [HEADLINE], [torch.bfloat16]
        if not request.quick:
            shapes += [AdapterShape(2048, 1024, 64), AdapterShape(8192, 4096, 256)]
            shapes += [AdapterShape(8192, 768, 24)]
    return [
        Config(mode, shape, dtype, norm)
        for shape in shapes
        for dtype in dtypes
        for norm in NORMS
        for mode in (FORWARD, STEP)
    ]


@timed("bottleneck", "one bottleneck adapter, forward and backward: eager, peftfast")
def time(request: Request) -> Iterator[Outcome]:
    """Eager PyTorch and peftfast, with and without a LayerNorm inside."""
    ceilings: dict[torch.dtype, Ceilings] = {}
    for config in configs(request):
        if request.expired(config.title):
            return
        if config.dtype not in ceilings:
            ceilings[config.dtype] = measure_ceilings(request.device, config.dtype)
        yield _time_config(config, request, ceilings[config.dtype])


def floor(config: Config, ceilings: Ceilings) -> Floor:
    """The work of the adapter, each tensor read or written once a pass: x in, y out; dy and x in,
    dx out.
    """
    m, d, r = config.shape.rows, config.shape.features, config.shape.bottleneck
    passes = 1 if config.mode == FORWARD else 3
    elements = (2 if config.mode == FORWARD else 5) * m * d + passes * 2 * d * r
    return Floor.of(passes * 4 * m * d * r, elements * config.dtype.itemsize, ceilings)


def _time_config(config: Config, request: Request, ceilings: Ceilings) -> Outcome:
    device, norm = request.device, config.norm
    on_gpu = device.type == "cuda"
    nbytes = 2 * config.shape.rows * config.shape.features * config.dtype.itemsize
    first = adapter_operands(config.shape, config.dtype, device)
    sets = [first]
    for seed in range(1, 1 + -(-2 * cache_bytes(device) // nbytes)):  # out of the cache in a round
        other = adapter_operands(config.shape, config.dtype, device, seed)
        sets.append(replace(first, x=other.x, dy=other.dy))
    forwards = {EAGER: eager(norm), OURS: ours(norm)}
    wide = torch.float64 if device.type == "cpu" else torch.float32
    exact = step(eager(norm), first.at(wide), norm)
    plain = step(eager(norm), first, norm)
    gates = {}
    for name, forward in forwards.items():
        results = step(forward, first, norm)
        gates[name] = gate(f"PyTorch at {short(wide)}", results, plain, exact)
        gates[name].require(name)
    calls = {name: _call(config, forward, sets) for name, forward in forwards.items()}
    samples = 15 if request.quick else 40
    times = interleaved(calls, device, warmup=4, samples=samples, keep_queue_full=True)
    streamed = back_to_back(calls, device, calls=10, rounds=5) if on_gpu else {}
    least = floor(config, ceilings)
    rows: list[Row] = []
    for name, forward in forwards.items():
        taken = times[name]
        rows.append(
            {
                "variant": name,
                "config": config.as_dict(),
                "time": taken.as_dict(),
                "back_to_back": streamed.get(name),
                "tokens_per_second": config.shape.rows / taken.median,
                "peak_bytes": peak_bytes(partial(calls[name], 0), device),
                "saved_bytes": _saved(forward, first, norm),
                "floor": least.as_dict(),
                "distance_to_floor": taken.median / least.seconds,
                "ceilings": ceilings.as_dict(),
                "gate": gates[name].as_dict(),
            }
        )
    return Outcome(rows, list(_targets(config, on_gpu, {row["variant"]: row for row in rows})))


def _call(config: Config, forward: Forward, sets: list[AdapterOperands]) -> Callable[[int], object]:
    def run(round_: int) -> object:
        of = sets[round_ % len(sets)]
        if config.mode == STEP:
            return step(forward, of, config.norm)
        with torch.no_grad():
            return forward(of)

    return run


def _saved(forward: Forward, of: AdapterOperands, norm: str | None) -> int:
    """Bytes that the forward keeps beside x and the parameters."""
    kept: int = saved_bytes(lambda: forward(of), exclude=of.leaves(norm).values(), at_end=True)
    return kept


def _targets(config: Config, on_gpu: bool, rows: dict[str, Row]) -> Iterator[Target]:
    us, them = rows[OURS], rows[EAGER]
    ratio = us["time"]["median"] / them["time"]["median"]
    if not on_gpu:
        yield Target(f"{config.title}: time, {OURS} / {EAGER}", ratio, 1.0)
    elif config.shape == HEADLINE and config.mode == FORWARD:
        share = us["floor"]["bytes"] / us["time"]["median"] / us["ceilings"]["bytes_per_second"]
        yield Target(f"{config.title}: share of copy bandwidth", share, 0.75, at_least=True)
    elif config.shape == HEADLINE:
        yield Target(f"{config.title}: time, {EAGER} / {OURS}", 1 / ratio, 2.5, at_least=True)
    if config.mode == STEP:
        # Both keep x, which is not counted as it is a leaf; in a model it is an activation.
        x = config.shape.rows * config.shape.features * config.dtype.itemsize
        share = (us["saved_bytes"] + x) / (them["saved_bytes"] + x)
        limit = 1.0 if config.norm is None else 0.55
        yield Target(f"{config.title}: saved bytes, {OURS} / {EAGER}", share, limit)
