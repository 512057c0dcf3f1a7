"""Rows of a frozen table, tagged with the recipe that looks them up again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.ops import recipes
from peftfast.ops.operands import check_dense, shape

_KIND = "embedding"


def embedding(
    ids: Tensor, weight: Tensor, *, padding_idx: int | None = None, recipe: bool = True
) -> Tensor:
    """`torch.nn.functional.embedding`, whose output an op that would save it looks up again.

    Args:
        ids: int64 or int32, any shape; a copy of it is what is kept.
        weight: [rows, d]. The output is tagged where it asks for no gradient.
        padding_idx: a row that gets no gradient.
        recipe: tag the output.

    Returns:
        [*ids.shape, d] in weight's dtype.

    Raises:
        TypeError, ValueError: an operand is wrong; the message names it. What an id may be is
            checked by torch.
    """
    for name, value in (("ids", ids), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; a tensor is needed")
    check_dense(weight, "weight")
    if weight.ndim != 2:
        raise ValueError(f"weight is {shape(weight)}; 2 dimensions are needed, [rows, d]")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids is {ids.dtype}; torch.int64 or torch.int32 is needed")
    y = F.embedding(ids, weight, padding_idx)
    if recipe and not weight.requires_grad and torch.is_grad_enabled():
        recipes.tag(y, _KIND, (), [ids.clone(), weight])
    return y


@recipes.builder(_KIND)
def _rebuild(inputs: Sequence[Tensor], settings: recipes.Settings) -> Tensor:
    return F.embedding(inputs[0], inputs[1])
