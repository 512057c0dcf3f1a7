"""What the experiments share: progress, scores, and files that are written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_T = TypeVar("_T")
_DPI = 130


def tracked(items: Sequence[_T], what: str, progress: bool) -> Iterable[_T]:
    """The items, with a progress bar on standard error where `progress` is set."""
    console = Console(stderr=True)
    return track(items, what, console=console, disable=not progress)


def number(value: Any, function: str) -> float:
    """What a user's function returned, as a float.

    Raises:
        TypeError: it is no number.
    """
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{function} returned {type(value).__name__}; a number is needed, such as an accuracy"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients, every module in evaluation mode; each one's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'peftfast[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the path's suffix; PNG without one.

    Raises:
        ValueError: matplotlib has no such format; its message names those that it has.
    """
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:] or "png", dpi=_DPI)
    write(image.getvalue(), path)


def save_csv(
    header: Sequence[str], rows: Iterable[Sequence[Any]], path: str | os.PathLike[str]
) -> None:
    """Write a table as CSV, in UTF-8."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    write(text.getvalue().encode(), path)


def write(content: bytes, path: str | os.PathLike[str]) -> None:
    """Replace a file at once: where writing fails, what was there stays.

    Raises:
        OSError: the folder is missing or can't be written to.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
