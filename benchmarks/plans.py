"""The two plans of a LoRA linear's GEMM, and forcing one.

"fused": the up-projection joins a Triton GEMM. "library": torch's GEMM adds to the low-rank part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

PLANS = ("fused", "library")
VARIABLE = "PEFTFAST_LORA_GEMM"


@contextmanager
def plan_forced(plan: str) -> Iterator[None]:
    """Forces a plan through the environment variable that the dispatch rule reads at each call."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = plan
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
