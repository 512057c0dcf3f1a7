"""A tensor kept in 8 bits a value, for gradients that bear a bounded error.

The maths and its bound are in `peftfast.reference.rows_int8`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftfast.ops import recipes
from peftfast.ops.operands import is_traced
from peftfast.reference import rows_int8 as reference
from peftfast.reference.rows_int8 import pack_columns, packed_width, unpack_columns

__all__ = ["compressed", "pack_columns", "packed_width", "unpack_columns"]

_KIND = "rows_int8"


def compressed(x: Tensor) -> recipes.Kept:
    """What to save in place of x [..., d]: its codes, int8, and a float32 scale a row."""
    traced = is_traced()
    with torch.no_grad():
        x = x.detach()
        codes, scales = (
            torch.ops.peftfast.quantize_rows_int8(x) if traced else reference.quantize_rows(x)
        )
    dtype = str(x.dtype).removeprefix("torch.")
    return recipes.Kept((_KIND, (dtype,), (0, 1)), [codes, scales])


@recipes.builder(_KIND)
def _rebuild(inputs: Sequence[Tensor], settings: recipes.Settings) -> Tensor:
    return reference.dequantize_rows(inputs[0], inputs[1], getattr(torch, settings[0]))


# Opaque to torch.compile, which would save x and make the codes in the backward.
@torch.library.custom_op("peftfast::quantize_rows_int8", mutates_args=())
def _library_op(x: Tensor) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(x)


@_library_op.register_fake
def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
