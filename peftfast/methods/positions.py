"""Positions that begin after a prefix, as they do where the prefix is in the cache.

Rotary embeddings are given positions by their model: a hook adds to them. Learned embeddings look
positions up, and often find them out themselves: their class is swapped for one with a step before
the look-up. Both ask the sources of prefixes each time, so that a prefix that is switched off moves
nothing.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peftfast.methods.attention import Source

_OFFSET = "_peftfast_offset"
_POSITIONS = re.compile(r"(^|_)w?pos|^wpe$")


class Offset:
    """At which position a stack's sequence begins, by the sources in it."""

    def __init__(self, sources: Sequence[Source] = ()) -> None:
        self.sources = list(sources)

    def __call__(self) -> int:
        shift = 0
        for source in self.sources:  # as a loop, which torch.compile follows
            shift = max(shift, source.shift())
        return shift


def find(model: nn.Module, layers: str, others: Sequence[str] = ()) -> list[str]:
    """The names of the modules that give positions to the layers in the list `layers`.

    They are the nearest: in the module that holds the list, or in those around it that hold no
    other list of layers (`others`). Positions of a grid of patches or of frames, beside a
    convolution, are not among them: their number is fixed.
    """
    root = layers
    while not any(_is_in(other, root) for other in others):
        around = model.get_submodule(root)
        found = [
            name
            for name, module in around.named_modules()
            if _is_rotary(module) or _is_learned(name, module)
        ]
        if found or not root:
            prefix = f"{root}." if root else ""
            return [f"{prefix}{name}" for name in found if not _has_convolution(around, name)]
        root = root.rpartition(".")[0]
    return []


def _is_in(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def shift(module: Any, offset: Offset) -> None:
    """Move the positions of a rotary or a learned embedding by an offset."""
    module.__dict__[_OFFSET] = offset
    if not isinstance(module, nn.Embedding):
        module.register_forward_pre_hook(_ShiftRotary(offset), with_kwargs=True)
    elif not isinstance(module, _Shifted):
        kind: Any = type(module)
        module.__class__ = _shifted_class(kind)


def unshift(module: Any) -> None:
    """Undo `shift`."""
    if module.__dict__.pop(_OFFSET, None) is None:
        return
    if isinstance(module, _Shifted):
        source: Any = type(module)._peftfast_source
        module.__class__ = source
        return
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, _ShiftRotary):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def offset_of(module: nn.Module) -> Offset | None:
    """The offset that `shift` gave a module."""
    found: Offset | None = module.__dict__.get(_OFFSET)
    return found


class _ShiftRotary:
    def __init__(self, offset: Offset) -> None:
        self.offset = offset

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        shift = self.offset()
        if not shift:
            return None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": kwargs["position_ids"] + shift}
        kind: Any = type(module)
        index = _parameters(kind).index("position_ids")
        return (*args[:index], args[index] + shift, *args[index + 1 :]), kwargs


class _Shifted(nn.Embedding):
    """A learned embedding of positions that begin at an offset."""

    _peftfast_source: type[nn.Embedding]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self._peftfast_source,), self.__dict__


class _ShiftedLookUp(_Shifted):
    """Stands between a class of the model's and nn.Embedding, whose forward it thus precedes."""

    def forward(self, input: Tensor) -> Tensor:
        shift: int = getattr(self, _OFFSET)()
        if shift and input.shape[-1] + shift > self.num_embeddings:
            raise ValueError(
                f"{input.shape[-1]} positions after a prefix of {shift} are more than the"
                f" {self.num_embeddings} that the model has"
            )
        return super().forward(input + shift if shift else input)


class _ShiftedArguments(_Shifted):
    """For classes that look their weight up by themselves, from where the cache ends."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shift: int = getattr(self, _OFFSET)()
        bound = inspect.signature(type(self)._peftfast_source.forward).bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + shift
        else:
            given["past_key_values_length"] += shift
        return super().forward(*bound.args[1:], **bound.kwargs)


@functools.cache
def _shifted_class(kind: type[nn.Embedding]) -> type[_Shifted]:
    members = {"__module__": kind.__module__, "_peftfast_source": kind}
    if kind is nn.Embedding:
        bases: tuple[type, ...] = (_ShiftedLookUp,)
    elif _looks_up_by_super(kind):
        bases = (kind, _ShiftedLookUp)
    else:
        bases = (_ShiftedArguments, kind)
    return type(kind.__name__, bases, members)


def _unpickled(kind: Any) -> nn.Embedding:
    made = _shifted_class(kind)
    return made.__new__(made)


def _looks_up_by_super(kind: type[nn.Embedding]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return kind.forward is nn.Embedding.forward or (code is not None and "super" in code.co_names)


def _is_rotary(module: nn.Module) -> bool:
    kind: Any = type(module)
    has = any(name.endswith("inv_freq") for name in module._buffers)
    return has and "position_ids" in _parameters(kind)


def _is_learned(name: str, module: nn.Module) -> bool:
    if not isinstance(module, nn.Embedding):
        return False
    source: Any = type(module)
    if isinstance(module, _Shifted):
        source = source._peftfast_source
    if _POSITIONS.search(name.rpartition(".")[2].lower()) is None:
        return False
    return _looks_up_by_super(source) or "past_key_values_length" in _parameters(source)


def _has_convolution(around: nn.Module, name: str) -> bool:
    """Whether the module that holds one holds a convolution too."""
    holder = around.get_submodule(name.rpartition(".")[0])
    return any(
        type(child).__name__.startswith("Conv") and hasattr(child, "stride")
        for child in holder.children()
    )


@functools.cache
def _parameters(kind: type[nn.Module]) -> list[str]:
    """Of a class's forward, without self."""
    return list(inspect.signature(kind.forward).parameters)[1:]
