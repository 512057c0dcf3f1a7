"""The tables of recorded rows in README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.provenance import ROOT
from benchmarks.tables import figure, markdown

README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

Row = dict[str, Any]


def update(*, check: bool, readme: Path = README, results: Path = records.RESULTS) -> int:
    """Writes the tables between the two markers; with `check`, only says whether they are current.

    Returns:
        0; 1 with `check` if they are stale, 2 if the markers are missing.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{readme}: the markers {BEGIN} and {END} are missing", file=sys.stderr)
        return 2
    current = f"{before}{BEGIN}\n{tables(records.load(results))}\n{END}{after}"
    if check:
        if current != text:
            print(f"{readme} is stale: run `python -m benchmarks readme`", file=sys.stderr)
        return int(current != text)
    readme.write_text(current, encoding="utf-8")
    return 0


def tables(rows: Sequence[Row]) -> str:
    """Markdown of the newest row of each configuration, by device and benchmark."""
    parts = []
    for (slug, benchmark), group in _grouped(records.latest(rows)).items():
        if (table := _TABLES.get(benchmark)) is None:
            continue
        heading = "Counted, not timed" if slug == records.COUNTED_SLUG else _where(group)
        if slug == records.COUNTED_SLUG:
            table = _COUNTED.get(benchmark, _counted_table)
        body = table(group)
        parts.append(f"**`{benchmark}`** {heading}\n\n{body}")
    return "\n\n".join(parts) if parts else "No rows are recorded."


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        key = row["provenance"]["device_slug"], row["benchmark"]
        groups.setdefault(key, []).append(row)
    return dict(sorted(groups.items()))


def _where(rows: Sequence[Row]) -> str:
    """Device, versions and dates of a table's rows."""
    devices = " / ".join(dict.fromkeys(row["provenance"]["device"] for row in rows))
    threads = {row["provenance"]["threads"] for row in rows if row["provenance"]["driver"] is None}
    if threads:
        devices += f", {max(threads)} threads"
    versions = " / ".join(
        dict.fromkeys(
            f"torch {row['provenance']['torch']}, triton {row['provenance']['triton']}"
            for row in rows
        )
    )
    dates = sorted({row["provenance"]["date"][:10] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"on {devices}; {versions}; {when}"


def _ratio_to(row: Row, rows: Iterable[Row], who: str) -> str:
    """This row's time as a multiple of that of `who` in the same configuration."""
    for other in rows:
        if other["config"] == row["config"] and other["variant"] == who:
            return f"{row['time']['median'] / other['time']['median']:.2f}"
    return "-"


def _time_cells(row: Row) -> list[str]:
    time = row["time"]
    spread = f"{figure(1e3 * time['low'])}-{figure(1e3 * time['high'])}"
    return [figure(1e3 * time["median"]), spread, f"{row['tokens_per_second']:,.0f}"]


def _linear_table(rows: Sequence[Row]) -> str:
    header = ["variant", "M", "in", "out", "r", "dropout", "ms", "quartiles", "tokens/s"]
    header += ["x frozen linear", "peak MiB", "x floor"]
    cells = []
    for row in rows:
        config = row["config"]
        sizes = [config[key] for key in ("rows", "in_features", "out_features", "rank", "dropout")]
        cells.append(
            [
                row["variant"],
                *map(str, sizes),
                *_time_cells(row),
                _ratio_to(row, rows, "frozen"),
                figure(row["peak_bytes"] / 2**20, 1),
                figure(row["distance_to_floor"]),
            ]
        )
    return markdown(header, cells)


def _step_table(rows: Sequence[Row]) -> str:
    header = ["variant", "model", "tokens", "dtype", "dropout", "ms", "quartiles", "tokens/s"]
    header += ["x PEFT", "peak GiB", "x floor"]
    cells = []
    for row in rows:
        config = row["config"]
        native = f"peft, {config['dtype']} adapters"
        cells.append(
            [
                row["variant"],
                config["model"],
                f"{config['batch']} x {config['sequence']}",
                config["dtype"],
                str(config["dropout"]),
                *_time_cells(row),
                _ratio_to(row, rows, native),
                figure(row["peak_bytes"] / 2**30, 3),
                figure(row["distance_to_floor"]),
            ]
        )
    return markdown(header, cells)


def _dequantize_table(rows: Sequence[Row]) -> str:
    header = ["variant", "out", "in", "dtype", "ms", "quartiles", "output GB/s", "x copy"]
    cells = []
    for row in rows:
        config, time = row["config"], row["time"]
        cells.append(
            [
                row["variant"],
                str(config["out_features"]),
                str(config["in_features"]),
                config["dtype"],
                figure(1e3 * time["median"]),
                f"{figure(1e3 * time['low'])}-{figure(1e3 * time['high'])}",
                figure(row["output_bytes_per_second"] / 1e9, 1),
                _ratio_to(row, rows, "copy"),
            ]
        )
    return markdown(header, cells)


def _nf4_linear_table(rows: Sequence[Row]) -> str:
    header = ["variant", "what", "M", "in", "out", "r", "dtype", "ms", "quartiles", "tokens/s"]
    header += ["x floor"]
    cells = []
    for row in rows:
        config = row["config"]
        sizes = [config[key] for key in ("mode", "rows", "in_features", "out_features", "rank")]
        cells.append(
            [
                row["variant"],
                *map(str, sizes),
                config["dtype"],
                *_time_cells(row),
                figure(row["distance_to_floor"]),
            ]
        )
    return markdown(header, cells)


def _qlora_step_table(rows: Sequence[Row]) -> str:
    header = ["variant", "step", "model", "tokens", "dtype", "adapters", "ms", "quartiles"]
    header += ["tokens/s", "x PEFT", "peak MiB"]
    cells = []
    for row in rows:
        config = row["config"]
        tokens = f"{config['batch']} x {config['sequence']}" if config["mode"] == "train" else "1"
        peak = row["peak_bytes"]
        cells.append(
            [
                row["variant"],
                config["mode"],
                config["model"],
                tokens,
                config["dtype"],
                config["adapters"],
                *_time_cells(row),
                _ratio_to(row, rows, "peft + bitsandbytes"),
                "-" if peak is None else figure(peak / 2**20, 1),
            ]
        )
    return markdown(header, cells)


def _saved_table(rows: Sequence[Row]) -> str:
    header = ["variant", "method", "dropout", "mask", "checkpoints", "compiled", "memory"]
    header += ["units saved", "units alive"]
    cells = []
    for row in rows:
        config = row["config"]
        settings = ("method", "dropout", "mask", "checkpointing", "compiled", "memory")
        cells.append(
            [
                row["variant"],
                *(str(config[name]) for name in settings),
                figure(row["saved_units"]),
                figure(row["alive_units"]),
            ]
        )
    config = rows[0]["config"]
    sizes = f"{config['model']}, batch {config['batch']}, sequence {config['sequence']}"
    note = (
        f"Bytes that a forward keeps for its backward ({sizes}, {config['dtype']}); a unit is"
        " tokens x layers x hidden x 2 bytes."
    )
    return f"{note}\n\n{markdown(header, cells)}"


def _memory_table(rows: Sequence[Row]) -> str:
    header = ["variant", "model", "method", "tokens", "dtype", "dropout", "checkpointing"]
    header += ["predicted MiB", "measured MiB", "error"]
    cells = []
    for row in rows:
        config = row["config"]
        cells.append(
            [
                row["variant"],
                config["family"],
                config["method"],
                f"{config['batch']} x {config['seq']}",
                config["dtype"],
                str(config["dropout"]),
                "yes" if config["checkpointing"] else "no",
                figure(row["predicted_bytes"] / 2**20, 1),
                figure(row["peak_bytes"] / 2**20, 1),
                f"{row['error']:+.2%}",
            ]
        )
    return markdown(header, cells)


def _counted_table(rows: Sequence[Row]) -> str:
    header = ["variant", "adapters", "dropout", "total u", "beyond frozen u", "workspace u"]
    cells = [
        [
            row["variant"],
            row["config"].get("adapters", "-"),
            str(row["config"].get("dropout", "-")),
            figure(row["total_u"]),
            figure(row["extra_u"]),
            figure(row["workspace_u"]),
        ]
        for row in rows
    ]
    config = rows[0]["config"]
    sizes = f"M={config['rows']}, in=out={config['in_features']}, r={config['rank']}"
    note = f"Bytes moved by a forward and backward at {sizes}; u is one activation tensor."
    return f"{note}\n\n{markdown(header, cells)}"


def _prefix_model_table(rows: Sequence[Row]) -> str:
    """A step's bytes, and those kept for each further sequence of the batch."""
    header = ["variant", "moved u", "x without a prefix", "kept u, 8 sequences more", "x without"]
    by_name = {row["variant"]: row for row in rows}
    cells = []
    for row in rows:
        bare = by_name.get(f"{row['variant']}, without a prefix", row)
        cells.append(
            [
                row["variant"],
                figure(row["total_u"]),
                figure(row["total_u"] / bare["total_u"], 3),
                figure(row["saved_growth_u"]),
                figure(row["saved_growth_u"] / bare["saved_growth_u"], 3),
            ]
        )
    config = rows[0]["config"]
    note = (
        f"A training step of a Llama of {config['model'].replace(' x ', ' layers, hidden ')}, B="
        f"{config['batch']}, S={config['sequence']}, {config['prefix']} virtual tokens,"
        f" {config['dtype']}; u is tokens x layers x hidden x itemsize."
    )
    return f"{note}\n\n{markdown(header, cells)}"


def _bottleneck_table(rows: Sequence[Row]) -> str:
    header = ["variant", "what", "M", "d", "m", "dtype", "norm", "ms", "quartiles", "tokens/s"]
    header += ["x eager", "MiB kept beside x", "x floor"]
    cells = []
    for row in rows:
        config = row["config"]
        settings = ("mode", "rows", "features", "bottleneck", "dtype", "norm")
        cells.append(
            [
                row["variant"],
                *(str(config[name]) for name in settings),
                *_time_cells(row),
                _ratio_to(row, rows, "eager"),
                figure(row["saved_bytes"] / 2**20),
                figure(row["distance_to_floor"]),
            ]
        )
    return markdown(header, cells)


def _quality_table(rows: Sequence[Row]) -> str:
    header = ["method", "test accuracy", "trained", "with the classifier", "learning rate"]
    header += ["ms a step", "peak MiB"]
    cells = [
        [
            row["variant"],
            f"{row['accuracy']:.2%}",
            f"{row['share_without_classifier']:.2%}",
            f"{row['share']:.2%}",
            f"{row['learning_rate']:g}",
            figure(1e3 * row["time"]["median"], 0),
            figure(row["peak_bytes"] / 2**20, 1),
        ]
        for row in rows
    ]
    config = rows[0]["config"]
    note = (
        f"{config['model']} on {config['data']}: {config['epochs']} epochs on the whole training"
        " set, tested once on the whole test set. Several methods trained at a time, so that times"
        " are no comparison."
    )
    return f"{note}\n\n{markdown(header, cells)}"


def _counted_adapter_table(rows: Sequence[Row]) -> str:
    header = ["variant", "total u", "workspace u"]
    cells = [[row["variant"], figure(row["total_u"]), figure(row["workspace_u"])] for row in rows]
    config = rows[0]["config"]
    sizes = f"M={config['rows']}, d={config['features']}, m={config['bottleneck']}"
    note = f"Bytes moved at {sizes}; u is one activation tensor, workspaces are counted apart."
    return f"{note}\n\n{markdown(header, cells)}"


def _attention_table(rows: Sequence[Row]) -> str:
    header = ["variant", "what", "batch", "tokens", "prefix", "heads", "of keys", "head size"]
    header += ["dtype", "ms", "quartiles", "tokens/s", "x no prefix", "MiB kept", "x floor"]
    settings = ("mode", "batch", "tokens", "prefix", "heads", "kv_heads", "head_size", "dtype")
    cells = [
        [
            row["variant"],
            *(str(row["config"][name]) for name in settings),
            *_time_cells(row),
            _ratio_to(row, rows, "no prefix"),
            figure(row["saved_bytes"] / 2**20),
            figure(row["distance_to_floor"]),
        ]
        for row in rows
    ]
    return markdown(header, cells)


def _counted_attention_table(rows: Sequence[Row]) -> str:
    header = ["variant", "total u", "beyond no prefix u", "workspace u"]
    cells = [
        [row["variant"], *(figure(row[name]) for name in ("total_u", "extra_u", "workspace_u"))]
        for row in rows
    ]
    config = rows[0]["config"]
    note = (
        f"Bytes moved at B={config['batch']}, {config['tokens']} tokens, P={config['prefix']},"
        f" {config['heads']} heads of {config['head_size']}, {config['kv_heads']} of keys; u is one"
        " q, workspaces are counted apart. Torch's attention counts as one operation that reads"
        " each operand once."
    )
    return f"{note}\n\n{markdown(header, cells)}"


_COUNTED: dict[str, Callable[[Sequence[Row]], str]] = {
    "bottleneck": _counted_adapter_table,
    "prefix_attention": _counted_attention_table,
    "prefix_model": _prefix_model_table,
}
_TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "banking77": _quality_table,
    "bottleneck": _bottleneck_table,
    "lora_linear": _linear_table,
    "lora_siblings": _counted_table,
    "memory_peak": _memory_table,
    "nf4_dequantize": _dequantize_table,
    "nf4_linear": _nf4_linear_table,
    "prefix_attention": _attention_table,
    "prefix_model": _prefix_model_table,
    "qlora_linear": _counted_table,
    "saved": _saved_table,
    "train_step": _step_table,
    "train_step_qlora": _qlora_step_table,
}
