"""Dropout in C++ on a CPU, bit for bit that of `peftfast.reference.dropout`, which defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfast.native import library
from peftfast.reference.dropout import threshold

_HALF = 1 << 15


def keep_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """The dropout mask of a [rows, cols] matrix: bool, true where the element is kept.

    Args:
        seed: int64, one element, on the CPU.
        p: drop probability in [0, 1].
    """
    keep = torch.empty(rows, cols, dtype=torch.bool, device="cpu")
    status = library.cpu().pf_cpu_dropout_mask(
        seed.data_ptr(),
        threshold(p) - _HALF,
        rows,
        cols,
        keep.data_ptr(),
        torch.get_num_threads(),
    )
    library.check(status)
    return keep


def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x [M, K] with the dropped elements set to zero, not scaled; a new, contiguous tensor.

    Args:
        x: any dtype of 2, 4 or 8 bytes, any strides, on the CPU.
        seed, p: as in `keep_mask`.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, cols = x.shape
    out = torch.empty(rows, cols, dtype=x.dtype, device="cpu")
    status = library.cpu().pf_cpu_dropout_apply(
        seed.data_ptr(),
        threshold(p) - _HALF,
        rows,
        cols,
        x.element_size(),
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        cols,
        torch.get_num_threads(),
    )
    library.check(status)
    return out
