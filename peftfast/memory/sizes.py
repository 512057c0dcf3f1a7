"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of "40GiB", "24 GB" (powers of ten), "512M" (of two) or a number of bytes.

    Raises:
        ValueError: it is none of these, or not more than nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size; write 40GiB, 24GB or a number of bytes")
    found = int(float(match[1]) * _UNITS[match[2]])
    if found < 1:
        raise ValueError(f"{text!r} is no size above zero")
    return found
