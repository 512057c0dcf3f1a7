"""Attention over a prefix in plain PyTorch: the formula by hand, the explicit halves in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.reference import prefix_attention as reference
from peftfast.reference.dropout import keep_mask, keep_scale
from tests.prefix_attention import MASKS, Case

EXPLICIT: dict[str, Any] = dict.fromkeys(
    (
        "attn_mask", "prefix_mask", "window", "softcap", "sinks", "prefix_index", "prefix_lengths",
        "gate", "seed",
    )
) | {"is_causal": False}  # fmt: skip


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("keys", [5, 9])
def test_the_formula_is_sdpa_over_the_concatenation(keys: int) -> None:
    q, k, v = _draw(2, 4, 5, 8), _draw(2, 2, keys, 8), _draw(2, 2, keys, 8)
    prefix_k, prefix_v = _draw(2, 3, 8), _draw(2, 3, 8)
    both = [
        torch.cat([one.expand(2, -1, -1, -1), own], dim=2)
        for one, own in ((prefix_k, k), (prefix_v, v))
    ]
    seen = torch.ones(5, 3 + keys, dtype=torch.bool)
    options: list[dict[str, Any]] = [{}, {"is_causal": True}, {"is_causal": True, "window": 4}]
    for given in options:
        if given:
            seen = seen.tril(3 + keys - 5)
        if "window" in given:
            seen = seen.triu(3 + keys - 5 - 3)
        expected = F.scaled_dot_product_attention(q, *both, seen, scale=0.4, enable_gqa=True)
        y = reference.prefix_attention(q, k, v, prefix_k, prefix_v, scale=0.4, **given)
        torch.testing.assert_close(y, expected)


def test_soft_capping_sinks_gates_and_dropout_by_hand() -> None:
    q, k, v = _draw(2, 1, 3, 4), _draw(2, 1, 3, 4), _draw(2, 1, 3, 4)
    prefix_k, prefix_v, gate, sinks = _draw(1, 2, 4), _draw(1, 2, 4), _draw(2), _draw(1)
    seed = torch.tensor([3])
    y = reference.prefix_attention(
        q, k, v, prefix_k, prefix_v, softcap=1.5, sinks=sinks, gate=gate, dropout_p=0.5, seed=seed
    )
    kept = keep_mask(seed, 6, 5, 0.5).view(2, 3, 5) * keep_scale(0.5)
    for row in range(2):
        keys = torch.cat([gate[row] * prefix_k[0], k[row, 0]])
        values = torch.cat([gate[row] * prefix_v[0], v[row, 0]])
        logits = torch.exp(1.5 * torch.tanh(q[row, 0] @ keys.T / 2 / 1.5))
        p = logits / (logits.sum(1, keepdim=True) + sinks.exp())
        torch.testing.assert_close(y[row, 0], p * kept[row] @ values)


def test_the_form_relu_by_hand() -> None:
    q, k, v = _draw(2, 2, 3, 4), _draw(2, 1, 6, 4), _draw(2, 1, 6, 4)
    prefix_k, prefix_v, gate = _draw(1, 5, 4), _draw(1, 5, 4), _draw(1)
    y = reference.prefix_attention(q, k, v, prefix_k, prefix_v, gate=gate, form="relu", scale=0.3)
    apart = gate * torch.relu(q @ prefix_k[0].T) @ prefix_v[0]
    own = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(y, own + apart)


def test_prefixes_by_index_and_length() -> None:
    q, k, v = _draw(3, 2, 3, 4), _draw(3, 2, 3, 4), _draw(3, 2, 3, 4)
    prefix_k, prefix_v = _draw(2, 2, 5, 4), _draw(2, 2, 5, 4)
    index, lengths = torch.tensor([1, -1, 0]), torch.tensor([4, 2])
    y = reference.prefix_attention(
        q, k, v, prefix_k, prefix_v, is_causal=True, prefix_index=index, prefix_lengths=lengths,
    )  # fmt: skip
    for row, (which, length) in enumerate([(1, 2), (0, 0), (0, 4)]):
        own = [one[which, :, :length] for one in (prefix_k, prefix_v)]
        tensors = [one[row : row + 1] for one in (q, k, v)]
        if length:
            alone = reference.prefix_attention(*tensors, *own, is_causal=True)
        else:
            alone = F.scaled_dot_product_attention(*tensors, is_causal=True)
        torch.testing.assert_close(y[row : row + 1], alone)


def _cases() -> list[dict[str, Any]]:
    choices: dict[str, list[Any]] = {
        "batch": [1, 3],
        "groups": [1, 4, 8],
        "queries": [1, 5, 7],
        "keys": [None, 1, 9, 13],
        "rows": [1, 5, 9],
        "width": [3, 8],
        "value_width": [None, None, 5],
        "mask": list(MASKS),
        "of_prefix": [None, None, "bool", "additive"],
        "prefixes": [0, 2],
        "lengths": [False, True],
        "gate": [False, True],
        "sinks": [False, True],
        "softcap": [None, None, 2.0],
        "form": ["softmax", "softmax", "relu"],
        "dropout_p": [0.0, 0.0, 0.3],
    }
    draw = random.Random(0)
    return [{name: draw.choice(of) for name, of in choices.items()} for _ in range(160)]


@pytest.mark.parametrize(("block", "every"), [(1 << 19, 2), (64, 6)])
def test_forward_and_backward_are_those_of_the_formula(
    block: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_BLOCK", block)
    for chosen in _cases()[::every]:
        case = Case(**chosen)
        expected = case.run("formula", wide=True)
        leaves = {name: value.detach() for name, value in case.operands(wide=True).items()}
        if leaves["prefix_k"].ndim == 3:
            leaves |= {name: leaves[name][None] for name in ("prefix_k", "prefix_v")}
        tensors = [leaves.pop(name) for name in reference.GRADIENTS[:5]]
        given = EXPLICIT | case.options | leaves | {"scale": tensors[0].shape[-1] ** -0.5}
        for name in ("attn_mask", "prefix_mask"):
            mask = given[name]
            given[name] = None if mask is None else mask[(None,) * (4 - mask.ndim)]
        y, lse = reference.prefix_attention_forward(*tensors, **given)
        torch.testing.assert_close(y, expected["y"], msg=str(chosen))
        assert y.transpose(1, 2).is_contiguous() and lse.is_contiguous()
        names = [name for name in reference.GRADIENTS if f"d{name}" in expected]
        needs = [name in names for name in reference.GRADIENTS]
        grads = reference.prefix_attention_backward(case.dy, *tensors, y, lse, needs=needs, **given)
        for name, grad in zip(names, grads, strict=True):
            wanted = expected[f"d{name}"]
            torch.testing.assert_close(grad.view(wanted.shape), wanted, msg=f"{name}: {chosen}")


def test_a_row_that_sees_nothing() -> None:
    case = Case(rows=3)
    q, k, v, prefix_k, prefix_v = (one.float() for one in case.leaves.values())
    nothing = torch.zeros(1, 1, 7, 1, dtype=torch.bool)
    given = EXPLICIT | {"scale": 0.25, "form": "softmax", "dropout_p": 0.0, "attn_mask": nothing}
    prefixes = prefix_k[None], prefix_v[None]
    y, lse = reference.prefix_attention_forward(q, k, v, *prefixes, **given)
    alone = F.scaled_dot_product_attention(
        q, *(one.expand(2, -1, -1, -1) for one in prefixes), scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(y, alone)
    given["prefix_mask"] = nothing
    y, lse = reference.prefix_attention_forward(q, k, v, *prefixes, **given)
    assert (y == 0).all() and (lse == float("inf")).all()
    needs = [True] * 5 + [False] * 2
    dy = torch.ones_like(y)
    grads = reference.prefix_attention_backward(
        dy, q, k, v, *prefixes, y, lse, needs=needs, **given
    )
    assert all((one == 0).all() for one in grads)


def test_a_query_of_zeros_is_not_taken_for_one_that_sees_nothing() -> None:
    """Torch's kernel says 0 for the log-sum-exp of both."""
    q, k, v = torch.zeros(1, 1, 2, 4), torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    prefix_k, prefix_v = torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    mask = torch.tensor([[True, False], [False, False]])
    given = EXPLICIT | {"scale": 0.5, "form": "softmax", "dropout_p": 0.0}
    given["attn_mask"] = mask[None, None]
    y, _ = reference.prefix_attention_forward(q, k, v, prefix_k[None], prefix_v[None], **given)
    torch.testing.assert_close(y[0, 0, 0], (v[0, 0, 0] + prefix_v[0, 0]) / 2)
    torch.testing.assert_close(y[0, 0, 1], prefix_v[0, 0])
