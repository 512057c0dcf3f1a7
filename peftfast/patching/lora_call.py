"""One call of a PEFT LoRA linear: its operands, or why PEFT's own forward must run.

Nothing here is remembered: every parameter and setting is read at each call. Checked against the
forward of `peft.tuners.lora.Linear`, which is the same in PEFT 0.18 to 0.21:

    y = base(x) + sum_i s_i B_i(A_i(drop_i(x)))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from peftfast.ops import lora_linear
from peftfast.patching.forwards import bypass_reason

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
_AUTOCAST_CASTS = (torch.float32, torch.bfloat16, torch.float16)


class LoraCall(NamedTuple):
    """The operands of `peftfast.ops.lora_linear`, one entry of each list an active adapter."""

    weight: Tensor  # [out, in]
    base_bias: Tensor | None  # [out]
    lora_a: list[Tensor]  # [r, in]
    lora_b: list[Tensor]  # [out, r]
    lora_bias: list[Tensor | None]  # [out]
    scaling: list[float]
    dropout_p: list[float]
    sources: tuple[Tensor, ...]  # the parameters that all of this was read from

    def bias(self) -> Tensor | None:
        """b + sum_i s_i b_i, where adapters have biases of their own (lora_bias=True)."""
        bias = self.base_bias
        for own, factor in zip(self.lora_bias, self.scaling, strict=True):
            if own is not None:
                bias = own * factor if bias is None else bias + own * factor
        return bias

    def drops(self) -> bool:
        return any(p > 0 for p in self.dropout_p)

    def run(self, x: Tensor, impl: str) -> Tensor:
        return lora_linear(
            x, self.weight, self.bias(), self.lora_a, self.lora_b, self.scaling,
            dropout_p=self.dropout_p, impl=impl,
        )  # fmt: skip


def read_call(module: Any, x: Tensor) -> LoraCall | str:
    """What `module` computes of x, or why that is not for `lora_linear` to compute."""
    if type(x) not in _PLAIN_TENSORS:
        return f"the input is a {type(x).__name__}"
    if x.layout is not torch.strided or x.is_nested:
        return "the input is not a dense tensor"
    call = read_parameters(module)
    return call if isinstance(call, str) else operand_reason(x, call) or call


def read_parameters(module: Any) -> LoraCall | str:
    """What `module` computes, whatever its input, or why `lora_linear` does not."""
    if module._disable_adapters:
        return "adapters are disabled"
    if module.merged_adapters:
        return "adapters are merged"
    if not module.cast_input_dtype_enabled:
        return "casting of the input is switched off"
    base = module._modules["base_layer"]
    if reason := _base_reason(base):
        return reason
    weight, base_bias = base.weight, base.bias
    sources = [weight] if base_bias is None else [weight, base_bias]
    adapters_a, adapters_b = module._modules["lora_A"]._modules, module._modules["lora_B"]._modules
    a_list, b_list, bias_list, factors, probabilities = [], [], [], [], []
    for name in module.active_adapters:
        if name not in adapters_a:
            continue
        a, b, dropout = (
            adapters_a[name],
            adapters_b[name],
            module._modules["lora_dropout"]._modules[name],
        )
        if reason := _adapter_reason(module, name, a, b, dropout):
            return reason
        weight_a, weight_b, bias_b = a.weight, b.weight, b.bias
        a_list.append(weight_a)
        b_list.append(weight_b)
        bias_list.append(bias_b)
        sources += (weight_a, weight_b) if bias_b is None else (weight_a, weight_b, bias_b)
        factors.append(module.scaling[name])
        probabilities.append(dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0)
    if not a_list:
        return "no active adapter on this module"
    if type(base) is Conv1D:
        weight = weight.t()
    return LoraCall(
        weight, base_bias, a_list, b_list, bias_list, factors, probabilities, tuple(sources)
    )


def _base_reason(base: nn.Module) -> str | None:
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__}"
    if reason := bypass_reason(base):
        return f"the base layer {reason}"
    return None


def _adapter_reason(module: Any, name: str, a: Any, b: Any, dropout: Any) -> str | None:
    if name in module.lora_variant:
        return (
            f"adapter {name!r} uses a variant of LoRA, {type(module.lora_variant[name]).__name__}"
        )
    for role, child in (("lora_A", a), ("lora_B", b)):
        if type(child) is not nn.Linear:
            return f"{role} of adapter {name!r} is a {type(child).__name__}"
        if reason := bypass_reason(child):
            return f"{role} of adapter {name!r} {reason}"
    if a.bias is not None:
        return f"lora_A of adapter {name!r} has a bias"
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.inplace):
        return f"lora_dropout of adapter {name!r} is a {dropout}"
    if reason := bypass_reason(dropout):
        return f"lora_dropout of adapter {name!r} {reason}"
    if not isinstance(module.scaling[name], (int, float)):
        return f"scaling of adapter {name!r} is a {type(module.scaling[name]).__name__}"
    return None


def operand_reason(x: Tensor, call: LoraCall) -> str | None:
    """What `lora_linear` does not take, or PEFT gives another meaning: kinds, devices, dtypes."""
    device, dtype = x.device, x.dtype
    if device.type == "meta" or not dtype.is_floating_point:
        return f"the input is {dtype} on {device.type}"
    base_dtypes: tuple[torch.dtype, ...] = (dtype,)
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        base_dtypes = _AUTOCAST_CASTS
    for name, values, dtypes in (
        ("the base layer's weight", (call.weight,), base_dtypes),
        ("the base layer's bias", (call.base_bias,), base_dtypes),
        ("lora_A", call.lora_a, (dtype, torch.float32)),
        ("lora_B", call.lora_b, (dtype, torch.float32)),
        ("lora_B's bias", call.lora_bias, base_dtypes),
    ):
        for value in values:
            if value is None:
                continue
            if type(value) not in _PLAIN_TENSORS:
                return f"{name} is a {type(value).__name__}"
            if value.device != device:
                return f"{name} is on {value.device}, the input on {device}"
            if value.dtype not in dtypes:
                return f"{name} is {value.dtype}, the input {x.dtype}"
    return None
