"""Every family, from configuration: as good as PEFT's in every gradient, and a way back."""

from __future__ import annotations

import pytest
import torch

from peftfast.patching import patch, report, unpatch
from tests.patching.tiny import (
    FAMILIES,
    adapted,
    copy_of,
    fused_layers,
    inputs_of,
    layers_of,
    lora_linears,
    step_is_as_good,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_gradients_and_the_way_back(family: str) -> None:
    model = adapted(family)
    peft = copy_of(model)
    inputs = inputs_of(family)
    with torch.no_grad():
        before = model(**inputs).logits
    classes = {path: type(module) for path, module in model.named_modules()}

    assert patch(model, strict=True) is model
    for _ in range(3):  # alone, observed, as siblings
        step_is_as_good(model, peft, inputs)
    found = report(model)
    assert len(layers_of(found.fused)) == FAMILIES[family].modules
    assert all(entry.hits == 3 and not entry.delegations for entry in layers_of(found.fused))
    groups = {entry.siblings for entry in layers_of(found.fused) if entry.siblings}
    assert len(groups) == FAMILIES[family].siblings

    assert unpatch(model) is model
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not any("_peftfast" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_with_everything_trained(family: str) -> None:
    model = adapted(family).requires_grad_(True)
    peft = copy_of(model)
    patch(model)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_triton_kernels(family: str) -> None:
    """Few tokens: the kernels run in Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = adapted(family).to(device)
    peft = copy_of(model)
    inputs = {
        name: value.to(device) for name, value in inputs_of(family, rows=1, columns=3).items()
    }
    patch(model, impl="triton", strict=True, verify=False)
    for _ in range(2):
        step_is_as_good(model, peft, inputs)
    assert all(entry.hits == 2 and not entry.delegations for entry in fused_layers(model))


def test_half_precision_base_with_float32_adapters() -> None:
    """PEFT's default for 16-bit bases: adapters stay float32."""
    model = adapted("qwen2").to(torch.bfloat16)
    for module in lora_linears(model).values():
        for adapters in (module.lora_A, module.lora_B):
            adapters.float()
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of("qwen2"))
    assert all(not entry.delegations for entry in fused_layers(model))


def test_moe_experts_are_reported() -> None:
    model = patch(adapted("qwen3_moe"))
    left = report(model).not_fused
    assert len(left) == 4  # two parameters of two layers
    assert all(entry.type.endswith("ParamWrapper") for entry in left)
    reasons = {reason for entry in left for reason in entry.reasons}
    assert any("gate_up_proj" in reason for reason in reasons)
    assert any("down_proj" in reason for reason in reasons)
