"""What the device at hand can do at best, and how far from that a time is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.timing import interleaved

_MIB = 1 << 20


@dataclass(frozen=True)
class Ceilings:
    """Rates of a large copy (bytes read plus written) and of a large product of random numbers."""

    bytes_per_second: float
    flops_per_second: float
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Floor:
    """The least time of a piece of work: its FLOPs or its bytes at the ceilings, the larger."""

    flops: int
    bytes: int
    seconds: float
    bound: str

    @classmethod
    def of(cls, flops: int, nbytes: int, ceilings: Ceilings) -> Floor:
        """The floor of `flops` and of `nbytes` moved through memory."""
        compute = flops / ceilings.flops_per_second
        memory = nbytes / ceilings.bytes_per_second
        bound = "compute" if compute >= memory else "memory"
        return cls(flops, nbytes, max(compute, memory), bound)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures both: a copy of buffers larger than the caches, and a square product in `dtype`."""
    on_gpu = device.type == "cuda"
    size, copied = (8192, 2048 * _MIB) if on_gpu else (2048, 512 * _MIB)
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    times = interleaved(
        {
            "copy": lambda _: target.copy_(source),
            "product": lambda _: torch.mm(a, b, out=product),
        },
        device,
        warmup=3,
        samples=10 if on_gpu else 5,
    )
    return Ceilings(
        bytes_per_second=2 * copied / times["copy"].best,
        flops_per_second=2 * size**3 / times["product"].best,
        dtype=str(dtype).removeprefix("torch."),
    )


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before memory: a GPU's L2; 64 MiB is taken for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 64 * _MIB
