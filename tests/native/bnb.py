"""What bitsandbytes' own CPU kernels give, as the truth about bits."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import bitsandbytes.functional as F
import torch
from bitsandbytes.cextension import lib
from torch import Tensor

_SUFFIX = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Quantized:
    """A 4-bit weight as bitsandbytes makes it; absmax in full precision beside its parts."""

    packed: Tensor
    statistics: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
    scales: Tensor
    shape: torch.Size
    block_size: int
    quant_type: str

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """By bitsandbytes' kernel. All elements go as one row: with several it takes a wrong
        scale where blocks straddle rows, and odd rows take another path.
        """
        n = self.packed.numel() * 2
        values = torch.full((n,), float("nan"), dtype=dtype)
        kernel = f"cdequantize_blockwise_cpu_{self.quant_type}_{_SUFFIX[dtype]}"
        tensors = (self.packed, self.scales, values)
        sizes = (self.block_size, 1, n)
        getattr(lib, kernel)(
            *(ctypes.c_void_p(t.data_ptr()) for t in tensors), *map(ctypes.c_longlong, sizes)
        )
        return values[: self.shape.numel()].view(self.shape)


def quantize(w: Tensor, block_size: int, quant_type: str, nested: bool) -> Quantized:
    """By bitsandbytes' functions for a CPU."""
    packed, state = F.quantize_4bit(
        w, blocksize=block_size, quant_type=quant_type, compress_statistics=nested
    )
    statistics = (state.absmax, None, None, None)
    scales = state.absmax
    if nested:
        statistics = (state.absmax, state.state2.absmax, state.state2.code, state.offset)
        scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return Quantized(packed.view(-1), statistics, scales, w.shape, block_size, quant_type)
