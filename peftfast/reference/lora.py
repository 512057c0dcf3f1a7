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
base's dtype. A base may compute in a dtype C of its own, as 4-bit layers do (QLoRA, equation 5):
x and dy are rounded to C for its product, and read as they are for the adapters'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.reference.dropout import Drop, drop, keep_mask, keep_scale
from peftfast.reference.linear import base_gradient, base_linears


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
    *,
    compute_dtypes: Sequence[torch.dtype | None] | None = None,
    base_ys: Sequence[Tensor] | None = None,
    gemm_dtype: torch.dtype | None = None,
    drop: Drop = drop,
) -> tuple[list[Tensor], Tensor]:
    """Outputs y_j [M, N_j] and the scaled bottlenecks t [M, sum r_i], adapters side by side; x is
    [M, K].

    Args:
        weights: may be lazy, as `peftfast.reference.linear` says.
        compute_dtypes: dtype of linear j's own product, to which x and b are rounded; None: x's.
        base_ys: x W_j^T + b_j, [M, N_j] in x's dtype, where that is computed already: weights are
            not read then, and the adapters' part may be added in place.
        gemm_dtype: a wider dtype for products of narrower operands, which are exact in it.
        drop: the masked copy of x, as `peftfast.reference.dropout.drop`.
    """
    wide = _wider(bottleneck_dtype(lora_a), gemm_dtype)
    shared_x = x.to(wide)
    columns = []
    for i, a in enumerate(lora_a):
        inputs = shared_x
        if dropout_p[i] > 0:
            assert seed is not None
            inputs = drop(shared_x, seed[i], dropout_p[i])
        columns.append(_scaled_mm(inputs, a.to(wide).t(), scaling[i] * keep_scale(dropout_p[i])))
    t = (columns[0] if len(columns) == 1 else torch.cat(columns, 1)).to(bottleneck_dtype(lora_a))
    columns = list(t.split([a.shape[0] for a in lora_a], dim=1)) if len(columns) > 1 else [t]
    if base_ys is None:
        ys = base_linears(x, weights, biases, compute_dtypes)
    else:
        ys = [y.to(_wider(y.dtype, gemm_dtype)) for y in base_ys]
    for owner, column, b in zip(owners, columns, lora_b, strict=True):
        y = ys[owner]
        y.addmm_(column.to(y.dtype), b.to(y.dtype).t())
    return [y.to(x.dtype) for y in ys], t


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
    *,
    compute_dtypes: Sequence[torch.dtype | None] | None = None,
    gemm_dtype: torch.dtype | None = None,
    drop: Drop = drop,
) -> list[Tensor]:
    """The gradients asked for, in the order x, weights, biases, lora_a, lora_b; dys are [M, N_j],
    None for zero. The other arguments are the forward's.
    """
    ranks = [a.shape[0] for a in lora_a]
    wide = _wider(t.dtype, gemm_dtype)
    dx = base_gradient(dys, x.dtype, weights, compute_dtypes) if need_x else None
    if need_x and dx is None:
        dx = torch.zeros_like(x)
    wide_x = x.to(wide) if any(need_a) else None
    wide_dys = {j: dy.to(wide) for j in set(owners) if (dy := dys[j]) is not None}
    grads_a: dict[int, Tensor] = {}
    grads_b: dict[int, Tensor] = {}
    for i, column in enumerate(t.split(ranks, dim=1)):
        dy, a, b, p = wide_dys.get(owners[i]), lora_a[i], lora_b[i], dropout_p[i]
        if dy is None:
            grads_a[i], grads_b[i] = torch.zeros_like(a), torch.zeros_like(b)
            continue
        if need_b[i]:
            grads_b[i] = torch.mm(dy.t(), column.to(wide)).to(b.dtype)
        if not (need_a[i] or need_x):
            continue
        assert p == 0 or seed is not None
        g = _scaled_mm(dy, b.to(wide), scaling[i] * keep_scale(p))
        if need_a[i]:
            assert wide_x is not None
            inputs = drop(wide_x, seed[i], p) if p > 0 and seed is not None else wide_x
            grads_a[i] = torch.mm(g.t(), inputs).to(a.dtype)
        if dx is None:
            continue
        if p > 0 and seed is not None:
            dx.add_(drop(torch.mm(g.to(dx.dtype), a.to(dx.dtype)), seed[i], p))
        else:
            dx.addmm_(g.to(dx.dtype), a.to(dx.dtype))
    grads = [dx.to(x.dtype)] if dx is not None else []
    for j, dy in enumerate(dys):
        if need_weights[j]:
            grads.append(torch.zeros_like(weights[j]) if dy is None else torch.mm(dy.t(), x))
    for j, dy in enumerate(dys):
        if need_biases[j]:
            grads.append(x.new_zeros(weights[j].shape[0]) if dy is None else dy.sum(0))
    grads.extend(grads_a[i] for i in range(len(ranks)) if need_a[i])
    grads.extend(grads_b[i] for i in range(len(ranks)) if need_b[i])
    return grads


def bottleneck_dtype(lora_a: Sequence[Tensor]) -> torch.dtype:
    """The dtype of t and g: the widest of the adapters'."""
    dtype = lora_a[0].dtype
    for a in lora_a[1:]:
        dtype = torch.promote_types(dtype, a.dtype)
    return dtype


def _wider(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    return dtype if other is None else torch.promote_types(dtype, other)


def _scaled_mm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right, rounded once."""
    return torch.addmm(left.new_zeros(()), left, right, beta=0.0, alpha=scale)
