"""The command that trains the methods on Banking77 and records what they reach."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import records
from benchmarks.commands import choose_device
from benchmarks.provenance import provenance
from benchmarks.quality.banking77 import (
    METHODS,
    NAME,
    console_progress,
    recorded,
    run,
)
from benchmarks.records import Row
from benchmarks.registry import BenchmarkError
from benchmarks.tables import console, figure, show
from peftfast.demo.classifier import quiet_transformers


def train_methods(
    names: Sequence[str],
    *,
    device: str | None,
    epochs: int,
    seed: int,
    again: bool,
    results: Path | None,
    record: bool,
) -> int:
    """Trains the named methods, or all; each row is recorded when it is there, and what is recorded
    on this device already is left out unless `again`. 2 if the call is wrong.
    """
    try:
        if unknown := [name for name in names if name not in METHODS]:
            raise BenchmarkError(f"no method {', '.join(unknown)}; there are: {', '.join(METHODS)}")
        if epochs < 1:
            raise BenchmarkError(f"--epochs is {epochs}; at least 1 is needed")
        where = choose_device(device)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    folder = results or records.RESULTS
    stamp = provenance(where)
    known = recorded(stamp["device_slug"], folder)
    chosen = [METHODS[name] for name in names] if names else list(METHODS.values())
    fresh: list[Row] = []
    progress = console_progress(Console(stderr=True, highlight=False))
    with quiet_transformers(bundled=True):
        rows = run(
            chosen,
            where,
            seed=seed,
            epochs=epochs,
            known=[] if again else known,
            progress=progress,
        )
        for row in rows:
            row["provenance"] = stamp
            fresh.append(row)
            if record:
                records.append([row], folder)
    wanted = {method.name for method in chosen}
    shown = [
        row
        for row in records.latest([*known, *fresh])
        if row["benchmark"] == NAME and row["variant"] in wanted
    ]
    header = ["method", "accuracy", "trained", "with classifier", "rate", "ms a step", "peak MiB"]
    show(console(to_stderr=False), "Banking77, test accuracy", header, [cells(r) for r in shown])
    return 0


def cells(row: Row) -> list[str]:
    """A row of the table."""
    return [
        row["variant"],
        f"{row['accuracy']:.2%}",
        f"{row['share_without_classifier']:.2%}",
        f"{row['share']:.2%}",
        f"{row['learning_rate']:g}",
        figure(1e3 * row["time"]["median"], 0),
        figure(row["peak_bytes"] / 2**20, 1),
    ]
