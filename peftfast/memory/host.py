"""memory="offload" in a simulation: a host of any size, and copies that take their time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftfast.patching import offload


@contextlib.contextmanager
def pretended_host() -> Iterator[None]:
    """Let what is offloaded go to nowhere, and come back as new tensors, for the whole process."""
    former = offload.lane, offload.is_remote
    lane = _Lane()
    offload.lane, offload.is_remote = lambda tensor: lane, lambda tensor: True
    try:
        yield
    finally:
        offload.lane, offload.is_remote = former


class _Lane(offload._Lane):
    def to_host(self, flat: Tensor) -> tuple[Any, Any]:
        return _Host(flat), _Copy()

    def to_device(self, host: Any, device: torch.device) -> tuple[Tensor, Any]:
        with torch._C.DisableTorchFunction():  # a meta tensor that passes for the device's
            return torch.empty(host.count, dtype=host.dtype, device="meta"), None


class _Host:
    def __init__(self, flat: Tensor) -> None:
        self.count, self.dtype = flat.numel(), flat.dtype


class _Copy:
    """Under way until somebody waits for it: the most that can be on the device at once."""

    def __init__(self) -> None:
        self._done = False

    def query(self) -> bool:
        return self._done

    def synchronize(self) -> None:
        self._done = True
