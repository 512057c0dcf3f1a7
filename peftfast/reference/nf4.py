"""Weights in 4 bits with a scale a block (NF4, FP4) in plain PyTorch.

The n elements of a tensor, in row-major order, are cut into blocks; an element is the index of an
entry of a table of 16 values in [-1, 1], a block its largest magnitude absmax:

    value_e = table[index_e] * absmax[e // block_size]

Two indices share a byte, the earlier one in the high half. Nested statistics (double quantisation)
keep absmax itself in 8 bits, in blocks of 256 around its mean:

    absmax_b = nested_code[code_b] * nested_absmax[b // 256] + offset

every operation rounded to float32 by itself. Dettmers et al., "QLoRA: Efficient Finetuning of
Quantized LLMs" (NeurIPS 2023), section 3; the 8-bit code is that of Dettmers et al., "8-bit
Optimizers via Block-wise Quantization" (ICLR 2022), section 2.

Bits are those of bitsandbytes 0.50, whose CPU and GPU kernels quantise by slightly different rules:
on a CPU the last, incomplete block divides by absmax where the others multiply by its inverse, FP4
rounds at exact midpoints and the 8-bit code is looked up on a grid of 65,536 points; on a GPU all
blocks multiply, FP4 rounds at thresholds of seven digits and the 8-bit code is found by bisection.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
TABLES: dict[str, tuple[float, ...]] = {
    # Quantiles of N(0, 1), normalised to [-1, 1], with an exact zero (QLoRA, appendix E).
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # A sign, two bits of exponent, one of fraction; in the order of the bit patterns.
    "fp4": tuple(
        sign * v / 12 for sign in (1, -1) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}
_SMALLEST = 1e-38
# FP4's indices in the order of their values; the zeros (0 and 8) in torch.argsort's order.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
_FP4_GPU_BOUNDS = (
    0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333,
)  # fmt: skip
_FP4_GPU_ORDER = (0, 1, 6, 7, 4, 5, 2, 3)


def table(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of "nf4" or "fp4", float32."""
    return torch.tensor(TABLES[quant_type], dtype=torch.float32, device=device) + 0.0


def nested_code(device: torch.device) -> Tensor:
    """The 256 values of the signed dynamic 8-bit code, ascending, float32."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = (bounds[:-1] + bounds[1:]) / 2.0
        scale = 10 ** (i - 6)
        values += (scale * means).tolist() + (-scale * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize_blocks(
    w: Tensor, block_size: int, quant_type: str, *, gpu_rules: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Indices and scales of a contiguous tensor.

    Args:
        gpu_rules: whether to round as bitsandbytes' GPU kernels do; None: where w is on a GPU.

    Returns:
        packed: uint8 [ceil(n / 2)]; absmax: float32 [ceil(n / block_size)].
    """
    gpu = w.is_cuda if gpu_rules is None else gpu_rules
    flat = w.reshape(-1).float()
    full = flat.numel() - flat.numel() % block_size
    blocks, tail = flat[:full].view(-1, block_size), flat[full:].view(1, -1)
    absmax = blocks.abs().amax(1)
    scaled = blocks * _inverse(absmax, gpu)[:, None]
    parts, scales = [scaled.view(-1)], [absmax]
    if tail.numel():
        last = tail.abs().amax(1)
        if gpu:
            parts.append((tail * _inverse(last, gpu)[:, None]).view(-1))
        else:
            last = last.clamp(min=_SMALLEST)
            parts.append((tail / last[:, None]).view(-1))
        scales.append(last)
    if flat.numel() % 2:  # the last byte's other half: a zero of the last block
        parts.append(0.0 * _inverse(scales[-1][-1:], gpu))
    indices = _nearest(torch.cat(parts), quant_type, gpu)
    return (indices[::2] << 4) | indices[1::2], torch.cat(scales)


def quantize_absmax(
    values: Tensor, code: Tensor, *, gpu_rules: bool | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit codes and scales of statistics, float32 [blocks], from which the offset is taken off.

    Returns:
        codes: uint8 [blocks]; nested_absmax: float32 [ceil(blocks / 256)].
    """
    gpu = values.is_cuda if gpu_rules is None else gpu_rules
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks * torch.where(absmax > 0, 1 / absmax, 0.0)[:, None]
    if gpu:
        codes = _bisect(scaled, code)
    else:
        # (v + 1) / 2 * 65535 + 1 / 2 with one rounding, then cut: the nearest point of the grid
        halved = (scaled.clamp(-1, 1) + 1) * 0.5
        point = (halved.double() * 65535 + 0.5).float().to(torch.int32)
        on_grid = -1 + (2.0 * point.float()) / 65535
        codes = torch.bucketize(on_grid, 0.5 * (code[:-1] + code[1:])).to(torch.uint8)
    codes = torch.where(absmax[:, None] > 0, codes, torch.zeros_like(codes))
    return codes.view(-1)[:count], absmax


def scales(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """The blocks' absmax, float32 [blocks], from plain or nested statistics."""
    if nested_absmax is None:
        return absmax
    assert nested_code is not None and offset is not None
    of_blocks = nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
    return nested_code[absmax.to(torch.int32)] * of_blocks + offset


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
    """Fill out, contiguous, with the values rounded to `dtype`; out's dtype is that or wider."""
    n = out.numel()
    indices = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:n]
    values = table(quant_type, packed.device)[indices.to(torch.int32)]
    of_blocks = scales(absmax, nested_absmax, nested_code, offset)
    full = n - n % block_size
    values[:full].view(-1, block_size).mul_(of_blocks[: full // block_size, None])
    values[full:].mul_(of_blocks[full // block_size :])
    out.view(-1).copy_(values.to(dtype))


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
    """Fill out [M, N] with x [M, K] W^T + bias, summed in float32 (wider where x is) and rounded
    once.
    """
    w = x.new_empty(out.shape[1], x.shape[1])
    statistics = (absmax, nested_absmax, nested_code, offset)
    dequantize(packed, *statistics, block_size, quant_type, x.dtype, w)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ w.to(wide).t()
    out.copy_(y if bias is None else y + bias.to(wide))


def few_rows(device: torch.device, dtype: torch.dtype, in_features: int, out_features: int) -> int:
    """The most rows at which `gemv` beats dequantising and a GEMM: none, as it does the same."""
    return 0


def _inverse(absmax: Tensor, gpu: bool) -> Tensor:
    return 1.0 / (absmax if gpu else absmax.clamp(min=_SMALLEST))


def _nearest(scaled: Tensor, quant_type: str, gpu: bool) -> Tensor:
    """Indices of the nearest table entries of values in [-1, 1], the lower one at a tie.

    By a GPU's rules, a block of zeros is scaled to NaN, above which there is no index: 0.
    """
    if gpu:
        scaled = torch.where(scaled.isnan(), -2.0 if quant_type == "nf4" else 0.0, scaled)
    values = table(quant_type, scaled.device)
    if quant_type == "nf4":
        bounds = (values[:-1] + values[1:]) / 2
        return torch.bucketize(scaled, bounds).to(torch.uint8)
    if gpu:
        bounds = torch.tensor(_FP4_GPU_BOUNDS, device=scaled.device)
        order = torch.tensor(_FP4_GPU_ORDER, dtype=torch.uint8, device=scaled.device)
        magnitude = order[torch.bucketize(scaled.abs(), bounds)]
        return torch.where(scaled < 0, magnitude + 8, magnitude)
    order = torch.tensor(_FP4_ORDER, device=scaled.device)
    ascending = values[order]
    bounds = (ascending[:-1] + ascending[1:]) / 2
    return order[torch.bucketize(scaled, bounds)].to(torch.uint8)


def _bisect(scaled: Tensor, code: Tensor) -> Tensor:
    """The nearest entries of an ascending code of 256, as seven steps of bisection find them."""
    pivot = torch.full_like(scaled, 127, dtype=torch.int64)
    low, high = torch.zeros_like(pivot), torch.full_like(pivot, 255)
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = scaled > code[pivot]
        low, high = torch.where(above, pivot, low), torch.where(above, high, pivot)
        pivot = torch.where(above, pivot + step, pivot - step)
    value = code[pivot]
    above = scaled > value
    upper, lower = (code[high] + value) * 0.5, (code[low] + value) * 0.5
    up = torch.where(scaled > upper, high, pivot)
    down = torch.where(scaled < lower, low, pivot)
    return torch.where(above, up, down).to(torch.uint8)
