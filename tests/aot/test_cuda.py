"""`python -m peftfast_kernels.aot` on the CUDA kernels: with nvcc, without it, without sources."""

from __future__ import annotations

import ast
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the command belongs to the Triton kernels' package")
from triton import knobs

from peftfast_kernels import aot, cuda_sources
from peftfast_kernels.aot import CudaTask, compile_cuda
from peftfast_kernels.cuda_sources import KERNELS, CudaKernel, Nvcc
from peftfast_kernels.tiles import ARCHES

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["pf_nf4_dequantize", "pf_nf4_gemv"]
FOUND = cuda_sources.find()
needs_nvcc = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))

FAULTY = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* in, float* out) {
    float values[64];
    for (int i = 0; i < 64; ++i) values[i] = in[i * 1024 + threadIdx.x];
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < 64; ++j) values[i] = values[i] * values[j] + 1.0f;
    for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = values[i];
}
extern "C" __global__ void narrow(const int4* in, int* out) { out[threadIdx.x] = in[0].x; }
extern "C" __global__ void forgotten(int* out) { out[threadIdx.x] = 1; }
"""


def fake_nvcc(folder: Path, body: str) -> str:
    """A program in nvcc's place that answers for sm_80 and sm_90, and otherwise runs `body`."""
    program = folder / "nvcc"
    program.write_text(
        '#!/bin/sh\ncase "$1" in\n--version) echo "release 99.1, V99.1.7" ;;\n'
        f'--list-gpu-code) echo "sm_80 sm_90" ;;\n*) {body} ;;\nesac\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def run_main(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str]:
    """The command in this process, without Triton kernels: other tests have them interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "tasks_of", lambda modules, arches: [])
    status = aot.main(["--kernel", *NAMES, "--jobs", "1", *arguments])
    return status, capsys.readouterr().out


@needs_nvcc
def test_the_kernels_are_sound(tmp_path: Path) -> None:
    """On two architectures: `make aot` has them all."""
    file = tmp_path / "rows.json"
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env["PYTHONPATH"] = str(ROOT / "kernels")
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "peftfast_kernels.aot", "--kernel", *NAMES, "--arch", "80", "90",
         "--json", str(file)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert isinstance(FOUND, Nvcc)
    assert f"nvcc {FOUND.version})" in done.stdout.splitlines()[-1]
    rows = json.loads(file.read_text())
    assert len(rows) == 2 * len(KERNELS)
    assert len({(r["kernel"], r["arch"], r["config"], r["dtype"]) for r in rows}) == len(rows)
    for row in rows:
        assert (row["verdict"], row["reason"]) == ("ok", "")
        assert row["spill_bytes"] == row["stack_bytes"] == 0
        # Two blocks of 256 threads on an SM, or more.
        assert 16 < row["registers"] <= 128
        assert row["shared_bytes"] <= 48 * 1024
        tensor_cores = row["kernel"] == "pf_nf4_gemv" and row["dtype"] in ("bf16", "fp16")
        assert (row["mma"] > 0) == tensor_cores


@needs_nvcc
def test_faults_are_red(tmp_path: Path) -> None:
    assert isinstance(FOUND, Nvcc)
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    nvcc = Nvcc(FOUND.command, FOUND.version, FOUND.arches, source)
    kernels = (
        CudaKernel("spills", "spills", "", "fp32"),
        CudaKernel("narrow", "narrow", "", "any", "any", ("LDG.128",)),
        CudaKernel("absent", "absent", "", "any"),
    )
    rows = {row.kernel: row for row in compile_cuda(CudaTask(nvcc, 80, kernels))}
    assert "bytes to local memory" in rows["spills"].reason
    assert rows["spills"].spill_bytes and rows["spills"].stack_bytes
    assert rows["narrow"].reason == "no tensor-core instruction; no LDG.128"
    assert rows["absent"].reason == "absent is not in the machine code"
    assert rows["forgotten"].reason == "cuda_sources.KERNELS does not name it"
    assert {row.verdict for row in rows.values()} == {"red"}


@needs_nvcc
def test_a_compile_error_makes_all_rows_red(tmp_path: Path) -> None:
    assert isinstance(FOUND, Nvcc)
    source = tmp_path / "broken.cu"
    source.write_text('extern "C" __global__ void broken() { undeclared = 1; }\n')
    nvcc = Nvcc(FOUND.command, FOUND.version, FOUND.arches, source)
    rows = compile_cuda(CudaTask(nvcc, 80, KERNELS))
    assert len(rows) == len(KERNELS)
    for row in rows:
        assert row.verdict == "red" and row.registers is None
        assert "does not compile" in row.reason and '"undeclared" is undefined' in row.reason


def test_a_compiler_that_fails_gives_red_rows_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", fake_nvcc(tmp_path, "echo 'no licence' >&2; exit 3"))
    status, out = run_main(capsys, monkeypatch, "--arch", "80", "100")
    assert status == 1
    assert "does not compile: no licence" in out
    assert "CUDA kernels are not compiled for sm_100: nvcc 99.1.7 does not know it" in out
    last = f"variants: {len(KERNELS)}, red: {len(KERNELS)} (triton "
    assert out.splitlines()[-1].startswith(last) and "nvcc 99.1.7" in out.splitlines()[-1]


def test_without_nvcc_a_line_says_so_and_nothing_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(cuda_sources.shutil, "which", lambda *arguments, **options: None)
    status, out = run_main(capsys, monkeypatch)
    assert status == 0
    assert "CUDA kernels are not compiled: nvcc was not found" in out
    assert out.splitlines()[-1].startswith("variants: 0, red: 0 (triton ")


def test_an_nvcc_that_does_not_run_is_a_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", "/no/such/nvcc")
    status, out = run_main(capsys, monkeypatch)
    assert status == 0
    assert "CUDA kernels are not compiled: /no/such/nvcc does not run:" in out


def test_an_installed_package_has_no_sources(tmp_path: Path) -> None:
    reason = cuda_sources.find(tmp_path / "csrc" / "cuda" / "api.cu")
    assert isinstance(reason, str) and "sources are not beside this package" in reason


def test_kernels_are_compiled_as_setup_compiles_them() -> None:
    """For the same architectures, with the same flags but for the host's."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    assigned = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("NVCC_FLAGS", "CUDA_ARCHES")
    }
    assert list(assigned["CUDA_ARCHES"]) == [cuda_sources.target(arch) for arch in ARCHES]
    flags = " ".join(assigned["NVCC_FLAGS"])
    assert all(flag in assigned["NVCC_FLAGS"] for flag in cuda_sources.FLAGS)
    assert not any(word in flags for word in ("fast", "ftz", "prec-", "fmad", "maxrreg", "-D"))


LIBRARY = ROOT / "peftfast" / "native" / "libpeftfast_cuda.so"


@needs_nvcc
@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built")
def test_the_built_library_has_code_for_every_architecture() -> None:
    """Without its own an H100 finds no kernel: sm_89's and sm_100's do not run on it."""
    assert isinstance(FOUND, Nvcc)
    listing = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-lelf", str(LIBRARY)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    built = {int(number) for number in re.findall(r"\.sm_(\d+)", listing)}
    assert built == {arch for arch in ARCHES if arch in FOUND.arches}


def test_each_kernel_of_the_sources_has_a_row() -> None:
    source = cuda_sources.SOURCE.read_text()
    for kernel in KERNELS:
        assert f"{kernel.symbol}," in source or f"{kernel.symbol}(" in source
