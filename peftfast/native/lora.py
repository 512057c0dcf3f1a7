"""The LoRA linear on a CPU: the reference's steps with this package's dropout, and with GEMMs in
float32 where the CPU has no instructions for products of 16-bit numbers.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor

from peftfast.native.dropout import drop
from peftfast.reference import lora as reference


@functools.cache
def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of matrices of `dtype` are computed fastest on a CPU.

    float32 for bfloat16 and float16 where an x86 CPU lacks instructions for their products: there
    torch converts piecewise, or loops, which takes several times float32's time.
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    if not narrow or device.type != "cpu" or _has_products_of(dtype):
        return dtype
    return torch.float32


def _has_products_of(dtype: torch.dtype) -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return True  # torch's own choice
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def lora_linear_forward(x: Tensor, *operands: Any, **options: Any) -> tuple[list[Tensor], Tensor]:
    """As `peftfast.reference.lora.lora_linear_forward`, without `gemm_dtype` and `drop`."""
    wide = gemm_dtype(x.dtype, x.device)
    return reference.lora_linear_forward(x, *operands, gemm_dtype=wide, drop=drop, **options)


def lora_linear_backward(
    dys: Any, t: Tensor, x: Tensor, *operands: Any, **options: Any
) -> list[Tensor]:
    """As `peftfast.reference.lora.lora_linear_backward`, without `gemm_dtype` and `drop`."""
    wide = gemm_dtype(x.dtype, x.device)
    return reference.lora_linear_backward(
        dys, t, x, *operands, gemm_dtype=wide, drop=drop, **options
    )
