"""Bottleneck adapters, down-projection, activation, up-projection, in plain PyTorch.

For x [M, d_in], Wd [m, d_in] and Wu [d_out, m]:

    n = norm(x)    z = n Wd^T + bd    h = drop(act(z))    y = residual + s g (h Wu^T + bu)

with a factor s, and a gate g of each row. With dq = dy Wu and the normalised row xhat,

    dWu = (s g dy)^T h      dbu = sum of s g dy      dz = s g mask / keep * dq * act'(z)
    dWd = dz^T n            dbd = sum of dz          dn = dz Wd
    e = dq . h + dy . bu    dg = s e                 ds = sum of g e
    G = dz^T xhat, [m, d_in]: dWd = G norm_weight + dbd (x) norm_bias
                              dnorm_weight = sum over m of Wd * G      dnorm_bias = dbd Wd
    dx = dnorm/dx (dn), plus dy where x is the residual

so that neither h, nor the delta, nor norm(x) has to be kept, and the gradients of a norm's
parameters and of a gate cost no product of their own.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (ICML 2019), section 2.1; He et al.,
"Towards a Unified View of Parameter-Efficient Transfer Learning" (ICLR 2022), table 1. The weights
may be float32 over a 16-bit x: n, z, h and the delta have their dtype, and y is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.reference import activation as _activation
from peftfast.reference.dropout import Drop, drop, dropout, keep_scale
from peftfast.reference.norm import rms_norm, statistics_dtype

ACTIVATIONS = ("identity", *_activation.KINDS)
NORMS = ("layer", "rms")
# The order of `needs` and of the gradients of `bottleneck_backward`.
GRADIENTS = (
    "x", "down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias", "scaling", "gate",
)  # fmt: skip


def bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    scaling: float | Tensor = 1.0,
    residual: bool | Tensor = True,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The formula itself, differentiable by autograd, one op per symbol: what everything else is
    tested against.

    Args:
        x: [..., d_in]; down: [m, d_in]; up: [d_out, m]; down_bias: [m]; up_bias: [d_out].
        activation: of `ACTIVATIONS`; norm: of `NORMS` or None.
        scaling: a number, or a tensor of one element.
        residual: True for x, False for none, or a tensor [..., d_out].
        norm_weight, norm_bias: [d_in] or None.
        gate: broadcastable to [..., 1].
        seed: int64 [1], None where dropout_p is 0.
    """
    n = x.to(down.dtype)
    if norm is not None:
        wide = x.to(statistics_dtype(x.dtype))
        weight, bias = _to(norm_weight, wide.dtype), _to(norm_bias, wide.dtype)
        if norm == "layer":
            n = F.layer_norm(wide, x.shape[-1:], weight, bias, norm_eps)
        else:
            n = rms_norm(wide, weight, norm_eps, "float")
            n = n if bias is None else n + bias
        n = n.to(down.dtype)
    h = _activated(F.linear(n, down, down_bias), activation)
    if dropout_p > 0:
        assert seed is not None
        h = dropout(h, seed, dropout_p)
    delta = F.linear(h, up, up_bias) * scaling
    if gate is not None:
        delta = delta * gate
    if residual is False:
        return delta.to(x.dtype)
    kept = x if residual is True else residual
    return (kept + delta).to(kept.dtype)


def bottleneck_forward(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str,
    scaling: float | Tensor,
    residual: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
    gemm_dtype: torch.dtype | None = None,
    drop: Drop = drop,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output y, and what the backward takes: z and the norm's statistics.

    Args:
        x: [M, d_in], any strides. down, down_bias, up, up_bias: of one dtype, that of z and h.
        scaling: a number, or a tensor of one element of any floating dtype.
        residual: [M, d_out], which may be x, or None.
        norm_weight, norm_bias: [d_in] of any floating dtype, or None.
        gate: [M] of any floating dtype, or None.
        seed: int64 [1]; None where dropout_p is 0.
        dtype: y's.
        keep: whether a backward may come.
        gemm_dtype: a wider dtype for products of narrower operands, which are exact in it.
        drop: the masked copy of a matrix, as `peftfast.reference.dropout.drop`.

    Returns:
        y: [M, d_out], contiguous.
        z: [M, m] in the weights' dtype; None where keep is False.
        statistics: of `statistics_dtype(x.dtype)`; for "layer" [2, M], each row's mean and
            1 / sqrt(variance + eps); for "rms" [1, M], 1 / sqrt(mean of squares + eps); None
            without a norm, and where keep is False.
    """
    wide = _wider(down.dtype, gemm_dtype)
    n, statistics = x, None
    if norm is not None:
        n, statistics = _normalised(x, norm, norm_weight, norm_bias, norm_eps)
    z = F.linear(n.to(wide), down.to(wide), _to(down_bias, wide)).to(down.dtype)
    h = _hidden(z, activation, dropout_p, seed, wide, drop)
    alpha, factor = _factors(scaling, gate, wide)
    h = h if factor is None else h * factor
    right = up.to(wide).t()
    start = _start(residual, _to(up_bias, wide), alpha, factor, wide)
    if start is None:
        y = _scaled_mm(h, right, alpha)
    elif start.dtype != wide:
        y = start + _scaled_mm(h, right, alpha)
    elif start is residual or start.ndim == 1:
        y = torch.addmm(start, h, right, alpha=alpha)
    else:
        y = start.addmm_(h, right, alpha=alpha)
    return y.to(dtype).contiguous(), z if keep else None, statistics if keep else None


def bottleneck_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    statistics: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str,
    scaling: float | Tensor,
    sequential: bool,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    gemm_dtype: torch.dtype | None = None,
    drop: Drop = drop,
) -> list[Tensor]:
    """The gradients asked for, in the order of `GRADIENTS`.

    Args:
        dy: [M, d_out], any strides, of y's dtype; z, statistics: as the forward gave them.
        x: [M, d_in]; only its shape and dtype are there where `reads_x` says so.
        sequential: whether x is the residual as well, so that dy is a part of its gradient. (The
            gradient of another residual is dy.)
        needs: which of `GRADIENTS` to compute. The other arguments are the forward's.

    Returns:
        x's [M, d_in] in x's dtype; parameters' in their own shape and dtype; scaling's [1] and
        gate's [M] in `statistics_dtype` of the weights' dtype.
    """
    want = dict(zip(GRADIENTS, needs, strict=True))
    wide = _wider(down.dtype, gemm_dtype)
    sums = statistics_dtype(wide)
    alpha, factor = _factors(scaling, gate, wide)
    per_row = want["scaling"] or want["gate"]
    inner = any(want[one] for one in ("x", "down", "down_bias", "norm_weight", "norm_bias"))
    wide_dy = dy.to(wide)
    grads: dict[str, Tensor] = {}
    h = dq = dy
    if per_row or want["up"]:
        h = _hidden(z, activation, dropout_p, seed, wide, drop)
    if per_row or inner:
        dq = torch.mm(wide_dy, up.to(wide))
    if per_row:
        e = (dq * h).sum(1, dtype=sums)
        if up_bias is not None:
            e = e + torch.mv(wide_dy, up_bias.to(wide))
        grads["gate"] = e * (scaling.to(sums) if isinstance(scaling, Tensor) else scaling)
        grads["scaling"] = (e if gate is None else e * gate.to(sums)).sum(0, keepdim=True)
    if want["up"]:
        left = _with_ones(h) if want["up_bias"] else h
        left = left if factor is None else left * factor
        dup = _scaled_mm(left.t(), wide_dy, alpha)  # transposed, as a CPU multiplies it faster
        whole = dup[: h.shape[1]].t().clone(memory_format=torch.contiguous_format)
        grads["up"] = whole.to(up.dtype)
        if want["up_bias"]:
            grads["up_bias"] = dup[-1].clone().to(up.dtype)
    elif want["up_bias"]:
        scaled = wide_dy if factor is None else wide_dy * factor
        grads["up_bias"] = (scaled.sum(0, dtype=sums) * alpha).to(up.dtype)
    if inner:
        dh = dq if factor is None and alpha == 1.0 else dq * (alpha if factor is None else factor)
        if dropout_p > 0:
            assert seed is not None
            dh = drop(dh, seed, dropout_p).mul_(keep_scale(dropout_p))
        dz = _activation_gradient(dh, z.to(wide), activation)
        dbd = dz.sum(0, dtype=sums)
        grads["down_bias"] = dbd.to(down.dtype)
        start = dy if sequential else None
        if statistics is not None:
            weights = down, down_bias, norm_weight, norm_bias
            grads |= _norm_gradients(dz, dbd, start, x, z, statistics, *weights, want)
        else:
            if want["down"]:
                grads["down"] = torch.mm(dz.t(), x.to(wide)).to(down.dtype)
            if want["x"]:
                grads["x"] = _sum(start, dz, down.to(wide)).to(x.dtype).contiguous()
    return [grads[one] for one in GRADIENTS if want[one]]


def reads_x(norm: str | None, needs: Sequence[bool]) -> bool:
    """Whether the backward reads x for the gradients asked for, `needs` as there."""
    want = dict(zip(GRADIENTS, needs, strict=True))
    return want["down"] or (norm is not None and (want["x"] or want["norm_weight"]))


def _normalised(
    x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """norm(x) and the statistics, in `statistics_dtype`."""
    wide = x.to(statistics_dtype(x.dtype))
    weight, bias = _to(weight, wide.dtype), _to(bias, wide.dtype)
    if norm == "layer":
        n, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], weight, bias, eps)
        return n, torch.stack([mean[:, 0], rstd[:, 0]])
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    n = wide * rstd
    if weight is not None:
        n.mul_(weight)
    if bias is not None:
        n.add_(bias)
    return n, rstd.view(1, -1)


def _norm_gradients(
    dz: Tensor,
    dbd: Tensor,
    dy: Tensor | None,
    x: Tensor,
    z: Tensor,
    statistics: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    want: dict[str, bool],
) -> dict[str, Tensor]:
    """What of the gradients of x (plus dy), down and the norm's parameters is asked for.

    With x' = x less each row's mean, r = 1 / sqrt(...), W = down * weight and p = xhat W^T, [M, m],

        G = (r dz)^T x'
        dx = r dz W + x' a - c      a = -r (r dz . p) / d      c = r dz . (W's row sums) / d

    so that the means of the norm's gradient take no pass over [M, d]. (RMSNorm takes no mean off,
    here and there.)
    """
    sums, d = statistics.dtype, x.shape[1]
    wide_down, weight_, bias_ = down.to(sums), _to(weight, sums), _to(bias, sums)
    grads: dict[str, Tensor] = {}
    if bias is not None and want["norm_bias"]:
        grads["norm_bias"] = torch.mv(wide_down.t(), dbd).to(bias.dtype)
    if not (want["x"] or want["down"] or want["norm_weight"]):
        return grads
    centred, rstd = statistics.shape[0] == 2, statistics[-1, :, None]
    values = x - statistics[0, :, None] if centred else x.to(sums)
    scaled = dz.to(sums) * rstd
    if want["down"] or want["norm_weight"]:
        product = torch.mm(scaled.t(), values)
        if weight is not None and want["norm_weight"]:
            grads["norm_weight"] = (product * wide_down).sum(0).to(weight.dtype)
        product = product if weight_ is None else product * weight_
        product = product if bias_ is None else torch.addcmul(product, dbd[:, None], bias_)
        grads["down"] = product.to(down.dtype)
    if want["x"]:
        folded = wide_down if weight_ is None else wide_down * weight_
        offset = z.new_zeros(z.shape[1]) if down_bias is None else down_bias
        offset = offset if bias_ is None else torch.mv(wide_down, bias_) + offset
        rows = torch.mm(scaled, torch.stack([offset.to(sums), folded.sum(1)], 1))  # [M, 2]
        along = ((scaled * z).sum(1, keepdim=True) - rows[:, :1]) * (rstd / -d)
        dx = values * along if dy is None else torch.addcmul(dy.to(sums), values, along)
        column = rows[:, 1:] / d
        if dz.dtype != sums:
            dx = dx.add_(torch.mm(scaled.to(dz.dtype), folded.to(dz.dtype)))
            dx = dx.sub_(column) if centred else dx
        elif centred:
            ones = folded.new_full((1, d), -1.0)
            dx = dx.addmm_(torch.cat([scaled, column], 1), torch.cat([folded, ones]))
        else:
            dx = dx.addmm_(scaled, folded)
        grads["x"] = dx.to(x.dtype).contiguous()
    return grads


def _hidden(
    z: Tensor, activation: str, p: float, seed: Tensor | None, dtype: torch.dtype, drop: Drop
) -> Tensor:
    """drop(act(z)); z itself where nothing is to be done."""
    h = _activated(z.to(dtype), activation)
    if p > 0:
        assert seed is not None
        h = drop(h, seed, p).mul_(keep_scale(p))
    return h


def _activated(z: Tensor, activation: str) -> Tensor:
    return z if activation == "identity" else _activation.activation(z, activation)


def _activation_gradient(dh: Tensor, z: Tensor, activation: str) -> Tensor:
    if activation == "identity":
        return dh
    return _activation.activation_backward(dh, z, activation)


def _factors(
    scaling: float | Tensor, gate: Tensor | None, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """s g as a number, or as a tensor that broadcasts over [M, 1]; the other is 1 or None."""
    if gate is None:
        return (1.0, scaling.to(dtype)) if isinstance(scaling, Tensor) else (scaling, None)
    factor = gate.to(statistics_dtype(dtype)) * scaling
    return 1.0, factor.to(dtype)[:, None]


def _start(
    residual: Tensor | None,
    bias: Tensor | None,
    alpha: float,
    factor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """residual + s g bias, to which the product is added: a new tensor where it isn't the residual
    itself; [d_out] where all rows are alike; None where there is nothing.
    """
    if residual is not None and torch.promote_types(residual.dtype, dtype) == dtype:
        residual = residual.to(dtype)
    if bias is None:
        return residual
    if residual is None:
        return bias * (alpha if factor is None else factor)
    if factor is None:
        return torch.add(residual, bias, alpha=alpha)
    return torch.addcmul(residual, factor, bias)


def _sum(start: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """left right, plus start where that is given."""
    if start is None:
        return torch.mm(left, right)
    if start.dtype == left.dtype:
        return torch.addmm(start, left, right)
    if torch.promote_types(start.dtype, left.dtype) == left.dtype:
        return start.to(left.dtype).addmm_(left, right)
    return torch.mm(left, right) + start


def _with_ones(h: Tensor) -> Tensor:
    return torch.cat([h, h.new_ones(h.shape[0], 1)], 1)


def _scaled_mm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right, rounded once."""
    if scale == 1.0:
        return torch.mm(left, right)
    return torch.addmm(left.new_zeros(()), left, right, beta=0.0, alpha=scale)


def _to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _wider(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    return dtype if other is None else torch.promote_types(dtype, other)
