"""`make gpu`: the kernels' tests on a GPU, then the benchmarks, within a budget of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from benchmarks.provenance import ROOT, device_name
from benchmarks.tables import console, figure, show

_GRACE = 20.0  # seconds that a stage may take beyond the budget it is told, to end by itself


@dataclass(frozen=True)
class Stage:
    """One process: tests, or one benchmark.

    Attributes:
        share: the most seconds that it gets, if so much is left.
    """

    name: str
    command: Sequence[str]
    share: float


@dataclass(frozen=True)
class Result:
    """How a stage ended: "passed", or what went wrong."""

    name: str
    outcome: str
    seconds: float


def run_gpu(budget: float, results: Path | None) -> int:
    """Runs every stage, a failure of one not keeping the next from running; prints a summary.

    Returns:
        0; 1 if a stage failed or ran out of time; 2 without a GPU.
    """
    if not torch.cuda.is_available():
        print(
            "benchmarks gpu: PyTorch sees no CUDA device here. Run it on a machine with an NVIDIA "
            "GPU and a CUDA build of PyTorch; without one, `make test` runs the kernels in "
            "Triton's interpreter and `make bench` counts their traffic.",
            file=sys.stderr,
        )
        return 2
    deadline = monotonic() + budget
    out = console(to_stderr=False)
    out.print(f"{device_name(torch.device('cuda'))}, torch {torch.__version__}")
    ended: list[Result] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages(Path(folder), results):
            ended.append(_run(stage, deadline - monotonic()))
            rows += _rows(Path(folder) / f"{stage.name}.json")
    if rows:
        show(out, "Measured in this run", *_summary(rows))
    show(
        out,
        "Stages",
        ["stage", "outcome", "s"],
        [[one.name, one.outcome, figure(one.seconds, 0)] for one in ended],
    )
    return int(any(one.outcome != "passed" for one in ended))


def stages(folder: Path, results: Path | None) -> list[Stage]:
    """The CUDA library and the tests first; then the benchmarks, the most important one first."""
    build = [sys.executable, "setup.py", "build_native", "--build-lib", "."]
    parallel = ["-n", "8"] if find_spec("xdist") else []
    folders = ["tests/ops", "tests/kernels", "tests/native"]
    tests = [sys.executable, "-m", "pytest", *folders, "-q", "-x", *parallel]
    found = [Stage("build", build, 45.0), Stage("tests", tests, 110.0)]
    benchmarks = {"lora_linear": 40.0, "train_step": 55.0, "nf4_dequantize": 30.0}
    benchmarks |= {"nf4_linear": 40.0, "bottleneck": 30.0, "prefix_attention": 30.0}
    if find_spec("bitsandbytes"):
        benchmarks["train_step_qlora"] = 50.0
    for name, share in (benchmarks | {"memory_peak": 30.0, "lora_gemm": 25.0}).items():
        command = [sys.executable, "-m", "benchmarks", "run", name, "--device", "cuda", "--quick"]
        command += ["--json", str(folder / f"{name}.json")]
        command += ["--results", str(results)] if results else []
        found.append(Stage(name, command, share))
    saved = [sys.executable, "-m", "benchmarks", "saved", "--device", "cuda", "--quick", "--record"]
    saved += ["--results", str(results)] if results else []
    return [*found, Stage("saved", saved, 35.0)]


def _run(stage: Stage, left: float, least: float = _GRACE) -> Result:
    """Runs one stage within its share of the time that is left, if that is `least` seconds."""
    limit = min(stage.share, left)
    if limit < least:
        return Result(stage.name, "not started: no time left", 0.0)
    command = list(stage.command)
    if "run" in command:
        command += ["--budget", str(limit - _GRACE)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    print(f"== {stage.name}: {' '.join(command)}", flush=True)
    start = monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        outcome = f"stopped after {limit:.0f} s"
        return Result(stage.name, outcome, monotonic() - start)
    outcome = "passed" if status == 0 else f"failed with status {status}"
    return Result(stage.name, outcome, monotonic() - start)


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _summary(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["benchmark", "configuration", "variant", "ms", "x first", "peak MiB", "x floor"]
    first: dict[str, float] = {}
    cells = []
    for row in rows:
        where = " ".join(str(value) for value in row["config"].values())
        median = row["time"]["median"]
        base = first.setdefault(f"{row['benchmark']} {where}", median)
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
        cells.append(
            [
                row["benchmark"],
                where,
                row["variant"],
                figure(1e3 * median, 3),
                figure(median / base),
                figure(peak, 0),
                figure(row["distance_to_floor"]),
            ]
        )
    return header, cells
