"""Where the sites of every family are, by name."""

from __future__ import annotations

from typing import NamedTuple

Names = tuple[str, str, str]


class Stack(NamedTuple):
    """Of a stack's last block, by names in it: whose input a sublayer reads, its last linear, and
    whose output is the sublayer's.
    """

    kind: str
    blocks: str
    attention: Names
    ffn: Names
    cross: Names | None = None


_LLAMA = ("self_attn.q_proj", "self_attn.o_proj", "self_attn.o_proj")
_LLAMA_FFN = ("mlp.gate_proj", "mlp.down_proj", "mlp.down_proj")
_MIXTURE = ("mlp", "", "mlp")
_BERT = ("attention.self.query", "attention.output.dense", "attention.output.dropout")
_BERT_FFN = ("intermediate.dense", "output.dense", "output.dropout")
_BART = ("self_attn.q_proj", "self_attn.out_proj", "self_attn.out_proj")
_BART_CROSS = ("encoder_attn.q_proj", "encoder_attn.out_proj", "encoder_attn.out_proj")
_FC = ("fc1", "fc2", "fc2")
_MLP_FC = ("mlp.fc1", "mlp.fc2", "mlp.fc2")
_GPT2 = ("attn.c_attn", "attn.c_proj", "attn.resid_dropout")
_GPT2_FFN = ("mlp.c_fc", "mlp.c_proj", "mlp.dropout")
_T5 = ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o", "layer.0.dropout")
_T5_CROSS = ("layer.1.EncDecAttention.q", "layer.1.EncDecAttention.o", "layer.1.dropout")


def _t5_ffn(layer: int) -> Names:
    inner = f"layer.{layer}.DenseReluDense"
    return f"{inner}.wi_0", f"{inner}.wo", f"layer.{layer}.dropout"


_HF_LLAMA = Stack("decoder", "model.layers", _LLAMA, _LLAMA_FFN)

EXPECTED: dict[str, list[Stack]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3", "olmo2"), [_HF_LLAMA]),
    **dict.fromkeys(
        ("qwen3_moe", "mixtral"), [Stack("decoder", "model.layers", _LLAMA, _MIXTURE)]
    ),
    "deepseek": [
        Stack(
            "decoder",
            "model.layers",
            ("self_attn.q_a_proj", "self_attn.o_proj", "self_attn.o_proj"),
            _MIXTURE,
        )
    ],
    "phi3": [
        Stack(
            "decoder",
            "model.layers",
            ("self_attn.qkv_proj", "self_attn.o_proj", "resid_attn_dropout"),
            ("mlp.gate_up_proj", "mlp.down_proj", "resid_mlp_dropout"),
        )
    ],
    # Its one dropout serves both sublayers, and so is neither's output.
    "phi": [
        Stack(
            "decoder",
            "model.layers",
            ("self_attn.q_proj", "self_attn.dense", "self_attn.dense"),
            _MLP_FC,
        )
    ],
    "vit": [
        Stack(
            "encoder",
            "vit.layers",
            ("attention.q_proj", "attention.o_proj", "attention.o_proj"),
            _MLP_FC,
        )
    ],
    "gpt2": [Stack("decoder", "transformer.h", _GPT2, _GPT2_FFN)],
    "gpt2_cross": [
        Stack(
            "decoder",
            "transformer.h",
            _GPT2,
            _GPT2_FFN,
            ("crossattention.q_attn", "crossattention.c_proj", "crossattention.resid_dropout"),
        )
    ],
    "gptj": [
        Stack(
            "decoder",
            "transformer.h",
            ("attn.q_proj", "attn.out_proj", "attn.resid_dropout"),
            ("mlp.fc_in", "mlp.fc_out", "mlp.dropout"),
        )
    ],
    "gpt_neox": [
        Stack(
            "decoder",
            "gpt_neox.layers",
            ("attention.query_key_value", "attention.dense", "post_attention_dropout"),
            ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "post_mlp_dropout"),
        )
    ],
    **dict.fromkeys(
        ("bloom", "falcon"),
        [
            Stack(
                "decoder",
                "transformer.h",
                (
                    "self_attention.query_key_value",
                    "self_attention.dense",
                    "self_attention.dense",
                ),
                ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
            )
        ],
    ),
    "opt": [Stack("decoder", "model.decoder.layers", _BART, _FC)],
    "bert": [Stack("encoder", "bert.encoder.layer", _BERT, _BERT_FFN)],
    "roberta": [Stack("encoder", "roberta.encoder.layer", _BERT, _BERT_FFN)],
    "electra": [Stack("encoder", "encoder.layer", _BERT, _BERT_FFN)],
    "deberta": [
        Stack(
            "encoder", "encoder.layer", ("attention.self.query_proj", _BERT[1], _BERT[2]), _BERT_FFN
        )
    ],
    "bert_decoder": [
        Stack(
            "decoder",
            "bert.encoder.layer",
            _BERT,
            _BERT_FFN,
            (f"cross{_BERT[0]}", f"cross{_BERT[1]}", f"cross{_BERT[2]}"),
        )
    ],
    "mpnet": [
        Stack(
            "encoder",
            "encoder.layer",
            ("attention.attn.q", "attention.attn.o", "attention.dropout"),
            _BERT_FFN,
        )
    ],
    "distilbert": [
        Stack(
            "encoder",
            "transformer.layer",
            ("attention.q_lin", "attention.out_lin", "attention.out_lin"),
            ("ffn.lin1", "ffn.lin2", "ffn.dropout"),
        )
    ],
    "modernbert": [
        Stack("encoder", "layers", ("attn.Wqkv", "attn.Wo", "attn.out_drop"),
              ("mlp.Wi", "mlp.Wo", "mlp.Wo"))
    ],
    "albert": [
        Stack(
            "encoder",
            "encoder.albert_layer_groups.0.albert_layers",
            ("attention.query", "attention.dense", "attention.output_dropout"),
            ("ffn", "ffn_output", "ffn_output"),
        )
    ],
    "t5": [
        Stack("encoder", "encoder.block", _T5, _t5_ffn(1)),
        Stack("decoder", "decoder.block", _T5, _t5_ffn(2), _T5_CROSS),
    ],
    **dict.fromkeys(
        ("bart", "whisper"),
        [
            Stack("encoder", "model.encoder.layers", _BART, _FC),
            Stack("decoder", "model.decoder.layers", _BART, _FC, _BART_CROSS),
        ],
    ),
    "clip": [
        Stack("encoder", "text_model.encoder.layers", _BART, _MLP_FC),
        Stack("encoder", "vision_model.encoder.layers", _BART, _MLP_FC),
    ],
}  # fmt: skip


def expected_points(stack: Stack) -> dict[str, tuple[str, str, str]]:
    """Module, side and the linear nearby, by site."""
    found = {}
    sublayers = {"attention": stack.attention, "cross_attention": stack.cross, "ffn": stack.ffn}
    for name, modules in sublayers.items():
        if modules is not None:
            reads, last, end = modules
            # A mixture of experts has no linear: attention's stands in.
            near = last or stack.attention[1]
            found[f"{name}_input"] = (reads, "input", reads if last else near)
            if last:
                found[f"{name}_hidden" if name == "ffn" else f"{name}_heads"] = (
                    last,
                    "input",
                    near,
                )
            found[f"{name}_output"] = (end, "output", near)
    return found
