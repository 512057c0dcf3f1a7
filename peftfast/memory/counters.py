"""Bytes that a step keeps for its backward, and the peak of the bytes that it holds.

Both count storages, not tensors: views and aliases of one storage are one allocation, and a view of
a part keeps the whole. Both measure one call of `step_fn`, a function of no arguments that runs a
step, or a part of one, as training does.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftfast.memory.storages import storages

Step = Callable[[], object]


def saved_bytes(
    step_fn: Step, exclude: nn.Module | Iterable[Tensor] = (), *, at_end: bool = False
) -> int:
    """The most bytes that autograd keeps for the backward at any moment of `step_fn()`.

    After a forward alone that is what the forward saved; a step that goes on to its backward frees
    as it goes. Distinct storages are counted, whole and once, however many operations save them.

    Args:
        step_fn: runs the forward, and the backward too if that is to be seen.
        exclude: what is not to be counted: a module's parameters and buffers, or tensors.
        at_end: give what is kept when `step_fn` has returned, rather than the most at any moment.
            What it returns counts as still there, with all that its graph keeps.

    Returns:
        Bytes, on all devices together. Not seen: tensors that a custom `autograd.Function` stores
        on its context by other ways than `save_for_backward`, and what a block under non-reentrant
        checkpointing recomputes in the backward (its inputs are); `peak_bytes` sees both.

    Raises:
        TypeError: `exclude` holds something else than tensors, or a saved tensor has no storage to
            measure (an opaque layout such as mkldnn's).
    """
    excluded = [storage for tensor in _tensors_of(exclude) for storage in storages(tensor)]
    kept = _LiveBytes(ignore={_key(storage) for storage in excluded})

    def pack(tensor: Tensor) -> _Saved:
        return _Saved(tensor, kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        held = step_fn()
        gc.collect()  # under hooks, a node that saves its own output is in a cycle
        now = kept.now
        del held
    return now if at_end else kept.peak


def peak_bytes(step_fn: Step, device: torch.device | str | None = None) -> int:
    """The peak of live tensor bytes during `step_fn()`, over those that were there before it.

    What `step_fn` is to be charged for it must make itself: clear the gradients before it, so that
    it makes them anew, and keep from freeing in it what was made outside.

    Args:
        step_fn: runs the step.
        device: where to measure; by default the current GPU where there is one, else the CPU.

    Returns:
        Bytes. On a GPU the allocator's own peak: block rounding and the kernels' scratch included.
        On a CPU the storages that operators returned, from their making until they are freed; the
        scratch inside one operator is not seen.

    Raises:
        ValueError: `device` is neither a CPU nor a CUDA device.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        return _peak_of_allocator(step_fn, place)
    if place.type == "cpu":
        return _peak_of_storages(step_fn)
    raise ValueError(f"device must be a CPU or a CUDA device, not {place}")


class _LiveBytes:
    """Bytes of the distinct storages held now, and the most that were held at once."""

    def __init__(self, ignore: set[int]) -> None:
        self.now = 0
        self.peak = 0
        self._ignore = ignore
        self._holders: dict[int, int] = {}

    def hold(self, key: int, size: int) -> None:
        if key in self._ignore:
            return
        holders = self._holders.get(key, 0)
        self._holders[key] = holders + 1
        if holders == 0:
            self.now += size
            self.peak = max(self.peak, self.now)

    def release(self, key: int, size: int) -> None:
        if key in self._ignore:
            return
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self.now -= size


class _Saved:
    """A saved tensor; the graph's letting go of this object is its release."""

    def __init__(self, tensor: Tensor, kept: _LiveBytes) -> None:
        self.tensor = tensor
        # Held as (key, size): a storage's size may change before its release.
        held = [(_key(storage), storage.nbytes()) for storage in storages(tensor)]
        for key, size in held:
            kept.hold(key, size)
        weakref.finalize(self, _release_all, kept, held).atexit = False


def _release_all(kept: _LiveBytes, held: list[tuple[int, int]]) -> None:
    for key, size in held:
        kept.release(key, size)


class _StorageTracker(TorchDispatchMode):
    """Counts each CPU storage that an operator returns, until it is freed.

    A storage that is first met as an operator's input was there before, and is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int | None] = {}  # None: there before
        self._watches: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch.tensor() builds its result before any dispatch and hands it to lift_fresh.
        if func is not torch.ops.aten.lift_fresh.default:
            for storage in _cpu_storages((args, kwargs)):
                self._sizes.setdefault(self._watched(storage), None)
        outputs = func(*args, **kwargs)
        for storage in _cpu_storages(outputs):
            key = self._watched(storage)
            known = self._sizes.get(key, 0)
            if known is not None:  # an operator may have resized a storage that is known
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes() - known
        self.peak = max(self.peak, self.now)
        return outputs

    def _watched(self, storage: torch.UntypedStorage) -> int:
        key = _key(storage)
        if key not in self._watches:
            self._watches[key] = weakref.ref(storage, lambda _: self._forget(key))
        return key

    def _forget(self, key: int) -> None:
        del self._watches[key]
        self.now -= self._sizes.pop(key, 0) or 0


def _peak_of_storages(step_fn: Step) -> int:
    with _StorageTracker() as tracker:
        step_fn()
    return tracker.peak


def _peak_of_allocator(step_fn: Step, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step_fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_storages(values: object) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield from (storage for storage in storages(leaf) if storage.device.type == "cpu")


def _tensors_of(exclude: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(exclude, nn.Module):
        return [*exclude.parameters(), *exclude.buffers()]
    tensors = list(exclude)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"exclude[{index}] is a {type(tensor).__name__}, not a tensor")
    return tensors


def _key(storage: torch.UntypedStorage) -> int:
    """Identifies a storage for as long as it lives (its address may be null or shared)."""
    return storage._cdata
