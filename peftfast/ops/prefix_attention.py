"""Attention over learned rows before the sequence's keys and values, without concatenating them.

Contract, checks, dispatch and autograd; the maths is in `peftfast.reference.prefix_attention`, the
kernels in `peftfast_kernels.prefix_attention`. Saved for the backward: q, k, v, the output, the
merged log-sum-exp [B, Hq, S], the prefix as it was given, masks, sinks, gate and seed; never
probabilities, nor anything of the prefix's size for each row of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.ops import recipes
from peftfast.ops.dispatch import Impl, choose, none, parse_impl, triton_reasons
from peftfast.ops.dropout import check_one_seed, draw_seed, probability
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
from peftfast.reference import prefix_attention as reference

FORMS = reference.FORMS
_WIDEST = 256  # the largest head size of the kernels


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    gate: Tensor | None = None,
    form: str = "softmax",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: str | Impl = "auto",
) -> Tensor:
    """Attention over a prefix and a sequence.

    y = softmax(scale q [prefix_k; k]^T + masks) [prefix_v; v], as over the concatenation, which is
    never made (Li & Liang, "Prefix-Tuning", ACL 2021, section 4; Liu et al., "P-Tuning v2", ACL
    2022, section 3).

    Args:
        q: [B, Hq, S, D]; k: [B, Hkv, T, D]; v: [B, Hkv, T, Dv], Hq a multiple of Hkv. S and T need
            not agree: a cache, cross-attention, one query.
        prefix_k, prefix_v: [Hkv, P, D] and [Hkv, P, Dv], of every row of the batch; or
            [N, Hkv, P, D] and [N, Hkv, P, Dv]. P is at least 1.
        attn_mask: of the sequence's keys, broadcastable to [B, Hq, S, T]: bool, true where a query
            attends, or floating, which is added to the scores. No gradient goes to it.
        prefix_mask: the same of the prefix, [B, Hq, S, P]; None: every query sees it.
        is_causal: query i sees key j where j <= i + T - S: the last query sees all. May stand
            beside attn_mask.
        scale: of the products; None: D ** -0.5.
        window: a query sees what is less than that many positions before it; the prefix's rows
            have the positions just before the sequence.
        softcap: c: scores are c tanh(scores / c) before masks.
        sinks: [Hq], a further logit of each head, in the denominator only.
        prefix_index: int [B], which prefix a row of the batch has, -1 for none. Values of N and
            above are not checked (a check would wait for the device): they are undefined.
        prefix_lengths: int [N], how many rows of each prefix count, from its first on; in [0, P],
            which is not checked either.
        gate: [B], [B, 1, 1] or one element: what the prefix's keys and values are multiplied by
            (Mao et al., "UniPELT", ACL 2022, section 3.2).
        form: "softmax"; or "relu": attention over k and v alone, plus
            gate * relu(q prefix_k^T) prefix_v (He et al., ICLR 2022, section 3.3: the multi-head
            parallel adapter); scale, masks, window, softcap and dropout are not the prefix's then.
        dropout_p: probability in [0, 1] with which probabilities are dropped, rounded to a multiple
            of 2**-16. It always drops: pass 0.0 to evaluate.
        seed: int64 [1] on q's device, from which the mask follows, by the element of
            [B, Hq, S, P + T]; None draws it from torch's generator of that device.
        impl: "auto", "triton" or "reference"; an explicit request never falls back.

    q, k and v have one dtype, the prefix that or, over 16 bits, float32. Under autocast q, k and v
    are cast as SDPA's would be. Where a query sees nothing of the sequence it attends to the
    prefix; where it sees nothing at all, its output and gradients are zero. Gradients go to q, k,
    v, the prefix, sinks and gate, each in its own dtype, those of the prefix summed in float32 in
    a fixed order; second derivatives and batched gradients raise.

    Returns:
        [B, Hq, S, Dv] in q's dtype, dense as [B, S, Hq, Dv].

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device is wrong, or a mask asks
            for a gradient; the message names it.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    if isinstance(q, Tensor) and (dtype := autocast_dtype(q)) is not None:
        q, k, v, prefix_k, prefix_v = _autocast(dtype, q, k, v, prefix_k, prefix_v)
    if isinstance(prefix_k, Tensor) and prefix_k.ndim == 3:
        prefix_k = prefix_k[None]
    if isinstance(prefix_v, Tensor) and prefix_v.ndim == 3:
        prefix_v = prefix_v[None]
    operands = _Operands(
        q, k, v, prefix_k, prefix_v, sinks, gate,
        attn_mask, prefix_mask, prefix_index, prefix_lengths, seed,
    )  # fmt: skip
    settings = _Settings(
        bool(is_causal),
        constant(_number(scale, "scale")) if scale is not None else 0.0,
        _window(window),
        None if softcap is None else constant(_number(softcap, "softcap")),
        form,
        probability(dropout_p, "dropout_p"),
        parse_impl(impl).value,
    )
    _check_tensors(operands)
    if scale is None:
        settings = settings._replace(scale=q.shape[-1] ** -0.5)
    operands = operands._replace(
        gate=_gate(gate, q), attn_mask=_mask(attn_mask), prefix_mask=_mask(prefix_mask)
    )
    if form == "relu":
        operands = operands._replace(prefix_mask=None)
    _check_sizes(operands, settings)
    if settings.dropout_p == 0.0:
        operands = operands._replace(seed=None)
    elif seed is None:
        operands = operands._replace(seed=draw_seed(q))
    return _run(operands, settings)


class _Operands(NamedTuple):
    """The tensors; the first seven are those that the backward gives gradients of."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor  # [N, Hkv, P, D]
    prefix_v: Tensor
    sinks: Tensor | None
    gate: Tensor | None  # [B]
    attn_mask: Tensor | None  # four dimensions
    prefix_mask: Tensor | None
    prefix_index: Tensor | None
    prefix_lengths: Tensor | None
    seed: Tensor | None


class _Settings(NamedTuple):
    is_causal: bool
    scale: float
    window: int | None
    softcap: float | None
    form: str
    dropout_p: float
    impl: str


_DIFFERENTIABLE = len(reference.GRADIENTS)


def _autocast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """q, k, v and the prefix's two as autocast casts them; a float32 prefix stays as it is."""
    kept = {torch.float32, dtype}
    cast = [one.to(dtype) if isinstance(one, Tensor) else one for one in tensors[:3]]
    for one in tensors[3:]:
        cast.append(one.to(dtype) if isinstance(one, Tensor) and one.dtype not in kept else one)
    return cast


def _number(value: Any, name: str) -> float:
    return factors(value, 1, name)[0]


def _window(window: Any) -> int | None:
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"window is {type(window).__name__}; an integer or None is needed")
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    return int(window)


def _gate(gate: Tensor | None, q: Tensor) -> Tensor | None:
    if gate is None:
        return None
    batch = q.shape[0]
    if gate.numel() == 1:
        return gate.reshape(1).expand(batch)
    if gate.shape not in ((batch,), (batch, 1, 1)):
        raise ValueError(f"gate is {shape(gate)}; [{batch}], [{batch}, 1, 1] or one element is one")
    return gate.reshape(batch)


def _mask(mask: Tensor | None) -> Tensor | None:
    """A mask with four dimensions, those that it is expanded along of size 1."""
    if mask is None:
        return None
    if mask.ndim > 4:
        raise ValueError(f"a mask is {shape(mask)}; at most four dimensions are possible")
    mask = mask[(None,) * (4 - mask.ndim)]
    if torch.compiler.is_compiling():
        return mask
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if stride == 0 and size > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _check_tensors(operands: _Operands) -> None:
    """Hold every operand to its type, and to q's device."""
    required = ("q", "k", "v", "prefix_k", "prefix_v")
    others = ("prefix_index", "prefix_lengths", "attn_mask", "prefix_mask")
    tensors: Any = operands[:-1]
    for name, value in zip(operands._fields[:-1], tensors, strict=True):
        if value is None and name not in required:
            continue
        if name not in others:
            check_dense(value, name)
        elif not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; a tensor is needed")
        elif "mask" in name and not (value.dtype == torch.bool or value.is_floating_point()):
            raise TypeError(f"{name} is {value.dtype}; bool or a floating dtype is needed")
        elif "mask" not in name and value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {value.dtype}; int32 or int64 is needed")
        if value.device != operands.q.device:
            raise ValueError(f"{name} is on {value.device}, q is on {operands.q.device}")
        if "mask" in name and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which a mask does not get: detach it")
    for name in ("q", "k", "v"):
        if getattr(operands, name).ndim != 4:
            raise ValueError(f"{name} is {shape(getattr(operands, name))}; [B, H, S, D] is needed")


def _check(operands: _Operands, settings: _Settings) -> None:
    """Every check: a library op can be called by anyone, and kernels trust sizes."""
    _check_tensors(operands)
    _check_sizes(operands, settings)


def _check_sizes(operands: _Operands, settings: _Settings) -> None:
    """Hold shapes, dtypes and choices to each other."""
    q, k, v, prefix_k, prefix_v, *_ = operands
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    if width < 1:
        raise ValueError(f"q is {shape(q)}; a head size of at least 1 is needed")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k is {shape(k)}; q {shape(q)} needs [{batch}, Hkv, T, {width}]")
    groups = k.shape[1]
    if groups < 1 or heads % groups:
        raise ValueError(
            f"k has {groups} heads, q {heads}: those of q must be a multiple of those of k"
        )
    if v.shape[:3] != k.shape[:3] or v.shape[3] < 1:
        raise ValueError(f"v is {shape(v)}; k {shape(k)} needs {[batch, groups, keys]} + [Dv]")
    for name, one, size in (("prefix_k", prefix_k, width), ("prefix_v", prefix_v, v.shape[3])):
        if one.ndim != 4 or one.shape[1] != groups or one.shape[3] != size:
            given = shape(one[0] if one.ndim == 4 and one.shape[0] == 1 else one)
            raise ValueError(
                f"{name} is {given}; k {shape(k)} and v {shape(v)} need [{groups}, P, {size}] or"
                f" [N, {groups}, P, {size}]"
            )
    if prefix_k.shape[:3] != prefix_v.shape[:3]:
        raise ValueError(
            f"prefix_v is {shape(prefix_v)}, prefix_k {shape(prefix_k)}: N or P differ"
        )
    count, _, rows, _ = prefix_k.shape
    if rows < 1 or count < 1:
        raise ValueError(f"prefix_k is {shape(prefix_k)}; N and P of at least 1 are needed")
    if count > 1 and operands.prefix_index is None:
        raise ValueError(
            f"prefix_index is None, and prefix_k {shape(prefix_k)} holds {count} prefixes: say"
            " which one each row of the batch has"
        )
    vectors = {"prefix_index": batch, "prefix_lengths": count, "sinks": heads, "gate": batch}
    for name, size in vectors.items():
        one = getattr(operands, name)
        if one is not None and one.shape != (size,):
            raise ValueError(f"{name} is {shape(one)}; [{size}] is needed")
    for name, last in (("attn_mask", keys), ("prefix_mask", rows)):
        mask, target = getattr(operands, name), (batch, heads, queries, last)
        if mask is None:
            continue
        sizes = zip(mask.shape, target, strict=False)
        if mask.ndim != 4 or any(size not in (1, wanted) for size, wanted in sizes):
            raise ValueError(f"{name} is {shape(mask)}, which does not broadcast to {list(target)}")
    for name, one in (("k", k), ("v", v)):
        if one.dtype != q.dtype:
            raise TypeError(f"{name} is {one.dtype}, q is {q.dtype}: they must agree")
    if prefix_v.dtype != prefix_k.dtype:
        raise TypeError(f"prefix_v is {prefix_v.dtype}, prefix_k is {prefix_k.dtype}")
    narrow = q.dtype.itemsize <= 2
    if prefix_k.dtype != q.dtype and not (narrow and prefix_k.dtype == torch.float32):
        raise TypeError(
            f"prefix_k is {prefix_k.dtype}, q is {q.dtype}: they must agree, but for a float32"
            " prefix over 16 bits"
        )
    if settings.form not in FORMS:
        raise ValueError(f"form is {settings.form!r}; allowed: {', '.join(map(repr, FORMS))}")
    if settings.softcap is not None and not settings.softcap > 0:
        raise ValueError(f"softcap is {settings.softcap}; a positive number or None is needed")
    if operands.seed is not None:
        check_one_seed(q, operands.seed)


# Running: eager calls go through an autograd.Function, compiled ones through the library op; both
# call `_forward` and `_backward`.


def _run(operands: _Operands, settings: _Settings) -> Tensor:
    if is_traced():
        return torch.ops.peftfast.prefix_attention(*operands, recipes.encode(tuple(settings)))[0]
    if not torch.is_grad_enabled() or not any(_asks(operands)):
        return _forward(operands, settings)[0]
    y: Tensor = _Eager.apply(settings, *operands)
    recipes.mark_saved(y)
    return y


def _implementation(operands: _Operands, settings: _Settings) -> Impl:
    """Who serves a call; a compiled graph asks when it runs.

    Whether one kernel reads the prefix and then the sequence, or the prefix is merged into torch's
    own attention over the sequence, is the implementation's: `tiles.prefix_attention_plan` says it
    of Triton's, `serves_sequence` of the reference.
    """
    q, v, prefix = operands.q, operands.v, operands.prefix_k

    def triton() -> list[str]:
        dtypes = {q.dtype, prefix.dtype}
        reasons = next(filter(None, (triton_reasons(q.device, one) for one in dtypes)), [])
        if q.shape[-1] != v.shape[-1]:
            reasons = [*reasons, f"v has heads of {v.shape[-1]}, q and k of {q.shape[-1]}"]
        if q.shape[-1] > _WIDEST:
            reasons = [*reasons, f"the head size is {q.shape[-1]}; a kernel holds {_WIDEST}"]
        return reasons

    reasons = {Impl.TRITON: triton, Impl.REFERENCE: none}
    order = (Impl.TRITON, Impl.REFERENCE) if q.device.type == "cuda" else (Impl.REFERENCE,)
    return choose("prefix_attention", Impl(settings.impl), order, reasons)


def _module(operands: _Operands, settings: _Settings) -> Any:
    """The functions of the implementation that serves."""
    if _implementation(operands, settings) is Impl.TRITON:
        from peftfast_kernels import prefix_attention as kernels

        return kernels
    return reference


def _shared(operands: _Operands, settings: _Settings) -> dict[str, Any]:
    """The arguments by name that forward and backward share."""
    names = _Operands._fields[5:]
    given = dict(zip(names, operands[5:], strict=True))
    return given | dict(zip(_Settings._fields[:-1], settings[:-1], strict=True))


def _forward(operands: _Operands, settings: _Settings) -> tuple[Tensor, Tensor]:
    """y [B, Hq, S, Dv] and the log-sum-exp [B, Hq, S]."""
    with torch.no_grad(), no_autocast(operands.q):
        serving = _module(operands, settings)
        made: tuple[Tensor, Tensor] = serving.prefix_attention_forward(
            *operands[:5], **_shared(operands, settings)
        )
    return made


def _backward(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    operands: _Operands,
    settings: _Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients asked for, in the order of `reference.GRADIENTS`."""
    if is_batched([dy]):
        raise RuntimeError(
            "peftfast.ops.prefix_attention has no batched gradients (is_grads_batched, vmap): ask"
            " for one gradient at a time"
        )
    with torch.no_grad(), no_autocast(operands.q):
        serving = _module(operands, settings)
        grads = serving.prefix_attention_backward(
            dy, *operands[:5], y, lse, needs=needs, **_shared(operands, settings)
        )
        asked = [one for one, need in zip(operands, needs, strict=False) if need]
        return [
            grad.to(one.dtype) for grad, one in zip(grads, asked, strict=True) if one is not None
        ]


def _saved(operands: _Operands, form: str, needs: Sequence[bool]) -> _Operands:
    """The operands as the backward takes them: without what k and v hold where only gradients of
    the prefix are wanted. (Those of sinks need what the softmax gives, which beside the form "relu"
    is made anew.)
    """
    if any(needs[:3]) or (form == "relu" and needs[reference.GRADIENTS.index("sinks")]):
        return operands
    held = {name: getattr(operands, name) for name in ("k", "v")}
    return operands._replace(**{k: v.new_empty(()).expand(v.shape) for k, v in held.items()})


def _asks(operands: _Operands) -> list[bool]:
    return [one is not None and one.requires_grad for one in operands[:_DIFFERENTIABLE]]


class _Eager(torch.autograd.Function):
    """Eager autograd."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *tensors: Any) -> Tensor:
        operands = _Operands(*tensors)
        y, lse = _forward(operands, settings)
        ctx.settings, ctx.needs = settings, ctx.needs_input_grad[1 : 1 + _DIFFERENTIABLE]
        ctx.save_for_backward(y, lse, *_saved(operands, settings.form, ctx.needs))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, lse, *saved = ctx.saved_tensors
        operands = _Operands(*saved)
        computed = _backward(dy, y, lse, operands, ctx.settings, ctx.needs)
        given = iter(first_order_only("prefix_attention", computed))
        grads = [next(given) if need else None for need in ctx.needs]
        return None, *grads, *[None] * (len(operands) - _DIFFERENTIABLE)


# The library op.

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? sinks, Tensor? gate,"
    " Tensor? attn_mask, Tensor? prefix_mask, Tensor? prefix_index, Tensor? prefix_lengths,"
    " Tensor? seed"
)


def _decoded(settings: str) -> _Settings:
    return _Settings(*recipes.decode(settings))


@torch.library.custom_op(
    "peftfast::prefix_attention",
    mutates_args=(),
    schema=f"({_OPERANDS}, str settings) -> (Tensor, Tensor)",
)
def _library_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, encoded = arguments
    operands, settings = _Operands(*tensors), _decoded(encoded)
    _check(operands, settings)
    return _forward(operands, settings)


@_library_forward.register_fake
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, _, v, *_ = arguments
    batch, heads, queries, _ = q.shape
    width = v.shape[-1]
    strides = (queries * heads * width, width, heads * width, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty_strided((batch, heads, queries, width), strides),
        q.new_empty((batch, heads, queries), dtype=wide),
    )


@torch.library.custom_op(
    "peftfast::prefix_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor y, Tensor lse, {_OPERANDS}, str settings, bool[] needs)"
    " -> Tensor[]",
)
def _library_backward(dy: Tensor, y: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, encoded, needs = arguments
    operands, settings = _Operands(*tensors), _decoded(encoded)
    _check(operands, settings)
    size = (*operands.q.shape[:3], operands.v.shape[3])
    shapes = {"dy": (dy, size), "y": (y, size), "lse": (lse, size[:3])}
    for name, (value, wanted) in shapes.items():
        if value.shape != wanted:
            raise ValueError(f"{name} is {shape(value)}; {list(wanted)} is needed")
    grads = _backward(dy, y, lse, operands, settings, needs)
    return [grad.contiguous() for grad in grads]


@_library_backward.register_fake
def _fake_backward(dy: Tensor, y: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    tensors, needs = arguments[:_DIFFERENTIABLE], arguments[-1]
    return [one.new_empty(one.shape) for one, need in zip(tensors, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, encoded = inputs
    operands = _Operands(*tensors)
    ctx.needs, ctx.settings = _asks(operands), encoded
    ctx.save_for_backward(*output, *_saved(operands, _decoded(encoded).form, ctx.needs))


def _library_autograd(ctx: Any, dy: Tensor, *_: Any) -> Any:
    y, lse, *saved = ctx.saved_tensors
    given = iter(
        torch.ops.peftfast.prefix_attention_backward(dy, y, lse, *saved, ctx.settings, ctx.needs)
    )
    grads = [next(given) if need else None for need in ctx.needs]
    return *grads, *[None] * (len(saved) - _DIFFERENTIABLE + 1)


_library_forward.register_autograd(_library_autograd, setup_context=_setup_context)
