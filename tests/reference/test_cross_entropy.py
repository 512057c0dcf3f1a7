"""The chunked loss against autograd's of the formula, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast.reference.cross_entropy import (
    Needs,
    chunked_cross_entropy,
    linear_cross_entropy,
    row_losses,
)

ROWS, IN, VOCABULARY, RANKS = 13, 7, 11, (2, 3)


def _operands(bias: bool, adapters: int) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    target = torch.randint(VOCABULARY, (ROWS,))
    target[::4] = -100
    ranks = RANKS[:adapters]
    return {
        "x": draw(ROWS, IN).requires_grad_(),
        "weight": draw(VOCABULARY, IN),
        "bias": draw(VOCABULARY).requires_grad_() if bias else None,
        "target": target,
        "lora_a": [draw(r, IN).requires_grad_() for r in ranks],
        "lora_b": [draw(VOCABULARY, r).requires_grad_() for r in ranks],
        "scaling": [0.5, -2.0][:adapters],
        "dropout_p": [0.3, 0.0][:adapters],
        "seed": torch.tensor([5, 6][:adapters]) if adapters else None,
    }


@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 64])
@pytest.mark.parametrize("adapters", [0, 1, 2])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, None), (2.0, None), (3.0, 0.7)])
def test_chunks_equal_the_formula(
    chunk_rows: int, adapters: int, softcap: float | None, logit_scale: float | None
) -> None:
    operands = _operands(adapters != 1, adapters)
    weights = torch.randn(ROWS, dtype=torch.float64)
    losses = linear_cross_entropy(
        **operands, reduction="none", softcap=softcap, logit_scale=logit_scale
    )
    asking = [operands["x"], operands["bias"], *operands["lora_a"], *operands["lora_b"]]
    asking = [one for one in asking if one is not None]
    expected = torch.autograd.grad((losses * weights).sum(), asking)
    needs = Needs(True, operands["bias"] is not None, [True] * adapters, [True] * adapters)
    with torch.no_grad():
        operands["weights"] = [operands.pop("weight")]
        got, grads = chunked_cross_entropy(
            **operands, ignore_index=-100, softcap=softcap, logit_scale=logit_scale,
            chunk_rows=chunk_rows, needs=needs, row_weights=weights,
        )  # fmt: skip
    torch.testing.assert_close(got, losses.detach())
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_what_is_asked_for_is_given() -> None:
    operands = _operands(True, 2)
    operands["weights"] = [operands.pop("weight")]
    settings = dict(ignore_index=-100, softcap=None, logit_scale=None, chunk_rows=4)
    every = Needs(True, True, [True] * 2, [True] * 2)
    some = Needs(False, False, [False, True], [True, False])
    with torch.no_grad():
        _, full = chunked_cross_entropy(**operands, **settings, needs=every)
        _, part = chunked_cross_entropy(**operands, **settings, needs=some)
        _, none = chunked_cross_entropy(
            **operands, **settings, needs=Needs(False, False, [False] * 2, [False] * 2)
        )
    assert none == []
    for ours, theirs in zip(part, (full[3], full[4]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_logits_become_their_gradient_in_place() -> None:
    logits = torch.randn(3, 5, dtype=torch.bfloat16)
    target = torch.tensor([1, -100, 4])
    losses, gradient = row_losses(logits, target, None, -100, None, None, True)
    assert gradient is logits
    assert losses.dtype == torch.float32
    assert losses[1] == 0 and not gradient[1].any()


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 0.0, 3e38]])
    losses, gradient = row_losses(logits, torch.tensor([1, 2]), None, -100, None, None, True)
    assert losses.tolist() == [2e4, 0.0]
    assert gradient.tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
