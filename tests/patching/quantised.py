"""Tiny models over bitsandbytes' 4-bit linears, quantised on the CPU, and their float64 truth."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.patching.tiny import (
    FAMILIES,
    VOCAB,
    assert_as_good,
    copy_of,
    decoder,
    randomise,
    train_step,
)

HALF = torch.bfloat16

# Inputs of a multiple of the block size: others bitsandbytes 0.50 dequantises with the wrong scales
# on a CPU with AVX-512.
_SIZES = dict(hidden_size=64, intermediate_size=128)
MODELS = {
    "llama": decoder("LlamaForCausalLM", "LlamaConfig", **_SIZES),
    "qwen2": decoder("Qwen2ForCausalLM", "Qwen2Config", **_SIZES),  # with biases
    "bert": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=VOCAB, **_SIZES, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
}  # fmt: skip


def linear4bit(linear: nn.Linear, **settings: Any) -> Any:
    """The 4-bit linear of a dense one."""
    bias = linear.bias is not None
    kind = settings.pop("kind", bnb.nn.Linear4bit)
    if kind is bnb.nn.Linear4bit:
        settings.setdefault("quant_type", "nf4")
    block_size = settings.pop("block_size", None)
    made = kind(linear.in_features, linear.out_features, bias=bias, **settings)
    with torch.no_grad():
        made.weight.data = linear.weight.data.clone()
        if bias:
            made.bias = linear.bias
    if block_size is not None:
        made.weight.blocksize = block_size
    made.requires_grad_(False)
    return made.to("cpu")


def quantise(model: Any, skip: tuple[str, ...] = ("lm_head", "classifier"), **settings: Any) -> Any:
    """Every linear of `model` in 4 bits, in place, as transformers does it."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path.rpartition(".")[2] not in skip:
            model.set_submodule(path, linear4bit(module, **settings))
    model.is_loaded_in_4bit = True
    return model


class Attention(nn.Module):
    """q, k, v over one input, and o; those named are in 4 bits."""

    is_loaded_in_4bit = True

    def __init__(self, quantised: str, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        for name in "qkvo":
            linear: nn.Module = nn.Linear(64, 64)
            if name in quantised:
                linear = linear4bit(linear, compute_dtype=compute_dtype)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) + self.k(x) * self.v(x)))


def base_model(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A tiny quantised model without adapters, all of its parameters random."""
    torch.manual_seed(0)
    model = MODELS[family]()
    randomise(model)
    return quantise(model.to(dtype), **settings).eval()


def qlora(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    adapters: torch.dtype = torch.float32,
    lora: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A tiny PEFT model over 4-bit linears, with random adapters; `dtype` is of all the rest."""
    model = base_model(family, dtype, **settings)
    targets = list(FAMILIES[family].targets)
    config = {"r": 4, "lora_alpha": 6, "target_modules": targets, **(lora or {})}
    model = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    torch.manual_seed(1)
    return randomise(model).eval()


def dense(linear: Any) -> nn.Linear:
    """A float64 linear with the values that a 4-bit one computes with."""
    state = copy.copy(linear.weight.quant_state)
    state.dtype = linear.compute_dtype or state.dtype  # which they are rounded to
    values = bnb.functional.dequantize_4bit(linear.weight.data, state)
    has_bias = linear.bias is not None
    shape = linear.in_features, linear.out_features
    made = nn.Linear(*shape, bias=has_bias, dtype=torch.float64, device=values.device)
    with torch.no_grad():
        made.weight.copy_(values.double())
        if has_bias:
            made.bias.copy_(linear.bias.double())
    return made.requires_grad_(False)


def exact_copy(model: Any) -> Any:
    """The same model in float64, over the dequantised weights."""
    exact = copy_of(model)
    for path, module in list(exact.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            exact.set_submodule(path, dense(module))
    return exact.double()


def step_is_as_good(model: Any, peft: Any, inputs: dict[str, Tensor]) -> None:
    """One training step of `model` against the same step of `peft`, judged in float64."""
    expected = train_step(peft, inputs)  # first: it settles what bitsandbytes computes in
    exact = train_step(exact_copy(peft), inputs)
    assert_as_good(train_step(model, inputs), expected, exact)


def linears4bit(model: nn.Module) -> dict[str, Any]:
    """Every 4-bit linear of bitsandbytes in `model`, under an adapter or not."""
    return {p: m for p, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def adapted_linears(model: nn.Module) -> dict[str, Any]:
    """Every LoRA linear over a 4-bit one."""
    from peft.tuners.lora.bnb import Linear4bit

    return {p: m for p, m in model.named_modules() if isinstance(m, Linear4bit)}
