"""The two checks go red when they should, and the figures are those of the definition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from rich.console import Console

from peftfast.demo.figure import draw
from peftfast.demo.outcome import Pair, table
from peftfast.demo.training import Run

PNG = b"\x89PNG\r\n\x1a\n"


def run(losses: list[float], accuracy: float = 0.5, **figures: float) -> Run:
    figures = {"tokens_per_second": 100.0, "saved_bytes": 2e6, "peak_bytes": 4e6, **figures}
    return Run(losses=losses, accuracy=accuracy, trainable=10, parameters=200, **figures)  # type: ignore[arg-type]


def test_equal_curves_pass() -> None:
    pair = Pair(0.0, 100, run([2.0, 1.0]), run([2.0, 1.0009]))
    assert pair.failure() is None
    assert pair.differences == pytest.approx([0.0, 9e-4])


@pytest.mark.parametrize("wrong", [1.0011, 0.9989, math.nan, math.inf])
def test_a_curve_that_leaves_the_other_fails(wrong: float) -> None:
    pair = Pair(0.0, 100, run([2.0, 1.0, 1.0]), run([2.0, wrong, 1.0]))
    failure = pair.failure()
    assert failure is not None
    assert "at step 2, over 0.001 (1 of 3 steps do)" in failure
    assert not pair.largest_difference <= 1e-3


def test_curves_that_are_both_no_numbers_fail() -> None:
    assert Pair(0.0, 100, run([math.nan]), run([math.nan])).failure() is not None


def test_standard_error_of_two_shares() -> None:
    pair = Pair(0.1, 200, run([1.0], 0.7), run([9.0], 0.5))
    assert pair.accuracy_error == pytest.approx(math.sqrt(0.6 * 0.4 / 200 + 0.6 * 0.4 / 200))


def test_accuracies_within_noise_pass_whatever_the_losses() -> None:
    assert Pair(0.1, 200, run([1.0], 0.70), run([9.0], 0.60)).failure() is None
    failure = Pair(0.1, 200, run([1.0], 0.80), run([1.0], 0.55)).failure()
    assert failure is not None
    assert "25.0%" in failure
    assert Pair(0.1, 200, run([1.0], 0.0), run([1.0], 0.0)).failure() is None
    assert Pair(0.1, 200, run([1.0], 0.0), run([1.0], 1.0)).failure() is not None


def test_table_has_ratios_of_patched_to_plain() -> None:
    pair = Pair(0.0, 100, run([2.0, 1.0]), run([2.0, 0.5], tokens_per_second=150, saved_bytes=1e6))
    console = Console(width=100, record=True, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        console.print(table([pair]))
    lines = [line.split("│")[1:-1] for line in capture.get().splitlines() if line.startswith("│")]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}
    assert rows["trainable share"] == ["5.00%", "5.00%", "1.000"]
    assert rows["loss at the last step"] == ["1.0000", "0.5000", "0.500"]
    assert rows["largest loss difference at a step"] == ["", "5.0e-01", ""]
    assert rows["tokens/s"] == ["100", "150", "1.500"]
    assert rows["saved MB for backward"] == ["2.0", "1.0", "0.500"]
    assert rows["peak MB of a step"] == ["4.0", "4.0", "1.000"]


@pytest.mark.parametrize("last", [1.0, 1.5, math.nan])
def test_figure_is_drawn_whatever_the_losses(last: float, tmp_path: Path) -> None:
    first = Pair(0.0, 100, run([2.0, 1.0]), run([2.0, last]))
    second = Pair(0.1, 100, run([2.0]), run([2.0]))
    picture = tmp_path / "demo.png"
    draw([first, second], "title", picture)
    content = picture.read_bytes()
    assert content.startswith(PNG)
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width > 1000
    assert height > 400
