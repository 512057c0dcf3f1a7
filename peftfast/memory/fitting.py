"""`fit`: batch, checkpointing and memory policy for a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peftfast.memory.estimating import estimate
from peftfast.memory.report import MemoryReport, size
from peftfast.memory.search import largest
from peftfast.memory.sizes import parse_size

# Checkpointing and policy, in the order of what they cost in time.
WAYS = (
    (False, "recompute", "every layer keeps what its backward reads"),
    (False, "compress", "inputs that only adapters' gradients read are kept in 8 bits"),
    (True, "recompute", "every layer runs a second time in the backward"),
    (False, "offload", "what is kept goes over the bus to host memory, and back"),
)


class DoesNotFit(ValueError):
    """No way of training fits the budget; the message says how much the smallest one needs."""


@dataclass(frozen=True)
class Fit:
    """How to train within a budget.

    Attributes:
        batch: sequences a pass; accumulation: passes a step for the batch that was wanted.
        checkpointing, memory: whether layers are recomputed, and the policy for `patch`.
        report: the prediction.
        reasons: why, a line for each way that was looked at.
    """

    batch: int
    accumulation: int
    checkpointing: bool
    memory: str
    report: MemoryReport
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        how = "with" if self.checkpointing else "without"
        head = (
            f"batch {self.batch} x {self.accumulation} passes, {how} checkpointing,"
            f" memory={self.memory!r}: {size(self.report.needed_bytes)}"
        )
        return "\n".join([head, *(f"  {reason}" for reason in self.reasons)])


def fit(
    model_or_config: Any,
    budget: int | str,
    *,
    seq: int = 2048,
    batch: int = 8,
    method: Any = None,
    **options: Any,
) -> Fit:
    """Choose batch, checkpointing and memory policy for a budget.

    The ways are looked at in the order of what they cost in time. The first with which the wanted
    batch fits in one pass is taken; where it fits with none, the one with the largest batch that
    does, and the rest of the batch is accumulated.

    Args:
        model_or_config, method, options: as `estimate` takes them.
        budget: bytes of the device, as a number or as "40GiB".
        seq: tokens of a sequence.
        batch: sequences that a step is to see.

    Raises:
        DoesNotFit: not even one sequence does.
        TypeError, ValueError: as `estimate`; or `budget` is no size.
    """
    limit = parse_size(budget) if isinstance(budget, str) else budget
    if type(limit) is not int or limit < 1:
        raise ValueError(f"budget is {budget!r}; bytes or a size such as '40GiB' is needed")
    reasons: list[str] = []
    found: list[tuple[int, bool, str, MemoryReport]] = []
    smallest = math.inf
    options.setdefault("patched", True)  # a live model too: what is looked for is how to patch it
    profile = options.get("device_profile", "a100-40gb")
    on_cpu = getattr(profile, "kind", profile) == "cpu"
    for checkpointing, memory, cost in WAYS:
        if memory == "offload" and on_cpu:
            continue  # what is kept is in host memory already
        settings = {**options, "checkpointing": checkpointing, "memory": memory, "method": method}
        reports: dict[int, MemoryReport] = {}

        def needed(count: int, settings: Any = settings, reports: Any = reports) -> int:
            reports[count] = estimate(model_or_config, batch=count, seq=seq, **settings)
            return reports[count].needed_bytes

        known = {batch: needed(batch)} if batch > 0 else {}
        best = largest(needed, limit, step=1, limit=batch, known=known)
        name = f"{'checkpointing' if checkpointing else 'no checkpointing'}, memory={memory!r}"
        least = size(known[best or 1])
        verdict = f"batch {best} fits ({least})" if best else f"one sequence needs {least}"
        reasons.append(f"{name}: {verdict}; {cost}")
        if not best:
            smallest = min(smallest, known[1])
            continue
        found.append((best, checkpointing, memory, reports[best]))
        if best >= batch:
            break
    if not found:
        raise DoesNotFit(
            f"nothing fits {size(limit)}: one sequence of {seq} tokens needs {size(smallest)}"
            " at the least; take shorter sequences, a smaller model or fewer bits a weight"
        )
    best, checkpointing, memory, report = max(found, key=lambda one: one[0])
    return Fit(best, -(-batch // best), checkpointing, memory, report, tuple(reasons))
