"""`peftfast bench`: the repository's benchmarks, in a process of their own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `peftfast bench` takes: whatever `python -m benchmarks` does."""
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        help="list, run NAME, traffic NAME, plot ...: as `python -m benchmarks` takes them",
    )


def main(args: argparse.Namespace) -> int:
    """Run `python -m benchmarks` of the checkout that this package is imported from.

    Returns:
        Its exit status; 1 where the package is installed without the repository around it.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").is_file():
        print(
            "peftfast bench: the benchmarks are part of the repository, not of the installed "
            "package; clone the repository and run `make bench` there",
            file=sys.stderr,
        )
        return 1
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *args.arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
