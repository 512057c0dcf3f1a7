"""Promises about the tree itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_folder_is_not_a_package() -> None:
    assert (ROOT / "kernels" / "peftfast_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_hubs_kernels_package_is_not_shadowed(tmp_path: Path) -> None:
    """From the repository root, `import kernels` must still find a package of that name."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("origin = 'the other package'\n")
    done = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.origin)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "the other package", done.stderr


def test_version_is_written_once() -> None:
    places = [
        str(path.relative_to(ROOT))
        for folder in ("peftfast", "kernels", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"^(__version__|VERSION|version)\s*=\s*[\"']", path.read_text(), re.MULTILINE)
    ]
    assert places == ["peftfast/_version.py"]
    assert not re.search(r"^version\s*=\s*\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "version" not in (ROOT / "setup.py").read_text()


def test_no_package_index_is_named() -> None:
    files = ["Makefile", "constraints.txt", "pyproject.toml", "setup.py", ".ci/run"]
    for name in [*files, ".github/workflows/ci.yml"]:
        text = (ROOT / name).read_text()
        assert not re.search(r"index-url|find-links|https?://", text), name


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("target", ["demo", "test", "lint", "aot", "bench", "examples"])
def test_targets_set_up_what_they_need(target: str, tmp_path: Path) -> None:
    done = make("--dry-run", f"VENV={tmp_path / 'venv'}", target)
    assert done.returncode == 0, done.stderr
    assert "-m venv" in done.stdout
    assert "-c constraints.txt --no-build-isolation -e '.[dev]'" in done.stdout


def test_the_second_call_sets_nothing_up(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    (tmp_path / ".peftfast-installed").touch()
    done = make("--dry-run", f"VENV={tmp_path}", "test")
    assert done.returncode == 0, done.stderr
    assert "install" not in done.stdout
    assert "pytest" in done.stdout


def test_gpu_target_installs_nothing(tmp_path: Path) -> None:
    done = make("--dry-run", f"VENV={tmp_path / 'venv'}", "gpu")
    assert done.returncode == 0, done.stderr
    assert "install" not in done.stdout
    assert "-m benchmarks gpu" in done.stdout


def test_no_usable_python_is_a_clear_error(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make(f"VENV={tmp_path / 'venv'}", f"PYTHON={old} /nonexistent/python3", "test")
    assert done.returncode != 0
    assert "Python 3.10 or later" in done.stderr
    assert str(old) in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_workflow_runs_what_ci_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    steps = " ".join(re.findall(r"^step make (.+)$", script.read_text(), re.MULTILINE)).split()
    assert {"lint", "test", "aot", "traffic", "examples", "demo"} <= set(steps)
    assert re.search(r"run: \.ci/run$", (ROOT / ".github/workflows/ci.yml").read_text(), re.M)
