"""What the linear under an adapter computes with: one reader for each exact type of base layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftfast.ops.nf4 import NF4Weight
from peftfast.patching.forwards import bypass_reason
from peftfast.patching.state import State


class Base(NamedTuple):
    """A linear's operands, and the tensors that they were read from."""

    weight: Tensor | NF4Weight  # [out, in]
    bias: Tensor | None  # [out]
    sources: tuple[Tensor, ...]


class Kind(NamedTuple):
    """How to read a type of base layer.

    Attributes:
        read: its operands, given the input (None: not known yet) and the record of the module
            around it (None: not fused); or why its own forward must run.
        view: another object like it, whose forward changes nothing of it.
    """

    read: Callable[[Any, Tensor | None, State | None], Base | str]
    view: Callable[[Any], Any] = lambda base: base


def _read_linear(base: Any, x: Tensor | None, state: State | None) -> Base:
    weight, bias = base.weight, base.bias
    return Base(weight, bias, (weight,) if bias is None else (weight, bias))


def _read_conv1d(base: Any, x: Tensor | None, state: State | None) -> Base:
    read = _read_linear(base, x, state)
    assert isinstance(read.weight, Tensor)
    return read._replace(weight=read.weight.t())


# `four_bit` adds bitsandbytes' linears: it is imported where bitsandbytes is.
KINDS: dict[type[nn.Module], Kind] = {nn.Linear: Kind(_read_linear), Conv1D: Kind(_read_conv1d)}


def read_base(base: nn.Module, x: Tensor | None, state: State | None) -> Base | str:
    """The operands of a base layer, or why its own forward must run."""
    kind = KINDS.get(type(base))
    if kind is None:
        return f"the base layer is a {type(base).__name__}"
    if reason := bypass_reason(base):
        return f"the base layer {reason}"
    return kind.read(base, x, state)


def view_of(base: nn.Module) -> Any:
    """A base layer whose forward changes nothing of this one; itself where no reader knows it."""
    kind = KINDS.get(type(base))
    return base if kind is None else kind.view(base)
