"""Tiny models whose loss is computed without logits, beside the unpatched ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peftfast.patching import head, patch
from peftfast.patching.deferred_logits import Record
from tests.patching.tiny import VOCAB, adapted, copy_of, decoder, inputs_of, randomise


def pair(family: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """A patched model whose head defers, and the unpatched one of the same numbers."""
    plain = adapted(family, **settings)
    return joined(copy_of(plain)), plain


def joined(model: Any) -> Any:
    patch(model)
    head.join(model)
    return model


def made(name: str, **settings: Any) -> tuple[Any, Any]:
    """The same for models that `tiny` has no family of."""
    torch.manual_seed(0)
    model, targets = _MAKERS[name]()
    config: dict[str, Any] = dict(r=4, lora_alpha=6, target_modules=targets)
    plain = randomise(get_peft_model(model, LoraConfig(**{**config, **settings}))).eval()
    return joined(copy_of(plain)), plain


def _gemma2() -> tuple[nn.Module, list[str]]:
    make = decoder(
        "Gemma2ForCausalLM", "Gemma2Config", head_dim=8, query_pre_attn_scalar=8,
        final_logit_softcapping=0.5, sliding_window=4,
    )  # fmt: skip
    return make(), ["q_proj", "v_proj"]


def _granite() -> tuple[nn.Module, list[str]]:
    return decoder("GraniteForCausalLM", "GraniteConfig", logits_scaling=0.25)(), ["q_proj"]


def _cohere() -> tuple[nn.Module, list[str]]:
    return decoder("CohereForCausalLM", "CohereConfig", logit_scale=4.0)(), ["q_proj"]


def _bert() -> tuple[nn.Module, list[str]]:
    config = hf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForMaskedLM(config), ["query", "value"]


_MAKERS = {"gemma2": _gemma2, "granite": _granite, "cohere": _cohere, "bert": _bert}


def record(model: nn.Module) -> Record:
    """Of the only head in `model`."""
    found = [m.__dict__["_peftfast_head"] for m in model.modules() if "_peftfast_head" in vars(m)]
    assert len(found) == 1
    return found[0]


def padded(family: str = "llama") -> dict[str, Tensor]:
    """Inputs with labels, some of them ignored."""
    inputs = inputs_of(family, rows=3)
    inputs["labels"][0, :3] = -100
    inputs["labels"][2, 4:] = -100
    return inputs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same_gradients(model: nn.Module, plain: nn.Module) -> None:
    ours, theirs = gradients(model), gradients(plain)
    assert ours.keys() == theirs.keys() and ours
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=name)
