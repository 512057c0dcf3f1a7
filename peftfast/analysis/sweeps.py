"""How a score depends on the initialisation, on noise, and on the size of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from peftfast.analysis.curves import Baseline, Curve
from peftfast.analysis.output import evaluating, number, tracked
from peftfast.methods import hosts

INITIAL_STDS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NOISE_STDS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)

_Value = TypeVar("_Value", int, float)
Score = Callable[[nn.Module], float]


def robustness(
    make_model: Callable[[float], nn.Module],
    train_and_score: Score,
    *,
    stds: Sequence[float] = INITIAL_STDS,
    seeds: Sequence[int] = (0,),
    progress: bool = True,
) -> Curve:
    """Train and score with adapters that are drawn with each standard deviation (Houlsby et al.,
    ICML 2019, section 3.6: 1e-7 to 1).

    Args:
        make_model: given a standard deviation, a fresh model, such as one with
            `HoulsbyConfig(init_std=std)`.
        train_and_score: given the model, trains it and gives its score.
        stds: the standard deviations.
        seeds: torch's generators are seeded with each, before `make_model`; their states are as
            before afterwards.
        progress: show a bar.

    Raises:
        ValueError: `stds` or `seeds` is empty; a standard deviation is negative.
        TypeError: `train_and_score` returns no number.
    """
    scores, _ = _trained(
        make_model, train_and_score, _stds(stds), seeds, "robustness to initialisation", progress
    )
    return Curve("standard deviation of the initialisation", tuple(stds), tuple(seeds), scores)


def size_sweep(
    make_model: Callable[[int], nn.Module],
    train_and_score: Score,
    *,
    sizes: Sequence[int] = (4, 16, 64),
    seeds: Sequence[int] = (0,),
    baselines: Mapping[str, Callable[[], nn.Module]] | None = None,
    progress: bool = True,
) -> Curve:
    """Train and score adapters of each size, and baselines beside them, by trained parameters
    (Houlsby et al., ICML 2019, figure 4).

    Args:
        make_model: given a size, a fresh model, such as one with `HoulsbyConfig(bottleneck=size)`.
        train_and_score, seeds, progress: as in `robustness`.
        sizes: the bottlenecks' widths.
        baselines: by name, what makes a fresh model of each: `head_only`, `norms_only` and
            `top_layers` on the base model, for example.

    Raises:
        ValueError: `sizes` or `seeds` is empty; a size is below 1.
        TypeError: `train_and_score` returns no number.
    """
    if small := [size for size in sizes if size < 1]:
        raise ValueError(f"sizes has {small[0]}; at least 1 is needed")
    makers = dict(baselines or {})
    scores, trained = _trained(make_model, train_and_score, sizes, seeds, "size", progress)
    beside = []
    for name, make in makers.items():
        found, counts = _trained(
            lambda _, make=make: make(),  # type: ignore[misc]
            train_and_score,
            (0,),
            seeds,
            name,
            progress,
        )
        beside.append(Baseline(name, found[0], counts[0]))
    return Curve(
        "bottleneck", tuple(sizes), tuple(seeds), scores, tuple(trained), baselines=tuple(beside)
    )


def noise(
    model: nn.Module,
    metric: Score,
    *,
    stds: Sequence[float] = NOISE_STDS,
    seeds: Sequence[int] = (0, 1, 2),
    adapter: str | None = None,
    progress: bool = True,
) -> Curve:
    """Score a trained model with Gaussian noise added to its adapters' parameters.

    The parameters are bit for bit as before afterwards, also after an exception.

    Args:
        model: with adapters of `peftfast.methods`.
        metric: given the model, in evaluation mode and without gradients, the score.
        stds: standard deviations of the noise, absolute.
        seeds: one draw of the noise each.
        adapter: change the adapters of this name; None: all.
        progress: show a bar.

    Raises:
        ValueError: the model has no such adapters; `stds` or `seeds` is empty; a standard deviation
            is negative.
        TypeError: `metric` returns no number.
    """
    draws = [(std, seed) for std in _stds(stds) for seed in _some(seeds, "seeds")]
    scores = []
    with evaluating(model):
        full = number(metric(model), "metric")
        for std, seed in tracked(draws, "noise", progress):
            with noisy(model, std, seed, adapter=adapter):
                scores.append(number(metric(model), "metric"))
    table = torch.tensor(scores, dtype=torch.float64).view(len(stds), len(seeds))
    return Curve("standard deviation of the noise", tuple(stds), tuple(seeds), table, full=full)


@contextmanager
def noisy(model: nn.Module, std: float, seed: int, *, adapter: str | None = None) -> Iterator[None]:
    """Gaussian noise on the adapters' parameters within the context, which then are bit for bit as
    before. The same seed draws the same noise on every device.

    Raises:
        ValueError: the model has no such adapters; `std` is negative.
    """
    _stds((std,))
    parameters = _adapter_parameters(model, adapter)
    generator = torch.Generator().manual_seed(seed)
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.add_(drawn.to(parameter), alpha=std)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _adapter_parameters(model: nn.Module, adapter: str | None) -> list[nn.Parameter]:
    """Each parameter of the adapters once, though several adapters share it."""
    found: dict[int, nn.Parameter] = {}
    names: set[str] = set()
    for host in hosts(model):
        names |= host.adapters()
        for name in sorted(host.adapters() if adapter is None else host.adapters() & {adapter}):
            for _, module in host.components(name):
                found.update((id(parameter), parameter) for parameter in module.parameters())
    if not found:
        has = f"its adapters are: {', '.join(sorted(names))}" if names else "it has none"
        wanted = "adapters" if adapter is None else f"adapter {adapter!r}"
        raise ValueError(f"{type(model).__name__} has no {wanted} of a declared method; {has}")
    return list(found.values())


def _trained(
    make_model: Callable[[_Value], nn.Module],
    train_and_score: Score,
    values: Sequence[_Value],
    seeds: Sequence[int],
    what: str,
    progress: bool,
) -> tuple[Tensor, list[int]]:
    """Scores [values, seeds], and the parameters that train at each value."""
    runs = [
        (value, seed) for value in _some(values, "the values") for seed in _some(seeds, "seeds")
    ]
    scores, counts = [], []
    for value, seed in tracked(runs, what, progress):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make_model(value)
            counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
            scores.append(number(train_and_score(model), "train_and_score"))
    table = torch.tensor(scores, dtype=torch.float64).view(len(values), len(seeds))
    return table, counts[:: len(seeds)]


def _stds(stds: Sequence[float]) -> Sequence[float]:
    for std in _some(stds, "stds"):
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"stds has {std}; finite numbers from 0 are needed")
    return stds


_Item = TypeVar("_Item")


def _some(items: Sequence[_Item], name: str) -> Sequence[_Item]:
    if not len(items):
        raise ValueError(f"{name} is empty")
    return items
