"""What a step takes in memory, predicted or measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peftfast.memory.profiles import GIB, DeviceProfile
from peftfast.memory.trace import CLASSES, Trace

_LARGE = 10 << 20  # from here on torch's allocator takes a segment of its own for a block
_SEGMENT = 2 << 20


@dataclass(frozen=True)
class Point:
    """A moment of the timeline: bytes of all classes together, and of each."""

    position: float
    phase: str
    at: str
    total: int
    by_class: dict[str, int]


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a step at its peak, and over its time.

    Attributes:
        peak_bytes: the most bytes of tensors that are alive at once, each with the rounding of
            the device's allocator: on a GPU what `torch.cuda.max_memory_allocated` gives.
        by_class: the same by class, at the peak.
        peak_at: the phase, module and operator of the peak.
        saved_by_op: the activations that the forward saves, by module and operator, alike layers
            together. Of a long model that is not run whole: those of the layers that were.
        timeline: moments in order, at most some hundreds.
        outside_bytes: what the device needs besides: the context of the driver and its libraries,
            and the segments that torch's allocator takes in whole. Assumed, not measured.
        capacity: bytes of the device; None where it has no limit to hold this to.
        what: what the report is of, in words; settings: the same for programs.
    """

    peak_bytes: int
    by_class: dict[str, int]
    peak_at: str
    saved_by_op: dict[str, int] = field(repr=False)
    timeline: list[Point] = field(repr=False)
    outside_bytes: int = 0
    capacity: int | None = None
    what: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def needed_bytes(self) -> int:
        """Bytes that the device must have free."""
        return self.peak_bytes + self.outside_bytes

    def fits(self, budget: int | None = None) -> bool:
        """Whether that is within `budget` bytes, by default within the device's capacity."""
        limit = self.capacity if budget is None else budget
        return limit is None or self.needed_bytes <= limit

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "what": self.what,
            "settings": self.settings,
            "peak_bytes": self.peak_bytes,
            "needed_bytes": self.needed_bytes,
            "outside_bytes": self.outside_bytes,
            "capacity": self.capacity,
            "fits": self.fits(),
            "peak_at": self.peak_at,
            "by_class": self.by_class,
            "saved_by_op": self.saved_by_op,
            "timeline": [
                {"position": p.position, "phase": p.phase, "at": p.at, "bytes": p.total}
                for p in self.timeline
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.what}: " if self.what else ""]
        lines[0] += f"{size(self.peak_bytes)} at the peak ({self.peak_at})"
        lines += [f"  {size(n):>12}  {name}" for name, n in self.by_class.items() if n]
        if self.outside_bytes:
            lines.append(f"  {size(self.outside_bytes):>12}  context and segments (assumed)")
        if self.capacity is not None:
            verdict = "fits" if self.fits() else "does not fit"
            lines.append(f"  {verdict} into {size(self.capacity)}")
        return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def report_of(
    trace: Trace, profile: DeviceProfile | None, what: str, settings: dict[str, Any], largest: int
) -> MemoryReport:
    """The report of a trace; `largest` is the size of the largest block that comes and goes."""
    peak = trace.peak()
    totals = trace.totals
    outside = 0 if profile is None else profile.context
    if profile is not None and profile.kind == "cuda":
        # The last segment that can't be filled: as large as the largest block, at the worst half
        # of it lost, and never less than a small segment.
        outside += max(min(largest // 2, 256 << 20), _SEGMENT)
    return MemoryReport(
        int(totals[peak]),
        {name: int(n) for name, n in zip(CLASSES, trace.live[peak], strict=True)},
        str(trace.moments[peak]),
        saved_by_op(trace),
        timeline(trace),
        outside,
        None if profile is None else profile.capacity,
        what,
        settings,
    )


def saved_by_op(trace: Trace) -> dict[str, int]:
    """Saved activations by origin, the largest first."""
    found: dict[str, int] = {}
    for block in trace.blocks:
        if block.label == "saved activations":
            found[block.origin] = found.get(block.origin, 0) + block.size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def timeline(trace: Trace, points: int = 400) -> list[Point]:
    """Moments of the trace, thinned out, the highest of those that lie together kept."""
    totals = trace.totals
    count = len(totals)
    step = max(1, -(-count // points))
    chosen = [start + int(totals[start : start + step].argmax()) for start in range(0, count, step)]
    return [
        Point(
            float(trace.positions[i]),
            trace.moments[i].phase,
            str(trace.moments[i]),
            int(totals[i]),
            {name: int(n) for name, n in zip(CLASSES, trace.live[i], strict=True)},
        )
        for i in chosen
    ]


def compare(predicted: MemoryReport, measured: MemoryReport) -> str:
    """The two side by side, by class and in all, with the prediction's error."""
    lines = [f"{'':26}{'predicted':>13}{'measured':>13}{'error':>9}"]
    rows = [("peak", predicted.peak_bytes, measured.peak_bytes)]
    names = [n for n in CLASSES if predicted.by_class.get(n) or measured.by_class.get(n)]
    rows += [(n, predicted.by_class.get(n, 0), measured.by_class.get(n, 0)) for n in names]
    for name, ours, theirs in rows:
        error = f"{(ours - theirs) / theirs:+.1%}" if theirs else "-"
        lines.append(f"{name:26}{size(ours):>13}{size(theirs):>13}{error:>9}")
    lines += [f"peak predicted at {predicted.peak_at}", f"peak measured at {measured.peak_at}"]
    return "\n".join(lines)


def relative_error(predicted: MemoryReport, measured: MemoryReport) -> float:
    """(predicted - measured) / measured, of the peaks."""
    return (predicted.peak_bytes - measured.peak_bytes) / measured.peak_bytes
