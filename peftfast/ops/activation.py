"""Activations, and activations that gate a product, with dropout where it is wanted.

Contract, checks and dispatch; the maths is in `peftfast.reference.activation`, the kernels in
`peftfast_kernels.activation`. Saved for the backward: what was given, or what that is rebuilt from;
never the activation, the product or a mask. The output is tagged with its recipe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftfast.ops.dispatch import Impl, choose, none, parse_impl, triton_reasons
from peftfast.ops.dropout import (
    check_one_seed,
    draw_seed,
    drop_of,
    dropout_reasons,
    implementation,
    probability,
)
from peftfast.ops.operands import check_dense, is_batched, shape
from peftfast.ops.rebuilt import Inputs, Rebuilt, Settings
from peftfast.reference import activation as reference

KINDS = reference.KINDS


def activation(x: Tensor, kind: str, *, recipe: bool = True, impl: str | Impl = "auto") -> Tensor:
    """act(x).

    Args:
        x: any shape and strides.
        kind: of `KINDS`: "relu", "gelu", "gelu_tanh", "gelu_new", "gelu_fast", "silu", "tanh",
            "sigmoid", "quick_gelu" or "relu2" (the square of relu).
        recipe: tag the output, so that an op that would save it saves x instead.
        impl: "auto", "triton" or "reference"; an explicit request never falls back.

    Moves x and y once, and in the backward x, dy and dx. Second derivatives raise.

    Raises:
        TypeError, ValueError: an operand is wrong; the message names it.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    check_dense(x, "x")
    _check_kind(kind)
    return _ACTIVATION([x], (kind, parse_impl(impl).value), recipe)


def gated_activation(
    gate: Tensor,
    up: Tensor,
    kind: str,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    recipe: bool = True,
    impl: str | Impl = "auto",
) -> Tensor:
    """drop(act(gate) * up).

    Args:
        gate, up: of one shape, dtype and device; any strides.
        kind: as in `activation`.
        dropout_p: probability in [0, 1] with which elements of the product are dropped, rounded to
            a multiple of 2**-16. It always drops: pass 0.0 to evaluate.
        seed: int64 [1] on gate's device, from which the mask follows; None draws it from torch's
            generator of that device.
        recipe: as in `activation`.
        impl: "auto", "triton", "native" or "reference"; an explicit request never falls back.

    Moves gate, up and the product once, and in the backward gate, up, dy and the gradients. Errors
    are as in `activation`.
    """
    _check_pair(gate, up)
    _check_kind(kind)
    p = probability(dropout_p, "dropout_p")
    if seed is not None:
        check_one_seed(gate, seed)
    settings = (kind, p, parse_impl(impl).value)
    if p == 0.0:
        return _GATED([gate, up], settings, recipe)
    return _GATED([gate, up, draw_seed(gate) if seed is None else seed], settings, recipe)


def activation_reasons(impl: str | Impl, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why `impl` can't serve activations of such tensors; empty where it can."""
    asked = parse_impl(impl)
    if asked is Impl.NATIVE:
        return ["activations have no native implementation"]
    return triton_reasons(device, dtype) if asked is Impl.TRITON else []


def gated_activation_reasons(
    impl: str | Impl, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """The same of `gated_activation`, which csrc serves with its dropout."""
    return dropout_reasons(impl, device, dtype)


def _check_pair(gate: Tensor, up: Tensor) -> None:
    check_dense(gate, "gate")
    check_dense(up, "up")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"up is {up.dtype} {shape(up)} on {up.device}, gate is {gate.dtype} {shape(gate)} on"
            f" {gate.device}: they must agree"
        )


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(map(repr, KINDS))}")


# One operand; settings: kind, impl


def _triton_serves(asked: str, x: Tensor, dy: Tensor | None = None) -> bool:
    if asked == Impl.REFERENCE or (asked == Impl.AUTO and x.device.type != "cuda"):
        return False

    def triton() -> list[str]:
        batched = ["the gradients are batched"] if is_batched([dy]) else []
        return triton_reasons(x.device, x.dtype) + batched

    reasons = {Impl.TRITON: triton, Impl.REFERENCE: none}
    order = (Impl.TRITON, Impl.REFERENCE)
    return choose("activation", Impl(asked), order, reasons) is Impl.TRITON


def _forward(inputs: Inputs, settings: Settings) -> Tensor:
    kind, impl = settings
    (x,) = inputs
    if not _triton_serves(impl, x):
        return reference.activation(x, kind).contiguous()
    from peftfast_kernels import activation as kernels

    y = x.new_empty(x.shape)
    kernels.activation_forward(x, None, kind, 0.0, None, y)
    return y


def _backward(
    dy: Tensor,
    inputs: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    settings: Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    kind, impl = settings
    (x,) = inputs
    assert x is not None
    if not _triton_serves(impl, x, dy):
        return [reference.activation_backward(dy, x, kind).contiguous()]
    from peftfast_kernels import activation as kernels

    dx = x.new_empty(x.shape)
    kernels.activation_backward(dy, x, None, kind, 0.0, None, dx, None)
    return [dx]


def _dtype(inputs: Inputs, settings: Settings) -> torch.dtype:
    return inputs[0].dtype


def _check(inputs: Inputs, settings: Settings) -> None:
    check_dense(inputs[0], "x")
    _check_kind(settings[0])


_ACTIVATION = Rebuilt("activation", _forward, _backward, _dtype, lambda *_: (True,), _check)


# Gate, up, and a seed where elements are dropped; settings: kind, dropout_p, impl


def _gated_forward(inputs: Inputs, settings: Settings) -> Tensor:
    kind, p, asked = settings
    gate, up = inputs[:2]
    seed = inputs[2] if len(inputs) > 2 else None
    impl = implementation("gated_activation", asked, gate)
    if impl is not Impl.TRITON:
        operands = gate, up, kind, p, seed
        return reference.gated_activation_forward(*operands, drop=drop_of(impl))
    from peftfast_kernels import activation as kernels

    y = gate.new_empty(gate.shape)
    kernels.activation_forward(gate, up, kind, p, seed, y)
    return y


def _gated_backward(
    dy: Tensor,
    inputs: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    settings: Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    kind, p, asked = settings
    gate, up = inputs[:2]
    seed = inputs[2] if len(inputs) > 2 else None
    need_gate, need_up = needs[:2]
    assert gate is not None
    impl = implementation("gated_activation", asked, gate, dy)
    if impl is not Impl.TRITON:
        operands = dy, gate, up, kind, p, seed, need_gate, need_up
        return reference.gated_activation_backward(*operands, drop=drop_of(impl))
    from peftfast_kernels import activation as kernels

    dgate = gate.new_empty(gate.shape) if need_gate else None
    dup = gate.new_empty(gate.shape) if need_up else None
    kernels.activation_backward(dy, gate, up, kind, p, seed, dgate, dup)
    return [grad for grad in (dgate, dup) if grad is not None]


def _gated_reads(settings: Settings, needs: Sequence[bool]) -> list[bool]:
    return [True, needs[0], True][: len(needs)]


def _gated_check(inputs: Inputs, settings: Settings) -> None:
    _check_pair(inputs[0], inputs[1])
    _check_kind(settings[0])
    if settings[1] > 0:
        check_one_seed(inputs[0], inputs[2])


_GATED = Rebuilt(
    "gated_activation", _gated_forward, _gated_backward, _dtype, _gated_reads, _gated_check
)
