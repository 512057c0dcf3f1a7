# mypy: disable-error-code="no-untyped-def"
"""A gate passes right results and stops wrong ones."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import LoraShape, adapter_parameters, lora_operands, peft_layer
from benchmarks.gates import NAMES, GateFailed, exact_lora_step, gate
from benchmarks.linear import Config, ours, peft
from peftfast.reference.dropout import keep_mask, keep_scale

CPU = torch.device("cpu")
SHAPE = LoraShape(rows=33, in_features=40, out_features=24, rank=4)


def _gate_of(results):
    operands = lora_operands(SHAPE, torch.float32, torch.float32, CPU)
    eager = exact_lora_step(operands, 0.0, None, torch.float32)
    return gate(
        "float64", results(eager), eager, exact_lora_step(operands, 0.0, None, torch.float64)
    )


def test_eager_results_pass():
    checked = _gate_of(lambda eager: eager)
    checked.require("eager")
    assert set(checked.errors) == set(NAMES)
    assert all(0 < error < 1e-5 for error in checked.errors.values())


@pytest.mark.parametrize("name", NAMES)
def test_one_wrong_result_is_named(name):
    checked = _gate_of(lambda eager: {**eager, name: eager[name] * 1.001})
    with pytest.raises(GateFailed, match=f"broken differs.*{name}: "):
        checked.require("broken")


def test_nan_never_passes():
    checked = _gate_of(lambda eager: {**eager, "dx": torch.full_like(eager["dx"], float("nan"))})
    with pytest.raises(GateFailed, match="dx: nan"):
        checked.require("broken")


def test_reference_agrees_with_peft_without_dropout():
    operands = lora_operands(SHAPE, torch.float32, torch.float32, CPU)
    layer = peft_layer(operands, 0.0)
    y = layer(operands.x)
    gradients = torch.autograd.grad(y, [operands.x, *adapter_parameters(layer)], operands.dy)
    exact = exact_lora_step(operands, 0.0, None, torch.float64)
    for name, value in zip(NAMES, (y, *gradients), strict=True):
        torch.testing.assert_close(value.double(), exact[name], atol=1e-4, rtol=1e-4)


def test_reference_applies_the_mask_to_the_adapters_way_only():
    operands = lora_operands(SHAPE, torch.float64, torch.float64, CPU)
    seed = torch.tensor([7])
    exact = exact_lora_step(operands, 0.5, seed, torch.float64)
    mask = keep_mask(seed, SHAPE.rows, SHAPE.in_features, 0.5) * keep_scale(0.5)
    way = (operands.x * mask) @ operands.lora_a.T @ operands.lora_b.T
    y = operands.x @ operands.weight.T + operands.scaling * way
    torch.testing.assert_close(exact["y"], y.detach())


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_variants_pass_their_gates_in_bfloat16(adapter_dtype, dropout_p):
    config = Config(SHAPE, torch.bfloat16, dropout_p)
    for make in (ours, peft):
        checked = make(config, adapter_dtype, CPU)
        assert checked.gate is not None
        assert max(checked.gate.errors.values()) < 0.05
