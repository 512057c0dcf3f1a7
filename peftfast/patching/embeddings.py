"""Frozen `nn.Embedding`s: what reads their rows need not keep them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfast.ops import embedding
from peftfast.patching.handlers import Comparison
from peftfast.patching.parts import Part


class EmbeddingCall(NamedTuple):
    weight: Tensor
    padding_idx: int | None

    def output(self, ids: Tensor, impl: str) -> Tensor:
        return embedding(ids, self.weight, padding_idx=self.padding_idx)


class Embedding(Part):
    """The handler of `nn.Embedding`; a trainable one is not touched."""

    op = "embedding"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        if type(module) is not nn.Embedding:
            return False
        weight = module._parameters.get("weight")
        return weight is not None and not weight.requires_grad

    @staticmethod
    def read(module: Any, ids: Tensor) -> EmbeddingCall | str:
        weight = module._parameters.get("weight")
        if type(weight) not in (nn.Parameter, FakeTensor):  # a shard's is another at each call
            return f"its weight is a {type(weight).__name__}"
        if weight.requires_grad:
            return "its weight is trained"
        if type(ids) not in (Tensor, FakeTensor) or ids.dtype not in (torch.int64, torch.int32):
            return f"the input is a {type(ids).__name__} of {getattr(ids, 'dtype', None)}"
        if module.max_norm is not None:
            return "it renormalises its weight (max_norm)"
        return EmbeddingCall(weight, module.padding_idx)

    def unsupported(self, module: Any) -> list[str]:
        return ["it renormalises its weight (max_norm)"] if module.max_norm is not None else []

    def find(self, module: Any) -> Comparison:
        return Comparison()

    def impl_reasons(
        self, module: Any, impl: str, device: torch.device, dtype: torch.dtype
    ) -> list[str]:
        return []
