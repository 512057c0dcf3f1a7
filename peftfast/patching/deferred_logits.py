"""Logits that are made when somebody reads them, and whose cross-entropy needs none.

A `DeferredLogits` is a tensor without storage: the output of an autograd node over the head's
input, whose values are computed when an operator asks for them. Autograd sees an ordinary tensor,
so whatever is done with it has the gradients that it always had: hooks, views, changes in place,
autograd.Functions. Casts, views, slices of rows, factors and tanh give deferred logits again;
`F.cross_entropy` of those is answered by `peftfast.ops.cross_entropy` from the head's input.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from peftfast.ops import lora_linear
from peftfast.ops.cross_entropy import linear_cross_entropy
from peftfast.ops.operands import autocast_dtype

_aten = torch.ops.aten
_CAST = _aten._to_copy.default
_FACTORS = (_aten.mul.Tensor, _aten.div.Tensor)
_TANH = _aten.tanh.default
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)
_SLICES = (_aten.slice.Tensor, _aten.select.int)
_SAME = (_aten.detach.default, _aten.alias.default, _aten.clone.default)
_LAZY = {_CAST, *_FACTORS, _TANH, *_VIEWS, *_SLICES, *_SAME}

# Backward nodes of those, as autograd names them: what may lie between the head and a loss.
_NODES = {
    "ToCopyBackward0", "MulBackward0", "DivBackward0", "TanhBackward0", "ViewBackward0",
    "UnsafeViewBackward0", "ReshapeAliasBackward0", "SliceBackward0", "SelectBackward0",
    "AliasBackward0", "CloneBackward0",
}  # fmt: skip

# Read memory directly, or are for plain tensors only.
_READS = {
    Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.__dlpack__,
    Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.__repr__, Tensor.__format__,
    Tensor.share_memory_, Tensor.storage, Tensor.data.__get__,  # type: ignore[attr-defined]
}  # fmt: skip


@dataclasses.dataclass
class Record:
    """What a head's losses came to: how many were computed without logits, how often logits were
    made all the same, and how often the head ran as it is, by reason.

    `around` is what was found of the modules around the norm before the head.
    """

    impl: str
    fused: int = 0
    made: int = 0
    plain: dict[str, int] = dataclasses.field(default_factory=dict)
    around: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"impl": self.impl, "fused": 0, "made": 0, "plain": {}}


class Head(NamedTuple):
    """A frozen linear's parameters, with the adapters that are active on it."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Sequence[Tensor] = ()
    lora_b: Sequence[Tensor] = ()
    scaling: Sequence[float] = ()
    dropout_p: Sequence[float] = ()

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight, self.bias, *self.lora_a, *self.lora_b) if t is not None]

    def trained(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors() if tensor.requires_grad]


def defer(hidden: Tensor, head: Head, record: Record, through_norm: bool = False) -> DeferredLogits:
    """The logits of a head, deferred; hidden is [..., in].

    `through_norm` is that of `linear_cross_entropy`: nobody will ask for the gradient of hidden.
    """
    source = _Source(hidden.detach(), head, record, through_norm)
    logits: DeferredLogits = _Defer.apply(source, hidden, *head.trained())
    return logits


def made(logits: DeferredLogits) -> Tensor:
    """The logits as a plain tensor in the graph of the deferred ones."""
    plain: Tensor = _Make.apply(logits)
    return plain


class _Source:
    """What logits are made of; `hidden` is without its graph, which the node of `_Defer` has.

    What an optimiser may change before they are read is copied: adapters and bias, which are small.
    Nothing else may change.
    """

    def __init__(self, hidden: Tensor, head: Head, record: Record, through_norm: bool) -> None:
        self.hidden, self.head, self.record = hidden, head, record
        self.through_norm = through_norm
        self.kept = Head(
            head.weight,
            None if head.bias is None else _copied(head.bias),
            [_copied(a) for a in head.lora_a],
            [_copied(b) for b in head.lora_b],
            head.scaling,
            head.dropout_p,
        )
        self.seed = None
        if any(p > 0 for p in head.dropout_p):
            adapters = len(head.lora_a)
            self.seed = torch.randint((1 << 63) - 1, (adapters,), device=hidden.device)
        self.autocast = autocast_dtype(hidden)
        self.dtype = self.autocast or hidden.dtype
        self.fused = 0
        self.watched = False
        self.pending: weakref.WeakSet[_Cell] = weakref.WeakSet()
        self._versions = [tensor._version for tensor in (hidden, *head.tensors())]

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]

    def unchanged(self) -> bool:
        tensors = (self.hidden, *self.head.tensors())
        return self._versions == [tensor._version for tensor in tensors]

    def logits(self, hidden: Tensor, head: Head) -> Tensor:
        """The logits, by the head's own operations, as they would have been at once."""
        with torch.autocast(hidden.device.type, self.autocast, self.autocast is not None):
            if head.lora_a:
                return lora_linear(
                    hidden, head.weight, head.bias, head.lora_a, head.lora_b, head.scaling,
                    dropout_p=head.dropout_p, seed=self.seed, impl=self.record.impl,
                )  # fmt: skip
            bias = None if head.bias is None else head.bias.to(self.dtype)
            return F.linear(hidden.to(self.dtype), head.weight.to(self.dtype), bias)

    def values(self) -> Tensor:
        read = [self.hidden, *(t for t in self.head.tensors() if not t.requires_grad)]
        known = zip((self.hidden, *self.head.tensors()), self._versions, strict=True)
        changed = any(t._version != version for t, version in known if any(t is r for r in read))
        freed = any(tensor.untyped_storage().nbytes() == 0 for tensor in read)
        if changed or freed:
            raise RuntimeError(
                f"logits were read after the head's input or a frozen parameter of it was"
                f" {'changed in place' if changed else 'freed'}; read them before that, or patch"
                " the model with exclude=[the head's name]"
            )
        self.record.made += 1
        with torch.inference_mode(False), torch.no_grad():
            return self.logits(self.hidden.detach(), self.kept)

    def settle(self) -> None:
        """Compute whatever is deferred still: a change in place is to come."""
        for cell in list(self.pending):
            cell.values()


def _copied(value: Tensor) -> Tensor:
    return value.detach().clone() if value.requires_grad else value


class _Cell:
    """The values of one deferred tensor: those of its source, or of another with one op applied."""

    def __init__(
        self,
        source: _Source,
        like: Tensor,
        parent: _Cell | None = None,
        func: Any = None,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.source, self.like, self.parent = source, like, parent
        self.func, self.args, self.kwargs = func, args, kwargs or {}
        self._values: Tensor | None = None
        source.pending.add(self)

    @property
    def is_pending(self) -> bool:
        return self._values is None

    def values(self) -> Tensor:
        if self._values is None:
            if self.parent is None:
                self._values = self.source.values()
            else:
                self._values = self.func(self.parent.values(), *self.args, **self.kwargs)
            self.parent = None
            self.source.pending.discard(self)
        return self._values

    def then(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> _Cell:
        """With one more op applied."""
        without = {name: value for name, value in kwargs.items() if name != "device"}
        return _Cell(self.source, func(self.like, *args, **without), self, func, args, kwargs)

    def chain(self) -> list[_Cell]:
        """The cells from the first after the source's to this one."""
        cells: list[_Cell] = []
        cell: _Cell | None = self
        while cell is not None and cell.parent is not None:
            cells.append(cell)
            cell = cell.parent
        return cells[::-1]


class DeferredLogits(Tensor):
    """Logits without storage, which are computed when somebody reads them."""

    cell: _Cell

    @staticmethod
    def __new__(cls, cell: _Cell) -> DeferredLogits:
        like = cell.like
        with torch._C.DisableTorchFunction():  # the true device, where tensors pass for others
            device = cell.source.hidden.device
        self: DeferredLogits = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=device,
            storage_size=0,
        )
        self.cell = cell
        return self

    def __init__(self, cell: _Cell) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            loss = _fused_loss(*args, **kwargs)
            if loss is not None:
                return loss
        elif func in _READS:
            return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        elif func in (Tensor.register_hook, Tensor.retain_grad):
            _watch(args[0].cell.source, *args[1:], *kwargs.values())
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _stays_deferred(func, args, kwargs):
            return DeferredLogits(args[0].cell.then(func, args[1:], kwargs))
        deferred = [one for one in tree_leaves((args, kwargs)) if isinstance(one, DeferredLogits)]
        changes = func._schema.is_mutable
        if changes:
            for one in deferred:
                one.cell.source.settle()
        outputs = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        if not changes:
            return outputs
        own = {id(one.cell.values()): one for one in deferred}
        return tree_map(lambda output: own.get(id(output), output), outputs)


def _plain(value: Any) -> Any:
    return made(value) if isinstance(value, DeferredLogits) else value


def _values(value: Any) -> Any:
    return value.cell.values() if isinstance(value, DeferredLogits) else value


def _watch(source: _Source, hook: Any = None) -> None:
    """Somebody wants to see the gradient of logits, with a hook or by `retain_grad`: a loss to come
    has to give it.

    FSDP's hooks on all that a model returns are let be after the loss: they are called for the loss
    as well.
    """
    hook = hook.func if isinstance(hook, functools.partial) else hook
    by_torch = (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")
    if source.fused and not by_torch:
        raise RuntimeError(
            "the loss was computed without the logits, so no gradient passes through them: watch"
            " them before the loss is computed, or patch the model with exclude=[the head's name]"
        )
    source.watched = True


def _stays_deferred(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if func not in _LAZY or not isinstance(args[0], DeferredLogits):
        return False
    cell = args[0].cell
    if not cell.is_pending:
        return False
    if func in _FACTORS:
        return isinstance(args[1], (int, float)) and not kwargs
    if func is _CAST:
        device = kwargs.get("device")
        dtype = kwargs.get("dtype") or cell.like.dtype
        here = device is None or torch.device(device) == cell.source.hidden.device
        return here and dtype.is_floating_point
    return True


class _Defer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: _Source, hidden: Tensor, *trained: Tensor) -> DeferredLogits:
        ctx.source, ctx.hidden = source, hidden
        shape = (*hidden.shape[:-1], source.vocabulary)
        return DeferredLogits(_Cell(source, torch.empty(shape, dtype=source.dtype, device="meta")))

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Any:
        source: _Source = ctx.source
        kept = source.kept
        if not source.head.trained():
            rows = dlogits.reshape(-1, dlogits.shape[-1]) @ kept.weight.to(dlogits.dtype)
            return None, rows.view(source.hidden.shape).to(source.hidden.dtype)
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            hidden = source.hidden.detach().requires_grad_(ctx.needs_input_grad[1])
            copies = {
                id(own): copy.detach().requires_grad_(own.requires_grad)
                for own, copy in zip(source.head.tensors(), kept.tensors(), strict=True)
            }
            a, b = ([copies[id(t)] for t in ts] for ts in (source.head.lora_a, source.head.lora_b))
            bias = source.head.bias
            head = kept._replace(
                bias=None if bias is None else copies[id(bias)], lora_a=a, lora_b=b
            )
            logits = source.logits(hidden, head)
            inputs = [hidden, *(copies[id(t)] for t in source.head.trained())]
            asking = [t for t in inputs if t.requires_grad]
            grads = iter(torch.autograd.grad(logits, asking, dlogits, create_graph=again))
        return None, *(next(grads) if t.requires_grad else None for t in inputs)


class _Make(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits) -> Tensor:
        return logits.cell.values().detach()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Tensor:
        return dlogits


# The loss


def _fused_loss(
    logits: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`F.cross_entropy` of deferred logits without making them; None where that can't be."""
    if type(logits) is not DeferredLogits or not logits.cell.is_pending:
        return None
    given = (weight, size_average, reduce)
    if any(one is not None for one in given) or label_smoothing or torch.compiler.is_compiling():
        return None
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or logits.ndim != 2:
        return None
    source, chain = logits.cell.source, logits.cell.chain()
    if target.shape != logits.shape[:1] or target.device != logits.device or source.watched:
        return None
    transform = _transform(chain)
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    if transform is None or not source.unchanged():
        return None
    node = _node_of(logits.grad_fn, source) if differentiable else None
    if differentiable and node is None:
        return None
    with torch.set_grad_enabled(differentiable):
        hidden = _rows(source.hidden if node is None else node.hidden, chain)
        if hidden is None:
            return None
        head = source.head
        with torch.autocast(hidden.device.type, source.autocast, source.autocast is not None):
            loss = linear_cross_entropy(
                hidden,
                head.weight,
                head.bias,
                target.view(hidden.shape[:-1]),
                lora_a=head.lora_a,
                lora_b=head.lora_b,
                scaling=head.scaling,
                dropout_p=head.dropout_p or 0.0,
                seed=source.seed,
                ignore_index=ignore_index,
                reduction=reduction,
                softcap=transform.softcap,
                logit_scale=transform.logit_scale,
                through_norm=source.through_norm,
                impl=source.record.impl,
            )
        source.fused += 1
        source.record.fused += 1
        return loss.view(target.shape if reduction == "none" else ()).to(_loss_dtype(logits))


def _loss_dtype(logits: Tensor) -> torch.dtype:
    """What `F.cross_entropy` gives: autocast computes it in float32."""
    kind = logits.device.type
    autocasts = logits.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.float32 if autocasts else logits.dtype


class _Transform(NamedTuple):
    logit_scale: float | None
    softcap: float | None


def _transform(chain: Sequence[_Cell]) -> _Transform | None:
    """The factors and the tanh of a chain: factor * l, or cap * tanh(factor / cap * l)."""
    before, after, capped = 1.0, 1.0, False
    for cell in chain:
        if cell.func is _TANH:
            if capped:
                return None
            capped = True
        elif cell.func in _FACTORS:
            (number,) = cell.args
            if number == 0 and cell.func is _aten.div.Tensor:
                return None
            factor = number if cell.func is _aten.mul.Tensor else 1 / number
            before, after = (before, after * factor) if capped else (before * factor, after)
    if not capped:
        return _Transform(None if before == 1.0 else before, None)
    scale = before * after
    if not after > 0 or not math.isfinite(after) or not math.isfinite(scale):
        return None
    return _Transform(None if math.isclose(scale, 1.0, rel_tol=1e-12) else scale, after)


def _rows(hidden: Tensor, chain: Sequence[_Cell]) -> Tensor | None:
    """The head's inputs that belong to the rows of a chain's logits; None where rows are cut."""
    features = hidden.shape[-1]
    for cell in chain:
        assert cell.parent is not None
        before, after = cell.parent.like.shape, cell.like.shape
        if len(after) == 0 or before[-1] != after[-1]:
            return None
        if cell.func not in _SLICES:
            continue
        dim = cell.args[0] if cell.args else 0
        if dim % len(before) == len(before) - 1:
            return None
        hidden = cell.func(hidden.reshape(*before[:-1], features), *cell.args, **cell.kwargs)
    return hidden


def _node_of(node: Any, source: _Source) -> Any:
    """The head's node, if nothing but what the chain does lies between `node` and it."""
    while type(node).__name__ in _NODES:
        node = node.next_functions[0][0]
    return node if getattr(node, "source", None) is source else None
