"""Llama-shaped models with random weights, and copies of one base that share its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig


@dataclass(frozen=True)
class Size:
    """A model and the batch that it is trained on."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.sequence


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 512, 1408, 4, 8, 4, 4096, 4, 256),
        Size("160M", 768, 2048, 12, 12, 12, 32000, 16, 1024),
        Size("1B", 2048, 8192, 16, 32, 8, 128256, 4, 1024),
        Size("3B", 3072, 8192, 28, 24, 8, 128256, 4, 1024),
        Size("8B", 4096, 14336, 32, 32, 8, 128256, 4, 1024),
    )
}
RANK = 16


def base_model(size: Size, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model with random weights."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.sequence,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def with_adapters(base: nn.Module, dropout_p: float, *, widened: bool) -> nn.Module:
    """PEFT's LoRA over every linear of a copy of `base` that shares its weights.

    `widened` is PEFT's `autocast_adapter_dtype`: float32 adapters over a 16-bit base. A and B get
    the same random numbers in every copy, and B is not zero.
    """
    shared: dict[int, Any] = {id(t): t for t in [*base.parameters(), *base.buffers()]}
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout_p, target_modules="all-linear"
    )
    model: Any = get_peft_model(copy.deepcopy(base, shared), config, autocast_adapter_dtype=widened)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values)
    return model.train()


def compile_layers(model: nn.Module) -> None:
    """Compiles each decoder layer in place; the layers are alike: one compilation serves all.

    What was compiled before is forgotten, so that its variety can't use up the limit of
    recompilations, beyond which PyTorch runs uncompiled.
    """
    torch.compiler.reset()
    decoder: Any = model
    for layer in decoder.get_base_model().model.layers:
        layer.compile()


def token_batches(size: Size, device: torch.device, count: int) -> list[Tensor]:
    """`count` batches of random tokens, [batch, sequence]."""
    generator = torch.Generator(device).manual_seed(2)
    shape = (size.batch, size.sequence)
    return [
        torch.randint(size.vocabulary, shape, generator=generator, device=device)
        for _ in range(count)
    ]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_and_gradients(model: nn.Module, tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """The loss, and the gradients of all adapters as one vector; dropout follows from `seed`."""
    torch.manual_seed(seed)
    loss = model(input_ids=tokens, labels=tokens).loss
    gradients = torch.autograd.grad(loss, trainable(model))
    return {
        "loss": loss.detach(),
        "gradients": torch.cat([gradient.double().flatten() for gradient in gradients]),
    }
