"""`peftfast demo`: fine-tune a classifier twice, plain PEFT LoRA and patched, and compare them."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path

IMPLS = ("auto", "triton", "native", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `peftfast demo` takes."""
    own = parser.add_argument_group("your own model and texts")
    own.add_argument("--model", metavar="NAME_OR_PATH", help="default: the bundled MiniLM, 22M")
    own.add_argument("--data", type=Path, metavar="FILE.csv", help="default: Banking77")
    own.add_argument("--text-column", metavar="C", help="name, or number from 1, in FILE.csv")
    own.add_argument("--label-column", metavar="C", help="name, or number from 1, in FILE.csv")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=_count, default=300, help="default: %(default)s")
    training.add_argument("--batch-size", type=_count, default=16, help="default: %(default)s")
    training.add_argument(
        "--train-size", type=_count, metavar="N", help="texts to train on; default: one pass"
    )
    training.add_argument(
        "--test-size", type=_count, default=1500, metavar="N", help="default: %(default)s"
    )
    training.add_argument("--rank", type=_count, default=16, help="default: %(default)s")
    training.add_argument("--learning-rate", type=_rate, default=3e-3, help="default: %(default)s")
    training.add_argument(
        "--dropout",
        type=_share,
        default=0.1,
        help="of the second, half as long pair of runs; 0 leaves it out (default: %(default)s)",
    )
    training.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    training.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    training.add_argument("--impl", choices=IMPLS, default="auto", help="what peftfast runs on")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s"
    )
    output.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")


def main(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        0; 1 where the patched run does not agree with the plain one, or nothing was fused; 2 where
        what was asked for cannot be run.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "peftfast demo: matplotlib is not installed: pip install 'peftfast[demo]'",
            file=sys.stderr,
        )
        return 2
    from peftfast.demo.data import InputError
    from peftfast.demo.program import run
    from peftfast.ops import ImplUnavailable

    try:
        return run(args)
    except (InputError, ImplUnavailable) as error:
        print(f"peftfast demo: {error}", file=sys.stderr)
        return 2


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up to 1")
    return value
