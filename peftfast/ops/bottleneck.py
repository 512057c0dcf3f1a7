"""The bottleneck adapter: y = residual + s g (drop(act(norm(x) Wd^T + bd)) Wu^T + bu).

Contract, checks, dispatch and autograd; the maths is in `peftfast.reference.bottleneck`, the
kernels in `peftfast_kernels.bottleneck`. Saved for the backward: x, or what its recipe rebuilds it
from (`peftfast.ops.recipes`), the pre-activation z [M, m], a norm's statistics, the parameters, the
gate and the dropout seed; never h, norm(x), the delta, the residual, a mask or a cast copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.ops import nf4, recipes
from peftfast.ops.dispatch import (
    Impl,
    choose,
    native_reasons,
    none,
    parse_impl,
    triton_reasons,
)
from peftfast.ops.dropout import check_one_seed, draw_seed, drop_of, probability
from peftfast.ops.operands import (
    autocast_dtype,
    check_dense,
    constant,
    factors,
    is_batched,
    is_traced,
    no_autocast,
    shape,
)
from peftfast.ops.second_order import first_order_only
from peftfast.reference import bottleneck as reference
from peftfast.reference.norm import statistics_dtype

ACTIVATIONS = reference.ACTIVATIONS
NORMS = reference.NORMS


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
    impl: str | Impl = "auto",
) -> Tensor:
    """A bottleneck adapter, with what surrounds it, as one differentiable operation.

    y = residual + scaling * gate * (drop(act(norm(x) down^T + down_bias)) up^T + up_bias)
    (Houlsby et al., ICML 2019, section 2.1; He et al., ICLR 2022, table 1)

    Args:
        x: [..., d_in], any strides.
        down: [m, d_in], m >= 1. up: [d_out, m]. down_bias: [m] or None. up_bias: [d_out] or None.
        activation: of `ACTIVATIONS`: "identity", or a kind of `peftfast.ops.activation`.
        scaling: a number; or a floating tensor of one element, which may learn.
        residual: True for x itself (a sequential adapter), False for none (the delta alone), or a
            floating tensor [..., d_out] (a parallel adapter).
        norm: before the down-projection: None, "layer" or "rms"; "layer" is meant where only a
            norm_weight is given.
        norm_weight, norm_bias: [d_in] of any floating dtype, or None.
        norm_eps: added to the variance or the mean square.
        gate: a floating tensor that broadcasts to [..., 1], x's shape with one feature.
        dropout_p: probability in [0, 1] with which elements of the activation are dropped, rounded
            to a multiple of 2**-16. It always drops: pass 0.0 to evaluate.
        seed: int64 [1] on x's device, from which the mask follows; None draws it from torch's
            generator of that device.
        impl: "auto", "triton", "native" or "reference"; an explicit request never falls back.

    down, up and their biases have one dtype: x's, or float32 over an x of 16 bits. The products are
    in that dtype; under autocast, in autocast's, as those of `F.linear` would be. Gradients go to
    every tensor that asks for one, in its own dtype; second derivatives raise.

    Returns:
        [..., d_out] in the residual's dtype; without one in x's (under autocast: in autocast's).

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device is wrong; the message
        names it.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    learned = scaling if isinstance(scaling, Tensor) else None
    if learned is not None and learned.numel() == 1:
        learned = learned.reshape(1)
    given = residual if isinstance(residual, Tensor) else None
    if given is None and not isinstance(residual, bool):
        raise TypeError(f"residual is {type(residual).__name__}; True, False or a tensor is needed")
    if norm is None and norm_weight is not None:
        norm = "layer"
    operands = _Operands(
        x, down, down_bias, up, up_bias, norm_weight, norm_bias, learned, gate,
        given, seed,
    )  # fmt: skip
    settings = _Settings(
        activation,
        1.0 if isinstance(scaling, Tensor) else constant(factors(scaling, 1, "scaling")[0]),
        residual is True,
        norm,
        constant(factors(norm_eps, 1, "norm_eps")[0]),
        probability(dropout_p, "dropout_p"),
        None,
        parse_impl(impl).value,
    )
    _check(operands, settings)
    if (dtype := autocast_dtype(x)) is not None:
        settings = settings._replace(autocast=str(dtype).removeprefix("torch."))
    _check_dtypes(operands, settings)
    if settings.dropout_p == 0.0:
        operands = operands._replace(seed=None)
    elif seed is None:
        operands = operands._replace(seed=draw_seed(x))
    return _run(operands, settings)


class _Operands(NamedTuple):
    """The tensors; the first nine are those that the backward gives gradients of."""

    x: Tensor
    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    scaling: Tensor | None
    gate: Tensor | None
    residual: Tensor | None
    seed: Tensor | None


class _Settings(NamedTuple):
    activation: str
    scaling: float
    sequential: bool
    norm: str | None
    norm_eps: float
    dropout_p: float
    autocast: str | None
    impl: str


_DIFFERENTIABLE = len(reference.GRADIENTS)


def _check(operands: _Operands, settings: _Settings) -> None:
    """Hold names, shapes and devices to each other: a library op can be called by anyone, and
    kernels trust sizes.
    """
    x, down, down_bias, up, up_bias, norm_weight, norm_bias, *_ = operands
    tensors: Any = operands[:-1]
    for name, value in zip(operands._fields[:-1], tensors, strict=True):
        if value is None and name not in ("x", "down", "up"):
            continue
        check_dense(value, name)
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, x is on {x.device}")
    if x.ndim == 0:
        raise ValueError("x is a scalar; it needs at least one dimension, [..., d_in]")
    if settings.activation not in ACTIVATIONS:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation is {settings.activation!r}; allowed: {allowed}")
    if settings.norm not in (None, *NORMS):
        raise ValueError(f"norm is {settings.norm!r}; allowed: None, 'layer', 'rms'")
    if settings.norm is None and norm_bias is not None:
        raise ValueError("norm_bias is given, and neither norm nor norm_weight")
    d_in = x.shape[-1]
    if down.ndim != 2 or down.shape[1] != d_in or down.shape[0] < 1:
        raise ValueError(f"down is {shape(down)}; x {shape(x)} needs [m, {d_in}], m at least 1")
    m = down.shape[0]
    if up.ndim != 2 or up.shape[1] != m:
        raise ValueError(f"up is {shape(up)}; down {shape(down)} needs [d_out, {m}]")
    d_out = up.shape[0]
    vectors = {"down_bias": m, "up_bias": d_out, "norm_weight": d_in, "norm_bias": d_in}
    for name, size in vectors.items():
        vector = getattr(operands, name)
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} is {shape(vector)}; [{size}] is needed")
    if settings.sequential and d_out != d_in:
        raise ValueError(
            f"residual is True, which adds x {shape(x)} to outputs of {d_out} features: up is"
            f" {shape(up)}"
        )
    leading = x.shape[:-1]
    if operands.residual is not None and operands.residual.shape != (*leading, d_out):
        raise ValueError(f"residual is {shape(operands.residual)}; {[*leading, d_out]} is needed")
    if operands.scaling is not None and operands.scaling.numel() != 1:
        raise ValueError(f"scaling is {shape(operands.scaling)}; one element is needed")
    if operands.gate is not None and not _broadcasts(operands.gate.shape, (*leading, 1)):
        raise ValueError(
            f"gate is {shape(operands.gate)}, which does not broadcast to {[*leading, 1]}"
        )
    if operands.seed is not None:
        check_one_seed(x, operands.seed)


def _broadcasts(given: Sequence[int], target: Sequence[int]) -> bool:
    if len(given) > len(target):
        return False
    pairs = zip(reversed(given), reversed(target), strict=False)
    return all(size == 1 or size == wanted for size, wanted in pairs)


def _check_dtypes(operands: _Operands, settings: _Settings) -> None:
    x, down, down_bias, up, up_bias, *_ = operands
    if settings.autocast is not None:
        return
    if down.dtype != x.dtype and (down.dtype != torch.float32 or x.dtype.itemsize > 2):
        raise TypeError(
            f"down is {down.dtype}, x is {x.dtype}: they must agree (outside autocast), but for"
            " float32 parameters of a 16-bit x"
        )
    for name, value in (("down_bias", down_bias), ("up", up), ("up_bias", up_bias)):
        if value is not None and value.dtype != down.dtype:
            raise TypeError(
                f"{name} is {value.dtype}, down is {down.dtype}: they must agree (outside autocast)"
            )


# Running: eager calls go through an autograd.Function, compiled ones through the library op; both
# call `_forward` and `_backward`.


def _run(operands: _Operands, settings: _Settings) -> Tensor:
    traced = is_traced()
    if not traced and not torch.is_grad_enabled():
        return _forward(operands, settings, keep=False)[0]
    needs = _asks(operands) if torch.is_grad_enabled() else [False] * _DIFFERENTIABLE
    recipe: recipes.Spec = 0
    leaves: list[Tensor] = []
    if reference.reads_x(settings.norm, needs):
        kept = recipes.keep(operands.x)
        recipe, leaves = kept.spec, [] if kept.spec == 0 else kept.leaves
    if not traced:
        return _Eager.apply(settings, recipe, leaves, *operands)
    encoded = recipes.encode(recipe), recipes.encode(tuple(settings))
    return torch.ops.peftfast.bottleneck(*operands, leaves, *encoded, any(needs))[0]


def _implementation(operands: _Operands, settings: _Settings, dy: Tensor | None = None) -> Impl:
    """Who serves a call; a compiled graph asks when it runs."""
    device = operands.x.device
    batched = ["the gradients are batched"] if is_batched([dy]) else []

    def triton() -> list[str]:
        dtypes = {one.dtype for one in operands[:-1] if one is not None}
        dtypes.add(_dtype(operands, settings))
        reasons = next(filter(None, (triton_reasons(device, one) for one in dtypes)), [])
        if 0 in (operands.x.shape[-1], operands.up.shape[0]):
            reasons = [*reasons, "there are no input or no output features"]
        if not reasons:
            from peftfast_kernels import tiles

            if (width := operands.down.shape[0]) > tiles.BOTTLENECK_LIMIT:
                most = f"{tiles.BOTTLENECK_LIMIT} is the most a kernel holds"
                reasons = [f"the bottleneck is {width} wide; {most}"]
        return reasons + batched

    def native() -> list[str]:
        if device.type == "cuda":
            return ["csrc has no bottleneck for a GPU"]
        return native_reasons(device) + batched

    reasons = {Impl.TRITON: triton, Impl.NATIVE: native, Impl.REFERENCE: none}
    first = Impl.TRITON if device.type == "cuda" else Impl.NATIVE
    return choose("bottleneck", Impl(settings.impl), (first, Impl.REFERENCE), reasons)


def _module(
    operands: _Operands, settings: _Settings, dy: Tensor | None = None
) -> tuple[Any, dict[str, Any]]:
    """The functions of the implementation that serves, and what else is to be said to them."""
    impl = _implementation(operands, settings, dy)
    if impl is Impl.TRITON:
        from peftfast_kernels import bottleneck as kernels

        return kernels, {}
    if impl is Impl.REFERENCE:
        return reference, {}
    x = operands.x
    wide = nf4.gemm_dtype(_dtype(operands, settings), x.device, Impl.NATIVE)
    return reference, {"gemm_dtype": wide, "drop": drop_of(impl)}


def _dtype(operands: _Operands, settings: _Settings) -> torch.dtype:
    """The dtype of the products."""
    if settings.autocast is None:
        return operands.down.dtype
    dtype: torch.dtype = getattr(torch, settings.autocast)
    return dtype


def _result_dtype(operands: _Operands, settings: _Settings) -> torch.dtype:
    if operands.residual is not None:
        return operands.residual.dtype
    sequential = settings.sequential or settings.autocast is None
    return operands.x.dtype if sequential else _dtype(operands, settings)


def _matrices(
    operands: _Operands, settings: _Settings
) -> tuple[Tensor, list[Tensor | None], dict[str, Any]]:
    """x as [M, d_in], the four weights in the dtype of the products, and the other arguments that
    forward and backward share.
    """
    x, *weights = operands[:5]
    dtype = _dtype(operands, settings)
    rows = math.prod(x.shape[:-1])
    gate = operands.gate
    if gate is not None:
        gate = gate.expand(*x.shape[:-1], 1).reshape(rows)
    shared = {
        "activation": settings.activation,
        "scaling": settings.scaling if operands.scaling is None else operands.scaling,
        "norm": settings.norm,
        "norm_weight": operands.norm_weight,
        "norm_bias": operands.norm_bias,
        "norm_eps": settings.norm_eps,
        "gate": gate,
        "dropout_p": settings.dropout_p,
        "seed": operands.seed,
    }
    cast = [None if one is None else one.to(dtype) for one in weights]
    return x.reshape(rows, x.shape[-1]), cast, shared


def _forward(
    operands: _Operands, settings: _Settings, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [..., d_out]; z [M, m] and statistics, or None where nothing is to be kept."""
    with no_autocast(operands.x):
        x, weights, shared = _matrices(operands, settings)
        residual = x if settings.sequential else None
        if operands.residual is not None:
            residual = operands.residual.reshape(x.shape[0], operands.up.shape[0])
        serving, options = _module(operands, settings)
        y, z, statistics = serving.bottleneck_forward(
            x,
            *weights,
            residual=residual,
            dtype=_result_dtype(operands, settings),
            keep=keep,
            **shared,
            **options,
        )
    # Not a view for autograd: the output may be changed in place, as a linear's may.
    y = torch.ops.aten._unsafe_view(y, (*operands.x.shape[:-1], y.shape[-1]))
    return y, z, statistics


def _backward(
    dy: Tensor,
    z: Tensor,
    statistics: Tensor | None,
    operands: _Operands,
    settings: _Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients asked for, in the order of `reference.GRADIENTS`."""
    with torch.no_grad(), no_autocast(operands.x):
        x, weights, shared = _matrices(operands, settings)
        serving, options = _module(operands, settings, dy)
        grads = serving.bottleneck_backward(
            dy.reshape(x.shape[0], dy.shape[-1]),
            x,
            z,
            statistics,
            *weights,
            sequential=settings.sequential,
            needs=needs,
            **shared,
            **options,
        )
        wanted = zip(operands[:_DIFFERENTIABLE], reference.GRADIENTS, needs, strict=True)
        for i, (one, name) in enumerate((one, name) for one, name, need in wanted if need):
            assert one is not None
            if name == "gate":
                rows = grads[i].view(*operands.x.shape[:-1], 1)
                grads[i] = rows.sum_to_size(one.shape) if one.ndim else rows.sum()
            elif name in ("x", "scaling"):
                grads[i] = grads[i].view(one.shape)
            grads[i] = grads[i].to(one.dtype)
    return grads


def _saved(
    operands: _Operands, settings: _Settings, needs: Sequence[bool], leaves: Sequence[Tensor]
) -> list[Tensor | None]:
    """The operands as the backward takes them: without the residual, and without what x holds
    where it isn't read or is rebuilt.
    """
    x = operands.x
    if leaves or not reference.reads_x(settings.norm, needs):
        x = x.new_empty(()).expand(x.shape)
    return [*operands._replace(x=x, residual=None)]


def _asks(operands: _Operands) -> list[bool]:
    return [one is not None and one.requires_grad for one in operands[:_DIFFERENTIABLE]]


class _Eager(torch.autograd.Function):
    """Eager autograd; `recipe` and `leaves` are what stands for x, the operands follow."""

    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, recipe: recipes.Spec, leaves: list[Tensor], *tensors: Any
    ) -> Tensor:
        operands = _Operands(*tensors)
        needs = ctx.needs_input_grad[3 : 3 + _DIFFERENTIABLE]
        y, z, statistics = _forward(operands, settings, any(needs))
        ctx.settings, ctx.recipe, ctx.needs = settings, recipe, needs
        if any(needs):
            kept = _saved(operands, settings, needs, leaves)
            ctx.save_for_backward(z, statistics, *kept, *leaves)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        of_residual = dy if ctx.needs_input_grad[3 + _Operands._fields.index("residual")] else None
        grads: list[Tensor | None] = [None] * _DIFFERENTIABLE
        if any(ctx.needs):
            z, statistics, *saved = ctx.saved_tensors
            operands = _Operands(*saved[: len(_Operands._fields)])
            if leaves := saved[len(_Operands._fields) :]:
                operands = operands._replace(x=recipes.rebuild(ctx.recipe, leaves))
            computed = _backward(dy, z, statistics, operands, ctx.settings, ctx.needs)
            given = iter(first_order_only("bottleneck", computed))
            grads = [next(given) if need else None for need in ctx.needs]
        return None, None, None, *grads, of_residual, None


# The library op. Where nothing is kept, z has no rows; without a norm, the statistics have none.

_OPERANDS = (
    "Tensor x, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, Tensor? norm_weight,"
    " Tensor? norm_bias, Tensor? scaling, Tensor? gate, Tensor? residual, Tensor? seed"
)


def _decoded(settings: str) -> _Settings:
    return _Settings(*recipes.decode(settings))


def _kept_shapes(
    operands: _Operands, settings: _Settings, keep: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of z and of the statistics."""
    rows = math.prod(operands.x.shape[:-1]) if keep else 0
    held = {None: 0, "rms": 1, "layer": 2}[settings.norm]
    return (rows, operands.down.shape[0]), (held, rows)


@torch.library.custom_op(
    "peftfast::bottleneck",
    mutates_args=(),
    schema=f"({_OPERANDS}, Tensor[] leaves, str recipe, str settings, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
)
def _library_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _, _, encoded, keep = arguments
    operands, settings = _Operands(*tensors), _decoded(encoded)
    _check(operands, settings)
    _check_dtypes(operands, settings)
    y, z, statistics = _forward(operands, settings, keep)
    made = _fake_forward(*arguments)
    return y, made[1] if z is None else z, made[2] if statistics is None else statistics


@_library_forward.register_fake
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _, _, encoded, keep = arguments
    operands, settings = _Operands(*tensors), _decoded(encoded)
    x, dtype = operands.x, _dtype(operands, settings)
    of_z, of_statistics = _kept_shapes(operands, settings, keep)
    return (
        x.new_empty((*x.shape[:-1], operands.up.shape[0]), dtype=_result_dtype(operands, settings)),
        x.new_empty(of_z, dtype=dtype),
        x.new_empty(of_statistics, dtype=statistics_dtype(x.dtype)),
    )


@torch.library.custom_op(
    "peftfast::bottleneck_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor z, Tensor statistics, {_OPERANDS}, Tensor[] leaves, str recipe,"
    " str settings, bool[] needs) -> Tensor[]",
)
def _library_backward(dy: Tensor, z: Tensor, statistics: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, leaves, recipe, encoded, needs = arguments
    operands, settings = _Operands(*tensors), _decoded(encoded)
    if leaves:
        operands = operands._replace(x=recipes.rebuild(recipes.decode(recipe), leaves))
    _check(operands, settings)
    _check_dtypes(operands, settings)
    expected = (*operands.x.shape[:-1], operands.up.shape[0])
    shapes = (expected, *_kept_shapes(operands, settings, True))
    for name, value, wanted in zip(
        ("dy", "z", "statistics"), (dy, z, statistics), shapes, strict=True
    ):
        if value.shape != wanted:
            raise ValueError(f"{name} is {shape(value)}; {list(wanted)} is needed")
    return _backward(dy, z, statistics if settings.norm else None, operands, settings, needs)


@_library_backward.register_fake
def _fake_backward(dy: Tensor, z: Tensor, statistics: Tensor, *arguments: Any) -> list[Tensor]:
    tensors, needs = arguments[:_DIFFERENTIABLE], arguments[-1]
    return [one.new_empty(one.shape) for one, need in zip(tensors, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, leaves, recipe, encoded, _ = inputs
    operands = _Operands(*tensors)
    ctx.needs = _asks(operands)
    ctx.recipe, ctx.settings, ctx.leaves = recipe, encoded, len(leaves)
    ctx.set_materialize_grads(False)
    kept = _saved(operands, _decoded(encoded), ctx.needs, leaves)
    ctx.save_for_backward(*output[1:], *kept, *leaves)


def _library_autograd(ctx: Any, dy: Tensor, *_: Any) -> Any:
    fields = len(_Operands._fields)
    z, statistics, *saved = ctx.saved_tensors
    operands, leaves = saved[:fields], saved[fields:]
    grads: list[Tensor | None] = [None] * _DIFFERENTIABLE
    if any(ctx.needs):
        given = iter(
            torch.ops.peftfast.bottleneck_backward(
                dy, z, statistics, *operands, leaves, ctx.recipe, ctx.settings, ctx.needs
            )
        )
        grads = [next(given) if need else None for need in ctx.needs]
    of_residual = dy if ctx.needs_input_grad[_Operands._fields.index("residual")] else None
    return *grads, of_residual, None, [None] * ctx.leaves, None, None, None


_library_forward.register_autograd(_library_autograd, setup_context=_setup_context)
