"""Rows in 8 bits a value with one float32 scale a row, in plain PyTorch.

    scale = max |x_row| / 127        code = round(x / scale)        x' = code * scale

so that |x' - x| <= scale / 2, besides the rounding of x' to its dtype (symmetric row-wise absmax
quantisation, as in Dettmers et al., "LLM.int8()", NeurIPS 2022, section 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LEVELS = 127
_BLOCK = 1 << 20  # values made float32 at a time


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 in the shape of x [..., d], and scales, float32 [...]; x is 16 or 32 bits wide.

    A row that holds a NaN or an infinity has a scale that is not finite, and is NaN afterwards.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return codes, scales
    width = x.shape[-1]
    rows, flat_codes, flat_scales = x.reshape(-1, width), codes.view(-1, width), scales.view(-1)
    step = max(1, _BLOCK // width)
    for start in range(0, len(rows), step):
        block = rows[start : start + step].to(torch.float32, copy=True)
        scale = torch.linalg.vector_norm(block, float("inf"), dim=1) / _LEVELS
        flat_scales[start : start + step] = scale
        finite = (scale > 0) & scale.isfinite()
        block.div_(torch.where(finite, scale, 1).unsqueeze(1)).round_()
        flat_codes[start : start + step] = torch.where(finite.unsqueeze(1), block, 0).to(torch.int8)
    return codes, scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x' [..., d] in `dtype`."""
    x = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if x.numel() == 0:
        return x
    width = x.shape[-1]
    flat, rows, factors = x.view(-1, width), codes.view(-1, width), scales.reshape(-1, 1)
    step = max(1, _BLOCK // width)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        flat[part] = rows[part] * factors[part]
    return x


def pack_columns(x: Tensor, widths: Sequence[int]) -> Tensor:
    """x [M, sum of widths] as one int8 matrix: the codes, then four bytes of a scale for each row
    of each block of columns.
    """
    parts = [quantize_rows(block) for block in x.split(list(widths), dim=1)]
    scales = torch.stack([scale for _, scale in parts], dim=1)
    return torch.cat([*(codes for codes, _ in parts), scales.view(torch.int8)], dim=1)


def packed_width(columns: int, blocks: int) -> int:
    """The columns of what `pack_columns` gives."""
    return columns + torch.float32.itemsize * blocks


def unpack_columns(packed: Tensor, widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The matrix that `pack_columns` packed, in `dtype`."""
    codes = packed[:, : sum(widths)].split(list(widths), dim=1)
    scales = packed[:, sum(widths) :].contiguous().view(torch.float32)
    blocks = [
        dequantize_rows(block.contiguous(), scales[:, i], dtype) for i, block in enumerate(codes)
    ]
    return torch.cat(blocks, dim=1)
