"""Initial adapters for weights in 4 bits: LoftQ and PiSSA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftfast.ops import Impl, nf4
from peftfast.ops.nf4 import NF4Weight

_OVERSAMPLING = 16


def loftq_init(
    weight: Tensor,
    rank: int,
    *,
    scaling: float,
    iterations: int = 1,
    block_size: int = 64,
    double_quant: bool = True,
    quant_type: str = "nf4",
    niter: int | None = None,
    impl: str | Impl = "auto",
) -> tuple[NF4Weight, Tensor, Tensor]:
    """Quantise a weight, and start an adapter at what that loses: W ~ dequantize(Q) + s B A.

    Alternates Q = quantize(W - s B A) with (B, A) = the best approximation of rank r of
    (W - dequantize(Q)) / s, beginning with B A = 0 (Li et al., "LoftQ", ICLR 2024, algorithm 1).

    Args:
        weight: W [out, in].
        rank: r, from 1 to min(out, in).
        scaling: s, what the adapter's product is multiplied by in the forward (alpha / r), not 0.
            B and A are divided by it, so that the sum above holds whatever alpha is.
        iterations: rounds of the alternation, at least 1.
        block_size, double_quant, quant_type, impl: as in `nf4.quantize`.
        niter: None for an exact singular value decomposition, else the number of subspace
            iterations of a randomised one (Halko et al., 2011), which is much faster.

    Returns:
        Q, and lora_a [r, in] and lora_b [out, r] in float32.
    """
    _check(weight, rank, scaling)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is needed")
    wide = weight.detach().float()
    low_rank = torch.zeros_like(wide)
    for _ in range(iterations):
        quantised = _quantize(
            wide - low_rank, weight.dtype, block_size, double_quant, quant_type, impl
        )
        left = wide - nf4.dequantize(quantised, torch.float32, impl=impl)
        lora_a, lora_b = _factors(left, rank, scaling, niter)
        low_rank = scaling * (lora_b @ lora_a)
    return quantised, lora_a, lora_b


def pissa_init(
    weight: Tensor,
    rank: int,
    *,
    scaling: float,
    block_size: int = 64,
    double_quant: bool = True,
    quant_type: str = "nf4",
    niter: int | None = None,
    impl: str | Impl = "auto",
) -> tuple[NF4Weight, Tensor, Tensor]:
    """Start an adapter at a weight's principal components, and quantise the rest:
    s B A = the best approximation of rank r of W, Q = quantize(W - s B A).

    Meng et al., "PiSSA" (NeurIPS 2024), equations 2 to 4, and QPiSSA of section 4; with its B and
    A divided by the scaling. Arguments and result as in `loftq_init`.
    """
    _check(weight, rank, scaling)
    wide = weight.detach().float()
    lora_a, lora_b = _factors(wide, rank, scaling, niter)
    rest = wide - scaling * (lora_b @ lora_a)
    quantised = _quantize(rest, weight.dtype, block_size, double_quant, quant_type, impl)
    return quantised, lora_a, lora_b


def _check(weight: Tensor, rank: int, scaling: float) -> None:
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight is {got}; a floating tensor [out, in] is needed")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank is {rank}; 1 to {min(weight.shape)} is needed for a weight {list(weight.shape)}"
        )
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling is {scaling}; a finite number other than 0 is needed")


def _quantize(
    wide: Tensor,
    dtype: torch.dtype,
    block_size: int,
    double_quant: bool,
    quant_type: str,
    impl: str | Impl,
) -> NF4Weight:
    settings = {"block_size": block_size, "double_quant": double_quant, "quant_type": quant_type}
    return nf4.quantize(wide.to(dtype), **settings, impl=impl)  # type: ignore[arg-type]


def _factors(matrix: Tensor, rank: int, scaling: float, niter: int | None) -> tuple[Tensor, Tensor]:
    """A and B with scaling * B A = the best approximation of that rank; each takes half of the
    singular values.
    """
    if niter is None:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], vt[:rank].t()
    else:
        q = min(rank + _OVERSAMPLING, min(matrix.shape))
        u, s, v = torch.svd_lowrank(matrix, q=q, niter=niter)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    root = (s / abs(scaling)).sqrt()
    lora_b = u * (root * math.copysign(1.0, scaling))
    return (v * root).t().contiguous(), lora_b.contiguous()
