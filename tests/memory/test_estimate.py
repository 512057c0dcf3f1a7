"""Predictions: against real steps, against figures counted by hand, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftfast
from benchmarks.timed.memory_peak import FAMILIES, Case, measure_peak, predict
from peftfast.memory import PROFILES, ConfigError, MemoryReport, estimate
from peftfast.memory import build as building
from peftfast.memory.trace import CLASSES
from tests.memory.models import VOCABULARY, batch_of, config

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=8, target_modules="all-linear", **options)


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", "lora", 2, 128, FP32),
        Case("llama", "qlora", 1, 256, BF16),
        Case("qwen3", "lora", 1, 192, BF16, dropout=0.1),
        Case("gemma3", "full", 1, 128, BF16, checkpointing=True),
        Case("bert", "lora", 1, 192, BF16, patched=False),
        Case("t5", "qlora", 2, 64, FP32, checkpointing=True),
        Case("gpt2", "lora", 2, 128, FP32, checkpointing=True),
    ],
    ids=lambda case: case.title,
)
def test_prediction_is_what_the_allocator_reports(case: Case) -> None:
    measured = measure_peak(case, CPU)
    predicted = predict(case, CPU)
    assert abs(predicted.peak_bytes - measured) <= 0.05 * measured
    assert sum(predicted.by_class.values()) == predicted.peak_bytes


def test_every_family_has_a_case() -> None:
    families = {"llama", "qwen3", "gemma3", "bert", "t5", "gpt2"}
    assert families <= set(FAMILIES)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_layers_tell_what_many_take(
    method: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {
        "method": method,
        "seq": 64,
        "checkpointing": checkpointing,
        "device_profile": dataclasses.replace(PROFILES["a100-40gb"], workspace=0),
    }
    quick = estimate(config("llama", layers=9), **options)
    assert building.layer_plan(config("llama", layers=9)) == (2, 3, 7)
    monkeypatch.setattr(building, "layer_plan", lambda config: None)
    whole = estimate(config("llama", layers=9), **options)
    assert quick.peak_bytes == whole.peak_bytes
    assert quick.by_class == whole.by_class
    assert quick.peak_at == whole.peak_at


def test_patterns_of_layers_are_kept_whole() -> None:
    gemma = config("gemma3", layers=26)  # five layers of one kind, and one of the other
    assert building.layer_plan(gemma) == (8, 14, 3)
    assert building.with_layers(gemma, 8).layer_types == gemma.layer_types[:8]
    assert building.layer_plan(config("llama", layers=3)) is None


def test_weights_and_state_by_hand() -> None:
    report = estimate(config("llama"), method="full", seq=16, dtype="float32")
    hidden, inner, kv = 128, 352, 64
    layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * inner + 2 * hidden
    parameters = 2 * VOCABULARY * hidden + 3 * layer + hidden
    assert report.by_class["base weights"] == 4 * parameters
    # AdamW's two moments, besides a step count a parameter.
    assert 0 <= report.by_class["optimizer state"] - 8 * parameters < 4096
    assert report.by_class["adapters"] == 0


def test_four_bit_weights_by_hand() -> None:
    report = estimate(config("llama"), method="qlora:8", seq=16, dtype="bfloat16")
    hidden, inner, kv = 128, 352, 64
    linears = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    linears += [(inner, hidden), (inner, hidden), (hidden, inner)]
    packed = 3 * sum(rows * columns // 2 for rows, columns in linears)
    dense = 2 * (2 * VOCABULARY * hidden + (3 * 2 + 1) * hidden)
    assert report.by_class["base weights"] == packed + dense
    blocks = [-(-rows * columns // 64) for rows, columns in linears]
    nested = sum(count + 4 * -(-count // 256) + 4 * (256 + 16) + 4 for count in blocks)
    assert report.by_class["quantisation statistics"] == 3 * nested
    ranks = sum(8 * (rows + columns) for rows, columns in linears)
    assert report.by_class["adapters"] == 3 * 4 * ranks


def test_a_patched_model_keeps_less() -> None:
    options: Any = {"method": "lora", "batch": 4, "seq": 256, "device_profile": "a100-40gb"}
    patched = estimate(config("llama"), **options)
    plain = estimate(config("llama"), **options, patched=False)
    assert patched.by_class["saved activations"] < 0.6 * plain.by_class["saved activations"]
    assert patched.needed_bytes < plain.needed_bytes
    assert patched.fits() and not patched.fits(1 << 20)


def test_every_policy_can_be_predicted() -> None:
    options: Any = {"method": "lora", "batch": 64, "seq": 320}
    saved = {}
    for policy in ("keep", "recompute", "compress", "offload"):
        report = estimate(config("llama", layers=6), memory=policy, **options)
        assert report.settings["memory"] == policy
        saved[policy] = report.by_class["saved activations"]
    assert saved["keep"] > 1.2 * saved["recompute"]
    assert saved["offload"] < saved["recompute"]
    assert saved["compress"] <= 1.1 * saved["recompute"]


def test_generation_counts_the_cache_and_the_slots() -> None:
    of = config("llama")
    report = estimate(of, method="lora", mode="generate", batch=2, seq=128, dtype="bfloat16")
    assert report.by_class["gradients"] == report.by_class["optimizer state"] == 0
    cache = 2 * 3 * 2 * 128 * 64 * 2  # keys and values, layers, sequences, tokens, kv width, bytes
    assert cache * 0.6 <= report.by_class["KV cache"] <= cache * 1.4
    slots = estimate(
        of, method="lora", mode="generate", batch=2, seq=128, dtype="bfloat16", adapter_slots=5
    )
    assert slots.by_class["adapters"] == 5 * report.by_class["adapters"]


def test_a_live_model_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(building.model_class(config("llama"))(config("llama")), lora())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    live = estimate(model, batch=2, seq=64, patched=True, device_profile="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p.is_meta for p in model.parameters())
    from_config = estimate(
        config("llama"), method=lora(), batch=2, seq=64, dtype=FP32, device_profile="cpu"
    )
    assert live.peak_bytes == from_config.peak_bytes


def test_a_live_model_is_taken_as_it_is_unless_asked() -> None:
    model = peft.get_peft_model(building.model_class(config("llama"))(config("llama")), lora())
    options: dict[str, Any] = dict(batch=2, seq=128, device_profile="cpu")
    plain, patched = (estimate(model, patched=patched, **options) for patched in (False, True))
    keeping = estimate(model, patched=True, memory="keep", **options)
    assert patched.peak_bytes < min(keeping.peak_bytes, plain.peak_bytes)
    as_it_is = estimate(model, **options)
    assert as_it_is.peak_bytes == plain.peak_bytes and "not patched" in as_it_is.what
    for memory, expected in (("recompute", patched), ("keep", keeping)):
        peftfast.patch(model, memory=memory)
        as_it_is = estimate(model, **options)
        assert as_it_is.peak_bytes == expected.peak_bytes
        assert f"patched, memory={memory!r}" in as_it_is.what
        assert as_it_is.settings["memory"] == memory
    assert estimate(model, patched=False, **options).peak_bytes == plain.peak_bytes


def test_a_real_step_runs_after_a_prediction() -> None:
    """Nothing of a simulation stays behind in the process: buffers, modes, pretended devices."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        building.model_class(config("llama"))(config("llama")).to(BF16), lora()
    )
    peftfast.patch(model)
    expected = model(**batch_of(1, 64)).loss
    estimate(config("llama"), method="lora", seq=64, device_profile="cpu")
    estimate(config("llama"), method="qlora", seq=64, device_profile="h100")
    loss = model(**batch_of(1, 64)).loss
    loss.backward()
    assert torch.equal(loss, expected)
    assert not torch.empty(1).is_meta and str(torch.empty(1).device) == "cpu"


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_profile(profile: str) -> None:
    report = estimate(config("qwen3"), method="lora", seq=64, device_profile=profile)
    assert report.peak_bytes > 0 and report.peak_at and report.timeline
    assert report.needed_bytes >= report.peak_bytes


def test_a_report_is_readable_and_goes_into_json() -> None:
    report = estimate(config("llama"), method="lora", seq=64)
    assert isinstance(report, MemoryReport)
    text = str(report)
    assert "at the peak" in text and "base weights" in text and "fits" in text
    values = report.to_dict()
    assert values["peak_bytes"] == report.peak_bytes
    assert set(values["by_class"]) == set(CLASSES)
    phases = list(dict.fromkeys(point["phase"] for point in values["timeline"]))
    assert phases == ["inputs", "forward", "backward", "optimizer step"]
    assert report.saved_by_op and all(size > 0 for size in report.saved_by_op.values())


@pytest.mark.parametrize("optimizer, moments", [("adamw", 8), ("adamw_8bit", 2), ("none", 0)])
def test_optimizers(optimizer: str, moments: int) -> None:
    report = estimate(config("llama"), method="full", seq=16, dtype="float32", optimizer=optimizer)
    parameters = report.by_class["base weights"] // 4
    assert abs(report.by_class["optimizer state"] - moments * parameters) <= 0.06 * 8 * parameters


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"method": "lara"}, "method is 'lara'; allowed: full, lora, qlora"),
        ({"batch": 0}, "batch is 0; a positive whole number"),
        ({"seq": 1.5}, "seq is 1.5; a positive whole number"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: bfloat16"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; allowed: adamw"),
        ({"memory": "none"}, "memory is 'none'; allowed: recompute"),
        ({"mode": "test"}, "mode is 'test'; allowed: train, generate"),
        ({"device_profile": "v100"}, "device_profile is 'v100'; allowed: a100-40gb"),
        ({"adapter_slots": 0}, "adapter_slots is 0"),
        ({"batch": 1 << 20, "seq": 64}, "1,048,576 x 64 tokens are more than the 33,554,432"),
        ({"seq": 10**30}, "more than the 33,554,432"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(config("llama"), **wrong)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": 64}, "has no field model_type"),
        ({"model_type": "nonesuch"}, "knows no architecture 'nonesuch'"),
        ({"model_type": "llama", "vocab_size": 64}, "lacks hidden_size, num_hidden_layers"),
        ({"architectures": ["Nonesuch"]}, "no class 'Nonesuch'"),
        ({"num_attention_heads": 7}, "no model can be built|configuration"),
        ({"hidden_size": -128}, "hidden_size is -128; a positive whole number"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
    ],
)
def test_wrong_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    good = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
    }
    whole = set(values) & {"model_type"} or values == {"hidden_size": 64}
    with pytest.raises(ConfigError, match=message):
        estimate(values if whole else {**good, **values}, method="lora", seq=16)


def test_a_model_without_a_loss_is_refused() -> None:
    class Lossless(nn.Module):
        def forward(self, input_ids: Any = None, **_: Any) -> Any:
            return input_ids

    with pytest.raises(TypeError, match="Lossless gives no loss"):
        estimate(Lossless(), seq=16, patched=False)


def test_a_method_may_be_any_config_of_peft() -> None:
    ia3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = estimate(config("llama"), method=ia3, seq=32)
    assert 0 < report.by_class["adapters"] < 0.1 * report.by_class["base weights"]
    dense = estimate(config("llama"), method=lora(), seq=32)
    packed = estimate(config("llama"), method=lora(), seq=32, four_bit=True)
    assert packed.by_class["base weights"] < dense.by_class["base weights"]
    with pytest.raises(TypeError, match="method is int"):
        estimate(config("llama"), method=3)
    before = copy.deepcopy(ia3)
    assert ia3.to_dict() == before.to_dict()
