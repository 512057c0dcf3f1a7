"""The largest size that fits, found by predictions."""

from __future__ import annotations

import math
from collections.abc import Callable


def largest(
    needed: Callable[[int], int],
    budget: int,
    *,
    step: int,
    limit: int,
    known: dict[int, int] | None = None,
) -> int:
    """The largest multiple of `step` up to `limit` for which `needed` is within the budget; 0 where
    none is.

    What is needed grows with the size, nearly in a straight line: the next guess is where the line
    through the last two meets the budget, and bisection where that stops to help.

    Args:
        needed: bytes for a size.
        known: sizes and what they need, as far as that is known; added to.
    """
    if limit < step:
        return 0
    known = {} if known is None else known

    def at(count: int) -> int:
        size = count * step
        if size not in known:
            known[size] = needed(size)
        return known[size]

    if at(1) > budget:
        return 0
    fits, fails = 1, limit // step + 1
    for size, bytes_ in known.items():
        if size % step == 0 and size // step <= limit // step:
            fits = max(fits, size // step) if bytes_ <= budget else fits
            fails = min(fails, size // step) if bytes_ > budget else fails
    lower = max((n // step for n in known if n % step == 0 and n // step < fits), default=None)
    tries = 0
    while fails - fits > 1:
        guess = _guess(at, lower, fits, budget) if tries < 6 else None
        if guess is None:
            guess = (fits + fails) // 2 if fails <= limit // step else 2 * fits
        guess = min(max(guess, fits + 1), fails - 1)
        tries += 1
        if at(guess) <= budget:
            lower, fits = fits, guess
        else:
            fails = guess
    return fits * step


def _guess(at: Callable[[int], int], lower: int | None, fits: int, budget: int) -> int | None:
    """Where the line through the last two sizes that fit meets the budget."""
    if lower is None or at(fits) <= at(lower):
        return None
    slope = (at(fits) - at(lower)) / (fits - lower)
    return fits + math.floor((budget - at(fits)) / slope)
