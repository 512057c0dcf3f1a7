"""patch on PEFT's Prefix-Tuning and CARTRIDGE: the same model, without its copies."""

from __future__ import annotations

import copy
import filecmp
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor

import peftfast
from peftfast.methods import attention, positions
from peftfast.ops.dispatch import ImplUnavailable
from peftfast.patching import peft_prefix
from tests.patching.tiny import FAMILIES, VOCAB, copy_of, inputs_of, step_is_as_good, train_step

TOKENS = 5
CARTRIDGE = getattr(peft, "CartridgeConfig", None)  # since peft 0.19
DECODERS = ("llama", "qwen3", "gpt2", "gemma3")
TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def prefixed(family: str = "llama", kind: Any = PrefixTuningConfig, **settings: Any) -> Any:
    torch.manual_seed(0)
    task = TASKS.get(family, "CAUSAL_LM")
    config = kind(num_virtual_tokens=TOKENS, task_type=task, **settings)
    return get_peft_model(FAMILIES[family].make(), config).eval()


def padded(family: str = "llama", side: str = "left") -> dict[str, Tensor]:
    inputs = inputs_of(family)
    masked = slice(0, 2) if side == "left" else slice(-2, None)
    inputs["attention_mask"][0, masked] = 0
    if inputs["labels"].ndim == 2:
        inputs["labels"][0, masked] = -100
    return inputs


def rows(model: Any) -> list[Any]:
    return [entry for entry in peftfast.report(model).fused if entry.op == "prefix_attention"]


def reasons(model: Any, name: str) -> str:
    found = [e for e in peftfast.report(model).not_fused if e.path.endswith(name)]
    return "; ".join(reason for entry in found for reason in entry.reasons)


@pytest.mark.parametrize(
    "family", [*DECODERS, "opt", "phi3", "mistral", "bert", "roberta", "qwen3_moe"]
)
def test_a_step_is_as_good_as_peft_s(family: str) -> None:
    theirs = prefixed(family)
    ours = peftfast.patch(copy_of(theirs), strict=True)
    side = "right" if family in TASKS else "left"
    inputs = padded(family, side)
    if family == "opt":  # of padding PEFT computes other positions, whose values nothing reads
        with torch.no_grad():
            got, expected = ours(**inputs).logits, theirs(**inputs).logits
        there = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[there], expected[there])
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    step_is_as_good(ours, theirs, inputs)
    assert len(rows(ours)) == 2
    assert all(entry.hits and not entry.note for entry in rows(ours))


@pytest.mark.parametrize("kind", [PrefixTuningConfig, CARTRIDGE])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradient_checkpointing_leaves_gradients_as_they_are(kind: Any, reentrant: Any) -> None:
    if kind is None:
        pytest.skip("this peft has no CARTRIDGE")
    projected = {"prefix_projection": True, "encoder_hidden_size": 8}
    theirs = prefixed(kind=kind, **(projected if kind is PrefixTuningConfig else {}))
    ours = peftfast.patch(copy_of(theirs)).train()
    if reentrant is not None:
        ours.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        ours.enable_input_require_grads()
    step_is_as_good(ours, theirs, padded())
    hits = rows(ours)[0].hits
    assert hits == (1 if reentrant is None else 2)


def test_a_checkpoint_computes_again_what_its_forward_saw() -> None:
    """Whatever ran between the forward and its backward."""
    theirs = prefixed()
    ours = peftfast.patch(copy_of(theirs)).train()
    ours.gradient_checkpointing_enable()
    inputs = padded()
    loss = ours(**inputs).loss
    with torch.no_grad(), ours.disable_adapter():
        ours(**inputs)
    loss.backward()
    expected = train_step(theirs, inputs)["prompt_encoder.default.embedding.weight"]
    torch.testing.assert_close(ours.prompt_encoder["default"].embedding.weight.grad, expected)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_gives_peft_s_tokens(family: str, settings: dict[str, Any]) -> None:
    theirs = prefixed(family)
    ours = peftfast.patch(copy_of(theirs))
    given = padded(family)
    del given["labels"]
    given |= {"max_new_tokens": 9, "do_sample": False, **settings}
    expected = theirs.generate(**given)
    assert torch.equal(ours.generate(**given), expected)
    assert rows(ours)[0].hits > 2


def test_generate_takes_the_cache_that_it_is_told() -> None:
    theirs = prefixed("gemma3")  # of which PEFT makes a dynamic one
    ours = peftfast.patch(copy_of(theirs))
    given = inputs_of("gemma3")
    del given["labels"]
    given |= {"max_new_tokens": 9, "do_sample": False}
    expected = theirs.generate(**given)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(ours.generate(**given, **static), expected)
    assert torch.equal(ours.generate(**given, use_cache=False), expected)


def test_the_prefix_takes_no_room_in_the_cache() -> None:
    ours = peftfast.patch(prefixed())
    inputs = inputs_of()
    cache = ours(input_ids=inputs["input_ids"], use_cache=True).past_key_values
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert cache.layers[0].keys.shape[2] == inputs["input_ids"].shape[1]


def test_given_positions_move_as_peft_s() -> None:
    theirs = prefixed()
    ours = peftfast.patch(copy_of(theirs))
    given = {**inputs_of(), "position_ids": torch.arange(7)[None] * 2}
    with torch.no_grad():
        torch.testing.assert_close(ours(**given).logits, theirs(**given).logits)


def test_without_the_prefix_the_base_model_runs() -> None:
    theirs = prefixed()
    ours = peftfast.patch(copy_of(theirs))
    inputs = padded()
    tokens = {"input_ids": inputs["input_ids"], "max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        expected = theirs.base_model(**inputs).logits
        assert torch.equal(ours.base_model(**inputs).logits, expected)
        with ours.disable_adapter(), theirs.disable_adapter():
            assert torch.equal(ours(**inputs).logits, expected)
            assert torch.equal(ours.generate(**tokens), theirs.generate(**tokens))
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)


def test_adapters_come_and_go() -> None:
    theirs = prefixed()
    ours = peftfast.patch(copy_of(theirs))
    inputs = padded()
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        model.set_adapter("b")
    step_is_as_good(ours, theirs, inputs)
    for model in (ours, theirs):
        model.set_adapter("default")
    step_is_as_good(ours, theirs, inputs)
    if hasattr(PeftModel, "_adjust_prompt_learning_kwargs"):  # since peft 0.19 it can
        ours.delete_adapter("b")
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    ours.gradient_checkpointing_enable()
    ours.add_adapter("c", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert ours.is_gradient_checkpointing


def test_checkpoints_are_peft_s(tmp_path: Any) -> None:
    theirs = prefixed(prefix_projection=True, encoder_hidden_size=8)
    ours = peftfast.patch(copy_of(theirs))
    names = [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = ["adapter_model.safetensors", "adapter_config.json"]
    assert (
        filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "ours", files, shallow=False)[0] == files
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unpatch_leaves_no_trace(family: str) -> None:
    model = prefixed(family)
    inputs = inputs_of(family)
    kinds = {name: type(module) for name, module in model.named_modules()}
    configs = {name: id(vars(m).get("config")) for name, m in model.named_modules()}
    with torch.no_grad():
        expected = model(**inputs).logits
        with model.disable_adapter():  # PEFT leaves methods on the instance
            pass
        peftfast.patch(peftfast.patch(model))
        assert isinstance(model, kinds[""]) and type(model) is not kinds[""]
        model(**inputs)
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=2)
        peftfast.unpatch(peftfast.unpatch(model))
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert {name: id(vars(m).get("config")) for name, m in model.named_modules()} == configs
        for name, module in model.named_modules():
            assert not any(key.startswith("_peftfast") for key in vars(module)), name
            assert attention.source_of(module) is None and positions.offset_of(module) is None
        assert not any(h for m in model.modules() for h in m._forward_pre_hooks.values())
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_their_own(how: str) -> None:
    theirs = prefixed("gpt2")
    ours = peftfast.patch(copy_of(theirs))
    if how == "deepcopy":
        other = copy.deepcopy(ours)
    else:
        held = io.BytesIO()
        torch.save(ours, held)
        held.seek(0)
        other = torch.load(held, weights_only=False)
    inputs = inputs_of("gpt2")
    with torch.no_grad():
        expected = theirs(**inputs).logits
        ours.prompt_encoder["default"].embedding.weight.zero_()
        torch.testing.assert_close(other(**inputs).logits, expected)
    assert rows(other)[0].hits == 1 and rows(ours)[0].hits == 0
    peftfast.unpatch(ours)
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).logits, expected)
    assert type(peftfast.unpatch(other)) is type(theirs)


def test_a_relative_position_bias_is_left_to_peft() -> None:
    theirs = prefixed("t5")
    with pytest.warns(UserWarning, match="relative position bias, which with PEFT reaches"):
        ours = peftfast.patch(copy_of(theirs))
    assert "relative position bias" in reasons(ours, "SelfAttention")
    inputs = inputs_of("t5")
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


def test_attention_that_can_t_be_reached_is_named() -> None:
    config = hf.FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    )
    settings = {"num_attention_heads": 1, "token_dim": 8}
    prefix = PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(hf.FalconForCausalLM(config), prefix)
    with pytest.warns(UserWarning, match="nothing was fused"):
        peftfast.patch(model)
    assert "FalconAttention" in reasons(model, "self_attention")
    with pytest.raises(RuntimeError, match="strict"):
        peftfast.patch(model, strict=True)


def test_a_decoder_s_self_attention_has_what_peft_gives_it() -> None:
    """Of BART PEFT's prefix reaches that alone, by parts of an order of its own."""
    torch.manual_seed(0)
    config = hf.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0,
        max_position_embeddings=40, pad_token_id=0, decoder_start_token_id=2, eos_token_id=2,
        bos_token_id=1, forced_eos_token_id=2,
    )  # fmt: skip
    prefix = PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="SEQ_2_SEQ_LM")
    theirs = get_peft_model(hf.BartForConditionalGeneration(config), prefix).eval()
    ours = peftfast.patch(copy_of(theirs))
    assert len(rows(ours)) == 3 and all("decoder" in row.path for row in rows(ours))
    inputs = padded()
    step_is_as_good(ours, theirs, inputs)
    del inputs["labels"]
    given = {**inputs, "max_new_tokens": 7, "num_beams": 2}
    assert torch.equal(ours.generate(**given), theirs.generate(**given))


def test_tokens_are_classified_where_they_are() -> None:
    config = FAMILIES["bert"].make().config
    prefix = PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="TOKEN_CLS")
    torch.manual_seed(0)
    theirs = get_peft_model(hf.BertForTokenClassification(config), prefix).eval()
    ours = peftfast.patch(copy_of(theirs), strict=True)
    inputs = padded(side="right")
    inputs["labels"] %= 3
    step_is_as_good(ours, theirs, inputs)


def test_one_left_alone_leaves_all() -> None:
    model = prefixed()
    with pytest.warns(UserWarning, match="nothing was fused"):
        peftfast.patch(model, exclude=["layers.0.self_attn"])
    assert "excluded by" in reasons(model, "layers.0.self_attn")
    assert "of which some are left alone" in reasons(model, "layers.1.self_attn")
    assert not isinstance(model, peft_prefix.FusedPrefixModel)
    peftfast.patch(model)
    assert len(rows(model)) == 2


def test_probabilities_come_from_peft_s_forward() -> None:
    torch.manual_seed(0)
    base = FAMILIES["llama"].make()
    base.set_attn_implementation("eager")
    config = PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")
    theirs = get_peft_model(base, config).eval()
    ours = peftfast.patch(copy_of(theirs))
    inputs = inputs_of()
    with torch.no_grad():
        got, expected = (m(**inputs, output_attentions=True).attentions for m in (ours, theirs))
    assert torch.equal(got[1], expected[1])
    assert rows(ours)[0].delegations == {"attention probabilities are wanted": 1}


def test_what_differs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose positions didn't move is found out by the comparison."""
    monkeypatch.setattr(peft_prefix.PeftSource, "shift", lambda self: 0)
    model = prefixed()
    with pytest.warns(UserWarning, match="differs from PEFT's"):
        peftfast.patch(model)
    modes = {module.training for module in model.modules()}
    assert modes == {False} and not rows(model)


def test_the_comparison_leaves_no_trace() -> None:
    model = prefixed().train()
    model.base_model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    peftfast.patch(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


def test_an_implementation_that_is_named_is_asked_for() -> None:
    model = peftfast.patch(prefixed(), impl="reference")
    assert {entry.impl for entry in rows(model)} == {"reference"}
    with torch.no_grad():
        model(**inputs_of())
    with pytest.raises(ImplUnavailable):
        peftfast.patch(model, impl="native")


def test_16_bit_bases_round_the_prefix_as_peft_does() -> None:
    theirs = prefixed().half()
    theirs.prompt_encoder.float()
    ours = peftfast.patch(copy_of(theirs))
    inputs = padded()
    with torch.no_grad():
        got, expected = (m(**inputs).logits.float() for m in (ours, theirs))
        exact = copy_of(theirs).float()(**inputs).logits
    allowed = 2 * (expected - exact).norm() + 2**-10 * exact.norm()
    assert (got - exact).norm() <= allowed


def test_saved_bytes_do_not_grow_with_the_prefix_s_batch() -> None:
    """Whatever is kept for the backward is of the sequence, or has no batch."""

    def saved(model: Any, rows: int) -> int:
        kept: dict[tuple[int, int], int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
            return tensor

        inputs = inputs_of(rows=rows)
        embedded = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = model(inputs_embeds=embedded).logits
        held = sum(kept.values())
        logits.sum().backward()
        return held

    def growth(model: Any) -> int:
        return saved(model, 16) - saved(model, 8)

    ours = peftfast.patch(prefixed())
    with_prefix = growth(ours)
    with ours.disable_adapter():
        without = growth(ours)
    assert abs(with_prefix - without) <= 0.02 * without
    assert growth(prefixed()) > 1.2 * without


def test_a_step_compiles_in_one_graph() -> None:
    theirs = prefixed()
    ours = peftfast.patch(copy_of(theirs))
    inputs = inputs_of()
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    compiled(**inputs).loss.backward()
    expected = train_step(theirs, inputs)["prompt_encoder.default.embedding.weight"]
    torch.testing.assert_close(ours.prompt_encoder["default"].embedding.weight.grad, expected)


def test_threads_and_forwards_within_forwards_have_runs_of_their_own() -> None:
    theirs = prefixed()
    theirs.add_adapter("other", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    ours = peftfast.patch(copy_of(theirs).eval(), strict=True)
    inputs = [torch.randint(3, VOCAB, (2, 7)) for _ in range(3)]

    @torch.no_grad()
    def of(model: Any, ids: Tensor) -> list[Tensor]:
        """Logits; those without the prefix, and another adapter's, made within a generation."""
        found: list[Tensor] = []

        def within(_: Tensor, scores: Tensor) -> Tensor:
            with model.disable_adapter():
                found.append(model(input_ids=ids).logits)
            model.set_adapter("other")
            found.append(model(input_ids=ids).logits)
            model.set_adapter("default")
            return scores

        model.generate(
            input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0,
            logits_processor=hf.LogitsProcessorList([within]),
        )  # fmt: skip
        return [*found, model(input_ids=ids).logits]

    for expected, got in zip(of(theirs, inputs[0]), of(ours, inputs[0]), strict=True):
        torch.testing.assert_close(got, expected)

    @torch.no_grad()
    def run(at: int) -> bool:
        return all(torch.equal(ours(input_ids=inputs[at]).logits, alone[at]) for _ in range(10))

    with torch.no_grad():
        alone = [ours(input_ids=one).logits for one in inputs]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [True] * 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_that_can_t_tell_forwards_apart_raises(reentrant: bool) -> None:
    model = peftfast.patch(prefixed(), strict=True).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    inputs = inputs_of("llama")
    loss = model(**inputs).loss
    model.get_base_model()(input_ids=inputs["input_ids"])
    with pytest.raises(RuntimeError, match="which can't tell them apart"):
        loss.backward()
    model.zero_grad()
    with torch.no_grad():
        model.get_base_model()(input_ids=inputs["input_ids"])
    model(**inputs).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0
