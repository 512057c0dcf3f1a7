"""Texts with labels: the shipped Banking77, or a user's CSV file."""

from __future__ import annotations

import csv
import importlib.resources
import io
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

TEXT_COLUMNS = ("text", "sentence", "question", "utterance", "query", "review", "content")
LABEL_COLUMNS = ("label", "category", "intent", "class", "target", "sentiment")
TEST_SHARE = 0.2


class InputError(ValueError):
    """What the user gave cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Example:
    """A text and the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Corpus:
    """Labelled texts in two parts; `about` says in one line where they come from."""

    about: str
    labels: list[str]
    train: list[Example]
    test: list[Example]


def banking77() -> Corpus:
    """The shipped questions of bank customers, in their published parts.

    Raises:
        InputError: the data files are neither installed nor beside the package.
    """
    folder = _shipped("banking77")
    rows = {}
    for part in ("train", "test"):
        file = folder / f"{part}.csv"
        rows[part] = _rows(file.read_text(encoding="utf-8"), str(file), None, None)[0]
    labels = sorted({label for part in rows.values() for _, label in part})
    return Corpus("Banking77", labels, *(_examples(rows[p], labels) for p in rows))


def read_csv(path: Path, text: str | None, label: str | None, seed: int) -> Corpus:
    """A user's file, a fifth of each label's texts held out for testing.

    Args:
        path: CSV, or tab-separated where the name ends in .tsv; UTF-8.
        text, label: a column's name, or its number from 1; None finds the usual names. A file of
            two columns without a header that names them is read as text, label.
        seed: of the draw of the texts that are held out.

    Raises:
        InputError: the file cannot be read or has no such columns; a text or a label is empty, all
            labels are the same, or no label has two texts.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}") from error
    rows, columns = _rows(content, str(path), text, label)
    labels = sorted({row_label for _, row_label in rows})
    if len(labels) < 2:
        raise InputError(f"{path}: every row has the label {labels[0]!r}; at least two are needed")
    train, test = _hold_out(_examples(rows, labels), seed)
    if not test:
        raise InputError(
            f"{path}: no label has two texts, so that none can be held out for testing"
        )
    return Corpus(f"{path}, {columns}", labels, train, test)


def subset(examples: list[Example], size: int, seed: int) -> list[Example]:
    """`size` of the examples, or all where there are fewer, in an order drawn by the seed."""
    return random.Random(seed).sample(examples, min(size, len(examples)))


def _shipped(name: str) -> Path:
    """The folder of shipped data: installed as `peftfast_data`, else the repository's."""
    try:
        folder = Path(str(importlib.resources.files("peftfast_data"))) / name
    except ModuleNotFoundError:
        folder = Path(__file__).resolve().parents[2] / "examples" / "data" / name
    if not folder.is_dir():
        raise InputError(f"the data set {name} is not at {folder}; install peftfast again")
    return folder


def _examples(rows: list[tuple[str, str]], labels: list[str]) -> list[Example]:
    index = {label: number for number, label in enumerate(labels)}
    return [Example(text, index[label]) for text, label in rows]


def _hold_out(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    by_label: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    train, test = [], []
    for label in sorted(by_label):
        drawn = subset(by_label[label], len(by_label[label]), seed)
        count = max(1, round(TEST_SHARE * len(drawn))) if len(drawn) > 1 else 0
        test += drawn[:count]
        train += drawn[count:]
    return train, test


def _rows(
    content: str, name: str, text: str | None, label: str | None
) -> tuple[list[tuple[str, str]], str]:
    """The (text, label) pairs of a file, and a line that says which columns they are."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=_delimiter(name), strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: {error}") from error
    if not lines:
        raise InputError(f"{name} is empty")
    first = [cell.strip() for cell in lines[0][1]]
    text_at = _column(first, text, TEXT_COLUMNS, "text", name)
    label_at = _column(first, label, LABEL_COLUMNS, "label", name)
    named = text_at is not None and label_at is not None
    if text_at is None or label_at is None:
        if len(first) != 2 or text_at is not None or label_at is not None:
            missing = "label" if text_at is not None else "text"
            raise InputError(
                f"{name} has no {missing} column that can be recognised (its first row: "
                f"{', '.join(first)}); name it with --{missing}-column"
            )
        text_at, label_at = 0, 1
    if text_at == label_at:
        raise InputError(f"{name}: text and label are the same column, {first[text_at]!r}")
    header = named and _names_columns(first, text, text_at, label, label_at)
    rows = [_row(line, row, text_at, label_at, name) for line, row in lines[int(header) :]]
    if not rows:
        raise InputError(f"{name} has a header and no rows")
    if header:
        return rows, f"columns {first[text_at]!r} and {first[label_at]!r}"
    return rows, f"no header: column {text_at + 1} is the text, column {label_at + 1} the label"


def _delimiter(name: str) -> str:
    return "\t" if name.endswith(".tsv") else ","


def _column(
    first: list[str], wanted: str | None, usual: tuple[str, ...], role: str, name: str
) -> int | None:
    """The index of the column that is asked for, or else the first of a usual name."""
    lowered = [cell.lower() for cell in first]
    if wanted is None:
        return next((lowered.index(column) for column in usual if column in lowered), None)
    if wanted in first:
        return first.index(wanted)
    if wanted.isdecimal() and 1 <= int(wanted) <= len(first):
        return int(wanted) - 1
    raise InputError(
        f"{name} has no {role} column {wanted!r}; its first row has: {', '.join(first)}"
    )


def _names_columns(
    first: list[str], text: str | None, text_at: int, label: str | None, label_at: int
) -> bool:
    """Whether the first row is a header: it has the name that was asked for, or a usual one."""
    for wanted, at, usual in ((text, text_at, TEXT_COLUMNS), (label, label_at, LABEL_COLUMNS)):
        if first[at] == wanted or first[at].lower() in usual:
            return True
    return False


def _row(line: int, row: list[str], text_at: int, label_at: int, name: str) -> tuple[str, str]:
    for role, at in (("text", text_at), ("label", label_at)):
        if at >= len(row):
            raise InputError(
                f"{name}, line {line}: no {role}, the row has only {len(row)} column(s)"
            )
        if not row[at].strip():
            raise InputError(f"{name}, line {line}: the {role} is empty")
    return row[text_at], row[label_at].strip()
