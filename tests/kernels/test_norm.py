"""The norms' kernels where a program takes many rows, and their launches."""

from __future__ import annotations

import pytest
import torch

from peftfast.reference import norm as reference
from peftfast_kernels import device, norm, tiles, workspace
from peftfast_kernels.launch import recording
from tests.tolerance import assert_within

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-3


def _operands(rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(size, device=DEVICE) for size in ((rows, columns), (rows, columns), (columns,))
    )


@pytest.mark.parametrize(("rows", "columns"), [(700, 30), (41, 500), (5, 16), (1, 7)])
def test_parameters_summed_over_few_programs(rows: int, columns: int) -> None:
    dy, x, w = _operands(rows, columns)
    results = []
    for _ in range(2):
        dx, dw, db = torch.full_like(x, torch.nan), torch.empty_like(w), torch.empty_like(w)
        with device.pretend(80, 2), workspace.observe() as seen:
            norm.layer_norm_backward(dy, x, w, EPS, dx, dw, db)
        assert all(part.shape[0] <= 4 for part in seen)
        results.append([dx, dw, db])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    wanted = (True, True, True)
    truth = reference.layer_norm_backward(
        dy.double(), x.double(), w.double(), EPS, *wanted, torch.float64
    )
    eager = reference.layer_norm_backward(dy, x, w, EPS, *wanted, w.dtype)
    for ours, theirs, exact in zip(results[0], eager, truth, strict=True):
        assert_within(ours, theirs, exact)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_each_gradient_alone(wanted: tuple[bool, bool]) -> None:
    dy, x, w = _operands(50, 40)
    dx = torch.empty_like(x) if wanted[0] else None
    dw = torch.empty_like(w) if wanted[1] else None
    with workspace.observe() as seen:
        norm.rms_norm_backward(dy, x, w, EPS, "gemma", dx, dw)
    assert bool(seen) == wanted[1]
    (expected,) = reference.rms_norm_backward(dy, x, w, EPS, "gemma", *wanted)
    torch.testing.assert_close(dx if wanted[0] else dw, expected)


def test_no_rows_leave_gradients_of_zero() -> None:
    dy, x, w = _operands(0, 40)
    dw = torch.full_like(w, torch.nan)
    norm.rms_norm_backward(dy, x, w, EPS, "llama", torch.empty_like(x), dw)
    assert not dw.any()


@pytest.mark.parametrize("rows", [1, 31, 8192, 100_000])
@pytest.mark.parametrize("columns", [1, 128, 4096, 8192])
@pytest.mark.parametrize("parameters", [False, True])
def test_spans_cover_every_row_once(rows: int, columns: int, parameters: bool) -> None:
    tile = tiles.norm_tile(columns)
    span, programs = tiles.norm_spans(rows, tile.block_m, parameters, 132)
    assert span % tile.block_m == 0 and tile.block_n >= columns
    assert (programs - 1) * span < rows <= programs * span
    assert not parameters or programs <= 264


@pytest.mark.parametrize("arch", tiles.ARCHES)
def test_launches_fill_a_gpu(arch: int) -> None:
    x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    w = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    with recording(arch) as launches:
        norm.rms_norm_forward(x, w, EPS, "llama", x)
        norm.rms_norm_backward(x, x, w, EPS, "llama", x, w)
    assert [launch.programs >= 132 for launch in launches[:2]] == [True, True]


@pytest.mark.gpu
def test_addresses_beyond_31_bits() -> None:
    columns = 64
    storage = torch.empty((1 << 31) + columns, dtype=torch.float16, device="cuda")
    x = storage.as_strided((2, columns), (1 << 31, 1))
    x.copy_(torch.randn(2, columns))
    w, y = torch.randn(columns, device="cuda").half(), torch.empty(2, columns, device="cuda").half()
    norm.rms_norm_forward(x, w, EPS, "llama", y)
    torch.testing.assert_close(y, reference.rms_norm_forward(x.contiguous(), w, EPS, "llama"))
