"""The one buffer into which base weights are widened or dequantised, a weight at a time."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_threads = threading.local()


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, to be used up before this thread asks for the next one.

    On a CPU it lies in one buffer a thread, which grows to the largest weight and stays warm: the
    page faults of a fresh allocation cost more than filling it. Elsewhere the allocator reuses
    memory by itself.
    """
    if device.type != "cpu" or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    buffer: Tensor | None = getattr(_threads, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _threads.buffer = None  # free the small one first
        # An ordinary tensor even in inference mode: it outlives that.
        with torch.inference_mode(False):
            buffer = _threads.buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer[:size].view(dtype).view(tuple(shape))


def clear_scratch() -> None:
    """Free this thread's buffer; the next linear over a 4-bit weight on a CPU allocates another."""
    _threads.buffer = None


def scratch_bytes() -> int:
    """Bytes of this thread's buffer."""
    buffer: Tensor | None = getattr(_threads, "buffer", None)
    return 0 if buffer is None else buffer.numel()


@contextlib.contextmanager
def own_scratch() -> Iterator[None]:
    """Inside, this thread has no buffer yet and makes another; its former one is back after."""
    former = getattr(_threads, "buffer", None)
    _threads.buffer = None
    try:
        yield
    finally:
        _threads.buffer = former


def scratch_buffer() -> Tensor | None:
    """This thread's buffer, if there is one."""
    return getattr(_threads, "buffer", None)
