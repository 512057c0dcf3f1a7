"""Compile every kernel for every architecture, without a GPU, and judge it.

    python -m peftfast_kernels.aot [--arch 80 90 ...] [--kernel NAME ...] [--json FILE] [--jobs N]

Each module of `registry.KERNEL_MODULES` says with `aot_variants(arch)` which variants of Triton
kernels it pins for an architecture; `cuda_sources.KERNELS` are the kernels of csrc/cuda, compiled
where their sources and nvcc are there. A kernel is red when its machine code spills to local
memory, when a block takes more shared or tensor memory than the architecture has, when the
tensor-core instructions or the wide accesses that it means are missing, and when it does not
compile. Exit status: 0 when no row is red, 1 when one is, 2 on a wrong argument or an environment
that can't compile.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from peftfast_kernels import cuda_sources
from peftfast_kernels.cubin import CubinFacts, read_cubin, read_kernels
from peftfast_kernels.cuda_sources import CudaCompileError, CudaKernel, Nvcc
from peftfast_kernels.tiles import ARCHES, SHARED_LIMIT
from peftfast_kernels.variant import Variant
from peftfast_kernels.workers import Outcome, run_all

# Columns of tensor memory of an SM of sm_100, of which one block can take all.
TENSOR_MEMORY_COLUMNS = 512

# What triton raises on a kernel that it can't compile: its own errors, failed passes (RuntimeError)
# and complaints about types, shapes and options. Anything else ends the worker, which is reported
# with its traceback.
COMPILE_ERRORS = (TritonError, RuntimeError, ValueError, TypeError, AssertionError)


@dataclass(frozen=True)
class Task:
    """One variant, named so that another process finds it again: JITFunctions do not pickle."""

    module: str
    arch: int
    index: int
    kernel: str
    config: str
    dtype: str


@dataclass(frozen=True)
class CudaTask:
    """Kernels of the CUDA source, which are compiled together, for one architecture."""

    nvcc: Nvcc
    arch: int
    kernels: tuple[CudaKernel, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table; the figures are None where there is no machine code.

    `registers` of a thread; `spill_bytes` and `stack_bytes` of local memory of a thread;
    `shared_bytes` of a block; `mma`: tensor-core instructions in the machine code, `mma_kinds` the
    same by opcode; `verdict`: "ok" or "red"; `reason`: empty when ok.
    """

    kernel: str
    arch: int
    config: str
    dtype: str
    registers: int | None
    spill_bytes: int | None
    stack_bytes: int | None
    shared_bytes: int | None
    mma: int | None
    mma_kinds: dict[str, int]
    verdict: str
    reason: str


def tasks_of(modules: Sequence[str], arches: Sequence[int]) -> list[Task]:
    """All variants that the modules pin for these architectures, in their order.

    Raises ImportError on a module that is missing or has no `aot_variants`.
    """
    return [
        Task(module, arch, index, variant.name, variant.config, variant.dtype)
        for module in modules
        for arch in arches
        for index, variant in enumerate(_variants(module, arch))
    ]


def cuda_tasks(
    kernels: Sequence[CudaKernel], arches: Sequence[int]
) -> tuple[list[CudaTask], list[str]]:
    """What can be compiled of these kernels, and remarks on what can't be, and why."""
    if not kernels:
        return [], []
    nvcc = cuda_sources.find()
    if isinstance(nvcc, str):
        return [], [f"CUDA kernels are not compiled: {nvcc}"]
    tasks = [CudaTask(nvcc, arch, tuple(kernels)) for arch in arches if arch in nvcc.arches]
    remarks = [
        f"CUDA kernels are not compiled for sm_{arch}: nvcc {nvcc.version} does not know it"
        for arch in arches
        if arch not in nvcc.arches
    ]
    return tasks, remarks


@functools.cache
def _variants(module: str, arch: int) -> tuple[Variant, ...]:
    imported = importlib.import_module(module)
    if not hasattr(imported, "aot_variants"):
        raise ImportError(f"{module} has no aot_variants(arch)")
    return tuple(imported.aot_variants(arch))


def compile_task(task: Task | CudaTask) -> list[Row]:
    """Compile what the task names, read the machine code and judge it."""
    return compile_cuda(task) if isinstance(task, CudaTask) else [compile_variant(task)]


def compile_cuda(task: CudaTask) -> list[Row]:
    """A row for each of the task's kernels."""
    try:
        found = read_kernels(cuda_sources.compile_cubin(task.nvcc, task.arch), task.arch)
    except (CudaCompileError, ValueError) as error:
        return failed_rows(task, f"does not compile: {error}")
    rows = []
    for kernel in task.kernels:
        facts = found.get(kernel.symbol)
        if facts is None:
            rows.append(_failed(kernel, task.arch, f"{kernel.symbol} is not in the machine code"))
            continue
        reasons = judge(facts, facts.static_shared_bytes, 0, kernel.mma, task.arch)
        reasons += [f"no {access}" for access in kernel.accesses if access not in facts.wide]
        rows.append(
            _row(kernel.name, task.arch, kernel.config, kernel.dtype, facts,
                 facts.static_shared_bytes, reasons)
        )  # fmt: skip
    known = {kernel.symbol for kernel in (*cuda_sources.KERNELS, *task.kernels)}
    for symbol in sorted(found.keys() - known):
        reason = "cuda_sources.KERNELS does not name it"
        rows.append(_failed(CudaKernel(symbol, symbol, "", ""), task.arch, reason))
    return rows


def compile_variant(task: Task) -> Row:
    """The row of a Triton kernel."""
    variant = _variants(task.module, task.arch)[task.index]
    source = ASTSource(
        variant.kernel, dict(variant.signature), dict(variant.constexprs), dict(variant.attrs)
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        compiled = triton.compile(source, GPUTarget("cuda", task.arch, 32), options)
        facts = read_cubin(compiled.asm["cubin"], task.arch)
    except COMPILE_ERRORS as error:
        return failed_row(task, f"does not compile: {type(error).__name__}: {error}")
    shared_bytes = compiled.metadata.shared + facts.static_shared_bytes
    tensor_columns = getattr(compiled.metadata, "tmem_size", None) or 0
    reasons = judge(facts, shared_bytes, tensor_columns, variant.mma, task.arch)
    return _row(task.kernel, task.arch, task.config, task.dtype, facts, shared_bytes, reasons)


def _row(
    kernel: str,
    arch: int,
    config: str,
    dtype: str,
    facts: CubinFacts,
    shared_bytes: int,
    reasons: list[str],
) -> Row:
    return Row(
        kernel=kernel,
        arch=arch,
        config=config,
        dtype=dtype,
        registers=facts.registers,
        spill_bytes=facts.spill_bytes,
        stack_bytes=facts.stack_bytes,
        shared_bytes=shared_bytes,
        mma=sum(facts.mma.values()),
        mma_kinds=facts.mma,
        verdict="red" if reasons else "ok",
        reason="; ".join(reasons),
    )


def judge(
    facts: CubinFacts, shared_bytes: int, tensor_columns: int, mma: str, arch: int
) -> list[str]:
    """Everything that is wrong with the machine code; an empty list when nothing is."""
    reasons = []
    if facts.spill_bytes:
        reasons.append(f"spills {facts.spill_bytes} bytes to local memory")
    elif facts.stack_bytes:
        reasons.append(f"keeps {facts.stack_bytes} bytes on the stack")
    shared_limit = SHARED_LIMIT[arch] * 1024
    if shared_bytes > shared_limit:
        reasons.append(f"takes {shared_bytes} bytes of shared memory, sm_{arch} has {shared_limit}")
    if tensor_columns > TENSOR_MEMORY_COLUMNS:
        reasons.append(
            f"takes {tensor_columns} columns of tensor memory, sm_{arch} has "
            f"{TENSOR_MEMORY_COLUMNS}"
        )
    if mma != "none" and not facts.mma:
        reasons.append("no tensor-core instruction")
    elif mma == "native" and not facts.native_mma(arch):
        kinds = ", ".join(facts.mma)
        reasons.append(f"no tensor-core instruction of sm_{arch}'s own, only {kinds}")
    return reasons


def failed_rows(task: Task | CudaTask, reason: str) -> list[Row]:
    """The red rows of a task that gave no machine code."""
    if isinstance(task, CudaTask):
        return [_failed(kernel, task.arch, reason) for kernel in task.kernels]
    return [failed_row(task, reason)]


def failed_row(task: Task, reason: str) -> Row:
    """The red row of a variant that has no machine code."""
    return Row(
        task.kernel, task.arch, task.config, task.dtype, None, None, None, None, None, {}, "red",
        reason,
    )  # fmt: skip


def _failed(kernel: CudaKernel, arch: int, reason: str) -> Row:
    return Row(
        kernel.name, arch, kernel.config, kernel.dtype, None, None, None, None, None, {}, "red",
        reason,
    )  # fmt: skip


def compile_all(
    tasks: Sequence[Task | CudaTask], jobs: int, progress: TextIO | None = None
) -> list[Row]:
    """Rows of all tasks, in their order, compiled in `jobs` processes.

    A compiler that takes its process down with it (an assertion or a fault in native code) makes
    the rows of that one task red.
    """
    rows: dict[int, list[Row]] = {}
    for index, outcome in run_all(compile_task, tasks, max(1, min(jobs, len(tasks)))):
        rows[index] = _rows_of(tasks[index], outcome)
        if progress is not None:
            last = rows[index][-1]
            progress.write(f"\r{len(rows)}/{len(tasks)} {last.kernel} sm_{last.arch}\x1b[K")
            progress.flush()
    if progress is not None:
        progress.write("\r\x1b[K")
    return [row for index in range(len(tasks)) for row in rows[index]]


def _rows_of(task: Task | CudaTask, outcome: Outcome) -> list[Row]:
    if outcome.died is not None:
        last_lines = "\n".join(outcome.output.splitlines()[-20:])
        return failed_rows(
            task, f"does not compile: the compiler ended with status {outcome.died}\n{last_lines}"
        )
    rows: list[Row] = outcome.result
    # What failed inside a pass is written to stderr; the exception says only that one did.
    errors = [line for line in outcome.output.splitlines() if "error:" in line][:5]
    return [
        row if row.registers is not None else replace(row, reason="\n".join([row.reason, *errors]))
        for row in rows
    ]


def print_table(rows: Iterable[Row], file: TextIO) -> None:
    """The table, then the red rows with their reasons in full; red in colour on a terminal."""
    rows = list(rows)
    red, plain = ("\x1b[31m", "\x1b[0m") if file.isatty() else ("", "")
    head = ("kernel", "arch", "config", "dtype", "registers", "spills", "shared", "mma", "verdict")
    table = [head, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, cells in enumerate(table):
        line = "  ".join(
            cell.rjust(width) if title in ("registers", "spills", "shared") else cell.ljust(width)
            for title, cell, width in zip(head, cells, widths, strict=True)
        ).rstrip()
        is_red = number > 0 and rows[number - 1].verdict == "red"
        print(f"{red}{line}{plain}" if is_red else line, file=file)
    for row in rows:
        if row.verdict == "red":
            name = f"{row.kernel} sm_{row.arch} {row.config} {row.dtype}"
            print(f"\n{red}{name}{plain}: {row.reason}", file=file)


def _cells(row: Row) -> tuple[str, ...]:
    figures = (row.registers, row.spill_bytes, row.shared_bytes)
    kinds = " + ".join(f"{count} {kind}" for kind, count in sorted(row.mma_kinds.items()))
    return (
        row.kernel,
        f"sm_{row.arch}",
        row.config,
        row.dtype,
        *("-" if figure is None else str(figure) for figure in figures),
        kinds or ("-" if row.mma is None else "0"),
        row.verdict,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m peftfast_kernels.aot",
        description="Compile every kernel for every architecture, without a GPU.",
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHES, default=list(ARCHES),
        help="architectures, as compute capability times ten (default: all)",
    )  # fmt: skip
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only these kernels")
    parser.add_argument("--json", metavar="FILE", help="write the rows there; - for stdout")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a CPU)"
    )
    parser.add_argument(
        "--modules", nargs="+", metavar="MODULE",
        help="only the Triton kernels of these modules with aot_variants(arch) (default: those of"
        " registry.KERNEL_MODULES, and the CUDA kernels)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}, at least 1")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    try:
        variants = tasks_of(arguments.modules or _registered(), arguments.arch)
    except ImportError as error:
        parser.error(str(error))
    kernels = () if arguments.modules else cuda_sources.KERNELS
    if arguments.kernel:
        names = sorted({task.kernel for task in variants} | {kernel.name for kernel in kernels})
        unknown = sorted(set(arguments.kernel).difference(names))
        if unknown:
            parser.error(f"unknown kernel {', '.join(unknown)}; known: {', '.join(names)}")
        variants = [task for task in variants if task.kernel in arguments.kernel]
        kernels = tuple(kernel for kernel in kernels if kernel.name in arguments.kernel)
    cuda, remarks = cuda_tasks(kernels, arguments.arch)
    tasks: list[Task | CudaTask] = [*variants, *cuda]
    if not tasks and not remarks:
        parser.error("the modules pin no variant for these architectures")

    with ExitStack() as stack:
        out: TextIO = sys.stderr if arguments.json == "-" else sys.stdout
        json_file: Any = None
        if arguments.json == "-":
            json_file = sys.stdout
        elif arguments.json:
            try:
                json_file = stack.enter_context(Path(arguments.json).open("w"))
            except OSError as error:
                parser.error(f"can't write {arguments.json}: {error.strerror}")
        rows = compile_all(tasks, arguments.jobs, sys.stderr if sys.stderr.isatty() else None)
        if json_file is not None:
            json.dump([asdict(row) for row in rows], json_file, indent=1)
            json_file.write("\n")
    print_table(rows, out)
    reds = sum(row.verdict == "red" for row in rows)
    compilers = [f"triton {triton.__version__}"]
    compilers += sorted({f"nvcc {task.nvcc.version}" for task in cuda})
    print(file=out)
    for remark in remarks:
        print(remark, file=out)
    print(f"variants: {len(rows)}, red: {reds} ({', '.join(compilers)})", file=out)
    return 1 if reds else 0


def _registered() -> list[str]:
    from peftfast_kernels.registry import KERNEL_MODULES

    return list(KERNEL_MODULES)


if __name__ == "__main__":
    sys.exit(main())
