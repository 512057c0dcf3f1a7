"""Bottleneck adapters in plain PyTorch: the formula by hand, the explicit backward in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.reference import bottleneck as reference
from peftfast.reference.dropout import keep_mask, keep_scale


def test_the_formula() -> None:
    x, down, up = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(8, 4)
    down_bias, up_bias, gate = torch.randn(4), torch.randn(8), torch.randn(2, 1, 1)
    weight, bias, seed = torch.randn(8), torch.randn(8), torch.tensor([3])
    options: dict[str, Any] = {"norm": "layer", "norm_weight": weight, "norm_bias": bias}
    h = torch.tanh(F.linear(F.layer_norm(x, (8,), weight, bias), down, down_bias))
    h = h * keep_mask(seed[0], 6, 4, 0.5).view(2, 3, 4) * keep_scale(0.5)
    delta = 0.3 * gate * F.linear(h, up, up_bias)
    for residual, expected in ((True, x + delta), (False, delta), (x.square(), x.square() + delta)):
        y = reference.bottleneck(
            x, down, down_bias, up, up_bias, activation="tanh", scaling=0.3, gate=gate,
            residual=residual, dropout_p=0.5, seed=seed, **options,
        )  # fmt: skip
        torch.testing.assert_close(y, expected)
    rms = reference.bottleneck(x, down, None, up, None, norm="rms", norm_weight=weight)
    by_hand = F.linear(torch.relu(F.linear(F.rms_norm(x, (8,), weight, 1e-5), down)), up)
    torch.testing.assert_close(rms, x + by_hand)


@pytest.mark.parametrize("norm", [None, *reference.NORMS])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_forward_and_backward_are_those_of_the_formula(norm: str | None, activation: str) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    choices = itertools.product([False, True], ["x", "none", "tensor"], [0.0, 0.3], [False, True])
    for gated, residual, p, learned in choices:
        x, down, up = draw(7, 10), draw(3, 10), draw(10, 3)
        leaves: dict[str, Tensor | None] = {
            "x": x,
            "down": down,
            "down_bias": draw(3),
            "up": up,
            "up_bias": draw(10),
            "norm_weight": draw(10) if norm else None,
            "norm_bias": draw(10) if norm else None,
            "scaling": draw(1) if learned else None,
            "gate": draw(7, 1) if gated else None,
        }
        other = draw(7, 10)
        shared: dict[str, Any] = {
            "activation": activation,
            "scaling": leaves["scaling"] if learned else 0.7,
            "norm": norm,
            "norm_weight": leaves["norm_weight"],
            "norm_bias": leaves["norm_bias"],
            "norm_eps": 1e-3,
            "dropout_p": p,
            "seed": torch.tensor([5]) if p else None,
        }
        weights = down, leaves["down_bias"], up, leaves["up_bias"]
        given: Any = {"x": True, "none": False, "tensor": other}[residual]
        y = reference.bottleneck(x, *weights, residual=given, gate=leaves["gate"], **shared)
        dy = torch.randn_like(y)
        asked = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        expected = torch.autograd.grad(y, list(asked.values()), dy)
        shared["gate"] = None if leaves["gate"] is None else leaves["gate"][:, 0]
        with torch.no_grad():
            start = {"x": x, "none": None, "tensor": other}[residual]
            ours, z, statistics = reference.bottleneck_forward(
                x, *weights, residual=start, dtype=torch.float64, keep=True, **shared
            )
            assert z is not None
            grads = reference.bottleneck_backward(
                dy, x, z, statistics, *weights, sequential=residual == "x",
                needs=[name in asked for name in reference.GRADIENTS], **shared,
            )  # fmt: skip
        torch.testing.assert_close(ours, y)
        for name, mine, theirs in zip(asked, grads, expected, strict=True):
            torch.testing.assert_close(mine.reshape(theirs.shape), theirs, msg=name)
            assert mine.is_contiguous()


def test_statistics_and_what_is_not_kept() -> None:
    x, down, up = torch.randn(5, 8).half(), torch.randn(4, 8).half(), torch.randn(8, 4).half()
    shared: dict[str, Any] = {
        "activation": "relu", "scaling": 1.0, "residual": x, "norm_weight": None, "norm_bias": None,
        "norm_eps": 1e-3, "gate": None, "dropout_p": 0.0, "seed": None, "dtype": torch.float16,
    }  # fmt: skip
    wide = x.float()
    variance, square = wide.var(1, correction=0), wide.square().mean(1)
    expected = {
        "layer": torch.stack([wide.mean(1), (variance + 1e-3).rsqrt()]),
        "rms": (square + 1e-3).rsqrt()[None],
    }
    for norm in (None, *reference.NORMS):
        run = reference.bottleneck_forward(x, down, None, up, None, norm=norm, keep=True, **shared)
        bare = reference.bottleneck_forward(
            x, down, None, up, None, norm=norm, keep=False, **shared
        )
        assert torch.equal(run[0], bare[0]) and bare[1:] == (None, None)
        assert run[1] is not None and run[1].dtype == torch.float16
        if norm is None:
            assert run[2] is None
        else:
            torch.testing.assert_close(run[2], expected[norm])
