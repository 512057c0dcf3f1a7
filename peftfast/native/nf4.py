"""4-bit weights in C++ and CUDA; `peftfast.reference.nf4` defines them, bit for bit."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from peftfast.native import library
from peftfast.native.library import DTYPES, QUANT_TYPES

_NESTED_BLOCK = 256
_GEMV_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Measured against dequantising into a warm buffer and float32's GEMM: for weights whose dense form
# stays in a core's cache, and for those of _LARGE elements and more.
_CPU_ROWS = {"portable": (1, 4), "avx2": (4, 8), "avx512": (4, 20)}
_LARGE = 1 << 20
# The rows of x for which the CUDA kernel decodes W once.
_CUDA_ROWS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 4}


def quantize_blocks(w: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Indices and scales of a contiguous tensor on the CPU.

    Args:
        w: bfloat16, float16 or float32.

    Returns:
        packed: uint8 [ceil(n / 2)]; absmax: float32 [ceil(n / block_size)].
    """
    n = w.numel()
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device="cpu")
    status = library.cpu().pf_cpu_nf4_quantize(
        w.data_ptr(),
        DTYPES[w.dtype],
        n,
        block_size,
        QUANT_TYPES[quant_type],
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    library.check(status)
    return packed, absmax


def quantize_absmax(values: Tensor, nested_code: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes and scales of statistics, float32 [blocks] on the CPU, from which the offset is
    taken off.

    Returns:
        codes: uint8 [blocks]; nested_absmax: float32 [ceil(blocks / 256)].
    """
    blocks = values.numel()
    codes = torch.empty(blocks, dtype=torch.uint8, device="cpu")
    nested_absmax = torch.empty(-(-blocks // _NESTED_BLOCK), dtype=torch.float32, device="cpu")
    status = library.cpu().pf_cpu_nf4_quantize_absmax(
        values.data_ptr(),
        nested_code.data_ptr(),
        blocks,
        codes.data_ptr(),
        nested_absmax.data_ptr(),
        torch.get_num_threads(),
    )
    library.check(status)
    return codes, nested_absmax


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
    if library.is_dry():
        return
    if not out.is_cuda:
        threads = torch.get_num_threads()
        library.check(library.cpu().pf_cpu_nf4_dequantize(*arguments, threads))
        return
    with _on(out.device):
        stream = torch.cuda.current_stream().cuda_stream
        library.check_cuda(library.cuda().pf_cuda_nf4_dequantize(*arguments, stream))


def gemv(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    quant_type: str,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Fill out [M, N] with x [M, K] W^T + bias, summed in float32 and rounded once; the weight is
    rounded to x's dtype first. The result does not depend on the number of threads.
    """
    arguments = (
        x.data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
        None if nested_absmax is None else nested_absmax.data_ptr(),
        None if nested_code is None else nested_code.data_ptr(),
        None if offset is None else offset.data_ptr(),
        *out.shape,
        x.shape[1],
        block_size,
        QUANT_TYPES[quant_type],
        DTYPES[x.dtype],
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    if library.is_dry():
        return
    if not out.is_cuda:
        library.check(library.cpu().pf_cpu_nf4_gemv(*arguments, torch.get_num_threads()))
        return
    with _on(out.device):
        stream = torch.cuda.current_stream().cuda_stream
        library.check_cuda(library.cuda().pf_cuda_nf4_gemv(*arguments, stream))


def few_rows(device: torch.device, dtype: torch.dtype, in_features: int, out_features: int) -> int:
    """The most rows at which `gemv` beats dequantising and a GEMM; 0: never."""
    if dtype not in _GEMV_DTYPES:
        return 0
    if device.type == "cuda":
        return _CUDA_ROWS[dtype]
    small, large = _CPU_ROWS[library.isa()]
    return large if in_features * out_features >= _LARGE else small


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Make a CUDA device current; costs next to nothing where it is."""
    if device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
