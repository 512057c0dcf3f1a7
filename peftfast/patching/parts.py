"""What surrounds the layers of a model that is fused: norms, gated MLPs, activations, dropouts,
attention.

They are recognised by structure, and what they compute is found by comparing it with the ops on
random inputs: neither needs to know a model's name. The comparison is made on a CPU with random
parameters of its own; it tells what a module's code computes, not what it holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.patching.forwards import inherited_forward, replaced_forward
from peftfast.patching.fused import Call, fused_forward
from peftfast.patching.handlers import ClassSwap, Comparison
from peftfast.patching.state import State

Read = Callable[[Any, Tensor], Call | str]

CPU = torch.device("cpu")


class Rewired(nn.Module):
    """A mixin of the classes that `patch` makes of others; it copies and pickles by what they are
    made of.
    """

    part: Part

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        return _remade, (type(self.part), self.part.source), *made[2:]


def _remade(kind: type[Part], source: type[nn.Module]) -> nn.Module:
    fused = part(kind, source).fused
    made: nn.Module = fused.__new__(fused)
    return made


class Part(ClassSwap):
    """The handler of modules of class `source` that are one kind of part; made by `part`."""

    op = ""
    found_by_comparing = True
    recomputes = True

    def __init__(self, source: type[nn.Module]) -> None:
        self.source = source
        self.name = f"{source.__module__}.{source.__qualname__}"
        members = {
            "__doc__": f"{source.__qualname__}, run as an op of peftfast where that is the same.",
            "__module__": __name__,
            "part": self,
            "forward": fused_forward(source, self.read, _compute),
        }
        self.fused = type(f"Fused{source.__name__}", (Rewired, source), members)

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        """Whether a module's structure is that of this kind."""
        raise NotImplementedError

    @staticmethod
    def read(module: Any, x: Tensor) -> Call | str:
        """The operands of a call, or why the module's own forward must run."""
        raise NotImplementedError

    def op_of(self, plan: Any) -> str:
        """The name of the op that serves a plan."""
        return self.op

    def claims(self, plan: Any) -> tuple[str, ...]:
        """The children that a rewired module no longer calls."""
        return ()

    def unsupported(self, module: Any) -> list[str]:
        return []

    def obstacles(self, module: Any) -> list[str]:
        reasons = inherited_forward(self.source, self.name)
        if reason := replaced_forward(module, type(module).forward):
            reasons.append(reason)
        return reasons

    def find(self, module: Any) -> Comparison:
        """The op that computes what the module does, as a plan, or why there is none."""
        raise NotImplementedError

    def compare(self, module: Any, impl: str) -> Comparison:
        """The same, without a trace in the module or a random generator."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                return self.find(module)
            except Exception as error:  # any code may be behind a module that looks like this one
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                return Comparison(unserved=f"its forward on a random input raised {what}")

    def prepare(self, module: Any) -> None:
        """Nothing is left to be looked at."""

    def require(self, impl: str, modules: Iterable[Any]) -> None:
        """Parts take the implementation asked for where their op has it, and else the best."""

    def impl(self, module: Any, impl: str, device: torch.device, dtype: torch.dtype) -> str:
        """`impl` where the op has it for this module and such tensors, else "auto"."""
        reasons = self.impl_reasons(module, impl, device, dtype)
        return "auto" if reasons else impl

    def impl_reasons(
        self, module: Any, impl: str, device: torch.device, dtype: torch.dtype
    ) -> list[str]:
        raise NotImplementedError


def _compute(module: Any, state: State, call: Call, x: Tensor) -> Tensor:
    return call.output(x, state.impl)


def part(kind: type[Part], source: type[nn.Module]) -> Part:
    """The one handler of a kind of part of class `source`."""
    if (kind, source) not in _parts:
        _parts[kind, source] = kind(source)
    return _parts[kind, source]


_parts: dict[tuple[type[Part], type[nn.Module]], Part] = {}


def part_of(module: nn.Module) -> Part | None:
    """The handler of a part, rewired or not; None where a module is none."""
    if isinstance(module, Rewired):
        return module.part
    for kind in _kinds():
        if kind.recognises(module):
            return part(kind, type(module))
    return None


@functools.cache
def _kinds() -> tuple[type[Part], ...]:
    from peftfast.patching.activations import Activation
    from peftfast.patching.attention import Attention
    from peftfast.patching.bottlenecks import Bottleneck
    from peftfast.patching.dropouts import Dropout
    from peftfast.patching.embeddings import Embedding
    from peftfast.patching.gated import GatedMLP
    from peftfast.patching.norms import Norm

    return Norm, Dropout, Activation, GatedMLP, Attention, Embedding, Bottleneck


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has neither children nor buffers."""
    return not module._modules and not module._buffers


def source_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or what that was before the module was rewired."""
    return module.part.source if isinstance(module, Rewired) else type(module)
