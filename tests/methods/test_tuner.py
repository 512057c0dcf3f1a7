"""The tuner behind declared methods: PEFT's own ways of handling an adapter, on ours."""

from __future__ import annotations

import copy
import inspect
import io
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertModel
from transformers.utils.peft_utils import check_peft_version

import peftfast
from peftfast import methods
from peftfast.methods import (
    AdapterHost,
    CompacterConfig,
    Component,
    HoulsbyConfig,
    ParallelAdapterConfig,
    UnifiedConfig,
    hosts,
    muted,
)
from tests.patching.tiny import FAMILIES, VOCAB


def made(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return FAMILIES[family].make().eval()


def randomised(model: nn.Module, seed: int = 1, adapter: str | None = None) -> None:
    """Random values for every parameter of the adapters, so that they change the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if ".peftfast_" in name and (adapter is None or f".{adapter}." in name):
            value.data = torch.randn(value.shape, generator=generator).to(value) * 0.2


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens()).logits


def houlsby(**options: Any) -> HoulsbyConfig:
    return HoulsbyConfig(**{"bottleneck": 4, **options})


def parallel(**options: Any) -> ParallelAdapterConfig:
    return ParallelAdapterConfig(**{"bottleneck": 4, **options})


def test_a_real_peft_model_with_only_the_declared_parameters_trainable() -> None:
    model = peft.get_peft_model(made("llama"), houlsby())
    assert isinstance(model, peft.PeftModel)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".peftfast_" in n or ".modules_to_save." in n for n in trainable)
    norms = [n for n in trainable if ".modules_to_save." in n]
    assert len(norms) == 5  # two a layer, and the last one
    assert {n.split(".peftfast_")[0].rsplit(".", 1)[-1] for n in set(trainable) - set(norms)} == {
        "o_proj", "down_proj",
    }  # fmt: skip
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable


def test_sequential_adapters_are_what_the_formula_says() -> None:
    model = peft.get_peft_model(made("llama"), houlsby(activation="relu"))
    randomised(model)
    host = hosts(model)[0]
    (placement, adapter), *rest = host.components("default")
    assert not rest and placement.component.site == "attention_output"
    x = torch.randn(2, 3, 32)
    y = host.base_layer(x)
    hidden = F.relu(y @ adapter.down_weight.T + adapter.down_bias)
    expected = y + hidden @ adapter.up_weight.T + adapter.up_bias
    torch.testing.assert_close(host(x), expected)


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_a_parallel_adapter_reads_what_the_feed_forward_reads(family: str) -> None:
    """BERT and OPT read at one module and add at another; the value must travel."""
    model = peft.get_peft_model(made(family), parallel(layers=[0]))
    randomised(model)
    host = hosts(model)[0]
    ((placement, adapter),) = host.components("default")
    first = model.base_model.model.get_submodule(placement.tap or placement.host)
    seen: list[torch.Tensor] = []
    first.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before: list[torch.Tensor] = []
    host.base_layer.register_forward_hook(lambda _, args, out: before.append(out))
    after: list[torch.Tensor] = []
    host.register_forward_hook(lambda _, args, out: after.append(out))
    model(input_ids=tokens())
    x = seen[0]
    hidden = F.relu(F.linear(x, adapter.down_weight, adapter.down_bias))
    expected = before[0] + F.linear(hidden, adapter.up_weight, adapter.up_bias)
    torch.testing.assert_close(after[0], expected)
    assert first._waiting.seen is None


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_parallel_beside_attention_joins_what_the_heads_give(family: str) -> None:
    model = peft.get_peft_model(made(family), parallel(sublayers=["attention"]))
    randomised(model)
    for host in hosts(model):
        ((placement, adapter),) = host.components("default")
        assert placement.side == "input"
        assert adapter.out_features == host.get_base_layer().in_features
    inputs = {"input_ids": tokens()}
    if family == "t5":
        inputs["labels"] = tokens()
    assert torch.isfinite(model(**inputs).logits).all()


def test_set_disable_add_and_delete_adapters() -> None:
    base = made("bert")
    plain = logits(base)
    model = peft.get_peft_model(base, houlsby(train_norms=False))
    model.add_adapter("other", parallel())
    randomised(model)
    first = logits(model)
    assert not torch.allclose(first, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second) and not torch.allclose(second, plain)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".other." in n for n in trainable)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert not any(torch.allclose(both, one) for one in (first, second, plain))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any(".default." in n for n in model.state_dict())
    assert torch.equal(logits(model.unload()), plain)
    assert not any(isinstance(one, AdapterHost) for one in base.modules())


def test_unload_gives_the_very_modules_back() -> None:
    base = made("opt")
    kinds = {name: (id(module), type(module)) for name, module in base.named_modules()}
    names = set(base.state_dict())
    back = peft.get_peft_model(base, parallel()).unload()
    assert back is base and set(base.state_dict()) == names
    assert {n: (id(m), type(m)) for n, m in base.named_modules()} == kinds


def test_sequential_adapters_are_not_merged_and_nothing_changes() -> None:
    model = peft.get_peft_model(made("llama"), houlsby(train_norms=False))
    randomised(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"can't be merged.*sequential.*unload\(\)"):
            merge()
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_linear_parallel_adapter_merges_into_its_linear(family: str) -> None:
    """GPT-2's Conv1D has its weight the other way round, and a bias, which takes theirs."""
    bias = family == "gpt2"
    component = Component(
        "ffn_down", insertion="parallel", form="identity", bottleneck=3, scaling=0.5, bias=bias
    )
    base = made(family)
    model = peft.get_peft_model(base, UnifiedConfig(components=[component]))
    randomised(model)
    expected = logits(model)
    weights = {n: v.clone() for n, v in model.state_dict().items() if "base_layer" in n}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(model.state_dict()[n], v) for n, v in weights.items())
    model.unmerge_adapter()
    for name, value in weights.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert type(merged) is type(base)


def test_merging_beside_an_adapter_that_would_see_it_is_refused() -> None:
    """The merged change would go through the other's, or read what it has changed."""
    component = Component(
        "ffn_down", insertion="parallel", form="identity", bottleneck=2, bias=False, name="linear"
    )
    for site in ("ffn_hidden", "ffn_output"):
        model = peft.get_peft_model(made("llama"), UnifiedConfig(components=[component]))
        model.add_adapter("other", UnifiedConfig(components=[Component(site, bottleneck=2)]))
        randomised(model)
        model.base_model.set_adapter(["other", "default"])
        expected = logits(model)
        with pytest.raises(ValueError, match="'other', which is active and not merged"):
            model.merge_adapter(adapter_names=["default"])
        assert torch.equal(logits(model), expected)
        model.base_model.set_adapter("default")
        expected = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def compacter_factors(model: nn.Module) -> list[torch.Tensor]:
    return [p for n, p in model.named_parameters() if n.endswith(".shared")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compacters_factor_stays_one(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT replaces parameters when it casts them, and when it loads onto the meta device."""
    config = CompacterConfig(bottleneck=4, train_norms=False)
    model = peft.get_peft_model(made("llama").to(dtype), config)
    assert len(compacter_factors(model)) == 1
    randomised(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "peft")
    folder = str(tmp_path / "peft")
    low = peft.PeftModel.from_pretrained(
        made("llama").to(dtype), folder, low_cpu_mem_usage=True, is_trainable=True
    )
    assert len(compacter_factors(low)) == 1 and torch.equal(logits(low), expected)
    copied = copy.deepcopy(low)
    compacter_factors(copied)[0].data.mul_(3.0)
    assert torch.equal(logits(low), expected)
    assert not torch.allclose(logits(copied), expected)


def test_adapters_with_a_batch_norm_over_a_16_bit_base() -> None:
    for keep in (True, False):
        config = houlsby(norm="batch", train_norms=False)
        base = made("bert").to(torch.bfloat16)
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=keep).train()
        before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("norm_mean")}
        inputs = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
        model(**inputs).loss.backward()
        after = dict(model.named_buffers())
        assert before and all(after[n].dtype == torch.float32 for n in before)
        assert all(not torch.equal(after[n], value) for n, value in before.items())
        assert torch.isfinite(model.eval()(**inputs).logits).all()


def test_a_field_of_another_version_takes_no_other_with_it(tmp_path: Path) -> None:
    model = peft.get_peft_model(made("bert"), houlsby(activation="tanh", scaling=3.0))
    randomised(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "brand_new": 1}))
    with pytest.warns(UserWarning, match="HoulsbyConfig does not know brand_new"):
        again = peft.PeftModel.from_pretrained(made("bert"), tmp_path)
    assert torch.equal(logits(again), expected)


def test_a_copy_after_an_interrupted_forward() -> None:
    model = peft.get_peft_model(made("bert"), parallel())
    inside = model.base_model.model.bert.encoder.layer[1].intermediate.intermediate_act_fn

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = inside.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        model(input_ids=tokens())
    handle.remove()
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_a_bias_without_a_place_is_not_merged() -> None:
    component = Component("ffn_down", insertion="parallel", form="identity", bottleneck=3)
    model = peft.get_peft_model(made("llama"), UnifiedConfig(components=[component]))
    with pytest.raises(ValueError, match="has biases, and the base linear has none"):
        model.merge_adapter()


def test_save_and_load(tmp_path: Path) -> None:
    config = houlsby(task_type="SEQ_CLS")
    model = peft.get_peft_model(made("bert"), config).eval()
    randomised(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PEFTFAST" and saved["method"] == "houlsby"
    again = peft.PeftModel.from_pretrained(made("bert", seed=0), tmp_path).eval()
    assert type(again.peft_config["default"]) is HoulsbyConfig
    assert torch.equal(logits(again), expected)
    model.load_adapter(tmp_path, "copy")
    model.set_adapter("copy")
    assert torch.equal(logits(model), expected)


def test_transformers_own_adapter_methods(tmp_path: Path) -> None:
    try:
        check_peft_version("0.19.1")
    except ValueError as error:
        pytest.skip(f"what transformers says: {error}")
    model = made("llama")
    plain = logits(model)
    model.add_adapter(houlsby(train_norms=False))
    randomised(model)
    expected = logits(model)
    assert not torch.allclose(plain, expected)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.add_adapter(parallel(), adapter_name="other")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    again = made("llama")
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), expected)
    compacter = made("llama")
    compacter.add_adapter(CompacterConfig(bottleneck=4, train_norms=False))
    compacter.save_pretrained(tmp_path / "compacter")
    again = made("llama")
    again.load_adapter(str(tmp_path / "compacter"))
    assert torch.equal(logits(again), logits(compacter)) and len(compacter_factors(again)) == 1
    model.delete_adapter("default")
    assert not any(".default." in name for name in model.state_dict())


def test_copies_stand_alone() -> None:
    """A copy's parallel adapters must read the copy's values, also after pickling."""
    model = peft.get_peft_model(made("bert"), parallel())
    randomised(model)
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    copied = copy.deepcopy(model)
    randomised(model, seed=9)
    assert not torch.allclose(logits(model), expected)
    for one in (pickled, copied):
        assert torch.equal(logits(one), expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_compiles_whole(family: str) -> None:
    model = peft.get_peft_model(made(family), parallel())
    randomised(model)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected)


def test_a_configuration_serves_several_models() -> None:
    config = houlsby()
    for family, norms in (("bert", 5), ("llama", 5), ("gemma3", 13)):
        model = peft.get_peft_model(made(family), config)
        trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert sum(".modules_to_save." in name for name in trained) == norms
        assert config.modules_to_save is not None and len(config.modules_to_save) == norms


def test_every_linear_by_one_word() -> None:
    component = Component("modules", insertion="parallel", form="identity", bottleneck=2)
    config = UnifiedConfig(components=[component], target_modules="all-linear")
    model = peft.get_peft_model(made("llama"), config)
    assert len(hosts(model)) == 14


def test_attributes_of_what_is_wrapped_are_there() -> None:
    model = peft.get_peft_model(made("bert"), houlsby())
    dropout = model.base_model.model.bert.encoder.layer[0].output.dropout
    assert isinstance(dropout, AdapterHost) and dropout.p == 0.0
    with pytest.raises(AttributeError, match="nothing_there"):
        _ = dropout.nothing_there


def test_muted_layers_are_the_base_models() -> None:
    base = made("bert")
    plain = logits(base)
    model = peft.get_peft_model(base, houlsby(train_norms=False))
    randomised(model)
    whole = logits(model)
    with muted(model, [0, 1]):
        assert torch.equal(logits(model), plain)
    with muted(model, [1], adapter="default"):
        some = logits(model)
    assert not torch.allclose(some, whole) and not torch.allclose(some, plain)
    with pytest.raises(RuntimeError, match="stop"):
        with muted(model, [0]):
            raise RuntimeError("stop")
    assert torch.equal(logits(model), whole)
    with pytest.raises(ValueError, match=r"layers has \[7\]"):
        with muted(model, [7]):
            pass
    with pytest.raises(ValueError, match="no adapters"):
        with muted(made("bert"), [0]):
            pass


def test_layers_are_chosen_by_position() -> None:
    model = peft.get_peft_model(made("t5"), houlsby(layers=[1, 3], train_norms=False))
    names = {host.block.name for host in hosts(model) if host.block is not None}
    assert names == {"encoder.block.1", "decoder.block.1"}


def test_a_component_keeps_to_its_stack() -> None:
    only = Component("ffn_output", bottleneck=2, stack="encoder")
    model = peft.get_peft_model(made("t5"), UnifiedConfig(components=[only]))
    assert {host.block.stack for host in hosts(model) if host.block is not None} == {"encoder"}
    with pytest.raises(ValueError, match="no ffn_output on this model within stack 'decoder'"):
        wrong = Component("ffn_output", bottleneck=2, stack="decoder")
        peft.get_peft_model(made("bert"), UnifiedConfig(components=[wrong]))


def test_adapters_of_a_model_in_evaluation_do_not_drop() -> None:
    model = peft.get_peft_model(made("bert"), houlsby(dropout=0.5))
    randomised(model)
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


def test_adapters_of_a_16_bit_base_are_float32() -> None:
    model = peft.get_peft_model(made("llama").to(torch.bfloat16), houlsby(train_norms=False))
    kinds = {p.dtype for n, p in model.named_parameters() if ".peftfast_" in n}
    assert kinds == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_low_memory_loading(tmp_path: Path) -> None:
    model = peft.get_peft_model(made("bert"), houlsby(train_norms=False))
    randomised(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(made("bert"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), expected)


# What is refused


def untouched(base: nn.Module, before: dict[str, Any]) -> None:
    assert {n: (id(m), type(m)) for n, m in base.named_modules()} == before
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Component("ffn_outptu"), "site is 'ffn_outptu'; allowed: .*'ffn_output'"),
        (lambda: Component("ffn_input", bottleneck=4), "can be read .* not written"),
        (lambda: Component("ffn_output"), "bottleneck is None and reduction is None"),
        (lambda: Component("ffn_output", bottleneck=0), "bottleneck is 0"),
        (lambda: Component("ffn_output", bottleneck=2.5), "bottleneck is float"),
        (lambda: Component("ffn_output", bottleneck=4, form="swosh"), "'swosh'"),
        (lambda: Component("ffn_output", bottleneck=4, reads="ffn_input"), "sequential"),
        (lambda: Component("ffn_output", bottleneck=4, name="a.b"), "name is 'a.b'"),
        (lambda: HoulsbyConfig(bottleneck=-1), "bottleneck is -1"),
        (lambda: HoulsbyConfig(bottleneck=4, reduction=2), "give exactly one"),
        (lambda: HoulsbyConfig(sublayers=["attn"]), "sublayers has 'attn'"),
        (lambda: HoulsbyConfig(sublayers=[]), "sublayers is empty"),
        (lambda: HoulsbyConfig(attention_position="middle"), "attention_position is 'middle'"),
        (lambda: HoulsbyConfig(layers=[-1]), "layers has -1"),
        (lambda: HoulsbyConfig(layers=[]), "layers is empty"),
        (lambda: HoulsbyConfig(method="pfeiffer"), "method is 'pfeiffer'"),
        (lambda: HoulsbyConfig(reduction="a"), "reduction is str"),
        (lambda: HoulsbyConfig(sublayers=None), "sublayers is NoneType"),
        (lambda: HoulsbyConfig(target_modules=["query"]), "only components at the site"),
        (lambda: methods.AdapterConfig(), "use one of .*HoulsbyConfig"),
        (lambda: methods.register_method(int), "needs a name"),
        (lambda: UnifiedConfig(), "no component"),
        (lambda: UnifiedConfig(components=[{"bottleneck": 3}]), "no site"),
        (lambda: UnifiedConfig(components=[{"site": "ffn_up", "m": 3}]), "has m, which"),
        (lambda: UnifiedConfig(components=[Component("ffn_up", bottleneck=2)] * 2), "2 components"),
        (
            lambda: UnifiedConfig(components=[Component("modules", bottleneck=2)]),
            "target_modules is not set",
        ),
        (lambda: methods.MethodConfig(), "method is missing"),
        (lambda: methods.MethodConfig(method="nope"), "'nope', which is not registered"),
    ],
)
def test_a_wrong_declaration_says_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            UnifiedConfig(components=[Component("cross_attention_output", bottleneck=2)]),
            "finds no cross_attention_output on this model; its 2 layers have .*ffn_output",
        ),
        (HoulsbyConfig(layers=[2]), r"layers has \[2\]; the model has 2 layers"),
        (
            UnifiedConfig(
                components=[Component("modules", bottleneck=2)], target_modules=["nothing"]
            ),
            "target_modules is \\['nothing'\\], and no linear",
        ),
        (
            UnifiedConfig(components=[Component("modules", bottleneck=2)], target_modules="bert"),
            "target_modules name bert, a BertModel",
        ),
    ],
)
def test_a_configuration_that_finds_no_place_leaves_the_model_alone(
    config: Any, message: str
) -> None:
    base = made("bert")
    before = {n: (id(m), type(m)) for n, m in base.named_modules()}
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(base, config)
    untouched(base, before)


def test_a_model_without_layers_is_refused() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match="no transformer block was found"):
        peft.get_peft_model(base, houlsby())
    assert type(base[0]) is nn.Linear


def test_a_checkpoint_of_another_shape_is_refused_before_anything_changes(tmp_path: Path) -> None:
    peft.get_peft_model(made("bert"), houlsby()).save_pretrained(tmp_path)
    from transformers import BertConfig

    wider = BertModel(
        BertConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=4)
    )  # fmt: skip
    before = {n: (id(m), type(m)) for n, m in wider.named_modules()}
    with pytest.raises(ValueError, match="made for another model.*32, 32.*64, 64"):
        peft.PeftModel.from_pretrained(wider, tmp_path)
    untouched(wider, before)


def test_a_checkpoint_of_another_model_of_the_same_widths_is_refused(tmp_path: Path) -> None:
    peft.get_peft_model(made("bert"), houlsby()).save_pretrained(tmp_path)
    llama = made("llama")
    before = {n: (id(m), type(m)) for n, m in llama.named_modules()}
    with pytest.raises(ValueError, match=r"bert.encoder.layer.#.output.dropout.*down_proj"):
        peft.PeftModel.from_pretrained(llama, tmp_path)
    untouched(llama, before)


def test_a_configuration_has_its_own_signature() -> None:
    parameters = inspect.signature(HoulsbyConfig).parameters
    assert {"bottleneck", "init_std", "task_type"} <= set(parameters) and "self" not in parameters
    assert "components" in inspect.signature(UnifiedConfig).parameters


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    """Weights that don't fit their own configuration: a damaged checkpoint."""
    model = peft.get_peft_model(made("bert"), houlsby())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"bottleneck": 4', '"bottleneck": 6'))
    with pytest.raises((RuntimeError, ValueError), match="size mismatch|shape"):
        peft.PeftModel.from_pretrained(made("bert"), tmp_path)


def test_another_methods_layer_is_not_wrapped() -> None:
    model = peft.get_peft_model(made("llama"), peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="peft types|already adapted"):
        model.add_adapter("ours", houlsby())
    with pytest.raises(ValueError, match="already adapted by another method"):
        peft.inject_adapter_in_model(houlsby(), model.base_model.model, "ours")


def test_the_package_offers_configurations_lazily() -> None:
    assert peftfast.HoulsbyConfig is HoulsbyConfig
    assert "UnifiedConfig" in dir(peftfast)
    with pytest.raises(AttributeError, match="NoSuchConfig"):
        _ = peftfast.NoSuchConfig
