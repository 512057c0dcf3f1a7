"""Correctness before timing: a row is recorded only for a variant whose results are right.

The error of a variant is ||out - ref|| / ||ref|| against a reference in higher precision. It may
be twice that of the same maths in eager PyTorch at the variant's dtypes, plus one rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import LoraOperands
from peftfast.reference.dropout import keep_mask, keep_scale

NAMES = ("y", "dx", "dA", "dB")


class GateFailed(RuntimeError):
    """A variant's results are wrong, so that its times mean nothing."""


@dataclass(frozen=True)
class Gate:
    """Relative errors of one variant's results, and those of eager PyTorch.

    Attributes:
        reference: what both are compared with.
        errors, eager: by result; limit: by result, what `errors` may be at most.
    """

    reference: str
    errors: Mapping[str, float]
    eager: Mapping[str, float]
    limit: Mapping[str, float]

    def require(self, variant: str) -> None:
        """Raises GateFailed, naming the variant and each result that is off (NaN always is)."""
        off = [name for name in self.errors if not self.errors[name] <= self.limit[name]]
        if off:
            details = ", ".join(f"{n}: {self.errors[n]:.2e} > {self.limit[n]:.2e}" for n in off)
            raise GateFailed(f"{variant} differs from {self.reference}: {details}")

    def as_dict(self) -> dict[str, Any]:
        """The figures, for a row."""
        return {
            "reference": self.reference,
            "errors": dict(self.errors),
            "eager": dict(self.eager),
            "limit": dict(self.limit),
        }


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in float64."""
    exact = reference.detach().double()
    return float((value.detach().double() - exact).norm() / exact.norm())


def gate(
    reference: str,
    results: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    rounding: torch.dtype | None = None,
) -> Gate:
    """Compares `results` and `eager` with `exact`, by name.

    One rounding is that of each result's dtype, or of `rounding` where the maths is done in a
    narrower one.
    """
    errors = {name: relative_error(results[name], exact[name]) for name in exact}
    of_eager = {name: relative_error(eager[name], exact[name]) for name in exact}
    limit = {
        name: 2 * of_eager[name] + torch.finfo(rounding or results[name].dtype).eps
        for name in exact
    }
    return Gate(reference, errors, of_eager, limit)


def exact_lora_step(
    operands: LoraOperands, dropout_p: float, seed: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """y, dx, dA, dB of a LoRA linear in plain PyTorch at `dtype`, with the mask that `seed`
    stands for.

    At float64 this is the reference. At a 16-bit dtype x, W and their products have it, and the
    adapters' products have the adapters' own dtype, as in PEFT.
    """
    wide = dtype == torch.float64
    x = operands.x.detach().to(dtype).requires_grad_()
    weight = operands.weight.to(dtype)
    a, b = (
        (parameter.detach().to(dtype) if wide else parameter.detach()).requires_grad_()
        for parameter in (operands.lora_a, operands.lora_b)
    )
    dropped = x.to(a.dtype)
    if dropout_p > 0:
        if seed is None:
            raise ValueError("dropout_p > 0 needs a seed")
        mask = keep_mask(seed, x.shape[0], x.shape[1], dropout_p)
        dropped = dropped * mask * keep_scale(dropout_p)
    y = x @ weight.T
    y = (y + dropped @ a.T @ b.T * operands.scaling).to(dtype)
    gradients = torch.autograd.grad(y, [x, a, b], operands.dy.to(dtype))
    return dict(zip(NAMES, (y.detach(), *gradients), strict=True))
