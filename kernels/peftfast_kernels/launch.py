"""One way to launch a kernel, and a way to see what would be launched without launching it.

Every launcher calls `launch`. While `recording` is open, launches are kept instead of run: with
tensors on the meta device the very launchers that serve a GPU then tell which kernels, tiles,
specialisations and grids a call leads to on an architecture that isn't there. Ahead-of-time
compilation and the counts of programs rest on this.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfast_kernels import device
from peftfast_kernels.variant import Variant

_OPTIONS = ("num_warps", "num_stages")
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for; `meta` holds constexprs, num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]
    mma: str

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def config(self) -> str:
        """Blocks, padded rank, lanes, warps, stages and the switches that are on, for tables."""
        blocks = [str(v) for k, v in self.meta.items() if k.startswith("BLOCK")]
        lanes = [
            len(v) for k, v in zip(self.kernel.arg_names, self.args, strict=False) if k == "ranks"
        ]
        rank = [f"r{self.meta['RANK_BLOCK']}x{n}" for n in lanes]
        run = [f"w{self.meta['num_warps']}", f"s{self.meta['num_stages']}"]
        switches = [k.lower() for k, v in self.meta.items() if v is True]
        return " ".join(["x".join(blocks), *rank, *run, *switches])

    def variant(self, dtype: str) -> Variant:
        """What Triton itself would compile for these arguments: types, constants, alignment."""
        constants: dict[Any, Any] = {k: v for k, v in self.meta.items() if k not in _OPTIONS}
        names = self.kernel.arg_names
        signature: dict[str, Any] = {name: "constexpr" for name in names[len(self.args) :]}
        attrs: dict[tuple[int, ...], Any] = {}
        for i, value in enumerate(self.args):
            if self.kernel.params[i].do_not_specialize and isinstance(value, int):
                signature[names[i]] = "i32"
            else:
                signature[names[i]] = _specialise(value, (i,), constants, attrs)
        return Variant(
            self.kernel,
            self.name,
            self.config,
            dtype,
            {name: signature[name] for name in names},
            constants,
            attrs,
            self.meta["num_warps"],
            self.meta["num_stages"],
            self.mma,
        )


_recorded: list[list[Launch] | None] = []  # None: a dry run, which keeps nothing


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, mma: str, **meta: Any) -> None:
    """Launch a kernel, or keep the launch where `recording` is open; in a dry run do nothing.

    Args:
        mma: which tensor-core instructions the machine code must hold, as in `Variant`.
        meta: the kernel's constexprs, num_warps and num_stages.
    """
    if not _recorded:
        kernel[grid](*args, **meta)
    elif (launches := _recorded[-1]) is not None:
        launches.append(Launch(kernel, grid, args, meta, mma))


@contextlib.contextmanager
def recording(arch: int, sm_count: int = 132) -> Iterator[list[Launch]]:
    """A list that collects launches in place of running them, as on a GPU of that architecture."""
    launches: list[Launch] = []
    _recorded.append(launches)
    try:
        with device.pretend(arch, sm_count):
            yield launches
    finally:
        _recorded.pop()


@contextlib.contextmanager
def dry_run(arch: int, sm_count: int) -> Iterator[None]:
    """As `recording`, but launches are dropped: what the launchers allocate is all that happens."""
    _recorded.append(None)
    try:
        with device.pretend(arch, sm_count):
            yield
    finally:
        _recorded.pop()


def _specialise(value: Any, path: tuple[int, ...], constants: dict, attrs: dict) -> Any:
    if isinstance(value, tuple):
        return tuple(
            _specialise(item, (*path, k), constants, attrs) for k, item in enumerate(value)
        )
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        kind = _POINTERS[value.dtype]
    elif isinstance(value, int):
        aligned = value % 16 == 0
        kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    else:
        return "fp32"
    if aligned:
        attrs[path] = [["tt.divisibility", 16]]
    return kind
