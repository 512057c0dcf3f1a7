"""Tiny models from configuration, random non-zero adapters, and the comparison with PEFT."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

VOCAB = 60


@dataclasses.dataclass(frozen=True)
class Family:
    """How to make one architecture, what LoRA targets in it, and how many modules that is."""

    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    modules: int
    siblings: int = 0  # groups of modules that read one input
    seq2seq: bool = False
    classifies: bool = False
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)


def decoder(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    defaults = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return lambda: getattr(hf, model)(getattr(hf, config)(**{**defaults, **settings}))


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family(decoder("LlamaForCausalLM", "LlamaConfig"), _ATTENTION + _MLP, 14, 4),
    "mistral": Family(decoder("MistralForCausalLM", "MistralConfig"), _ATTENTION + _MLP, 14, 4),
    "qwen2": Family(decoder("Qwen2ForCausalLM", "Qwen2Config"), _ATTENTION + _MLP, 14, 4),
    "qwen3": Family(
        decoder("Qwen3ForCausalLM", "Qwen3Config", head_dim=12), _ATTENTION + _MLP, 14, 4
    ),
    "gemma3": Family(
        decoder(
            "Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=16, query_pre_attn_scalar=16,
            sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        ),
        _ATTENTION + _MLP, 14, 4,
    ),
    "phi3": Family(
        decoder("Phi3ForCausalLM", "Phi3Config"),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), 8,
    ),
    "gpt2": Family(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32,
                bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        ),
        ("c_attn", "c_proj", "c_fc"), 8, lora=dict(fan_in_fan_out=True),
    ),
    "opt": Family(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32,
                dropout=0.0, pad_token_id=0,
            )
        ),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), 12, 2,
    ),
    "bert": Family(
        lambda: hf.BertForSequenceClassification(
            hf.BertConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=32, num_labels=3,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        ),
        ("query", "key", "value", "dense"), 13, 2, classifies=True,
    ),
    "roberta": Family(
        lambda: hf.RobertaForSequenceClassification(
            hf.RobertaConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=40, num_labels=3, pad_token_id=0,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        ),
        ("query", "key", "value"), 6, 2, classifies=True,
    ),
    "t5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
                num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        ),
        ("q", "k", "v", "o", "wi_0", "wi_1", "wo"), 36, 10, seq2seq=True,
    ),
    "qwen3_moe": Family(
        decoder(
            "Qwen3MoeForCausalLM", "Qwen3MoeConfig", head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1,
            experts_implementation="eager",
        ),
        _ATTENTION, 8, 2,
        lora=dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
}  # fmt: skip


def adapted(family: str = "llama", **settings: Any) -> Any:
    """A tiny PEFT model in evaluation mode, every parameter random (B and biases too)."""
    torch.manual_seed(0)
    recipe = FAMILIES[family]
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(recipe.targets), **recipe.lora}
    model = get_peft_model(recipe.make(), LoraConfig(**{**config, **settings}))
    return randomise(model).eval()


def randomise(model: Any) -> Any:
    """Give adapters and biases values that matter: a zero B tests nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def inputs_of(family: str = "llama", rows: int = 2, columns: int = 7) -> dict[str, Tensor]:
    recipe = FAMILIES[family]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, columns), generator=generator)
    labels = ids.clone()
    if recipe.classifies:
        labels = torch.arange(rows) % 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def lora_linears(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if isinstance(m, lora.Linear)}


def copy_of(model: Any) -> Any:
    """PEFT's own model with the same numbers: the oracle."""
    return copy.deepcopy(model)


def train_step(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and every gradient of one forward and backward."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    output.loss.backward()
    results = {"logits": output.logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[name] = parameter.grad.detach().clone()
    return results


def assert_as_good(
    got: dict[str, Tensor], peft: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Errors against float64 are at most twice PEFT's own, plus one rounding.

    PEFT's own error is the largest relative one among all gradients: a single tensor's may be
    small by luck. A gradient that is zero in theory (a key's bias, under softmax) must be lost in
    the others'.
    """
    assert got.keys() == peft.keys() == exact.keys()
    norm = torch.linalg.vector_norm
    largest = max(float(norm(truth)) for truth in exact.values())
    kinds: dict[str, list[str]] = {}
    for name, truth in exact.items():
        assert got[name].dtype == peft[name].dtype, name
        if norm(truth) > 1e-10 * largest:
            kinds.setdefault("logits" if name == "logits" else "gradients", []).append(name)
        else:
            assert norm(got[name].double()) <= torch.finfo(got[name].dtype).eps * largest, name
    for names in kinds.values():
        error, own = (
            {n: float(norm(t[n].double() - exact[n]) / norm(exact[n])) for n in names}
            for t in (got, peft)
        )
        for name in names:
            allowed = 2 * max(own.values()) + torch.finfo(got[name].dtype).eps
            assert error[name] <= allowed, f"{name}: {error[name]:.3e}, allowed {allowed:.3e}"


def step_is_as_good(model: Any, peft: Any, inputs: dict[str, Tensor]) -> None:
    """One training step of `model` against the same step of `peft`, judged in float64."""
    exact = train_step(copy_of(peft).double(), inputs)
    assert_as_good(train_step(model, inputs), train_step(peft, inputs), exact)


LAYER_OPS = ("lora_linear", "nf4_linear")


def layers_of(entries: Any) -> list[Any]:
    """Of a report's fused modules those that are layers, not parts around them."""
    return [entry for entry in entries if entry.op in LAYER_OPS]


def fused_layers(model: nn.Module) -> list[Any]:
    from peftfast.patching import report

    return layers_of(report(model).fused)


def left_layers(model: nn.Module) -> list[Any]:
    """Of a report's modules that are not fused those that are layers."""
    from peftfast.patching import report

    return [
        entry
        for entry in report(model).not_fused
        if entry.type.startswith(("peft.", "bitsandbytes.", "peftfast.patching.bnb_linear4bit"))
    ]


def fused_parts(model: nn.Module) -> list[Any]:
    from peftfast.patching import report

    return [entry for entry in report(model).fused if entry.op not in LAYER_OPS]


def total_hits(model: nn.Module) -> int:
    return sum(entry.hits for entry in fused_layers(model))
