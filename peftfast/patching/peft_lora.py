"""PEFT's LoRA over `nn.Linear` and transformers' `Conv1D`: the fused class and its handler."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from peftfast.ops import lora_linear
from peftfast.patching.bases import read_base, view_of
from peftfast.patching.forwards import replaced_forwards
from peftfast.patching.fused import fused_forward
from peftfast.patching.handlers import ClassSwap, Comparison
from peftfast.patching.lora_call import LoraCall, operand_reason, read_call, read_parameters
from peftfast.patching.probe import (
    ROWS,
    Normal,
    compared,
    elsewhere,
    normal_on,
    one_element,
    shallow,
)
from peftfast.patching.state import State, state_of


def compute(module: Any, state: State, call: LoraCall, x: Tensor) -> Tensor:
    """A fused LoRA linear's output, together with its siblings where it has any."""
    if state.siblings is None:
        return call.output(x, state.impl)
    return state.siblings.compute(module, state, call, x, read_call)


class FusedLoraLinear(lora.Linear):
    """PEFT's `lora.Linear`, run as one op where that computes the same.

    Modules become one by `patch` only, which sets `__class__`; parameters, submodules and
    attributes stay the very same objects. Elsewhere PEFT's own forward runs, and is counted with a
    reason.
    """

    forward = fused_forward(lora.Linear, read_call, compute)


class PeftLora(ClassSwap):
    """The handler of one of PEFT's LoRA linears, `source`, fused as `fused`."""

    op = "lora_linear"
    is_method = True
    has_siblings = True

    def __init__(self, source: type[nn.Module], fused: type[nn.Module]) -> None:
        self.name = f"peft's lora.{source.__name__}"
        self.source, self.fused = source, fused

    def unsupported(self, module: Any) -> list[str]:
        """Why no op computes what this module does, whatever state it is in."""
        variants = module.lora_variant
        names = list(module.lora_A)
        if names and all(name in variants for name in names):
            return [
                f"adapter {name!r} uses a variant of LoRA, {type(variants[name]).__name__}"
                for name in names
            ]
        return []

    def obstacles(self, module: Any) -> list[str]:
        """Why this instance can't be fused as it is now, though its kind can."""
        reasons = replaced_forwards(module, self.source, self.name)
        call = read_parameters(self._enabled(module))
        if isinstance(call, str):
            return [*reasons, call]
        if not elsewhere(module):
            found = [self._operand_reason(call, dtype) for dtype in call.input_dtypes()]
            if all(found):  # no input that it meets would be the op's
                reasons += found[:1]
        return reasons

    def _operand_reason(self, call: LoraCall, dtype: torch.dtype) -> str:
        x = torch.empty(0, call.weight.shape[1], dtype=dtype, device=call.weight.device)
        with torch.autocast(x.device.type, enabled=False):
            return operand_reason(x, call) or ""

    def compare(self, module: Any, impl: str) -> Comparison:
        """The fused op's output against PEFT's own forward on small random inputs.

        Both take random A and B in place of the module's own (B is zero at first, and would show
        nothing), with dropout off. The module, its parameters, its flags and every random
        generator are left as they are.

        Raises:
            ImplUnavailable: `impl` was named and can't serve this module.
        """
        if unchecked := elsewhere(module):
            return Comparison(unchecked=unchecked)
        plain = self._enabled(module)
        call = read_parameters(plain)
        if isinstance(call, str):
            return Comparison(difference=call)
        device = call.weight.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for dtype in call.input_dtypes():
                if self._operand_reason(call, dtype):
                    continue  # an input that PEFT's forward would be called for
                normal = normal_on(device)
                x = normal(ROWS, module.in_features).to(dtype)
                probe = self._with_random_adapters(plain, normal, x)
                own = read_call(probe, x)
                if isinstance(own, str):
                    return Comparison(difference=own)
                expected, got = self.source.forward(probe, x), own.output(x, impl)
                found = compared(expected, got, own.rounded_to(x), "PEFT's")
                if found != Comparison():
                    return found
        return Comparison()

    def prepare(self, module: Any) -> None:
        """Look at what a compiled call of this module, fused now, could not look at."""
        read_base(module._modules["base_layer"], None, state_of(module))

    def require(self, impl: str, modules: Iterable[Any]) -> None:
        """Raise ImplUnavailable where `impl`, asked for by name, can't serve these modules."""
        kinds = {}
        for module in modules:
            call = read_parameters(self._enabled(module))
            if isinstance(call, LoraCall) and call.weight.device.type != "meta":
                kinds[call.weight.device, call.dtype, type(call.weight)] = call
        for (device, dtype, _), call in kinds.items():
            one = torch.ones(1, 1, device=device, dtype=dtype)
            weight = one if isinstance(call.weight, Tensor) else one_element(call.weight)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                lora_linear(one, weight, None, one, one, 1.0, impl=impl)

    def _enabled(self, module: Any) -> Any:
        """A view of `module` with every plain adapter active, nothing merged or disabled."""
        names = [name for name in module.lora_A if name not in module.lora_variant]
        return shallow(
            module,
            self.source,
            _disable_adapters=False,
            merged_adapters=[],
            _active_adapter=names,
            _modules={**module._modules, "base_layer": view_of(module._modules["base_layer"])},
        )

    def _with_random_adapters(self, module: Any, normal: Normal, x: Tensor) -> Any:
        """A view of `module` with random adapters that give about as much as its base layer."""
        base_spread = module.base_layer(x).float().std().item() or 1.0
        lora_a: dict[str, nn.Module] = {}
        lora_b: dict[str, nn.Module] = {}
        dropout: dict[str, nn.Module] = {}
        for name in module.active_adapters:
            a, b = module.lora_A[name], module.lora_B[name]
            rank = a.weight.shape[0]
            scale = base_spread / (abs(module.scaling[name]) or 1.0)
            lora_a[name] = _with_weights(a, normal(*a.weight.shape) / math.sqrt(module.in_features))
            bias = None if b.bias is None else normal(*b.bias.shape) * scale
            lora_b[name] = _with_weights(b, normal(*b.weight.shape) * scale / math.sqrt(rank), bias)
            dropout[name] = nn.Identity()
        modules = {
            "lora_A": nn.ModuleDict(lora_a),
            "lora_B": nn.ModuleDict(lora_b),
            "lora_dropout": nn.ModuleDict(dropout),
        }
        return shallow(module, self.source, _modules={**module._modules, **modules})


def _with_weights(linear: Any, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    parameters = {
        "weight": nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False),
        "bias": None
        if bias is None
        else nn.Parameter(bias.to(linear.bias.dtype), requires_grad=False),
    }
    view: nn.Module = shallow(linear, type(linear), _parameters=parameters)
    return view


HANDLERS = [PeftLora(lora.Linear, FusedLoraLinear)]
