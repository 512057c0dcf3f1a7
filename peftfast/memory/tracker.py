"""Watches storages: which operator made each, how large it is, and when it is freed."""

from __future__ import annotations

import functools
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftfast.memory.storages import storages
from peftfast.memory.trace import Block, Moment

Hidden = Callable[[Any, tuple, dict, Any], int]
Answer = Callable[[Any, tuple, dict], Any]

_PLAIN = torch._C._disabled_torch_dispatch_impl
_NUMBERS = re.compile(r"\.\d+(?=\.|$)")


class Tracker(TorchDispatchMode):
    """Records a block for each storage that an operator returns, until it is freed.

    Args:
        device: the type of the tensors to watch; "meta" for a simulation.
        hidden: bytes that an operator allocates and frees inside, which no dispatch shows.
        answer: what an operator that needs values gives in a simulation, NotImplemented where it is
            to be run.
        ignore_new_inputs: whether a storage that is first met as an operator's input was there
            before, and is not to be counted. (A simulation registers all that is there.)

    Attributes:
        phase: where the step is; the caller moves it.
        paths: names of modules by id. Which one runs is seen from the frames of the interpreter:
            a hook would show on the modules, and change which code they run.
    """

    def __init__(
        self,
        device: str,
        *,
        hidden: Hidden | None = None,
        answer: Answer | None = None,
        ignore_new_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.moments: list[Moment] = []
        self.phase = "inputs"
        self.paths: dict[int, str] = {}
        self._device = device
        self._hidden, self._answer = hidden, answer
        self._ignores = ignore_new_inputs
        self._known: dict[int, Block | None] = {}
        self._watches: dict[int, weakref.ref] = {}
        self._disowned = 0

    def register(self, tensor: Tensor, label: str) -> None:
        """Count a tensor that is there before the first moment."""
        for storage in self._of_device(tensor):
            if storage._cdata not in self._known:
                self._watch(storage, Block(storage.nbytes(), 0, "", label))

    def block_of(self, tensor: Tensor) -> Block | None:
        """The block of a tensor's storage, if it is counted."""
        found = [self._known.get(storage._cdata) for storage in self._of_device(tensor)]
        return found[0] if found else None

    def disown(self, tensor: Tensor) -> None:
        """Count neither this tensor nor what is computed of such tensors alone: code under
        simulation may use the meta device too, to work out shapes.
        """
        for storage in self._of_device(tensor):
            block = self._known.get(storage._cdata)
            if block is not None:
                block.died = block.born
                self._known[storage._cdata] = None
                self._disowned += 1

    def _is_disowned(self, args: tuple, kwargs: dict) -> bool:
        inputs = [storage._cdata for _, storage in self._each((args, kwargs))]
        return bool(inputs) and all(self._known.get(key, 0) is None for key in inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind.__torch_dispatch__ is not _PLAIN for kind in types):
            return NotImplemented  # the subclass is asked first, and this mode for what it calls
        if self._ignores and func is not torch.ops.aten.lift_fresh.default:
            for _, storage in self._each((args, kwargs)):
                if storage._cdata not in self._known:
                    self._watch(storage, None)
        outputs = NotImplemented if self._answer is None else self._answer(func, args, kwargs)
        if outputs is NotImplemented:
            outputs = func(*args, **kwargs)
        made, path = 0, None
        disowned = self._disowned and not self._ignores and self._is_disowned(args, kwargs)
        for tensor, storage in self._each(outputs):
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                block = self._known[key]
                if block is not None and block.size < size:  # resized
                    made += size - block.size
                    block.size = size
                continue
            if disowned:
                self._watch(storage, None)
            elif size:
                made += size
                path = self._path() if path is None else path
                origin = f"{_kind(path)} {_name(func)}".strip()
                block = Block(size, len(self.moments), origin, self.phase)
                block.shape = tuple(tensor.shape)
                self._watch(storage, block)
        inside = 0 if self._hidden is None else self._hidden(func, args, kwargs, outputs)
        if inside:
            now = len(self.moments)
            self.blocks.append(Block(inside, now, "", "scratch and workspaces", now + 1))
        if made or inside:
            path = self._path() if path is None else path
            self.moments.append(Moment(self.phase, path, _kind(path), _name(func), made + inside))
        return outputs

    def _path(self) -> str:
        frame = sys._getframe(2) if self.paths else None
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and code.co_varnames[0] == "self":
                name = self.paths.get(id(frame.f_locals.get("self")))
                if name is not None:
                    return name
            frame = frame.f_back
        return ""

    def _watch(self, storage: torch.UntypedStorage, block: Block | None) -> None:
        key = storage._cdata
        self._known[key] = block
        self._watches[key] = weakref.ref(storage, lambda _: self._freed(key))
        if block is not None:
            self.blocks.append(block)

    def _freed(self, key: int) -> None:
        del self._watches[key]
        block = self._known.pop(key)
        if block is not None:
            block.died = len(self.moments)

    def _each(self, values: object) -> Iterator[tuple[Tensor, torch.UntypedStorage]]:
        leaves = [values] if isinstance(values, Tensor) else tree_leaves(values)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                for storage in self._of_device(leaf):
                    yield leaf, storage

    def _of_device(self, tensor: Tensor) -> Iterator[torch.UntypedStorage]:
        for storage in storages(tensor):
            if storage.device.type == self._device:
                yield storage


@functools.cache
def _name(func: Any) -> str:
    name = func._schema.name.removeprefix("aten::")
    return name.replace("::", ".")


@functools.cache
def _kind(path: str) -> str:
    """A module's path without the numbers of layers."""
    return _NUMBERS.sub("", path)
