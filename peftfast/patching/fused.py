"""The forward of a fused class: the op where it computes the same, else the class's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from peftfast.patching.state import KEY, State
from peftfast.patching.surroundings import transform_reason


class Call(Protocol):
    """The operands of one call of an op."""

    def output(self, x: Tensor, impl: str) -> Tensor: ...


SomeCall = TypeVar("SomeCall", bound=Call)


def fused_forward(
    source: type[nn.Module],
    read: Callable[[Any, Tensor], SomeCall | str],
    compute: Callable[[Any, State, SomeCall, Tensor], Tensor],
) -> Callable[..., Tensor]:
    """The forward of a class that `patch` gives to modules of type `source`.

    Args:
        source: whose forward runs where the op's does not; that is counted, with a reason.
        read: the operands of a module's call with an input, or why `source`'s forward must run.
        compute: the module's output from them, eagerly; a compiled call runs them alone.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        state: State | None = getattr(self, KEY, None)
        if state is None:  # unpatched, while something still holds this bound method
            return source.forward(self, *args, **kwargs)
        compiling = torch.compiler.is_compiling()
        reason: str | None = None
        if len(args) != 1 or kwargs:
            reason = "called with arguments besides the input"
        elif not compiling:
            reason = transform_reason()
        elif not torch.compiler.is_dynamo_compiling():  # is_exporting() is wrong in torch 2.11
            reason = "inside torch.export"
        call = read(self, args[0]) if reason is None else reason
        if isinstance(call, str):
            if not compiling:
                state.delegated(call)
            return source.forward(self, *args, **kwargs)
        if compiling:
            return call.output(args[0], state.impl)
        y = compute(self, state, call, args[0])
        state.hits += 1
        return y

    return forward
