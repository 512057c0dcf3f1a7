# mypy: disable-error-code="no-untyped-def"
"""Times of one LoRA linear on the CPU, with pytest-benchmark: frozen alone, PEFT, peftfast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.baselines import LoraShape
from benchmarks.linear import Checked, Config, frozen, ours, peft

pytest.importorskip("pytest_benchmark")

CPU = torch.device("cpu")
SHAPE = LoraShape(rows=256, in_features=512, out_features=512, rank=16)
VARIANTS: dict[str, Callable[[Config], Checked]] = {
    "frozen": lambda config: frozen(config, CPU),
    "peft": lambda config: peft(config, torch.float32, CPU),
    "peftfast": lambda config: ours(config, torch.float32, CPU),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(benchmark, variant, dropout_p):
    case = VARIANTS[variant](Config(SHAPE, torch.float32, dropout_p)).case
    benchmark.group = f"forward, dropout {dropout_p}"
    y = benchmark.pedantic(case.forward, args=(case.x,), rounds=20, warmup_rounds=3)
    assert y.shape == (SHAPE.rows, SHAPE.out_features)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward(benchmark, variant, dropout_p):
    case = VARIANTS[variant](Config(SHAPE, torch.float32, dropout_p)).case
    benchmark.group = f"forward + backward, dropout {dropout_p}"
    gradients = benchmark.pedantic(case.step, rounds=20, warmup_rounds=3)
    assert gradients[0].shape == (SHAPE.rows, SHAPE.in_features)
