"""Prefixes in every family of models: what attention over the concatenation gives, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from peftfast.methods import (
    MAMConfig,
    MethodConfig,
    PrefixConfig,
    PTuningV2Config,
    find_blocks,
    hosts,
    muted,
)
from tests.methods.models import MODELS, inputs_of, made
from tests.methods.test_families import on_meta, size, trainable
from tests.patching.tiny import VOCAB, decoder

P = 3
REFUSED = {
    "deberta": "DisentangledSelfAttention",
    "mpnet": "MPNetSelfAttention",
    "gptj": "GPTJAttention",
    "bloom": "BloomAttention",
    "falcon": "FalconAttention",
    "deepseek": "DeepseekV3Attention",
}
SERVED = [name for name in MODELS if name not in REFUSED]
DECODERS = ("llama", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox", "phi", "phi3", "olmo2")

# The concatenation: an attention that transformers' own interface knows, whose modules hold their
# prefixes, repeated for each row and put before the keys and values.
ORACLE = "tests_concatenated"
_HELD = "_tests_prefix"


def concatenated(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    prefix_k, prefix_v = module.__dict__[_HELD]
    rows, heads, queries, width = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    bias = query.new_zeros(1, 1, queries, keys) if position_bias is None else position_bias
    if attention_mask is not None:
        bias = bias + attention_mask[..., :keys]
    bias = bias.expand(rows, heads, queries, keys)
    length = prefix_k.shape[1]
    seen = torch.arange(keys - queries, keys)[:, None] + length - torch.arange(length)
    own = query.new_zeros(queries, length)
    if sliding_window is not None:
        own = own.masked_fill(seen >= sliding_window, float("-inf"))
    both = [
        torch.cat((prefix.expand(rows, -1, -1, -1), held), 2).repeat_interleave(groups, 1)
        for prefix, held in ((prefix_k, key), (prefix_v, value))
    ]
    scores = query @ both[0].mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + torch.cat((own.expand(rows, heads, -1, -1), bias), -1)
    sinks = query.new_full((heads,), float("-inf")) if s_aux is None else s_aux
    scores = torch.cat((scores, sinks[:, None, None].expand(rows, -1, queries, 1)), -1)
    return (scores.softmax(-1)[..., :-1] @ both[1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(ORACLE, concatenated)
AttentionMaskInterface.register(ORACLE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def prefixed(family: str, config: MethodConfig | None = None, seed: int = 0) -> Any:
    """A model in float64 with prefixes, by default where positions stay."""
    base = made(family, seed)
    if family == "mixtral":  # the other one has no float64
        base.set_experts_implementation("eager")
    torch.manual_seed(2)
    config = config or PrefixConfig(num_virtual_tokens=P, shift_positions=False)
    return peft.get_peft_model(base, config).double().eval()


def lively(model: Any) -> Any:
    """With larger matrices, so that what attention reads decides what comes out."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(6)
    return model


def prefixes(model: Any, adapter: str = "default") -> dict[tuple[str, str], Any]:
    """The modules of an adapter's prefixes, by attention module and site."""
    return {
        (placement.core, placement.component.site): module
        for host in hosts(model)
        for placement, module in host.components(adapter)
        if placement.component.primitive == "prefix"
    }


def oracle_of(model: Any) -> Any:
    """The base model with the concatenation; its prefixes are the adapted model's own tensors."""
    held = {core: module.prefixes() for (core, _), module in prefixes(model).items()}
    base = copy.deepcopy(model).unload()
    base.set_attn_implementation(ORACLE)
    for module in base.modules():  # stacks may have configs of their own
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = ORACLE
    for name, values in held.items():
        base.get_submodule(name).__dict__[_HELD] = values
    return base


def output_of(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        if getattr(out, name, None) is not None:
            found: Tensor = getattr(out, name)
            return found
    raise AssertionError(sorted(out))


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def masks_of(family: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """No padding, padding on the right and padding on the left, for models that have a mask."""
    if "input_ids" not in inputs:
        return {}
    right = torch.ones_like(inputs["input_ids"])
    right[1, 4:] = 0
    return {"right": right, "left": right.flip(-1)}


def compared(model: Any, oracle: Any, inputs: dict[str, Tensor]) -> None:
    """Outputs, and the gradients of every prefix."""
    wanted = [p for module in prefixes(model).values() for p in module.parameters()]
    found = []
    for one in (model, oracle):
        out = output_of(one(**inputs))
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).double()
        found.append((out, torch.autograd.grad((out * weights).sum(), wanted)))
    (out, gradients), (expected, exact) = found
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients, exact, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", SERVED)
def test_every_family_attends_to_the_concatenation(family: str) -> None:
    model = prefixed(family)
    oracle = oracle_of(model)
    inputs = double(inputs_of(family, columns=7))
    compared(model, oracle, inputs)
    with torch.no_grad():
        plain = output_of(copy.deepcopy(model).unload()(**inputs))
        assert not torch.allclose(output_of(model(**inputs)), plain)
        with model.disable_adapter():
            assert torch.equal(output_of(model(**inputs)), plain)
        with muted(model, range(len(find_blocks(model)))):
            assert torch.equal(output_of(model(**inputs)), plain)
    for mask in masks_of(family, inputs).values():
        name = "attention_mask"
        if family == "whisper":
            name = "decoder_attention_mask"
        compared(model, oracle, {**inputs, name: mask})


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_capping_and_sinks(family: str) -> None:
    settings: dict[str, Any] = dict(head_dim=8, sliding_window=6)
    if family == "gemma2":
        settings.update(query_pre_attn_scalar=8, attn_logit_softcapping=1.5)
        base = decoder("Gemma2ForCausalLM", "Gemma2Config", **settings)()
    else:
        settings.update(num_local_experts=4, num_experts_per_tok=2)
        base = decoder("GptOssForCausalLM", "GptOssConfig", **settings)()
        base.set_experts_implementation("eager")
    config = PrefixConfig(num_virtual_tokens=P, shift_positions=False)
    model = peft.get_peft_model(base, config).double().eval()
    oracle = oracle_of(model)
    ids = torch.randint(3, VOCAB, (2, 9))
    compared(model, oracle, {"input_ids": ids})
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        found, expected = (one(input_ids=ids, attention_mask=mask) for one in (model, oracle))
    real = mask.bool()  # the others may see nothing at all
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "bart"])
def test_masks_as_for_flash_attention(family: str) -> None:
    """Of two dimensions, with causality said apart; a row may be all padding."""
    model = prefixed(family)
    inputs = inputs_of(family, columns=7)
    masks = masks_of(family, inputs)
    masks["a row"] = masks["right"] * torch.tensor([[1], [0]])
    with torch.no_grad():
        expected = {k: model(**inputs, attention_mask=mask).logits for k, mask in masks.items()}
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_attn_implementation"):
                module.config._attn_implementation = "flash_attention_2"
        for name, mask in masks.items():
            found = model(**inputs, attention_mask=mask).logits
            assert found.isfinite().all()
            torch.testing.assert_close(found, expected[name], rtol=1e-10, atol=1e-10)


def test_documents_packed_into_a_row_under_flash_attention() -> None:
    """Each document sees the prefix and itself, as by itself."""
    model = prefixed("llama")
    ids = inputs_of("llama", rows=1, columns=9)["input_ids"]
    places = torch.cat([torch.arange(4), torch.arange(5)])[None]
    with torch.no_grad():
        alone = [model(input_ids=part).logits for part in (ids[:, :4], ids[:, 4:])]
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_attn_implementation"):
                module.config._attn_implementation = "flash_attention_2"
        packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-10, atol=1e-10)
        lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
        with pytest.raises(ValueError, match="hands cu_seq_lens_q to attention with a prefix"):
            model(input_ids=ids, position_ids=places, use_cache=False, cu_seq_lens_q=lengths)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_reached_is_named_before_anything_changes(family: str) -> None:
    base = made(family)
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match=REFUSED[family]) as caught:
        peft.get_peft_model(base, PrefixConfig(num_virtual_tokens=P))
    if family != "deepseek":
        assert "AttentionInterface" in str(caught.value)
    assert dict(base.named_modules()) == modules


@pytest.mark.parametrize("family", ["t5", "bart", "whisper", "bert_decoder"])
def test_each_kind_of_attention_has_prefixes_of_its_own(family: str) -> None:
    """Encoder, decoder and cross-attention; each alone changes the output, and only the encoder's
    what the encoder gives.
    """
    model = prefixed(family)
    found = prefixes(model)
    kinds: dict[str, list[Any]] = {}
    for (core, site), module in found.items():
        stack = "decoder" if "decoder" in core or family == "bert_decoder" else "encoder"
        kinds.setdefault("cross" if site.startswith("cross_") else stack, []).append(module)
    expected = {"decoder", "cross"} if family == "bert_decoder" else {"encoder", "decoder", "cross"}
    assert kinds.keys() == expected and all(len(modules) == 2 for modules in kinds.values())
    parameters = [p for module in found.values() for p in module.parameters()]
    assert len({p.data_ptr() for p in parameters}) == len(parameters) == 2 * len(found)

    inputs = double(inputs_of(family))
    with torch.no_grad():
        before = model(**inputs)
        for kind, modules in kinds.items():
            for module in modules:
                kept = [p.clone() for p in module.parameters()]
                for p in module.parameters():
                    p.copy_(torch.randn_like(p))
                after = model(**inputs)
                assert not torch.allclose(after.logits, before.logits), kind
                if family != "bert_decoder":
                    states = before.encoder_last_hidden_state, after.encoder_last_hidden_state
                    assert torch.equal(*states) == (kind != "encoder")
                for p, value in zip(module.parameters(), kept, strict=True):
                    p.copy_(value)
        assert torch.equal(model(**inputs).logits, before.logits)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"stacks": ["encoder"]}, {"encoder"}),
        ({"stacks": "decoder"}, {"decoder", "cross"}),
        ({"cross_attention": False}, {"encoder", "decoder"}),
        ({"layers": [0, 3]}, {"encoder", "decoder", "cross"}),
    ],
    ids=["encoder", "decoder", "no cross", "layers"],
)
def test_a_part_of_the_attentions(family: str, options: dict[str, Any], kinds: set[str]) -> None:
    config = PrefixConfig(num_virtual_tokens=P, shift_positions=False, **options)
    model = prefixed(family, config)
    found = prefixes(model)
    stacks = {
        "cross" if site.startswith("cross_") else core.partition("coder.")[0][-2:] + "coder"
        for core, site in found
    }
    assert stacks == kinds
    assert len(found) == (3 if "layers" in options else 2 * len(kinds))
    inputs = inputs_of(family)
    oracle = oracle_of(model)
    heads = next(iter(found.values())).prefix_k.shape[0]
    for module in oracle.modules():  # where there is no prefix: one of no rows
        if type(module).__name__.endswith("Attention"):
            empty = torch.zeros(heads, 0, 8, dtype=torch.float64)
            module.__dict__.setdefault(_HELD, (empty, empty))
    compared(model, oracle, inputs)


# Classification: outputs and labels stay where the tokens are


def _task(family: str, kind: str) -> Any:
    torch.manual_seed(0)
    name = {"bert": "Bert", "roberta": "Roberta"}[family]
    config = getattr(hf, f"{name}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=40, num_labels=3, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return getattr(hf, f"{name}For{kind}")(config)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_classifiers_read_the_real_tokens(family: str, kind: str) -> None:
    task = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}[kind]
    base = _task(family, kind)
    model = peft.get_peft_model(base, PTuningV2Config(num_virtual_tokens=P, task_type=task))
    assert any(".modules_to_save." in n and p.requires_grad for n, p in model.named_parameters())
    model.double().eval()
    ids = torch.randint(3, VOCAB, (3, 8))
    lengths = [8, 5, 2]
    mask = torch.stack([(torch.arange(8) < length).long() for length in lengths])
    padded = ids * mask
    heads = kind == "TokenClassification"
    labels = torch.where(mask.bool(), ids % 3, -100) if heads else torch.tensor([0, 1, 2])
    out = model(input_ids=padded, attention_mask=mask, labels=labels)
    assert out.logits.shape == ((3, 8, 3) if heads else (3, 3))
    expected = F.cross_entropy(out.logits.flatten(0, -2), labels.flatten())
    torch.testing.assert_close(out.loss, expected)

    # Each row alone, without padding, has the same outputs at the same tokens.
    with torch.no_grad():
        for row, length in enumerate(lengths):
            alone = model(input_ids=ids[row : row + 1, :length]).logits[0]
            there = out.logits[row, :length] if heads else out.logits[row]
            torch.testing.assert_close(alone, there, rtol=1e-10, atol=1e-12)

    # The hidden states have the tokens' length, and positions begin at P as the oracle's do.
    still = oracle_of(model)
    start = P + (1 if family == "roberta" else 0)  # RoBERTa's begin after the pad token's
    positions = torch.arange(start, start + 8).expand(3, -1)
    given = dict(input_ids=padded, attention_mask=mask, output_hidden_states=True)
    with torch.no_grad():
        hidden = model(**given).hidden_states
        exact = still(**given, position_ids=positions).hidden_states
    for one, other in zip(hidden, exact, strict=True):
        assert one.shape == (3, 8, 32)
        torch.testing.assert_close(one[mask.bool()], other[mask.bool()], rtol=1e-10, atol=1e-12)


def test_sequence_tagging_is_learned() -> None:
    """Whether a token is the row's first one: what the head alone doesn't find in the frozen
    model's states, prefixes bring out.
    """
    ids = torch.randint(3, 9, (16, 6))
    tags = (ids == ids[:, :1]).long()
    tags[:, 0] = -100
    config = PTuningV2Config(num_virtual_tokens=8, prefix_dropout=0.0, task_type="TOKEN_CLS")
    adapted = peft.get_peft_model(lively(_task("bert", "TokenClassification")), config)
    alone = lively(_task("bert", "TokenClassification")).requires_grad_(False)
    alone.classifier.requires_grad_(True)
    reached = []
    for model in (alone, adapted):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-2)
        for _ in range(80):
            loss = model(input_ids=ids, labels=tags).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        reached.append(loss.item())
    head, prefixed_too = reached
    assert prefixed_too < 0.7 * head


# Generation


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "opt", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_that_of_the_concatenation(family: str, beams: int) -> None:
    model = prefixed(family)
    lively(model.base_model)
    oracle = oracle_of(model)
    inputs = {"input_ids": inputs_of(family, rows=3)["input_ids"]}
    inputs["attention_mask"] = masks_of(family, inputs)["left"]
    settings = dict(max_new_tokens=7, min_new_tokens=7, do_sample=False, num_beams=beams)
    expected = oracle.generate(**inputs, **settings)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **settings), expected)
    assert torch.equal(model.generate(**inputs, **settings), expected)
    assert torch.equal(model.generate(**inputs, **settings, use_cache=False), expected)
    static = model.generate(**inputs, **settings, cache_implementation="static")
    assert torch.equal(static, expected)


@pytest.mark.parametrize("family", DECODERS)
def test_a_step_after_another_is_the_whole_at_once(family: str) -> None:
    """Positions begin at P in both; a cache holds the sequence alone."""
    model = prefixed(family, PrefixConfig(num_virtual_tokens=P))
    ids = inputs_of(family, columns=9)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = DynamicCache(config=model.config)
        parts = [
            model(input_ids=part, past_key_values=cache).logits
            for part in ids.split([1, 5, 1, 2], 1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == ids.shape[1]


# Counts


def test_p_tuning_v2_on_roberta_large() -> None:
    """2 L l d of l = 128 (Liu et al., "P-Tuning v2", section 4)."""
    model = on_meta(
        "RobertaModel", "RobertaConfig", hidden_size=1024, num_hidden_layers=24,
        num_attention_heads=16, intermediate_size=4096,
    )  # fmt: skip
    config = PTuningV2Config(num_virtual_tokens=128)
    assert trainable(model, config) == 6_291_456 == 2 * 24 * 128 * 1024


@pytest.mark.parametrize(
    ("config", "count", "share"),
    [
        (lambda: PrefixConfig(num_virtual_tokens=200), 36 * 2 * 200 * 1024, "3.63%"),
        (
            MAMConfig,
            36 * 2 * 30 * 1024 + 24 * (2 * 512 * 1024 + 1024 + 512),
            "6.75%",
        ),
    ],
    ids=["prefix", "mam"],
)
def test_on_bart_large(config: Callable[[], MethodConfig], count: int, share: str) -> None:
    """He et al., table 2: prefixes in encoder, decoder and cross-attention, 12 layers each."""
    model = on_meta("BartModel", "BartConfig")
    whole = size(model)
    assert trainable(model, config()) == count
    assert f"{count / whole:.2%}" == share
