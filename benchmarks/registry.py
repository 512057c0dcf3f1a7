"""The benchmarks by name. Each is one module of `benchmarks.counted` or `benchmarks.timed`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import torch

from benchmarks.targets import Target

Row = dict[str, Any]
Say = Callable[[str], None]  # tells the person who waits what is being done


class BenchmarkError(RuntimeError):
    """A benchmark can't run as asked; the message is for the person who started it."""


@dataclass(frozen=True)
class CountedReport:
    """What a counted benchmark found.

    Attributes:
        unit_bytes: the bytes of one unit u.
        rows: one a variant, in units of u, with the breakdown by operator and kernel.
        programs: programs of each kernel at a full-size shape, or empty.
        targets: the figures that the rows are held to.
    """

    config: Row
    unit_bytes: int
    rows: list[Row]
    programs: dict[str, int]
    targets: list[Target]


@dataclass(frozen=True)
class Request:
    """How a timed benchmark is to be run.

    Attributes:
        device: where.
        quick: fewer configurations and samples, for a look or a test.
        deadline: `time.monotonic()` after which no further configuration is started, or None.
        say: takes a line of progress.
    """

    device: torch.device
    quick: bool
    deadline: float | None
    say: Say

    def expired(self, what: str) -> bool:
        """Whether the deadline has passed, so that `what` must not start; says which it is."""
        late = self.deadline is not None and monotonic() > self.deadline
        self.say(f"out of time, not started: {what}" if late else what)
        return late


@dataclass(frozen=True)
class Outcome:
    """What one configuration of a timed benchmark gave.

    Attributes:
        rows: to record.
        targets: the figures that the rows are held to.
        refused: what could not be measured, each with the reason.
    """

    rows: list[Row]
    targets: list[Target]
    refused: list[str] = field(default_factory=list)


Count = Callable[[Say], CountedReport]
Time = Callable[[Request], Iterator[Outcome]]
_F = TypeVar("_F", Count, Time)


@dataclass(frozen=True)
class Counted:
    """A benchmark of bytes and FLOPs."""

    name: str
    summary: str
    count: Count


@dataclass(frozen=True)
class Timed:
    """A benchmark of time and memory; it yields one outcome a configuration."""

    name: str
    summary: str
    time: Time


_COUNTED: dict[str, Counted] = {}
_TIMED: dict[str, Timed] = {}


def counted(name: str, summary: str) -> Callable[[Count], Count]:
    """Declares the function below it as the counted benchmark `name`."""

    def register(count: Count) -> Count:
        _COUNTED[name] = Counted(name, summary, count)
        return count

    return register


def timed(name: str, summary: str) -> Callable[[Time], Time]:
    """Declares the function below it as the timed benchmark `name`."""

    def register(time: Time) -> Time:
        _TIMED[name] = Timed(name, summary, time)
        return time

    return register


def _import_all(package: str) -> None:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


def counted_benchmarks() -> dict[str, Counted]:
    """Every counted benchmark, by name."""
    _import_all("benchmarks.counted")
    return dict(sorted(_COUNTED.items()))


def timed_benchmarks() -> dict[str, Timed]:
    """Every timed benchmark, by name."""
    _import_all("benchmarks.timed")
    return dict(sorted(_TIMED.items()))
