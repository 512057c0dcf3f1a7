"""Dropout bits inside a kernel: Philox4x32-7 of (seed, element), a call for eight columns.

Element (row, col) of a matrix of `cols` columns takes half-word `col % 8` of the call for the
counter `row * ceil(cols / 8) + col // 8`, read as a signed 16-bit number; it is kept where that
is at least the limit, `threshold - 32768`. A call costs about 100 integer instructions, so an
element about 13; the joins keep the eight elements of a call in one thread, as a 16-byte load of
16-bit activations lays them out.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import triton
import triton.language as tl

LEVELS = 1 << 16
COLUMNS_PER_CALL = 8
KEEP_ALL = -(LEVELS // 2)  # the limit that keeps every element


@triton.jit
def dropout_halves(seed, counters, BLOCK_M: tl.constexpr, CALLS: tl.constexpr):
    """Signed 16-bit numbers [BLOCK_M, 8 * CALLS] of int64 counters [BLOCK_M, CALLS]."""
    low = (counters & 0xFFFFFFFF).to(tl.uint32)
    high = ((counters >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0, n_rounds=7)
    words = tl.permute(tl.join(tl.join(w0, w1), tl.join(w2, w3)), 0, 1, 3, 2)  # [BM, CALLS, 2, 2]
    words = words.to(tl.int32, bitcast=True)
    halves = tl.join((words << 16) >> 16, words >> 16)  # [BM, CALLS, 2, 2, 2]
    return tl.reshape(halves, BLOCK_M, CALLS * 8)


@triton.jit
def keep_tile(
    seed, limit, rows, first_column, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which elements of a tile are kept: int1 [BLOCK_M, BLOCK_N].

    rows: int64 [BLOCK_M]; first_column: a multiple of 8; columns: the matrix's width.
    """
    calls = tl.cdiv(columns, 8)
    counters = rows[:, None] * calls + (first_column // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
    return dropout_halves(seed, counters, BLOCK_M, BLOCK_N // 8) >= limit


def limit(p: float) -> int:
    """The limit of drop probability p, rounded to a multiple of 2**-16."""
    return round(p * LEVELS) + KEEP_ALL


def keep_scale(p: float) -> float:
    """1 / P(kept) for the rounded p; 0.0 where nothing is kept."""
    kept = LEVELS - round(p * LEVELS)
    return LEVELS / kept if kept else 0.0
