"""Dropout bits, split reductions, tile tables and recorded launches."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from peftfast.reference import dropout as reference
from peftfast_kernels import lora, philox, tiles, workspace
from peftfast_kernels.launch import launch, recording
from peftfast_kernels.split_reduce import split_reduce

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _mask_kernel(
    out_ptr, seed_ptr, limit, first_row, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    first_column = tl.program_id(0) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M).to(tl.int64)
    keep = philox.keep_tile(tl.load(seed_ptr), limit, rows, first_column, columns, BLOCK_M, BLOCK_N)
    cols = first_column + tl.arange(0, BLOCK_N)
    position = tl.arange(0, BLOCK_M)[:, None] * columns + cols[None, :]
    tl.store(out_ptr + position, keep.to(tl.int8), mask=cols[None, :] < columns)


@pytest.mark.parametrize("columns", [8, 13, 64, 130])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_masks_are_bit_equal_to_the_reference(columns: int, p: float) -> None:
    seed = torch.tensor([0x1234567890ABCDEF], device=DEVICE)
    out = torch.full((16, columns), 7, dtype=torch.int8, device=DEVICE)
    grid = (triton.cdiv(columns, 32),)
    _mask_kernel[grid](out, seed, philox.limit(p), 0, columns, 16, 32)
    assert torch.equal(out.bool(), reference.keep_mask(seed[0], 16, columns, p))
    assert philox.keep_scale(p) == reference.keep_scale(p)


def test_counters_beyond_32_bits() -> None:
    seed, first, columns = torch.tensor([11], device=DEVICE), 1 << 34, 16
    out = torch.empty(16, columns, dtype=torch.int8, device=DEVICE)
    _mask_kernel[(1,)](out, seed, philox.limit(0.5), first, columns, 16, 16)
    counters = torch.arange(first * 2, (first + 16) * 2, device=DEVICE)
    halves = torch.stack(reference.philox(reference.key_schedule(seed[0]), counters), dim=-1).view(
        torch.int16
    )
    assert torch.equal(out.bool(), (halves >= philox.limit(0.5)).view(16, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_split_reduce(dtype: torch.dtype) -> None:
    parts = [torch.randn(s, n, device=DEVICE) for s, n in ((3, 700), (1, 5), (8, 256))]
    joined = torch.cat([torch.randn(4, 9, device=DEVICE), torch.randn(4, 6, device=DEVICE)], dim=1)
    parts.append(joined[:, 9:])  # rows that are part of a wider workspace
    outs = [torch.full((p.shape[1],), torch.nan, dtype=dtype, device=DEVICE) for p in parts]
    split_reduce(parts, outs)
    for part, out in zip(parts, outs, strict=True):
        torch.testing.assert_close(out, part.sum(0).to(dtype), rtol=1e-3, atol=1e-5)


def test_workspaces_are_observed_only_while_asked() -> None:
    with workspace.observe() as outer:
        first = workspace.allocate((2, 3), torch.device(DEVICE))
        with workspace.observe() as inner:
            second = workspace.allocate((4,), torch.device(DEVICE))
    workspace.allocate((5,), torch.device(DEVICE))
    assert [t.data_ptr() for t in outer] == [first.data_ptr(), second.data_ptr()]
    assert [t.data_ptr() for t in inner] == [second.data_ptr()]


@pytest.mark.parametrize("arch", tiles.ARCHES)
def test_every_tile_is_valid(arch: int) -> None:
    for itemsize in (2, 4):
        for dropout in (False, True):
            assert tiles.is_valid(tiles.expand_tile(itemsize, dropout), arch, itemsize)
            for aligned in (False, True):
                for widened in (False, itemsize == 2):
                    tile = tiles.matmul_tile(arch, itemsize, dropout, aligned, widened)
                    assert tiles.is_valid(tile, arch, itemsize)
        for lanes, block in ((1, 16), (3, 16), (8, 16), (3, 32), (3, 64), (1, 128), (2, 128)):
            for tile in (
                tiles.shrink_tile(itemsize, 4, lanes, block),
                tiles.grad_b_tile(lanes, block),
                tiles.grad_a_tile(arch, lanes, block),
            ):
                assert tiles.is_valid(tile, arch, itemsize)
                for size in (tile.block_m, tile.block_n):
                    assert size & (size - 1) == 0, f"{tile} of {lanes} lanes of {block}"


def test_an_impossible_tile_is_refused() -> None:
    assert not tiles.is_valid(tiles.Tile(256, 256, 128, 8, 4), 86, 2)


@pytest.mark.parametrize(
    ("arch", "row"), [(80, 80), (87, 86), (90, 90), (103, 100), (120, 89), (75, 80)]
)
def test_architectures_without_a_row_take_the_nearest(arch: int, row: int) -> None:
    assert tiles.table_arch(arch) == row


@pytest.mark.parametrize("rows", [1, 255, 256, 2048, 8192, 100_000])
def test_splits_cover_every_row_once(rows: int) -> None:
    span, splits = tiles.row_splits(rows, 16, 32, 132)
    assert span % 32 == 0
    assert (splits - 1) * span < rows <= splits * span


def test_recording_launches_nothing_and_knows_the_architecture() -> None:
    ran = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *args, **meta: ran.append((grid, args, meta))

    with recording(90) as launches:
        launch(Kernel(), (2, 3), 1, mma="none", num_warps=4, num_stages=1)
    assert not ran and launches[0].programs == 6
    launch(Kernel(), (2,), 1, mma="none", num_warps=4, num_stages=1)
    assert ran == [((2,), (1,), {"num_warps": 4, "num_stages": 1})]


@pytest.mark.parametrize("plan", ["fused", "library"])
@pytest.mark.parametrize("arch", tiles.ARCHES)
def test_every_kernel_fills_a_gpu_of_132_processors(
    arch: int, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTFAST_LORA_GEMM", plan)
    for name, count in lora.programs(8192, 4096, 4096, 16, torch.bfloat16, arch, 132).items():
        assert count >= 132, name


def test_an_unknown_gemm_plan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_LORA_GEMM", "cublas")
    with pytest.raises(ValueError, match="PEFTFAST_LORA_GEMM is 'cublas'"):
        tiles.gemm_plan(90, torch.bfloat16, True)


def test_the_rule_for_the_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTFAST_LORA_GEMM", raising=False)
    assert tiles.gemm_plan(80, torch.bfloat16, True) == "fused"
    assert tiles.gemm_plan(90, torch.bfloat16, True) == "library"
    assert tiles.gemm_plan(80, torch.float32, True) == "library"
    assert tiles.gemm_plan(80, torch.float16, False) == "fused"
