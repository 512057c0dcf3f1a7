"""One call of a PEFT LoRA linear: its operands, or why PEFT's own forward must run.

Every parameter and setting is read at each call (of a 4-bit weight, what was checked is kept: see
`four_bit`). Checked against the forwards of `peft.tuners.lora.Linear` and of its relative over
4-bit bases, which are the same in PEFT 0.18 to 0.21:

    y = base(x) + sum_i s_i B_i(A_i(drop_i(x)))

with the sum in the dtype of base(x). That is x's, or autocast's over a dense base under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.ops import lora_linear
from peftfast.ops.nf4 import NF4Weight
from peftfast.ops.operands import autocast_dtype
from peftfast.patching.bases import read_base
from peftfast.patching.forwards import bypass_reason
from peftfast.patching.inputs import (
    PLAIN_TENSORS,
    SHORT_DTYPES,
    cast_after,
    four_bit_reason,
    input_reason,
)
from peftfast.patching.state import state_of


class LoraCall(NamedTuple):
    """The operands of `peftfast.ops.lora_linear`, one entry of each list an active adapter.

    `out_dtype` is what the op's output is cast to, where that differs from what the op gives;
    `biases_after`: the adapters' biases are added to that output, not to the base's bias;
    `compress`: what is kept for gradients of A and B alone is kept in 8 bits a value.
    """

    weight: Tensor | NF4Weight  # [out, in]
    base_bias: Tensor | None  # [out]
    lora_a: list[Tensor]  # [r, in]
    lora_b: list[Tensor]  # [out, r]
    lora_bias: list[Tensor | None]  # [out]
    scaling: list[float]
    dropout_p: list[float]
    sources: tuple[Tensor, ...]  # the tensors that all of this was read from
    out_dtype: torch.dtype | None = None
    biases_after: bool = False
    compress: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's product, unless the input decides it."""
        weight = self.weight
        return weight.dtype if isinstance(weight, Tensor) else weight.compute_dtype or weight.dtype

    def input_dtypes(self) -> tuple[torch.dtype, ...]:
        """What inputs such a linear meets: over 4 bits float32 too, from float32 norms."""
        own = self.dtype
        float32_too = isinstance(self.weight, NF4Weight) and own != torch.float32
        return (own, torch.float32) if float32_too else (own,)

    def rounded_to(self, x: Tensor) -> set[torch.dtype]:
        """The dtypes that values on the way from x to the output have."""
        return {x.dtype, self.dtype, *(t.dtype for t in (*self.lora_a, *self.lora_b))}

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the output depends on besides tensors."""
        weight = self.weight
        computes_in = weight.compute_dtype if isinstance(weight, NF4Weight) else None
        return self.scaling, self.dropout_p, computes_in

    def bias(self) -> Tensor | None:
        """b + sum_i s_i b_i, where adapters have biases of their own (lora_bias=True)."""
        bias = self.base_bias
        if not self.biases_after:
            for term in self._bias_terms():
                bias = term if bias is None else bias + term
        return bias

    def _bias_terms(self) -> list[Tensor]:
        terms = zip(self.lora_bias, self.scaling, strict=True)
        return [own * factor for own, factor in terms if own is not None]

    def drops(self) -> bool:
        return any(p > 0 for p in self.dropout_p)

    def run(self, x: Tensor, impl: str) -> Tensor:
        """The op's output, of which `finish` makes the module's."""
        return lora_linear(
            x, self.weight, self.bias(), self.lora_a, self.lora_b, self.scaling,
            dropout_p=self.dropout_p, compress=self.compress, impl=impl,
        )  # fmt: skip

    def finish(self, y: Tensor) -> Tensor:
        if self.biases_after:
            for term in self._bias_terms():
                y = y + term
        return y if self.out_dtype is None else y.to(self.out_dtype)

    def output(self, x: Tensor, impl: str) -> Tensor:
        return self.finish(self.run(x, impl))


def read_call(module: Any, x: Tensor) -> LoraCall | str:
    """What `module` computes of x, or why that is not for `lora_linear` to compute."""
    if reason := input_reason(x):
        return reason
    call = read_parameters(module, x)
    if isinstance(call, str):
        return call
    if reason := operand_reason(x, call):
        return reason
    if autocast_dtype(x) is None and any(
        b is not None and b.dtype != x.dtype for b in call.lora_bias
    ):  # float32 ones over 16 bits, which PEFT adds before it rounds
        call = call._replace(out_dtype=x.dtype, biases_after=True)
    if isinstance(call.weight, Tensor):
        return call
    own = call.weight.compute_dtype or x.dtype
    after = call.biases_after or own != x.dtype
    return call._replace(out_dtype=cast_after(x) or call.out_dtype, biases_after=after)


def read_parameters(module: Any, x: Tensor | None = None) -> LoraCall | str:
    """What `module` computes, or why `lora_linear` does not; x: the input, where there is one."""
    if module._disable_adapters:
        return "adapters are disabled"
    if module.merged_adapters:
        return "adapters are merged"
    if not module.cast_input_dtype_enabled:
        return "casting of the input is switched off"
    state = state_of(module)
    base = read_base(module._modules["base_layer"], x, state)
    if isinstance(base, str):
        return base
    sources = list(base.sources)
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
    return LoraCall(
        base.weight, base.bias, a_list, b_list, bias_list, factors, probabilities, tuple(sources),
        compress=state is not None and state.memory == "compress",
    )  # fmt: skip


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
    if isinstance(call.weight, NF4Weight) and (reason := four_bit_reason(x, call.weight)):
        return reason
    autocast = autocast_dtype(x)
    dtype = autocast or x.dtype
    cast_dtypes = (dtype,) if autocast is None else SHORT_DTYPES
    for name, values, dtypes in (
        *_base_operands(call, cast_dtypes),
        ("lora_A", call.lora_a, (dtype, torch.float32)),
        ("lora_B", call.lora_b, (dtype, torch.float32)),
        ("lora_B's bias", call.lora_bias, (*cast_dtypes, torch.float32)),
    ):
        for value in values:
            if value is None:
                continue
            if type(value) not in PLAIN_TENSORS:
                return f"{name} is a {type(value).__name__}"
            if value.device != x.device:
                return f"{name} is on {value.device}, the input on {x.device}"
            if value.dtype not in dtypes:
                return f"{name} is {value.dtype}, the input {x.dtype}"
    return None


def _base_operands(
    call: LoraCall, dtypes: tuple[torch.dtype, ...]
) -> list[tuple[str, Sequence[Tensor | None], tuple[torch.dtype, ...]]]:
    """The base layer's dense operands by name, each with the dtypes that it may have."""
    bias = (call.base_bias,)
    if isinstance(call.weight, Tensor):
        return [
            ("the base layer's weight", (call.weight,), dtypes),
            ("the base layer's bias", bias, dtypes),
        ]
    return [("the base layer's bias", bias, SHORT_DTYPES)]
