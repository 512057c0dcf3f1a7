"""Drawings of the recorded rows: one PNG a device and benchmark, beside the rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.quality import figure as quality

Row = dict[str, Any]


def draw_all(results: Path = records.RESULTS) -> int:
    """Draws the files of rows that have a drawing; 1 if there is none, 2 without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("plot needs matplotlib: pip install 'peftfast[plot]'", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in records.latest(records.load(results)):
        key = row["provenance"]["device_slug"], row["benchmark"]
        groups.setdefault(key, []).append(row)
    if not groups:
        print(f"no rows are recorded under {results}", file=sys.stderr)
        return 1
    for (slug, benchmark), rows in groups.items():
        path = results / slug / f"{benchmark}.png"
        device = rows[0]["provenance"]["device"]
        if benchmark == "banking77":
            quality.draw(rows, device, path)
        elif all("time" in row or "total_u" in row for row in rows):
            draw(rows, f"{benchmark}: {device}", path)
        else:
            continue  # it has no bars to draw: counted bytes, predictions, a search
        print(path)
    return 0


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """One panel a configuration: a bar a variant, with its quartiles where it was timed."""
    from matplotlib import pyplot

    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(panel_title(row), []).append(row)
    height = sum(0.9 + 0.32 * len(group) for group in panels.values()) + 0.6
    heights = [0.9 + 0.32 * len(group) for group in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, height),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    figure.suptitle(title)
    for axis, (name, group) in zip(axes[:, 0], panels.items(), strict=True):
        axis.set_title(name, fontsize="small", loc="left")
        names = [row["variant"] for row in group]
        values = [bar(row) for row in group]
        axis.barh(names, [value for value, _, _ in values], color=[color(name) for name in names])
        for place, (value, low, high) in enumerate(values):
            axis.plot([low, high], [place, place], color="black", linewidth=1)
            axis.annotate(
                f"{value:.3g}", (value, place), (4, 0), textcoords="offset points", va="center"
            )
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_xlabel("ms" if "time" in group[0] else "u moved, workspaces apart")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def panel_title(row: Row) -> str:
    """The configuration in a line."""
    return ", ".join(f"{key} {value}" for key, value in row["config"].items())


def bar(row: Row) -> tuple[float, float, float]:
    """(length, lower and upper end of its spread): milliseconds, or units moved."""
    if "time" in row:
        time = row["time"]
        return 1e3 * time["median"], 1e3 * time["low"], 1e3 * time["high"]
    return row["total_u"], row["total_u"], row["total_u"]


def color(variant: str) -> str:
    """One colour each for peftfast, PEFT and the rest."""
    if variant.startswith("peftfast"):
        return "tab:green"
    return "tab:orange" if variant.startswith("peft") else "tab:gray"
