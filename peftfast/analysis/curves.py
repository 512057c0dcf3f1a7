"""Scores over one quantity, to draw and to tabulate."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from torch import Tensor

from peftfast.analysis.output import new_figure, save_csv, save_figure

_LINE = "#1b6ca8"
_POINTS = ("#e07b39", "#4a8f5b", "#8a5fa8", "#b03a48", "#666666")


@dataclass(frozen=True)
class Baseline:
    """What is scored beside a curve, at no value of its quantity.

    Attributes:
        name: what it is called.
        scores: [seeds], float64.
        trained: how many parameters it trains.
    """

    name: str
    scores: Tensor
    trained: int


@dataclass(frozen=True)
class Curve:
    """Scores at each value of a quantity.

    Attributes:
        quantity: what is varied.
        values: its values.
        seeds: what each was scored with.
        scores: [values, seeds], float64, on the CPU.
        trained: how many parameters train at each value, or None where that isn't in question.
        baselines: what is drawn beside it.
        full: the score that is drawn as a line across, or None.
    """

    quantity: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    scores: Tensor
    trained: tuple[int, ...] | None = None
    baselines: tuple[Baseline, ...] = ()
    full: float | None = None

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line for each score: the name of the quantity or of the baseline, the value
        (empty for a baseline), the seed, the trained parameters where they are counted, the score.

        Raises:
            OSError: the file can't be written; one that was there stays.
        """
        counts = self.trained or ("",) * len(self.values)
        rows: list[tuple[object, ...]] = []
        for value, count, scores in zip(self.values, counts, self.scores.tolist(), strict=True):
            rows += [
                (self.quantity, value, seed, count, score)
                for seed, score in zip(self.seeds, scores, strict=True)
            ]
        for one in self.baselines:
            rows += [
                (one.name, "", seed, one.trained, score)
                for seed, score in zip(self.seeds, one.scores.tolist(), strict=True)
            ]
        if self.full is not None:
            rows.append(("unchanged", "", "", "", self.full))
        save_csv(("what", "value", "seed", "trained", "score"), rows, path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the means over the seeds, with the span between the lowest and the highest, in
        the format of the path's suffix.

        The horizontal axis is the quantity, or the trained parameters where they are counted.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: it has no such format.
            OSError: the file can't be written; one that was there stays.
        """
        figure = new_figure(6.4, 4.2)
        axes = figure.subplots()
        places = list(self.values if self.trained is None else self.trained)
        low, high = self.scores.amin(1).tolist(), self.scores.amax(1).tolist()
        name = self.quantity if self.trained is not None else None
        axes.plot(places, self.scores.mean(1).tolist(), "o-", color=_LINE, label=name)
        if len(self.seeds) > 1:
            axes.fill_between(places, low, high, color=_LINE, alpha=0.2, linewidth=0)
        if self.trained is not None:
            for value, place, score in zip(
                self.values, places, self.scores.mean(1).tolist(), strict=True
            ):
                axes.annotate(
                    f"{value:g}", (place, score), (0, 7), textcoords="offset points", ha="center"
                )
        for number, one in enumerate(self.baselines):
            color = _POINTS[number % len(_POINTS)]
            axes.plot(one.trained, one.scores.mean().item(), "s", color=color, label=one.name)
        if self.full is not None:
            axes.axhline(self.full, color="#666666", linestyle="--", label="unchanged")
        spread = [place for place in places if place > 0]
        if spread and max(spread) / min(spread) >= 20:
            # Zero has a place of its own, left of the smallest value.
            below = 10.0 ** math.floor(math.log10(min(spread)))
            axes.set_xscale("symlog", linthresh=below)
            axes.set_xlim(left=0 if min(places) == 0 else below)
        axes.set(
            xlabel=self.quantity if self.trained is None else "trained parameters", ylabel="score"
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
        save_figure(figure, path)
