"""Dropout masks as a function of (seed, element): Philox4x32-7, one call for eight elements.

A mask is never stored: forward and backward compute the same bits from the same seed. Element
(row, col) of a [rows, cols] matrix takes half-word `col % 8` of the 128 bits that Philox gives
for the counter `row * ceil(cols / 8) + col // 8` under the 64-bit key `seed`; halves are in
little-endian order (low half of word 0, high half of word 0, low half of word 1, ...). Read as a
signed 16-bit number v, the element is kept where v >= threshold(p) - 32768.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); seven
rounds are the fewest that pass BigCrush there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Drop = Callable[[Tensor, Tensor, float], Tensor]  # x [M, K], seed, p: x where it is kept, else 0
ROUNDS = 7
_LEVELS = 1 << 16
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters a pass: the int64 buffers stay in a core's cache, and in one thread
_BLOCK = 1 << 17  # counters a comparison, which runs on all threads


def threshold(p: float) -> int:
    """The 16-bit threshold of drop probability p: p rounded to a multiple of 2**-16."""
    return round(p * _LEVELS)


def keep_scale(p: float) -> float:
    """1 / P(kept), exact for the rounded threshold, so that dropout keeps the mean; 0.0 where
    nothing is kept.
    """
    kept = _LEVELS - threshold(p)
    return _LEVELS / kept if kept else 0.0


def key_schedule(seed: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two 32-bit keys of each round, for a zero-dimensional int64 seed."""
    keys = [(seed & _MASK32, (seed >> 32) & _MASK32)]
    for _ in range(ROUNDS - 1):
        k0, k1 = keys[-1]
        keys.append(((k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32))
    return keys


def philox(keys: Sequence[tuple[Tensor, Tensor]], counters: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-7 of 64-bit counters under one key.

    Args:
        keys: as `key_schedule` gives them.
        counters: int64 [n].

    Returns:
        int64 [n] twice: words 0 and 1, and words 2 and 3, the first of each in the low half.
    """
    c0, c1 = counters & _MASK32, counters >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for k0, k1 in keys:
        # 32 x 32 -> 64-bit products; int64 wraps around, and only the bits count. Words c1 and c3
        # keep rubbish above bit 31: they are only ever added by xor, under the mask that follows.
        p0, p1 = c0.mul_(_MULTIPLIER_0), c2.mul_(_MULTIPLIER_1)
        c0 = c1.bitwise_xor_(p1 >> 32).bitwise_xor_(k0).bitwise_and_(_MASK32)
        c2 = c3.bitwise_xor_(p0 >> 32).bitwise_xor_(k1).bitwise_and_(_MASK32)
        c1, c3 = p1, p0
    # Two words an int64, the first in the low half: in memory the four lie in order.
    return c1.bitwise_left_shift_(32).bitwise_or_(c0), c3.bitwise_left_shift_(32).bitwise_or_(c2)


def keep_mask(seed: Tensor, rows: int, cols: int, p: float, first: int = 0) -> Tensor:
    """The dropout mask of a [rows, cols] matrix.

    Args:
        seed: int64, one element, on the device where the mask is wanted.
        rows, cols: the matrix's sizes.
        p: drop probability in [0, 1].
        first: these are the rows from there on of a longer matrix.

    Returns:
        bool [rows, cols], true where the element is kept.
    """
    keys = key_schedule(seed.reshape(()))
    groups = -(-cols // 8)
    limit = threshold(p) - _LEVELS // 2
    if limit == _LEVELS // 2:  # no 16-bit number reaches it, and torch would wrap it around
        return torch.zeros(rows, cols, dtype=torch.bool, device=seed.device)
    total = rows * groups
    keep = torch.empty(total, 8, dtype=torch.bool, device=seed.device)
    words = torch.empty(min(total, _BLOCK), 2, dtype=torch.int64, device=seed.device)
    for block in range(0, total, _BLOCK):
        size = min(_BLOCK, total - block)
        for start in range(0, size, _CHUNK):
            stop = min(start + _CHUNK, size)
            at = first * groups + block
            counters = torch.arange(at + start, at + stop, device=seed.device)
            words[start:stop, 0], words[start:stop, 1] = philox(keys, counters)
        torch.ge(words[:size].view(torch.int16), limit, out=keep[block : block + size])
    return keep.view(rows, groups * 8)[:, :cols]


def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x [M, K] with the dropped elements set to zero, not scaled; a new tensor."""
    return torch.where(keep_mask(seed, x.shape[0], x.shape[1], p), x, 0.0)


def dropout(x: Tensor, seed: Tensor, p: float, *, drop: Drop = drop) -> Tensor:
    """mask / keep * x over x as a matrix of its last dimension's rows, differentiable by autograd
    where `drop` is; a new tensor of x's shape.
    """
    columns = x.shape[-1] if x.ndim else 1
    flat = x.reshape(math.prod(x.shape[:-1]), columns)
    y: Tensor = torch.ops.aten._unsafe_view(drop(flat, seed, p).mul_(keep_scale(p)), x.shape)
    return y
