"""The shipped texts, and what of a user's file is read and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftfast.demo.data import Example, InputError, banking77, read_csv, subset


def write(folder: Path, content: str, name: str = "mine.csv") -> Path:
    file = folder / name
    file.write_text(content, encoding="utf-8")
    return file


def texts_of(file: Path, **columns: str | None) -> dict[str, str]:
    """Text to label of every row of the file."""
    arguments = {"text": None, "label": None, "seed": 0, **columns}
    corpus = read_csv(file, **arguments)  # type: ignore[arg-type]
    return {example.text: corpus.labels[example.label] for example in corpus.train + corpus.test}


FOUR = {"one": "a", "two": "a", "three": "b", "four": "b"}


def test_banking77_is_whole() -> None:
    corpus = banking77()
    assert (len(corpus.train), len(corpus.test), len(corpus.labels)) == (10_003, 3_080, 77)
    folder = Path(__file__).resolve().parents[2] / "examples/data/banking77"
    assert sorted(json.loads((folder / "categories.json").read_text())) == corpus.labels
    first = corpus.train[0]
    assert first.text == "I am still waiting on my card?"
    assert corpus.labels[first.label] == "card_arrival"


@pytest.mark.parametrize(
    "content",
    [
        "text,label\none,a\ntwo,a\nthree,b\nfour,b\n",
        "Label,Text\na,one\na,two\nb,three\nb,four\n",
        "id,question,intent\n1,one,a\n2,two,a\n3,three,b\n4,four,b\n",
        "one,a\ntwo,a\nthree,b\nfour,b\n",
        "\ufefftext,label\none,a\n\ntwo,a\r\nthree, b\nfour,b\n,\n",
    ],
    ids=["usual", "other order", "other names", "no header", "mark and blank lines"],
)
def test_columns_are_found(content: str, tmp_path: Path) -> None:
    assert texts_of(write(tmp_path, content)) == FOUR


def test_columns_are_named(tmp_path: Path) -> None:
    content = "text,said,kind\nx,one,a\nx,two,a\nx,three,b\nx,four,b\n"
    file = write(tmp_path, content)
    assert texts_of(file, text="said", label="kind") == FOUR
    assert texts_of(file, text="2", label="kind") == FOUR
    headless = write(tmp_path, content.partition("\n")[2], "headless.csv")
    assert texts_of(headless, text="2", label="3") == FOUR


def test_tabs_quotes_and_line_breaks(tmp_path: Path) -> None:
    tabs = write(tmp_path, "text\tlabel\none, two\ta\nb c\ta\nd\tb\ne\tb\n", "mine.tsv")
    assert texts_of(tabs)["one, two"] == "a"
    quoted = write(tmp_path, 'text,label\n"a ""b""\nc",x\nd,x\ne,y\nf\u2028g,y\n')
    assert texts_of(quoted) == {'a "b"\nc': "x", "d": "x", "e": "y", "f\u2028g": "y"}


def test_what_was_read_is_said(tmp_path: Path) -> None:
    headed = read_csv(write(tmp_path, "text,label\na,x\nb,x\nc,y\n"), None, None, 0)
    assert headed.about.endswith("columns 'text' and 'label'")
    headless = read_csv(write(tmp_path, "a,x\nb,x\nc,y\n"), None, None, 0)
    assert "no header: column 1 is the text, column 2 the label" in headless.about


def test_every_label_is_held_out_and_trained(tmp_path: Path) -> None:
    rows = [f"{label}{number},{label}" for label in "abc" for number in range(10)]
    file = write(tmp_path, "text,label\n" + "\n".join([*rows, "alone,d"]))
    corpus = read_csv(file, None, None, seed=3)
    assert sorted(example.label for example in corpus.test) == [0, 0, 1, 1, 2, 2]
    assert [example.text for example in corpus.train if example.label == 3] == ["alone"]
    assert not {e.text for e in corpus.test} & {e.text for e in corpus.train}
    assert read_csv(file, None, None, seed=3) == corpus
    assert read_csv(file, None, None, seed=4) != corpus


def test_subset() -> None:
    examples = [Example(str(number), 0) for number in range(20)]
    chosen = subset(examples, 5, seed=1)
    assert len({example.text for example in chosen}) == 5
    assert chosen == subset(examples, 5, seed=1) != subset(examples, 5, seed=2)
    assert sorted(map(str, subset(examples, 99, seed=1))) == sorted(map(str, examples))


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("", {}, "is empty"),
        ("\n\n", {}, "is empty"),
        ("text,label\n", {}, "a header and no rows"),
        ("text,label\na,x\nb,x\n", {}, "every row has the label 'x'"),
        ("text,label\na,x\nb,y\n", {}, "no label has two texts"),
        ("text,label\na,x\n ,y\n", {}, "line 3: the text is empty"),
        ("text,label\na,x\nb,\n", {}, "line 3: the label is empty"),
        ("text,label\na,x\nb\n", {}, r"line 3: no label, the row has only 1 column"),
        ("id,words,text\n1,a,x\n", {}, "no label column .*--label-column"),
        ("id,words,label\n1,a,x\n", {}, "no text column .*--text-column"),
        ("words\na\n", {}, "no text column"),
        ("text,label\na,x\n", {"text": "body"}, "no text column 'body'; .* text, label"),
        ("text,label\na,x\n", {"label": "3"}, "no label column '3'"),
        ("text,label\na,x\n", {"label": "text"}, "text and label are the same column"),
        ('text,label\na,x\n"b,y\n', {}, r"mine\.csv, line 3: unexpected end of data"),
    ],
)
def test_what_cannot_be_used_is_refused(
    content: str, columns: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        texts_of(write(tmp_path, content), **columns)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read .*: No such file"):
        texts_of(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="cannot read"):
        texts_of(tmp_path)
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\ncaf\u00e9,x\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        texts_of(latin)
