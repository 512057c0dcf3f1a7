"""RMSNorm and LayerNorm over the last dimension, in plain PyTorch.

    RMSNorm     xhat = x / sqrt(mean(x^2) + eps)              y = w * xhat
    LayerNorm   xhat = (x - mean(x)) / sqrt(var(x) + eps)     y = w * xhat + b

and, with g = w * dy,

    RMSNorm     dx = (g - xhat mean(g * xhat)) / sqrt(mean(x^2) + eps)
    LayerNorm   dx = (g - mean(g) - xhat mean(g * xhat)) / sqrt(var(x) + eps)
    both        dw = sum over rows of dy * xhat               db = sum over rows of dy

Zhang and Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019); Ba, Kiros and Hinton,
"Layer Normalization" (2016). Statistics are float32, or float64 where x is. Models differ in where
RMSNorm's product is rounded; `form` says it:

    "llama"   w * round(xhat) to x's dtype; the output has the dtype to which w and x promote
    "t5"      the same, rounded to w's dtype where that has 16 bits, and not at all otherwise
    "gemma"   (1 + w) * xhat in float32, rounded to x's dtype
    "float"   w * xhat in float32, rounded to x's dtype

On a CPU the results have the bits of transformers' modules, `torch.nn.RMSNorm` ("float") and
`torch.nn.functional.layer_norm`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FORMS = ("llama", "t5", "gemma", "float")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, form: str) -> Tensor:
    """The formula itself, differentiable by autograd.

    Args:
        x: [..., d]; weight: [d] or None.
    """
    wide = x.to(statistics_dtype(x.dtype))
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    rounded = xhat.to(_rounding(xhat.dtype, x.dtype, weight, form))
    if weight is None:
        return rounded.to(x.dtype)
    return (rounded * _factor(weight, xhat.dtype, form)).to(rms_norm_dtype(x.dtype, weight, form))


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float, form: str) -> Tensor:
    """The same, not differentiable and with fewer temporaries; a new, contiguous tensor."""
    xhat, _ = _rms_normalised(x, eps)
    y = xhat.to(_rounding(xhat.dtype, x.dtype, weight, form))
    if weight is not None:
        factor = _factor(weight, xhat.dtype, form)
        fits = torch.promote_types(y.dtype, factor.dtype) == y.dtype
        y = y.mul_(factor) if fits else y * factor
    return y.to(rms_norm_dtype(x.dtype, weight, form)).contiguous()


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    form: str,
    need_x: bool,
    need_weight: bool,
) -> list[Tensor]:
    """The gradients asked for, in the order x, weight; the other arguments are the forward's."""
    xhat, scale = _rms_normalised(x, eps)
    g = dy.to(xhat.dtype)
    grads = []
    if need_weight:
        assert weight is not None
        rounded = xhat.to(_rounding(xhat.dtype, x.dtype, weight, form))
        grads.append(_row_sum(g * rounded).to(weight.dtype))
    if need_x:
        if weight is not None:
            g = g * _factor(weight, xhat.dtype, form)
        g = torch.addcmul(g, xhat, (g * xhat).mean(-1, keepdim=True), value=-1.0)
        grads.insert(0, g.mul_(scale).to(x.dtype).contiguous())
    return grads


def rms_norm_dtype(dtype: torch.dtype, weight: Tensor | None, form: str) -> torch.dtype:
    """The output's dtype for an x of `dtype`."""
    if weight is None or form in ("gemma", "float"):
        return dtype
    if form == "t5":
        rounded = _rounding(statistics_dtype(dtype), dtype, weight, form)
        return torch.promote_types(rounded, weight.dtype)
    return torch.promote_types(dtype, weight.dtype)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an x of `dtype` is normalised."""
    return torch.promote_types(dtype, torch.float32)


def layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.layer_norm` over the last dimension, which is differentiable by autograd too.

    Args:
        x: [..., d]; weight, bias: [d] or None, of x's dtype or float32.
    """
    dtype = x.dtype
    return F.layer_norm(_fitting(x, weight), x.shape[-1:], weight, bias, eps).to(dtype)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    eps: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    bias_dtype: torch.dtype,
) -> list[Tensor]:
    """The gradients asked for, in the order x, weight, bias; the last needs dy alone."""
    grads = []
    if need_x or need_weight:
        assert x is not None
        wide, shape = _fitting(x, weight), x.shape[-1:]
        _, mean, rstd = torch.native_layer_norm(wide, shape, weight, None, eps)
        mask = [need_x, need_weight, False]
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            dy.to(wide.dtype), wide, shape, mean, rstd, weight, None, mask
        )
        grads = [dx.to(x.dtype)] if need_x else []
        grads += [dw] if need_weight else []
    if need_bias:
        grads.append(_row_sum(dy).to(bias_dtype))
    return grads


def _rms_normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """xhat, a new tensor, and 1 / sqrt(mean(x^2) + eps) of each row."""
    wide = x.to(statistics_dtype(x.dtype))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale if wide is x else wide.mul_(scale)), scale


def _row_sum(values: Tensor) -> Tensor:
    columns = values.shape[-1]
    flat = values.reshape(math.prod(values.shape[:-1]), columns)
    return flat.sum(0, dtype=statistics_dtype(values.dtype))


def _rounding(
    wide: torch.dtype, dtype: torch.dtype, weight: Tensor | None, form: str
) -> torch.dtype:
    """The dtype to which xhat is rounded before the product."""
    if form == "llama":
        return dtype
    if form == "t5" and weight is not None and weight.dtype.itemsize == 2:
        return weight.dtype
    return wide


def _factor(weight: Tensor, wide: torch.dtype, form: str) -> Tensor:
    if form == "gemma":
        return 1.0 + weight.to(wide)
    return weight.to(wide) if form == "float" else weight


def _fitting(x: Tensor, weight: Tensor | None) -> Tensor:
    """x as torch's LayerNorm takes it beside a float32 weight: on a GPU in the weight's dtype."""
    if weight is None or x.device.type == "cpu":
        return x
    return x.to(weight.dtype)
