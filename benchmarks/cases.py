"""One forward and backward of one variant, and its count as a row in units of u."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.counting import Tally, TrafficCounter
from benchmarks.registry import Row


@dataclass(frozen=True)
class Case:
    """One variant of a step.

    Attributes:
        variant: its name.
        forward: from x to one output or several.
        x: its input, with requires_grad.
        parameters: the adapters' parameters, whose gradients are asked for beside x's.
        dys: the gradient of each output.
        settings: what tells this row from others of the variant (adapters' dtype, dropout).
    """

    variant: str
    forward: Callable[[Tensor], Tensor | Sequence[Tensor]]
    x: Tensor
    parameters: Sequence[Tensor]
    dys: Sequence[Tensor]
    settings: Row = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The variant and its settings, in a line."""
        return ", ".join(
            [self.variant, *(f"{key} {value}" for key, value in self.settings.items())]
        )

    def step(self) -> tuple[Tensor, ...]:
        """Forward, then the gradients of x and of the parameters."""
        outputs = self.forward(self.x)
        return torch.autograd.grad(outputs, [self.x, *self.parameters], self.dys)


def count_case(case: Case, unit: int, frozen: Tally | None) -> tuple[Row, Tally]:
    """Counts one step of `case`.

    Args:
        unit: bytes of u.
        frozen: the total of the frozen linears alone, which "extra" is beyond; None for their own
            row.

    Returns:
        The row, in units of u and with the breakdown by operator and kernel, and the total.
    """
    with TrafficCounter() as traffic:
        case.step()
    return counted_row(case.variant, case.settings, traffic, unit, frozen), traffic.total


def counted_row(
    variant: str, settings: Row, traffic: TrafficCounter, unit: int, frozen: Tally | None = None
) -> Row:
    """What `traffic` has counted as a row; the other arguments are as in `count_case`."""
    total = traffic.total
    return {
        "variant": variant,
        **settings,
        "total_u": total.moved / unit,
        "extra_u": None if frozen is None else (total.moved - frozen.moved) / unit,
        "workspace_u": total.workspace / unit,
        "atomics": total.atomics,
        "gflops": total.flops / 1e9,
        "breakdown": [
            {
                **tally.as_dict(),
                "moved_u": tally.moved / unit,
                "workspace_u": tally.workspace / unit,
            }
            for tally in traffic.tallies.values()
        ],
    }


def short(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")
