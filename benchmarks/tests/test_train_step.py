# mypy: disable-error-code="no-untyped-def"
"""The train step's models, its gate, and a run of it."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

import peftfast
from benchmarks.ceilings import Ceilings
from benchmarks.gates import GateFailed
from benchmarks.models import Size, base_model, loss_and_gradients, token_batches, with_adapters
from benchmarks.registry import Request
from benchmarks.timed import train_step
from benchmarks.timed.train_step import Config, Variant, check, variants

CPU = torch.device("cpu")
SIZE = Size("micro", 64, 176, 2, 4, 2, 128, 2, 16)
OURS = Variant("peftfast", patched=True)


def _config(dtype=torch.float32, dropout_p=0.0):
    return Config(SIZE, dtype, dropout_p, compiled=False)


def test_copies_share_the_base_and_have_equal_adapters():
    base = base_model(SIZE, torch.float32, CPU)
    before = {name: type(module) for name, module in base.named_modules()}
    one, two = (with_adapters(base, 0.0, widened=False) for _ in range(2))
    assert {name: type(module) for name, module in base.named_modules()} == before
    mine = {p.data_ptr() for p in base.parameters()}
    adapters = []
    for name, parameter in one.named_parameters():
        twin = two.get_parameter(name)
        assert torch.equal(parameter, twin) and parameter.any()
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            assert parameter is not twin
            adapters.append(parameter)
        else:
            assert parameter.data_ptr() == twin.data_ptr() and parameter.data_ptr() in mine
    assert len(adapters) == 2 * 7 * SIZE.layers


def test_gradients_follow_from_the_seed():
    model = with_adapters(base_model(SIZE, torch.float32, CPU), 0.5, widened=False)
    (tokens,) = token_batches(SIZE, CPU, 1)
    first, again, other = (loss_and_gradients(model, tokens, seed) for seed in (1, 1, 2))
    assert torch.equal(first["gradients"], again["gradients"])
    assert not torch.equal(first["gradients"], other["gradients"])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_passes(dtype, dropout_p):
    for variant in variants(_config(dtype, dropout_p)):
        checked = check(_config(dtype, dropout_p), variant, CPU)
        assert 0 < checked.errors["gradients"] < (1e-4 if dtype == torch.float32 else 0.2)


def test_a_wrong_gradient_is_stopped(monkeypatch):
    def broken(model, **options):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= 1.01
        return model

    monkeypatch.setattr(peftfast, "patch", broken)
    with pytest.raises(GateFailed, match="peftfast differs .*gradients"):
        check(_config(), OURS, CPU)


def test_a_run_gives_complete_rows(monkeypatch):
    said: list[str] = []
    rates = Ceilings(1e10, 1e11, "bfloat16")
    monkeypatch.setattr(train_step, "measure_ceilings", lambda device, dtype: rates)
    monkeypatch.setattr(train_step, "configs", lambda request: [_config(torch.bfloat16)])
    request = Request(CPU, quick=True, deadline=None, say=said.append)
    (outcome,) = train_step.time(request)
    rows = {row["variant"]: row for row in outcome.rows}
    assert set(rows) == {
        f"{who}, {adapters} adapters"
        for who in ("peft", "peftfast")
        for adapters in ("bfloat16", "float32")
    }
    for name, row in rows.items():
        assert row["time"]["count"] == 5
        assert row["peak_bytes"] > row["static_bytes"] > 0
        assert row["distance_to_floor"] > 0 and row["gate"]["errors"]
        # In a layer seven linears, two norms, the attention and the MLP; embedding, norm and head.
        every = 11 * SIZE.layers + 3
        assert row.get("fused") == (every if name.startswith("peftfast") else None)
    widened, native = rows["peft, float32 adapters"], rows["peft, bfloat16 adapters"]
    assert widened["static_bytes"] > native["static_bytes"]
    assert len(outcome.targets) == 4
    assert any(line.startswith("micro, bfloat16") for line in said)
