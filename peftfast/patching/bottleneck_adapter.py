"""The project's own bottleneck adapters: they run the op already, and are counted when patched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.nn.bottleneck import BottleneckAdapter
from peftfast.nn.kronecker import KroneckerAdapter
from peftfast.patching.bottlenecks import require_op
from peftfast.patching.forwards import replaced_forward
from peftfast.patching.handlers import ClassSwap, Comparison
from peftfast.patching.state import KEY, State, state_of


class Counted(BottleneckAdapter):
    """An adapter whose calls are counted, and which takes the implementation that patch was told.

    Modules become one by `patch` only, which sets `__class__`. Their own `impl` stays what it was,
    and serves where patch was told "auto".
    """

    _own_impl: str

    @property
    def impl(self) -> str:
        state = state_of(self)
        return self._own_impl if state is None or state.impl == "auto" else state.impl

    @impl.setter
    def impl(self, value: str) -> None:
        self._own_impl = value

    def forward(self, x: Tensor, residual: bool | Tensor = True) -> Tensor:
        state: State | None = getattr(self, KEY, None)
        if state is not None and not torch.compiler.is_compiling():
            state.hits += 1
        return super().forward(x, residual)


class CountedBottleneckAdapter(Counted):
    pass


class CountedKroneckerAdapter(Counted, KroneckerAdapter):
    pass


class OwnAdapter(ClassSwap):
    """The handler of one of the project's adapters."""

    op = "bottleneck"
    is_method = True

    def __init__(self, source: type[nn.Module], fused: type[nn.Module]) -> None:
        self.name = f"peftfast's {source.__name__}"
        self.source, self.fused = source, fused

    def rewire(self, module: Any) -> None:
        own = module.__dict__.pop("impl")
        super().rewire(module)
        module.impl = own

    def restore(self, module: Any) -> None:
        own = module.__dict__.pop("_own_impl")
        super().restore(module)
        module.impl = own

    def unsupported(self, module: Any) -> list[str]:
        return []

    def obstacles(self, module: Any) -> list[str]:
        reason = replaced_forward(module, type(module).forward)
        return [] if reason is None else [reason]

    def compare(self, module: Any, impl: str) -> Comparison:
        """Both are the op."""
        return Comparison()

    def prepare(self, module: Any) -> None:
        """Nothing is left to be looked at."""

    def require(self, impl: str, modules: Iterable[Any]) -> None:
        """Raise ImplUnavailable where `impl`, asked for by name, can't serve these modules."""
        require_op(impl, modules)


HANDLERS = [
    OwnAdapter(BottleneckAdapter, CountedBottleneckAdapter),
    OwnAdapter(KroneckerAdapter, CountedKroneckerAdapter),
]
