"""`peftfast doctor`: its findings, its tables and its exit status."""

from __future__ import annotations

import io
import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

import peftfast
from peftfast import cli, doctor
from peftfast.ops.dispatch import availability


def rendered(diagnosis: doctor.Diagnosis) -> str:
    out = io.StringIO()
    doctor.render(diagnosis, Console(file=out, width=200))
    return out.getvalue()


def test_json_says_what_the_tables_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peftfast"] == peftfast.__version__
    assert found["implementations"] == availability()
    assert found["registrations"] == {"peft": [], "transformers": []}
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
    for reason in filter(None, availability().values()):
        assert reason in text
    assert "registered with peft: none" in text


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


def test_devices_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = doctor.Device("cuda:0", "some GPU, sm_90", 80 * 2**30)
    monkeypatch.setattr(doctor, "_devices", lambda: [device])
    assert "80.0 GiB" in rendered(doctor.diagnose())
