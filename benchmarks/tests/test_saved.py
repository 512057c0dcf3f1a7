"""What a forward keeps: the counts of a short sequence, which are those of a long one a token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import saved
from benchmarks.gates import GateFailed
from benchmarks.readme import tables
from benchmarks.saved import OURS, PEFT, SIZE, Case

SHORT = dataclasses.replace(SIZE, sequence=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base() -> Any:
    return saved._base(SHORT, saved.METHODS["lora"], CPU)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mask", ["none", "ones", "padding"])
def test_kept_close_to_the_least(base: Any, dropout: float, mask: str) -> None:
    limit = saved.PADDED_LIMIT if mask == "padding" else saved.LIMIT
    units = saved.measure(base, SHORT, Case(dropout=dropout, mask=mask), OURS)
    assert max(units) <= limit
    assert min(units) >= 9.9  # what no recomputation but of matrix products could leave out


def test_peft_as_it_is(base: Any) -> None:
    """33 and 49 units are what the benchmark's comparison starts from."""
    for dropout, expected in ((0.0, 33.0), (0.1, 49.0)):
        for units in saved.measure(base, SHORT, Case(dropout=dropout), PEFT):
            assert units == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpoints_keep_no_more_than_pefts(base: Any, kind: str) -> None:
    case = Case(dropout=0.1, checkpointing=kind)
    ours, theirs = (saved.measure(base, SHORT, case, variant) for variant in (OURS, PEFT))
    assert ours[0] <= theirs[0] and ours[1] <= theirs[1]


def test_targets_need_what_they_compare_with() -> None:
    def row(variant: str, case: Case, units: float) -> saved.Row:
        config = {**saved._config(SIZE), **dataclasses.asdict(case)}
        return {"variant": variant, "config": config, "saved_units": units, "alive_units": units}

    padded, kept = Case(mask="padding"), Case(memory="keep")
    deep, compiled = Case(checkpointing="reentrant"), Case(compiled=True)
    rows = [row(OURS, case, 10.7) for case in (Case(), padded, kept, deep, compiled)]
    rows.append(row(PEFT, deep, 10.8))
    found = {one.what: (one.limit, one.met) for one in saved.targets(rows)}
    assert found == {
        f"lora, dropout 0.0, mask {mask}: units {way}": (limit, limit > 10.7)
        for mask, limit in (("none", 10.5), ("padding", 11.0))
        for way in ("saved", "alive")
    } | {
        f"lora, dropout 0.0, mask none, {how}: units {way}": (limit, True)
        for how, limit in (("reentrant checkpoints", 10.8), ("compiled", 10.7))
        for way in ("saved", "alive")
    }


def test_wrong_gradients_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = saved.peftfast.patch

    def broken(model: Any, **options: Any) -> Any:
        real(model, **options)
        next(p for p in model.parameters() if p.requires_grad).data.mul_(1.5)
        return model

    monkeypatch.setattr(saved.peftfast, "patch", broken)
    with pytest.raises(GateFailed, match="peftfast differs from PyTorch at float64"):
        saved.check("lora", CPU)


def test_the_command_prints_both_and_records(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr(saved, "cases", lambda: [Case()])
    monkeypatch.setattr(saved.report, "__defaults__", (SHORT,))
    command = ["saved", "--device", "cpu", "--json", "-", "--record", "--results", str(tmp_path)]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in printed["rows"]] == [PEFT, OURS]
    assert all(target["met"] for target in printed["targets"]) and len(printed["targets"]) == 2
    table = tables(printed["rows"])
    assert "| peft | lora | 0.0 |" in table and "| peftfast | lora | 0.0 |" in table
    assert list(tmp_path.rglob("*.json*"))
