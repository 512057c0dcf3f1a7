"""What the demo found: the checks, the table, the JSON file."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from peftfast.demo.training import Run

LOSS_LIMIT = 1e-3
ACCURACY_LIMIT = 4.0


@dataclass(frozen=True)
class Pair:
    """The two runs of one dropout rate, and how many texts their accuracy is of."""

    dropout: float
    tests: int
    plain: Run
    patched: Run

    @property
    def differences(self) -> list[float]:
        """The absolute difference of the losses, step by step."""
        return [abs(a - b) for a, b in zip(self.plain.losses, self.patched.losses, strict=True)]

    @property
    def largest_difference(self) -> float:
        """The largest of the differences; not a number where any is not."""
        return max(self.differences, key=lambda apart: (math.isnan(apart), apart))

    @property
    def accuracy_error(self) -> float:
        """Standard error of the difference of two accuracies: binomial, of the pooled share."""
        share = (self.plain.accuracy + self.patched.accuracy) / 2
        return math.sqrt(2 * share * (1 - share) / self.tests)

    def failure(self) -> str | None:
        """Why the patched run is not a faithful one; None where it is.

        Without dropout each step's loss must agree within `LOSS_LIMIT`. With dropout the masks
        differ, and the accuracies must agree within `ACCURACY_LIMIT` standard errors.
        """
        if self.dropout:
            apart = abs(self.plain.accuracy - self.patched.accuracy)
            if apart <= ACCURACY_LIMIT * self.accuracy_error:
                return None
            return (
                f"dropout {self.dropout:g}: the accuracies differ by {apart:.1%}, over "
                f"{ACCURACY_LIMIT:g} standard errors of {self.accuracy_error:.1%}"
            )
        # Not `difference > limit`: a loss that is not a number must not pass.
        wrong = [step for step, apart in enumerate(self.differences, 1) if not apart <= LOSS_LIMIT]
        if not wrong:
            return None
        return (
            f"the loss curves differ by {self.differences[wrong[0] - 1]:.2g} at step {wrong[0]}, "
            f"over {LOSS_LIMIT:g} ({len(wrong)} of {len(self.differences)} steps do)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything about the pair, for JSON."""
        return {
            **dataclasses.asdict(self),
            "largest_loss_difference": self.largest_difference,
            "accuracy_standard_error": self.accuracy_error,
            "failure": self.failure(),
        }


def table(pairs: list[Pair]) -> Table:
    """One table of every pair, with the ratio of patched to plain."""
    drawn = Table(title="PEFT LoRA, and the same after peftfast.patch", title_justify="left")
    drawn.add_column("")
    for column in ("PEFT", "peftfast", "ratio"):
        drawn.add_column(column, justify="right")
    first = pairs[0]
    for name, attribute in (
        ("trainable parameters", "trainable"),
        ("all parameters", "parameters"),
    ):
        plain, patched = getattr(first.plain, attribute), getattr(first.patched, attribute)
        drawn.add_row(name, f"{plain:,}", f"{patched:,}", _ratio(plain, patched))
    shares = [run.trainable / run.parameters for run in (first.plain, first.patched)]
    drawn.add_row("trainable share", *(f"{share:.2%}" for share in shares), _ratio(*shares))
    for pair in pairs:
        drawn.add_section()
        heading = f"dropout {pair.dropout:g}, {len(pair.plain.losses)} steps"
        drawn.add_row(heading, style="bold")
        for row in _rows(pair):
            drawn.add_row(*row)
    return drawn


def _rows(pair: Pair) -> list[tuple[str, ...]]:
    plain, patched = pair.plain, pair.patched

    def row(name: str, a: float, b: float, form: str) -> tuple[str, ...]:
        return (f"  {name}", form.format(a), form.format(b), _ratio(a, b))

    rows = [
        row("loss at the first step", plain.losses[0], patched.losses[0], "{:.4f}"),
        row("loss at the last step", plain.losses[-1], patched.losses[-1], "{:.4f}"),
        row(f"accuracy on {pair.tests:,} texts", plain.accuracy, patched.accuracy, "{:.1%}"),
        row("tokens/s", plain.tokens_per_second, patched.tokens_per_second, "{:,.0f}"),
        row("peak MB of a step", plain.peak_bytes / 1e6, patched.peak_bytes / 1e6, "{:,.1f}"),
        row("saved MB for backward", plain.saved_bytes / 1e6, patched.saved_bytes / 1e6, "{:,.1f}"),
    ]
    if pair.dropout:
        error = (
            "  its standard error, of the difference",
            "",
            f"{pair.accuracy_error:.1%}",
            "",
        )
        return [*rows[:3], error, *rows[3:]]
    apart = ("  largest loss difference at a step", "", f"{pair.largest_difference:.1e}", "")
    return [*rows[:2], apart, *rows[2:]]


def _ratio(plain: float, patched: float) -> str:
    return f"{patched / plain:.3f}" if plain else "-"
