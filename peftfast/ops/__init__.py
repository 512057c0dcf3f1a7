"""The ops: contracts, dispatch and autograd. Importing them imports torch only."""

from __future__ import annotations

from peftfast.ops import nf4
from peftfast.ops.activation import activation, gated_activation
from peftfast.ops.bottleneck import ACTIVATIONS, bottleneck
from peftfast.ops.cross_entropy import linear_cross_entropy
from peftfast.ops.dispatch import Impl, ImplUnavailable
from peftfast.ops.dropout import dropout
from peftfast.ops.embedding import embedding
from peftfast.ops.lora import lora_linear, lora_linear_group, lora_linear_reasons
from peftfast.ops.norm import layer_norm, rms_norm
from peftfast.ops.prefix_attention import prefix_attention

__all__ = [
    "ACTIVATIONS",
    "Impl",
    "ImplUnavailable",
    "activation",
    "bottleneck",
    "dropout",
    "embedding",
    "gated_activation",
    "layer_norm",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_group",
    "lora_linear_reasons",
    "nf4",
    "prefix_attention",
    "rms_norm",
]
