"""The whole demo on a tiny model and a file of texts: what it prints, writes and returns."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers.utils import logging as transformers_logging

import peftfast
from peftfast import demo
from peftfast.demo.classifier import bundled_model, quiet_transformers
from peftfast.demo.measuring import spread


def demo_main(*options: object) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.main(parser.parse_args([str(option) for option in options]))


@pytest.fixture
def small(tiny_model: Path, texts: Path, tmp_path: Path) -> list[object]:
    """Options of a run of a few steps on the CPU."""
    options = {
        "--model": tiny_model,
        "--data": texts,
        "--steps": 6,
        "--batch-size": 4,
        "--test-size": 10,
        "--rank": 4,
        "--device": "cpu",
        "--output": tmp_path / "out",
    }
    return [value for pair in options.items() for value in pair]


def test_the_two_runs_agree(
    small: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    summary = tmp_path / "summary.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert demo_main(*small, "--json", summary) == 0
    out = capsys.readouterr().out
    assert "24 of 72 training texts, 10 of 18 test texts, 3 labels; 6 steps of 4" in out
    assert "plain, dropout 0: step 6 of 6, loss" in out
    assert "patched, dropout 0.1: step 3 of 3, loss" in out
    assert "OK: every step's losses agree within 0.001" in out
    assert sum("LOAD REPORT" in record.getMessage() for record in caplog.records) == 1

    picture = tmp_path / "out" / "demo.png"
    assert f"picture: {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")

    found = json.loads(summary.read_text())
    assert found["failures"] == []
    assert found["data"]["train"] == 24
    assert found["data"]["train_available"] == 72
    assert found["settings"]["seed"] == 0
    fused, left = found["report"]["fused"], found["report"]["not_fused"]
    assert f"{len(fused)} modules fused, {len(left)} not" in out
    layers = [one for one in fused if one["op"] == "lora_linear"]
    assert len(layers) == 13  # six in each of two layers, and the pooler
    assert [one["type"].rpartition(".")[2] for one in left] == ["Tanh"]
    without, with_dropout = found["pairs"]
    assert (without["dropout"], with_dropout["dropout"]) == (0.0, 0.1)
    assert (len(without["plain"]["losses"]), len(with_dropout["plain"]["losses"])) == (6, 3)
    assert 0 <= without["largest_loss_difference"] <= 1e-3
    assert with_dropout["accuracy_standard_error"] >= 0
    for pair in (without, with_dropout):
        for run in (pair["plain"], pair["patched"]):
            assert 0 < run["saved_bytes"] < run["peak_bytes"]
            assert run["tokens_per_second"] > 0
            assert 0 < run["trainable"] < run["parameters"]
        assert pair["patched"]["trainable"] == pair["plain"]["trainable"]
    # PEFT keeps a mask and a dropped copy of every input.
    assert with_dropout["patched"]["saved_bytes"] < with_dropout["plain"]["saved_bytes"]


def test_a_wrong_scaling_is_found(
    small: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = peftfast.patch

    def wrong(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        right(model, **options)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= 1.5
        return model

    monkeypatch.setattr(peftfast, "patch", wrong)
    assert demo_main(*small, "--dropout", 0, "--learning-rate", 0.02) == 1
    assert "FAILED: the loss curves differ by" in capsys.readouterr().out


def test_a_patch_that_does_nothing_is_found(
    small: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peftfast, "patch", lambda model, **options: model)
    assert demo_main(*small, "--dropout", 0) == 1
    out = capsys.readouterr().out
    assert "FAILED: peftfast fused nothing in this model" in out
    assert "dropout 0.1" not in out


def test_accuracy_is_that_of_what_was_learnt(small: list[object], tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    options = ("--steps", 100, "--learning-rate", 0.03, "--test-size", 18, "--dropout", 0)
    assert demo_main(*small, *options, "--json", summary) == 0
    (pair,) = json.loads(summary.read_text())["pairs"]
    for run in (pair["plain"], pair["patched"]):
        assert run["losses"][-1] < 0.1
        assert run["accuracy"] > 0.8


def test_long_texts_are_cut_and_said_to_be(
    small: list[object], texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts.write_text(texts.read_text() + f"{'card ' * 40},card\n")
    assert demo_main(*small, "--dropout", 0, "--train-size", 90, "--test-size", 90) == 0
    assert "; 1 texts of 32 tokens or more, cut there" in capsys.readouterr().out


def test_train_size_and_passes(small: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_main(*small, "--dropout", 0, "--train-size", 12) == 0
    assert "12 of 72 training texts" in (out := capsys.readouterr().out)
    assert "(passes: 2)" in out


def test_the_process_is_left_as_it_was() -> None:
    before = (list(warnings.filters), transformers_logging.is_progress_bar_enabled())
    logger = logging.getLogger("transformers.modeling_utils")
    with quiet_transformers(bundled=True):
        assert logger.filters
        assert not transformers_logging.is_progress_bar_enabled()
    assert (list(warnings.filters), transformers_logging.is_progress_bar_enabled()) == before
    assert logger.filters == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "absent.csv"], "cannot read absent.csv: No such file or directory"),
        (["--model", "absent-folder/model"], "cannot load the model absent-folder/model"),
        (["--text-column", "body"], "no text column 'body'"),
        (["--output", __file__], "--output: cannot make"),
        (["--json", "absent-folder/summary.json"], "--json: cannot write"),
    ],
)
def test_what_cannot_be_run_is_said(
    options: list[str], message: str, small: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo_main(*small, "--steps", 1, "--dropout", 0, *options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("peftfast demo: ")
    assert message in captured.err


def test_columns_need_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert demo_main("--text-column", "a", "--output", tmp_path, "--device", "cpu") == 2
    assert "are for a file of --data" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert demo_main("--device", "cuda", "--output", tmp_path) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_a_missing_extra_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo_main() == 2
    assert "pip install 'peftfast[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--steps", "0"), ("--rank", "-1"), ("--dropout", "1"), ("--learning-rate", "nan")],
)
def test_wrong_usage_is_refused(option: str, value: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo_main(option, value)
    assert stopped.value.code == 2


def test_the_bundled_model_is_found() -> None:
    assert (bundled_model() / "model.safetensors").is_file()


@pytest.mark.parametrize("count", [3, 4, 9, 400])
def test_measured_batches_end_with_the_longest_texts(count: int) -> None:
    examples = [{"input_ids": [0] * length} for length in range(1, count + 1)]
    batches = [[len(e["input_ids"]) for e in batch] for batch in spread(examples, 4, 8)]
    assert batches[-1] == list(range(max(1, count - 3), count + 1))
    assert len(batches) == min(8, max(1, count // 4))
    assert all(len(batch) == min(4, count) for batch in batches)
    assert batches == sorted(batches)
