# mypy: disable-error-code="no-untyped-def"
"""The command line: names, exit statuses, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import commands, gpu
from benchmarks.__main__ import main
from benchmarks.gates import GateFailed
from benchmarks.registry import Counted, CountedReport, Outcome, Request, Timed
from benchmarks.targets import Target
from benchmarks.timing import Samples, back_to_back, interleaved

CPU = torch.device("cpu")


def _timed_row(variant="a"):
    return {
        "variant": variant,
        "config": {"rows": 1},
        "time": Samples(1.0, 1.0, 1.0, 1.0, 2).as_dict(),
        "back_to_back": None,
        "tokens_per_second": 1.0,
        "peak_bytes": None,
        "distance_to_floor": 1.0,
    }


@pytest.fixture
def fake(monkeypatch):
    """Stands in for the registered benchmarks: `good`, `wrong` and `missing` targets."""

    def good(request):
        yield Outcome([_timed_row()], [Target("speed", 2.0, 1.0)])

    def wrong(request):
        yield Outcome([_timed_row("kept")], [])
        raise GateFailed("b differs from float64: dx: 1.0e+00 > 1.0e-03")

    def report(value):
        row = {"variant": "v", "total_u": 5.0, "extra_u": value, "workspace_u": 0.0}
        row |= {"atomics": 0, "gflops": 1.0, "breakdown": []}
        return CountedReport({"rows": 1}, 10, [row], {}, [Target("extra u", value, 3.3)])

    timed = [Timed("good", "", good), Timed("wrong", "", wrong)]
    counted = [
        Counted("met", "", lambda say: report(3.0)),
        Counted("missed", "", lambda say: report(4.0)),
    ]
    monkeypatch.setattr(commands, "timed_benchmarks", lambda: {b.name: b for b in timed})
    monkeypatch.setattr(commands, "counted_benchmarks", lambda: {b.name: b for b in counted})


def test_list_names_every_benchmark(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in ("traffic lora_linear", "traffic lora_siblings", "run train_step", "run lora_gemm"):
        assert name in printed


def test_traffic_fails_on_a_missed_target(fake, tmp_path, capsys):
    assert main(["traffic", "met", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)["reports"][0]
    assert report["rows"][0]["extra_u"] == 3.0
    assert report["targets"][0]["met"] is True
    assert main(["traffic", "met", "missed", "--json", str(tmp_path / "t.json")]) == 1
    assert "MISSED: extra u: 4 (target <= 3.3)" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "t.json").read_text())["reports"]) == 2


def test_traffic_records_only_when_asked(fake, tmp_path):
    assert main(["traffic", "met", "--results", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(["traffic", "met", "--record", "--results", str(tmp_path)]) == 0
    row = json.loads((tmp_path / "counted" / "met.jsonl").read_text())
    assert (row["variant"], row["extra_u"]) == ("v", 3.0)


def test_run_records_rows_with_provenance(fake, tmp_path, capsys):
    command = ["run", "good", "--device", "cpu", "--results", str(tmp_path)]
    assert main([*command, "--no-record"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(command) == 0  # a missed target of speed depends on the machine: no failure
    assert "MISSED: speed" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/good.jsonl")
    row = json.loads(path.read_text())
    assert row["provenance"]["torch"] and row["provenance"]["date"]


def test_a_red_gate_fails_and_keeps_only_what_came_before(fake, tmp_path, capsys):
    command = ["run", "wrong", "good", "--device", "cpu", "--results", str(tmp_path)]
    assert main(command) == 1
    assert "dx: 1.0e+00" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/wrong.jsonl")
    assert [json.loads(line)["variant"] for line in path.read_text().splitlines()] == ["kept"]
    assert list(tmp_path.glob("*/good.jsonl"))


def test_wrong_calls_say_what_is_wrong(fake, capsys):
    assert main(["run", "nothing"]) == 2
    assert "no benchmark nothing; there are: good, wrong" in capsys.readouterr().err
    assert main(["traffic", "nothing"]) == 2
    if not torch.cuda.is_available():
        assert main(["run", "good", "--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err
        assert main(["gpu"]) == 2
        assert "make test" in capsys.readouterr().err


def test_gpu_benchmarks_refuse_a_cpu(tmp_path, capsys):
    command = ["run", "lora_gemm", "--device", "cpu", "--results", str(tmp_path)]
    assert main(command) == 1
    assert "needs --device cuda" in capsys.readouterr().out


def test_a_stage_that_fails_hangs_or_has_no_time_is_reported(capfd):
    python = gpu.sys.executable
    passed = gpu._run(gpu.Stage("tests", [python, "-c", ""], 60.0), 60.0)
    failed = gpu._run(gpu.Stage("tests", [python, "-c", "raise SystemExit(3)"], 60.0), 60.0)
    hung = gpu._run(gpu.Stage("tests", [python, "-c", "import time; time.sleep(99)"], 0.5), 60.0, 0)
    late = gpu._run(gpu.Stage("tests", [python, "-c", ""], 60.0), 1.0)
    outcomes = [one.outcome for one in (passed, failed, hung, late)]
    assert outcomes[:2] == ["passed", "failed with status 3"]
    assert outcomes[2].startswith("stopped after") and outcomes[3].startswith("not started")


def test_gpu_stages_fit_the_budget_and_run_outside_the_interpreter():
    stages = gpu.stages(Path("/tmp"), None)
    assert [stage.name for stage in stages[:2]] == ["build", "tests"]
    assert sum(stage.share for stage in stages) <= 520
    assert all(stage.command[0] == gpu.sys.executable for stage in stages)


def test_timing_is_interleaved_and_summarised():
    order = []
    calls = {name: lambda round_, name=name: order.append((round_, name)) for name in "ab"}
    samples = interleaved(calls, CPU, warmup=1, samples=2)
    assert order == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert samples["a"].count == 2
    assert Samples.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Samples(3.0, 2.0, 4.0, 1.0, 5)
    assert set(back_to_back(calls, CPU, calls=2, rounds=3)) == {"a", "b"}


@pytest.mark.parametrize("value, met", [(1.0, True), (1.2, False), (float("nan"), False)])
def test_targets(value, met):
    assert Target("t", value, 1.0).met is met
    assert Target("t", -value, -1.0, at_least=True).met is met


def test_nothing_is_started_after_the_deadline():
    said: list[str] = []
    past = Request(CPU, quick=True, deadline=0.0, say=said.append)
    assert past.expired("8B") is True
    assert Request(CPU, quick=True, deadline=None, say=said.append).expired("1B") is False
    assert said == ["out of time, not started: 8B", "1B"]


def test_gpu_run_goes_on_after_a_failure_and_sums_up(monkeypatch, tmp_path, capfd):
    row = {"benchmark": "good", "config": {"rows": 1}, "variant": "ours", "peak_bytes": 1 << 20}
    row |= {"time": {"median": 0.002}, "distance_to_floor": 1.5}
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"

    def stages(folder, results):
        python, rows = gpu.sys.executable, json.dumps({"rows": [row]})
        yield gpu.Stage("broken", [python, "-c", "raise SystemExit(1)"], 60.0)
        yield gpu.Stage("good", [python, "-c", write, str(folder / "good.json"), rows], 60.0)

    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "device_name", lambda device: "A GPU")
    monkeypatch.setattr(gpu, "stages", stages)
    assert gpu.run_gpu(200.0, None) == 1
    printed = capfd.readouterr().out
    assert "failed with status 1" in printed and "passed" in printed
    assert "ours" in printed and "2.000" in printed and "1.50" in printed
