"""Norms over the last dimension: a leaf module with a weight of one dimension and an eps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.ops import layer_norm, rms_norm
from peftfast.ops.norm import norm_reasons
from peftfast.patching.forwards import defining_class
from peftfast.patching.handlers import Comparison
from peftfast.patching.inputs import PLAIN_TENSORS, input_reason
from peftfast.patching.parts import CPU, Part, is_leaf
from peftfast.patching.probe import compared, gradients_compared, normal_on, shallow
from peftfast.patching.state import state_of

_EPS_NAMES = ("eps", "variance_epsilon")
_RMS_FORMS = ("llama", "t5", "gemma", "float")
_SPREADS = (1e-3, 0.1, 1.0, 30.0)  # of the rows of a probe: an eps counts in the first
# Dtypes of (input, weight): the first two tell the form, the others whether it holds there too.
_SAME = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
_MIXED = ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16))


class NormPlan(NamedTuple):
    """What a norm computes.

    Attributes:
        form: "layer", or a form of `rms_norm`.
        eps: the name of the attribute.
        mixed: the dtypes (input, weight), unlike each other, for which the form holds too, as
            strings.
    """

    form: str
    eps: str
    mixed: tuple[tuple[str, str], ...]


class NormCall(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    form: str

    def output(self, x: Tensor, impl: str) -> Tensor:
        if self.form == "layer":
            return layer_norm(x, self.weight, self.bias, self.eps, impl=impl)
        return rms_norm(x, self.weight, self.eps, form=self.form, impl=impl)


class Norm(Part):
    """The handler of norms of one class."""

    op = "norm"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        if not is_leaf(module) or _eps_name(module) is None:
            return False
        shapes = {name: p.ndim for name, p in module._parameters.items() if p is not None}
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return True
        return shapes == {"weight": 1} or shapes == {"weight": 1, "bias": 1}

    @staticmethod
    def read(module: Any, x: Tensor) -> NormCall | str:
        if reason := input_reason(x):
            return reason
        state = state_of(module)
        assert state is not None
        plan: NormPlan = state.plan
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        eps = getattr(module, plan.eps)
        if not isinstance(eps, (int, float)):
            return f"{plan.eps} is a {type(eps).__name__}"
        for name, value in (("weight", weight), ("bias", bias)):
            if value is None:
                continue
            if type(value) not in PLAIN_TENSORS:
                return f"its {name} is a {type(value).__name__}"
            if value.device != x.device:
                return f"its {name} is on {value.device}, the input on {x.device}"
            if value.dtype != x.dtype and (str(x.dtype), str(value.dtype)) not in plan.mixed:
                return f"its {name} is {value.dtype}, the input {x.dtype}"
        return NormCall(weight, bias, eps, plan.form)

    def op_of(self, plan: NormPlan) -> str:
        return "layer_norm" if plan.form == "layer" else "rms_norm"

    def unsupported(self, module: Any) -> list[str]:
        shape = getattr(module, "normalized_shape", (0,))
        if isinstance(shape, tuple) and len(shape) > 1:
            return [f"it normalises over {len(shape)} dimensions"]
        return []

    def find(self, module: Any) -> Comparison:
        eps_name = _eps_name(module)
        assert eps_name is not None
        if not isinstance(getattr(module, eps_name), (int, float)):
            return Comparison(unserved=f"its {eps_name} is not a number")
        forms = ("layer", *_RMS_FORMS) if module._parameters.get("bias") is None else ("layer",)
        best: tuple[float, int, str, tuple[tuple[str, str], ...]] | None = None
        for form in forms:
            errors = [self._error(module, eps_name, form, *dtypes) for dtypes in _SAME]
            if None in errors:
                continue
            mixed = tuple(
                (str(x), str(w))
                for x, w in _MIXED
                if form != "layer" and self._error(module, eps_name, form, x, w) is not None
            )
            found = errors[-1] or 0.0, -len(mixed), form, mixed
            if best is None or found[:2] < best[:2]:
                best = found
        if best is None:
            return Comparison(unserved="it computes none of the norms that have an op")
        _, _, form, mixed = best
        if form == "float" and defining_class(self.source).__module__.startswith("torch."):
            form = "torch"
        return Comparison(plan=NormPlan(form, eps_name, mixed))

    def _error(
        self, module: Any, eps_name: str, form: str, x_dtype: torch.dtype, dtype: torch.dtype
    ) -> float | None:
        """How far the op's output lies from the module's own; None beyond rounding."""
        normal = normal_on(CPU)
        columns = _columns(module)
        spread = torch.tensor(_SPREADS).view(-1, 1, 1)
        x = (normal(len(_SPREADS), 2, columns) * spread).to(x_dtype)
        given = {name: value is not None for name, value in module._parameters.items()}
        parameters = {
            name: nn.Parameter(normal(columns).to(dtype)) if there else None
            for name, there in given.items()
        }
        leaves = [x.requires_grad_(), *(p for p in parameters.values() if p is not None)]
        weight, bias = parameters.get("weight"), parameters.get("bias")
        call = NormCall(weight, bias, getattr(module, eps_name), form)
        with torch.enable_grad():
            view = shallow(module, self.source, _parameters=parameters)
            expected = self.source.forward(view, x.clone())
            if not isinstance(expected, Tensor):
                raise TypeError(f"it returns a {type(expected).__name__}")
            got = call.output(x, "reference")
        found = compared(expected.detach(), got.detach(), {expected.dtype}, "the module's")
        if found == Comparison() and x_dtype == dtype == torch.float32:
            found = gradients_compared(expected, got, leaves, "the module's")
        if found != Comparison():
            return None
        return (expected.double() - got.double()).abs().max().item()

    def impl_reasons(
        self, module: Any, impl: str, device: torch.device, dtype: torch.dtype
    ) -> list[str]:
        return norm_reasons(impl, device, dtype, _columns(module))


def _eps_name(module: nn.Module) -> str | None:
    return next((name for name in _EPS_NAMES if name in module.__dict__), None)


def _columns(module: Any) -> int:
    weight = module._parameters.get("weight")
    return module.normalized_shape[-1] if weight is None else weight.shape[0]
