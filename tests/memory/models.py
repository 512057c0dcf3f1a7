"""Small configurations of six families, and real steps of theirs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    T5Config,
)

VOCABULARY = 512


def config(family: str, layers: int = 3) -> Any:
    """A configuration of a few hundred thousand parameters."""
    if family == "llama":
        return LlamaConfig(
            hidden_size=128, intermediate_size=352, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        )  # fmt: skip
    if family == "qwen3":
        return Qwen3Config(
            hidden_size=128, intermediate_size=352, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=VOCABULARY,
        )  # fmt: skip
    if family == "gemma3":
        return Gemma3TextConfig(
            hidden_size=128, intermediate_size=352, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=VOCABULARY,
            sliding_window=64,
        )  # fmt: skip
    if family == "bert":
        return BertConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=layers,
            num_attention_heads=4, vocab_size=VOCABULARY, architectures=["BertForMaskedLM"],
        )  # fmt: skip
    if family == "gpt2":
        return GPT2Config(
            n_embd=128, n_layer=layers, n_head=4, vocab_size=VOCABULARY, n_positions=512,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    found = T5Config(
        d_model=128, d_ff=512, num_layers=layers, num_heads=4, d_kv=32, vocab_size=VOCABULARY
    )
    found.decoder_start_token_id = 0
    return found


def batch_of(batch: int, seq: int) -> dict[str, torch.Tensor]:
    """What a trainer gives a model, every token the same."""
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.ones(batch, seq, dtype=torch.int64) for name in names}
