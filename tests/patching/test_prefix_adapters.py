"""patch on models with the project's own prefixes, and the memory that a step of them takes."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor

import peftfast
from peftfast.memory import build as building
from peftfast.memory import estimate, measure, saved_bytes
from peftfast.methods import MAMConfig, PrefixConfig, PTuningV2Config, UniPELTConfig
from peftfast.nn.prefix_attention import PrefixAttention
from peftfast.ops.dispatch import ImplUnavailable
from peftfast.ops.scratch import clear_scratch
from tests.memory.models import batch_of, config
from tests.patching.tiny import FAMILIES, copy_of, inputs_of, step_is_as_good, train_step

METHODS: dict[str, Any] = {
    "prefix": PrefixConfig(num_virtual_tokens=5),
    "projected": PrefixConfig(num_virtual_tokens=5, prefix_projection=True),
    "mam": MAMConfig(num_virtual_tokens=5, bottleneck=8),
    "unipelt": UniPELTConfig(num_virtual_tokens=5),
}


def adapted(method: str = "prefix", family: str = "llama") -> Any:
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES[family].make(), METHODS[method])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


def rows(model: Any) -> list[Any]:
    return [entry for entry in peftfast.report(model).fused if entry.op == "prefix_attention"]


# Of a gate's bias the gradient is one number, in which much cancels: not in every model.
CASES = [("unipelt", "llama"), ("mam", "llama"), ("mam", "bert"), ("projected", "gpt2")]
CASES += [("prefix", family) for family in ("llama", "gpt2", "bert", "gemma3")]


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_patched_step_is_as_good(method: str, family: str) -> None:
    plain = adapted(method, family)
    ours = peftfast.patch(copy_of(plain), strict=True)
    inputs = inputs_of(family)
    inputs["attention_mask"][0, -2:] = 0
    step_is_as_good(ours, plain, inputs)
    assert [entry.hits for entry in rows(ours)] == [1, 1]
    assert not any(entry.op == "sdpa" for entry in peftfast.report(ours).fused)


def test_parts_around_are_rewired_and_given_back() -> None:
    model = adapted()
    kinds = {name: type(module) for name, module in model.named_modules()}
    inputs = inputs_of()
    expected = train_step(model, inputs)
    peftfast.patch(model)
    assert {"rms_norm", "gated_activation"} <= {e.op for e in peftfast.report(model).fused}
    peftfast.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    again = train_step(model, inputs)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_the_implementation_that_is_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftfast.methods import attention

    asked = []
    op = attention.prefix_attention

    def spy(*args: Any, **options: Any) -> Tensor:
        asked.append(options["impl"])
        return op(*args, **options)

    monkeypatch.setattr(attention, "prefix_attention", spy)
    model = peftfast.patch(adapted(), impl="reference")
    inputs = inputs_of()
    with torch.no_grad():
        model(**inputs)
        with pytest.raises(ImplUnavailable):
            peftfast.patch(model, impl="native")
        peftfast.unpatch(model)
        model(**inputs)
    assert asked == ["reference"] * 2 + ["auto"] * 2
    modules = [m for m in model.modules() if isinstance(m, PrefixAttention)]
    assert all(vars(m)["impl"] == "auto" and type(m) is PrefixAttention for m in modules)


def test_a_prefix_on_a_patched_model_acts() -> None:
    """Attention that was rewired for another adapter gives way, and unpatch leaves the prefix."""
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["llama"].make(), peftfast.HoulsbyConfig(bottleneck=4)).eval()
    plain = copy.deepcopy(model)
    peftfast.patch(model)
    for one in (model, plain):
        torch.manual_seed(1)
        one.add_adapter("b", METHODS["prefix"])
        one.set_adapter("b")
    inputs = inputs_of()
    with torch.no_grad():
        expected = plain(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
        assert "added after patch" in str(peftfast.report(model))
        peftfast.patch(model)
        torch.testing.assert_close(model(**inputs).logits, expected)
        assert sum(entry.hits for entry in rows(model)) == 2
        peftfast.unpatch(model)
        torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_patched_it_keeps_no_more(method: str) -> None:
    plain = adapted(method)
    ours = peftfast.patch(copy_of(plain))
    inputs = inputs_of(rows=4)
    held = [
        saved_bytes(lambda model=model: model(**inputs).loss, exclude=model, at_end=True)
        for model in (ours, plain)
    ]
    assert held[0] < held[1]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("method", ["ptuning_v2", "mam", "peft"])
def test_a_step_takes_what_is_predicted(method: str, patched: bool) -> None:
    clear_scratch()  # other tests' buffer would be counted as this step's
    torch.manual_seed(0)
    chosen: Any = {
        "ptuning_v2": PTuningV2Config(num_virtual_tokens=16),
        "mam": MAMConfig(num_virtual_tokens=16, bottleneck=16),
        "peft": PrefixTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM"),
    }[method]
    model = building.model_class(config("llama"))(config("llama"))
    model = peft.get_peft_model(model, chosen).train()
    if patched:
        peftfast.patch(model)
    predicted = estimate(model, batch=2, seq=64, device_profile="cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = batch_of(2, 64)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    measured = measure(step, model=model, optimizer=optimizer)
    assert abs(predicted.peak_bytes - measured.peak_bytes) <= 0.01 * measured.peak_bytes
