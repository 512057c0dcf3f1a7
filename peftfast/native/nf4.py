"""4-bit weights in C++ and CUDA, bit for bit those of `peftfast.reference.nf4`, which defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfast.native import library
from peftfast.native.library import DTYPES, QUANT_TYPES


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Fill out, contiguous, with the values rounded to `dtype`; out's dtype is that or float32."""
    arguments = (
        packed.data_ptr(),
        absmax.data_ptr(),
        None if nested_absmax is None else nested_absmax.data_ptr(),
        None if nested_code is None else nested_code.data_ptr(),
        None if offset is None else offset.data_ptr(),
        out.numel(),
        block_size,
        QUANT_TYPES[quant_type],
        DTYPES[dtype],
        DTYPES[out.dtype],
        out.data_ptr(),
    )
    status = library.cpu().pf_cpu_nf4_dequantize(*arguments, torch.get_num_threads())
    library.check(status)
