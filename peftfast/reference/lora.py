"""Linear layers with low-rank adapters (LoRA) in plain PyTorch.

For sibling linears j that read one x [M, K], and adapters i, each owned by one linear:

    y_j = x W_j^T + b_j + sum over i owned by j of t_i B_i^T
    t_i = scaling_i / keep_i * (mask_i * x) A_i^T              (the scaled bottleneck, saved)

and, with g_i = scaling_i / keep_i * dy_j B_i,

    dB_i = dy_j^T t_i        dA_i = g_i^T (mask_i * x)
    dx   = sum_j dy_j W_j + sum_i mask_i * (g_i A_i)
    dW_j = dy_j^T x          db_j = sum over rows of dy_j

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), section 4.1; dropout
on the adapter's input as in its released code. Adapters may be float32 over a 16-bit base: A, B,
t and g keep their precision, and only the product that joins the base's GEMM is rounded to the
base's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.reference.dropout import keep_mask, keep_scale


def lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    owners: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
) -> list[Tensor]:
    """The formula itself, differentiable by autograd, one op per symbol: what everything else is
    tested against.

    Args:
        x: [..., K]; weights: J of [N_j, K]; biases: J of [N_j] or None. lora_a: I of [r_i, K];
        lora_b: I of [N_owner, r_i]; owners: for each adapter the index of its linear.
        seed: int64 [I], or None where every dropout_p is 0.
    """
    ys = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        dropped = x
        if dropout_p[i] > 0:
            assert seed is not None
            rows = x.numel() // x.shape[-1]
            mask = keep_mask(seed[i], rows, x.shape[-1], dropout_p[i]).view(x.shape)
            dropped = torch.where(mask, x, 0) * keep_scale(dropout_p[i])
        delta = F.linear(F.linear(dropped.to(a.dtype), a), b) * scaling[i]
        ys[owners[i]] = ys[owners[i]] + delta.to(x.dtype)
    return ys


def lora_linear_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    owners: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Outputs y_j [M, N_j] and the scaled bottlenecks t [M, sum r_i], adapters side by side; x is
    [M, K].
    """
    t = x.new_empty((x.shape[0], sum(a.shape[0] for a in lora_a)), dtype=bottleneck_dtype(lora_a))
    columns = t.split([a.shape[0] for a in lora_a], dim=1)
    shared_x = x.to(t.dtype)
    for i, (a, column) in enumerate(zip(lora_a, columns, strict=True)):
        inputs = shared_x
        if dropout_p[i] > 0:
            assert seed is not None
            mask = keep_mask(seed[i], x.shape[0], x.shape[1], dropout_p[i])
            inputs = torch.where(mask, shared_x, 0.0)
        _scaled_mm(inputs, a.to(t.dtype).t(), scaling[i] * keep_scale(dropout_p[i]), column)
    ys = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    for owner, column, b in zip(owners, columns, lora_b, strict=True):
        ys[owner].addmm_(column.to(x.dtype), b.to(x.dtype).t())
    return ys, t


def lora_linear_backward(
    dys: Sequence[Tensor | None],
    t: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    owners: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
    need_a: Sequence[bool],
    need_b: Sequence[bool],
) -> list[Tensor]:
    """The gradients asked for, in the order x, weights, biases, lora_a, lora_b; dys are [M, N_j],
    None for zero.
    """
    ranks = [a.shape[0] for a in lora_a]
    dx = _frozen_dx(dys, x, weights) if need_x else None
    grads_a: dict[int, Tensor] = {}
    grads_b: dict[int, Tensor] = {}
    for i, column in enumerate(t.split(ranks, dim=1)):
        dy, a, b = dys[owners[i]], lora_a[i], lora_b[i]
        if dy is None:
            grads_a[i], grads_b[i] = torch.zeros_like(a), torch.zeros_like(b)
            continue
        wide_dy = dy.to(t.dtype)
        if need_b[i]:
            grads_b[i] = torch.mm(wide_dy.t(), column).to(b.dtype)
        if not (need_a[i] or need_x):
            continue
        g = _scaled_mm(wide_dy, b.to(t.dtype), scaling[i] * keep_scale(dropout_p[i]))
        mask = None
        if dropout_p[i] > 0:
            assert seed is not None
            mask = keep_mask(seed[i], x.shape[0], x.shape[1], dropout_p[i])
        if need_a[i]:
            inputs = x.to(t.dtype) if mask is None else torch.where(mask, x.to(t.dtype), 0.0)
            grads_a[i] = torch.mm(g.t(), inputs).to(a.dtype)
        if dx is None:
            continue
        if mask is None:
            dx.addmm_(g.to(dx.dtype), a.to(dx.dtype))
        else:
            dx.add_(torch.mm(g.to(dx.dtype), a.to(dx.dtype)).mul_(mask))
    grads = [dx] if dx is not None else []
    for j, (dy, w) in enumerate(zip(dys, weights, strict=True)):
        if need_weights[j]:
            grads.append(torch.zeros_like(w) if dy is None else torch.mm(dy.t(), x))
    for j, (dy, w) in enumerate(zip(dys, weights, strict=True)):
        if need_biases[j]:
            grads.append(w.new_zeros(w.shape[0]) if dy is None else dy.sum(0))
    grads.extend(grads_a[i] for i in range(len(ranks)) if need_a[i])
    grads.extend(grads_b[i] for i in range(len(ranks)) if need_b[i])
    return grads


def bottleneck_dtype(lora_a: Sequence[Tensor]) -> torch.dtype:
    """The dtype of t and g: the widest of the adapters'."""
    dtype = lora_a[0].dtype
    for a in lora_a[1:]:
        dtype = torch.promote_types(dtype, a.dtype)
    return dtype


def _scaled_mm(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * left right, rounded once."""
    nothing = left.new_zeros(())
    return torch.addmm(nothing, left, right, beta=0.0, alpha=scale, out=out)


def _frozen_dx(dys: Sequence[Tensor | None], x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """sum_j dy_j W_j, [M, K]."""
    dx: Tensor | None = None
    for dy, w in zip(dys, weights, strict=True):
        if dy is None:
            continue
        dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
    return torch.zeros_like(x) if dx is None else dx
