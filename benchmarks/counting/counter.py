"""The counter: a context in which each operator and each interpreted launch is counted."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.counting.launches import Launch, watch_launches
from benchmarks.counting.operators import distinct_bytes, operands, tensors_in
from benchmarks.counting.tally import Tally

_PYTORCH = frozenset({"aten", "prim", "prims"})


class TrafficCounter:
    """Counts, while it is active, the bytes that are moved and the FLOPs of matrix products.

    A PyTorch operator reads each distinct input once and writes each output once, by the bytes of
    memory behind them. A Triton kernel, in the interpreter, reads and writes the distinct 32-byte
    sectors that a launch touches; its operands and the interpreter's own copies are not counted
    on top, nor are those of a `torch.library` operator, of which only what it does inside counts.
    Memory from `peftfast_kernels.workspace` has columns of its own. No cache is assumed between
    two operators or launches, and an unlimited one inside each.

    Works on CPU tensors. Triton has to be in interpreter mode (TRITON_INTERPRET=1 before its
    import) if it is used.

    Attributes:
        tallies: one Tally a name, in the order of the first call.
    """

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self._workspaces: list[torch.Tensor] = []
        self._in_launch = False
        self._stack = ExitStack()

    def __enter__(self) -> TrafficCounter:
        with ExitStack() as stack:
            stack.enter_context(watch_launches(self._begin_launch, self._end_launch))
            self._workspaces = stack.enter_context(_observed_workspaces())
            stack.enter_context(_OperatorMode(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    @property
    def total(self) -> Tally:
        """The sum over all operators and kernels."""
        total = Tally("total", "sum")
        for tally in self.tallies.values():
            total.add(tally)
        return total

    def _record(self, tally: Tally) -> None:
        self.tallies.setdefault(tally.name, Tally(tally.name, tally.kind)).add(tally)

    def _begin_launch(self) -> None:
        self._in_launch = True

    def _end_launch(self, launch: Launch) -> None:
        self._in_launch = False
        ranges = [
            (w.untyped_storage().data_ptr(), w.untyped_storage().nbytes()) for w in self._workspaces
        ]
        workspace_read = launch.loaded.nbytes_within(ranges)
        workspace_written = launch.stored.nbytes_within(ranges)
        self._record(
            Tally(
                launch.kernel,
                "triton",
                calls=1,
                read=launch.loaded.nbytes() - workspace_read,
                written=launch.stored.nbytes() - workspace_written,
                workspace_read=workspace_read,
                workspace_written=workspace_written,
                atomics=launch.atomics,
                flops=launch.flops,
                programs=launch.programs,
            )
        )

    def _count_operator(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        for tensor in tensors_in([*args, *kwargs.values()]):
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"traffic is counted on the CPU; {func} got a {tensor.device} tensor"
                )
        read, written = operands(func, args, kwargs, result)
        tally = Tally(str(func), "aten", calls=1)
        workspaces = {w.untyped_storage()._cdata for w in self._workspaces}
        for tensor in read:
            if tensor.untyped_storage()._cdata in workspaces:
                tally.workspace_read += distinct_bytes(tensor)
            else:
                tally.read += distinct_bytes(tensor)
        for tensor in written:
            if tensor.untyped_storage()._cdata in workspaces:
                tally.workspace_written += distinct_bytes(tensor)
            else:
                tally.written += distinct_bytes(tensor)
        if func._overloadpacket in flop_registry:
            formula = flop_registry[func._overloadpacket]
            tally.flops = int(formula(*args, **kwargs, out_val=result))
        if tally.moved or tally.workspace or tally.flops:
            self._record(tally)


class _OperatorMode(TorchDispatchMode):
    def __init__(self, counter: TrafficCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._counter._in_launch:
            return func(*args, **kwargs)
        if func.namespace not in _PYTORCH:
            with self:
                return func.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs
                )
        result = func(*args, **kwargs)
        self._counter._count_operator(func, args, kwargs, result)
        return result


def _observed_workspaces() -> Any:
    from peftfast_kernels import workspace

    return workspace.observe()
