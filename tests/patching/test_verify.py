"""verify=True: every module is compared with PEFT's own forward before it is swapped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftfast.patching import lora_call, patch, report
from tests.patching.tiny import adapted, fused_layers, layers_of, lora_linears


@pytest.fixture
def broken_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that forgets the scaling where `in` is 48."""
    right = lora_call.lora_linear

    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None, *rest, **settings) -> Tensor:  # type: ignore[no-untyped-def]
        a, b, scaling = rest
        scaling = [1.0] * len(a) if weight.shape[1] == 48 else scaling
        return right(x, weight, bias, a, b, scaling, **settings)

    monkeypatch.setattr(lora_call, "lora_linear", wrong)


def test_a_module_that_differs_is_left_alone(broken_op: None) -> None:
    model = patch(adapted())
    found = report(model)
    assert {entry.path.rpartition(".")[2] for entry in found.not_fused} == {"down_proj"}
    assert all("differs from PEFT's" in entry.reasons[0] for entry in found.not_fused)
    assert all(not entry.note for entry in layers_of(found.fused))


def test_strict_raises_where_one_differs(broken_op: None) -> None:
    model = adapted()
    with pytest.raises(RuntimeError, match="down_proj: its output differs"):
        patch(model, strict=True)
    assert not fused_layers(model)


def test_zero_b_hides_nothing(broken_op: None) -> None:
    """B is zero when training begins: a random one takes its place, and the zeros stay."""
    model = adapted()
    for module in lora_linears(model).values():
        nn.init.zeros_(module.lora_B["default"].weight)
    patch(model)
    assert len(report(model).not_fused) == 2
    for module in lora_linears(model).values():
        assert not module.lora_B["default"].weight.any()


def test_without_verify_nothing_is_compared(broken_op: None) -> None:
    found = report(patch(adapted(), verify=False))
    assert len(layers_of(found.fused)) == 14
    assert all("verify=False" in entry.note for entry in layers_of(found.fused))


def test_meta_parameters_cannot_be_compared() -> None:
    model = adapted().to("meta")
    found = report(patch(model))
    assert len(layers_of(found.fused)) == 14
    assert all("meta device" in entry.note for entry in layers_of(found.fused))


def test_fake_parameters_cannot_be_compared() -> None:
    model = adapted()
    mode = FakeTensorMode()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(mode.from_tensor(parameter.data)))
    assert all("fake tensors" in entry.note for entry in fused_layers(patch(model)))
    path, module = next(iter(lora_linears(model).items()))
    with mode:
        y = module(torch.empty(2, 5, module.in_features))
    assert y.shape == (2, 5, module.out_features)
    assert {entry.path: entry.hits for entry in fused_layers(model)}[path] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_rounding_is_no_difference(family: str, dtype: torch.dtype) -> None:
    found = report(patch(adapted(family, lora_bias=True).to(dtype), strict=True))
    assert layers_of(found.fused)
    assert all(not entry.note for entry in layers_of(found.fused))


def test_merged_and_disabled_models_are_compared_all_the_same(broken_op: None) -> None:
    model = adapted()
    model.merge_adapter()
    merged = {path: list(m.merged_adapters) for path, m in lora_linears(model).items()}
    with model.disable_adapter():
        patch(model)
    assert len(report(model).not_fused) == 2
    assert {path: m.merged_adapters for path, m in lora_linears(model).items()} == merged


def test_weights_that_are_not_finite_are_no_reason_to_refuse() -> None:
    model = adapted()
    module = next(iter(lora_linears(model).values()))
    with torch.no_grad():
        module.base_layer.weight[0, 0] = float("nan")
    found = report(patch(model))
    assert len(layers_of(found.fused)) == 14
    assert "not finite" in layers_of(found.fused)[0].note
