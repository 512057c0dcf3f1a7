"""What was allocated when: blocks, the moments of a step, and a longer model's from two shorter
ones'.

A moment is one call of an operator that allocates. A block lives from the moment of its making up
to, and without, the first moment at which it is gone. The peak lies at a moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

CLASSES = (
    "base weights",
    "quantisation statistics",
    "adapters",
    "gradients",
    "optimizer state",
    "saved activations",
    "KV cache",
    "logits and loss",
    "scratch and workspaces",
    "inputs and buffers",
    "allocator rounding",
)
INDEX = {name: index for index, name in enumerate(CLASSES)}


@dataclass(slots=True)
class Block:
    """One storage: `label` is a class of `CLASSES`, `origin` says which module and operator."""

    size: int
    born: int
    origin: str
    label: str = ""
    died: int | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Moment:
    """A call of an operator that allocates: `path` is the module, `kind` that without numbers."""

    phase: str
    path: str
    kind: str
    operator: str
    size: int

    @property
    def signature(self) -> tuple[str, str, str, int]:
        """What is alike at the same place of alike layers; a list's size grows with them."""
        size = 0 if self.operator.startswith("_foreach") else self.size
        return self.phase, self.kind, self.operator, size

    def __str__(self) -> str:
        return f"{self.phase}: {self.path or 'the model'}, {self.operator}"


@dataclass
class Trace:
    """Bytes at each moment of a step.

    Attributes:
        moments: in order.
        live: bytes by moment and class, int64 [moments, classes].
        positions: the place of each moment in the whole step.
        blocks: those that it was added up from; of the longer one in a trace that was extrapolated.
    """

    moments: list[Moment]
    live: NDArray[np.int64]
    positions: NDArray[np.float64]
    blocks: list[Block] = field(repr=False, default_factory=list)

    @property
    def totals(self) -> NDArray[np.int64]:
        return self.live.sum(1)

    def peak(self) -> int:
        """The moment of the peak."""
        return int(self.totals.argmax())


def trace_of(moments: list[Moment], blocks: list[Block], rounding: int) -> Trace:
    """Adds the blocks up; each takes a multiple of `rounding` bytes."""
    count = len(moments)
    delta = np.zeros((count + 1, len(CLASSES)), np.int64)
    for block in blocks:
        died = count if block.died is None else block.died
        if died <= block.born:
            continue
        padding = -block.size % rounding
        for size, name in ((block.size, block.label), (padding, "allocator rounding")):
            delta[block.born, INDEX[name]] += size
            delta[died, INDEX[name]] -= size
    live = np.cumsum(delta, axis=0)[:count]
    return Trace(moments, live, np.arange(count, dtype=np.float64), blocks)


def extrapolate(short: Trace, long: Trace, steps: float) -> Trace | None:
    """The trace of a model that is longer still, at the moments that the first layers and the last
    have in common with both; None where the two traces are not alike.

    Between alike layers memory grows by the same amount from one to the next, so that what lies
    between the first and the last layers can't be the peak, and each moment's bytes are a straight
    line in the number of layers.

    Args:
        short, long: of n and n + d layers.
        steps: how often d layers are added to the short model's.
    """
    a = [moment.signature for moment in short.moments]
    b = [moment.signature for moment in long.moments]
    rows: list[NDArray[np.int64]] = []
    moments: list[Moment] = []
    positions: list[NDArray[np.float64]] = []
    for first, last, other_first, other_last in _phases(short.moments, long.moments):
        left, right = a[first:last], b[other_first:other_last]
        prefix, suffix = _common(left, right), _common(left[::-1], right[::-1])
        if prefix + suffix < len(left):
            return None
        for start, other, size in (
            (first, other_first, prefix),
            (last - suffix, other_last - suffix, suffix),
        ):
            one, two = short.live[start : start + size], long.live[other : other + size]
            rows.append(one + np.rint((two - one) * steps).astype(np.int64))
            at, then = np.arange(start, start + size), np.arange(other, other + size)
            positions.append(at + (then - at) * steps)
            moments += long.moments[other : other + size]
    live, place = np.concatenate(rows), np.concatenate(positions)
    order = np.argsort(place, kind="stable")
    chosen = [moments[i] for i in order]
    return Trace(chosen, live[order], place[order], long.blocks)


def _phases(short: list[Moment], long: list[Moment]) -> list[tuple[int, int, int, int]]:
    """Where each phase begins and ends in both."""
    found = []
    for phase in dict.fromkeys(moment.phase for moment in short):
        edges: list[int] = []
        for moments in (short, long):
            at = [i for i, moment in enumerate(moments) if moment.phase == phase]
            edges += (at[0], at[-1] + 1) if at else (0, 0)
        found.append((edges[0], edges[1], edges[2], edges[3]))
    return found


def _common(left: list[tuple], right: list[tuple]) -> int:
    """How many leading entries are equal."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(left), len(right)))
