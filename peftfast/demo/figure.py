"""The demo's picture: both loss curves, their difference, and the memory bars."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peftfast.demo.outcome import LOSS_LIMIT, Pair

PLAIN = "#f0b088"
PATCHED = "#1b6ca8"
GREY = "#666666"
LINEAR_BELOW = 1e-7


def draw(pairs: list[Pair], title: str, path: Path) -> None:
    """Write a PNG of the runs; the first pair is the one without dropout.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    losses, differences, memory = figure.subplots(1, 3, width_ratios=(1.5, 1, 1.1))
    _draw_losses(losses, pairs[0])
    _draw_differences(differences, pairs[0])
    _draw_memory(memory, pairs)
    figure.savefig(path, dpi=130)


def _draw_losses(axes: Axes, pair: Pair) -> None:
    steps = range(1, len(pair.plain.losses) + 1)
    axes.plot(steps, pair.plain.losses, color=PLAIN, linewidth=4, label="PEFT LoRA")
    axes.plot(steps, pair.patched.losses, color=PATCHED, linewidth=1, label="peftfast.patch")
    axes.set(
        title=f"Training loss, dropout {pair.dropout:g}", xlabel="step", ylabel="cross-entropy"
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _tidy(axes)


def _draw_differences(axes: Axes, pair: Pair) -> None:
    steps = range(1, len(pair.differences) + 1)
    axes.plot(steps, pair.differences, ".", color=PATCHED, markersize=3)
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)  # many differences are exactly 0
    axes.axhline(LOSS_LIMIT, color=GREY, linewidth=1, linestyle="--")
    axes.annotate(
        f"allowed: {LOSS_LIMIT:g}",
        (1, LOSS_LIMIT),
        xytext=(0, 4),
        textcoords="offset points",
        color=GREY,
        fontsize=9,
    )
    finite = [difference for difference in pair.differences if math.isfinite(difference)]
    axes.set_ylim(-LINEAR_BELOW / 4, 2 * max([5 * LOSS_LIMIT, *finite]))
    axes.set(title="Difference of the two losses", xlabel="step")
    _tidy(axes)


def _draw_memory(axes: Axes, pairs: list[Pair]) -> None:
    bars = [
        (f"{what}\ndropout {pair.dropout:g}", *(getattr(run, attribute) / 1e6 for run in runs))
        for attribute, what in (("saved_bytes", "saved"), ("peak_bytes", "peak"))
        for pair in pairs
        for runs in [(pair.plain, pair.patched)]
    ]
    width = 0.38
    for side, (label, color) in enumerate((("PEFT LoRA", PLAIN), ("peftfast.patch", PATCHED))):
        drawn = axes.bar(
            [at + (side - 0.5) * width for at in range(len(bars))],
            [bar[1 + side] for bar in bars],
            width,
            color=color,
            label=label,
        )
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(bars)), [bar[0] for bar in bars], fontsize=9)
    axes.set(title="Memory of one step", ylabel="MB over the model's own")
    axes.margins(y=0.15)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
