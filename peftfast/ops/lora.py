"""The LoRA linear: y = x W^T + b + sum_i scaling_i (drop_i(x) A_i^T) B_i^T, alone or with siblings.

Contract, checks, dispatch and autograd; the maths is in `peftfast.reference.lora`, the kernels in
`peftfast_kernels.lora`. Saved for the backward: x, or what its recipe rebuilds it from
(`peftfast.ops.recipes`), the parameters, the bottleneck t = s drop(x) A^T and the dropout seeds;
never a mask, a dropped or widened copy of x, a cast copy of W, or a clone of y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.ops import nf4, recipes, rows_int8
from peftfast.ops.dispatch import (
    Impl,
    choose,
    native_reasons,
    none,
    parse_impl,
    triton_reasons,
)
from peftfast.ops.nf4_weight import (
    NF4Weight,
    Weight,
    first_parts,
    flatten,
    out_features,
    part_count,
    unflatten,
)
from peftfast.ops.operands import (
    Factors,
    OneOrMore,
    as_list,
    autocast_dtype,
    check_adapter,
    check_input,
    check_operand,
    check_seed,
    factors,
    is_batched,
    is_traced,
    no_autocast,
    probabilities,
    shape,
)
from peftfast.ops.second_order import first_order_only
from peftfast.reference import lora as reference

_SEED_LIMIT = (1 << 63) - 1
_WIDEN_ROWS = 32  # from here on a CPU widens a dense 16-bit weight where its GEMM gains by that


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_a: OneOrMore,
    lora_b: OneOrMore,
    scaling: Factors,
    *,
    dropout_p: Factors = 0.0,
    seed: Tensor | None = None,
    compress: bool = False,
    impl: str | Impl = "auto",
) -> Tensor:
    """A linear with one or more active LoRA adapters, as one differentiable operation.

    y = x W^T + b + sum_i scaling_i (drop_i(x) A_i^T) B_i^T   (Hu et al., ICLR 2022, section 4.1)

    Args:
        x: [..., in], any strides.
        weight: [out, in], any strides (a transposed view serves transformers' Conv1D); or an
            `NF4Weight` (QLoRA), which is dequantised into one scratch buffer and never saved dense.
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
        compress: keep what serves gradients of parameters only in 8 bits a value with one scale a
            row: x for A's, where it can't be rebuilt, and drop(x) A^T for B's. These gradients are
            then those of values that are off by at most 1/254 of their row's largest magnitude;
            every other result is exact.
        impl: "auto", "triton", "native" or "reference"; an explicit request never falls back.

    x, weight and bias have one floating dtype, each adapter that one or float32. Under autocast
    x, weight and bias are cast as in `F.linear`; adapters are not. Gradients go to x, A, B, bias
    and weight where they ask for one, in their own dtype; second derivatives raise. Over an
    NF4Weight the base's product is computed in its compute_dtype, where it has one, and the bias
    may be of any floating dtype.

    Returns:
        [..., out] in x's dtype (under autocast: in autocast's).

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device is wrong; the message
        names it.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    operands = _flatten(x, [weight], [bias], [lora_a], [lora_b], [scaling], [dropout_p], seed)
    return _run(operands, x, impl, compress)[0]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[OneOrMore],
    lora_b: Sequence[OneOrMore],
    scaling: Sequence[Factors],
    *,
    dropout_p: Factors | Sequence[Factors] = 0.0,
    seed: Tensor | None = None,
    compress: bool = False,
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
        compress, impl: as in `lora_linear`.

    Returns:
        One output a linear, [..., out_j]. Raises as `lora_linear` does.
    """
    dropouts: Any = [dropout_p] * len(weights) if isinstance(dropout_p, Real) else dropout_p
    operands = _flatten(x, weights, biases, lora_a, lora_b, scaling, dropouts, seed)
    return _run(operands, x, impl, compress)


def lora_linear_reasons(
    x: Tensor,
    weights: Sequence[Weight],
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
    weights: Sequence[Weight]
    biases: Sequence[Tensor | None]
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    owners: Sequence[int]
    scaling: Sequence[float]
    dropout_p: Sequence[float]
    seed: Tensor | None


def _flatten(
    x: Tensor,
    weights: Sequence[Weight],
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
    x = check_input(x)
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
            one = at if isinstance(lora_a[j], Tensor) else f"{at}[{i}]"
            check_adapter(x, w.shape[0], a_i, b_i, one)
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


def _check_linear(x: Tensor, w: Weight, bias: Tensor | None, w_name: str, bias_name: str) -> None:
    if isinstance(w, NF4Weight):
        nf4.check_weight(x, w, w_name)
        nf4.check_bias(x, w, bias, w_name, bias_name)
        return
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


# Running: eager calls go through an autograd.Function, compiled ones through the library op; both
# call `_forward` and `_backward`.


def _run(
    operands: _Operands, given: Tensor, impl: str | Impl, compress: bool
) -> tuple[Tensor, ...]:
    """The outputs; `given` is x as the caller gave it, before autocast's cast."""
    x = operands.x
    asked = parse_impl(impl)
    if not operands.lora_a:
        return tuple(
            nf4.linear(x, w, b, asked) if isinstance(w, NF4Weight) else F.linear(x, w, b)
            for w, b in zip(operands.weights, operands.biases, strict=True)
        )
    if operands.seed is None and any(p > 0 for p in operands.dropout_p):
        seed = torch.randint(_SEED_LIMIT, (len(operands.lora_a),), device=x.device)
        operands = operands._replace(seed=seed)
    traced = is_traced()
    if not traced and not torch.is_grad_enabled():
        ys, _ = _matrices(operands, asked)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)
    parts, spec = flatten(operands.weights)
    recipe, leaves = _kept(operands, given, parts, compress)
    if traced:
        has_bias = [int(b is not None) for b in operands.biases]
        present = [b for b in operands.biases if b is not None]
        fields = (present, *operands[3:])
        kept = leaves, "" if recipe == 0 else recipes.encode(recipe)
        return tuple(
            torch.ops.peftfast.lora_linear(
                x, parts, spec, *fields, has_bias, *kept, compress, asked.value
            )[0]
        )
    settings = (spec, *operands[5:8], asked.value, compress)
    tensors = (*parts, *operands.biases, *operands.lora_a, *operands.lora_b)
    return _LoRALinear.apply(settings, x, operands.seed, recipe, leaves, *tensors)


def _kept(
    operands: _Operands, given: Tensor, parts: Sequence[Tensor], compress: bool
) -> tuple[recipes.Spec, list[Tensor]]:
    """What to save in place of x, as spec and leaves; 0 and none where x itself is to be saved."""
    trains_weights = any(part.requires_grad for part in parts)
    if not trains_weights and not any(a.requires_grad for a in operands.lora_a):
        return 0, []  # nothing will read x
    kept = recipes.keep(given, operands.x.dtype)
    if kept.spec != 0:
        return kept
    if compress and not trains_weights and not recipes.is_saved(operands.x):
        return rows_int8.compressed(operands.x)
    return 0, []


def _implementation(asked: Impl, operands: _Operands, dys: Sequence[Tensor | None] = ()) -> Impl:
    """Who serves a call; a compiled graph asks when it runs."""
    device = operands.x.device
    batched = ["the gradients are batched"] if is_batched(dys) else []

    def triton() -> list[str]:
        reasons = triton_reasons(device, operands.x.dtype) + batched
        if any(0 in w.shape for w in operands.weights):
            reasons.append("a linear has no input or no output features")
        return reasons

    def native() -> list[str]:
        if device.type == "cuda":
            return ["csrc has dropout and 4-bit weights for a GPU's linear, not the linear itself"]
        return native_reasons(device) + batched

    reasons = {Impl.TRITON: triton, Impl.NATIVE: native, Impl.REFERENCE: none}
    first = Impl.TRITON if device.type == "cuda" else Impl.NATIVE
    return choose("lora_linear", asked, (first, Impl.REFERENCE), reasons)


def _module(impl: Impl) -> Any:
    """The functions of one implementation."""
    if impl is Impl.TRITON:
        from peftfast_kernels import lora

        return lora
    if impl is Impl.NATIVE:
        from peftfast.native import lora as native

        return native
    return reference


def _forward(operands: _Operands, impl: str, compress: bool = False) -> tuple[list[Tensor], Tensor]:
    """Outputs [..., N_j] and t [M, sum r_i], packed where it is to be compressed."""
    ys, t = _matrices(operands, Impl(impl))
    if compress:
        t = rows_int8.pack_columns(t, _ranks(operands))
    leading = operands.x.shape[:-1]
    # Not views for autograd: an output may be changed in place, as F.linear's may.
    return [torch.ops.aten._unsafe_view(y, (*leading, y.shape[-1])) for y in ys], t


def _matrices(operands: _Operands, asked: Impl) -> tuple[list[Tensor], Tensor]:
    """Outputs [M, N_j] and t [M, sum r_i]. W and b are cast here, and the casts not kept."""
    x, dtypes = operands.x, _dtypes(operands)
    with no_autocast(x):
        serving = _implementation(asked, operands)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        base = nf4.few_row_outputs(rows, operands.weights, operands.biases, dtypes, asked)
        if base is None:
            matrices, options = _prepared(operands, rows, dtypes, serving, asked)
        else:
            matrices, options = operands._replace(x=rows), {"base_ys": base}
        ys, t = _module(serving).lora_linear_forward(*matrices, **options)
    return ys, t


def _backward(
    dys: Sequence[Tensor | None], t: Tensor, operands: _Operands, needs: Sequence[bool], impl: str
) -> list[Tensor]:
    """The gradients asked for, in the order x, weights, biases, lora_a, lora_b; `needs` has an
    entry for each.
    """
    need_x, *need = _split_needs(needs, len(operands.weights), len(operands.lora_a))
    asked, dtypes = Impl(impl), _dtypes(operands)
    with no_autocast(operands.x):
        serving = _implementation(asked, operands, dys)
        rows = operands.x.reshape(math.prod(operands.x.shape[:-1]), operands.x.shape[-1])
        matrices, options = _prepared(operands, rows, dtypes, serving, asked)
        if t.dtype == torch.int8:
            dtype = reference.bottleneck_dtype(operands.lora_a)
            t = rows_int8.unpack_columns(t, _ranks(operands), dtype)
        flat = [None if dy is None else dy.reshape(len(rows), dy.shape[-1]) for dy in dys]
        grads = _module(serving).lora_linear_backward(
            flat, t, *matrices, need_x[0], *need, **options
        )
    if need_x[0]:
        grads[0] = grads[0].view(operands.x.shape)
    return grads


def _ranks(operands: _Operands) -> list[int]:
    return [a.shape[0] for a in operands.lora_a]


def _dtypes(operands: _Operands) -> list[torch.dtype]:
    """The dtype in which each linear's own product is computed."""
    x = operands.x.dtype
    return [(w.compute_dtype if isinstance(w, NF4Weight) else None) or x for w in operands.weights]


def _prepared(
    operands: _Operands,
    x: Tensor,
    dtypes: Sequence[torch.dtype],
    serving: Impl,
    asked: Impl,
) -> tuple[_Operands, dict[str, Any]]:
    """The operands with x as [M, in], W and b in the dtype of the base's product, and what else is
    to be said of it.

    4-bit weights, and 16-bit ones that a CPU multiplies faster in float32, become dense when they
    are read, one at a time.
    """
    quantised = any(isinstance(w, NF4Weight) for w in operands.weights)
    wide = None
    if serving is Impl.NATIVE and (quantised or x.shape[0] >= _WIDEN_ROWS):
        wide = next(filter(None, (nf4.gemm_dtype(d, x.device, asked) for d in dtypes)), None)
    options: dict[str, Any] = {}
    if any(dtype != x.dtype for dtype in dtypes):
        options["compute_dtypes"] = dtypes
    weights: Sequence[Any] = operands.weights
    if quantised or wide is not None:
        weights = nf4.DenseWeights(weights, dtypes, wide, asked)
    else:
        weights = [w.to(x.dtype) for w in weights]
    biases = [
        None if b is None else b.to(dtype) for b, dtype in zip(operands.biases, dtypes, strict=True)
    ]
    return operands._replace(x=x, weights=weights, biases=biases), options


def _split_needs(needs: Sequence[bool], linears: int, adapters: int) -> list[Sequence[bool]]:
    """`needs` by operand: x, weights, biases, lora_a, lora_b."""
    parts, start = [], 0
    for size in (1, linears, linears, adapters, adapters):
        parts.append(needs[start : start + size])
        start += size
    return parts


def _reads_x(needs: Sequence[bool], linears: int, adapters: int) -> bool:
    """Whether a gradient that is asked for is computed from x: a weight's or an A's."""
    _, need_weights, _, need_a, _ = _split_needs(needs, linears, adapters)
    return any(need_weights) or any(need_a)


def _saved_x(
    x: Tensor, needs: Sequence[bool], linears: int, adapters: int, rebuilt: bool
) -> Tensor:
    """x where the backward will read it as it is, else a stand-in of its shape and dtype without
    storage of that size.
    """
    read = _reads_x(needs, linears, adapters) and not rebuilt
    return x if read else x.new_empty(()).expand(x.shape)


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


def _weight_needs(spec: Sequence[int], needs: Sequence[bool]) -> list[bool]:
    """Whether each weight asks for a gradient, from the same of every part; a 4-bit one can't."""
    return [dense and needs[start] for start, dense in first_parts(spec)]


def _part_grads(spec: Sequence[int], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradient of every part: a dense weight's, and None for 4-bit ones."""
    parts: list[Tensor | None] = [None] * part_count(spec)
    for (start, _), grad in zip(first_parts(spec), grads, strict=True):
        parts[start] = grad
    return parts


class _LoRALinear(torch.autograd.Function):
    """Eager autograd; the tensors among the operands follow the settings, flat.

    `recipe` and `leaves` are what `_kept` gives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: Any,
        x: Tensor,
        seed: Tensor | None,
        recipe: recipes.Spec,
        leaves: list[Tensor],
        *tensors: Any,
    ) -> Any:
        spec, owners, scaling, dropout_p, impl, compress = settings
        adapters, linears, held = len(owners), len(out_features(spec)), part_count(spec)
        parts, biases = tensors[:held], tensors[held : held + linears]
        lora_a, lora_b = tensors[held + linears : -adapters], tensors[-adapters:]
        weights = unflatten(parts, spec)
        operands = _Operands(x, weights, biases, lora_a, lora_b, owners, scaling, dropout_p, seed)
        ys, t = _forward(operands, impl, compress)
        ctx.settings = settings
        need_x, _, _, _, *others = ctx.needs_input_grad[1:]
        ctx.needs = [need_x, *_weight_needs(spec, others[:held]), *others[held:]]
        ctx.set_materialize_grads(False)
        kept = _saved_x(x, ctx.needs, linears, adapters, recipe != 0)
        ctx.recipe, ctx.tensors = recipe, 3 + len(parts) + 2 * adapters
        ctx.save_for_backward(kept, seed, t, *parts, *lora_a, *lora_b, *leaves)
        used = _linears_with_grad(ctx.needs, owners, linears)
        ctx.mark_non_differentiable(*(y for j, y in enumerate(ys) if j not in used))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        spec, owners, scaling, dropout_p, impl, _ = ctx.settings
        adapters, linears, held = len(owners), len(out_features(spec)), part_count(spec)
        saved = ctx.saved_tensors
        (x, seed, t, *tensors), leaves = saved[: ctx.tensors], saved[ctx.tensors :]
        parts, lora_a, lora_b = tensors[:held], tensors[held:-adapters], tensors[-adapters:]
        needs = _reached(ctx.needs, dys, owners)
        if leaves and _reads_x(needs, linears, adapters):
            x = recipes.rebuild(ctx.recipe, leaves)
        operands = _Operands(
            x, unflatten(parts, spec), [None] * linears, lora_a, lora_b, owners, scaling,
            dropout_p, seed,
        )  # fmt: skip
        with torch.no_grad():
            computed = _backward(dys, t, operands, needs, impl)
        grads = iter(first_order_only("lora_linear", computed))
        x_grad, *others = (next(grads) if need else None for need in needs)
        weight_grads = _part_grads(spec, others[:linears])
        return (None, x_grad, None, None, None, *weight_grads, *others[linears:])


# The library op. torch's autograd for lists of tensors passes over a list that holds a None, so
# the biases that exist travel as a plain list, and `has_bias` says whose they are.


def _check_quantised(x: Tensor, weights: Sequence[Weight]) -> None:
    """Hold 4-bit weights to x: a library op can be called by anyone, and kernels trust sizes."""
    for j, w in enumerate(weights):
        if isinstance(w, NF4Weight):
            nf4.check_weight(x, w, f"weights[{j}]")


@torch.library.custom_op(
    "peftfast::lora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] parts, int[] spec, Tensor[] biases, Tensor[] lora_a,"
    " Tensor[] lora_b, int[] owners, float[] scaling, float[] dropout_p, Tensor? seed,"
    " int[] has_bias, Tensor[] leaves, str recipe, bool compress, str impl)"
    " -> (Tensor[], Tensor)",
)
def _library_forward(x: Tensor, parts: Any, spec: Any, biases: Any, *args: Any) -> Any:
    *fields, has_bias, _, _, compress, impl = args
    present = iter(biases)
    every = [next(present) if has else None for has in has_bias]
    weights = unflatten(parts, spec, check=True)
    _check_quantised(x, weights)
    return _forward(_Operands(x, weights, every, *fields), impl, compress)


@_library_forward.register_fake
def _fake_forward(x: Tensor, parts: Any, spec: Any, biases: Any, lora_a: Any, *rest: Any) -> Any:
    ys = [x.new_empty(*x.shape[:-1], features) for features in out_features(spec)]
    rows, rank = math.prod(x.shape[:-1]), sum(a.shape[0] for a in lora_a)
    if rest[-2]:  # compress
        return ys, x.new_empty(rows, rows_int8.packed_width(rank, len(lora_a)), dtype=torch.int8)
    return ys, x.new_empty(rows, rank, dtype=reference.bottleneck_dtype(lora_a))


@torch.library.custom_op(
    "peftfast::lora_linear_backward",
    mutates_args=(),
    schema="(Tensor?[] dys, Tensor t, Tensor x, Tensor[] parts, int[] spec, Tensor[] lora_a,"
    " Tensor[] lora_b, int[] owners, float[] scaling, float[] dropout_p, Tensor? seed,"
    " bool[] needs, Tensor[] leaves, str recipe, str impl) -> Tensor[]",
)
def _library_backward(
    dys: Any, t: Tensor, x: Tensor, parts: Any, spec: Any, *args: Any
) -> list[Tensor]:
    *fields, needs, leaves, recipe, impl = args
    weights = unflatten(parts, spec, check=True)
    if recipe and _reads_x(needs, len(weights), len(fields[0])):
        x = recipes.rebuild(recipes.decode(recipe), leaves)
    operands = _Operands(x, weights, [None] * len(weights), *fields)
    _check_quantised(x, weights)
    return _backward(dys, t, operands, needs, impl)


@_library_backward.register_fake
def _fake_backward(
    dys: Any, t: Tensor, x: Tensor, parts: Any, spec: Any, *args: Any
) -> list[Tensor]:
    lora_a, lora_b, *_, needs, _, _, _ = args
    features = out_features(spec)
    wide = [x.new_empty(x.shape)]
    wide += [x.new_empty(n, x.shape[-1]) for n in features] + [x.new_empty(n) for n in features]
    values = [*wide, *(v.new_empty(v.shape) for v in (*lora_a, *lora_b))]
    return [value for value, need in zip(values, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *inputs, leaves, recipe, _, impl = inputs
    x, parts, spec, biases, lora_a, lora_b, *settings, seed, has_bias = inputs
    present = iter(biases)
    needs = [x.requires_grad, *_weight_needs(spec, [p.requires_grad for p in parts])]
    needs += [bool(has) and next(present).requires_grad for has in has_bias]
    needs += [v.requires_grad for v in (*lora_a, *lora_b)]
    ctx.spec, ctx.settings, ctx.has_bias = spec, settings, has_bias
    ctx.needs, ctx.impl = needs, impl
    ctx.set_materialize_grads(False)
    kept = _saved_x(x, needs, len(has_bias), len(lora_a), bool(recipe))
    ctx.recipe, ctx.tensors = recipe, 3 + len(parts) + 2 * len(lora_a)
    ctx.save_for_backward(kept, seed, output[1], *parts, *lora_a, *lora_b, *leaves)


def _library_autograd(ctx: Any, dys: Any, _: Any) -> Any:
    linears, adapters, held = len(ctx.has_bias), len(ctx.settings[0]), part_count(ctx.spec)
    saved = ctx.saved_tensors
    (x, seed, t, *tensors), leaves = saved[: ctx.tensors], saved[ctx.tensors :]
    parts, lora_a, lora_b = tensors[:held], tensors[held:-adapters], tensors[-adapters:]
    needs = _reached(ctx.needs, dys, ctx.settings[0])
    grads = iter(
        torch.ops.peftfast.lora_linear_backward(
            dys,
            t,
            x,
            parts,
            ctx.spec,
            lora_a,
            lora_b,
            *ctx.settings,
            seed,
            needs,
            leaves,
            ctx.recipe,
            ctx.impl,
        )  # fmt: skip
    )
    split = _split_needs(needs, linears, adapters)
    (x_grad,), of_weights, of_biases, *of_adapters = (
        [next(grads) if need else None for need in part] for part in split
    )
    biases = [grad for grad, has in zip(of_biases, ctx.has_bias, strict=True) if has]
    no_leaves = [None] * len(leaves)
    of_parts = _part_grads(ctx.spec, of_weights)
    return (x_grad, of_parts, None, biases, *of_adapters, *[None] * 5, no_leaves, *[None] * 3)


_library_forward.register_autograd(_library_autograd, setup_context=_setup_context)
