"""Every tile choice and every dispatch rule of the kernels, in one place.

`Tile` is a frozen set of block sizes; the functions below pick one for a kernel, an architecture
and the sizes that matter. To add an architecture, add its row to the tables and its number to
ARCHES.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

ARCHES = (80, 86, 89, 90, 100)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB a block may use

MAX_RANK_BLOCK = 128
MAX_LANES = 8
_LANE_BUDGET = 256  # rank columns of accumulators that one program of a skinny kernel may hold


@dataclass(frozen=True)
class Tile:
    """Block sizes of one launch; block_k is 0 where a kernel has no depth loop of its own."""

    block_m: int
    block_n: int
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8

    def __str__(self) -> str:
        blocks = "x".join(str(b) for b in (self.block_m, self.block_n, self.block_k) if b)
        return f"{blocks} w{self.num_warps} s{self.num_stages}"


def table_arch(arch: int) -> int:
    """The tables' row for an architecture: the newest not above it (sm_120 is like sm_89)."""
    if arch >= 120:
        return 89
    return max(a for a in ARCHES if a <= max(arch, ARCHES[0]))


def is_valid(tile: Tile, arch: int, itemsize: int) -> bool:
    """Whether the pipelined operand tiles of a launch fit the architecture's shared memory."""
    depth = tile.block_k or tile.block_m
    operands = (tile.block_m + tile.block_n) * depth * itemsize * max(tile.num_stages - 1, 1)
    return operands <= SHARED_LIMIT[table_arch(arch)] * 1024


def rank_block(ranks: list[int]) -> int:
    """The power of two, 16 to 128, that the ranks of one launch are padded to."""
    widest = min(max(ranks), MAX_RANK_BLOCK)
    return max(16, 1 << (widest - 1).bit_length())


def matmul_rank_block(ranks: list[int], widened: bool = False) -> int:
    """The step in which the GEMM's kernel takes ranks, 16 or 32: it loops over what is above."""
    return min(32, rank_block(ranks)) if ranks and not widened else 16


def lanes_per_launch(block: int) -> int:
    """How many lanes of `rank_block` columns one program can hold."""
    return max(1, min(MAX_LANES, _LANE_BUDGET // block))


@dataclass(frozen=True)
class _MatmulTiles:
    """The GEMM's tiles on one architecture."""

    plain: Tile
    dropout: Tile  # the masks of the low-rank part need registers of their own
    widened: Tile  # 16-bit operands and a float32 output, whose low-rank part takes three products
    widened_dropout: Tile
    ragged: Tile  # row lengths that are no multiple of 16: loads of single elements
    full: Tile  # float32


_FULL = Tile(64, 64, 16, 4, 2)
_RAGGED = Tile(64, 64, 32, 4, 2)
_MATMUL = {
    80: _MatmulTiles(
        Tile(128, 128, 32, 8, 4),
        Tile(128, 64, 32, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 32, 8, 4),
        _RAGGED,
        _FULL,
    ),
    86: _MatmulTiles(
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 32, 8, 3),
        _RAGGED,
        _FULL,
    ),
    89: _MatmulTiles(
        Tile(128, 128, 32, 8, 3),
        Tile(128, 64, 32, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 32, 8, 3),
        _RAGGED,
        _FULL,
    ),
    90: _MatmulTiles(
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 8, 3),
        _RAGGED,
        _FULL,
    ),
    100: _MatmulTiles(
        Tile(128, 256, 64, 8, 3),
        Tile(128, 64, 64, 8, 3),
        Tile(128, 64, 64, 8, 3),
        Tile(128, 64, 64, 8, 3),
        Tile(64, 64, 32, 8, 2),
        _FULL,
    ),
}


def matmul_tile(
    arch: int, itemsize: int, dropout: bool, aligned: bool, widened: bool = False
) -> Tile:
    """Tile of the GEMM with the up-projection inside.

    Args:
        itemsize: bytes of an operand's element.
        dropout: whether the low-rank part is masked.
        aligned: whether row lengths are multiples of 16.
        widened: whether the output is float32 over 16-bit operands.
    """
    row = _MATMUL[table_arch(arch)]
    if itemsize == 4:
        return row.full
    if not aligned:
        return row.ragged
    if widened:
        return row.widened_dropout if dropout else row.widened
    return row.dropout if dropout else row.plain


def expand_tile(itemsize: int, dropout: bool) -> Tile:
    """Tile of the up-projection alone: the GEMM's kernel without a GEMM.

    Args:
        itemsize: bytes of an element of the output, or of the base where that is wider.
    """
    return Tile(64, 64, 16, 4, 1) if itemsize == 4 or dropout else Tile(64, 128, 16, 4, 1)


def shrink_tile(itemsize: int, adapter_itemsize: int, lanes: int, block: int) -> Tile:
    """Tile of x A^T: block_m rows, block_k of depth."""
    if lanes * block > 64:
        return Tile(64, block, 32, 8, 3)
    depth = 64 if max(itemsize, adapter_itemsize) == 4 or lanes > 1 else 128
    return Tile(32, block, depth, 4, 3)


def _columns(rank: int, widest: int) -> int:
    """The power of two, 32 to `widest`, of columns beside which `rank` accumulators fit."""
    fitting = max(32, min(widest, 8192 // rank))
    return 1 << (fitting.bit_length() - 1)


def grad_b_tile(lanes: int, block: int) -> Tile:
    """Tile of the pass over dy: block_m rows a step, block_n columns a program."""
    columns = _columns(lanes * block, 256)
    return Tile(32, columns, 0, 8 if columns == 256 else 4, 2)


def grad_a_tile(arch: int, lanes: int, block: int) -> Tile:
    """Tile of the pass over x for dA: block_m rows a step, block_n columns a program."""
    widest = 64 if table_arch(arch) >= 100 else 128  # masks of 128 columns spill on sm_100
    columns = _columns(lanes * block, widest)
    return Tile(32, columns, 0, 4, 2)


def row_splits(rows: int, programs: int, block_m: int, sms: int) -> tuple[int, int]:
    """Rows a program takes, and the number of splits, of a reduction over rows.

    Enough splits for two programs an SM, but none of fewer than 256 rows: a split's partial
    result is written and read once, so the workspace's traffic falls with their length.
    """
    splits = min(-(-rows // 256), max(1, -(-2 * sms // programs)))
    span = -(-rows // (splits * block_m)) * block_m
    return span, -(-rows // span)


def depth_splits(depth: int, programs: int, block_k: int, sms: int) -> tuple[int, int]:
    """Columns a program takes, 512 or more, and the number of splits, over columns."""
    splits = min(max(1, depth // 512), -(-sms // programs))
    span = -(-depth // (splits * block_k)) * block_k
    return span, -(-depth // span)


def dequantize_tile() -> Tile:
    """Tile of the pass over a 4-bit weight: block_m words of eight elements.

    512 words are the longest block, so that no block is cut; a thread has four of them, which
    makes eight programs' loads in flight an SM cover the memory's latency in 32 registers.
    """
    return Tile(512, 0, 0, 4, 1)


def quantize_tile(block_size: int) -> Tile:
    """Tile of the pass that quantises: block_m blocks of block_n elements, 4096 in all."""
    return Tile(4096 // block_size, block_size, 0, 4, 1)


def gemv_tile(rows: int, columns: int, itemsize: int, even: bool, sms: int) -> Tile:
    """Tile of a few rows times a 4-bit weight: block_m of x's, block_n of the weight's rows, and
    block_k of the depth for each of the warps.

    Every program reads all of x: 32 rows of the weight share that where enough programs are left.
    """
    block_m = 8 if rows <= 8 else 16
    if itemsize == 4 or not even:
        return Tile(block_m, 16, 32, 8, 1)
    block_n = 32 if columns >= 4 * 32 * sms else 16
    block_k = 128 if block_m * block_n == 128 else 64  # what fits in 128 registers a thread
    return Tile(block_m, block_n, block_k, 8, 1)


_FEW_ROWS = {80: 16, 86: 16, 89: 16, 90: 8, 100: 8}


def few_rows(arch: int, itemsize: int, in_features: int) -> int:
    """The most rows of x that multiply a 4-bit weight directly; above, it is dequantised first.

    By arithmetic, until recorded rows say otherwise: dequantising and a GEMM move 4.5 bytes an
    element of a weight, or 8.5 in float32; the direct kernel moves 0.53 and is bound by its
    instructions, eight or nine an element up to 16 rows (at 4096 x 4096 on an H200, 5
    microseconds against 18). bitsandbytes' own kernels win up to 64 rows on an H100, 128 on an
    A100 and 256 on a 4090 by its thresholds. This stays at one tile of rows, and at half of one
    where memory is fastest beside the instructions, as well as in float32, which has no tensor
    cores. Rows of W that start within a group of 32 elements are read element by element, which
    wins nothing.
    """
    if in_features % 32:
        return 0
    return 8 if itemsize == 4 else _FEW_ROWS[table_arch(arch)]


def norm_limit(light: bool) -> int:
    """The longest row that one program holds; twice as long for an RMSNorm alone, without the
    gradients of parameters.
    """
    return 16384 if light else 8192


def norm_tile(columns: int) -> Tile:
    """Tile of a norm: whole rows, block_m of them, 16 elements a thread."""
    block_n = max(16, 1 << (columns - 1).bit_length())
    block_m = max(1, 2048 // block_n)
    return Tile(block_m, block_n, 0, min(32, block_m * block_n // 512), 1)


def norm_spans(rows: int, block_m: int, parameters: bool, sms: int) -> tuple[int, int]:
    """Rows a program takes, and the number of programs, of a norm's backward.

    Gradients of parameters are summed in a program and once more over programs, two a processor.
    """
    programs = -(-rows // block_m)
    if parameters:
        programs = min(programs, 2 * sms)
    span = -(-rows // (programs * block_m)) * block_m
    return span, -(-rows // span)


def elementwise_tile(columns: int) -> Tile:
    """Tile of an elementwise op: 8 elements a thread, 16 bytes of 16-bit ones and a call of the
    dropout generator; block_n of a row or less.
    """
    block_n = min(1024, max(16, 1 << (columns - 1).bit_length()))
    return Tile(1024 // block_n, block_n, 0, 4, 1)


def join_dy_passes(rank: int, block_n: int, itemsize: int) -> bool:
    """Whether one pass over dy gives both g and dB.

    It leaves partial sums of g, [columns / block_n, M, rank] in float32, written and read once;
    two passes read dy twice instead.
    """
    return 8 * rank < block_n * itemsize


def gemm_plan(arch: int, dtype: torch.dtype, on_gpu: bool) -> str:
    """How the up-projection meets the base GEMM.

    "fused": it joins a Triton GEMM; "library": torch's GEMM adds to the low-rank part. By
    arithmetic, until recorded rows say otherwise: the library plan writes the low-rank part and
    reads it back, two passes over y, which a compute-bound GEMM partly hides; Triton's GEMM comes
    near cuBLAS up to sm_89 and falls behind from sm_90 on, and float32 without TF32 has no tensor
    cores to gain from. The environment variable PEFTFAST_LORA_GEMM overrides the rule.
    """
    if _forced:
        return _forced[-1]
    if asked := os.environ.get("PEFTFAST_LORA_GEMM"):
        if asked not in ("fused", "library"):
            raise ValueError(f"PEFTFAST_LORA_GEMM is {asked!r}; allowed: 'fused', 'library'")
        return asked
    if not on_gpu:
        return "fused"
    return "library" if dtype == torch.float32 or table_arch(arch) >= 90 else "fused"


_forced: list[str] = []


@contextlib.contextmanager
def forced_gemm_plan(plan: str) -> Iterator[None]:
    """Use one plan whatever the rule says."""
    _forced.append(plan)
    try:
        yield
    finally:
        _forced.pop()


BOTTLENECK_LIMIT = 256  # the widest bottleneck whose hidden layer one program holds


def bottleneck_block(width: int) -> int:
    """The power of two, 16 or more, that an adapter's bottleneck is padded to."""
    return max(16, 1 << (width - 1).bit_length())


def bottleneck_tile(block: int, itemsize: int, adapter_itemsize: int, rows: int, sms: int) -> Tile:
    """Tile of an adapter's passes over rows: block_m rows, block_n columns of y and block_k of x
    or dy a step.

    Each program reads both projections once: as many rows share that, up to 64, as leave a program
    for two processors of three.

    Args:
        block: the padded bottleneck.
        itemsize, adapter_itemsize: bytes of an element of x and dy, and of the projections.
    """
    narrow = block <= 128
    if adapter_itemsize == 2:
        wide = Tile(64, 64, 64, 8, 3) if narrow else Tile(32, 32, 32, 8, 3)
        tile = Tile(64, 128, 128, 8, 3) if block <= 64 else wide
    elif itemsize == 2:
        tile = Tile(64, 64, 32, 8, 3) if narrow else Tile(32, 32, 16, 8, 2)
    else:
        tile = Tile(32, 32, 32, 8, 2) if block <= 64 else Tile(16, 32, 16, 8, 2)
    block_m = tile.block_m
    while block_m > 16 and 3 * -(-rows // block_m) < 2 * sms:
        block_m //= 2
    return replace(tile, block_m=block_m)


def bottleneck_grad_tile(
    arch: int, block: int, itemsize: int, adapter_itemsize: int, columns: int
) -> Tile:
    """Tile of an adapter's pass over columns: block_m rows a step, block_n columns a program.

    The two sums over rows, block x block_n each, stay in registers beside the projection's tile,
    which before sm_90 is held there as well; masked loads (columns are no multiple of 64) take
    more of them. The arguments are as in `bottleneck_tile`.
    """
    arch = table_arch(arch)
    if adapter_itemsize == 2:
        if block <= (64 if arch == 90 and columns % 64 == 0 else 32) and arch != 100:
            return Tile(32, 64, 0, 4, 3)
        if block <= (64 if arch < 90 else 128):
            return Tile(16, 64, 0, 4, 3)
        return Tile(32, 32, 0, 4, 2) if block == 128 else Tile(16, 32, 0, 8, 2)
    if itemsize == 2:
        if block <= 64:
            return Tile(16, 64 if arch >= 90 or block <= 16 else 32, 0, 4, 2)
        return Tile(16, 32 if block == 128 else 16, 0, 8, 2)
    return Tile(16, 16, 0, 4 if block <= 64 else 8, 1)


def bottleneck_finish_tile() -> Tile:
    """Tile of the last sums of an adapter with a norm: block_m of the bottleneck a step, block_n
    columns a program.
    """
    return Tile(16, 64, 0, 4, 1)


def bottleneck_splits(
    rows: int, width: int, programs: int, block_m: int, sms: int
) -> tuple[int, int]:
    """Rows a program takes, and the number of splits, of an adapter's pass over columns.

    Enough splits for two programs a processor, but none of fewer than 16 rows for each column of
    the bottleneck: so the workspace's traffic stays below a unit, as does the reduction's time.
    """
    splits = max(1, min(rows // (16 * width), -(-2 * sms // programs)))
    span = -(-rows // (splits * block_m)) * block_m
    return span, -(-rows // span)


HEAD_LIMIT = 256  # the widest head whose rows one program of an attention holds


def head_block(width: int) -> int:
    """The power of two, 16 or more, that a head's columns are padded to."""
    return max(16, 1 << (width - 1).bit_length())


def packed_heads(group: int, queries: int) -> int:
    """How many heads of a group one program has: all of them while they are few rows."""
    return group if group * queries <= 64 else 1


def fewer_rows(tile: Tile, rows: int) -> Tile:
    """The tile with its block_m cut to what there is, 16 or more."""
    block_m = tile.block_m
    while block_m > 16 and block_m // 2 >= rows:
        block_m //= 2
    warps = min(tile.num_warps, 4) if block_m < min(tile.block_m, 64) else tile.num_warps
    return replace(tile, block_m=block_m, num_warps=warps)


def prefix_attention_tile(arch: int, block: int, itemsize: int, heavy: bool) -> Tile:
    """Tile of the attention's forward: block_m queries, block_n keys a step.

    Args:
        block: the padded head.
        heavy: whether masks or dropout need registers of their own.
    """
    if itemsize == 4:
        return Tile(32, 32, 0, 4, 1) if block <= 64 else Tile(16, 16, 0, 8, 1)
    if block <= 64:
        return Tile(128, 32, 0, 8, 2) if heavy else Tile(128, 64, 0, 4, 3)
    if block == 128:
        return Tile(64, 32, 0, 4, 2) if heavy else Tile(128, 64, 0, 8, 2)
    return Tile(64, 32, 0, 8, 2 if SHARED_LIMIT[table_arch(arch)] > 128 else 1)


def prefix_attention_grad_tile(arch: int, block: int, itemsize: int, heavy: bool) -> Tile:
    """Tile of the pass over queries of the attention's backward; the arguments as above."""
    if itemsize == 4:
        return Tile(16, 32, 0, 4, 1) if block <= 64 else Tile(16, 16, 0, 8, 1)
    if block <= 64:
        return Tile(64, 32, 0, 8, 2) if heavy else Tile(64, 64, 0, 4, 2)
    if block == 128:
        return Tile(64, 32, 0, 4 if table_arch(arch) >= 100 else 8, 2)
    return Tile(32, 16, 0, 8, 1)


def prefix_attention_grad_kv_tile(arch: int, block: int, itemsize: int, heavy: bool) -> Tile:
    """Tile of the passes over keys of the attention's backward: block_n keys a program, block_m
    queries a step; the arguments as above.
    """
    if itemsize == 4:
        return Tile(16, 32, 0, 4, 1) if block <= 64 else Tile(32, 16, 0, 8, 1)
    if block <= 64:
        return Tile(32, 32, 0, 8, 2) if heavy else Tile(32, 64, 0, 4, 2)
    if block == 128:
        return Tile(32, 32 if heavy else 64, 0, 8, 2)
    return Tile(32, 32, 0, 8, 1)


def prefix_splits(steps: int, programs: int, sms: int) -> tuple[int, int]:
    """Steps a program takes, and the number of splits, of the gradient of a prefix.

    Enough splits for two programs a processor, but none of fewer than 8 steps: a split leaves one
    tile for each of those it reads.
    """
    splits = max(1, min(steps // 8, -(-2 * sms // programs)))
    span = -(-steps // splits)
    return span, -(-steps // span)


def prefix_attention_plan(dtype: torch.dtype, width: int, on_gpu: bool) -> str:
    """How the attention over the sequence meets the prefix.

    "fused": one kernel whose loop over keys reads the prefix and then the sequence; "library":
    torch's flash attention over the sequence, to whose output a kernel adds the prefix. By
    counting, until recorded rows say otherwise: where the fused plan's step moves 12 units of q's
    size, the library plan's moves 18 (`python -m benchmarks traffic prefix_attention`), a tenth of
    the time of the products at 2048 tokens and heads of 128; its backward over the sequence
    computes five products where two kernels of the fused plan compute seven. Torch's kernel has
    16-bit operands and heads of multiples of 8. The environment variable
    PEFTFAST_PREFIX_ATTENTION overrides the rule.
    """
    if _forced_attention:
        return _forced_attention[-1]
    if asked := os.environ.get("PEFTFAST_PREFIX_ATTENTION"):
        if asked not in ("fused", "library"):
            raise ValueError(f"PEFTFAST_PREFIX_ATTENTION is {asked!r}; allowed: 'fused', 'library'")
        return asked
    return "library" if on_gpu and dtype != torch.float32 and width % 8 == 0 else "fused"


_forced_attention: list[str] = []


@contextlib.contextmanager
def forced_attention_plan(plan: str) -> Iterator[None]:
    """Use one plan whatever the rule says."""
    _forced_attention.append(plan)
    try:
        yield
    finally:
        _forced_attention.pop()
