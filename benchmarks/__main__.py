"""The command line: `python -m benchmarks COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name every benchmark")

    traffic = commands.add_parser("traffic", help="count bytes and FLOPs, on a CPU")
    traffic.add_argument("names", nargs="+", metavar="NAME")
    traffic.add_argument("--json", metavar="FILE", help="write the report as JSON; - is stdout")
    traffic.add_argument("--record", action="store_true", help="append rows to the results folder")

    saved = commands.add_parser("saved", help="count what a forward keeps for its backward")
    saved.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    saved.add_argument("--json", metavar="FILE", help="write the rows as JSON; - is stdout")
    saved.add_argument("--quick", action="store_true", help="LoRA only, without compiled cases")
    saved.add_argument(
        "--method", action="append", metavar="NAME", help="only this; may be repeated"
    )
    saved.add_argument("--record", action="store_true", help="append rows to the results folder")

    run = commands.add_parser("run", help="measure time and memory on a device")
    run.add_argument("names", nargs="+", metavar="NAME")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument("--json", metavar="FILE", help="write the rows as JSON; - is stdout")
    run.add_argument("--quick", action="store_true", help="few configurations and samples")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing after this")
    run.add_argument("--no-record", action="store_true", help="leave the results folder alone")

    gpu = commands.add_parser("gpu", help="GPU tests, then the benchmarks, in under 9 minutes")
    gpu.add_argument("--budget", type=float, default=520.0, metavar="SECONDS")

    banking77 = commands.add_parser("banking77", help="train methods on Banking77, test accuracy")
    banking77.add_argument("methods", nargs="*", metavar="METHOD", help="by default every one")
    banking77.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda if there is one"
    )
    banking77.add_argument("--epochs", type=int, default=4, metavar="N")
    banking77.add_argument("--seed", type=int, default=0, metavar="N")
    banking77.add_argument(
        "--again", action="store_true", help="train what is recorded already too"
    )
    banking77.add_argument(
        "--no-record", action="store_true", help="leave the results folder alone"
    )

    for command in (traffic, saved, run, gpu, banking77):
        command.add_argument("--results", type=Path, metavar="FOLDER", help="where rows are kept")

    commands.add_parser("plot", help="draw the recorded rows")
    readme = commands.add_parser("readme", help="write the recorded rows' tables into README.md")
    readme.add_argument("--check", action="store_true", help="only say whether they are current")
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from benchmarks.commands import list_benchmarks

    return list_benchmarks()


def _traffic(arguments: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from benchmarks.commands import count_traffic

    return count_traffic(
        arguments.names, arguments.json, arguments.results, record=arguments.record
    )


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks.commands import run_timed

    return run_timed(
        arguments.names,
        device=arguments.device,
        json_path=arguments.json,
        quick=arguments.quick,
        budget=arguments.budget,
        results=arguments.results,
        record=not arguments.no_record,
    )


def _saved(arguments: argparse.Namespace) -> int:
    from benchmarks.commands import count_saved

    return count_saved(
        device=arguments.device,
        json_path=arguments.json,
        quick=arguments.quick,
        methods=arguments.method,
        results=arguments.results,
        record=arguments.record,
    )


def _banking77(arguments: argparse.Namespace) -> int:
    from benchmarks.quality.command import train_methods

    return train_methods(
        arguments.methods,
        device=arguments.device,
        epochs=arguments.epochs,
        seed=arguments.seed,
        again=arguments.again,
        results=arguments.results,
        record=not arguments.no_record,
    )


def _gpu(arguments: argparse.Namespace) -> int:
    from benchmarks.gpu import run_gpu

    return run_gpu(arguments.budget, arguments.results)


def _plot(arguments: argparse.Namespace) -> int:
    from benchmarks.plots import draw_all

    return draw_all()


def _readme(arguments: argparse.Namespace) -> int:
    from benchmarks.readme import update

    return update(check=arguments.check)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "traffic": _traffic,
    "run": _run,
    "saved": _saved,
    "banking77": _banking77,
    "gpu": _gpu,
    "plot": _plot,
    "readme": _readme,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives 0, 1 for a failure or a missed target, 2 for a wrong call."""
    arguments = _parser().parse_args(argv)
    return _COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
