"""Attention modules that ask transformers' AttentionInterface for "sdpa".

Two things that such a module keeps for the backward are not needed: keys and values repeated for
every head of a group, where SDPA takes groups natively, and a bool mask that SDPA makes additive
for every layer anew. Nothing is computed again for it.

A module learns of its implementation by `self.config._attn_implementation`. A rewired one gets a
config that shares everything with its own, and answers with this file's name where that says
"sdpa"; any other answer, now or later, is passed on.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftfast.methods.attention import (
    SharedConfig,
    asks_interface,
    original_config,
    shared_config,
    source_of,
)
from peftfast.ops import recipes
from peftfast.patching.handlers import Comparison
from peftfast.patching.parts import Part
from peftfast.patching.state import state_of

NAME = "peftfast_sdpa"
_ADDITIVE = "_peftfast_additive"
_PASSED_ON = ("position_bias", "cache", "softcap", "output_attentions")


@dataclass(frozen=True)
class Renamed:
    """The answer of a rewired module's config."""

    def __call__(self, asked: Any) -> Any:
        return NAME if asked == "sdpa" else asked


class Attention(Part):
    """The handler of attention modules of one class."""

    op = "sdpa"
    recomputes = False

    def __init__(self, source: type[nn.Module]) -> None:
        self.source = self.fused = source
        self.name = f"{source.__module__}.{source.__qualname__}"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        kind: Any = type(module)
        if not asks_interface(kind) or not hasattr(module, "config"):
            return False
        # One with a prefix asks for the prefix's attention, which keeps as little.
        return source_of(module) is None or state_of(module) is not None

    def obstacles(self, module: Any) -> list[str]:
        return []

    def find(self, module: Any) -> Comparison:
        return Comparison()

    def rewire(self, module: Any) -> None:
        if not isinstance(module.config, SharedConfig):
            module.config = shared_config(module.config, Renamed())

    def restore(self, module: Any) -> None:
        config = module.config
        if isinstance(config, SharedConfig) and isinstance(config._peftfast_answer, Renamed):
            module.config = original_config(config)

    def impl(self, module: Any, impl: str, device: torch.device, dtype: torch.dtype) -> str:
        return "auto"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward`, with less kept for the backward.

    Groups of heads are left to SDPA under a mask too where its kernel takes them: on a CPU. (On a
    GPU it would leave them to plain operations, which keep the probabilities.)
    """
    state = state_of(module)
    if state is not None and not torch.compiler.is_compiling():
        state.hits += 1
    groups = getattr(module, "num_key_value_groups", 1)
    saving = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    special = any(kwargs.get(name) is not None for name in _PASSED_ON)
    if attention_mask is not None and saving and not special:
        if attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, query.dtype)
        if groups > 1 and query.device.type == "cpu" and query.shape[2] > 1:
            y = F.scaled_dot_product_attention(
                query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
            )
            return _saved(y.transpose(1, 2).contiguous()), None
    y, weights = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )
    return (_saved(y) if saving else y), weights


def _saved(y: Tensor) -> Tensor:
    recipes.mark_saved(y)  # by SDPA's kernels, for their backward
    return y


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as SDPA makes it additive: 0 where it holds, -inf elsewhere.

    All layers of a forward get one mask, for as long as one of them keeps it.
    """
    if torch.compiler.is_compiling():  # which makes one of equal expressions
        return _additive(mask, dtype)
    known = getattr(mask, _ADDITIVE, None)
    if known is not None:
        made: Tensor | None = known[0]()
        if made is not None and made.dtype == dtype and known[1:] == _versions(mask, made):
            return made
    made = _additive(mask, dtype)
    setattr(mask, _ADDITIVE, (weakref.ref(made), *_versions(mask, made)))
    return made


def _versions(mask: Tensor, made: Tensor) -> tuple[int, int]:
    return tuple(0 if t.is_inference() else t._version for t in (mask, made))  # type: ignore


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    shape = mask.shape
    for dim in range(mask.ndim - 2):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:  # expanded: one of them is enough
            mask = mask.narrow(dim, 0, 1)
    made = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return made.masked_fill_(mask.logical_not(), float("-inf")).expand(shape)


AttentionInterface.register(NAME, attend)
