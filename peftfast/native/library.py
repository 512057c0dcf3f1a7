"""Finds, loads and checks the two shared libraries, each when it is first needed.

They lie beside this file, put there by setup.py where the machine had a compiler: C++ for
libpeftfast_cpu.so (csrc/cpu), nvcc for libpeftfast_cuda.so (csrc/cuda). Their interfaces are
csrc/peftfast.h and csrc/peftfast_cuda.h.

The environment variable PEFTFAST_CPU_ISA = portable, avx2 or avx512 names the instruction set of
the CPU kernels; without it the best that the machine has is used.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from ctypes import CDLL, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
ISAS = ("portable", "avx2", "avx512")
ISA_VARIABLE = "PEFTFAST_CPU_ISA"
# The codes of csrc/peftfast.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
QUANT_TYPES = {"nf4": 0, "fp4": 1}

_ABI = {"cpu": 1, "cuda": 1}
_COMPILER = {"cpu": "C++ compiler", "cuda": "nvcc"}
_STATUS = {
    1: "a code or size that the function does not take",
    2: "no instruction set of that name",
    3: "an instruction set that this build or this machine lacks",
    4: "out of memory",
}

_POINTER, _SIZE = c_void_p, c_int64
_STATISTICS = [_POINTER] * 4  # absmax, nested_absmax, nested_code, offset
_DEQUANTIZE = [_POINTER, *_STATISTICS, _SIZE, c_int, c_int, c_int, c_int, _POINTER]
_GEMV = [_POINTER, _POINTER, *_STATISTICS, *[_SIZE] * 3, c_int, c_int, c_int, _POINTER, _POINTER]
_SIGNATURES: dict[str, dict[str, tuple[Any, list[Any]]]] = {
    "cpu": {
        "pf_cpu_isa": (c_char_p, []),
        "pf_cpu_best_isa": (c_char_p, []),
        "pf_cpu_use_isa": (c_int, [c_char_p]),
        "pf_cpu_threading": (c_char_p, []),
        "pf_cpu_nf4_dequantize": (c_int, [*_DEQUANTIZE, c_int]),
        "pf_cpu_nf4_gemv": (c_int, [*_GEMV, c_int]),
        "pf_cpu_nf4_quantize": (
            c_int,
            [_POINTER, c_int, _SIZE, c_int, c_int, *[_POINTER] * 2, c_int],
        ),
        "pf_cpu_nf4_quantize_absmax": (c_int, [*[_POINTER] * 2, _SIZE, *[_POINTER] * 2, c_int]),
        "pf_cpu_dropout_mask": (c_int, [_POINTER, c_int, _SIZE, _SIZE, _POINTER, c_int]),
        "pf_cpu_dropout_apply": (
            c_int,
            [_POINTER, c_int, _SIZE, _SIZE, c_int, _POINTER, _SIZE, _POINTER, _SIZE, c_int],
        ),
    },
    "cuda": {
        "pf_cuda_error": (c_char_p, [c_int]),
        "pf_cuda_nf4_dequantize": (c_int, [*_DEQUANTIZE, _POINTER]),
        "pf_cuda_nf4_gemv": (c_int, [*_GEMV, _POINTER]),
    },
}

_QUESTIONS = ("pf_cpu_isa", "pf_cpu_best_isa", "pf_cpu_threading")
_dry: list[bool] = []


def missing(kind: str) -> str | None:
    """Why the library of "cpu" or "cuda" can't be used, in words; None where it can.

    Raises:
        ValueError: PEFTFAST_CPU_ISA names no instruction set that this machine has.
    """
    return None if _dry and kind == "cuda" else _load(kind)[1]


def cpu() -> Any:
    """libpeftfast_cpu, its functions declared.

    Raises:
        RuntimeError: it can't be used; the message says why.
        ValueError: as in `missing`.
    """
    return _loaded("cpu")


def cuda() -> Any:
    """libpeftfast_cuda, its functions declared; raises as `cpu` does."""
    return _loaded("cuda")


def isa() -> str:
    """The instruction set of the CPU kernels: "portable", "avx2" or "avx512"."""
    return cpu().pf_cpu_isa().decode()


def use_isa(name: str | None) -> None:
    """Change the instruction set of the CPU kernels, for the whole process.

    Args:
        name: as PEFTFAST_CPU_ISA; None: the best that the machine has.

    Raises:
        ValueError: unknown, or not available here.
    """
    _choose_isa(cpu(), name, "name")


def check(status: int) -> None:
    """Raise RuntimeError where a CPU function's status is not that of success."""
    if status:
        raise RuntimeError(f"libpeftfast_cpu: {_STATUS.get(status, f'status {status}')}")


def check_cuda(status: int) -> None:
    """Raise RuntimeError with CUDA's own words where a status is not that of success."""
    if status:
        raise RuntimeError(f"libpeftfast_cuda: {cuda().pf_cuda_error(status).decode()}")


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Kernels compute nothing, and CUDA's count as built: what their callers allocate is all that
    happens.
    """
    _dry.append(True)
    try:
        yield
    finally:
        _dry.pop()


def is_dry() -> bool:
    """Whether `dry_run` is open."""
    return bool(_dry)


class _DryLibrary:
    """Answers questions as the library does, and succeeds at everything else without doing it."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        if name in _QUESTIONS:
            return getattr(self._library, name)
        return lambda *_: 0


def path(kind: str) -> Path:
    """Where a library lies, if it was built."""
    return FOLDER / f"libpeftfast_{kind}.so"


def _loaded(kind: str) -> Any:
    library, reason = _load(kind)
    if library is None:
        raise RuntimeError(reason)
    return _DryLibrary(library) if _dry else library


@functools.cache
def _load(kind: str) -> tuple[Any, str | None]:
    """The library, or None and the reason."""
    file = path(kind)
    if not file.exists():
        return None, (
            f"{file.name} is not built: when peftfast was installed there was no"
            f" {_COMPILER[kind]}, or it failed, or PEFTFAST_BUILD left it out; reinstall with"
            f" PEFTFAST_BUILD={kind} to build it or to see why not"
        )
    try:
        library = CDLL(str(file))
    except OSError as error:
        return None, f"{file.name} can't be loaded: {error}"
    try:
        found = getattr(library, f"pf_{kind}_abi")()
        if found == _ABI[kind]:
            for name, (result, arguments) in _SIGNATURES[kind].items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        return None, f"{file.name} is no library of peftfast's: {error}"
    if found != _ABI[kind]:
        return None, (
            f"{file.name} has interface {found} and this version of peftfast needs {_ABI[kind]}:"
            " reinstall peftfast to rebuild it"
        )
    if kind == "cpu" and (asked := os.environ.get(ISA_VARIABLE)):
        _choose_isa(library, asked, ISA_VARIABLE)
    return library, None


def _choose_isa(library: Any, name: str | None, source: str) -> None:
    status = library.pf_cpu_use_isa(None if name is None else name.encode())
    if status == 0:
        return
    allowed = ", ".join(repr(isa) for isa in ISAS)
    best = library.pf_cpu_best_isa().decode()
    problem = f"allowed: {allowed}" if status == 2 else "this build or this machine lacks it"
    raise ValueError(f"{source} is {name!r}; {problem} (the best here is {best!r})")
