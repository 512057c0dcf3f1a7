"""What takes a worker process down: a variant that aborts the compiler, and a task that ends it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator

from handmade_kernels import matmul_variant

from peftfast_kernels.variant import Variant


class Fault:
    """Stands for a kernel: lets itself be listed, and aborts when triton asks for its name."""

    @property
    def __name__(self) -> str:
        print("assertion in native code", file=sys.stderr, flush=True)
        os.abort()


def aot_variants(arch: int) -> Iterator[Variant]:
    yield Variant(kernel=Fault(), name="aborts", config="", dtype="fp32", signature={})
    yield matmul_variant("good", 64, 32, stages=2, ieee=False, mma="native")


def answer(task: str) -> str:
    """A task of the worker pool: each does what its name says."""
    print(f"output of {task}")
    if task == "abort":
        os.abort()
    if task == "raise":
        raise KeyError("the reason")
    parent = multiprocessing.parent_process()
    return f"{task} in a child: {parent is not None}"
