"""`nn.Dropout` outside of adapters: the mask is made again, not kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.ops import dropout
from peftfast.ops.dropout import dropout_reasons
from peftfast.patching.handlers import Comparison
from peftfast.patching.inputs import input_reason
from peftfast.patching.parts import Part


class DropoutCall(NamedTuple):
    p: float

    def output(self, x: Tensor, impl: str) -> Tensor:
        return dropout(x, self.p, impl=impl) if self.p > 0 else x


class Dropout(Part):
    """The handler of `nn.Dropout`; one that drops nothing is no part of a model."""

    op = "dropout"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return type(module) is nn.Dropout and module.p > 0

    @staticmethod
    def read(module: Any, x: Tensor) -> DropoutCall | str:
        if module.inplace:
            return "it works in place"
        return input_reason(x) or DropoutCall(module.p if module.training else 0.0)

    def unsupported(self, module: Any) -> list[str]:
        return ["it works in place"] if module.inplace else []

    def find(self, module: Any) -> Comparison:
        return Comparison()

    def impl_reasons(
        self, module: Any, impl: str, device: torch.device, dtype: torch.dtype
    ) -> list[str]:
        return dropout_reasons(impl, device, dtype)
