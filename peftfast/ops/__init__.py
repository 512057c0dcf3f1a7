"""The ops: contracts, dispatch and autograd. Importing them imports torch only."""

from __future__ import annotations

from peftfast.ops import nf4
from peftfast.ops.dispatch import Impl, ImplUnavailable
from peftfast.ops.lora import lora_linear, lora_linear_group, lora_linear_reasons

__all__ = [
    "Impl",
    "ImplUnavailable",
    "lora_linear",
    "lora_linear_group",
    "lora_linear_reasons",
    "nf4",
]
