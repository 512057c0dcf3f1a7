"""Times of variants run in turn, A B C, A B C, ...: a change of the machine's state meets all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

Call = Callable[[int], object]
_CYCLES_PER_SECOND = 2_000_000_000  # no GPU's clock is above it, so that no wait is too short


@dataclass(frozen=True)
class Samples:
    """Seconds of one variant's calls: median, quartiles, the fastest, and how many there were."""

    median: float
    low: float
    high: float
    best: float
    count: int

    @classmethod
    def of(cls, seconds: list[float]) -> Samples:
        """Summary of at least two samples."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, min(seconds), len(seconds))

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def interleaved(
    variants: Mapping[str, Call],
    device: torch.device,
    *,
    warmup: int,
    samples: int,
    keep_queue_full: bool = False,
) -> dict[str, Samples]:
    """Times each variant `samples` times, in turn, after `warmup` untimed rounds.

    Args:
        variants: by name; each is called with the number of the round, to rotate its inputs by.
        keep_queue_full: on a GPU, has the device wait before each call until all of its work is
            queued, so that the
            sample is the device's time and not that of the launches. For single ops, not for steps.

    On a GPU a sample is the time between two events around the call, on a CPU that of
    `perf_counter`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    queueing = {name: 0.0 for name in variants}
    for round_ in range(warmup):
        for name, call in variants.items():
            _synchronize(device)
            start = perf_counter()
            call(round_)
            queueing[name] = perf_counter() - start
    _synchronize(device)
    for round_ in range(warmup, warmup + samples):
        for name, call in variants.items():
            if device.type == "cuda":
                wait = 1.5 * queueing[name] if keep_queue_full else 0.0
                seconds[name].append(_on_gpu(call, round_, wait))
            else:
                start = perf_counter()
                call(round_)
                seconds[name].append(perf_counter() - start)
    return {name: Samples.of(values) for name, values in seconds.items()}


def back_to_back(
    variants: Mapping[str, Call], device: torch.device, *, calls: int, rounds: int
) -> dict[str, float]:
    """Seconds a call when `calls` follow one another, launches included: median of `rounds`."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds):
        for name, call in variants.items():
            _synchronize(device)
            start = perf_counter()
            for number in range(calls):
                call(round_ * calls + number)
            _synchronize(device)
            seconds[name].append((perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _on_gpu(call: Call, round_: int, wait: float) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    if wait:
        torch.cuda._sleep(int(wait * _CYCLES_PER_SECOND))
    start.record()
    call(round_)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
