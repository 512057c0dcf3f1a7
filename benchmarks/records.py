"""Recorded rows: JSON lines, one file a benchmark in one folder a device."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COUNTED_SLUG = "counted"

Row = dict[str, Any]


def append(rows: Iterable[Row], folder: Path = RESULTS) -> list[Path]:
    """Appends each row to `folder/<device_slug>/<benchmark>.jsonl`; gives the files written."""
    written: list[Path] = []
    for row in rows:
        path = folder / row["provenance"]["device_slug"] / f"{row['benchmark']}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")
        if path not in written:
            written.append(path)
    return written


def load(folder: Path = RESULTS) -> list[Row]:
    """Every recorded row, oldest first within its file."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*/*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not a JSON row: {error}") from error
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each device, benchmark, configuration and variant, in the given order."""
    newest: dict[str, Row] = {}
    for row in rows:
        key = json.dumps(
            [row["provenance"]["device_slug"], row["benchmark"], row["config"], row["variant"]],
            sort_keys=True,
        )
        if key not in newest or newest[key]["provenance"]["date"] <= row["provenance"]["date"]:
            newest[key] = row
    return list(newest.values())
