"""The counted step of a model with PEFT's Prefix-Tuning."""

from __future__ import annotations

from benchmarks.counted.prefix_model import report
from benchmarks.models import Size


def test_a_patched_prefix_costs_less_than_peft_s() -> None:
    size = Size("2 x 64", 64, 96, 2, 4, 2, 64, 2, 32)
    found = report(size, 8, lambda line: None)
    growth = {row["variant"]: row["saved_growth_u"] for row in found.rows}
    ours, theirs = (
        growth[who] / growth[f"{who}, without a prefix"] for who in ("peftfast", "peft")
    )
    assert ours <= 1.02 < theirs
    kept = [target for target in found.targets if "kept" in target.what]
    assert [target.value for target in kept] == [ours]
