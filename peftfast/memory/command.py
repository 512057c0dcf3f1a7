"""`peftfast memory`: what fits, before the first step."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

from peftfast.memory import build
from peftfast.memory.estimating import (
    DTYPES,
    MODES,
    MOST_TOKENS,
    POLICIES,
    Predictor,
    check_tokens,
)
from peftfast.memory.plot import NEEDS, draw
from peftfast.memory.pretend import NeedsValues
from peftfast.memory.profiles import GIB, PROFILES
from peftfast.memory.report import MemoryReport, size
from peftfast.memory.search import largest
from peftfast.memory.simulate import OPTIMIZERS
from peftfast.memory.sizes import parse_size

_STEP = 256  # tokens: how finely the longest sequence is looked for
_MOST_LENGTH = 1 << 20
_MOST_SEQUENCES = 1 << 12
_UNBOUNDED = 1 << 16  # characters: wider than any table
_T = TypeVar("_T")


@dataclass
class Line:
    """Predictions for one model, method and batch."""

    model: str
    method: str
    batch: int
    reports: list[MemoryReport]
    longest: int


@dataclass
class Found:
    """All that the command predicts for one model."""

    lines: list[Line] = field(default_factory=list)
    batches: dict[str, int] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `peftfast memory`."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL_OR_CONFIG",
        help="a config.json, the folder of one, or a model's name; no weights are needed",
    )
    parser.add_argument(
        "--method",
        type=_listed(_method),
        default=["full", "lora", "qlora"],
        metavar="NAME,...",
        help="full, lora, qlora; with another rank than 16: qlora:8 (default: all three)",
    )
    parser.add_argument(
        "--seq",
        type=_listed(_count),
        default=[1024, 4096, 16384],
        metavar="TOKENS,...",
        help="tokens a sequence (default: 1024,4096,16384)",
    )
    parser.add_argument(
        "--batch",
        type=_listed(_count),
        default=[1],
        metavar="COUNT,...",
        help="sequences a pass (default: 1)",
    )
    parser.add_argument(
        "--device", choices=PROFILES, default="a100-40gb", help="default: a100-40gb"
    )
    parser.add_argument(
        "--budget",
        type=_size,
        metavar="SIZE",
        help="such as 40GiB; default: the device's memory",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the configuration's")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: adamw")
    parser.add_argument("--checkpointing", action="store_true", help="recompute every layer")
    patching = parser.add_mutually_exclusive_group()
    patching.add_argument(
        "--memory", choices=POLICIES, default="recompute", help="the policy of peftfast.patch"
    )
    patching.add_argument("--plain", action="store_true", help="without peftfast.patch")
    parser.add_argument("--mode", choices=MODES, default="train", help="default: train")
    parser.add_argument(
        "--no-search", action="store_true", help="not the longest sequence and largest batch"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the predictions")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def main(args: argparse.Namespace) -> int:
    """Print the predictions.

    Returns:
        0; 1 where no model can be built from a configuration, something to draw with is missing, or
        nothing at all fits the budget; 2 where a pass would have too many tokens.
    """
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        return _failed(NEEDS)
    budget = PROFILES[args.device].capacity if args.budget is None else args.budget
    try:
        check_tokens(max(args.batch), max(args.seq))
    except ValueError as error:
        _failed(str(error))
        return 2
    try:
        with _progress(args.json) as say, _without_future_warnings():
            found = _predict_all(args, budget, say)
    except (build.ConfigError, NeedsValues) as error:
        return _failed(str(error))
    reports = [r for one in found.values() for line in one.lines for r in line.reports]
    if args.plot is not None:
        try:
            draw(reports[:24], budget, args.plot)
        except (OSError, ValueError) as error:
            return _failed(f"{args.plot} can't be written: {error}")
    if args.json:
        json.dump(_as_json(found, budget, args), sys.stdout, indent=2)
        print()
    else:
        _print(found, budget, args)
    if budget is None or any(report.fits(budget) for report in reports):
        return 0
    if any(line.longest for one in found.values() for line in one.lines):
        return 0
    least = min(report.needed_bytes for report in reports)
    return _failed(
        f"nothing fits {size(budget)}: the least that any of these needs is {size(least)}"
    )


def _predict_all(
    args: argparse.Namespace, budget: int | None, say: Callable[[str], None]
) -> dict[str, Found]:
    """Every model, several at a time where there are cores for it."""
    sources: list[str] = list(dict.fromkeys(args.models))
    processes = min(len(sources), os.cpu_count() or 1)
    if processes == 1:
        return {source: _predict(source, args, budget, say) for source in sources}
    for source in sources:
        build.load_config(source)  # a wrong one is found before anything is started
    found: dict[str, Found] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = {pool.submit(_predict, source, args, budget): source for source in sources}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            say(f"{len(found)} of {len(sources)} models")
    return {source: found[source] for source in sources}


def _predict(
    source: str,
    args: argparse.Namespace,
    budget: int | None,
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    with _without_future_warnings():  # of this process, which may be one of several
        return _predicted(source, args, budget, say)


def _predicted(
    source: str, args: argparse.Namespace, budget: int | None, say: Callable[[str], None]
) -> Found:
    logging.set_verbosity_error()  # transformers' remarks on settings that are right here
    config = build.load_config(source)
    name = Path(source).stem if source.endswith(".json") else Path(source).name
    found = Found()
    for method in args.method:
        predictor = Predictor(
            config,
            name,
            method=method,
            dtype=args.dtype,
            optimizer=args.optimizer,
            checkpointing=args.checkpointing,
            memory=args.memory,
            device_profile=args.device,
            patched=not args.plain,
            mode=args.mode,
        )

        def needed(
            batch: int, seq: int, predictor: Predictor = predictor, method: str = method
        ) -> int:
            say(f"{name}, {method}, {batch} x {seq} tokens")
            return predictor.report(batch, seq).needed_bytes

        first = args.seq[0]
        for batch in args.batch:
            known = {seq: needed(batch, seq) for seq in args.seq}
            reports = [predictor.report(batch, seq) for seq in args.seq]
            longest = 0
            if budget is not None and not args.no_search:
                longest = largest(
                    functools.partial(needed, batch),
                    budget,
                    step=_STEP,
                    limit=min(build.most_tokens(config) or _MOST_LENGTH, MOST_TOKENS // batch),
                    known=known,
                )
            found.lines.append(Line(name, method, batch, reports, longest))
        if budget is not None and not args.no_search:
            known = {batch: needed(batch, first) for batch in args.batch}
            found.batches[method] = largest(
                functools.partial(_swapped, needed, first),
                budget,
                step=1,
                limit=min(_MOST_SEQUENCES, MOST_TOKENS // first),
                known=known,
            )
    return found


def _swapped(needed: Callable[[int, int], int], seq: int, batch: int) -> int:
    return needed(batch, seq)


@contextmanager
def _without_future_warnings() -> Iterator[None]:
    """transformers' remarks on names that it will drop are not for the reader of a table."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")
        yield


def _print(found: dict[str, Found], budget: int | None, args: argparse.Namespace) -> None:
    console = Console()
    if not console.is_terminal:  # nothing to wrap for
        console = Console(width=_UNBOUNDED)
    how = "plain" if args.plain else f"peftfast.patch, memory={args.memory!r}"
    how += ", with checkpointing" if args.checkpointing else ", without checkpointing"
    limit = "" if budget is None else f"; * does not fit {size(budget)}"
    title = f"GiB needed, {args.mode}, {PROFILES[args.device].description}, {how}{limit}"
    tables = _tables(found, _columns(found, budget, args), console)
    tables[0].title = title
    tables[-1].caption = (
        "Columns of numbers: tokens of a sequence. Most: the longest sequence, and the"
        " largest batch of the shortest ones here, that fit. Predicted, not measured."
    )
    for table in tables:
        console.print(table)
    for note in _notes(args):
        console.print(note, markup=False, highlight=False)


def _columns(
    found: dict[str, Found], budget: int | None, args: argparse.Namespace
) -> list[tuple[str, list[str]]]:
    """Headers, and a cell for each line."""
    lines = [(one, line) for one in found.values() for line in one.lines]
    columns = [
        (f"{seq:,}", [_cell(line.reports[i], budget) for _, line in lines])
        for i, seq in enumerate(args.seq)
    ]
    if budget is not None and not args.no_search:
        longest = [f"{line.longest:,}" if line.longest else "-" for _, line in lines]
        batches = [str(one.batches[line.method] or "-") for one, line in lines]
        columns += [("most tokens", longest), (f"most x {args.seq[0]:,}", batches)]
    return columns


def _tables(
    found: dict[str, Found], columns: list[tuple[str, list[str]]], console: Console
) -> list[Table]:
    """One table, or below one another as many as it takes for the console's width."""
    unbounded = console.options.update(max_width=_UNBOUNDED)
    tables: list[Table] = []
    while columns:
        for count in range(len(columns), 0, -1):
            table = _table(found, columns[:count])
            if Measurement.get(console, unbounded, table).maximum <= console.width:
                break
        tables.append(table)
        columns = columns[count:]
    return tables


def _table(found: dict[str, Found], columns: list[tuple[str, list[str]]]) -> Table:
    table = Table(title_justify="left", caption_justify="left")
    for header in ("model", "method"):
        table.add_column(header, overflow="fold")
    for header in ("batch", *(header for header, _ in columns)):
        table.add_column(header, justify="right", overflow="fold")
    rows = zip(*(cells for _, cells in columns), strict=True)
    for one in found.values():
        for line in one.lines:
            table.add_row(escape(line.model), line.method, str(line.batch), *next(rows))
        table.add_section()
    return table


def _notes(args: argparse.Namespace) -> list[str]:
    """What a configuration says that these predictions don't follow."""
    notes = []
    for source in dict.fromkeys(args.models):
        config = build.load_config(source)
        dense = [method for method in args.method if not method.startswith("qlora")]
        if getattr(config, "quantization_config", None) is not None and dense:
            notes.append(
                f"{source} has a quantization_config, which {', '.join(dense)} here does not"
                " follow: the base is predicted unquantised. --method qlora is 4-bit NF4."
            )
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if most is not None and max(args.seq) > most:
            notes.append(f"{source} is made for {most:,} tokens (max_position_embeddings).")
    return notes


def _cell(report: MemoryReport, budget: int | None) -> str:
    text = f"{report.needed_bytes / GIB:.1f}"
    return text if report.fits(budget) else f"[red]{text}*[/red]"


def _as_json(found: dict[str, Found], budget: int | None, args: argparse.Namespace) -> Any:
    return {
        "device_profile": args.device,
        "budget": budget,
        "notes": _notes(args),
        "models": [
            {
                "source": source,
                "largest_batch": {"seq": args.seq[0], **one.batches},
                "predictions": [
                    {
                        "model": line.model,
                        "method": line.method,
                        "batch": line.batch,
                        "longest_sequence": line.longest or None,
                        "reports": [report.to_dict() for report in line.reports],
                    }
                    for line in one.lines
                ],
            }
            for source, one in found.items()
        ],
    }


class _progress:
    """Says on standard error what is being predicted."""

    def __init__(self, quiet: bool) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=quiet and not sys.stderr.isatty(),
        )

    def __enter__(self) -> Callable[[str], None]:
        self._progress.start()
        task = self._progress.add_task("importing", total=None)
        return lambda text: self._progress.update(task, description=text)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _failed(message: str) -> int:
    print(f"peftfast memory: {message}", file=sys.stderr)
    return 1


def _listed(parse: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    def parsed(text: str) -> list[_T]:
        return [parse(part.strip()) for part in text.split(",")]

    return parsed


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above zero")
    if int(text) > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MOST_TOKENS:,}")
    return int(text)


def _method(text: str) -> str:
    try:
        build.check_method(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
