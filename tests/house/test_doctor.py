"""`peftfast doctor`: its findings, its tables and its exit status."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

import peftfast
from peftfast import cli, doctor
from peftfast.native import library
from peftfast.ops.dispatch import availability


def rendered(diagnosis: doctor.Diagnosis) -> str:
    out = io.StringIO()
    doctor.render(diagnosis, Console(file=out, width=200))
    return out.getvalue()


def test_registrations_are_said_where_there_are_some() -> None:
    """In processes of their own: here, other tests have imported what registers."""
    for line, expected in (
        ("", ["{'peft': [], 'transformers': []}"]),
        (
            "import peftfast.methods; ",
            ["PeftType.PEFTFAST", "AttentionInterface 'peftfast_prefix'"],
        ),
    ):
        program = f"{line}from peftfast import doctor; print(doctor.diagnose().registrations)"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert all(name in done.stdout for name in expected)


def test_json_says_what_the_tables_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peftfast"] == peftfast.__version__
    assert found["implementations"] == availability()
    assert found["registrations"] == {
        "peft": doctor._registered(), "transformers": doctor._attentions()
    }  # fmt: skip
    assert found["problems"] == []
    assert found["torch_cuda"] == torch.version.cuda
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions == {name: installed_version(name) for name in doctor.PACKAGES}
    assert [device["name"] for device in found["devices"]][0] == "cpu"
    assert len(found["devices"]) == 1 + torch.cuda.device_count()


def test_tables_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert f"peftfast {peftfast.__version__}" in capsys.readouterr().out
    text = rendered(doctor.diagnose())
    for name in (*doctor.PACKAGES, *availability(), "cpu"):
        assert name in text
    words = text.replace("│", " ").split()  # long reasons are wrapped
    for reason in filter(None, availability().values()):
        assert " ".join(reason.split()[:6]) in " ".join(words)
    assert f"registered with peft: {', '.join(doctor._registered()) or 'none'}" in text


def test_unusable_implementation_carries_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"triton": "no [such] device", "reference": None}
    monkeypatch.setattr(doctor, "availability", lambda: found)
    diagnosis = doctor.diagnose()
    assert diagnosis.implementations == found
    (row,) = (line for line in rendered(diagnosis).splitlines() if "no [such] device" in line)
    assert row.split()[1:4:2] == ["triton", "no"]


@pytest.mark.parametrize(
    ("fake", "problem"),
    [(None, "not installed"), ("0.1.0", "0.1.0 is outside")],
    ids=["missing", "too old"],
)
def test_a_bad_dependency_is_a_problem(
    fake: str | None,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def version(name: str) -> str:
        if name != "peft":
            return installed_version(name)
        if fake is None:
            raise PackageNotFoundError(name)
        return fake

    monkeypatch.setattr(doctor, "version", version)
    assert cli.main(["doctor"]) == 1
    assert f"problem: peft: {problem}" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 1
    assert problem in json.loads(capsys.readouterr().out)["problems"][0]


def test_a_package_of_another_platform_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise PackageNotFoundError(name)
        return installed_version(name)

    elsewhere = {"triton": Requirement("triton>=3.6; platform_system == 'Elsewhere'")}
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "_supported_ranges", lambda: elsewhere)
    diagnosis = doctor.diagnose()
    assert diagnosis.problems == []
    (row,) = (line for line in rendered(diagnosis).splitlines() if ">=3.6" in line)
    assert "not needed here" in row


def test_settings_that_change_dispatch_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_IMPL", "reference")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    diagnosis = doctor.diagnose()
    assert diagnosis.environment["PEFTFAST_IMPL"] == "reference"
    text = rendered(diagnosis)
    assert "PEFTFAST_IMPL=reference" in text
    assert "CUDA_VISIBLE_DEVICES" not in text


def test_native_libraries_are_described() -> None:
    cpu, cuda = doctor.diagnose().libraries
    assert (cpu.name, cuda.name) == ("libpeftfast_cpu.so", "libpeftfast_cuda.so")
    for kind, found in (("cpu", cpu), ("cuda", cuda)):
        assert found.missing == library.missing(kind)
        assert bool(found.description) == (found.missing is None)
    if cpu.missing is None:
        assert cpu.description == f"C++, {library.isa()}, OpenMP"


def test_a_library_that_is_not_built_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library._load.cache_clear()
    try:
        text = rendered(doctor.diagnose())
    finally:
        library._load.cache_clear()
    (row,) = (line for line in text.splitlines() if "libpeftfast_cuda.so is not" in line)
    assert row.split()[1:4:2] == ["libpeftfast_cuda.so", "no"]
    assert "PEFTFAST_BUILD=cuda" in text


def test_a_wrong_instruction_set_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := library.missing("cpu"):
        pytest.skip(reason)
    monkeypatch.setenv("PEFTFAST_CPU_ISA", "mmx")
    library._load.cache_clear()
    try:
        assert cli.main(["doctor", "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert cli.main(["doctor"]) == 1
    finally:
        library._load.cache_clear()
    (problem,) = found["problems"]
    assert "PEFTFAST_CPU_ISA is 'mmx'; allowed: 'portable', 'avx2', 'avx512'" in problem
    assert found["implementations"]["native"] == found["libraries"][0]["missing"] == problem
    assert "problem: PEFTFAST_CPU_ISA is 'mmx'" in capsys.readouterr().out


def test_compilers_are_those_that_a_build_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("c++", "other", "nvcc"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("NVCC", raising=False)
    found = doctor.diagnose()
    assert (found.cxx_compiler, found.nvcc) == (str(tmp_path / "c++"), str(tmp_path / "nvcc"))
    monkeypatch.setenv("CXX", "other -m64")
    monkeypatch.setenv("NVCC", "nothing")
    found = doctor.diagnose()
    assert (found.cxx_compiler, found.nvcc) == (str(tmp_path / "other"), None)
    assert "nvcc: none found" in rendered(found)


def test_devices_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = doctor.Device("cuda:0", "some GPU, sm_90", 80 * 2**30)
    monkeypatch.setattr(doctor, "_devices", lambda: [device])
    assert "80.0 GiB" in rendered(doctor.diagnose())
