"""The project's own prefixes: attention reads them by the op already, and they are counted when
patched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peftfast.nn.prefix_attention import PrefixAttention
from peftfast.ops import prefix_attention
from peftfast.patching.bottleneck_adapter import OwnAdapter
from peftfast.patching.state import KEY, State, state_of


class CountedPrefixAttention(PrefixAttention):
    """A prefix whose calls are counted, and whose attention takes the implementation that patch was
    told.

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

    def prefixes(self) -> tuple[Tensor, Tensor]:
        state: State | None = getattr(self, KEY, None)
        if state is not None and not torch.compiler.is_compiling():
            state.hits += 1
        return super().prefixes()


class OwnPrefix(OwnAdapter):
    """The handler of the project's prefixes."""

    op = "prefix_attention"

    def require(self, impl: str, modules: Iterable[Any]) -> None:
        """Raise ImplUnavailable where `impl`, asked for by name, can't serve these modules."""
        kinds = {}
        for module in modules:
            parameter = next(module.parameters())
            if parameter.device.type != "meta":
                kinds[parameter.device, parameter.dtype, module.head_dim, module.form] = module
        for device, dtype, size, form in kinds:
            one = torch.ones(1, 1, 1, size, device=device, dtype=dtype)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                prefix_attention(one, one, one, one[0], one[0], form=form, impl=impl)


HANDLERS = [OwnPrefix(PrefixAttention, CountedPrefixAttention)]
