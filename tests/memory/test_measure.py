"""Real steps, measured, and compared with what was predicted."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import peftfast
from peftfast.memory import build as building
from peftfast.memory import compare, estimate, measure
from peftfast.ops.scratch import clear_scratch
from tests.memory.models import batch_of, config


def trained(patched: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = building.model_class(config("llama"))(config("llama"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    if patched:
        peftfast.patch(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("patched", [True, False])
def test_a_measured_step_agrees_with_its_prediction(patched: bool) -> None:
    clear_scratch()  # other tests' buffer would be counted as this step's
    model, optimizer = trained(patched)

    def step() -> None:
        model(**batch_of(2, 128), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    measured = measure(step, model=model, optimizer=optimizer)
    predicted = estimate(model, batch=2, seq=128, device_profile="cpu")
    assert abs(predicted.peak_bytes - measured.peak_bytes) <= 0.02 * measured.peak_bytes
    for name in ("base weights", "adapters", "saved activations", "logits and loss"):
        ours, theirs = predicted.by_class[name], measured.by_class[name]
        assert abs(ours - theirs) <= 0.05 * theirs, name
    phases = list(dict.fromkeys(point.phase for point in measured.timeline))
    assert phases == ["forward", "backward", "optimizer step"]
    table = compare(predicted, measured)
    assert "saved activations" in table and "peak" in table.splitlines()[1]


def test_only_what_the_step_makes_counts_without_a_model() -> None:
    x = torch.randn(1000, requires_grad=True)
    report = measure(lambda: x.exp().sum().backward())
    assert report.peak_bytes == 2 * 4000 + 2 * 4


def test_gradients_that_stay_are_told_apart() -> None:
    linear = nn.Linear(64, 32, bias=False)
    x = torch.randn(8, 64)
    linear(x).sum().backward()
    report = measure(lambda: linear(x).sum().backward(), model=linear)
    assert report.by_class["gradients"] == 64 * 32 * 4
    assert report.by_class["base weights"] == 64 * 32 * 4
    assert linear.weight._post_accumulate_grad_hooks in (None, {})


def test_a_device_that_can_not_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="not meta"):
        measure(lambda: None, device="meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_s_peak_is_the_allocator_s() -> None:
    x = torch.randn(1 << 20, device="cuda", requires_grad=True)
    report = measure(lambda: x.exp().sum().backward(), device="cuda")
    assert report.peak_bytes >= 2 * (1 << 22)
    assert sum(report.by_class.values()) == report.peak_bytes
