"""What one operator or kernel, called any number of times, has moved and computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Tally:
    """Sums over the calls of one operator or kernel.

    Attributes:
        name: the operator's overload ("aten.mm.default") or the kernel's function name.
        kind: "aten" or "triton".
        calls: calls that moved bytes or did FLOPs.
        read, written: bytes, workspaces apart.
        workspace_read, workspace_written: bytes of the split reductions' workspaces.
        atomics: atomic operations, one a lane that was not masked off.
        flops: floating-point operations of matrix products, padding of the tiles included.
        programs: programs launched, over all calls; 0 for an operator.
    """

    name: str
    kind: str
    calls: int = 0
    read: int = 0
    written: int = 0
    workspace_read: int = 0
    workspace_written: int = 0
    atomics: int = 0
    flops: int = 0
    programs: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written, workspaces apart."""
        return self.read + self.written

    @property
    def workspace(self) -> int:
        """Bytes read and written in workspaces."""
        return self.workspace_read + self.workspace_written

    def add(self, other: Tally) -> None:
        """Adds the counts of `other` to this one's; name and kind stay."""
        for field in (
            "calls",
            "read",
            "written",
            "workspace_read",
            "workspace_written",
            "atomics",
            "flops",
            "programs",
        ):
            setattr(self, field, getattr(self, field) + getattr(other, field))

    def as_dict(self) -> dict[str, int | str]:
        """The fields and the two sums, for JSON."""
        return {**asdict(self), "moved": self.moved, "workspace": self.workspace}
