"""Stacked bars of the classes, and the bytes over a step, with the budget's line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftfast.memory.profiles import GIB
from peftfast.memory.report import MemoryReport
from peftfast.memory.trace import CLASSES

NEEDS = "--plot needs matplotlib, which is not installed: pip install 'peftfast[plot]'"


def draw(reports: Sequence[MemoryReport], budget: int | None, path: Path) -> None:
    """Write a figure of some reports: on the left what each is made of, on the right its course.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: matplotlib writes no file with this ending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.6 + 0.5 * max(6, len(reports))), layout="constrained")
    bars, course = figure.subplots(1, 2)
    names = [_name(report) for report in reports]
    left = [0.0] * len(reports)
    shown = [n for n in CLASSES if any(r.by_class.get(n, 0) > 0 for r in reports)]
    for name in shown:
        widths = [report.by_class.get(name, 0) / GIB for report in reports]
        bars.barh(names, widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    outside = [report.outside_bytes / GIB for report in reports]
    bars.barh(names, outside, left=left, label="context, segments", color="lightgrey")
    bars.invert_yaxis()
    bars.set_xlabel("GiB at the peak")
    for report, name in zip(reports, names, strict=True):
        points = report.timeline
        end = max(points[-1].position, 1.0)
        course.plot([p.position / end for p in points], [p.total / GIB for p in points], label=name)
    course.set_xlabel("part of the step's allocations")
    course.set_ylabel("GiB")
    if budget is not None:
        bars.axvline(budget / GIB, color="red", linestyle="--", label="budget")
        course.axhline(budget / GIB, color="red", linestyle="--")
    for axes in (bars, course):
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def _name(report: MemoryReport) -> str:
    of = report.settings
    return f"{of['model']} {of['method'] or ''} {of['batch']} x {of['seq']}"
