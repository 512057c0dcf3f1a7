"""4-bit weights (NF4 and FP4) on a GPU: the functions that `peftfast.ops.nf4` calls, and the
variants that are compiled ahead of time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftfast_kernels import device as devices
from peftfast_kernels import tiles
from peftfast_kernels.launch import recording
from peftfast_kernels.nf4_dequantize import dequantize
from peftfast_kernels.nf4_gemv import gemv
from peftfast_kernels.nf4_quantize import quantize_absmax, quantize_blocks
from peftfast_kernels.variant import Variant

__all__ = ["dequantize", "few_rows", "gemv", "quantize_absmax", "quantize_blocks"]

Scales = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def few_rows(device: torch.device, dtype: torch.dtype, in_features: int, out_features: int) -> int:
    """The most rows at which `gemv` beats dequantising and a GEMM here; 0: at none."""
    return tiles.few_rows(devices.arch(device), dtype.itemsize, in_features)


def aot_variants(arch: int) -> Iterator[Variant]:
    """Every kernel over NF4 in blocks of 64, as bitsandbytes' users have it."""
    bf16, n, blocks = torch.bfloat16, 4096 * 4096, 4096 * 64

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    packed = empty(n // 2, dtype=torch.uint8)
    codes = empty(blocks, dtype=torch.uint8)
    nested: Scales = (codes, empty(blocks // 256), empty(256), empty())
    plain: Scales = (empty(blocks), None, None, None)
    with recording(arch) as launches:
        quantize_blocks(empty(4096, 4096, dtype=bf16), 64, "nf4")
        quantize_absmax(empty(blocks), empty(256))
        for scales in (nested, plain):
            dequantize(packed, *scales, 64, "nf4", bf16, empty(n, dtype=bf16))
        for rows, columns in ((1, 4096), (16, 4096), (1, 32000)):
            x, out = empty(rows, 4096, dtype=bf16), empty(rows, columns, dtype=bf16)
            gemv(x, packed, *nested, 64, "nf4", None, out)
    for launch in launches:
        yield launch.variant("bf16")
