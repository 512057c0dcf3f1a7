"""What the README shows is what runs."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peftfast

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_report_shown_is_the_one_printed() -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, target_modules=[*linears, "embed_tokens"])
    )
    peftfast.patch(model)
    tokens = torch.randint(0, 128, (2, 16))
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
    text = README.read_text()
    shown = text[text.index("```\nfused (") + 4 :].partition("\n```")[0]
    assert shown == str(peftfast.report(model)).rstrip()
