"""Progress of a training: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 5


@contextlib.contextmanager
def training_progress(console: Console, name: str, steps: int) -> Iterator[Callable[[float], None]]:
    """Yields a function to call with each step's loss."""
    began = time.perf_counter()
    show = _bar if console.is_terminal else _lines
    with show(console, name, steps) as advance:
        yield advance
    console.print(f"{name}: {steps} steps and the test in {time.perf_counter() - began:.0f} s")


@contextlib.contextmanager
def _bar(console: Console, name: str, steps: int) -> Iterator[Callable[[float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=steps, loss="-")

        def advance(loss: float) -> None:
            progress.update(task, advance=1, loss=f"{loss:.3f}")

        yield advance


@contextlib.contextmanager
def _lines(console: Console, name: str, steps: int) -> Iterator[Callable[[float], None]]:
    done = 0
    every = max(1, steps // LINES)

    def advance(loss: float) -> None:
        nonlocal done
        done += 1
        if done % every == 0:
            console.print(f"{name}: step {done} of {steps}, loss {loss:.3f}")

    yield advance
