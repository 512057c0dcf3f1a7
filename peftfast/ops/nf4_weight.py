"""A weight in 4 bits, as the ops take it in place of a dense one."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfast.reference.nf4 import BLOCK_SIZES, NESTED_BLOCK, TABLES, table

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_QUANT_TYPES = tuple(TABLES)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A tensor as 4-bit indices into a table, with a scale a block (see `peftfast.reference.nf4`).

    Made by `nf4.quantize`, or by `from_bnb` without copying.

    Attributes:
        packed: uint8 [ceil(n / 2)], contiguous: the indices in row-major order, two a byte, the
            earlier one in the high half.
        absmax: float32 [ceil(n / block_size)], or uint8 where the statistics are nested.
        shape: of the tensor; a linear's weight is [out, in].
        dtype: of the tensor that was quantised, which `nf4.dequantize` gives back.
        block_size: elements a block.
        quant_type: "nf4" or "fp4".
        nested_absmax, nested_code, offset: float32 [ceil(blocks / 256)], [256] and [], or None.
        compute_dtype: in which a linear over it computes, whatever its input's dtype; None: that.

    Raises:
        TypeError, ValueError: a part's type, dtype, length or device is wrong; the message names
            it.
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int = 64
    quant_type: str = "nf4"
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        for name in ("dtype", "compute_dtype"):
            value = getattr(self, name)
            if value not in DTYPES and not (name == "compute_dtype" and value is None):
                raise TypeError(f"{name} is {value}; allowed: {', '.join(map(str, DTYPES))}")
        check_block_size(self.block_size)
        check_quant_type(self.quant_type)
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape is {list(self.shape)}; sizes can't be negative")
        count = self.numel()
        blocks = -(-count // self.block_size)
        self._check_part("packed", torch.uint8, (-(-count // 2),))
        nested = [self.nested_absmax, self.nested_code, self.offset]
        if all(part is None for part in nested):
            self._check_part("absmax", torch.float32, (blocks,))
        elif any(part is None for part in nested):
            raise ValueError(
                "nested_absmax, nested_code and offset belong together: all or none of them"
            )
        else:
            self._check_part("absmax", torch.uint8, (blocks,))
            self._check_part("nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),))
            self._check_part("nested_code", torch.float32, (256,))
            self._check_part("offset", torch.float32, ())

    def _check_part(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; a tensor is needed")
        if value.dtype != dtype:
            raise TypeError(f"{name} is {value.dtype}; {dtype} is needed")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} is {list(value.shape)}; {list(shape)} is needed for a weight"
                f" {list(self.shape)} in blocks of {self.block_size}"
            )
        if value.device != self.packed.device:
            raise ValueError(f"{name} is on {value.device}, packed on {self.packed.device}")
        if not value.is_contiguous():
            raise ValueError(f"{name} is not contiguous")

    @classmethod
    def from_bnb(
        cls,
        packed: Tensor,
        quant_state: Any = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> NF4Weight:
        """The weight that a bitsandbytes `Params4bit` holds, sharing its memory.

        Args:
            packed: the `Params4bit`, or its data, of any `quant_storage`.
            quant_state: its `QuantState`; None takes `packed.quant_state`.
            compute_dtype: as the attribute.

        Raises:
            TypeError, ValueError: not a 4-bit state, or a damaged one: wrong lengths, dtypes or
                tables, or scales that are not finite. (Values are looked at: on a GPU this waits.)
        """
        state = getattr(packed, "quant_state", None) if quant_state is None else quant_state
        if not isinstance(packed, Tensor):
            raise TypeError(f"packed is {type(packed).__name__}; a tensor is needed")
        if state is None:
            raise ValueError("packed has no quant_state: it is not quantised yet")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("the weight is in bitsandbytes' packing for CPU inference")
        check_quant_type(state.quant_type)
        if state.shape is None:
            raise ValueError("quant_state.shape is None; the weight's shape is needed")
        second = state.state2
        if second is not None and second.blocksize != NESTED_BLOCK:
            raise ValueError(
                f"nested statistics have blocks of {second.blocksize}; {NESTED_BLOCK} is needed"
            )
        data = packed.detach()
        if type(data) is not Tensor:
            data = packed.data.as_subclass(Tensor)
        weight = cls(
            data.contiguous().view(-1).view(torch.uint8),
            state.absmax,
            state.shape,
            state.dtype,
            state.blocksize,
            state.quant_type,
            None if second is None else second.absmax,
            None if second is None else second.code,
            None if second is None else _offset(state.offset),
            compute_dtype,
        )
        _check_values(weight, state.code)
        return weight

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised themselves."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that make it up: packed, absmax and, where nested, the other three."""
        every = (self.packed, self.absmax, self.nested_absmax, self.nested_code, self.offset)
        return [part for part in every if part is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def numel(self) -> int:
        """The number of elements of the tensor."""
        return math.prod(self.shape)

    def with_compute_dtype(self, dtype: torch.dtype | None) -> NF4Weight:
        """The same weight, over which linears compute in `dtype`."""
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"compute_dtype is {dtype}; allowed: {', '.join(map(str, DTYPES))}")
        return _replaced(self, compute_dtype=dtype)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NF4Weight:
        """The same weight with every part on `device`."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name in ("packed", "absmax", "nested_absmax", "nested_code", "offset")
            if (value := getattr(self, name)) is not None
        }
        return _replaced(self, **moved)

    def clone(self) -> NF4Weight:
        """The same weight in memory of its own."""
        names = ("packed", "absmax", "nested_absmax", "nested_code", "offset")
        parts = {name: getattr(self, name) for name in names}
        return _replaced(self, **{k: v.clone() for k, v in parts.items() if v is not None})

    def __repr__(self) -> str:
        return (
            f"NF4Weight({list(self.shape)}, {self.quant_type}, block_size={self.block_size},"
            f" nested={self.nested}, dtype={self.dtype}, device={str(self.device)!r})"
        )


Weight = Tensor | NF4Weight


def check_block_size(block_size: Any) -> None:
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size is {block_size!r}; allowed: {', '.join(str(size) for size in BLOCK_SIZES)}"
        )


def check_quant_type(quant_type: Any) -> None:
    if quant_type not in _QUANT_TYPES:
        allowed = ", ".join(repr(name) for name in _QUANT_TYPES)
        raise ValueError(f"quant_type is {quant_type!r}; allowed: {allowed}")


def _offset(offset: Any) -> Any:
    """In float32: bitsandbytes loads it in torch's default dtype."""
    is_float = isinstance(offset, Tensor) and offset.is_floating_point()
    return offset.float() if is_float else offset


def _check_values(weight: NF4Weight, code: Any) -> None:
    """Hold the tables and scales to what they must be; nothing is known of fake or meta ones."""
    if not isinstance(code, Tensor) or code.shape != (16,):
        got = list(code.shape) if isinstance(code, Tensor) else type(code).__name__
        raise ValueError(f"quant_state.code is {got}; the 16 values of {weight.quant_type} belong")
    if weight.device.type == "meta" or any(type(part) is not Tensor for part in weight.parts):
        return
    if not torch.equal(code, table(weight.quant_type, code.device)):
        raise ValueError(f"quant_state.code is not the table of {weight.quant_type}")
    if weight.nested_code is not None:
        steps = weight.nested_code.diff()
        if not bool((steps >= 0).all()) or not bool((weight.nested_code.abs() <= 1).all()):
            raise ValueError("nested_code is not an ascending table of values in [-1, 1]")
    for name in ("offset", "nested_absmax") if weight.nested else ("absmax",):
        if not bool(getattr(weight, name).isfinite().all()):
            raise ValueError(f"{name} is not finite")


def _replaced(weight: NF4Weight, **changes: Any) -> NF4Weight:
    """A copy with other attributes, which are known to be right."""
    other = copy.copy(weight)
    for name, value in changes.items():
        object.__setattr__(other, name, value)
    return other


def row_step(weight: NF4Weight) -> int:
    """The fewest rows of a weight [N, K] that are whole blocks of it and of its statistics."""
    columns = weight.shape[1]
    block = weight.block_size * (NESTED_BLOCK if weight.nested else 1)
    return math.lcm(columns, block) // columns


def rows_of(weight: NF4Weight, start: int, stop: int) -> NF4Weight:
    """Rows start to stop of a weight, sharing its memory; start is a multiple of `row_step`."""
    first, last = start * weight.shape[1], stop * weight.shape[1]
    block, nested = weight.block_size, weight.nested_absmax
    of_blocks = slice(first // block, -(-last // block))
    outer = slice(first // (block * NESTED_BLOCK), -(-last // (block * NESTED_BLOCK)))
    return _replaced(
        weight,
        shape=torch.Size((stop - start, weight.shape[1])),
        packed=weight.packed[first // 2 : -(-last // 2)],
        absmax=weight.absmax[of_blocks],
        nested_absmax=None if nested is None else nested[outer],
    )


# A library op's schema takes tensors and integers: weights travel as their parts, flat, and a few
# integers each.

_SPEC = 7  # parts, rows, columns, block size, table, dtype, compute dtype


def flatten(weights: Sequence[Weight]) -> tuple[list[Tensor], list[int]]:
    """Parts and description of weights, of two dimensions each."""
    tensors: list[Tensor] = []
    spec: list[int] = []
    for w in weights:
        if isinstance(w, Tensor):
            tensors.append(w)
            spec += (0, w.shape[0], w.shape[1], 0, 0, 0, 0)
            continue
        parts = w.parts
        tensors += parts
        compute = 0 if w.compute_dtype is None else 1 + DTYPES.index(w.compute_dtype)
        spec += (len(parts), *w.shape, w.block_size, _QUANT_TYPES.index(w.quant_type))
        spec += (DTYPES.index(w.dtype), compute)
    return tensors, spec


def unflatten(
    tensors: Sequence[Tensor], spec: Sequence[int], *, check: bool = False
) -> list[Weight]:
    """The weights again; unless `check`, nothing is checked a second time.

    Raises:
        TypeError, ValueError: parts and description don't belong together.
    """
    if check and (len(spec) % _SPEC or part_count(spec) != len(tensors)):
        raise ValueError(f"spec has {len(spec)} numbers for {len(tensors)} tensors")
    weights: list[Weight] = []
    for start, entry in _entries(spec):
        parts, rows, columns, block_size, kind, dtype, compute = entry
        if parts == 0:
            weights.append(tensors[start])
            continue
        w = NF4Weight.__new__(NF4Weight)
        present: list[Any] = [*tensors[start : start + parts], *[None] * (5 - parts)]
        packed, absmax, nested_absmax, nested_code, offset = present
        w.__dict__.update(
            packed=packed,
            absmax=absmax,
            shape=torch.Size((rows, columns)),
            dtype=DTYPES[dtype],
            block_size=block_size,
            quant_type=_QUANT_TYPES[kind],
            nested_absmax=nested_absmax,
            nested_code=nested_code,
            offset=offset,
            compute_dtype=DTYPES[compute - 1] if compute else None,
        )
        if check:
            w.__post_init__()
        weights.append(w)
    return weights


def first_parts(spec: Sequence[int]) -> list[tuple[int, bool]]:
    """For each weight the place of its first part, and whether it is dense."""
    return [(start, entry[0] == 0) for start, entry in _entries(spec)]


def part_count(spec: Sequence[int]) -> int:
    """The number of tensors that a description stands for."""
    return sum(entry[0] or 1 for _, entry in _entries(spec))


def out_features(spec: Sequence[int]) -> list[int]:
    return [entry[1] for _, entry in _entries(spec)]


def _entries(spec: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    start = 0
    for at in range(0, len(spec), _SPEC):
        entry = spec[at : at + _SPEC]
        yield start, entry
        start += entry[0] or 1
