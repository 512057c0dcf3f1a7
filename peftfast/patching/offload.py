"""memory="offload": what a forward keeps for its backward waits in host memory.

Tensors on a GPU that the patched model's forward saves are copied to pinned host memory on a stream
of their own, and come back on it ahead of the backward, which asks for them in about the opposite
order. (Rhu et al., "vDNN", MICRO 2016.)

Copied are storages, once each, however many tensors of them are saved. Parameters, buffers and
small tensors stay, as does whatever is on a CPU. A copy that is still under way when the backward
asks is not waited for: the storage on the GPU is there until the copy is done.

Inside a non-reentrant checkpoint that checkpoint decides what is saved, and its inputs stay on the
GPU; a reentrant one's inputs go.
"""

from __future__ import annotations

import collections
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfast.patching.inputs import PLAIN_TENSORS

SMALL = 1 << 20  # bytes
_AHEAD = 4  # storages that are fetched before they are asked for
_LEAVING = 256 << 20  # bytes that may be on their way to the host before the forward waits for them


def attach(model: nn.Module) -> None:
    """Offload what each forward of `model` saves."""
    offloading = Offloading()
    model.register_forward_pre_hook(offloading.enter)
    model.register_forward_hook(offloading.leave, always_call=True)


def detach(model: nn.Module) -> None:
    """Undo `attach` on `model` and on every module in it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Offloading):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


class Offloading:
    """The hooks of one model."""

    def __init__(self) -> None:
        self._entered: dict[int, list[Any]] = {}  # by thread

    def __reduce__(self) -> tuple[Any, ...]:
        return Offloading, ()

    def enter(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self._entered.setdefault(threading.get_ident(), [])
        hooks = None
        if torch.is_grad_enabled():
            forward = Forward(module)
            hooks = torch.autograd.graph.saved_tensors_hooks(forward.pack, forward.unpack)
            hooks.__enter__()
        stack.append(hooks)

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        stack = self._entered.get(thread)
        if not stack:  # the hook before it never ran: another one raised
            return
        hooks = stack.pop()
        if not stack:
            del self._entered[thread]
        if hooks is not None:
            hooks.__exit__()


class Forward:
    """What one forward saves."""

    def __init__(self, module: nn.Module) -> None:
        own = [*module.parameters(), *module.buffers()]
        self._stay: weakref.WeakValueDictionary[int, torch.UntypedStorage] = (
            weakref.WeakValueDictionary(
                {_key(tensor): tensor.untyped_storage() for tensor in own if _has_storage(tensor)}
            )
        )
        self._known: weakref.WeakValueDictionary[tuple[int, int], Away] = (
            weakref.WeakValueDictionary()
        )
        self._order: list[weakref.ref[Away]] = []
        self._leaving: collections.deque[Away] = collections.deque()
        self._lock = threading.RLock()

    def pack(self, tensor: Tensor) -> Any:
        if not self._goes(tensor):
            # With its graph, an output that its own node saves would be in a cycle.
            return tensor if tensor.is_leaf else tensor.detach()
        with self._lock:
            self._free_what_left()
            key = (_key(tensor), tensor._version)
            away = self._known.get(key)
            if away is None or not away.is_of(tensor):
                away = Away(tensor, len(self._order))
                self._known[key] = away
                self._order.append(weakref.ref(away))
                self._leaving.append(away)
            away.holders += 1
            away.awaited += 1
            return Packed(tensor, away)

    def unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, Packed):
            found: Tensor = packed
            return found
        with self._lock:
            tensor = packed.tensor()
            self._fetch_before(packed.away.place)
            return tensor

    def _free_what_left(self) -> None:
        """Free what was copied. The forward is queued far ahead of the GPU: it has to wait here, or
        everything would be there at once.
        """
        under_way = sum(away.nbytes for away in self._leaving)
        while self._leaving:
            away = self._leaving[0]
            if under_way > _LEAVING:
                away.wait_to_leave()
            if not away.has_left():
                return
            under_way -= away.nbytes
            self._leaving.popleft()

    def _fetch_before(self, place: int) -> None:
        """Have the storages that were saved just before that one on their way."""
        for ref in self._order[max(place - _AHEAD, 0) : place]:
            away = ref()
            if away is not None and away.awaited:
                away.fetch()

    def _goes(self, tensor: Tensor) -> bool:
        return (
            type(tensor) in PLAIN_TENSORS
            and is_remote(tensor)
            and _has_storage(tensor)
            and tensor.untyped_storage().nbytes() >= SMALL
            and tensor.untyped_storage().nbytes() % tensor.itemsize == 0
            and self._stay.get(_key(tensor)) is None
        )


class Packed:
    """One saved tensor: which part of which storage."""

    def __init__(self, tensor: Tensor, away: Away) -> None:
        self.away = away
        self._dtype = tensor.dtype
        self._place = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        flat = self.away.take()
        with torch.no_grad():
            return flat.view(self._dtype).as_strided(*self._place)


class Away:
    """One storage in host memory, and on the device as long as it is needed there.

    Attributes:
        place: its number in the order of saving.
        holders: the tensors saved of it.
        awaited: those of them that the backward has not asked for yet; asked for, all of them, it
            is let go of on the device. (Another backward over the same graph begins anew.)
    """

    def __init__(self, tensor: Tensor, place: int) -> None:
        self.place = place
        self.holders = self.awaited = 0
        self._storage = weakref.ref(tensor.untyped_storage())
        self.nbytes = tensor.untyped_storage().nbytes()
        self._device = tensor.device
        self._lane = lane(tensor)
        count = tensor.untyped_storage().nbytes() // tensor.itemsize
        with torch.no_grad():
            flat = tensor.detach().as_strided((count,), (1,), 0)
            self._host, self._left = self._lane.to_host(flat)
        self._there: Tensor | None = flat  # until the copy is done
        self._seen: weakref.ref[Tensor] | None = None
        self._arrived: Any = None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this is the storage of `tensor`, not one that was at its place before."""
        return self._storage() is tensor.untyped_storage()

    def wait_to_leave(self) -> None:
        if self._left is not None:
            self._left.synchronize()

    def has_left(self) -> bool:
        """Whether the copy is done, and the device's memory free to be used again."""
        if self._left is not None and not self._left.query():
            return False
        self._left = None
        self._there = None
        return True

    def fetch(self) -> None:
        """Have it on the device, or on its way there."""
        if self._there is None and self._seen is not None:
            self._there = self._seen()
        if self._there is None:
            self._there, self._arrived = self._lane.to_device(self._host, self._device)

    def take(self) -> Tensor:
        """The whole storage as one tensor, there when the current stream gets to it."""
        self.fetch()
        flat = self._there
        assert flat is not None
        self._lane.wait(flat, self._arrived)
        self._seen = weakref.ref(flat)
        self.awaited -= 1
        if self.awaited <= 0:
            self.awaited = self.holders
            self.has_left()
        return flat


class _Lane:
    """Copies that are done when they return: of fake tensors, and in tests without a GPU."""

    def to_host(self, flat: Tensor) -> tuple[Tensor, Any]:
        return flat.to("cpu", copy=True), None

    def to_device(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        return host.to(device, copy=True), None

    def wait(self, flat: Tensor, event: Any) -> None:
        """Nothing is under way."""


class _CudaLane(_Lane):
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def to_host(self, flat: Tensor) -> tuple[Tensor, Any]:
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(self._stream):
            host.copy_(flat, non_blocking=True)
        return host, self._stream.record_event()

    def to_device(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        current = torch.cuda.current_stream(device)
        flat = torch.empty(host.shape, dtype=host.dtype, device=device)
        self._stream.wait_stream(current)  # whoever had that memory before is done
        with torch.cuda.stream(self._stream):
            flat.copy_(host, non_blocking=True)
        flat.record_stream(self._stream)
        return flat, self._stream.record_event()

    def wait(self, flat: Tensor, event: Any) -> None:
        if event is not None:
            current = torch.cuda.current_stream(flat.device)
            current.wait_event(event)
            flat.record_stream(current)


_lanes: dict[torch.device, _CudaLane] = {}
_PLAIN_LANE = _Lane()


def lane(tensor: Tensor) -> _Lane:
    """What copies between a tensor's device and the host."""
    if isinstance(tensor, FakeTensor) or tensor.device.type != "cuda":
        return _PLAIN_LANE
    if tensor.device not in _lanes:
        _lanes[tensor.device] = _CudaLane(tensor.device)
    return _lanes[tensor.device]


def is_remote(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory that is scarce."""
    return tensor.device.type == "cuda"


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
