"""Adapters as the kernels take them: lanes, slices of at most 128 rank columns of one adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from peftfast_kernels.device import adapter_precision
from peftfast_kernels.philox import KEEP_ALL, keep_scale, limit
from peftfast_kernels.tiles import lanes_per_launch, rank_block


@dataclass(frozen=True, eq=False)
class Lane:
    """Rank columns `row` to `row + rank` of adapter `index`, which belongs to linear `owner`."""

    a: Tensor  # [rank, K]
    b: Tensor  # [N, rank]
    index: int
    owner: int
    row: int
    scale: float
    limit: int

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def drops(self) -> bool:
        return self.limit != KEEP_ALL


def lanes_of(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    owners: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    widest: int,
) -> list[Lane]:
    """One lane an adapter, or several where its rank is above `widest`; in the adapters' order."""
    lanes = []
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        for row in range(0, a.shape[0], widest):
            rows = slice(row, min(row + widest, a.shape[0]))
            scale = scaling[i] * keep_scale(dropout_p[i])
            lanes.append(Lane(a[rows], b[:, rows], i, owners[i], row, scale, limit(dropout_p[i])))
    return lanes


def launches(lanes: Sequence[Lane]) -> Iterator[tuple[int, int, Sequence[Lane]]]:
    """The portions that one launch can hold: rank block, number of the first lane, lanes."""
    block = rank_block([lane.rank for lane in lanes])
    step = lanes_per_launch(block)
    for start in range(0, len(lanes), step):
        yield block, start, lanes[start : start + step]


def rank_views(bottleneck: Tensor, lanes: Sequence[Lane]) -> list[Tensor]:
    """Each lane's columns of a bottleneck [..., sum of ranks], side by side in their order."""
    return list(bottleneck.split([lane.rank for lane in lanes], dim=-1))


def with_dropout(lanes: Sequence[Lane], seed: Tensor | None) -> Sequence[Lane]:
    """All the lanes of a launch where any of them drops, none of them otherwise."""
    return lanes if seed is not None and any(lane.drops for lane in lanes) else ()


def strides(tensors: Sequence[Tensor], dim: int) -> tuple[int, ...]:
    return tuple(tensor.stride(dim) for tensor in tensors)


def triton_dtype(dtype: torch.dtype) -> Any:
    """The Triton type of a floating dtype."""
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[
        dtype
    ]


def skinny_mma(activations: torch.dtype, compute: torch.dtype) -> str:
    """The tensor-core instructions a skinny product must hold: none for full float32."""
    full = compute == torch.float32 and adapter_precision(activations, compute) == "ieee"
    return "none" if full else "any"
