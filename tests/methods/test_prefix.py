"""Prefixes in models: how they get into attention, and PEFT's ways of handling an adapter."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import DynamicCache

import peftfast
from peftfast import methods
from peftfast.methods import (
    Component,
    HoulsbyConfig,
    MAMConfig,
    MultiHeadParallelAdapterConfig,
    PrefixConfig,
    PTuningV2Config,
    UnifiedConfig,
    UniPELTConfig,
    attention,
    hosts,
    muted,
    positions,
)
from tests.methods.models import MODELS, inputs_of
from tests.methods.models import made as made_model
from tests.methods.test_tuner import logits, randomised, tokens
from tests.patching.tiny import VOCAB

P = 5
REFUSED = ("deberta", "mpnet", "gptj", "bloom", "falcon", "deepseek")


def made(family: str) -> Any:
    return made_model(family).eval()


def prefixed(family: str = "llama", **options: Any) -> Any:
    model = peft.get_peft_model(made(family), PrefixConfig(**{"num_virtual_tokens": P, **options}))
    return model.eval()


def from_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The base's logits, with the adapter's prefixes as rows of a cache."""
    layers = [next(iter(host.components("default")))[1].prefixes() for host in hosts(model)]
    rows = len(ids)
    cache = DynamicCache([tuple(t.expand(rows, -1, -1, -1) for t in one) for one in layers])
    with model.disable_adapter():
        return model(input_ids=ids, past_key_values=cache).logits


def test_a_real_peft_model_whose_prefixes_train_and_nothing_else() -> None:
    model = prefixed()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".q_proj.")[1] for name in trainable} == {
        "peftfast_attention_prefix.default.prefix_k",
        "peftfast_attention_prefix.default.prefix_v",
    }
    assert {tuple(p.shape) for p in trainable.values()} == {(2, P, 8)}
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trainable)
    assert all(p.grad.abs().sum() > 0 for p in trainable.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_prefix_is_what_rows_in_the_cache_are(family: str) -> None:
    model = prefixed(family).double()
    with torch.no_grad():
        expected = from_cache(model, tokens())
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
        assert not torch.allclose(expected, model.base_model.model(tokens()).logits + 1e-3)


def test_where_positions_begin_is_an_argument() -> None:
    torch.manual_seed(0)
    model, still = prefixed("gpt2"), prefixed("gpt2", shift_positions=False)
    still.load_state_dict(model.state_dict())
    table = still.base_model.model.transformer.wpe.weight
    with torch.no_grad():
        table.copy_(table.roll(P, 0))  # so that position t has the row of t - P
        with pytest.raises(AssertionError):
            torch.testing.assert_close(logits(still), logits(model))
        table.copy_(table.roll(-2 * P, 0))
        torch.testing.assert_close(logits(still), logits(model))


def test_more_positions_than_the_model_has_are_an_error() -> None:
    model = prefixed("bert", num_virtual_tokens=30)
    with pytest.raises(ValueError, match="12 positions after a prefix of 30 are more than the 32"):
        model(input_ids=tokens(length=12))


def test_switching_prefixes_off_is_the_base_bit_for_bit() -> None:
    base = made("llama")
    expected = logits(base)
    model = peft.get_peft_model(base, PrefixConfig(num_virtual_tokens=P)).eval()
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    with muted(model, [0, 1]):
        assert torch.equal(logits(model), expected)
    with muted(model, [1]):
        assert not torch.equal(logits(model), expected)


def test_several_adapters_one_at_a_time_and_together() -> None:
    model = prefixed().double()
    one = logits(model)
    model.add_adapter("other", PrefixConfig(num_virtual_tokens=3))
    model.double().eval()
    assert torch.equal(logits(model), one)
    model.set_adapter("other")
    other = logits(model)
    assert not torch.equal(other, one)
    model.base_model.set_adapter(["default", "other"])
    host = hosts(model)[0]
    assert (host.length(), host.shift()) == (P + 3, P + 3)
    layers = [
        [torch.cat(both, dim=1) for both in zip(*(next(iter(h.components(n)))[1].prefixes()
         for n in ("default", "other")), strict=True)]
        for h in hosts(model)
    ]  # fmt: skip
    cache = DynamicCache([tuple(t.expand(2, -1, -1, -1) for t in one) for one in layers])
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=tokens(), past_key_values=cache).logits
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    model.delete_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), one, rtol=0, atol=0)


def test_unloading_leaves_the_very_same_model() -> None:
    base = made("bert")
    before = {name: (type(m), getattr(m, "config", None)) for name, m in base.named_modules()}
    expected = logits(base)
    model = peft.get_peft_model(base, PrefixConfig(num_virtual_tokens=P))
    plain = model.unload()
    assert plain is base
    after = {name: (type(m), getattr(m, "config", None)) for name, m in plain.named_modules()}
    assert after.keys() == before.keys()
    for name, (kind, config) in before.items():
        assert after[name] == (kind, config) and after[name][1] is config, name
    assert not any("_peftfast" in key for m in plain.modules() for key in m.__dict__)
    assert torch.equal(logits(plain), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_copies_and_pickles_have_prefixes_of_their_own(family: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(made(family), PrefixConfig(num_virtual_tokens=P)).eval()
    inputs = inputs_of(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(**inputs).logits, expected)
            randomised(twin)
            assert not torch.equal(twin(**inputs).logits, expected)
            assert torch.equal(model(**inputs).logits, expected)


def test_an_encoder_makes_the_prefixes_in_training_and_is_dropped_after() -> None:
    model = prefixed("bart", prefix_projection=True, encoder_hidden_size=6)
    randomised(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len([n for n in trainable if n.endswith(".embedding")]) == 3  # one for each kind
    assert len([n for n in trainable if n.endswith(".up_weight")]) == 6
    inputs = inputs_of("bart")
    model(**inputs).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        expected = model(**inputs).logits
        methods.finalize(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
    left = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert left == {"prefix_k", "prefix_v"}
    methods.finalize(model)
    with pytest.raises(ValueError, match="the model has no adapter 'other'"):
        methods.finalize(model, "other")


def test_checkpoints_with_an_encoder_serve_training_and_inference(tmp_path: Path) -> None:
    model = prefixed(prefix_projection=True, encoder_hidden_size=6)
    randomised(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "training")
    served = peft.PeftModel.from_pretrained(made("llama"), tmp_path / "training").eval()
    assert not any(n.endswith(("embedding", "up_weight")) for n, _ in served.named_parameters()
                   if "peftfast" in n)  # fmt: skip
    torch.testing.assert_close(logits(served), expected)
    on = peft.PeftModel.from_pretrained(made("llama"), tmp_path / "training", is_trainable=True)
    assert torch.equal(logits(on.eval()), expected)
    assert {n for n, p in on.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    methods.finalize(model)
    model.save_pretrained(tmp_path / "finished")
    names = load_file(tmp_path / "finished" / "adapter_model.safetensors")
    assert {name.rsplit(".", 1)[-1] for name in names} == {"prefix_k", "prefix_v"}
    for trainable in (False, True):
        loaded = peft.PeftModel.from_pretrained(
            made("llama"), tmp_path / "finished", is_trainable=trainable
        )
        torch.testing.assert_close(logits(loaded.eval()), expected)


def test_a_prefix_starts_from_a_saved_one(tmp_path: Path) -> None:
    model = prefixed()
    model.save_pretrained(tmp_path)
    config = PTuningV2Config(num_virtual_tokens=P, initial_prefix=str(tmp_path))
    torch.manual_seed(3)
    started = peft.get_peft_model(made("llama"), config).eval()
    assert torch.equal(logits(started), logits(model))
    randomised(started)
    expected = logits(started)
    started.save_pretrained(tmp_path / "next")
    loaded = peft.PeftModel.from_pretrained(made("llama"), tmp_path / "next", is_trainable=True)
    assert torch.equal(logits(loaded.eval()), expected)
    for options, message in (
        ({"num_virtual_tokens": P + 1}, r"doesn't fit: 4 of 4 tensors"),
        ({"prefix_projection": True}, "an encoder can't be made to give them"),
    ):
        config = PTuningV2Config(
            **{"num_virtual_tokens": P, "initial_prefix": str(tmp_path), **options}
        )
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(made("llama"), config)
    config = PTuningV2Config(num_virtual_tokens=P, initial_prefix=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="where no adapter_model.safetensors is"):
        peft.get_peft_model(made("llama"), config)


def test_what_fails_half_way_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    prefixed(num_virtual_tokens=P + 1).save_pretrained(tmp_path)
    wrong = PTuningV2Config(num_virtual_tokens=P, initial_prefix=str(tmp_path))
    base = made("llama").train()
    expected, modules = logits(base), dict(base.named_modules())
    with pytest.raises(ValueError, match="doesn't fit"):
        peft.get_peft_model(base, wrong)
    assert dict(base.named_modules()) == modules and torch.equal(logits(base), expected)
    assert all(p.requires_grad for p in base.parameters())
    assert all(module.training for module in base.modules())
    assert not any("_peftfast" in key for m in base.modules() for key in m.__dict__)
    model = prefixed()
    expected, modules = logits(model), dict(model.named_modules())
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="doesn't fit"):
        model.add_adapter("other", wrong)
    assert dict(model.named_modules()) == modules and torch.equal(logits(model), expected)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("family", sorted(set(MODELS)))
def test_every_family_is_reached_or_named_in_an_error(family: str) -> None:
    torch.manual_seed(0)
    base = MODELS[family]().eval()
    config = PrefixConfig(num_virtual_tokens=3)
    if family in REFUSED:
        before = {name: type(module) for name, module in base.named_modules()}
        with pytest.raises(ValueError) as raised:
            peft.get_peft_model(base, config)
        assert "Attention" in str(raised.value)
        if family != "deepseek":
            assert "AttentionInterface" in str(raised.value)
        assert {name: type(module) for name, module in base.named_modules()} == before
        return
    model = peft.get_peft_model(base, config).eval()
    assert hosts(model)
    for host in hosts(model):
        assert host.length() == 3


def test_positions_are_found_by_stack() -> None:
    found = {
        family: sorted(
            name
            for name, module in prefixed(family).base_model.model.named_modules()
            if positions.offset_of(module) is not None
        )
        for family in ("gemma3", "gpt2", "bert", "t5")
    }
    assert found == {
        "gemma3": ["model.rotary_emb"],
        "gpt2": ["transformer.wpe"],
        "bert": ["bert.embeddings.position_embeddings"],
        "t5": [],
    }


def test_what_attention_with_a_prefix_refuses() -> None:
    model = prefixed()
    with pytest.raises(ValueError, match="output_attentions is not available with a prefix"):
        model(input_ids=tokens(), output_attentions=True)
    model.base_model.model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="its attention is 'flex_attention', whose masks"):
        model(input_ids=tokens())
    base = made("llama")
    base.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention"):
        peft.get_peft_model(base, PrefixConfig())
    model = prefixed()
    model.add_adapter("relu", MultiHeadParallelAdapterConfig(bottleneck=2))
    model.base_model.set_adapter(["default", "relu"])
    with pytest.raises(ValueError, match="they can't be joined"):
        model(input_ids=tokens())
    with pytest.raises(ValueError, match="is a prefix: it is no change of a weight"):
        prefixed().merge_and_unload()


def test_eager_attention_gives_the_same() -> None:
    model = prefixed()
    mask = torch.ones_like(tokens())
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(input_ids=tokens(), attention_mask=mask).logits
        model.base_model.model.set_attn_implementation("eager")
        found = model(input_ids=tokens(), attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("padded", [False, True])
def test_a_prefix_slides_out_of_a_window_with_every_cache(padded: bool) -> None:
    base = made("gemma3")
    assert base.config.layer_types.count("sliding_attention") > 0
    base.config.sliding_window = 8
    for module in base.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 8
    base.config.eos_token_id = base.generation_config.eos_token_id = None
    model = peft.get_peft_model(base, PrefixConfig(num_virtual_tokens=P)).eval()
    mask = torch.ones_like(tokens())
    mask[0, : 3 * padded] = 0
    found = {}
    for cache in ("dynamic", "static"):
        made_of = model.generate(
            input_ids=tokens(), attention_mask=mask, max_new_tokens=8, do_sample=False,
            cache_implementation=cache, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        found[cache] = torch.stack(made_of.logits)
    torch.testing.assert_close(found["static"], found["dynamic"])
    with torch.no_grad():
        whole = made_of.sequences
        mask = torch.cat([mask, torch.ones(2, 8, dtype=mask.dtype)], dim=1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        all_at_once = model(input_ids=whole, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(found["dynamic"].transpose(0, 1), all_at_once[:, -9:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "virtual_tokens is 0; 1 or more are needed"),
        ({"num_virtual_tokens": 1.5}, "virtual_tokens is 1.5; a number of 1 or more"),
        ({"encoder_hidden_size": 4}, "encoder_hidden_size is 4, and prefix_projection is False"),
        ({"stacks": ["middle"]}, "stacks has 'middle'"),
        ({"stacks": []}, "stacks is empty"),
        ({"prefix_dropout": 1.5}, "dropout is 1.5"),
        ({"prefix_init": "warm"}, "init is 'warm'"),
        ({"stacks": ["encoder"]}, "finds no attention_heads reading attention_input on this model"),
    ],
)
def test_configurations_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        peft.get_peft_model(made("llama"), PrefixConfig(**options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "ffn_output", "primitive": "prefix", "virtual_tokens": 2},
         "site is 'ffn_output'"),
        ({"site": "attention_heads", "primitive": "prefix"}, "virtual_tokens is None"),
        ({"site": "attention_heads", "primitive": "prefix", "virtual_tokens": 2, "bottleneck": 3},
         "bottleneck is 3, and primitive 'prefix' has no bottleneck"),
        ({"site": "ffn_output", "bottleneck": 3, "virtual_tokens": 2},
         "virtual_tokens is 2, and primitive 'bottleneck' has no virtual_tokens"),
        ({"site": "embedding", "bottleneck": 3}, "only prompts are"),
        ({"site": "attention_heads", "primitive": "prefix", "virtual_tokens": 2, "form": "gelu"},
         "form is 'gelu'"),
    ],
)  # fmt: skip
def test_components_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Component(**arguments)


@pytest.mark.parametrize(
    "config",
    [
        MAMConfig(num_virtual_tokens=3, bottleneck=4),
        MultiHeadParallelAdapterConfig(bottleneck=3),
        UniPELTConfig(num_virtual_tokens=3, r=2, reduction=8),
        UnifiedConfig(components=[
            Component("attention_heads", primitive="prefix", virtual_tokens=3, gate=True),
            Component("ffn_output", insertion="parallel", bottleneck=3),
            Component("attention_output", form="identity", bottleneck=2),
        ]),
    ],
    ids=["mam", "multi_head_parallel_adapter", "unipelt", "unified"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_methods_train_and_their_checkpoints_load(config: Any, family: str, tmp_path: Path) -> None:
    config = copy.deepcopy(config)
    model = peft.get_peft_model(made(family), config)
    randomised(model)
    inputs = inputs_of(family)
    model.train()(**inputs).logits.square().sum().backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
    assert all(p.grad.abs().sum() > 0 for p in trainable)
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(made(family), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "config",
    [UniPELTConfig(num_virtual_tokens=3, r=2, reduction=8), MAMConfig(bottleneck=4)],
    ids=["unipelt", "mam"],
)
def test_threads_don_t_meet(config: Any) -> None:
    model = peft.get_peft_model(made("llama"), copy.deepcopy(config)).eval()
    randomised(model)
    inputs = [torch.randint(3, VOCAB, (2, 7)) for _ in range(3)]
    with torch.no_grad():
        expected = [model(input_ids=one).logits for one in inputs]

    @torch.no_grad()
    def run(at: int) -> bool:
        return all(torch.equal(model(input_ids=inputs[at]).logits, expected[at]) for _ in range(15))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [True] * 3


def test_adapters_of_other_methods_live_beside_prefixes() -> None:
    model = prefixed()
    expected = logits(model)
    model.add_adapter("houlsby", HoulsbyConfig(bottleneck=4, train_norms=False))
    assert torch.equal(logits(model), expected)
    model.set_adapter("houlsby")
    randomised(model, adapter="houlsby")
    assert hosts(model)[0].length() == 0
    without = logits(model)
    model.base_model.set_adapter(["default", "houlsby"])
    assert not torch.equal(logits(model), without)
    core = hosts(model)[0]
    assert core.length() == P


@pytest.mark.parametrize("config", [PrefixConfig(), HoulsbyConfig(bottleneck=4)])
def test_several_adapters_in_one_batch_are_refused(config: Any) -> None:
    model = peft.get_peft_model(made("llama"), copy.deepcopy(config)).eval()
    with pytest.raises(ValueError, match="adapter_names is given"):
        model(input_ids=tokens(), adapter_names=["default", "__base__"])


def test_attention_in_which_a_prefix_has_no_place() -> None:
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    twice = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**sizes))
    with pytest.raises(ValueError, match="DiffLlamaAttention attends more than once in a forward"):
        peft.get_peft_model(twice, PrefixConfig())
    config = transformers.Llama4TextConfig(
        **sizes, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=4
    )
    with pytest.raises(ValueError, match="Llama4TextAttention attends within chunks"):
        peft.get_peft_model(transformers.Llama4ForCausalLM(config), PrefixConfig())


def test_another_tuner_leaves_a_patched_prefix_alone() -> None:
    base = made("llama")
    theirs = peft.PrefixTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")
    model = peftfast.patch(peft.get_peft_model(base, theirs), strict=True).eval()
    expected = logits(model)
    with pytest.raises(ValueError, match="has a prefix of another source"):
        peft.get_peft_model(base, PrefixConfig())
    assert torch.equal(logits(model), expected)
    peft.get_peft_model(base, HoulsbyConfig(bottleneck=4, train_norms=False)).unload()
    assert torch.equal(logits(model), expected)


def test_an_attention_takes_one_source() -> None:
    model = prefixed()
    core = model.base_model.model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="has a prefix of another source"):
        attention.attach(core, hosts(model)[1])
