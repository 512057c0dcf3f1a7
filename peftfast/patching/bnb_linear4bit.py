"""bitsandbytes' 4-bit linears that no adapter is on: the fused classes and their handlers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from peftfast.ops import nf4
from peftfast.ops.nf4 import NF4Weight
from peftfast.patching.bases import KINDS
from peftfast.patching.forwards import replaced_forwards
from peftfast.patching.four_bit import KIND, Releasing, read_bias, read_weight, view
from peftfast.patching.fused import fused_forward
from peftfast.patching.handlers import ClassSwap, Comparison
from peftfast.patching.inputs import cast_after, four_bit_reason, input_reason
from peftfast.patching.probe import ROWS, compared, elsewhere, normal_on, one_element
from peftfast.patching.state import State, state_of


class LinearCall(NamedTuple):
    """The operands of `peftfast.ops.nf4.linear`, and the dtype that its output is cast to."""

    weight: NF4Weight
    bias: Tensor | None
    out_dtype: torch.dtype | None

    def output(self, x: Tensor, impl: str) -> Tensor:
        y = nf4.linear(x, self.weight, self.bias, impl=impl)
        return y if self.out_dtype is None else y.to(self.out_dtype)


def read_call(module: Any, x: Tensor) -> LinearCall | str:
    """What `module` computes of x, or why that is not for `nf4.linear` to compute."""
    if reason := input_reason(x):
        return reason
    weight = read_weight(module, x, state_of(module))
    if isinstance(weight, str):
        return f"its {weight}"
    if reason := four_bit_reason(x, weight):
        return reason
    return LinearCall(weight, read_bias(module, x), cast_after(x))


def compute(module: Any, state: State, call: LinearCall, x: Tensor) -> Tensor:
    return call.output(x, state.impl)


class FusedLinear4bit(Releasing, bnb.nn.Linear4bit):
    """bitsandbytes' `Linear4bit`, run as one op where that computes the same.

    Modules become one by `patch` only, which sets `__class__`; elsewhere bitsandbytes' own forward
    runs, and is counted with a reason.
    """

    forward = fused_forward(bnb.nn.Linear4bit, read_call, compute)


class FusedLinearNF4(Releasing, bnb.nn.LinearNF4):
    """`FusedLinear4bit` for bitsandbytes' `LinearNF4`."""

    forward = fused_forward(bnb.nn.LinearNF4, read_call, compute)


class FusedLinearFP4(Releasing, bnb.nn.LinearFP4):
    """`FusedLinear4bit` for bitsandbytes' `LinearFP4`."""

    forward = fused_forward(bnb.nn.LinearFP4, read_call, compute)


# An adapter may be put on a linear that is fused already.
KINDS.update(dict.fromkeys((FusedLinear4bit, FusedLinearNF4, FusedLinearFP4), KIND))


class Linear4bit(ClassSwap):
    """The handler of bitsandbytes' 4-bit linear `source`, fused as `fused`."""

    op = "nf4_linear"

    def __init__(self, source: type[nn.Module], fused: type[nn.Module]) -> None:
        self.name = f"bitsandbytes' {source.__name__}"
        self.source, self.fused = source, fused

    def unsupported(self, module: Any) -> list[str]:
        return []

    def obstacles(self, module: Any) -> list[str]:
        reasons = replaced_forwards(module, self.source, self.name)
        weight = read_weight(module, None, None)
        if isinstance(weight, str):
            reasons.append(f"its {weight}")
        return reasons

    def compare(self, module: Any, impl: str) -> Comparison:
        if unchecked := elsewhere(module):
            return Comparison(unchecked=unchecked)
        plain = view(module)
        weight = read_weight(plain, None, None)
        if isinstance(weight, str):
            return Comparison(difference=f"its {weight}")
        own = weight.compute_dtype or weight.dtype
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            for dtype in dict.fromkeys((own, torch.float32)):
                x = normal_on(weight.device)(ROWS, module.in_features).to(dtype)
                probe = view(module)
                call = read_call(probe, x)
                if isinstance(call, str):
                    return Comparison(difference=call)
                expected, got = self.source.forward(probe, x), call.output(x, impl)
                found = compared(expected, got, {dtype, own}, "bitsandbytes'")
                if found != Comparison():
                    return found
        return Comparison()

    def prepare(self, module: Any) -> None:
        read_weight(module, None, state_of(module))

    def require(self, impl: str, modules: Iterable[Any]) -> None:
        kinds = {}
        for module in modules:
            weight = read_weight(module, None, None)
            if isinstance(weight, NF4Weight) and weight.device.type != "meta":
                dtype = weight.compute_dtype or weight.dtype
                kinds[weight.device, dtype] = weight
        for (device, dtype), weight in kinds.items():
            one = torch.ones(1, 1, device=device, dtype=dtype)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                nf4.linear(one, one_element(weight), impl=impl)


HANDLERS = [
    Linear4bit(bnb.nn.Linear4bit, FusedLinear4bit),
    Linear4bit(bnb.nn.LinearNF4, FusedLinearNF4),
    Linear4bit(bnb.nn.LinearFP4, FusedLinearFP4),
]
