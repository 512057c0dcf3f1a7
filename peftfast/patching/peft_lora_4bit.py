"""PEFT's LoRA over bitsandbytes' 4-bit linears (QLoRA): the fused class and its handler."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit

import peftfast.patching.four_bit  # noqa: F401 (reads the base)
from peftfast.patching.four_bit import Releasing
from peftfast.patching.fused import fused_forward
from peftfast.patching.lora_call import read_call
from peftfast.patching.peft_lora import PeftLora, compute


class FusedLoraLinear4bit(Releasing, Linear4bit):
    """PEFT's LoRA over a 4-bit linear, run as one op where that computes the same."""

    forward = fused_forward(Linear4bit, read_call, compute)


HANDLERS = [PeftLora(Linear4bit, FusedLoraLinear4bit)]
