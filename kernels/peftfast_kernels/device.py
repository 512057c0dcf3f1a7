"""What a launch needs to know of the device, asked at the first call and never at import."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

ASSUMED_ARCH = 80  # the interpreter has no device: it runs the tiles of sm_80
ASSUMED_SM_COUNT = 132


@functools.cache
def _cuda_properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def arch(device: torch.device) -> int:
    """The compute capability as a number, 80 for sm_80."""
    return _cuda_properties(_index(device))[0] if device.type == "cuda" else ASSUMED_ARCH


def sm_count(device: torch.device) -> int:
    """The number of streaming multiprocessors."""
    return _cuda_properties(_index(device))[1] if device.type == "cuda" else ASSUMED_SM_COUNT


def current(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one: Triton launches there, on its current stream."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def fp32_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32 operands.

    16-bit activations against float32 adapters: three TF32 products, whose error is float32's (16-bit values are
    exact in TF32). float32 activations: full precision, unless torch's own switch allows TF32.
    """
    if dtype != torch.float32:
        return "tf32x3"
    return "tf32" if _tf32_allowed() else "ieee"


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", "none")  # the newer of torch's two switches
    if precision != "none":
        return precision == "tf32"
    return matmul.allow_tf32


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
