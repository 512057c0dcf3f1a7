"""Comparing a fused op with a module's own forward: random inputs, views of modules, a tolerance.

A probe draws from a generator of its own and runs on views, second objects over a module's
attributes, so that the module, its parameters, its flags and every random generator are left as
they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from peftfast.ops.nf4 import NF4Weight
from peftfast.patching.handlers import Comparison
from peftfast.patching.state import KEY

ROWS = 4
_ROUNDINGS = 16

Normal = Callable[..., Tensor]


def normal_on(device: torch.device) -> Normal:
    """Standard normal values of any shape, the same at each probe."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def shallow(module: Any, kind: type[nn.Module], **replaced: Any) -> Any:
    """A second object over `module`'s attributes, some replaced, without a forward of its own."""
    other = kind.__new__(kind)
    own = ("forward", "_old_forward", "_hf_hook", KEY)
    other.__dict__ = {k: v for k, v in module.__dict__.items() if k not in own} | replaced
    return other


def one_element(weight: NF4Weight) -> NF4Weight:
    """A weight [1, 1] like this one."""
    packed = torch.zeros(1, dtype=torch.uint8, device=weight.device)
    absmax = torch.ones(1, device=weight.device)
    return NF4Weight(
        packed,
        absmax,
        torch.Size((1, 1)),
        weight.dtype,
        quant_type=weight.quant_type,
        compute_dtype=weight.compute_dtype,
    )


def elsewhere(module: nn.Module) -> str:
    """Why there are no values to compute with now, though a call may bring them; "" else."""
    for parameter in module.parameters():
        if parameter.device.type == "meta":
            return "parameters are on the meta device"
        if isinstance(parameter, FakeTensor):
            return "parameters are fake tensors"
        if isinstance(parameter, DTensor):
            return "parameters are sharded"
    return ""


def compared(
    expected: Tensor, got: Tensor, dtypes: Iterable[torch.dtype], whose: str
) -> Comparison:
    """How an op's output differs from the original's, beyond rounding in `dtypes`.

    `whose` is the possessive of the original's name.
    """
    if not bool(expected.isfinite().all()):
        return Comparison(unchecked=f"{whose} own output is not finite on a random input")
    if got.shape != expected.shape or got.dtype != expected.dtype:
        ours, theirs = (f"{t.dtype} {list(t.shape)}" for t in (got, expected))
        return Comparison(difference=f"its output is {ours}, {whose} {theirs}")
    largest = expected.double().abs().max().item()
    apart = (got.double() - expected.double()).abs().max().item()
    allowed = _ROUNDINGS * max(_rounding(dtype, got.device) for dtype in dtypes) * largest
    if not apart <= allowed:
        return Comparison(
            difference=f"its output differs from {whose} by {apart:.2e} on a random input"
            f" (allowed: {allowed:.2e})"
        )
    return Comparison()


def gradients_compared(
    expected: Tensor, got: Tensor, leaves: Iterable[Tensor], whose: str
) -> Comparison:
    """The same of the gradients of two outputs, in float32, in all of `leaves`."""
    dy = normal_on(expected.device)(*expected.shape).to(expected.dtype)
    held = list(leaves)
    theirs, ours = (
        torch.autograd.grad(y, held, dy, allow_unused=True)
        if y.requires_grad
        else [None] * len(held)
        for y in (expected, got)
    )
    for a, b in zip(theirs, ours, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None:
            return Comparison(difference=f"only one of it and {whose} has a gradient")
        found = compared(a, b, {a.dtype}, whose)
        if found != Comparison():
            what = (found.difference or found.unchecked).replace("output", "gradient")
            return dataclasses.replace(found, difference=what, unchecked="")
    return Comparison()


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    """One relative rounding; on a GPU float32 products may be in TF32, which has 10 bits."""
    if dtype == torch.float32 and device.type == "cuda":
        return 2.0**-10
    return torch.finfo(dtype).eps
