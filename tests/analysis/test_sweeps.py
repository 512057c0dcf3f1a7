"""Curves over initialisations, noise and sizes."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from peftfast.analysis import head_only, noise, noisy, output, robustness, size_sweep
from tests.analysis.adapted import adapted, classifier, failing, score


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone().view(torch.int32) for parameter in model.parameters()]


def test_noise_is_on_the_adapters_alone_and_goes_away_bit_for_bit() -> None:
    model = adapted()
    named = dict(model.named_parameters())
    with torch.no_grad():
        # What x + n - n would lose: a negative zero, a subnormal, a large value.
        next(p for n, p in named.items() if n.endswith("down_bias")).copy_(
            torch.tensor([-0.0, 1e-42, 1e30, 1.0])
        )
    before = bits(model)
    values = {name: parameter.detach().clone() for name, parameter in named.items()}
    with noisy(model, 0.1, seed=3):
        drawn = {name: parameter - values[name] for name, parameter in named.items()}
        for name, difference in drawn.items():
            assert bool(difference.any()) == (".peftfast_" in name), name
        sample = torch.cat([d.flatten() for n, d in drawn.items() if n.endswith("weight")])
        sample = sample[sample != 0]
        assert sample.std().item() == pytest.approx(0.1, rel=0.15)
        one = drawn[next(name for name in drawn if name.endswith("up_weight"))]
    for old, new in zip(before, bits(model), strict=True):
        assert torch.equal(old, new)
    with noisy(model, 0.1, seed=3):
        name = next(name for name in named if name.endswith("up_weight"))
        assert torch.equal(named[name] - values[name], one)
    with pytest.raises(RuntimeError, match="inside"), noisy(model, 0.1, seed=4):
        raise RuntimeError("inside")
    for old, new in zip(before, bits(model), strict=True):
        assert torch.equal(old, new)


def test_scores_under_noise() -> None:
    model = adapted().eval()
    full = score(model)
    curve = noise(model, score, stds=(0.0, 0.3), seeds=(0, 1), progress=False)
    assert curve.full == full
    assert curve.scores.shape == (2, 2)
    assert curve.scores[0].tolist() == [full, full]
    with noisy(model, 0.3, seed=1):
        assert curve.scores[1, 1].item() == score(model)
    assert len(set(curve.scores[1].tolist())) == 2
    before = bits(model)
    with pytest.raises(KeyError, match="the metric failed"):
        noise(model, failing(after=2), progress=False)
    for old, new in zip(before, bits(model), strict=True):
        assert torch.equal(old, new)


def test_noise_on_one_adapter() -> None:
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    named = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in named.items()}
    with noisy(model, 0.1, 0, adapter="other"):
        changed = {name for name, p in named.items() if not torch.equal(p, values[name])}
    assert changed
    assert all(".peftfast_" in name and ".other." in name for name in changed)
    with pytest.raises(ValueError, match="no adapter 'third' of a declared method; its adapters"):
        noise(model, score, adapter="third", progress=False)
    with pytest.raises(ValueError, match="has no adapters of a declared method; it has none"):
        noise(classifier(), score, progress=False)


def test_robustness_seeds_each_model_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    stds: list[float] = []

    def make(std: float) -> nn.Module:
        stds.append(std)
        layer = nn.Linear(64, 64)
        nn.init.normal_(layer.weight, std=std)
        return layer

    def spread(model: nn.Module) -> float:
        return float(model.weight.detach().std())

    curve = robustness(make, spread, stds=(1e-3, 1.0), seeds=(0, 1), progress=False)
    assert stds == [1e-3, 1e-3, 1.0, 1.0]
    assert torch.equal(torch.get_rng_state(), state)
    assert curve.scores[:, 0].tolist() == pytest.approx([1e-3, 1.0], rel=0.1)
    assert curve.scores[1, 0] != curve.scores[1, 1]
    again = robustness(make, spread, stds=(1e-3, 1.0), seeds=(0, 1), progress=False)
    assert torch.equal(curve.scores, again.scores)


def test_sizes_beside_a_baseline(tmp_path: Path) -> None:
    def make(size: int) -> nn.Module:
        return adapted(bottleneck=size, train_norms=False)

    curve = size_sweep(
        make,
        score,
        sizes=(1, 4),
        seeds=(0, 1),
        baselines={"head only": lambda: head_only(classifier())},
        progress=False,
    )
    head = 16 * 3 + 3
    assert curve.trained == tuple(head + 3 * 2 * (2 * 16 * m + m + 16) for m in (1, 4))
    assert curve.baselines[0].trained == head
    assert curve.baselines[0].scores.shape == (2,)
    curve.to_csv(tmp_path / "sizes.csv")
    with (tmp_path / "sizes.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["what", "value", "seed", "trained", "score"]
    assert [row[:4] for row in rows[1:]] == [
        *(["bottleneck", "1", seed, str(curve.trained[0])] for seed in "01"),
        *(["bottleneck", "4", seed, str(curve.trained[1])] for seed in "01"),
        *(["head only", "", seed, str(head)] for seed in "01"),
    ]
    assert float(rows[1][4]) == curve.scores[0, 0].item()
    pytest.importorskip("matplotlib")
    curve.plot(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match="stds has -1.0; finite numbers from 0 are needed"):
        noise(adapted(), score, stds=(-1.0,), progress=False)
    with pytest.raises(ValueError, match="stds is empty"):
        robustness(adapted, score, stds=(), progress=False)
    with pytest.raises(ValueError, match="seeds is empty"):
        noise(adapted(), score, seeds=(), progress=False)
    with pytest.raises(ValueError, match="sizes has 0; at least 1 is needed"):
        size_sweep(adapted, score, sizes=(0,), progress=False)
    with pytest.raises(TypeError, match="train_and_score returned str; a number is needed"):
        robustness(lambda std: classifier(), lambda m: "x", stds=(1.0,), progress=False)  # type: ignore[arg-type, return-value]


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "curve.csv"
    path.write_text("before")

    def fail(*names: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        output.write(b"after", path)
    assert [p.name for p in tmp_path.iterdir()] == ["curve.csv"]
    assert path.read_text() == "before"


def test_without_matplotlib_a_plot_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curve = robustness(lambda std: classifier(), score, stds=(1.0,), progress=False)
    with pytest.raises(ImportError, match=r"pip install 'peftfast\[plot\]'"):
        curve.plot(tmp_path / "curve.png")
    curve.to_csv(tmp_path / "curve.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["curve.csv"]
