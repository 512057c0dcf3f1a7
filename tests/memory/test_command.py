"""`peftfast memory`, `fit` and the search: tables, JSON, drawings, and what is refused."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftfast import cli
from peftfast.memory import PROFILES, command, fit, fitting, plot
from peftfast.memory.build import load_config
from peftfast.memory.fitting import DoesNotFit
from peftfast.memory.search import largest
from peftfast.memory.sizes import parse_size
from tests.memory.models import config

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128,
        "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "rope_theta": 10000.0, "dtype": "bfloat16",
    }  # fmt: skip
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(values))
    return str(path)


def test_json_holds_every_prediction(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(Path(tiny).read_text())
    Path(tiny).write_text(json.dumps({**values, "num_hidden_layers": 2}))
    arguments = ["memory", tiny, "--method", "lora,qlora:4", "--seq", "64,128", "--batch", "1,3"]
    assert cli.main([*arguments, "--budget", "1GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (model,) = found["models"]
    lines = model["predictions"]
    assert [(line["method"], line["batch"]) for line in lines] == [
        ("lora", 1), ("lora", 3), ("qlora:4", 1), ("qlora:4", 3),
    ]  # fmt: skip
    assert all(len(line["reports"]) == 2 for line in lines)
    assert lines[0]["longest_sequence"] > lines[1]["longest_sequence"] > 0
    assert lines[0]["longest_sequence"] % 256 == 0
    assert model["largest_batch"]["seq"] == 64 and model["largest_batch"]["lora"] > 3
    for line in lines:
        needs = [report["needed_bytes"] for report in line["reports"]]
        assert needs[0] < needs[1]


def test_the_table_marks_what_does_not_fit(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", tiny, "--method", "lora", "--seq", "64,65536", "--no-search"]
    assert cli.main([*arguments, "--budget", "1500MiB"]) == 0
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith("│ tiny")]
    assert row.count("*") == 1 and "0.5" in row
    assert "Predicted, not measured" in out


def test_nothing_fits(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", tiny, "--method", "full", "--seq", "64", "--budget", "100MiB"]
    assert cli.main(arguments) == 1
    assert "nothing fits 100.00 MiB: the least" in capsys.readouterr().err


def test_a_drawing(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    arguments = ["memory", tiny, "--method", "lora", "--seq", "64", "--no-search"]
    assert cli.main([*arguments, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*arguments, "--plot", str(tmp_path / "plot.nonesuch")]) == 1
    assert "can't be written" in capsys.readouterr().err


def test_a_drawing_needs_matplotlib(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["memory", tiny, "--plot", "x.png"]) == 1
    assert plot.NEEDS in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list; an object is needed"),
        ('{"hidden_size": 8}', "has no field model_type"),
        ('{"model_type": "zebra"}', "knows no architecture 'zebra'"),
        ('{"model_type": "llama"}', "lacks hidden_size, num_hidden_layers, num_attention_heads"),
    ],
)
def test_a_wrong_configuration(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert cli.main(["memory", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", str(tmp_path / "none.json")]) == 1
    assert "can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value",
    [
        ("--seq", "0"),
        ("--seq", "12,many"),
        ("--batch", "-1"),
        ("--budget", "40 apples"),
        ("--budget", "0GiB"),
        ("--method", "lara"),
        ("--method", "lora:0"),
        ("--device", "v100"),
    ],
)
def test_wrong_options(
    option: str, value: str, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["memory", tiny, f"{option}={value}"])
    assert stop.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


def test_the_published_configurations() -> None:
    """Parameters as published: the numbers of the models' names."""
    from peftfast.memory import estimate

    billions = {
        "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-3-8b": 8.03, "qwen3-14b": 14.77,
        "qwen3-32b": 32.76,
    }  # fmt: skip
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(billions)
    for name, count in billions.items():
        of = load_config(CONFIGS / f"{name}.json")
        report = estimate(of, seq=8, optimizer="none", patched=False, method="full")
        assert report.by_class["base weights"] / 2e9 == pytest.approx(count, abs=0.01)


@pytest.mark.parametrize(
    "text, size",
    [("40GiB", 40 << 30), ("24 GB", 24 * 10**9), ("512M", 512 << 20), ("7", 7), ("1.5k", 1536)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("budget, found", [(97, 0), (100, 8), (1000, 904), (10**6, 4096)])
def test_the_largest_that_fits(budget: int, found: int) -> None:
    calls = []

    def needed(size: int) -> int:
        calls.append(size)
        return 90 + size + (size // 512) * 5

    assert largest(needed, budget, step=8, limit=4096) == found
    assert len(calls) <= 12


def test_a_search_where_growth_is_not_a_line() -> None:
    assert largest(lambda size: size**3, 10**6, step=1, limit=10**4) == 100
    assert largest(lambda size: 5, 10, step=4, limit=10) == 8


def test_fit_takes_the_cheapest_way_that_holds_the_batch() -> None:
    options: dict[str, Any] = {"method": "lora", "seq": 256, "batch": 8}
    loose = fit(config("llama"), "8GiB", **options)
    assert (loose.batch, loose.accumulation, loose.checkpointing) == (8, 1, False)
    assert loose.memory == "recompute" and len(loose.reasons) == 1
    needs = loose.report.needed_bytes
    tight = fit(config("llama"), needs - 1, **options)
    assert tight.batch * tight.accumulation >= 8
    assert tight.report.needed_bytes < needs and len(tight.reasons) > 1
    assert "batch" in str(tight)


def test_fit_says_what_the_least_is() -> None:
    with pytest.raises(DoesNotFit, match="nothing fits 100.00 MiB: one sequence of 64 tokens"):
        fit(config("llama"), "100MiB", method="lora", seq=64)
    with pytest.raises(ValueError, match="budget is 0"):
        fit(config("llama"), 0)


@pytest.mark.parametrize(
    "sizes",
    [["--seq", "999999999999"], ["--batch", "9" * 30], ["--batch", "100000", "--seq", "1024"]],
)
def test_more_tokens_than_are_simulated(
    tiny: str, sizes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["memory", tiny, "--method", "lora", *sizes])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert "more than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype is torch.int8; allowed: bfloat16"),
        ({"model_type": ["llama"]}, "knows no architecture"),
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": 65}, "65.* is not a multiple of the number of attention heads"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"rope_parameters": {"rope_type": "none", "rope_theta": 1e4}}, "KeyError: 'none'"),
    ],
)
def test_what_is_wrong_with_a_configuration(
    tiny: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(Path(tiny).read_text()) | changes))
    assert cli.main(["memory", str(path), "--method", "lora", "--seq", "64"]) == 1
    found = capsys.readouterr().err.strip()
    assert re.search(message, found), found
    assert found.startswith("peftfast memory: ") and "\n" not in found


def test_no_search_beyond_the_most_tokens(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With so many sequences not even the shortest length that is looked at is within the limit."""
    arguments = ["memory", tiny, "--method", "lora", "--batch", str(1 << 20), "--seq", "2"]
    assert cli.main(arguments) == 1
    assert "nothing fits" in capsys.readouterr().err
    assert largest(lambda size: 5, 10, step=256, limit=255) == 0


def test_future_warnings_of_transformers_are_silent_in_the_command_alone(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = command.build.load_config

    def warning(source: Any) -> Any:
        for module in ("transformers.modeling_utils", "transformersish", "peft.mapping"):
            warnings.warn_explicit(f"{module} changes", FutureWarning, "x.py", 1, module=module)
        warnings.warn_explicit("odd", UserWarning, "x.py", 1, module="transformers.modeling_utils")
        return load(source)

    monkeypatch.setattr(command.build, "load_config", warning)
    arguments = ["memory", tiny, "--method", "lora", "--seq", "64", "--no-search", "--plain"]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        monkeypatch.setattr(command, "_notes", lambda args: [])
        assert cli.main(arguments) == 0
        assert warnings.filters == before
    texts = {str(one.message) for one in seen}
    assert {"transformersish changes", "peft.mapping changes", "odd"} <= texts
    assert "transformers.modeling_utils changes" not in texts


def _predictions(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Options for so many lengths, and predictions that are there at once."""

    def predicted(source: str, args: Any, budget: Any, say: Any) -> command.Found:
        reports: list[Any] = [
            SimpleNamespace(needed_bytes=(seq << 30) // 16, fits=lambda budget: True)
            for seq in args.seq
        ]
        line = command.Line("[red]a-model", "lora", 1, reports, 123_456)
        return command.Found([line], {"lora": 789})

    monkeypatch.setattr(command, "_predict", predicted)
    return ["--method", "lora", "--seq", ",".join(str(1000 + i) for i in range(count))]


def _contents(out: str) -> tuple[list[list[str]], list[list[str]]]:
    """The cells of the headers and of the rows of all tables."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
    heads = [line for line in plain.splitlines() if line.startswith("┃")]
    rows = [line for line in plain.splitlines() if line.startswith("│")]
    return (
        [[cell.strip() for cell in line.strip("┃").split("┃")] for line in heads],
        [[cell.strip() for cell in line.strip("│").split("│")] for line in rows],
    )


def test_a_table_is_as_wide_as_it_needs(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["memory", tiny, *_predictions(monkeypatch, 60)]) == 0
    ((head,), (row,)) = _contents(capsys.readouterr().out)
    lengths = range(1000, 1060)
    assert head == [
        "model", "method", "batch", *(f"{n:,}" for n in lengths), "most tokens", "most x 1,000",
    ]  # fmt: skip
    assert row[0] == "[red]a-model"
    assert row[3:] == [*(f"{n / 16:.1f}" for n in lengths), "123,456", "789"]


@pytest.mark.parametrize("columns", [60, 80])
def test_a_table_is_folded_for_a_terminal(
    columns: int,
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Into tables below one another: nothing is cut off."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(["memory", tiny, *_predictions(monkeypatch, 30)]) == 0
    out = capsys.readouterr().out
    heads, rows = _contents(out)
    lengths = range(1000, 1030)
    assert len(heads) == len(rows) > 1
    assert all(row[:3] == ["[red]a-model", "lora", "1"] for row in rows)
    names = [name for head in heads for name in head[3:]]
    cells = [cell for row in rows for cell in row[3:]]
    assert names == [*(f"{n:,}" for n in lengths), "most tokens", "most x 1,000"]
    assert cells == [*(f"{n / 16:.1f}" for n in lengths), "123,456", "789"]
    widths = [len(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line)) for line in out.splitlines()]
    assert max(widths) <= columns
    assert out.count("GiB needed") == out.count("Columns of") == 1


def test_a_name_wider_than_the_terminal_is_folded(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    arguments = _predictions(monkeypatch, 1)
    name = "".join(chr(ord("a") + i % 26) for i in range(60))
    predicted = command._predict

    def renamed(*given: Any) -> command.Found:
        found = predicted(*given)
        found.lines[0].model = name
        return found

    monkeypatch.setattr(command, "_predict", renamed)
    assert cli.main(["memory", tiny, *arguments, "--no-search"]) == 0
    _, rows = _contents(capsys.readouterr().out)
    assert "".join(row[0] for row in rows) == name


def test_an_empty_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", ""]) == 1
    assert "is empty" in capsys.readouterr().err


def test_what_predictions_do_not_follow_is_said(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    values = json.loads(Path(tiny).read_text())
    four_bit = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(values | {"quantization_config": four_bit}))
    long = "4096"
    arguments = ["memory", str(path), "--method", "lora", "--seq", long, "--no-search"]
    assert cli.main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "predicted unquantised" in out and "is made for" in out
    assert cli.main([*arguments[:4], "--seq", "64", "--no-search", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1


def test_fit_offloads_where_only_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; on a CPU what is kept is in host memory already."""

    def predicted(source: Any, *, batch: int, memory: str, **settings: Any) -> Any:
        each = 10 if memory == "offload" else 1000
        return SimpleNamespace(needed_bytes=(1 << 20) + each * batch)

    monkeypatch.setattr(fitting, "estimate", predicted)
    found = fit("config.json", (1 << 20) + 100, batch=4)
    assert (found.memory, found.checkpointing, found.batch) == ("offload", False, 4)
    assert "host memory" in found.reasons[-1] and len(found.reasons) == 4
    for profile in ("cpu", PROFILES["cpu"]):
        with pytest.raises(DoesNotFit):
            fit("config.json", (1 << 20) + 100, batch=4, device_profile=profile)
