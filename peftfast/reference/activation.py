"""Activations, and activations that gate: h = drop(act(gate) * up), in plain PyTorch.

    dh = mask / keep * dy      dup = dh * act(gate)      dgate = dh * up * act'(gate)

act(gate) is rounded to its dtype before the product, as it is where an activation's module and the
product are two operations (Shazeer, "GLU Variants Improve Transformer", 2020). Each kind has the
bits that transformers' activation of that name has on a CPU; `gelu_new` and `gelu_fast` are
`gelu_tanh` in elementary operations, rounded after each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.reference.dropout import Drop, drop, dropout

_aten = torch.ops.aten


class _Kind(NamedTuple):
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]  # of dy and x


def _gelu_new(x: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_tanh_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(dy, x, approximate="tanh")


_KINDS = {
    "relu": _Kind(torch.relu, lambda dy, x: _aten.threshold_backward(dy, x, 0)),
    "gelu": _Kind(F.gelu, lambda dy, x: _aten.gelu_backward(dy, x, approximate="none")),
    "gelu_tanh": _Kind(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_gradient),
    "gelu_new": _Kind(_gelu_new, _gelu_tanh_gradient),
    "gelu_fast": _Kind(_gelu_fast, _gelu_tanh_gradient),
    "silu": _Kind(F.silu, lambda dy, x: _aten.silu_backward(dy, x)),
    "tanh": _Kind(torch.tanh, lambda dy, x: _aten.tanh_backward(dy, torch.tanh(x))),
    "sigmoid": _Kind(torch.sigmoid, lambda dy, x: _aten.sigmoid_backward(dy, torch.sigmoid(x))),
    # x sigmoid(c x) is silu(c x) / c
    "quick_gelu": _Kind(
        lambda x: x * torch.sigmoid(1.702 * x), lambda dy, x: _aten.silu_backward(dy, 1.702 * x)
    ),
    "relu2": _Kind(
        lambda x: torch.square(torch.relu(x)),
        lambda dy, x: torch.mul(dy, torch.relu(x)).mul_(2.0),
    ),
}
KINDS = tuple(_KINDS)


def activation(x: Tensor, kind: str) -> Tensor:
    """act(x), differentiable by autograd; a new tensor."""
    return _KINDS[kind].value(x)


def activation_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """dy * act'(x)."""
    return _KINDS[kind].gradient(dy, x)


def gated_activation(
    gate: Tensor, up: Tensor, kind: str, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """The formula itself, differentiable by autograd.

    Args:
        gate, up: of one shape; kind: of `KINDS`.
        dropout_p, seed: as in `peftfast.reference.dropout.dropout`; None where the former is 0.
    """
    h = activation(gate, kind) * up
    if dropout_p > 0:
        assert seed is not None
        h = dropout(h, seed, dropout_p)
    return h


def gated_activation_forward(
    gate: Tensor,
    up: Tensor,
    kind: str,
    dropout_p: float,
    seed: Tensor | None,
    *,
    drop: Drop = drop,
) -> Tensor:
    """The same, not differentiable and with one temporary less; a new, contiguous tensor.

    Args:
        drop: the masked copy of a matrix, as `peftfast.reference.dropout.drop`.
    """
    h = activation(gate, kind).mul_(up)
    if dropout_p > 0:
        assert seed is not None
        h = dropout(h, seed, dropout_p, drop=drop)
    return h.contiguous()


def gated_activation_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    dropout_p: float,
    seed: Tensor | None,
    need_gate: bool,
    need_up: bool,
    *,
    drop: Drop = drop,
) -> list[Tensor]:
    """The gradients asked for, in the order gate, up; up may be None where gate asks for none."""
    if dropout_p > 0:
        assert seed is not None
        dy = dropout(dy, seed, dropout_p, drop=drop)
    grads = [(dy * activation(gate, kind)).contiguous()] if need_up else []
    if need_gate:
        assert up is not None
        grads.insert(0, activation_backward(dy * up, gate, kind).contiguous())
    return grads
