"""Watching Triton's interpreter: the sectors that each launch touches.

Triton 3.6 and 3.7 share the points that are replaced here for the time of the count:
`GridExecutor.__call__` is one launch, and every load, store, tensor pointer and descriptor of
`InterpreterBuilder` ends in `create_masked_load` or `create_masked_store`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.counting.sectors import SectorSet


@dataclass
class Launch:
    """One launch of one kernel: the sectors that its programs load and store, each once."""

    kernel: str
    loaded: SectorSet = field(default_factory=SectorSet)
    stored: SectorSet = field(default_factory=SectorSet)
    atomics: int = 0
    flops: int = 0
    programs: int = 0


def _itemsize(pointer: Any) -> int:
    return max(1, pointer.get_element_ty().primitive_bitwidth // 8)


def _active(pointer: Any, mask: Any) -> npt.NDArray[np.uint64]:
    """The addresses whose lane is on; `mask` is a handle or, for a descriptor, an array."""
    on = np.broadcast_to(np.asarray(mask.data, dtype=np.bool_), pointer.data.shape)
    return pointer.data[on]


@contextmanager
def watch_launches(begin: Callable[[], None], end: Callable[[Launch], None]) -> Iterator[None]:
    """Calls `begin()` before every interpreted launch and `end(launch)` after it.

    `end` is called for a launch that raised, too. Leaving puts back all that is replaced in Triton.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    executor = interpreter.GridExecutor
    current: list[Launch] = []

    original_call = executor.__call__
    original_load = builder.create_masked_load
    original_store = builder.create_masked_store
    original_rmw = builder.create_atomic_rmw
    original_cas = builder.create_atomic_cas
    original_dot = builder.create_dot
    original_grid = builder.set_grid_dim

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launch = Launch(self.fn.__name__)
        current.append(launch)
        begin()
        try:
            return original_call(self, *args, **kwargs)
        finally:
            current.pop()
            end(launch)

    def grid(self: Any, *sizes: int) -> Any:
        current[-1].programs += prod(sizes)
        return original_grid(self, *sizes)

    def load(self: Any, pointer: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        current[-1].loaded.touch(_active(pointer, mask), _itemsize(pointer))
        return original_load(self, pointer, mask, *rest, **named)

    def store(self: Any, pointer: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        current[-1].stored.touch(_active(pointer, mask), _itemsize(pointer))
        return original_store(self, pointer, value, mask, *rest, **named)

    def atomic(pointer: Any, addresses: npt.NDArray[np.uint64]) -> None:
        launch = current[-1]
        launch.loaded.touch(addresses, _itemsize(pointer))
        launch.stored.touch(addresses, _itemsize(pointer))
        launch.atomics += addresses.size

    def rmw(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        atomic(pointer, _active(pointer, mask))
        return original_rmw(self, operation, pointer, value, mask, *rest)

    def cas(self: Any, pointer: Any, *rest: Any) -> Any:
        atomic(pointer, pointer.data)
        return original_cas(self, pointer, *rest)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        current[-1].flops += 2 * a.data.size * b.data.shape[-1]
        return original_dot(self, a, b, *rest)

    replaced = [
        (executor, "__call__", original_call, call),
        (builder, "set_grid_dim", original_grid, grid),
        (builder, "create_masked_load", original_load, load),
        (builder, "create_masked_store", original_store, store),
        (builder, "create_atomic_rmw", original_rmw, rmw),
        (builder, "create_atomic_cas", original_cas, cas),
        (builder, "create_dot", original_dot, dot),
    ]
    try:
        for owner, name, _, replacement in replaced:
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original, _ in replaced:
            setattr(owner, name, original)
