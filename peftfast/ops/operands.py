"""Checks and conversions that the ops' contracts share; every error names the operand."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

OneOrMore = Tensor | Sequence[Tensor]
Factors = float | Sequence[float]


def check_input(x: Tensor) -> Tensor:
    """Hold x to what a linear needs; returns it as autocast casts it."""
    check_dense(x, "x")
    if x.ndim == 0:
        raise ValueError("x is a scalar; it needs at least one dimension, [..., in]")
    if (dtype := autocast_dtype(x)) is not None:
        x = x.to(dtype)
    return x


def check_dense(value: Tensor, name: str) -> None:
    """Hold an operand to a dense tensor of floating numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; a tensor is needed")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else f"of layout {value.layout}"
        raise TypeError(f"{name} is {kind}; a dense tensor is needed")
    if not value.is_floating_point():
        raise TypeError(f"{name} is {value.dtype}; a floating dtype is needed")


def check_operand(x: Tensor, value: Tensor, name: str, ndim: int, any_dtype: bool) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; a tensor is needed")
    if value.ndim != ndim:
        raise ValueError(f"{name} is {shape(value)}; {ndim} dimensions are needed")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, x is on {x.device}")
    if not value.is_floating_point() or not (any_dtype or value.dtype == x.dtype):
        raise TypeError(
            f"{name} is {value.dtype}, x is {x.dtype}: they must agree (outside autocast)"
        )


def check_adapter(
    x: Tensor, out_features: int, a: Tensor, b: Tensor, at: str, x_name: str = "x", out: str = "out"
) -> None:
    """Hold one adapter's A and B to x [..., in] and a base of `out_features`.

    `at` is what follows their names in errors, an index as a rule; `out` names those features.
    """
    for name, value in ((f"lora_a{at}", a), (f"lora_b{at}", b)):
        check_operand(x, value, name, 2, any_dtype=True)
        if value.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{name} is {value.dtype}; with {x_name} of {x.dtype} adapters are {x.dtype}"
                " or torch.float32"
            )
    rank = a.shape[0]
    if rank < 1:
        raise ValueError(f"lora_a{at} is {shape(a)}: the rank must be at least 1")
    if a.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_a{at} is {shape(a)}; {x_name} {shape(x)} needs [r, {x.shape[-1]}]")
    if b.shape != (out_features, rank):
        needed = [out_features, rank]
        raise ValueError(f"lora_b{at} is {shape(b)}; [{out}, r] is {needed} here")


def check_seed(x: Tensor, seed: Tensor, adapters: int) -> None:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed is {got}; an int64 tensor is needed")
    if seed.shape != (adapters,) or seed.device != x.device:
        raise ValueError(
            f"seed is {shape(seed)} on {seed.device}; [{adapters}] on {x.device} is needed,"
            " one an adapter"
        )


def as_list(value: OneOrMore, name: str) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{name} is {type(value).__name__}; a tensor or a list of tensors is needed")


def factors(value: Factors, count: int, name: str) -> list[float]:
    if type(value) is float and (torch.compiler.is_compiling() or math.isfinite(value)):
        return [value] * count  # as a rule, and cheap to see
    if isinstance(value, (Tensor, str)) or not isinstance(value, (Real, Iterable)):
        raise TypeError(f"{name} is {type(value).__name__}; a number or a list of them is needed")
    values: list[Any] = [value] * count if isinstance(value, Real) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} adapters")
    for one in values:
        if not isinstance(one, Real):
            raise TypeError(f"{name} holds {type(one).__name__}; numbers are needed")
        if not torch.compiler.is_compiling() and not math.isfinite(one):
            raise ValueError(f"{name} is {one}; a finite number is needed")
    return [float(one) for one in values]


def constant(value: float) -> float:
    """The number itself, also where torch.compile has made a symbol of it."""
    return float.fromhex(float(value).hex())


def probabilities(value: Factors, count: int, name: str) -> list[float]:
    values = factors(value, count, name)
    for p in values:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"{name} is {p}; a probability in [0, 1] is needed")
    return values


def is_traced() -> bool:
    """Whether calls are recorded (torch.compile, make_fx, torch.jit.trace), as library ops: no
    tracer sees what native code and kernels do.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def is_batched(values: Iterable[Tensor | None]) -> bool:
    """Whether torch maps over a dimension that these tensors don't show, as is_grads_batched does:
    they have no memory of their own that a kernel could read.
    """
    functorch = torch._C._functorch
    return any(
        v is not None and (functorch.is_batchedtensor(v) or functorch.is_legacy_batchedtensor(v))
        for v in values
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast x to before a linear; None where it would leave it."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def shape(value: Tensor) -> str:
    return str(list(value.shape))


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The casts are made already; autocast must not make others inside."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
