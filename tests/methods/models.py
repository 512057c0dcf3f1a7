"""Tiny models of many families from configuration, and what they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.patching.tiny import FAMILIES, VOCAB, decoder

SEQ2SEQ = ("t5", "bart", "whisper")


def _encoder(model: str, config: str, **settings: Any) -> Callable[[], Any]:
    defaults = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    return _made(model, config, **{**defaults, **settings})


def _made(model: str, config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**settings))


_SEQ2SEQ = dict(
    vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
    decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
)  # fmt: skip
_TEXT = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8,
    patch_size=4,
)  # fmt: skip
_GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=32, **_TEXT)

MODELS: dict[str, Callable[[], Any]] = {
    **{name: family.make for name, family in FAMILIES.items()},
    "distilbert": _made(
        "DistilBertModel", "DistilBertConfig", vocab_size=VOCAB, dim=32, hidden_dim=48, n_layers=2,
        n_heads=4, max_position_embeddings=40,
    ),
    "electra": _encoder("ElectraModel", "ElectraConfig", embedding_size=16),
    "deberta": _encoder(
        "DebertaV2Model", "DebertaV2Config", relative_attention=True, position_buckets=8,
        pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
    ),
    "albert": _encoder("AlbertModel", "AlbertConfig", embedding_size=16),
    "mpnet": _encoder("MPNetModel", "MPNetConfig"),
    "modernbert": _encoder("ModernBertModel", "ModernBertConfig", **_TEXT, cls_token_id=1,
                           sep_token_id=2),
    "bert_decoder": _encoder(
        "BertLMHeadModel", "BertConfig", is_decoder=True, add_cross_attention=True
    ),
    "gpt2_cross": _made("GPT2LMHeadModel", "GPT2Config", add_cross_attention=True, **_GPT),
    "gptj": _made("GPTJForCausalLM", "GPTJConfig", rotary_dim=4, **_GPT),
    "gpt_neox": _encoder("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "bloom": _made(
        "BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4
    ),
    "falcon": _made(
        "FalconForCausalLM", "FalconConfig", hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, **_TEXT,
    ),
    "phi": _encoder("PhiForCausalLM", "PhiConfig", **_TEXT),
    "olmo2": decoder("Olmo2ForCausalLM", "Olmo2Config", num_key_value_heads=4),
    "mixtral": decoder("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
    "deepseek": decoder(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", moe_intermediate_size=16,
        num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    ),
    "bart": _made(
        "BartForConditionalGeneration", "BartConfig", max_position_embeddings=40, dropout=0.0,
        **{**_SEQ2SEQ, "pad_token_id": 1},
    ),
    "whisper": _made(
        "WhisperForConditionalGeneration", "WhisperConfig", max_source_positions=20,
        max_target_positions=20, num_mel_bins=8, decoder_start_token_id=1,
        **{**_SEQ2SEQ, **_TEXT},
    ),
    "vit": _made("ViTForImageClassification", "ViTConfig", num_labels=3, **_VISION),
    "dinov2": _made("Dinov2Model", "Dinov2Config", **_VISION),
    "clip": _made(
        "CLIPModel", "CLIPConfig", projection_dim=16,
        text_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=20, **_TEXT,
        ),
        vision_config=_VISION,
    ),
}  # fmt: skip


def made(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def inputs_of(name: str, rows: int = 2, columns: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, columns), generator=generator)
    images = torch.randn(rows, 3, 8, 8, generator=generator)
    if name in ("vit", "dinov2"):
        return {"pixel_values": images}
    if name == "clip":
        return {"input_ids": ids, "pixel_values": images}
    if name == "whisper":
        sound = torch.randn(rows, 8, 40, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids}
    if name in SEQ2SEQ:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    if name in ("bert_decoder", "gpt2_cross"):
        states = torch.randn(rows, 5, 32, generator=generator)
        return {"input_ids": ids, "encoder_hidden_states": states}
    return {"input_ids": ids}
