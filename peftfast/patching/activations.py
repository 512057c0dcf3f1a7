"""Activations: leaf modules without parameters, of torch or transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.ops import activation
from peftfast.ops.activation import KINDS, activation_reasons
from peftfast.patching.forwards import defining_class
from peftfast.patching.handlers import Comparison
from peftfast.patching.inputs import input_reason
from peftfast.patching.parts import CPU, Part, is_leaf, source_of
from peftfast.patching.probe import compared, normal_on, shallow
from peftfast.patching.state import state_of

_FILES = ("torch.nn.modules.activation", "transformers.activations")
# Their own backward reads their output alone, which the next layer keeps too.
_KEEP_OUTPUT = ("relu", "sigmoid", "tanh")
_NOT_ELEMENTWISE = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
_DTYPES = (torch.float32, torch.bfloat16)
_SCALES = (3.0, 1e3)  # of the inputs that are compared: an activation may be cut off far out


class ActivationCall(NamedTuple):
    kind: str

    def output(self, x: Tensor, impl: str) -> Tensor:
        return activation(x, self.kind, impl=impl)


class Activation(Part):
    """The handler of activations of one class."""

    op = "activation"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return is_activation(module)

    @staticmethod
    def read(module: Any, x: Tensor) -> ActivationCall | str:
        state = state_of(module)
        assert state is not None
        return input_reason(x) or ActivationCall(state.plan)

    def unsupported(self, module: Any) -> list[str]:
        if getattr(module, "inplace", False):
            return ["it works in place"]
        if self.source in (nn.ReLU, nn.Sigmoid, nn.Tanh):
            return ["it keeps its output alone, as the layer that reads it does"]
        return []

    def find(self, module: Any) -> Comparison:
        kind = kind_of(shallow(module, self.source))
        if kind is None:
            return Comparison(unserved="it computes none of the activations that have an op")
        if kind in _KEEP_OUTPUT:
            return Comparison(unserved="it keeps its output alone, as the layer that reads it does")
        return Comparison(plan=kind)

    def impl_reasons(
        self, module: Any, impl: str, device: torch.device, dtype: torch.dtype
    ) -> list[str]:
        return activation_reasons(impl, device, dtype)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is of the kind that works on each element, rewired or not."""
    if not is_leaf(module) or module._parameters or isinstance(module, _NOT_ELEMENTWISE):
        return False
    return defining_class(source_of(module)).__module__ in _FILES


def kind_of(act: Any) -> str | None:
    """The kind of `peftfast.ops.activation` that a function of a tensor computes, if any."""
    best: tuple[float, str] | None = None
    inputs = [normal_on(CPU)(4, 64).mul(scale).to(dtype) for scale in _SCALES for dtype in _DTYPES]
    expected = [act(x.clone()) for x in inputs]
    for kind in KINDS:
        got = [activation(x, kind, impl="reference") for x in inputs]
        pairs = list(zip(expected, got, strict=True))
        if any(compared(e, g, {e.dtype}, "its") != Comparison() for e, g in pairs):
            continue
        apart = sum((e.double() - g.double()).abs().max().item() for e, g in pairs)
        if best is None or apart < best[0]:
            best = apart, kind
    return None if best is None else best[1]
