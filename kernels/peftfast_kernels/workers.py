"""Worker processes that may die at any task, as compilers do, without taking the others along."""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Outcome:
    """What came of one task: its result, and all that it wrote to stdout and stderr.

    `died` is None; where the process ended instead, it is the exit status (the negative of a
    signal's number), and there is no result.
    """

    result: Any
    output: str
    died: int | None = None


def run_all(
    function: Callable[[Any], Any], tasks: Sequence[Any], jobs: int
) -> Iterator[tuple[int, Outcome]]:
    """Yield (index of the task, its outcome) as tasks end, from up to `jobs` spawned processes.

    `function`, the tasks and the results must pickle. An exception in `function` ends its process,
    like a fault in native code: the traceback is in the outcome's output, and the tasks after it
    go to a new process.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as threads:
        workers = [_Worker(function, Path(folder, f"{n}.log")) for n in range(jobs)]
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def run(task: Any) -> Outcome:
            worker = idle.get()
            outcome = worker.call(task)
            idle.put(worker)
            return outcome

        try:
            futures = {threads.submit(run, task): index for index, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.stop()


class _Worker:
    """A process that is started at its first task and again at the first one after its end."""

    def __init__(self, function: Callable[[Any], Any], log: Path) -> None:
        self._function = function
        self._log = log
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def call(self, task: Any) -> Outcome:
        process, connection = self._started()
        try:
            connection.send(task)
            result, died = connection.recv(), None
        except (EOFError, ConnectionError):
            process.join()
            result, died = None, process.exitcode
            self._process = None
        output = self._log.read_text(errors="replace") if self._log.exists() else ""
        return Outcome(result, output, died)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _started(self) -> tuple[BaseProcess, Connection]:
        if self._process is None or self._connection is None:
            self._connection, theirs = _SPAWN.Pipe()
            self._process = _SPAWN.Process(
                target=_serve, args=(self._function, theirs, self._log), daemon=True
            )
            self._process.start()
            theirs.close()
        return self._process, self._connection


def _serve(function: Callable[[Any], Any], connection: Connection, log: Path) -> None:
    """Answer tasks until the other end is closed; file descriptors 1 and 2 go to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        os.ftruncate(file, 0)
        result = function(task)
        sys.stdout.flush()
        connection.send(result)
