"""The tolerance: twice the error of the same maths in eager PyTorch, plus one rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def error(actual: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference, in float64."""
    return (actual.detach().double() - truth.detach().double()).norm().item()


def assert_within(actual: Tensor, eager: Tensor, truth: Tensor, what: str = "") -> None:
    """Hold `actual` to the tolerance.

    Args:
        actual: the implementation's result.
        eager: eager PyTorch's result of the same maths, at the same dtype.
        truth: the float64 result on the same inputs.
    """
    assert actual.shape == truth.shape, f"{what}: {actual.shape} against {truth.shape}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    rounding = torch.finfo(actual.dtype).eps * truth.double().norm().item()
    budget = 2 * error(eager, truth) + rounding
    found = error(actual, truth)
    assert found <= budget, f"{what}: error {found:.3e} is over the budget of {budget:.3e}"
