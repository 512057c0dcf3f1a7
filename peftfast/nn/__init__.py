"""Drop-in modules over the ops; of use without PEFT."""

from __future__ import annotations

from peftfast.nn.lora import LoRALinear

__all__ = ["LoRALinear"]
