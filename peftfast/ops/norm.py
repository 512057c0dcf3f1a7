"""RMSNorm and LayerNorm over the last dimension.

Contract, checks and dispatch; the maths is in `peftfast.reference.norm`, the kernels in
`peftfast_kernels.norm`. Saved for the backward: x, or what x is rebuilt from, and the weight;
statistics are computed again. The output is tagged with its recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from peftfast.ops.dispatch import Impl, choose, none, parse_impl, triton_reasons
from peftfast.ops.operands import check_dense, constant, is_batched, shape
from peftfast.ops.rebuilt import Inputs, Rebuilt, Settings
from peftfast.reference import norm as reference

FORMS = (*reference.FORMS, "torch")


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    form: str = "llama",
    recipe: bool = True,
    impl: str | Impl = "auto",
) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times the weight; rounded as models of a form do.

    Args:
        x: [..., d], any strides.
        weight: [d] of any floating dtype, or None.
        eps: added to the mean square.
        form: "llama", "t5", "gemma" or "float", as `peftfast.reference.norm` says; "torch" is
            "float" that autocast treats as it does `torch.nn.RMSNorm`.
        recipe: tag the output, so that an op that would save it saves x instead.
        impl: "auto", "triton" or "reference"; an explicit request never falls back.

    Gradients go to x and weight where they ask for one; second derivatives raise. Moves x and y
    once, and in the backward x, dy and dx; with a weight's gradient also a float32 workspace of
    two rows a processor.

    Raises:
        TypeError, ValueError: an operand is wrong; the message names it.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    _check(x, eps, weight=weight)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(map(repr, FORMS))}")
    dtype = None
    if form == "torch":
        form, dtype = "float", _autocast(x)
    settings = (form, constant(eps), dtype, parse_impl(impl).value)
    return _RMS_NORM(_present(x, weight), settings, recipe)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    recipe: bool = True,
    impl: str | Impl = "auto",
) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last dimension.

    Args:
        x: [..., d], any strides.
        weight, bias: [d] or None, of x's dtype, or float32 where x has 16 bits.
        eps: added to the variance.
        recipe, impl: as in `rms_norm`.

    Autocast computes it in float32 where it does so for `F.layer_norm`. Gradients, traffic and
    errors are as in `rms_norm`.
    """
    _check(x, eps, weight=weight, bias=bias)
    dtype = _autocast(x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None or dtype is not None or value.dtype == x.dtype:
            continue
        if value.dtype != torch.float32 or x.dtype.itemsize > 2:
            raise TypeError(
                f"{name} is {value.dtype}, x is {x.dtype}: they must agree, but for float32"
                " parameters of a 16-bit x"
            )
    if weight is not None and bias is not None and weight.dtype != bias.dtype and dtype is None:
        raise TypeError(f"bias is {bias.dtype}, weight is {weight.dtype}: they must agree")
    settings = (weight is not None, constant(eps), dtype, parse_impl(impl).value)
    return _LAYER_NORM(_present(x, weight, bias), settings, recipe)


def norm_reasons(
    impl: str | Impl, device: torch.device, dtype: torch.dtype, columns: int
) -> list[str]:
    """Why `impl` can't serve norms of rows of that length; empty where it can."""
    asked = parse_impl(impl)
    if asked is Impl.NATIVE:
        return ["norms have no native implementation"]
    return _triton_reasons(device, [dtype], columns, False) if asked is Impl.TRITON else []


def input_gradient(kind: str, dy: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """The gradient of a norm's x, from kind, settings and inputs of its recipe; without a graph."""
    op = {"rms_norm": _RMS_NORM, "layer_norm": _LAYER_NORM}[kind]
    needs = [True] + [False] * (len(inputs) - 1)
    (dx,) = op.backward(dy, inputs, [one.dtype for one in inputs], settings, needs)
    return dx


def _check(x: Tensor, eps: float, **parameters: Tensor | None) -> None:
    check_dense(x, "x")
    if x.ndim == 0:
        raise ValueError("x is a scalar; it needs at least one dimension, [..., d]")
    if not isinstance(eps, Real) or isinstance(eps, bool):
        raise TypeError(f"eps is {type(eps).__name__}; a number is needed")
    for name, value in parameters.items():
        if value is None:
            continue
        check_dense(value, name)
        if value.shape != x.shape[-1:]:
            raise ValueError(f"{name} is {shape(value)}; x {shape(x)} needs [{x.shape[-1]}]")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, x is on {x.device}")


def _autocast(x: Tensor) -> str | None:
    """The dtype in which autocast computes norms of torch: float32 on a GPU, x's elsewhere."""
    if x.device.type != "cuda" or x.dtype == torch.float64:
        return None
    return "float32" if torch.is_autocast_enabled("cuda") else None


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [one for one in tensors if one is not None]


def _triton_reasons(
    device: torch.device, dtypes: Sequence[torch.dtype], columns: int, light: bool
) -> list[str]:
    reasons = next(filter(None, (triton_reasons(device, dtype) for dtype in dtypes)), [])
    if not reasons:
        from peftfast_kernels import tiles

        if columns > (limit := tiles.norm_limit(light)):
            reasons = [f"a row has {columns} elements; {limit} is the most a kernel holds"]
    return reasons


def _kernels(
    op: str,
    asked: str,
    tensors: Sequence[Tensor],
    light: bool,
    dy: Tensor | None = None,
) -> Any:
    """The Triton kernels where they serve a call, else None."""
    x = tensors[0]
    if asked == Impl.REFERENCE or (asked == Impl.AUTO and x.device.type != "cuda"):
        return None

    def triton() -> list[str]:
        reasons = _triton_reasons(x.device, [t.dtype for t in tensors], x.shape[-1], light)
        return reasons + (["the gradients are batched"] if is_batched([dy]) else [])

    reasons = {Impl.TRITON: triton, Impl.REFERENCE: none}
    if choose(op, Impl(asked), (Impl.TRITON, Impl.REFERENCE), reasons) is Impl.REFERENCE:
        return None
    from peftfast_kernels import norm

    return norm


def _cast(value: Tensor, dtype: str | None) -> Tensor:
    return value if dtype is None else value.to(getattr(torch, dtype))


def _cast_any(value: Tensor | None, dtype: str | None) -> Tensor | None:
    return None if value is None else _cast(value, dtype)


# RMSNorm; settings: form, eps, the dtype to compute in or None for x's, impl


def _rms_dtype(inputs: Inputs, settings: Settings) -> torch.dtype:
    form, _, dtype, _ = settings
    found: torch.dtype = getattr(torch, dtype) if dtype is not None else inputs[0].dtype
    return reference.rms_norm_dtype(found, inputs[1] if len(inputs) > 1 else None, form)


def _rms_forward(inputs: Inputs, settings: Settings) -> Tensor:
    form, eps, dtype, impl = settings
    x, weight = inputs[0], inputs[1] if len(inputs) > 1 else None
    if (kernels := _kernels("rms_norm", impl, inputs, True)) is None:
        x, weight = _cast(x, dtype), _cast_any(weight, dtype)
        return reference.rms_norm_forward(x, weight, eps, form)
    y = x.new_empty(x.shape, dtype=_rms_dtype(inputs, settings))
    kernels.rms_norm_forward(x, weight, eps, form, y)
    return y


def _rms_backward(
    dy: Tensor,
    inputs: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    settings: Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    form, eps, dtype, impl = settings
    x, weight = (*inputs, None)[:2]
    need_x, need_weight = (*needs, False)[:2]
    assert x is not None
    tensors = _present(x, weight, dy)
    if (kernels := _kernels("rms_norm", impl, tensors, not need_weight, dy)) is None:
        operands = _cast(x, dtype), _cast_any(weight, dtype), eps, form, need_x, need_weight
        return _as(reference.rms_norm_backward(dy, *operands), dtypes, needs)
    dx = x.new_empty(x.shape) if need_x else None
    dw = weight.new_empty(weight.shape) if need_weight and weight is not None else None
    kernels.rms_norm_backward(dy, x, weight, eps, form, dx, dw)
    return _present(dx, dw)


def _as(
    grads: Sequence[Tensor], dtypes: Sequence[torch.dtype], needs: Sequence[bool]
) -> list[Tensor]:
    wanted = [dtype for dtype, need in zip(dtypes, needs, strict=True) if need]
    return [grad.to(dtype) for grad, dtype in zip(grads, wanted, strict=True)]


def _rms_reads(settings: Settings, needs: Sequence[bool]) -> list[bool]:
    return [True] * len(needs)


def _rms_check(inputs: Inputs, settings: Settings) -> None:
    x, weight = inputs[0], inputs[1] if len(inputs) > 1 else None
    _check(x, settings[1], weight=weight)


_RMS_NORM = Rebuilt("rms_norm", _rms_forward, _rms_backward, _rms_dtype, _rms_reads, _rms_check)


# LayerNorm; settings: whether there is a weight, eps, the dtype to compute in or None for x's, impl


def _layer_dtype(inputs: Inputs, settings: Settings) -> torch.dtype:
    dtype: torch.dtype = inputs[0].dtype if settings[2] is None else getattr(torch, settings[2])
    return dtype


def _parameters(values: Sequence[Any], has_weight: bool, missing: Any) -> tuple[Any, Any]:
    """What belongs to the weight and to the bias."""
    rest = list(values[1:])
    weight = rest.pop(0) if has_weight else missing
    return weight, rest[0] if rest else missing


def _layer_forward(inputs: Inputs, settings: Settings) -> Tensor:
    has_weight, eps, dtype, impl = settings
    x = inputs[0]
    weight, bias = _parameters(inputs, has_weight, None)
    if (kernels := _kernels("layer_norm", impl, inputs, False)) is None:
        operands = _cast(x, dtype), _cast_any(weight, dtype), _cast_any(bias, dtype), eps
        return reference.layer_norm_forward(*operands)
    y = x.new_empty(x.shape, dtype=_layer_dtype(inputs, settings))
    kernels.layer_norm_forward(x, weight, bias, eps, y)
    return y


def _layer_backward(
    dy: Tensor,
    inputs: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    settings: Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    has_weight, eps, dtype, impl = settings
    x = inputs[0]
    weight, _ = _parameters(inputs, has_weight, None)
    wanted = needs[0], *_parameters(needs, has_weight, False)
    bias_dtype = _parameters(dtypes, has_weight, None)[1]
    tensors = _present(x, weight, dy)
    kernels = None if x is None else _kernels("layer_norm", impl, tensors, False, dy)
    if x is None or kernels is None:
        given = _cast_any(x, dtype), _cast_any(weight, dtype)
        operands = *given, eps, *wanted, bias_dtype
        return _as(reference.layer_norm_backward(dy, *operands), dtypes, needs)
    dx = x.new_empty(x.shape) if wanted[0] else None
    dw = weight.new_empty(weight.shape) if wanted[1] else None
    db = x.new_empty(x.shape[-1:], dtype=bias_dtype) if wanted[2] else None
    kernels.layer_norm_backward(dy, x, weight, eps, dx, dw, db)
    return _present(dx, dw, db)


def _layer_reads(settings: Settings, needs: Sequence[bool]) -> list[bool]:
    has_weight = settings[0]
    need_weight, _ = _parameters(needs, has_weight, False)
    reads = [needs[0] or need_weight] * (2 if has_weight else 1)
    return reads + [False] * (len(needs) - len(reads))


def _layer_check(inputs: Inputs, settings: Settings) -> None:
    weight, bias = _parameters(inputs, settings[0], None)
    _check(inputs[0], settings[1], weight=weight, bias=bias)


_LAYER_NORM = Rebuilt(
    "layer_norm", _layer_forward, _layer_backward, _layer_dtype, _layer_reads, _layer_check
)
