"""Which kernel serves attention on a device, and what it allocates inside.

The choice is torch's (sdp_utils.cpp: flash attention without a mask, memory-efficient attention
with one; on a CPU flash attention for both). What the kernels allocate inside was read in torch's
sources; on a GPU it is not measured.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peftfast.memory.profiles import DeviceProfile

_SHORT = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten


def attention(
    profile: DeviceProfile,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by the kernel that `profile`'s device would use."""
    if attn_mask is not None and attn_mask.requires_grad:
        kernel = "math"
    elif profile.kind == "cpu":
        kernel = "flash" if dropout_p == 0 and query.ndim == 4 else "math"
    else:
        kernel = _gpu_kernel(query, value, attn_mask, enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool and kernel != "math":
        zero = torch.zeros((), dtype=query.dtype, device="meta")
        attn_mask = torch.where(attn_mask, zero, -math.inf)
    if kernel == "flash" and profile.kind == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if kernel == "flash":
        width = query.shape[-1]
        scale = 1 / math.sqrt(width) if scale is None else scale
        q, k, v = (_padded(x, 8) for x in (query, key, value))
        found = _aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )
        return found[0][..., :width]
    if kernel == "efficient":
        bias = None if attn_mask is None else _aligned_bias(attn_mask, query, key)
        return _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]
    return _aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None,
        scale=scale, enable_gqa=enable_gqa,
    )[0]  # fmt: skip


def _gpu_kernel(query: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> str:
    short, width = query.dtype in _SHORT, query.shape[-1]
    if query.ndim != 4:
        return "math"
    if mask is None and short and width == value.shape[-1] <= 256:
        return "flash"
    if enable_gqa or not (short or query.dtype == torch.float32):
        return "math"
    return "efficient"


def _padded(x: Tensor, multiple: int) -> Tensor:
    """The last dimension filled up to a multiple, as torch does before the kernel."""
    missing = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _aligned_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the memory-efficient kernel takes it: rows of a multiple of 16 elements."""
    bias = mask
    if mask.shape[-1] % 16:
        bias = _padded(mask, 16)[..., : mask.shape[-1]]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def inside(func: Any, args: tuple, outputs: Any, threads: int) -> int:
    """Bytes that an attention kernel allocates and frees inside."""
    packet = func.overloadpacket
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        return _cpu_forward(args[0], args[1], threads)
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return _cpu_backward(args[1], args[2], threads)
    if packet is _aten._scaled_dot_product_flash_attention_backward:
        return _flash_backward(args[1], args[2])
    if packet is _aten._scaled_dot_product_efficient_attention_backward:
        return _efficient_backward(args[1], args[2])
    return 0


def _cpu_forward(query: Tensor, key: Tensor, threads: int) -> int:
    rows, columns, width = query.shape[2], key.shape[2], query.shape[3]
    q_split = min(256 if rows >= 768 else 64 if rows >= 192 else 32, rows)
    kv_split = min(512, columns)
    wide = 8 if query.dtype == torch.float64 else 4
    bytes_ = wide * (q_split * kv_split + 2 * q_split + q_split * width)
    if query.dtype in _SHORT:
        bytes_ += 2 * q_split * kv_split
    return threads * bytes_


def _cpu_backward(query: Tensor, key: Tensor, threads: int) -> int:
    rows, columns = query.shape[2], key.shape[2]
    q_split = min(256 if rows >= 768 else 64 if rows >= 192 else 32, rows)
    kv_split = min(512, columns)
    wide = 8 if query.dtype == torch.float64 else 4
    bytes_ = 2 * wide * q_split * kv_split
    if query.dtype in _SHORT:
        bytes_ += 2 * 2 * q_split * kv_split
    return threads * bytes_


def _flash_backward(query: Tensor, key: Tensor) -> int:
    """A float32 sum of dq and the rows' dot products, both over rows in blocks of 128; dk and dv of
    every head where groups of heads share them.
    """
    batch, heads, rows, width = query.shape
    rows += -rows % 128
    padded = width + -width % 32
    total = 4 * batch * heads * rows * (padded + 1)
    if key.shape[1] != heads:
        total += 2 * batch * heads * key.shape[2] * width * query.element_size()
    return total


def _efficient_backward(query: Tensor, key: Tensor) -> int:
    """The rows' dot products, and float32 sums of dq where the head is wide."""
    batch, heads, rows, width = query.shape
    total = 4 * batch * heads * rows
    if width > 64:
        total += 4 * batch * heads * (rows + 2 * key.shape[2]) * (width + -width % 32)
    return total
