"""Inverted dropout whose mask is a function of (seed, element): only the seed is saved.

Contract, checks and dispatch; the maths is in `peftfast.reference.dropout`, the kernels in
`peftfast_kernels.activation` and csrc.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftfast.ops import recipes
from peftfast.ops.dispatch import (
    Impl,
    choose,
    native_reasons,
    none,
    parse_impl,
    triton_reasons,
)
from peftfast.ops.operands import check_dense, constant, is_batched, probabilities, shape
from peftfast.ops.rebuilt import Inputs, Rebuilt, Settings
from peftfast.reference import dropout as reference

_SEED_LIMIT = (1 << 63) - 1


def dropout(
    x: Tensor,
    p: float,
    *,
    seed: Tensor | None = None,
    recipe: bool = True,
    impl: str | Impl = "auto",
) -> Tensor:
    """x with elements dropped with probability p, and the others divided by 1 - p.

    Args:
        x: any shape and strides; the mask is that of a matrix of its last dimension's rows.
        p: in [0, 1], rounded to a multiple of 2**-16; 0.0 gives x itself. It always drops: pass
            0.0 to evaluate.
        seed: int64 [1] on x's device; None draws it from torch's generator of that device.
        recipe: tag the output, where x has a recipe or is saved by the op that made it.
        impl: "auto", "triton", "native" or "reference"; an explicit request never falls back.

    Moves x and y once, and in the backward dy and dx. Second derivatives raise.

    Raises:
        TypeError, ValueError: an operand is wrong; the message names it.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    check_dense(x, "x")
    p = probability(p, "p")
    asked = parse_impl(impl)
    if seed is not None:
        check_one_seed(x, seed)
    if p == 0.0:
        return x
    if seed is None:
        seed = draw_seed(x)
    if recipe and torch.is_grad_enabled():
        recipe = recipes.is_saved(x) or recipes.keep(x).spec != 0
    return _DROPOUT([x, seed], (p, asked.value), recipe)


def dropout_reasons(impl: str | Impl, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why `impl` can't serve dropout of such tensors; empty where it can."""
    reasons = {
        Impl.TRITON: lambda: triton_reasons(device, dtype),
        Impl.NATIVE: lambda: _native_reasons(device),
    }
    return reasons.get(parse_impl(impl), none)()


def probability(p: float, name: str) -> float:
    return constant(probabilities(p, 1, name)[0])


def draw_seed(x: Tensor) -> Tensor:
    return torch.randint(_SEED_LIMIT, (1,), device=x.device)


def check_one_seed(x: Tensor, seed: Tensor) -> None:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed is {got}; an int64 tensor is needed")
    if seed.shape != (1,) or seed.device != x.device:
        raise ValueError(f"seed is {shape(seed)} on {seed.device}; [1] on {x.device} is needed")


def implementation(op: str, asked: str, x: Tensor, dy: Tensor | None = None) -> Impl:
    """Who serves an elementwise op that may drop."""
    batched = ["the gradients are batched"] if is_batched([dy]) else []
    reasons = {
        Impl.TRITON: lambda: triton_reasons(x.device, x.dtype) + batched,
        Impl.NATIVE: lambda: _native_reasons(x.device) + batched,
        Impl.REFERENCE: none,
    }
    first = Impl.TRITON if x.device.type == "cuda" else Impl.NATIVE
    return choose(op, Impl(asked), (first, Impl.REFERENCE), reasons)


def drop_of(impl: Impl) -> reference.Drop:
    """The masked copy of a matrix, on a CPU or in plain torch."""
    if impl is Impl.NATIVE:
        from peftfast.native.dropout import drop

        return drop
    return reference.drop


def _native_reasons(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["csrc has no elementwise ops for a GPU"]
    return native_reasons(device)


def _dropped(x: Tensor, seed: Tensor, settings: Settings, dy: Tensor | None = None) -> Tensor:
    p, asked = settings
    impl = implementation("dropout", asked, x, dy)
    if impl is Impl.TRITON:
        from peftfast_kernels import activation

        y = x.new_empty(x.shape)
        activation.dropout(x, seed, p, y)
        return y
    return reference.dropout(x, seed, p, drop=drop_of(impl))


def _forward(inputs: Inputs, settings: Settings) -> Tensor:
    return _dropped(inputs[0], inputs[1], settings)


def _backward(
    dy: Tensor,
    inputs: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    settings: Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    seed = inputs[1]
    assert seed is not None
    return [_dropped(dy, seed, settings, dy)]


def _dtype(inputs: Inputs, settings: Settings) -> Any:
    return inputs[0].dtype


def _check(inputs: Inputs, settings: Settings) -> None:
    check_dense(inputs[0], "x")
    check_one_seed(inputs[0], inputs[1])


_DROPOUT = Rebuilt("dropout", _forward, _backward, _dtype, lambda *_: (False, True), _check)
