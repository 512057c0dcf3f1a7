"""What a launch needs to know of the device, asked at the first call and never at import."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ASSUMED_ARCH = 80  # the interpreter has no device: it runs the tiles of sm_80
ASSUMED_SM_COUNT = 132


_pretended: list[tuple[int, int]] = []


@functools.cache
def _cuda_properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def arch(device: torch.device) -> int:
    """The compute capability as a number, 80 for sm_80."""
    return _properties(device)[0]


def sm_count(device: torch.device) -> int:
    """The number of streaming multiprocessors."""
    return _properties(device)[1]


def on_gpu(device: torch.device) -> bool:
    """Whether launches run on a GPU (or are recorded for one) rather than in the interpreter."""
    return device.type == "cuda" or bool(_pretended)


@contextlib.contextmanager
def pretend(arch: int, sm_count: int) -> Iterator[None]:
    """Answer as a GPU of that architecture and size would."""
    _pretended.append((arch, sm_count))
    try:
        yield
    finally:
        _pretended.pop()


def current(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one: Triton launches there, on its current stream."""
    on_device = tensor.is_cuda and not _pretended
    return torch.cuda.device_of(tensor) if on_device else contextlib.nullcontext()


def matmul_precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input_precision for one dtype: full, unless torch allows float32 to be TF32."""
    return "tf32" if dtype == torch.float32 and _tf32_allowed() else "ieee"


def adapter_precision(activations: torch.dtype, compute: torch.dtype) -> str:
    """The same for a skinny product: "tf32x2" (see `dots`) where only the adapters are float32."""
    mixed = compute == torch.float32 and activations != torch.float32
    return "tf32x2" if mixed else matmul_precision(compute)


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", "none")  # the newer of torch's two switches
    if precision != "none":
        return precision == "tf32"
    return matmul.allow_tf32


def _properties(device: torch.device) -> tuple[int, int]:
    if _pretended:
        return _pretended[-1]
    if device.type != "cuda":
        return ASSUMED_ARCH, ASSUMED_SM_COUNT
    return _cuda_properties(_index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
