"""What operators allocate and free inside, where no dispatch shows it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peftfast.memory import attention
from peftfast.memory.profiles import DeviceProfile


def hidden_bytes(
    profile: DeviceProfile, threads: int, func: Any, args: tuple, kwargs: dict, outputs: Any
) -> int:
    """Bytes that one call takes for its own duration on a device.

    Known are the attention kernels, and on a CPU the copies that an operator of mixed dtypes makes
    of its narrower operands.
    """
    if _is_attention(func):
        return attention.inside(func, args, outputs, threads)
    if profile.kind == "cpu" and _is_pointwise(func):
        return _converted(args, outputs)
    return 0


@functools.cache
def _is_attention(func: Any) -> bool:
    return "_scaled_dot_product" in func._schema.name


@functools.cache
def _is_pointwise(func: Any) -> bool:
    names = ("aten::copy_", "aten::_to_copy", "aten::where", "aten::masked_fill")
    return torch.Tag.pointwise in func.tags and not func._schema.name.startswith(names)


def _converted(args: tuple, outputs: Any) -> int:
    operands = [a for a in args if isinstance(a, Tensor)]
    if len({a.dtype for a in operands}) < 2:
        return 0
    wide = [a.dtype for a in operands if a.dim()]
    if not wide:
        return 0
    common = functools.reduce(torch.promote_types, wide)
    total = sum(a.numel() * common.itemsize for a in operands if a.dim() and a.dtype != common)
    if isinstance(outputs, Tensor) and outputs.dtype not in (common, torch.bool):
        total += outputs.numel() * common.itemsize
    return total
