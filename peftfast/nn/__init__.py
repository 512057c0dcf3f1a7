"""Drop-in modules over the ops; of use without PEFT."""

from __future__ import annotations

from peftfast.nn.bottleneck import BottleneckAdapter
from peftfast.nn.kronecker import KroneckerAdapter
from peftfast.nn.lora import LoRALinear
from peftfast.nn.nf4 import NF4Linear
from peftfast.nn.prefix_attention import PrefixAttention
from peftfast.nn.quantised_init import loftq_init, pissa_init

__all__ = [
    "BottleneckAdapter",
    "KroneckerAdapter",
    "LoRALinear",
    "NF4Linear",
    "PrefixAttention",
    "loftq_init",
    "pissa_init",
]
