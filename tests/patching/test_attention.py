"""Attention under a padding mask: groups of heads and one additive mask, and the shared config."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast.patching import patch, report, unpatch
from peftfast.patching.attention import NAME, SharedConfig, additive
from tests.patching.tiny import adapted, copy_of, inputs_of, step_is_as_good, train_step

FAMILIES = ["llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "opt", "bert", "roberta", "t5"]


def padded(family: str) -> dict[str, Tensor]:
    inputs = inputs_of(family)
    inputs["attention_mask"][1, 4:] = 0
    return inputs


def config_of(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.config


def saved_masks(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of what a forward saves the storages of square masks, and of keys and values, once each."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)
    masks = [t for t in found.values() if t.shape[-2:] == (7, 7)]
    keys = [t for t in found.values() if t.shape[-2:] == (7, 8) and t.shape[1] > 1]
    assert output.loss is not None
    return masks, keys


@pytest.mark.parametrize("family", FAMILIES)
def test_as_good_as_peft_under_padding(family: str) -> None:
    model = adapted(family)
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        step_is_as_good(model, peft, padded(family))
    assert any(entry.op == "sdpa" and entry.hits for entry in report(model).fused)


def test_one_mask_and_no_repeated_keys() -> None:
    model = adapted()
    peft = copy_of(model)
    patch(model)
    model(**padded("llama"))
    masks, keys = saved_masks(model, padded("llama"))
    assert [mask.shape for mask in masks] == [(2, 1, 7, 7)]
    assert sorted(t.shape[1] for t in keys) == [2] * 4 + [4] * 4  # k and v; q and the output
    masks, keys = saved_masks(peft, padded("llama"))
    assert len(masks) > 1
    assert sorted(t.shape[1] for t in keys) == [4] * 8


def test_the_mask_goes_with_the_graph() -> None:
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    first = additive(mask, torch.float32)
    assert additive(mask, torch.float32) is first
    assert additive(mask, torch.bfloat16).dtype == torch.bfloat16
    first = additive(mask, torch.float32)
    mask[0, 0, 0, 0] = False
    second = additive(mask, torch.float32)
    assert second is not first and second[0, 0, 0, 0] == -torch.inf
    second.add_(1)
    assert additive(mask, torch.float32)[1, 0, 0, 0] == 0
    expanded = mask[:, :1].expand(2, 5, 7, 7)
    assert additive(expanded, torch.float32).shape == (2, 5, 7, 7)
    assert additive(expanded, torch.float32).untyped_storage().nbytes() == 4 * 2 * 49


def test_bits_of_the_additive_mask() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 7, 8) for _ in range(3))
    mask = torch.rand(2, 1, 7, 7) > 0.4
    mask[..., 0] = True
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attend(q, k, v, additive(mask, q.dtype)), attend(q, k, v, mask))


def test_another_implementation_is_followed() -> None:
    model = adapted()
    peft = copy_of(model)
    patch(model)
    assert config_of(model)._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
    for m in (model, peft):
        m.base_model.model.set_attn_implementation("eager")
    assert config_of(model)._attn_implementation == "eager"
    step_is_as_good(model, peft, padded("llama"))
    assert all(entry.hits == 0 for entry in report(model).fused if entry.op == "sdpa")
    model.base_model.model.set_attn_implementation("sdpa")
    assert config_of(model)._attn_implementation == NAME


def test_the_config_is_shared() -> None:
    model = adapted()
    own = config_of(model)
    patch(model)
    shared = config_of(model)
    assert shared is not own and isinstance(shared, type(own))
    own.some_setting = 3
    assert shared.some_setting == 3
    shared.some_setting = 4
    assert own.some_setting == 4
    shared._attn_implementation = "eager"
    assert own._attn_implementation == "eager"
    assert own.to_dict() == shared.to_dict()
    assert unpatch(model) is model
    assert config_of(model) is own


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_with_their_own(how: Any) -> None:
    model = patch(adapted())
    twin = how(model)
    assert isinstance(config_of(twin), SharedConfig)
    twin.config.some_setting = 5
    assert config_of(twin).some_setting == 5
    assert not hasattr(config_of(model), "some_setting")
    assert vars(config_of(unpatch(twin))) is vars(twin.base_model.model.config)
    assert config_of(model)._attn_implementation == NAME


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate(family: str) -> None:
    model = adapted(family)
    peft = copy_of(model)
    patch(model)
    inputs = padded(family)
    given = {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**given, **settings), peft.generate(**given, **settings))


def test_left_padding_with_rows_that_attend_to_nothing() -> None:
    model = adapted()
    peft = copy_of(model)
    patch(model)
    inputs = inputs_of()
    inputs["attention_mask"][1, :3] = 0
    inputs["labels"][1, :3] = -100
    for _ in range(2):
        step_is_as_good(model, peft, inputs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_under_padding(reentrant: bool) -> None:
    model = adapted()
    peft = copy_of(model)
    patch(model)
    for m in (model, peft):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.enable_input_require_grads()
        m.train()
    for _ in range(3):
        step_is_as_good(model, peft, padded("llama"))


def test_compiled_under_padding() -> None:
    torch._dynamo.reset()
    model = adapted().train()
    peft = copy_of(model)
    patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, expected = train_step(compiled, padded("llama")), train_step(peft, padded("llama"))
    for name, value in expected.items():
        key = name if name == "logits" else f"_orig_mod.{name}"
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
