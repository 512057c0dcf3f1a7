"""`python -m peftfast_kernels.aot` on hand-made kernels, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiling needs triton")
from triton.backends.nvidia.compiler import get_ptxas

from peftfast_kernels.aot import main

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"


def run_aot(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env["PYTHONPATH"] = f"{KERNELS}{os.pathsep}{HERE}"
    env["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, "-m", "peftfast_kernels.aot", *arguments],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@dataclass(frozen=True)
class Run:
    process: subprocess.CompletedProcess[str]
    rows: dict[tuple[str, int], dict]
    cache: Path


@pytest.fixture(scope="module")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Run:
    cache = tmp_path_factory.mktemp("triton")
    file = cache / "rows.json"
    process = run_aot(
        "--modules", "handmade_kernels", "--arch", "80", "90", "--jobs", "2", "--json", str(file),
        cache=cache,
    )  # fmt: skip
    rows = json.loads(file.read_text())
    return Run(process, {(row["kernel"], row["arch"]): row for row in rows}, cache)


def test_every_variant_has_a_row_with_all_fields(handmade: Run) -> None:
    assert len(handmade.rows) == 12
    for row in handmade.rows.values():
        assert {
            "kernel", "arch", "config", "dtype", "registers", "spill_bytes", "shared_bytes", "mma",
            "verdict", "reason",
        } <= set(row)  # fmt: skip
        assert (row["verdict"] == "red") == bool(row["reason"])


@pytest.mark.parametrize(("arch", "kind"), [(80, "HMMA"), (90, "HGMMA")])
def test_a_good_kernel_is_ok(handmade: Run, arch: int, kind: str) -> None:
    row = handmade.rows["good", arch]
    assert row["verdict"] == "ok"
    assert row["spill_bytes"] == row["stack_bytes"] == 0
    assert 16 < row["registers"] <= 255
    assert row["shared_bytes"] >= 2 * 64 * 32 * 2
    assert row["mma"] > 0 and row["mma_kinds"] == {kind: row["mma"]}
    assert (row["config"], row["dtype"]) == ("64x64x32 s2", "bf16")


@pytest.mark.parametrize("arch", [80, 90])
def test_a_spill_is_red_and_counted_as_ptxas_counts_it(handmade: Run, arch: int) -> None:
    row = handmade.rows["spills", arch]
    assert row["verdict"] == "red" and "local memory" in row["reason"]
    counted = set()
    for ptx in handmade.cache.glob("*/hold_too_much.ptx"):
        target = re.search(rf"\.target (sm_{arch}a?)\b", ptx.read_text())
        if target is None:
            continue
        log = subprocess.run(
            [get_ptxas(arch).path, "-v", "-lineinfo", "--regAllocOptLevel=2",
             f"--gpu-name={target[1]}", str(ptx), "-o", os.devnull],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert spilled is not None
        counted.add(int(spilled[1]) + int(spilled[2]))
    assert counted == {row["spill_bytes"]}


@pytest.mark.parametrize(("arch", "limit"), [(80, 166912), (90, 232448)])
def test_too_much_shared_memory_is_red(handmade: Run, arch: int, limit: int) -> None:
    row = handmade.rows["too_much_shared", arch]
    assert row["shared_bytes"] > limit
    assert row["verdict"] == "red"
    assert f"shared memory, sm_{arch} has {limit}" in row["reason"]


@pytest.mark.parametrize("arch", [80, 90])
def test_a_meant_dot_without_tensor_cores_is_red(handmade: Run, arch: int) -> None:
    row = handmade.rows["no_tensor_core", arch]
    assert row["mma"] == 0
    assert (row["verdict"], row["reason"]) == ("red", "no tensor-core instruction")


def test_native_asks_for_the_architectures_own_instructions(handmade: Run) -> None:
    before, hopper = (handmade.rows["too_small_for_native", arch] for arch in (80, 90))
    assert before["verdict"] == "ok"
    assert list(before["mma_kinds"]) == list(hopper["mma_kinds"]) == ["HMMA"]
    assert hopper["verdict"] == "red" and "sm_90's own, only HMMA" in hopper["reason"]


def test_a_compile_error_is_a_red_row_with_the_compilers_message(handmade: Run) -> None:
    row = handmade.rows["mismatched", 80]
    assert row["verdict"] == "red"
    assert row["registers"] is row["spill_bytes"] is row["shared_bytes"] is row["mma"] is None
    assert "equal reduction dimensions" in row["reason"]
    assert "Traceback" not in handmade.process.stdout + handmade.process.stderr


def test_red_rows_give_status_1_and_a_plain_table(handmade: Run) -> None:
    assert handmade.process.returncode == 1
    lines = handmade.process.stdout.splitlines()
    assert lines[0].split() == [
        "kernel", "arch", "config", "dtype", "registers", "spills", "shared", "mma", "verdict",
    ]  # fmt: skip
    assert lines[-1].startswith("variants: 12, red: 9")
    assert "\x1b" not in handmade.process.stdout


def test_the_filter_and_json_on_stdout_and_status_0(handmade: Run) -> None:
    process = run_aot(
        "--modules", "handmade_kernels", "--arch", "80", "--kernel", "good", "--json", "-",
        cache=handmade.cache,
    )  # fmt: skip
    assert process.returncode == 0
    assert json.loads(process.stdout) == [handmade.rows["good", 80]]
    assert "variants: 1, red: 0" in process.stderr


def test_a_fault_in_the_compiler_makes_one_row_red(handmade: Run) -> None:
    process = run_aot(
        "--modules", "crashing_kernels", "--arch", "80", "--jobs", "1", "--json", "-",
        cache=handmade.cache,
    )  # fmt: skip
    assert process.returncode == 1
    aborts, good = json.loads(process.stdout)
    assert aborts["verdict"] == "red"
    assert "status -6" in aborts["reason"] and "assertion in native code" in aborts["reason"]
    assert good == handmade.rows["good", 80]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "godo"], "unknown kernel godo; known: good, mismatched"),
        (["--arch", "70"], "invalid choice: 70"),
        (["--jobs", "0"], "--jobs is 0, at least 1"),
        (["--json", "no/such/folder/rows.json"], "can't write no/such/folder/rows.json"),
        (["--modules", "no_such_module"], "No module named 'no_such_module'"),
        (["--modules", "json"], "json has no aot_variants(arch)"),
    ],
    ids=["kernel", "arch", "jobs", "json", "module", "no variants"],
)
def test_bad_arguments_give_status_2_and_say_what_is_wrong(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["--modules", "handmade_kernels", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    process = run_aot("--modules", "handmade_kernels", cache=tmp_path, TRITON_INTERPRET="1")
    assert process.returncode == 2
    assert "TRITON_INTERPRET is set" in process.stderr
    assert "Traceback" not in process.stderr
