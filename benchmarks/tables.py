"""Tables on a terminal, and the same tables in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Cells = Sequence[Sequence[str]]


def console(to_stderr: bool) -> Console:
    """Where tables go: standard error while standard output carries JSON."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 160, highlight=False)


def show(out: Console, title: str, header: Sequence[str], cells: Cells) -> None:
    """Prints a table; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in cells:
        table.add_row(*row)
    out.print(table)


def markdown(header: Sequence[str], cells: Cells) -> str:
    """The table in Markdown; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *cells])


def figure(value: Any, digits: int = 2) -> str:
    """A number with `digits` decimals; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}"
