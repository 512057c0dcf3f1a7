"""Frozen linears over weights that may be lazy, and their gradient of x, in plain PyTorch.

Lazy weights are a sequence whose element j is dense only when it is read: `weights[j]` is valid
until the next is read. One that also has `blocks(j)` gives weight j as blocks of its rows, one
after the other, (first row, number of rows in all, dense block): each is used up while it is in
the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Dtypes = Sequence[torch.dtype | None] | None


def base_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], compute_dtypes: Dtypes
) -> list[Tensor]:
    """x W_j^T + b_j, [M, N_j], in the widest of x's dtype and the weight's.

    Args:
        x: [M, K]; it and the biases are rounded to linear j's compute dtype first (None: x's).
        weights: [N_j, K] each, of that dtype or a wider one.
    """
    ys = []
    for j, bias in enumerate(biases):
        compute = compute_dtype(x.dtype, compute_dtypes, j)
        inputs, b, y = x, bias, x.new_empty(0)
        for start, rows, w in _blocks(weights, j):
            if start == 0:
                inputs = x.to(compute).to(w.dtype)
                b = None if bias is None else bias.to(compute).to(w.dtype)
                if rows > w.shape[0]:
                    y = x.new_empty((x.shape[0], rows), dtype=w.dtype)
            part = slice(start, start + w.shape[0])
            if rows == w.shape[0]:
                y = F.linear(inputs, w, b)
            elif b is None:
                torch.mm(inputs, w.t(), out=y[:, part])
            else:
                torch.addmm(b[part], inputs, w.t(), out=y[:, part])
        ys.append(y.to(torch.promote_types(y.dtype, x.dtype)))
    return ys


def base_gradient(
    dys: Sequence[Tensor | None],
    dtype: torch.dtype,
    weights: Sequence[Tensor],
    compute_dtypes: Dtypes,
) -> Tensor | None:
    """sum_j dy_j W_j, [M, K], in the widest of x's `dtype` and the weights'; a dy that is None is
    zero, and so is the sum where all are.
    """
    dx: Tensor | None = None
    for j, dy in enumerate(dys):
        if dy is None:
            continue
        rounded = dy.to(compute_dtype(dtype, compute_dtypes, j))
        for start, rows, w in _blocks(weights, j):
            rounded = rounded.to(w.dtype)
            of_block = slice(start, start + w.shape[0])
            part = rounded if rows == w.shape[0] else rounded[:, of_block]
            if dx is None:
                dx = torch.mm(part, w)
                dx = dx.to(torch.promote_types(dx.dtype, dtype))
            elif dx.dtype == w.dtype:
                dx.addmm_(part, w)
            else:
                dx = dx + torch.mm(part, w)
    return dx


def compute_dtype(dtype: torch.dtype, compute_dtypes: Dtypes, j: int) -> torch.dtype:
    """The dtype of linear j's product, for x of `dtype`."""
    return (compute_dtypes[j] if compute_dtypes is not None else None) or dtype


def _blocks(weights: Any, j: int) -> Iterator[tuple[int, int, Tensor]]:
    if hasattr(weights, "blocks"):
        yield from weights.blocks(j)
    else:
        w = weights[j]
        yield 0, w.shape[0], w
