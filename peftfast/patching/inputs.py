"""Which inputs the ops take in place of a module's own forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfast.ops.nf4 import NF4Weight
from peftfast.ops.operands import autocast_dtype

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
SHORT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def input_reason(x: Tensor) -> str | None:
    """Why no op takes this input, whatever the layer."""
    if type(x) not in PLAIN_TENSORS:
        return f"the input is a {type(x).__name__}"
    if x.layout is not torch.strided or x.is_nested:
        return "the input is not a dense tensor"
    if x.device.type == "meta" or not x.dtype.is_floating_point:
        return f"the input is {x.dtype} on {x.device.type}"
    return None


def four_bit_reason(x: Tensor, weight: NF4Weight) -> str | None:
    """Why the ops don't compute of x what bitsandbytes does over this weight.

    bitsandbytes knows nothing of autocast: it computes in its own dtype, as an op does only where
    that is autocast's too; and gives x's dtype back, to which the op's output can be cast unless
    it holds less than what PEFT would add to it.
    """
    if weight.device != x.device:
        return f"the base layer's weight is on {weight.device}, the input on {x.device}"
    if x.dtype not in SHORT_DTYPES:
        return f"the input is {x.dtype}, over a 4-bit weight"
    if x.shape[-1:] == weight.shape[:1] != weight.shape[1:]:
        return "the input has as many features as the base layer puts out"
    autocast, own = autocast_dtype(x), weight.compute_dtype or x.dtype
    if autocast is not None and (autocast != own or x.dtype not in (autocast, torch.float32)):
        return f"the base layer computes in {own}, autocast in {autocast}, the input is {x.dtype}"
    return None


def cast_after(x: Tensor) -> torch.dtype | None:
    """What an op's output over a 4-bit weight is cast to: x's dtype, which bitsandbytes keeps."""
    return x.dtype if autocast_dtype(x) not in (None, x.dtype) else None
