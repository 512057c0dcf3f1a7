"""Scratch memory of split reductions, all of it allocated here so that it can be counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_observers: list[list[Tensor]] = []


def allocate(shape: Sequence[int], device: torch.device) -> Tensor:
    """An uninitialised float32 workspace, shown to every observer."""
    tensor = torch.empty(shape, dtype=torch.float32, device=device)
    for seen in _observers:
        seen.append(tensor)
    return tensor


@contextlib.contextmanager
def observe() -> Iterator[list[Tensor]]:
    """A list that collects, and keeps alive, each workspace allocated while this is open."""
    seen: list[Tensor] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)
