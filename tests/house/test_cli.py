"""The `peftfast` command."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import peftfast
from peftfast import bench, cli


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"peftfast {peftfast.__version__}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name, (_, text) in cli.COMMANDS.items():
        assert name in out
        assert text in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a command is needed: demo, doctor, memory, bench"),
        (["fly"], "invalid choice: 'fly'"),
        (["doctor", "--fly"], "peftfast doctor: error: unrecognized arguments: --fly"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_command_gets_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--steps", type=int)
        parser.add_argument("files", nargs="*")

    def main(args: argparse.Namespace) -> int:
        seen.append(args)
        return 7

    stub = ModuleType("peftfast.demo")
    stub.__dict__.update(add_arguments=add_arguments, main=main)
    monkeypatch.setitem(sys.modules, "peftfast.demo", stub)
    assert cli.main(["demo", "--steps", "3", "a.csv"]) == 7
    (args,) = seen
    assert (args.steps, args.files) == (3, ["a.csv"])


def test_every_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert f"usage: peftfast {name}" in capsys.readouterr().out


def test_commands_are_imported_when_asked_for() -> None:
    code = (
        "import sys\n"
        "from peftfast import cli\n"
        "try:\n"
        "    cli.main(['--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "print([m for m, _ in cli.COMMANDS.values() if m in sys.modules])"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_bench_runs_the_checkouts_benchmarks(tmp_path: Path) -> None:
    done = python("-m", "peftfast.cli", "bench", "list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lora_linear" in done.stdout


def test_bench_gives_the_status_of_the_benchmarks(tmp_path: Path) -> None:
    done = python("-m", "peftfast.cli", "bench", "run", "no_such_benchmark", cwd=tmp_path)
    assert done.returncode != 0
    assert "no_such_benchmark" in done.stdout + done.stderr


def test_bench_without_the_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "peftfast" / "bench.py"))
    assert cli.main(["bench", "list"]) == 1
    assert "clone the repository" in capsys.readouterr().err
