"""Bytes that one call of a PyTorch operator moves: what it reads and what it writes, each once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

# They hand out memory and write none of it.
_ALLOCATING = frozenset(
    {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
)
# They describe a tensor, or move a view onto other memory.
_METADATA = frozenset({"set_", "resize_", "record_stream", "is_pinned", "is_same_size"})
# In-place, and what was there before does not matter.
_OVERWRITING = frozenset(
    {
        "bernoulli_",
        "copy_",
        "exponential_",
        "fill_",
        "normal_",
        "random_",
        "uniform_",
        "zero_",
    }
)

Interval = tuple[int, int, int]


def _elements(tensor: torch.Tensor) -> tuple[int, int]:
    """(distinct elements, elements from the first to the last) of a strided tensor."""
    if tensor.numel() == 0:
        return 0, 0
    span, distinct = 1, 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        span += (size - 1) * stride
        if stride != 0:
            distinct *= size
    return min(distinct, span), span


def distinct_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory behind `tensor`: an expanded dimension counts once.

    Raises:
        TypeError: a layout other than strided.
    """
    if tensor.layout != torch.strided:
        raise TypeError(f"only strided tensors are counted, got layout {tensor.layout}")
    return _elements(tensor)[0] * tensor.element_size()


def _interval(tensor: torch.Tensor) -> Interval:
    """The same for two views of the same elements, such as a matrix and its transpose."""
    distinct, span = _elements(tensor)
    size = tensor.element_size()
    return tensor.data_ptr(), distinct * size, span * size


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an operator's argument or result: itself, or those of a nested list."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def _sum_distinct(tensors: Iterable[torch.Tensor]) -> dict[Interval, torch.Tensor]:
    return {_interval(tensor): tensor for tensor in tensors if tensor.numel() > 0}


def operands(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(read, written): the tensors that a call of `func` reads and those that it writes, each once.

    Views, metadata and allocations give two empty lists. An argument that is written in place is
    read as well, unless the operator only overwrites it (`copy_`, `fill_`, random fills) or it is
    an `out=`. Whole tensors are taken: an operator that gathers some rows counts the table that
    it gathers from.
    """
    name = func._schema.name.partition("::")[2]
    if name in _ALLOCATING or name in _METADATA:
        return [], []
    read: list[torch.Tensor] = []
    mutated: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args) and not argument.kwarg_only:
            value = args[position]
        else:
            value = kwargs.get(argument.name)
        tensors = list(tensors_in(value))
        if argument.alias_info is not None and argument.alias_info.is_write:
            mutated += tensors
            if argument.kwarg_only or name in _OVERWRITING:
                continue
        read += tensors
    given = {t.untyped_storage()._cdata for t in [*read, *mutated]}
    results = list(tensors_in(result))
    fresh = [t for t in results if t.untyped_storage()._cdata not in given]
    if results and not fresh and not mutated:
        return [], []  # a view
    return (
        list(_sum_distinct(read).values()),
        list(_sum_distinct([*mutated, *fresh]).values()),
    )
