"""What the kernels of norms, activations and dropout move, against what they must."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.counting import SECTOR_BYTES, Tally, TrafficCounter
from peftfast.ops import activation, dropout, gated_activation, layer_norm, rms_norm

ROWS, COLUMNS = 64, 512
UNIT = ROWS * COLUMNS * 2  # bytes of one operand
ROW = COLUMNS * 2
SEED = torch.arange(4)[1:2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape).half().requires_grad_()


def _traffic(run: Callable[[], Tensor], wanted: list[Tensor]) -> tuple[Tally, Tally]:
    """Of the kernels of a forward and a backward."""
    totals = []
    with TrafficCounter() as forward:
        y = run()
    dy = torch.randn_like(y)
    with TrafficCounter() as backward:
        torch.autograd.grad(y, wanted, dy)
    for counter in (forward, backward):
        assert all(tally.kind == "triton" for tally in counter.tallies.values())
        totals.append(counter.total)
    return totals[0], totals[1]


def test_a_frozen_norm_moves_its_operands_once() -> None:
    x, w = _draw(ROWS, COLUMNS), _draw(COLUMNS).detach()
    forward, backward = _traffic(lambda: rms_norm(x, w, 1e-5, impl="triton"), [x])
    assert (forward.read, forward.written) == (UNIT + ROW, UNIT)
    assert (backward.read, backward.written, backward.workspace) == (2 * UNIT + ROW, UNIT, 0)


def test_a_trained_norm_adds_a_workspace() -> None:
    x, w, b = _draw(ROWS, COLUMNS), _draw(COLUMNS), _draw(COLUMNS)
    forward, backward = _traffic(lambda: layer_norm(x, w, b, 1e-5, impl="triton"), [x, w, b])
    assert (forward.read, forward.written) == (UNIT + 2 * ROW, UNIT)
    assert (backward.read, backward.written) == (2 * UNIT + ROW, UNIT + 2 * ROW)
    assert backward.workspace_read == backward.workspace_written > 0
    assert backward.workspace_written % (2 * COLUMNS * 4) == 0


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_gated_product_moves_its_operands_once(p: float) -> None:
    both = torch.randn(ROWS, 2 * COLUMNS).half()
    gate, up = (half.detach().requires_grad_() for half in both.chunk(2, dim=1))

    def run() -> Tensor:
        return gated_activation(gate, up, "silu", dropout_p=p, seed=SEED, impl="triton")

    seed = SECTOR_BYTES if p else 0
    forward, backward = _traffic(run, [gate, up])
    assert (forward.read, forward.written) == (2 * UNIT + seed, UNIT)
    assert (backward.read, backward.written) == (3 * UNIT + seed, 2 * UNIT)


def test_an_activation_and_dropout_move_their_operands_once() -> None:
    x = _draw(ROWS, COLUMNS)
    forward, backward = _traffic(lambda: activation(x, "gelu", impl="triton"), [x])
    assert (forward.read, forward.written) == (UNIT, UNIT)
    assert (backward.read, backward.written) == (2 * UNIT, UNIT)
    forward, backward = _traffic(lambda: dropout(x, 0.1, seed=SEED, impl="triton"), [x])
    assert forward.moved == backward.moved == 2 * UNIT + SECTOR_BYTES
