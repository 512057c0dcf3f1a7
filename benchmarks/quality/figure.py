"""The picture of what methods reach: test accuracy over the parameters that they train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import Row

FULL = "full fine-tuning"
_TEXTS = 3080  # of the test set
_COLORS = {FULL: "#666666", "head only": "#b0a090", "norms only": "#e07b39"}
_ADAPTER = "#1b6ca8"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """A line a method, by what it trains, with the standard error of an accuracy on so many texts;
    a band of one point below full fine-tuning.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.6 + 0.45 * len(rows)), layout="constrained")
    config = rows[0]["config"]
    figure.suptitle(
        f"{config['model']} on {config['data']}, {config['epochs']} epochs", fontsize=12
    )
    axes = figure.subplots()
    axes.set_title(title, fontsize=9)
    ordered = sorted(rows, key=lambda row: row["share"])
    for place, row in enumerate(ordered):
        value = 100 * row["accuracy"]
        error = 100 * math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / _TEXTS)
        color = _COLORS.get(row["variant"], _ADAPTER)
        axes.errorbar(value, place, xerr=error, fmt="o", color=color, capsize=3)
        axes.annotate(
            f"{value:.2f}", (value, place), (0, 6), textcoords="offset points", ha="center"
        )
        if row["variant"] == FULL:
            axes.axvspan(value - 1, value, color="#666666", alpha=0.12, linewidth=0)
    axes.set_yticks(
        range(len(ordered)), [f"{row['variant']}\ntrains {row['share']:.2%}" for row in ordered]
    )
    axes.margins(y=0.15)
    axes.set_xlabel(
        "test accuracy, %, with its standard error\n(band: within 1 point of full fine-tuning)"
    )
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
