"""Dropping the adapters of spans of layers."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peftfast.analysis import Ablation, ablate
from peftfast.methods import HoulsbyConfig, hosts
from tests.analysis.adapted import LAYERS, adapted, classifier, failing, score


def without(model: PeftModel, layers: set[int]) -> float:
    """The score with the adapters of some layers taken out by hand: their up-projections zero."""
    kept = []
    for host in hosts(model):
        if host.block.position in layers:
            for name in host.adapters():
                for _, module in host.components(name):
                    for value in (module.up_weight, module.up_bias):
                        kept.append((value, value.detach().clone()))
                        value.data.zero_()
    result = score(model)
    for value, before in kept:
        value.data.copy_(before)
    return result


def test_the_matrix_is_that_of_adapters_taken_out_by_hand() -> None:
    model = adapted().eval()
    found = ablate(model, score, progress=False)
    assert found.layers == (0, 1, 2)
    assert found.full == score(model)
    assert found.change.dtype == torch.float64
    for i in range(LAYERS):
        for j in range(LAYERS):
            change = found.change[i, j].item()
            if i > j:
                assert change != change
            else:
                expected = without(model, set(range(i, j + 1))) - found.full
                assert abs(expected) > 1e-3
                assert change == pytest.approx(expected, rel=1e-5)


def test_only_the_layers_and_the_adapter_that_are_asked_for() -> None:
    model = adapted(layers=[0, 2], train_norms=False, task_type=None)
    model.add_adapter(
        "other", HoulsbyConfig(bottleneck=2, layers=[1], init_std=0.5, train_norms=False)
    )
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    assert ablate(model, score, progress=False).layers == (0, 1, 2)
    other = ablate(model, score, adapter="other", progress=False)
    assert other.layers == (1,)
    assert other.change.item() == pytest.approx(without(model, {1}) - other.full, rel=1e-5)
    with pytest.raises(ValueError, match="adapter is 'third'; the model has: default, other"):
        ablate(model, score, adapter="third")


def test_the_model_is_as_before_also_after_an_exception() -> None:
    model = adapted()
    model.train()
    model.base_model.model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    seen: list[tuple[bool, bool]] = []

    def looking(given: Any) -> float:
        seen.append((given.training, torch.is_grad_enabled()))
        return score(given)

    ablate(model, looking, progress=False)
    assert set(seen) == {(False, False)}
    with pytest.raises(KeyError, match="the metric failed"):
        ablate(model, failing(after=4), progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all(not host.muted for host in hosts(model))


def test_what_has_no_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification has no adapters in its"):
        ablate(classifier(), score)
    with pytest.raises(TypeError, match="metric returned NoneType; a number is needed"):
        ablate(adapted(), lambda model: None, progress=False)  # type: ignore[arg-type, return-value]


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    nan = float("nan")
    change = torch.tensor([[0.1, -0.5], [nan, -0.25]], dtype=torch.float64)
    found = Ablation((3, 5), 0.75, change)
    found.to_csv(tmp_path / "spans.csv")
    with (tmp_path / "spans.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["first_layer", "last_layer", "score", "change"],
            ["3", "3", "0.85", "0.1"],
            ["3", "5", "0.25", "-0.5"],
            ["5", "5", "0.5", "-0.25"],
        ]
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "spans.png")
    assert (tmp_path / "spans.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spans.csv", "spans.png"]
    found.plot(tmp_path / "spans.svg")
    assert b"<svg" in (tmp_path / "spans.svg").read_bytes()
    with pytest.raises(ValueError, match="nonsense"):
        found.plot(tmp_path / "spans.nonsense")
    assert not (tmp_path / "spans.nonsense").exists()
