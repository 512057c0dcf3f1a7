"""The kernel modules whose variants are compiled ahead of time."""

from __future__ import annotations

KERNEL_MODULES: tuple[str, ...] = (
    "peftfast_kernels.lora",
    "peftfast_kernels.nf4",
    "peftfast_kernels.norm",
    "peftfast_kernels.activation",
    "peftfast_kernels.bottleneck",
    "peftfast_kernels.prefix_attention",
)
