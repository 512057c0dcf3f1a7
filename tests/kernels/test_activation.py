"""The elementwise kernels' launches: tiles, one row where strides allow, masks by rows."""

from __future__ import annotations

import pytest
import torch

from peftfast.reference import activation as reference
from peftfast.reference.dropout import dropout
from peftfast_kernels import activation, tiles
from peftfast_kernels.launch import recording

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.mark.parametrize("columns", [1, 8, 9, 1000, 1024, 14336])
def test_tiles_hold_whole_calls_of_the_generator(columns: int) -> None:
    tile = tiles.elementwise_tile(columns)
    assert tile.block_n % 8 == 0 and tile.block_m * tile.block_n == 1024


def test_contiguous_operands_are_one_row_and_masks_keep_the_rows() -> None:
    x = torch.empty(300, 30, dtype=torch.bfloat16, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    with recording(80) as launches:
        activation.activation_forward(x, x, "silu", 0.0, None, x)
        activation.activation_forward(x, x, "silu", 0.1, seed, x)
        activation.activation_forward(x[:, ::2], None, "silu", 0.0, None, x.new_empty(300, 15))
    assert [one.args[4:6] for one in launches] == [(1, 9000), (300, 30), (300, 15)]
    assert [one.programs for one in launches] == [9, 10, 5]


@pytest.mark.parametrize("columns", [5, 1024 * 2 + 3])
def test_several_tiles_a_row(columns: int) -> None:
    gate, up, dy = torch.randn(3, 70, columns, device=DEVICE).unbind()
    seed, p = torch.tensor([6], device=DEVICE), 0.5
    y, dgate, dup = (torch.full_like(gate, torch.nan) for _ in range(3))
    activation.activation_forward(gate, up, "gelu", p, seed, y)
    torch.testing.assert_close(y, reference.gated_activation(gate, up, "gelu", p, seed))
    activation.activation_backward(dy, gate, up, "gelu", p, seed, dgate, dup)
    expected = reference.gated_activation_backward(dy, gate, up, "gelu", p, seed, True, True)
    torch.testing.assert_close([dgate, dup], expected)
    activation.dropout(dy, seed, p, y)
    assert torch.equal(y, dropout(dy, seed, p))


def test_nothing_to_do() -> None:
    x = torch.empty(0, 8, device=DEVICE)
    activation.activation_forward(x, x, "silu", 0.0, None, x)
    activation.activation_backward(x, x, x, "silu", 0.0, None, x, x)


@pytest.mark.gpu
def test_elements_beyond_31_bits() -> None:
    count = (1 << 31) + 4096
    x = torch.zeros(count, dtype=torch.float16, device="cuda")
    x[-1] = 2.0
    activation.activation_forward(x, None, "relu2", 0.0, None, x)
    assert x[-1] == 4.0 and not x[:-1].any()
