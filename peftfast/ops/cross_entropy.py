"""Cross-entropy of a frozen head's logits, straight from the hidden states.

Contract, checks, dispatch and autograd; the maths is in `peftfast.reference.cross_entropy`. The
gradients are computed with the losses, a chunk of rows at a time, and scaled by the incoming
gradient later: saved for the backward are d hidden and the gradients of adapters and bias, never
logits, nor hidden itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.ops import nf4, norm, recipes
from peftfast.ops.dispatch import Impl, choose, native_reasons, none, parse_impl
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
    is_traced,
    no_autocast,
    probabilities,
    shape,
)
from peftfast.ops.rebuilt import is_rebuilt
from peftfast.ops.second_order import first_order_only
from peftfast.reference import cross_entropy as reference
from peftfast.reference.cross_entropy import Needs, loss_dtype

_REDUCTIONS = ("mean", "sum", "none")
_SEED_LIMIT = (1 << 63) - 1
_VIEW_NODES = ("SliceBackward0", "ViewBackward0", "AliasBackward0")
_LEAST_ROWS = 256  # fewer make poor GEMMs
_CHUNK_BYTES = 32 << 20  # of a chunk's logits in float32
_CHUNK_BYTES_ON_GPU = 128 << 20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    lora_a: OneOrMore = (),
    lora_b: OneOrMore = (),
    scaling: Factors = (),
    dropout_p: Factors = 0.0,
    seed: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float | None = None,
    chunk_rows: int | None = None,
    through_norm: bool = False,
    impl: str | Impl = "auto",
) -> Tensor:
    """`F.cross_entropy` of a linear head's logits, which are never all in memory.

    logits = logit_scale * (hidden W^T + b + sum_i scaling_i (drop_i(hidden) A_i^T) B_i^T),
    and of those softcap * tanh(logits / softcap), where a softcap is given.

    Args:
        hidden: [..., in], any strides.
        weight: [vocabulary, in]; frozen.
        bias: [vocabulary] or None.
        target: int64 [...], in [0, vocabulary) or ignore_index.
        lora_a, lora_b, scaling, dropout_p, seed: adapters on the head, as in `lora_linear`.
        ignore_index: rows with this target have no loss and give no gradient.
        reduction: "mean" over the rows that are not ignored (nan where all are), "sum" or "none".
        softcap: positive.
        chunk_rows: how many rows' logits are held at a time; None: as many as take a few dozen MiB.
        through_norm: where hidden is the output of a frozen norm of this package, carry the
            gradient through it at once, to its input, so that neither is kept. Then hidden has no
            gradient of its own from this loss: nobody may ask for one, with hooks or
            `torch.autograd.grad`, after this call. (Hooks that are there before it are seen, and
            keep the gradient where it was.)
        impl: "auto", "native" (products in float32 where a CPU computes those faster) or
            "reference"; an explicit request never falls back.

    hidden, weight and bias have one floating dtype, each adapter that one or float32; under
    autocast hidden, weight and bias are cast as in `F.linear`. Gradients go to hidden, bias,
    lora_a and lora_b; second derivatives raise.

    Returns:
        The loss: a scalar, or with "none" of target's shape; float32, or float64 for float64.

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device is wrong, or the weight
            requires a gradient.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    x = check_input(hidden)
    head = _checked(x, weight, bias, target, lora_a, lora_b, scaling, dropout_p, seed)
    settings = _settings(head, ignore_index, reduction, softcap, logit_scale, chunk_rows)
    asked = parse_impl(impl)
    if not is_traced():
        _implementation(asked, x.device)
    if head.seed is None and any(p > 0 for p in head.dropout_p):
        seed = torch.randint(_SEED_LIMIT, (len(head.lora_a),), device=x.device)
        head = head._replace(seed=seed)
    needs = _needs(head, hidden.requires_grad)
    shared = needs.bias or any(needs.lora_a) or any(needs.lora_b)
    if not torch.is_grad_enabled() or not needs.any():
        losses, _ = _run(head, settings, _no_needs(head), None, asked)
        loss = _reduced(losses, head.target, settings)
    elif reduction == "none" and shared:
        loss = _weighted(head, hidden, settings, needs, asked)
    else:
        through = _norm_of(hidden) if needs.x and through_norm else None
        losses, grads = _run(head, settings, needs, None, asked)
        source = hidden
        if needs.x:
            grads[0] = grads[0].to(hidden.dtype).view(hidden.shape)
        if through is not None:
            source, grads[0] = through.inputs[0], through.backward(grads[0])
        wanted = _wanted(head, source, needs)
        loss = _Known.apply(settings, head.target, losses, len(grads), *grads, *wanted)
    return loss.view(target.shape) if reduction == "none" else loss


class _Head(NamedTuple):
    """Checked operands; target is flat."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scaling: list[float]
    dropout_p: list[float]
    seed: Tensor | None


class _Settings(NamedTuple):
    ignore_index: int
    reduction: str
    softcap: float | None
    logit_scale: float | None
    chunk_rows: int


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lora_a: OneOrMore,
    lora_b: OneOrMore,
    scaling: Factors,
    dropout_p: Factors,
    seed: Tensor | None,
) -> _Head:
    any_dtype = autocast_dtype(x) is not None
    check_operand(x, weight, "weight", 2, any_dtype)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight is {shape(weight)}, [vocabulary, in], and hidden is {shape(x)}: in is"
            f" {weight.shape[1]} in one, {x.shape[-1]} in the other"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight is {shape(weight)}: the vocabulary is empty")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires a gradient; this op is for frozen heads and has none")
    if bias is not None:
        check_operand(x, bias, "bias", 1, any_dtype)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias is {shape(bias)}; weight needs [{weight.shape[0]}]")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target is {got}; an int64 tensor is needed")
    if target.shape != x.shape[:-1] or target.device != x.device:
        raise ValueError(
            f"target is {shape(target)} on {target.device}; {list(x.shape[:-1])} on {x.device} is"
            " needed, an entry for each row of hidden"
        )
    a, b = as_list(lora_a, "lora_a"), as_list(lora_b, "lora_b")
    if len(a) != len(b):
        raise ValueError(f"lora_a has {len(a)} adapters and lora_b has {len(b)}")
    for i, (a_i, b_i) in enumerate(zip(a, b, strict=True)):
        at = "" if isinstance(lora_a, Tensor) else f"[{i}]"
        check_adapter(x, weight.shape[0], a_i, b_i, at, "hidden", "vocabulary")
    scales = factors(scaling, len(a), "scaling")
    drops = probabilities(dropout_p, len(a), "dropout_p")
    if seed is not None:
        check_seed(x, seed, len(a))
    return _Head(x, weight, bias, target.reshape(-1), a, b, scales, drops, seed)


def _settings(
    head: _Head,
    ignore_index: int,
    reduction: str,
    softcap: float | None,
    logit_scale: float | None,
    chunk_rows: int | None,
) -> _Settings:
    if reduction not in _REDUCTIONS:
        allowed = ", ".join(map(repr, _REDUCTIONS))
        raise ValueError(f"reduction is {reduction!r}; allowed: {allowed}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; a positive number is needed")
    if logit_scale is not None and not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale is {logit_scale}; a finite number is needed")
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(head.weight.shape[0], head.x.device)
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; at least 1 is needed")
    return _Settings(ignore_index, reduction, softcap, logit_scale, chunk_rows)


def default_chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many rows' logits are held at a time."""
    held = _CHUNK_BYTES if device.type == "cpu" else _CHUNK_BYTES_ON_GPU
    return max(_LEAST_ROWS, held // (4 * vocabulary))


def _implementation(asked: Impl, device: torch.device) -> Impl:
    def native() -> list[str]:
        if device.type != "cpu":
            return ["csrc has no part of it for a GPU"]
        return native_reasons(device)

    reasons = {Impl.NATIVE: native, Impl.REFERENCE: none}
    return choose("linear_cross_entropy", asked, (Impl.NATIVE, Impl.REFERENCE), reasons)


# Gradients asked for


def _needs(head: _Head, need_x: bool) -> Needs:
    return Needs(
        need_x,
        head.bias is not None and head.bias.requires_grad,
        [a.requires_grad for a in head.lora_a],
        [b.requires_grad for b in head.lora_b],
    )


def _no_needs(head: _Head) -> Needs:
    return Needs(False, False, [False] * len(head.lora_a), [False] * len(head.lora_b))


def _flags(needs: Needs) -> list[bool]:
    return [needs.x, needs.bias, *needs.lora_a, *needs.lora_b]


def _unflagged(flags: Sequence[bool], adapters: int) -> Needs:
    x, bias, *others = flags
    return Needs(x, bias, others[:adapters], others[adapters:])


def _wanted(head: _Head, source: Tensor, needs: Needs) -> list[Tensor]:
    """What asks for a gradient, in the order of the gradients; `source` takes that of x."""
    inputs = [source, head.bias, *head.lora_a, *head.lora_b]
    pairs = zip(inputs, _flags(needs), strict=True)
    return [one for one, need in pairs if need and one is not None]


class _Norm(NamedTuple):
    """The frozen norm that hidden came from; inputs[0] is what it normalised, with its graph."""

    kind: str
    settings: tuple[Any, ...]
    inputs: tuple[Tensor, ...]

    def backward(self, dy: Tensor) -> Tensor:
        with torch.no_grad(), no_autocast(dy):
            return norm.input_gradient(self.kind, dy, self.inputs, self.settings)


def _norm_of(hidden: Tensor) -> _Norm | None:
    """The norm that hidden is the output of, if nothing lies between them."""
    if is_traced():
        return None
    found = recipes.source(hidden, "rms_norm", "layer_norm")
    if found is None:
        return None
    kind, settings, inputs = found
    if not inputs[0].requires_grad or any(one.requires_grad for one in inputs[1:]):
        return None
    if not _is_output_of(hidden, kind):
        return None
    return _Norm(kind, settings, inputs)


def _is_output_of(hidden: Tensor, kind: str) -> bool:
    """Whether hidden, or what it is one view of, came from such a norm's node, without hooks."""
    tensors = [hidden] if hidden._base is None else [hidden, hidden._base]
    if any(one._backward_hooks or one.retains_grad for one in tensors):
        return False
    node: Any = hidden.grad_fn
    if not is_rebuilt(node, kind) and hidden._base is not None:
        node = node.next_functions[0][0] if type(node).__name__ in _VIEW_NODES else None
        if node is not hidden._base.grad_fn:
            return False
    return is_rebuilt(node, kind)


# Running: eager and compiled calls share everything but the library op around the losses.


def _run(
    head: _Head, settings: _Settings, needs: Needs, row_weights: Tensor | None, asked: Impl
) -> tuple[Tensor, list[Tensor]]:
    """Losses [M] and the gradients of their sum, each row's weighted by `row_weights`."""
    options = settings.ignore_index, settings.softcap, settings.logit_scale, settings.chunk_rows
    with torch.no_grad():
        if is_traced():
            arguments = (*head, *options, _flags(needs), row_weights, asked.value)
            losses, grads = torch.ops.peftfast.linear_cross_entropy(*arguments)
            return losses, list(grads)
        return _computed(head, *options, needs, row_weights, asked)


def _computed(
    head: _Head,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float | None,
    chunk_rows: int,
    needs: Needs,
    row_weights: Tensor | None,
    asked: Impl,
) -> tuple[Tensor, list[Tensor]]:
    x = head.x
    options: dict[str, Any] = {}
    weights: Sequence[Tensor] = [head.weight.to(x.dtype)]
    with no_autocast(x):
        if _implementation(asked, x.device) is Impl.NATIVE:
            from peftfast.native.dropout import drop

            options["drop"] = drop
            wide = nf4.gemm_dtype(x.dtype, x.device, asked)
            if wide is not None:
                options["gemm_dtype"] = wide
                weights = nf4.DenseWeights([head.weight], [x.dtype], wide, asked)
        bias = None if head.bias is None else head.bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        losses, grads = reference.chunked_cross_entropy(
            rows, weights, bias, *head[3:], ignore_index, softcap, logit_scale, chunk_rows, needs,
            row_weights, **options,
        )  # fmt: skip
    if needs.bias and head.bias is not None:
        at = int(needs.x)
        grads[at] = grads[at].to(head.bias.dtype)
    return losses, grads


def _reduced(losses: Tensor, target: Tensor, settings: _Settings) -> Tensor:
    """The loss of flat losses, which are zero where they are ignored; "none" stays flat."""
    if settings.reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64)
    if settings.reduction == "mean":
        total = total / _count(target, settings)
    return total.to(losses.dtype)


def _count(target: Tensor, settings: _Settings) -> Tensor:
    return (target != settings.ignore_index).sum()


class _Known(torch.autograd.Function):
    """The loss, reduced, with gradients that are known but for the factor of the incoming one.

    `count` gradients follow the losses, and then the inputs that they belong to.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, target: Tensor, losses: Tensor, count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.reduction = settings.reduction
        ctx.by_rows = settings.reduction == "none"
        kept = [] if settings.reduction != "mean" else [_count(target, settings)]
        ctx.save_for_backward(*kept, *tensors[:count])
        return _reduced(losses.clone(), target, settings)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        grads = list(ctx.saved_tensors)
        with torch.no_grad():
            factor = dloss
            if ctx.reduction == "mean":
                rows = grads.pop(0)
                factor = torch.where(rows > 0, dloss / rows, torch.zeros_like(dloss))
            if ctx.by_rows:
                factor = factor.view(*grads[0].shape[:-1], 1)
            scaled = [(g.to(factor.dtype) * factor).to(g.dtype) for g in grads]
        nothing = [None] * (4 + len(grads))
        return (*nothing, *first_order_only("linear_cross_entropy", scaled))


def _weighted(
    head: _Head, hidden: Tensor, settings: _Settings, needs: Needs, asked: Impl
) -> Tensor:
    losses, _ = _run(head, settings, _no_needs(head), None, asked)
    kept = recipes.keep(hidden, head.x.dtype)
    leaves = [] if kept.spec == 0 else kept.leaves
    given = head.scaling, head.dropout_p, kept.spec, head.x.dtype, len(head.lora_a)
    operands = head.seed, head.target, head.weight, hidden, head.bias, *head.lora_a, *head.lora_b
    result: Tensor = _Weighted.apply(settings, needs, asked, given, losses, *operands, *leaves)
    return result


class _Weighted(torch.autograd.Function):
    """Losses by row where a gradient is a sum over rows, with weights that only the backward knows:
    it makes the logits again.

    `given` are scaling, dropout_p, the spec of hidden's recipe, the dtype of the products and the
    number of adapters; the recipe's leaves come last.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, needs: Needs, asked: Impl, given: Any, losses: Tensor,
        seed: Tensor | None, target: Tensor, weight: Tensor, hidden: Tensor, bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.given = settings, needs, asked, *given
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        x = hidden if given[2] == 0 else None
        ctx.save_for_backward(seed, target, weight, x, bias, *tensors)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> Any:
        settings, needs, asked, scaling, dropout_p, spec, dtype, adapters = ctx.given
        seed, target, weight, x, bias, *tensors = ctx.saved_tensors
        lora_a, lora_b = tensors[:adapters], tensors[adapters : 2 * adapters]
        if x is None:
            x = recipes.rebuild(spec, tensors[2 * adapters :])
        head = _Head(x.to(dtype), weight, bias, target, lora_a, lora_b, scaling, dropout_p, seed)
        with torch.no_grad():
            _, grads = _run(head, settings, needs, dlosses, asked)
            if needs.x:
                grads[0] = grads[0].to(ctx.dtype).view(ctx.shape)
        found = iter(first_order_only("linear_cross_entropy", grads))
        every = [next(found) if need else None for need in _flags(needs)]
        leaves = len(tensors) - 2 * adapters
        return (*[None] * 8, *every, *[None] * leaves)


# The library op, around everything but autograd: what it gives includes the gradients.


@torch.library.custom_op(
    "peftfast::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor[] lora_a,"
    " Tensor[] lora_b, float[] scaling, float[] dropout_p, Tensor? seed, int ignore_index,"
    " float? softcap, float? logit_scale, int chunk_rows, bool[] needs, Tensor? row_weights,"
    " str impl) -> (Tensor, Tensor[])",
)
def _library_op(x: Tensor, *args: Any) -> Any:
    *operands, ignore_index, softcap, logit_scale, chunk_rows, flags, row_weights, impl = args
    head = _Head(x, *operands)
    needs = _unflagged(flags, len(head.lora_a))
    settings = ignore_index, softcap, logit_scale, chunk_rows
    return _computed(head, *settings, needs, row_weights, Impl(impl))


@_library_op.register_fake
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, a: Any, b: Any, *args: Any
) -> Any:
    *_, flags, _, _ = args
    values = [x.new_empty(math.prod(x.shape[:-1]), x.shape[-1])]
    values.append(weight if bias is None else bias)
    values += [*a, *b]
    found = [v.new_empty(v.shape) for v, need in zip(values, flags, strict=True) if need]
    return x.new_empty(target.shape, dtype=loss_dtype(x.dtype)), found
