"""The CUDA kernels of csrc/cuda, compiled by nvcc where there is one and judged like Triton's.

Only a checkout has their sources: an installed wheel carries the library that they were built into,
if any. `find` says what is missing, which is no error.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# setup.py's, but for what concerns the host.
FLAGS = ("-std=c++17", "-O3")
SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "api.cu"


@dataclass(frozen=True)
class CudaKernel:
    """One kernel of the library.

    `symbol`: its name in the machine code; `name`, `config` and `dtype`: what its row is called;
    `mma`: as in `Variant`; `accesses`: opcodes that its machine code must hold, the 16-byte
    accesses that it was written for.
    """

    symbol: str
    name: str
    config: str
    dtype: str
    mma: str = "none"
    accesses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Nvcc:
    """A compiler for `source`: the command, its version, the architectures that it knows."""

    command: tuple[str, ...]
    version: str
    arches: frozenset[int]
    source: Path


class CudaCompileError(Exception):
    """nvcc did not compile the source; the message is what it printed."""


def _dequantize(value: str, out: str) -> CudaKernel:
    symbol = f"pf_nf4_dequantize_{value}" + ("" if value == out else f"_{out}")
    dtype = value if value == out else f"{value}>{out}"
    copies = ("LDGSTS.128", "STG.128")
    return CudaKernel(symbol, "pf_nf4_dequantize", "8w 1024 s3", dtype, accesses=copies)


def _gemv(dtype: str, tokens: int) -> CudaKernel:
    symbol = f"pf_nf4_gemv_{dtype}" + ("" if dtype == "fp32" else f"_{tokens}")
    mma = "none" if dtype == "fp32" else "any"
    return CudaKernel(symbol, "pf_nf4_gemv", f"8w 16x{tokens}x128", dtype, mma, ("LDG.128",))


KERNELS: tuple[CudaKernel, ...] = (
    _dequantize("bf16", "bf16"),
    _dequantize("fp16", "fp16"),
    _dequantize("fp32", "fp32"),
    _dequantize("bf16", "fp32"),
    _dequantize("fp16", "fp32"),
    CudaKernel("pf_nf4_dequantize_any", "pf_nf4_dequantize", "8w unaligned", "any"),
    _gemv("bf16", 8),
    _gemv("bf16", 16),
    _gemv("fp16", 8),
    _gemv("fp16", 16),
    _gemv("fp32", 4),
    CudaKernel("pf_nf4_gemv_any", "pf_nf4_gemv", "8w unaligned", "any"),
)


def find(source: Path = SOURCE) -> Nvcc | str:
    """The compiler, or in words why the kernels can't be compiled here."""
    if not source.is_file():
        return "their sources are not beside this package (a checkout has them in csrc/cuda)"
    command = _command()
    if command is None:
        return "nvcc was not found (on PATH, in CUDA_HOME; NVCC names it)"
    try:
        version = _run([*command, "--version"])
        known = _run([*command, "--list-gpu-code"])
    except (OSError, CudaCompileError) as error:
        return f"{shlex.join(command)} does not run: {error}"
    release = re.search(r"\bV([0-9.]+)", version)
    return Nvcc(
        tuple(command),
        release[1] if release else "of unknown version",
        frozenset(int(number) for number in re.findall(r"\bsm_(\d+)", known)),
        source,
    )


def target(arch: int) -> str:
    """The architecture's name for nvcc, as setup.py gives it: sm_90 with its own features."""
    return f"{arch}a" if arch == 90 else str(arch)


def compile_cubin(nvcc: Nvcc, arch: int) -> bytes:
    """The machine code of all kernels. Raises CudaCompileError."""
    name = target(arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        code = f"-gencode=arch=compute_{name},code=sm_{name}"
        _run([*nvcc.command, *FLAGS, "-cubin", code, str(nvcc.source), "-o", str(cubin)])
        return cubin.read_bytes()


def _command() -> list[str] | None:
    if asked := shlex.split(os.environ.get("NVCC", "")):
        return asked
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
    return [found] if found else None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CudaCompileError((done.stdout + done.stderr).strip())
    return done.stdout
