"""Which layers' adapters matter: scores without those of each span of layers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftfast.analysis.output import (
    evaluating,
    new_figure,
    number,
    save_csv,
    save_figure,
    tracked,
)
from peftfast.methods import hosts, muted


@dataclass(frozen=True)
class Ablation:
    """How a score changes without the adapters of layers i to j.

    Attributes:
        layers: the layers that have adapters, L of them, in their order.
        full: the score with every adapter.
        change: [L, L], float64, on the CPU: at [i, j] the score without the adapters of
            `layers[i]` to `layers[j]`, minus `full`; NaN below the diagonal. The corner [0, L - 1]
            is the score without any.
    """

    layers: tuple[int, ...]
    full: float
    change: Tensor

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line for each span: first layer, last layer, score, change.

        Raises:
            OSError: the file can't be written; one that was there stays.
        """
        rows = [
            (self.layers[i], self.layers[j], self.full + change, change)
            for i in range(len(self.layers))
            for j in range(i, len(self.layers))
            for change in (self.change[i, j].item(),)
        ]
        save_csv(("first_layer", "last_layer", "score", "change"), rows, path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the matrix as a heat map (as figure 6 of Houlsby et al., ICML 2019), in the
        format of the path's suffix.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: it has no such format.
            OSError: the file can't be written; one that was there stays.
        """
        count = len(self.layers)
        figure = new_figure(2.4 + 0.55 * count, 1.8 + 0.5 * count)
        axes = figure.subplots()
        seen = self.change[~self.change.isnan()].abs()
        limit = seen.max().item() if len(seen) and seen.max() > 0 else 1.0
        image = axes.imshow(self.change.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        figure.colorbar(image, ax=axes, label="change of the score")
        places = range(count)
        axes.set_xticks(places, [str(layer) for layer in self.layers])
        axes.set_yticks(places, [str(layer) for layer in self.layers])
        axes.set(
            title=f"Without the adapters of a span of layers (with all: {self.full:.4g})",
            xlabel="last layer without",
            ylabel="first layer without",
        )
        axes.title.set_fontsize(10)
        if count <= 16:
            for i in places:
                for j in range(i, count):
                    value = self.change[i, j].item()
                    dark = abs(value) > 0.6 * limit
                    axes.text(
                        j,
                        i,
                        f"{value:.2g}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if dark else "black",
                    )
        save_figure(figure, path)


def ablate(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    *,
    adapter: str | None = None,
    progress: bool = True,
) -> Ablation:
    """Score a trained model without the adapters of each span of layers (Houlsby et al.,
    "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 3.6).

    L (L + 1) / 2 + 1 scores for L layers. Nothing is trained again; norms and heads that were
    trained with the adapters stay as trained. The model is as before afterwards, also after an
    exception.

    Args:
        model: with adapters of `peftfast.methods`.
        metric: given the model, in evaluation mode and without gradients, the score.
        adapter: drop the adapters of this name; None: all.
        progress: show a bar.

    Raises:
        ValueError: the model has no adapters in layers, or none of that name.
        TypeError: `metric` returns no number.
    """
    layers = _layers(model, adapter)
    change = torch.full((len(layers), len(layers)), math.nan, dtype=torch.float64)
    spans = [(i, j) for i in range(len(layers)) for j in range(i, len(layers))]
    with evaluating(model):
        full = number(metric(model), "metric")
        for i, j in tracked(spans, "ablation", progress):
            with muted(model, layers[i : j + 1], adapter):
                change[i, j] = number(metric(model), "metric") - full
    return Ablation(layers, full, change)


def _layers(model: nn.Module, adapter: str | None) -> tuple[int, ...]:
    """The positions of the layers that have adapters, of a name or any."""
    places = [(host.block, host.adapters()) for host in hosts(model) if host.block is not None]
    names = sorted({name for _, found in places for name in found})
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no adapters in its layers; make some with a configuration"
            " of peftfast.methods, such as HoulsbyConfig, and peft.get_peft_model"
        )
    if adapter is not None and adapter not in names:
        raise ValueError(f"adapter is {adapter!r}; the model has: {', '.join(names)}")
    wanted = set(names) if adapter is None else {adapter}
    return tuple(sorted({block.position for block, found in places if found & wanted}))
