"""Figures that results are held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """One figure and its limit.

    Attributes:
        what: what is measured, with its unit.
        value: the figure.
        limit: the largest value that meets the target, or the smallest where `at_least` is set.
    """

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is within its limit; a NaN never is."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        relation = ">=" if self.at_least else "<="
        verdict = "pass" if self.met else "MISSED"
        return f"{verdict}: {self.what}: {self.value:.4g} (target {relation} {self.limit:g})"

    def as_dict(self) -> dict[str, Any]:
        """The fields and the verdict, for JSON."""
        return {**asdict(self), "met": self.met}
