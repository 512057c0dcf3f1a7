"""`measure`: the memory of a real step, by class and over time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from peftfast.memory.profiles import PROFILES
from peftfast.memory.report import MemoryReport, report_of
from peftfast.memory.simulate import label_of, register_model, vocabulary_of
from peftfast.memory.trace import Trace, trace_of
from peftfast.memory.tracker import Tracker
from peftfast.ops.scratch import scratch_buffer


def measure(
    step_fn: Callable[[], object],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    device: torch.device | str | None = None,
) -> MemoryReport:
    """Run a step and report what it held, moment by moment.

    Args:
        step_fn: runs the step: forward, backward and the optimizer's. Run it once or twice before,
            so that the optimizer's state is there and buffers are warm.
        model: what is trained. Its weights then count, and are told apart from what the step makes;
            without it only the latter is seen.
        optimizer: its state then counts too.
        device: where to measure; by default the model's, else the current GPU or the CPU.

    Returns:
        On a GPU the peak is the allocator's own, kernels' workspaces included; what no operator
        returned counts as scratch. On a CPU storages are tracked: what operators allocate and free
        inside is not seen.

    Raises:
        ValueError: `device` is neither a CPU nor a CUDA device.
    """
    place = _device(device, model)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA device, not {place}")
    tracker = _StepTracker(place.type)
    if model is not None:
        register_model(tracker, model)
        tracker.paths = {id(module): name for name, module in model.named_modules()}
    if optimizer is not None:
        for value in _state(optimizer):
            tracker.register(value, "optimizer state")
    buffer = scratch_buffer()
    if buffer is not None and place.type == "cpu":
        tracker.register(buffer, "scratch and workspaces")
    peak = None
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        torch.cuda.reset_peak_memory_stats(place)
    with _watched_gradients(tracker, model), _watched_steps(tracker), tracker:
        step_fn()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        peak = torch.cuda.max_memory_allocated(place)
    if optimizer is not None:
        for value in _state(optimizer):
            block = tracker.block_of(value)
            if block is not None:
                block.label = "optimizer state"
    trace = _trace(tracker, model, 512 if place.type == "cuda" else 1)
    profile = PROFILES["cpu"] if place.type == "cpu" else None
    report = report_of(trace, profile, f"measured on {place}", {"device": str(place)}, 0)
    return report if peak is None else _with_allocator(report, peak)


class _StepTracker(Tracker):
    """Tells by itself which phase a step is in."""

    stepping = False

    def __init__(self, device: str) -> None:
        super().__init__(device, ignore_new_inputs=True)

    @property
    def phase(self) -> str:
        if self.stepping:
            return "optimizer step"
        return "forward" if torch._C._current_graph_task_id() == -1 else "backward"

    @phase.setter
    def phase(self, value: str) -> None:
        """Nothing to set: the step itself tells."""


def _trace(tracker: Tracker, model: nn.Module | None, rounding: int) -> Trace:
    vocabulary = -1 if model is None else vocabulary_of(model)
    phases = [moment.phase for moment in tracker.moments]
    last = max((i for i, phase in enumerate(phases) if phase == "forward"), default=-1)
    first = next((i for i, phase in enumerate(phases) if phase == "backward"), last + 1)
    for block in tracker.blocks:
        if block.label in ("forward", "backward", "optimizer step"):
            block.label = label_of(block, first, vocabulary)
    return trace_of(tracker.moments, tracker.blocks, rounding)


def _with_allocator(report: MemoryReport, peak: int) -> MemoryReport:
    """The allocator's peak; what it holds beyond the tracked storages is the kernels' own."""
    by_class = dict(report.by_class)
    by_class["scratch and workspaces"] += peak - report.peak_bytes
    return MemoryReport(
        peak,
        by_class,
        report.peak_at,
        report.saved_by_op,
        report.timeline,
        what=report.what,
        settings=report.settings,
    )


def _device(device: torch.device | str | None, model: nn.Module | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    parameter = None if model is None else next(model.parameters(), None)
    if parameter is not None:
        return parameter.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    values = [v for state in optimizer.state.values() for v in state.values()]
    return [v for v in values if isinstance(v, Tensor)]


@contextlib.contextmanager
def _watched_gradients(tracker: Tracker, model: nn.Module | None) -> Iterator[None]:
    """Every gradient's storage is labelled as such when it is there."""

    def mark(parameter: Tensor) -> None:
        block = None if parameter.grad is None else tracker.block_of(parameter.grad)
        if block is not None:
            block.label = "gradients"

    trained = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if parameter.grad is not None:
            tracker.register(parameter.grad, "gradients")
    handles: list[Any] = [p.register_post_accumulate_grad_hook(mark) for p in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _watched_steps(tracker: _StepTracker) -> Iterator[None]:
    def begin(*_: Any) -> None:
        tracker.stepping = True

    def end(*_: Any) -> None:
        tracker.stepping = False

    handles = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
