"""Ops of one output that is cheaper to make again than to keep: their autograd, recipes and
library ops.

Such an op saves what its backward reads of its inputs, as recipes where they have some, and tags
its output with a recipe of its own. `Rebuilt` makes one from a forward and a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfast.ops import recipes
from peftfast.ops.operands import is_traced, no_autocast, shape
from peftfast.ops.second_order import first_order_only

Inputs = Sequence[Tensor]
Settings = tuple[Any, ...]
Forward = Callable[[Inputs, Settings], Tensor]
# dy, the inputs (None where `reads` says so), their dtypes, settings, which gradients are wanted
Backward = Callable[
    [Tensor, Sequence[Tensor | None], Sequence[torch.dtype], Settings, Sequence[bool]], list[Tensor]
]
# For each input None (not read), (0, 0) (saved itself) or a recipe's spec and number of leaves.
Layout = tuple[tuple[Any, int] | None, ...]


class Rebuilt:
    """One op; called with its checked inputs and settings.

    Args:
        kind: its name, as a recipe and in torch.ops.peftfast.
        forward: gives a new, contiguous tensor of the first input's shape; the same bits each time.
        backward: gives the gradients asked for, in the inputs' order.
        dtype: the output's, of inputs and settings.
        reads: which inputs the backward reads, of the settings and of which inputs ask for a
            gradient.
        check: raises where sizes of inputs disagree: a library op can be called by anyone, and
            kernels trust sizes.
    """

    def __init__(
        self,
        kind: str,
        forward: Forward,
        backward: Backward,
        dtype: Callable[[Inputs, Settings], torch.dtype],
        reads: Callable[[Settings, Sequence[bool]], Sequence[bool]],
        check: Callable[[Inputs, Settings], None],
    ) -> None:
        self.kind = kind
        self._forward, self._backward, self._dtype, self._reads = forward, backward, dtype, reads
        self._check = check
        recipes.builder(kind)(forward)
        self._register()

    def __call__(self, inputs: Inputs, settings: Settings, recipe: bool) -> Tensor:
        if is_traced():
            y = self._traced(inputs, settings)
        elif torch.is_grad_enabled():
            layout, leaves = self._kept(inputs, settings)
            y = _Eager.apply(self, settings, layout, len(inputs), *inputs, *leaves)
        else:
            return self.forward(inputs, settings)
        if recipe:
            recipes.tag(y, self.kind, settings, inputs)
        return y

    def forward(self, inputs: Inputs, settings: Settings) -> Tensor:
        with no_autocast(inputs[0]):
            return self._forward(inputs, settings)

    def backward(
        self,
        dy: Tensor,
        inputs: Sequence[Tensor | None],
        dtypes: Sequence[torch.dtype],
        settings: Settings,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        with torch.no_grad(), no_autocast(dy):
            return self._backward(dy, inputs, dtypes, settings, needs)

    def _kept(self, inputs: Inputs, settings: Settings) -> tuple[Layout, list[Tensor]]:
        """What to save of each input, and the leaves of those with a recipe."""
        layout: list[tuple[Any, int] | None] = []
        leaves: list[Tensor] = []
        read = self._reads(settings, [one.requires_grad for one in inputs])
        for one, wanted in zip(inputs, read, strict=True):
            if not wanted:
                layout.append(None)
                continue
            kept = recipes.keep(one)
            if kept.spec == 0:
                layout.append((0, 0))
            else:
                layout.append((kept.spec, len(kept.leaves)))
                leaves.extend(kept.leaves)
        return tuple(layout), leaves

    def _traced(self, inputs: Inputs, settings: Settings) -> Tensor:
        layout: Layout = ((0, 0),) * len(inputs)
        leaves: list[Tensor] = []
        if torch.is_grad_enabled():
            layout, leaves = self._kept(inputs, settings)
        y: Tensor = self._op(list(inputs), recipes.encode(settings), leaves, recipes.encode(layout))
        return y

    def _register(self) -> None:
        name = f"peftfast::{self.kind}"

        @torch.library.custom_op(
            name,
            mutates_args=(),
            schema="(Tensor[] inputs, str settings, Tensor[] leaves, str layout) -> Tensor",
        )
        def forward(inputs: Any, settings: str, leaves: Any, layout: str) -> Tensor:
            decoded = recipes.decode(settings)
            self._check(inputs, decoded)
            return self.forward(inputs, decoded)

        @forward.register_fake
        def _(inputs: Any, settings: str, leaves: Any, layout: str) -> Tensor:
            x: Tensor = inputs[0]
            return x.new_empty(x.shape, dtype=self._dtype(inputs, recipes.decode(settings)))

        @torch.library.custom_op(
            f"{name}_backward",
            mutates_args=(),
            schema="(Tensor dy, Tensor[] saved, str layout, str dtypes, int[] ranks,"
            " str settings, bool[] needs) -> Tensor[]",
        )
        def backward(
            dy: Tensor, saved: Any, layout: str, dtypes: str, ranks: Any, settings: str, needs: Any
        ) -> list[Tensor]:
            inputs = _restored(recipes.decode(layout), saved)
            for one, rank in zip(inputs, ranks, strict=True):
                if one is not None and one.is_floating_point() and one.shape != _last(dy, rank):
                    raise ValueError(f"dy is {shape(dy)} for an input of {shape(one)}")
            return self.backward(dy, inputs, _dtypes(dtypes), recipes.decode(settings), needs)

        @backward.register_fake
        def _(
            dy: Tensor, saved: Any, layout: str, dtypes: str, ranks: Any, settings: str, needs: Any
        ) -> list[Tensor]:
            every = zip(_dtypes(dtypes), ranks, needs, strict=True)
            return [
                dy.new_empty(_last(dy, rank), dtype=dtype) for dtype, rank, need in every if need
            ]

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            tensors, settings, leaves, layout = inputs
            ctx.settings, ctx.layout, ctx.leaves = settings, layout, len(leaves)
            ctx.needs = [one.requires_grad for one in tensors]
            ctx.dtypes = ",".join(str(one.dtype).removeprefix("torch.") for one in tensors)
            ctx.ranks = [one.ndim for one in tensors]
            ctx.save_for_backward(*_saved(recipes.decode(layout), tensors, leaves))

        gradient = getattr(torch.ops.peftfast, f"{self.kind}_backward")

        def differentiate(ctx: Any, dy: Tensor) -> Any:
            operands = ctx.layout, ctx.dtypes, ctx.ranks, ctx.settings, ctx.needs
            grads = iter(gradient(dy, list(ctx.saved_tensors), *operands))
            every = [next(grads) if need else None for need in ctx.needs]
            return every, None, [None] * ctx.leaves, None

        forward.register_autograd(differentiate, setup_context=setup_context)
        self._op = getattr(torch.ops.peftfast, self.kind)


class _Eager(torch.autograd.Function):
    """Eager autograd; the inputs follow, and the leaves of their recipes."""

    @staticmethod
    def forward(
        ctx: Any, op: Rebuilt, settings: Settings, layout: Layout, count: int, *tensors: Tensor
    ) -> Tensor:
        inputs = tensors[:count]
        ctx.op, ctx.settings, ctx.layout, ctx.tensors = op, settings, layout, len(tensors)
        ctx.needs = ctx.needs_input_grad[4 : 4 + count]
        ctx.dtypes = [one.dtype for one in inputs]
        ctx.save_for_backward(*_saved(layout, inputs, tensors[count:]))
        return op.forward(inputs, settings)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        op: Rebuilt = ctx.op
        inputs = _restored(ctx.layout, ctx.saved_tensors)
        computed = op.backward(dy, inputs, ctx.dtypes, ctx.settings, ctx.needs)
        grads = iter(first_order_only(op.kind, computed))
        given = [next(grads) if need else None for need in ctx.needs]
        return (*[None] * 4, *given, *[None] * (ctx.tensors - len(given)))


def _dtypes(names: str) -> list[torch.dtype]:
    return [getattr(torch, name) for name in names.split(",")]


def _last(dy: Tensor, rank: int) -> torch.Size:
    """The shape of an input of that many dimensions: dy's, or a row's."""
    return dy.shape[dy.ndim - rank :]


def is_rebuilt(node: Any, kind: str) -> bool:
    """Whether a node of autograd's graph is that of an op of this kind."""
    return getattr(type(node), "_forward_cls", None) is _Eager and node.op.kind == kind


def _held(entry: tuple[Any, int] | None) -> int:
    """How many saved tensors stand for an input."""
    if entry is None:
        return 0
    return entry[1] or 1


def _saved(layout: Layout, inputs: Inputs, leaves: Inputs) -> list[Tensor]:
    given = iter(leaves)
    saved: list[Tensor] = []
    for entry, one in zip(layout, inputs, strict=True):
        if entry is None:
            continue
        saved.extend([one] if entry[1] == 0 else [next(given) for _ in range(entry[1])])
    return saved


def _restored(layout: Layout, saved: Sequence[Tensor]) -> list[Tensor | None]:
    """The inputs, rebuilt where they were saved as recipes; None where they are not read."""
    given = iter(saved)
    inputs: list[Tensor | None] = []
    for entry in layout:
        leaves = [next(given) for _ in range(_held(entry))]
        inputs.append(None if entry is None else recipes.rebuild(entry[0], leaves))
    return inputs
