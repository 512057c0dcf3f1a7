"""PEFT's LoRA over `nn.Linear` and transformers' `Conv1D`: the fused class and its handler."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from peftfast.patching.forwards import replaced_forward
from peftfast.patching.handlers import Comparison
from peftfast.patching.lora_call import LoraCall, operand_reason, read_call, read_parameters
from peftfast.patching.state import KEY, State
from peftfast.patching.surroundings import transform_reason

_PROBE_ROWS = 4
_ROUNDINGS = 16


class FusedLoraLinear(lora.Linear):
    """PEFT's `lora.Linear`, run as one op where that computes the same.

    Modules become one by `patch` only, which sets `__class__`; parameters, submodules and
    attributes stay the very same objects. Elsewhere PEFT's own forward runs, and is counted with a
    reason.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: State | None = getattr(self, KEY, None)
        if state is None:  # unpatched, while something still holds this bound method
            return lora.Linear.forward(self, x, *args, **kwargs)
        compiling = torch.compiler.is_compiling()
        reason: str | None = None
        if args or kwargs:
            reason = "called with arguments besides the input"
        elif not compiling:
            reason = transform_reason()
        elif not torch.compiler.is_dynamo_compiling():  # is_exporting() is wrong in torch 2.11
            reason = "inside torch.export"
        call = read_call(self, x) if reason is None else reason
        if isinstance(call, str):
            if not compiling:
                state.delegated(call)
            return lora.Linear.forward(self, x, *args, **kwargs)
        if compiling:
            return call.run(x, state.impl)
        if state.siblings is None:
            y = call.run(x, state.impl)
        else:
            y = state.siblings.compute(self, state, call, x, read_call)
        state.hits += 1
        return y


class PeftLoraLinear:
    """The handler of `peft.tuners.lora.Linear`."""

    op = "lora_linear"
    source: type[nn.Module] = lora.Linear
    fused: type[nn.Module] = FusedLoraLinear

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
        reasons = []
        if lora.Linear.forward.__module__ != lora.Linear.__module__:
            reasons.append(f"lora.Linear.forward was replaced, by {lora.Linear.forward.__module__}")
        if reason := replaced_forward(module, type(module).forward):
            reasons.append(reason)
        call = read_parameters(_enabled(module))
        if isinstance(call, str):
            return [*reasons, call]
        if not _elsewhere(module):
            weight = call.weight
            x = torch.empty(0, module.in_features, dtype=weight.dtype, device=weight.device)
            with torch.autocast(weight.device.type, enabled=False):
                reason = operand_reason(x, call)
            if reason:
                reasons.append(reason)
        return reasons

    def compare(self, module: Any, impl: str) -> Comparison:
        """The fused op's output against PEFT's own forward on a small random input.

        Both take random A and B in place of the module's own (B is zero at first, and would show
        nothing), with dropout off. The module, its parameters, its flags and every random
        generator are left as they are.

        Raises:
            ImplUnavailable: `impl` was named and can't serve this module.
        """
        if unchecked := _elsewhere(module):
            return Comparison(unchecked=unchecked)
        weight = module.get_base_layer().weight
        generator = torch.Generator(weight.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=weight.device)

        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            x = normal(_PROBE_ROWS, module.in_features).to(weight.dtype)
            plain = _enabled(module)
            base_spread = plain.base_layer(x).float().std().item()
            probe = _with_random_adapters(plain, normal, base_spread)
            call = read_call(probe, x)
            if not isinstance(call, LoraCall):
                return Comparison(difference=call)
            expected = lora.Linear.forward(probe, x)
            got = call.run(x, impl)
        if not bool(expected.isfinite().all()):
            return Comparison(unchecked="PEFT's own output is not finite on a random input")
        if got.shape != expected.shape or got.dtype != expected.dtype:
            shapes = [f"{t.dtype} {list(t.shape)}" for t in (expected, got)]
            return Comparison(difference="its output is {1}, PEFT's {0}".format(*shapes))
        largest = expected.double().abs().max().item()
        apart = (got.double() - expected.double()).abs().max().item()
        allowed = _ROUNDINGS * max(_rounding(t) for t in call.sources) * largest
        if not apart <= allowed:
            return Comparison(
                difference=f"its output differs from PEFT's by {apart:.2e} on a random input"
                f" (allowed: {allowed:.2e})"
            )
        return Comparison()


def _elsewhere(module: Any) -> str:
    """Why there are no values to compute with now, though a call may bring them; "" else."""
    for parameter in module.parameters():
        if parameter.device.type == "meta":
            return "parameters are on the meta device"
        if isinstance(parameter, FakeTensor):
            return "parameters are fake tensors"
        if isinstance(parameter, DTensor):
            return "parameters are sharded"
    return ""


def _enabled(module: Any) -> Any:
    """A view of `module` with every plain adapter active, nothing merged and nothing disabled."""
    names = [name for name in module.lora_A if name not in module.lora_variant]
    return _shallow(
        module, lora.Linear, _disable_adapters=False, merged_adapters=[], _active_adapter=names
    )


def _with_random_adapters(module: Any, normal: Any, base_spread: float) -> Any:
    """A view of `module` with random adapters that contribute about as much as the base layer."""
    lora_a: dict[str, nn.Module] = {}
    lora_b: dict[str, nn.Module] = {}
    dropout: dict[str, nn.Module] = {}
    for name in module.active_adapters:
        a, b = module.lora_A[name], module.lora_B[name]
        rank = a.weight.shape[0]
        scale = (base_spread or 1.0) / (abs(module.scaling[name]) or 1.0)
        lora_a[name] = _with_weights(a, normal(*a.weight.shape) / math.sqrt(module.in_features))
        bias = None if b.bias is None else normal(*b.bias.shape) * scale
        lora_b[name] = _with_weights(b, normal(*b.weight.shape) * scale / math.sqrt(rank), bias)
        dropout[name] = nn.Identity()
    modules = {
        "lora_A": nn.ModuleDict(lora_a),
        "lora_B": nn.ModuleDict(lora_b),
        "lora_dropout": nn.ModuleDict(dropout),
    }
    return _shallow(module, lora.Linear, _modules={**module._modules, **modules})


def _with_weights(linear: Any, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    parameters = {
        "weight": nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False),
        "bias": None
        if bias is None
        else nn.Parameter(bias.to(linear.bias.dtype), requires_grad=False),
    }
    return _shallow(linear, type(linear), _parameters=parameters)


def _shallow(module: Any, kind: type[nn.Module], **replaced: Any) -> Any:
    """A second object over `module`'s attributes, some replaced, without a forward of its own."""
    other = kind.__new__(kind)
    own = ("forward", "_old_forward", "_hf_hook", KEY)
    other.__dict__ = {k: v for k, v in module.__dict__.items() if k not in own} | replaced
    return other


def _rounding(parameter: Tensor) -> float:
    """One relative rounding; on a GPU float32 products may be in TF32, which has 10 bits."""
    if parameter.dtype == torch.float32 and parameter.device.type == "cuda":
        return 2.0**-10
    return torch.finfo(parameter.dtype).eps
