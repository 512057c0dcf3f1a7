"""The reference's explicit backward against autograd of the formula, in float64."""

from __future__ import annotations

import pytest
import torch

from peftfast.reference import lora as reference


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dropout_p", [(0.0, 0.0, 0.0), (0.3, 0.0, 0.1), (1.0, 0.5, 0.1)])
@pytest.mark.parametrize("missing", [None, 0, 1])
def test_backward_equals_autograd_of_the_formula(
    dropout_p: tuple[float, ...], missing: int | None
) -> None:
    x = _draw(11, 10)
    weights, biases = [_draw(6, 10), _draw(9, 10)], [_draw(6), None]
    lora_a = [_draw(3, 10), _draw(1, 10), _draw(4, 10)]
    lora_b = [_draw(6, 3), _draw(6, 1), _draw(9, 4)]
    settings = ([0, 0, 1], [0.5, -2.0, 1.5], list(dropout_p), torch.tensor([5, 6, 7]))
    operands = (x, weights, biases, lora_a, lora_b, *settings)
    truth = reference.lora_linear(*operands)
    leaves = [x, *weights, biases[0], *lora_a, *lora_b]
    dys = [torch.randn_like(y) for y in truth]
    if missing is not None:
        dys[missing] = torch.zeros_like(dys[missing])
    expected = torch.autograd.grad(truth, leaves, dys)

    with torch.no_grad():
        ys, t = reference.lora_linear_forward(*operands)
        given = [None if j == missing else dy for j, dy in enumerate(dys)]
        grads = reference.lora_linear_backward(
            given, t, *operands, True, [True, True], [True, False], [True] * 3, [True] * 3
        )
    for ours, theirs in zip([*ys, *grads], [*truth, *expected], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_the_gradients_asked_for_come_back() -> None:
    x, w, a, b = _draw(5, 8), _draw(4, 8), _draw(2, 8), _draw(4, 2)
    operands = (x, [w], [None], [a], [b], [0], [1.0], [0.0], None)
    with torch.no_grad():
        (y,), t = reference.lora_linear_forward(*operands)
        only_b = reference.lora_linear_backward(
            [y], t, *operands, False, [False], [False], [False], [True]
        )
    assert [g.shape for g in only_b] == [b.shape]
