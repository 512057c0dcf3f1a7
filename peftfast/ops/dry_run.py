"""Running the ops for what they allocate alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peftfast.native import library
from peftfast.ops.scratch import own_scratch


@contextlib.contextmanager
def dry_run(arch: int = 0, sm_count: int = 0) -> Iterator[None]:
    """Inside, kernels and native code do nothing, whatever tensors they are given.

    Their launchers run, so that outputs and workspaces are allocated as they would be. Nothing
    else of the process may use the ops meanwhile.

    Args:
        arch, sm_count: compute capability (80 for 8.0) and multiprocessors of the GPU to choose
            kernels for; 0 for a CPU.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(library.dry_run())
        if arch:
            from peftfast_kernels import launch

            stack.enter_context(launch.dry_run(arch, sm_count))
        stack.enter_context(own_scratch())
        yield
