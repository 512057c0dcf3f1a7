# mypy: disable-error-code="no-untyped-def"
"""Recorded rows, the tables and drawings made of them."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import records
from benchmarks.plots import draw_all
from benchmarks.provenance import device_slug, provenance
from benchmarks.readme import BEGIN, END, tables, update

LINEAR = {"rows": 8, "in_features": 4, "out_features": 4, "rank": 2, "dtype": "float32"}


def _row(variant="peftfast, float32 adapters", seconds=0.002, date="2024-05-01T00:00:00+00:00"):
    return {
        "benchmark": "lora_linear",
        "variant": variant,
        "config": {**LINEAR, "dropout": 0.1},
        "time": {"median": seconds, "low": seconds, "high": seconds, "best": seconds, "count": 5},
        "tokens_per_second": 8 / seconds,
        "peak_bytes": 1 << 20,
        "distance_to_floor": 1.5,
        "provenance": {
            "device_slug": "gpu",
            "device": "A GPU",
            "driver": "1.0",
            "threads": 1,
            "torch": "2.0",
            "triton": "3.0",
            "date": date,
        },
    }


def _counted_row():
    row = {"benchmark": "lora_linear", "variant": "frozen", "config": LINEAR, "total_u": 5.0}
    where = {"device_slug": records.COUNTED_SLUG, "device": "x", "date": "2024-05-01"}
    return {**row, "extra_u": None, "workspace_u": 0.0, "provenance": where}


def test_rows_come_back_and_the_newest_stands(tmp_path):
    old, new = _row(seconds=0.002), _row(seconds=0.001, date="2024-05-02T00:00:00+00:00")
    (path,) = records.append([new, old], tmp_path)
    assert path == tmp_path / "gpu" / "lora_linear.jsonl"
    assert records.load(tmp_path) == [new, old]
    assert records.latest(records.load(tmp_path)) == [new]


def test_a_damaged_line_is_named(tmp_path):
    (path,) = records.append([_row()], tmp_path)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ValueError, match="lora_linear.jsonl:2 is not a JSON row"):
        records.load(tmp_path)


def test_provenance_has_what_a_row_needs():
    found = provenance(torch.device("cpu"))
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    for key in ("device", "device_slug", "driver", "python", "peft", "commit", "dirty", "date"):
        assert key in found
    assert json.loads(json.dumps(found)) == found
    assert found["device_slug"] == device_slug(torch.device("cpu"))
    assert set(found["device_slug"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_tables_hold_the_recorded_figures():
    text = tables([_row(), _row("frozen", seconds=0.001), _counted_row()])
    assert "A GPU" in text and "torch 2.0" in text
    assert "| peftfast, float32 adapters | 8 | 4 | 4 | 2 | 0.1 | 2.00 |" in text
    assert "| 2.00 | 1.0 | 1.50 |" in text  # twice the frozen linear, 1 MiB, 1.5 times the floor
    assert "| frozen | - | - | 5.00 | - | 0.00 |" in text


def test_readme_is_updated_and_checked(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert update(check=True, readme=readme, results=results) == 1
    assert update(check=False, readme=readme, results=results) == 0
    assert readme.read_text() == f"before\n{BEGIN}\nNo rows are recorded.\n{END}\nafter\n"
    assert update(check=True, readme=readme, results=results) == 0
    records.append([_row()], results)
    assert update(check=True, readme=readme, results=results) == 1
    assert update(check=False, readme=readme, results=results) == 0
    assert "| peftfast, float32 adapters |" in readme.read_text()


def test_readme_without_markers_is_an_error(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n")
    assert update(check=False, readme=readme, results=tmp_path) == 2
    assert readme.read_text() == "nothing here\n"
    assert BEGIN in capsys.readouterr().err


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_all(tmp_path) == 1
    records.append([_row(), _row("frozen", seconds=0.001), _counted_row()], tmp_path)
    assert draw_all(tmp_path) == 0
    drawn = tmp_path / "gpu" / "lora_linear.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / records.COUNTED_SLUG / "lora_linear.png").stat().st_size > 1000
