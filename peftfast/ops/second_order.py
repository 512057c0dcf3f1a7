"""Ops here have first derivatives only; a second one raises instead of coming out wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"peftfast.ops.{ctx.op} has no second derivative; its gradients can't be differentiated"
        )


def first_order_only(op: str, grads: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of an op, computed without a graph; under `create_graph=True`,
    differentiating them raises.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    return [_FirstOrderOnly.apply(op, grad.detach().requires_grad_()) for grad in grads]
