"""The LoRA linear: y = x W^T + b + sum_i scaling_i (drop_i(x) A_i^T) B_i^T, alone or with siblings.

Contract, checks, dispatch and autograd; the maths is in `peftfast.reference.lora`, the kernels in
`peftfast_kernels.lora`. Saved for the backward: x, the parameters, the bottleneck t = s drop(x)
A^T and the dropout seeds; never a mask, a dropped or widened copy of x, a cast copy of W, or a
clone of y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.ops.dispatch import Impl, choose, parse_impl, triton_reasons
from peftfast.ops.operands import (
    Factors,
    OneOrMore,
    as_list,
    autocast_dtype,
    check_operand,
    check_seed,
    factors,
    no_autocast,
    probabilities,
    shape,
)
from peftfast.ops.second_order import first_order_only
from peftfast.reference import lora as reference

_SEED_LIMIT = (1 << 63) - 1


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: OneOrMore,
    lora_b: OneOrMore,
    scaling: Factors,
    *,
    dropout_p: Factors = 0.0,
    seed: Tensor | None = None,
    impl: str | Impl = "auto",
) -> Tensor:
    """A linear with one or more active LoRA adapters, as one differentiable operation.

    y = x W^T + b + sum_i scaling_i (drop_i(x) A_i^T) B_i^T   (Hu et al., ICLR 2022, section 4.1)

    Args:
        x: [..., in], any strides.
        weight: [out, in], any strides (a transposed view serves transformers' Conv1D).
        bias: [out] or None.
        lora_a: A [r, in], r >= 1; or a list: several active adapters, whose contributions add up.
        lora_b: B [out, r]; or a list of the same length.
        scaling: factor of each adapter's contribution (alpha / r); one number serves all
        adapters. dropout_p: probability in [0, 1] with which elements of x are dropped on an
        adapter's way, each adapter
            with a mask of its own; rounded to a multiple of 2**-16. It always drops: pass 0.0 to
            evaluate.
        seed: int64 [number of adapters] on x's device, from which the masks follow; None draws it
        from torch's
            generator of that device.
        impl: "auto", "triton", "native" or "reference"; an explicit request never falls back.

    x, weight and bias have one floating dtype, each adapter that one or float32. Under autocast
    x, weight and bias are cast as in `F.linear`; adapters are not. Gradients go to x, A, B, bias
    and weight where they ask for one, in their own dtype; second derivatives raise.

    Returns:
        [..., out] in x's dtype (under autocast: in autocast's).

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device is wrong; the message
        names it.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    operands = _flatten(x, [weight], [bias], [lora_a], [lora_b], [scaling], [dropout_p], seed)
    return _run(operands, impl)[0]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[OneOrMore],
    lora_b: Sequence[OneOrMore],
    scaling: Sequence[Factors],
    *,
    dropout_p: Factors | Sequence[Factors] = 0.0,
    seed: Tensor | None = None,
    impl: str | Impl = "auto",
) -> tuple[Tensor, ...]:
    """`lora_linear` for siblings that read one x (q, k, v; gate, up), sharing the reads of x and
    the sum into dx.

    Args:
        x: [..., in].
        weights, biases, lora_a, lora_b, scaling: one entry a linear, each as in `lora_linear`; an
        entry of
            lora_a is an empty list where that linear has no active adapter.
        dropout_p: one number for all, or one entry a linear, each as in `lora_linear`.
        seed: int64 [number of adapters over all linears], in the order of the linears.
        impl: as in `lora_linear`.

    Returns:
        One output a linear, [..., out_j]. Raises as `lora_linear` does.
    """
    dropouts: Any = [dropout_p] * len(weights) if isinstance(dropout_p, Real) else dropout_p
    operands = _flatten(x, weights, biases, lora_a, lora_b, scaling, dropouts, seed)
    return _run(operands, impl)


def lora_linear_reasons(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[OneOrMore],
    lora_b: Sequence[OneOrMore],
) -> list[str]:
    """Why no implementation takes these operands (what `lora_linear_group` would raise); empty
    where one does.
    """
    ones = [1.0] * len(weights)
    try:
        _flatten(x, weights, biases, lora_a, lora_b, ones, [0.0] * len(weights), None)
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []


class _Operands(NamedTuple):
    """Checked operands: J linears over one x, I adapters laid out flat, `owners` naming each
    one's linear.
    """

    x: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    owners: Sequence[int]
    scaling: Sequence[float]
    dropout_p: Sequence[float]
    seed: Tensor | None


def _flatten(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[OneOrMore],
    lora_b: Sequence[OneOrMore],
    scaling: Sequence[Factors],
    dropout_p: Sequence[Factors],
    seed: Tensor | None,
) -> _Operands:
    """Check every operand, cast x under autocast, and lay the adapters out flat."""
    count = len(weights)
    if count == 0:
        raise ValueError("weights is empty: a group needs at least one linear")
    _check_lengths(
        count, biases=biases, lora_a=lora_a, lora_b=lora_b, scaling=scaling, dropout_p=dropout_p
    )
    x = _check_x(x)
    flat_a: list[Tensor] = []
    flat_b: list[Tensor] = []
    owners: list[int] = []
    scales: list[float] = []
    drops: list[float] = []
    for j, (w, bias) in enumerate(zip(weights, biases, strict=True)):
        at = f"[{j}]" if count > 1 else ""
        _check_linear(
            x, w, bias, f"weights{at}" if at else "weight", f"biases{at}" if at else "bias"
        )
        a, b = as_list(lora_a[j], f"lora_a{at}"), as_list(lora_b[j], f"lora_b{at}")
        if len(a) != len(b):
            raise ValueError(f"lora_a{at} has {len(a)} adapters and lora_b{at} has {len(b)}")
        for i, (a_i, b_i) in enumerate(zip(a, b, strict=True)):
            _check_adapter(x, w, a_i, b_i, at if isinstance(lora_a[j], Tensor) else f"{at}[{i}]")
        flat_a.extend(a)
        flat_b.extend(b)
        owners.extend([j] * len(a))
        scales.extend(factors(scaling[j], len(a), f"scaling{at}"))
        drops.extend(probabilities(dropout_p[j], len(a), f"dropout_p{at}"))
    if seed is not None:
        check_seed(x, seed, len(flat_a))
    return _Operands(x, list(weights), list(biases), flat_a, flat_b, owners, scales, drops, seed)


def _check_lengths(count: int, **lists: Any) -> None:
    for name, values in lists.items():
        if isinstance(values, (Tensor, Real)):
            raise ValueError(
                f"{name} is one value; a list with one entry for each of {count} weights is needed"
            )
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} weights")


def _check_x(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}; a tensor is needed")
    if x.ndim == 0:
        raise ValueError("x is a scalar; it needs at least one dimension, [..., in]")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else f"of layout {x.layout}"
        raise TypeError(f"x is {kind}; a dense tensor is needed")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; a floating dtype is needed")
    if (dtype := autocast_dtype(x)) is not None:
        x = x.to(dtype)
    return x


def _check_linear(x: Tensor, w: Tensor, bias: Tensor | None, w_name: str, bias_name: str) -> None:
    check_operand(x, w, w_name, 2, any_dtype=autocast_dtype(x) is not None)
    if w.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{w_name} is {shape(w)}, [out, in], and x is {shape(x)}: in is {w.shape[1]} in one,"
            f" {x.shape[-1]} in the other"
        )
    if bias is None:
        return
    check_operand(x, bias, bias_name, 1, any_dtype=autocast_dtype(x) is not None)
    if bias.shape[0] != w.shape[0]:
        raise ValueError(f"{bias_name} is {shape(bias)}; {w_name} {shape(w)} needs [{w.shape[0]}]")


def _check_adapter(x: Tensor, w: Tensor, a: Tensor, b: Tensor, at: str) -> None:
    for name, value in ((f"lora_a{at}", a), (f"lora_b{at}", b)):
        check_operand(x, value, name, 2, any_dtype=True)
        if value.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{name} is {value.dtype}; with x of {x.dtype} adapters are {x.dtype}"
                " or torch.float32"
            )
    rank = a.shape[0]
    if rank < 1:
        raise ValueError(f"lora_a{at} is {shape(a)}: the rank must be at least 1")
    if a.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_a{at} is {shape(a)}; x {shape(x)} needs [r, {x.shape[-1]}]")
    if b.shape != (w.shape[0], rank):
        raise ValueError(f"lora_b{at} is {shape(b)}; [out, r] is [{w.shape[0]}, {rank}] here")


# Running: eager calls go through an autograd.Function, compiled ones through the library op; both
# call `_forward` and `_backward`.


def _run(operands: _Operands, impl: str | Impl) -> tuple[Tensor, ...]:
    x = operands.x
    asked = parse_impl(impl)
    if not operands.lora_a:
        frozen = zip(operands.weights, operands.biases, strict=True)
        return tuple(F.linear(x, w, b) for w, b in frozen)
    if operands.seed is None and any(p > 0 for p in operands.dropout_p):
        seed = torch.randint(_SEED_LIMIT, (len(operands.lora_a),), device=x.device)
        operands = operands._replace(seed=seed)
    if torch.compiler.is_compiling():
        has_bias = [b is not None for b in operands.biases]
        present = [b for b in operands.biases if b is not None]
        fields = operands._replace(biases=present)
        return tuple(torch.ops.peftfast.lora_linear(*fields, has_bias, asked.value)[0])
    settings = (operands.owners, operands.scaling, operands.dropout_p, asked.value)
    tensors = (*operands.weights, *operands.biases, *operands.lora_a, *operands.lora_b)
    return _LoRALinear.apply(settings, x, operands.seed, *tensors)


def _implementation(asked: str, operands: _Operands) -> Any:
    """The module that serves a call; a compiled graph asks when it runs."""
    device = operands.x.device
    triton = triton_reasons(device, operands.x.dtype)
    if any(0 in w.shape for w in operands.weights):
        triton.append("a linear has no input or no output features")
    reasons = {Impl.TRITON: triton, Impl.REFERENCE: []}
    order = (Impl.TRITON, Impl.REFERENCE) if device.type == "cuda" else (Impl.REFERENCE,)
    if choose("lora_linear", Impl(asked), order, reasons) is Impl.TRITON:
        from peftfast_kernels import lora

        return lora
    return reference


def _forward(operands: _Operands, impl: str) -> tuple[list[Tensor], Tensor]:
    """Outputs [..., N_j] and t [M, sum r_i]. W and b are cast here, to x's dtype, and the casts
    not kept.
    """
    with no_autocast(operands.x):
        ys, t = _implementation(impl, operands).lora_linear_forward(*_as_matrices(operands))
    leading = operands.x.shape[:-1]
    # Not views for autograd: an output may be changed in place, as F.linear's may.
    return [torch.ops.aten._unsafe_view(y, (*leading, y.shape[-1])) for y in ys], t


def _backward(
    dys: Sequence[Tensor | None], t: Tensor, operands: _Operands, needs: Sequence[bool], impl: str
) -> list[Tensor]:
    """The gradients asked for, in the order x, weights, biases, lora_a, lora_b; `needs` has an
    entry for each.
    """
    matrices = _as_matrices(operands)
    rows = matrices.x.shape[0]
    flat = [None if dy is None else dy.reshape(rows, dy.shape[-1]) for dy in dys]
    need_x, *need = _split_needs(needs, len(operands.weights), len(operands.lora_a))
    with no_autocast(operands.x):
        grads = _implementation(impl, operands).lora_linear_backward(
            flat, t, *matrices, need_x[0], *need
        )
    if need_x[0]:
        grads[0] = grads[0].view(operands.x.shape)
    return grads


def _as_matrices(operands: _Operands) -> _Operands:
    """x as [M, in], W and b in x's dtype (they differ under autocast only)."""
    x = operands.x
    return operands._replace(
        x=x.reshape(math.prod(x.shape[:-1]), x.shape[-1]),
        weights=[w.to(x.dtype) for w in operands.weights],
        biases=[None if b is None else b.to(x.dtype) for b in operands.biases],
    )


def _split_needs(needs: Sequence[bool], linears: int, adapters: int) -> list[Sequence[bool]]:
    """`needs` by operand: x, weights, biases, lora_a, lora_b."""
    parts, start = [], 0
    for size in (1, linears, linears, adapters, adapters):
        parts.append(needs[start : start + size])
        start += size
    return parts


def _saved_x(x: Tensor, needs: Sequence[bool], linears: int, adapters: int) -> Tensor:
    """x where a weight's gradient will read it, else a stand-in of its shape and dtype without
    storage of that size.
    """
    _, need_weights, _, need_a, _ = _split_needs(needs, linears, adapters)
    return x if any(need_weights) or any(need_a) else x.new_empty(()).expand(x.shape)


def _linears_with_grad(needs: Sequence[bool], owners: Sequence[int], linears: int) -> set[int]:
    """The linears whose output depends on an operand that asks for a gradient."""
    (x,), weights, biases, lora_a, lora_b = _split_needs(needs, linears, len(owners))
    own = {j for j in range(linears) if x or weights[j] or biases[j]}
    return own | {j for j, a, b in zip(owners, lora_a, lora_b, strict=True) if a or b}


def _reached(
    needs: Sequence[bool], dys: Sequence[Tensor | None], owners: Sequence[int]
) -> list[bool]:
    """`needs` without the operands of linears whose output no gradient reaches: they get None."""
    reached = [dy is not None for dy in dys]
    linears = [*reached, *reached]
    adapters = [reached[j] for j in owners]
    live = [any(reached), *linears, *adapters, *adapters]
    return [need and alive for need, alive in zip(needs, live, strict=True)]


class _LoRALinear(torch.autograd.Function):
    """Eager autograd; the tensors among the operands follow the settings, flat."""

    @staticmethod
    def forward(ctx: Any, settings: Any, x: Tensor, seed: Tensor | None, *tensors: Any) -> Any:
        owners, scaling, dropout_p, impl = settings
        adapters = len(owners)
        linears = len(tensors) // 2 - adapters
        weights, biases = tensors[:linears], tensors[linears : 2 * linears]
        lora_a, lora_b = tensors[2 * linears : -adapters], tensors[-adapters:]
        operands = _Operands(x, weights, biases, lora_a, lora_b, owners, scaling, dropout_p, seed)
        ys, t = _forward(operands, impl)
        ctx.settings, ctx.linears = settings, linears
        ctx.needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]]
        ctx.set_materialize_grads(False)
        kept = _saved_x(x, ctx.needs, linears, adapters)
        ctx.save_for_backward(kept, seed, t, *weights, *lora_a, *lora_b)
        used = _linears_with_grad(ctx.needs, owners, linears)
        ctx.mark_non_differentiable(*(y for j, y in enumerate(ys) if j not in used))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        owners, scaling, dropout_p, impl = ctx.settings
        linears, adapters = ctx.linears, len(owners)
        x, seed, t, *tensors = ctx.saved_tensors
        weights, lora_a, lora_b = tensors[:linears], tensors[linears:-adapters], tensors[-adapters:]
        operands = _Operands(
            x, weights, [None] * linears, lora_a, lora_b, owners, scaling, dropout_p, seed
        )
        needs = _reached(ctx.needs, dys, owners)
        with torch.no_grad():
            computed = _backward(dys, t, operands, needs, impl)
        grads = iter(first_order_only("lora_linear", computed))
        x_grad, *others = (next(grads) if need else None for need in needs)
        return (None, x_grad, None, *others)


# The library op. torch's autograd for lists of tensors passes over a list that holds a None, so
# the biases that exist travel as a plain list, and `has_bias` says whose they are.


@torch.library.custom_op(
    "peftfast::lora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] lora_a, Tensor[] lora_b,"
    " int[] owners, float[] scaling, float[] dropout_p, Tensor? seed, bool[] has_bias, str impl)"
    " -> (Tensor[], Tensor)",
)
def _library_forward(*args: Any) -> Any:
    *fields, has_bias, impl = args
    operands = _Operands._make(fields)
    present = iter(operands.biases)
    biases = [next(present) if has else None for has in has_bias]
    return _forward(operands._replace(biases=biases), impl)


@_library_forward.register_fake
def _fake_forward(*args: Any) -> Any:
    operands = _Operands._make(args[:-2])
    x = operands.x
    ys = [x.new_empty(*x.shape[:-1], w.shape[0]) for w in operands.weights]
    rank = sum(a.shape[0] for a in operands.lora_a)
    dtype = reference.bottleneck_dtype(operands.lora_a)
    return ys, x.new_empty(math.prod(x.shape[:-1]), rank, dtype=dtype)


@torch.library.custom_op(
    "peftfast::lora_linear_backward",
    mutates_args=(),
    schema="(Tensor?[] dys, Tensor t, Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b,"
    " int[] owners, float[] scaling, float[] dropout_p, Tensor? seed, bool[] needs, str impl)"
    " -> Tensor[]",
)
def _library_backward(dys: Any, t: Tensor, x: Tensor, weights: Any, *args: Any) -> list[Tensor]:
    *fields, needs, impl = args
    operands = _Operands._make((x, weights, [None] * len(weights), *fields))
    return _backward(dys, t, operands, needs, impl)


@_library_backward.register_fake
def _fake_backward(dys: Any, t: Tensor, x: Tensor, weights: Any, *args: Any) -> list[Tensor]:
    lora_a, lora_b, *_, needs, _ = args
    biases = [x.new_empty(w.shape[0]) for w in weights]
    wide = [x.new_empty(v.shape) for v in (x, *weights, *biases)]
    values = [*wide, *(v.new_empty(v.shape) for v in (*lora_a, *lora_b))]
    return [value for value, need in zip(values, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, biases, lora_a, lora_b, *settings, seed, has_bias, impl = inputs
    present = iter(biases)
    needs_bias = [has and next(present).requires_grad for has in has_bias]
    needs = [v.requires_grad for v in (x, *weights)] + needs_bias
    needs += [v.requires_grad for v in (*lora_a, *lora_b)]
    ctx.settings, ctx.has_bias, ctx.needs, ctx.impl = settings, has_bias, needs, impl
    ctx.set_materialize_grads(False)
    kept = _saved_x(x, needs, len(weights), len(lora_a))
    ctx.save_for_backward(kept, seed, output[1], *weights, *lora_a, *lora_b)


def _library_autograd(ctx: Any, dys: Any, _: Any) -> Any:
    linears, adapters = len(ctx.has_bias), len(ctx.settings[0])
    x, seed, t, *tensors = ctx.saved_tensors
    weights, lora_a, lora_b = tensors[:linears], tensors[linears:-adapters], tensors[-adapters:]
    needs = _reached(ctx.needs, dys, ctx.settings[0])
    grads = iter(
        torch.ops.peftfast.lora_linear_backward(
            dys, t, x, weights, lora_a, lora_b, *ctx.settings, seed, needs, ctx.impl
        )
    )
    parts = _split_needs(needs, linears, adapters)
    (x_grad,), *lists = ([next(grads) if need else None for need in part] for part in parts)
    lists[1] = [grad for grad, has in zip(lists[1], ctx.has_bias, strict=True) if has]
    return (x_grad, *lists, *[None] * 6)


_library_forward.register_autograd(_library_autograd, setup_context=_setup_context)
