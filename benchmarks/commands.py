"""The commands that count and time: which benchmarks, what is printed, what is recorded."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import torch
from rich.console import Console

from benchmarks import records
from benchmarks.gates import GateFailed
from benchmarks.provenance import provenance
from benchmarks.registry import (
    BenchmarkError,
    CountedReport,
    Request,
    Say,
    counted_benchmarks,
    timed_benchmarks,
)
from benchmarks.tables import console, figure, show
from benchmarks.targets import Target

_T = TypeVar("_T")


def list_benchmarks() -> int:
    """Prints every benchmark, the command that it belongs to and what it shows."""
    cells = [[f"traffic {b.name}", b.summary] for b in counted_benchmarks().values()]
    cells += [[f"run {b.name}", b.summary] for b in timed_benchmarks().values()]
    cells.append(["saved", "what a forward keeps for its backward: PEFT as it is, and patched"])
    out = console(to_stderr=False)
    for command, summary in cells:
        out.print(f"{command:24} {summary}")
    return 0


def _chosen(names: Sequence[str], known: Mapping[str, _T]) -> list[_T]:
    if unknown := [name for name in names if name not in known]:
        raise BenchmarkError(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in names]


def _progress(name: str) -> Say:
    """Lines of progress on standard error."""
    return lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True)


def _write_json(value: Any, path: str | None) -> None:
    if path is None:
        return
    text = json.dumps(value, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def _show_targets(out: Console, targets: Iterable[Target]) -> None:
    for target in targets:
        out.print(str(target), style=None if target.met else "bold red")


def count_traffic(
    names: Sequence[str], json_path: str | None, results: Path | None, *, record: bool
) -> int:
    """Counts the named benchmarks; 1 if a target is missed, 2 if a name is unknown."""
    try:
        chosen = _chosen(names, counted_benchmarks())
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    out = console(to_stderr=json_path == "-")
    where = provenance(torch.device("cpu"))
    reports: list[dict[str, Any]] = []
    missed = False
    for benchmark in chosen:
        report = benchmark.count(_progress(benchmark.name))
        _show_report(out, benchmark.name, report)
        missed |= not all(target.met for target in report.targets)
        reports.append(
            {
                "benchmark": benchmark.name,
                "config": report.config,
                "unit_bytes": report.unit_bytes,
                "rows": report.rows,
                "programs": report.programs,
                "targets": [target.as_dict() for target in report.targets],
                "provenance": where,
            }
        )
    _write_json({"reports": reports}, json_path)
    if record:
        rows = [_counted_row(report, row) for report in reports for row in report["rows"]]
        for path in records.append(rows, results or records.RESULTS):
            out.print(f"recorded: {path}")
    return int(missed)


def _counted_row(report: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A counted row to record; counts don't depend on the device and have their own folder."""
    figures = [
        "total_u", "extra_u", "extra_per_linear_u", "saved_growth_u", "workspace_u", "atomics",
        "gflops",
    ]  # fmt: skip
    settings = {key: row[key] for key in ("adapters", "dropout") if key in row}
    return {
        "benchmark": report["benchmark"],
        "variant": row["variant"],
        "config": {**report["config"], **settings},
        "unit_bytes": report["unit_bytes"],
        **{key: row[key] for key in figures if key in row},
        "provenance": {**report["provenance"], "device_slug": records.COUNTED_SLUG},
    }


def _show_report(out: Console, name: str, report: CountedReport) -> None:
    sizes = ", ".join(f"{key} {value}" for key, value in report.config.items())
    per_linear = any("extra_per_linear_u" in row for row in report.rows)
    header = ["variant", "adapters", "dropout", "total u", "extra u"]
    header += ["extra u a linear"] if per_linear else []
    header += ["workspace u", "atomics", "GFLOP"]
    cells = []
    for row in report.rows:
        line = [row["variant"], row.get("adapters", "-"), str(row.get("dropout", "-"))]
        line += [figure(row["total_u"]), figure(row["extra_u"])]
        line += [figure(row.get("extra_per_linear_u"))] if per_linear else []
        line += [figure(row["workspace_u"]), str(row["atomics"]), figure(row["gflops"])]
        cells.append(line)
    title = f"{name}: bytes of a forward + backward; {sizes}; 1 u = {report.unit_bytes} bytes"
    show(out, title, header, cells)
    _show_targets(out, report.targets)


def run_timed(
    names: Sequence[str],
    *,
    device: str | None,
    json_path: str | None,
    quick: bool,
    budget: float | None,
    results: Path | None,
    record: bool,
) -> int:
    """Times the named benchmarks; 1 if one failed or gave wrong results, 2 if the call is wrong.

    A missed target of speed is printed and does not change the status: it depends on the machine.
    """
    try:
        chosen = _chosen(names, timed_benchmarks())
        where = choose_device(device)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    out = console(to_stderr=json_path == "-")
    deadline = None if budget is None else monotonic() + budget
    stamp = provenance(where)
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    failed = False
    for benchmark in chosen:
        request = Request(where, quick, deadline, _progress(benchmark.name))
        try:
            for outcome in benchmark.time(request):
                fresh = [
                    {"benchmark": benchmark.name, **row, "provenance": stamp}
                    for row in outcome.rows
                ]
                _show_rows(out, benchmark.name, fresh)
                _show_targets(out, outcome.targets)
                for refused in outcome.refused:
                    out.print(f"not measured: {refused}")
                rows += fresh
                targets += outcome.targets
                if record:
                    records.append(fresh, results or records.RESULTS)
        except (BenchmarkError, GateFailed) as error:
            out.print(f"{benchmark.name}: {error}", style="bold red")
            failed = True
    _write_json({"rows": rows, "targets": [target.as_dict() for target in targets]}, json_path)
    return int(failed)


def count_saved(
    *,
    device: str | None,
    json_path: str | None,
    quick: bool,
    results: Path | None,
    record: bool,
    methods: Sequence[str] | None = None,
) -> int:
    """Counts what a forward keeps; 1 if a target is missed or results are wrong, 2 if the call is
    wrong.
    """
    from benchmarks import saved

    out = console(to_stderr=json_path == "-")
    try:
        where = choose_device(device)
        chosen = saved.cases()
        if methods is not None:
            if unknown := sorted(set(methods) - set(saved.METHODS)):
                known = ", ".join(saved.METHODS)
                raise BenchmarkError(f"--method {unknown[0]}: known are {known}")
            chosen = [case for case in chosen if case.method in methods]
        if quick:
            chosen = [case for case in chosen if case.method == "lora" and not case.compiled]
        rows = list(saved.report(chosen, where, _progress("saved")))
    except BenchmarkError as error:
        out.print(f"saved: {error}", style="bold red")
        return 2
    except GateFailed as error:
        out.print(f"saved: {error}", style="bold red")
        return 1
    stamp = provenance(where)
    full = [{"benchmark": "saved", **row, "provenance": stamp} for row in rows]
    header = ["variant", "configuration", "units saved", "units alive"]
    show(out, "bytes kept for the backward", header, [saved.cells(row) for row in full])
    targets = saved.targets(rows)
    _show_targets(out, targets)
    _write_json({"rows": full, "targets": [target.as_dict() for target in targets]}, json_path)
    if record:
        for path in records.append(full, results or records.RESULTS):
            out.print(f"recorded: {path}")
    return int(not all(target.met for target in targets))


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the one that there is."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def _show_rows(out: Console, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    title = ", ".join(f"{key} {value}" for key, value in rows[0]["config"].items())
    header = ["variant", "ms", "quartiles", "back to back ms", "tokens/s", "peak MiB", "x floor"]
    cells = [
        [
            row["variant"],
            figure(1e3 * row["time"]["median"], 3),
            f"{figure(1e3 * row['time']['low'], 3)}-{figure(1e3 * row['time']['high'], 3)}",
            figure(None if row["back_to_back"] is None else 1e3 * row["back_to_back"], 3),
            figure(row["tokens_per_second"], 0),
            figure(None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20, 1),
            figure(row["distance_to_floor"]),
        ]
        for row in rows
    ]
    show(out, f"{name}: {title}", header, cells)
