"""Predictions of models with declared methods."""

from __future__ import annotations

import peft
import pytest
import torch

import peftfast
from peftfast.memory import build as building
from peftfast.memory import estimate, measure
from tests.memory.models import batch_of, config


@pytest.mark.parametrize("patched", [False, True])
def test_a_step_with_adapters_takes_what_is_predicted(patched: bool) -> None:
    torch.manual_seed(0)
    model = building.model_class(config("llama"))(config("llama"))
    method = peftfast.HoulsbyConfig(bottleneck=16, dropout=0.1)
    model = peft.get_peft_model(model, method).train()
    if patched:
        peftfast.patch(model)
    predicted = estimate(model, batch=2, seq=128, device_profile="cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = batch_of(2, 128)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    measured = measure(step, model=model, optimizer=optimizer)
    assert abs(predicted.peak_bytes - measured.peak_bytes) <= 0.02 * measured.peak_bytes
    asked = estimate(
        config("llama"), method=method, batch=2, seq=128, dtype=torch.float32,
        device_profile="cpu", patched=patched,
    )  # fmt: skip
    assert asked.peak_bytes == predicted.peak_bytes
