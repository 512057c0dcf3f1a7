"""Builds and calls the kernels of csrc/cuda on the host, by cuda_emulation.h."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import c_char_p, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfast.native.library import _SIGNATURES, DTYPES, QUANT_TYPES

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "csrc" / "cuda" / "api.cu"
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("c++") or shutil.which("g++")


def build(source: Path, folder: Path) -> ctypes.CDLL:
    """A CUDA source compiled for the host, with the emulation's own functions declared."""
    library = folder / f"{source.stem}.so"
    found = compiler()
    assert found is not None
    command = [found, *FLAGS, "-include", str(HERE / "cuda_emulation.h"), "-x", "c++", str(source)]
    done = subprocess.run(
        [*command, "-o", str(library), "-ldl"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.pf_emulation_begin.argtypes = [c_uint64, c_int]
    loaded.pf_emulation_range.argtypes = [c_void_p, c_uint64, c_int, c_int]
    loaded.pf_emulation_only.argtypes = [c_int64, c_int64]
    loaded.pf_emulation_writes.argtypes = [c_void_p, c_void_p, c_void_p]
    loaded.pf_emulation_report.restype = c_char_p
    loaded.pf_emulation_kernel.restype = c_char_p
    loaded.pf_emulation_blocks.restype = c_int64
    return loaded


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def aligned_empty(count: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Uninitialised elements that begin `shift` elements behind a multiple of 16 bytes."""
    room = torch.empty(count + shift + 16, dtype=dtype)
    start = -room.data_ptr() % 16 // dtype.itemsize + shift
    return room[start : start + count]


def copied(tensor: Tensor, shift: int = 0) -> Tensor:
    """A copy that begins as `aligned_empty` says."""
    copy = aligned_empty(tensor.numel(), tensor.dtype, shift).view(tensor.shape)
    return copy.copy_(tensor)


class Emulation:
    """libpeftfast_cuda on the host. What a call left is in `report` (faults, empty: none), `kernel`
    (the name of the one launched), `blocks` (how many ran), `writes` (how often each byte of the
    output was written: least, most).
    """

    def __init__(self, folder: Path) -> None:
        self.library = build(SOURCE, folder)
        for name, (result, arguments) in _SIGNATURES["cuda"].items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.seed = 1
        self.sms = 4
        self.only: tuple[int, int] | None = None
        self.report = self.kernel = ""
        self.blocks = 0
        self.writes = (0, 0)

    def dequantize(
        self,
        packed: Tensor,
        statistics: tuple[Tensor | None, ...],
        block_size: int,
        quant_type: str,
        dtype: torch.dtype,
        out: Tensor,
    ) -> int:
        """The status; out is filled."""
        return self._call(
            self.library.pf_cuda_nf4_dequantize,
            [packed, *statistics],
            out,
            [
                address(packed),
                *map(address, statistics),
                out.numel(),
                block_size,
                QUANT_TYPES[quant_type],
                DTYPES[dtype],
                DTYPES[out.dtype],
                address(out),
                None,
            ],
        )

    def gemv(
        self,
        x: Tensor,
        packed: Tensor,
        statistics: tuple[Tensor | None, ...],
        block_size: int,
        quant_type: str,
        bias: Tensor | None,
        out: Tensor,
    ) -> int:
        """The status; out is filled."""
        return self._call(
            self.library.pf_cuda_nf4_gemv,
            [x, packed, *statistics, bias],
            out,
            [
                address(x),
                address(packed),
                *map(address, statistics),
                *out.shape,
                x.shape[1],
                block_size,
                QUANT_TYPES[quant_type],
                DTYPES[x.dtype],
                address(bias),
                address(out),
                None,
            ],
        )

    def _call(
        self, function: Any, inputs: list[Tensor | None], out: Tensor, arguments: list[Any]
    ) -> int:
        begin = self.library
        begin.pf_emulation_begin(self.seed, self.sms)
        if self.only is not None:
            begin.pf_emulation_only(*self.only)
        for tensor in inputs:
            if tensor is not None:
                begin.pf_emulation_range(address(tensor), tensor.nbytes, 0, 0)
        counted = self.only is None
        begin.pf_emulation_range(address(out), out.nbytes, 1, int(counted))
        status = function(*arguments)
        least, most = c_int(), c_int()
        if counted:
            begin.pf_emulation_writes(address(out), ctypes.byref(least), ctypes.byref(most))
        self.report = begin.pf_emulation_report().decode()
        self.kernel = begin.pf_emulation_kernel().decode()
        self.blocks = begin.pf_emulation_blocks()
        self.writes = (least.value, most.value)
        return status
