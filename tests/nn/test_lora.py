"""nn.LoRALinear: a drop-in for nn.Linear with an adapter."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from peftfast.nn import LoRALinear


def _module(**options: object) -> LoRALinear:
    module = LoRALinear.from_linear(nn.Linear(12, 8), 3, alpha=6, **options)  # type: ignore[arg-type]
    nn.init.normal_(module.lora_b)
    return module


def test_starts_equal_to_its_linear_and_shares_its_parameters() -> None:
    linear = nn.Linear(12, 8)
    module = LoRALinear.from_linear(linear, 3)
    x = torch.randn(5, 12)
    assert module.weight is linear.weight and module.bias is linear.bias
    torch.testing.assert_close(module(x), linear(x))
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trainable == ["lora_a", "lora_b"]


def test_forward_is_the_formula() -> None:
    module, x = _module(), torch.randn(2, 5, 12)
    delta = x @ module.lora_a.t() @ module.lora_b.t() * 2.0
    expected = nn.functional.linear(x, module.weight, module.bias) + delta
    torch.testing.assert_close(module(x), expected)


def test_dropout_acts_in_training_only() -> None:
    module, x = _module(dropout=0.5), torch.randn(5, 12)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_merge_and_unmerge() -> None:
    module, x = _module(), torch.randn(5, 12)
    weight, y = module.weight.detach().clone(), module(x)
    module.merge()
    torch.testing.assert_close(module(x), y)
    with pytest.raises(RuntimeError, match="can't merge: the adapter is merged"):
        module.merge()
    module.unmerge()
    torch.testing.assert_close(module.weight, weight)
    with pytest.raises(RuntimeError, match="not merged"):
        module.unmerge()


def test_merging_bad_values_changes_nothing() -> None:
    module = _module()
    with torch.no_grad():
        module.lora_b[0, 0] = torch.inf
    weight = module.weight.detach().clone()
    with pytest.raises(ValueError, match="not finite"):
        module.merge()
    assert torch.equal(module.weight, weight) and not module.merged


def test_the_state_dict_never_holds_a_merged_weight() -> None:
    module = _module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.merge()
    during = module.state_dict()
    assert list(before) == ["weight", "bias", "lora_a", "lora_b"] == list(during)
    for name, value in before.items():
        torch.testing.assert_close(during[name], value)
    with pytest.raises(RuntimeError, match="can't load a state_dict"):
        module.load_state_dict(before)


def test_round_trip_through_safetensors(tmp_path: Path) -> None:
    module, other = _module(), _module()
    save_model(module, str(tmp_path / "m.safetensors"))
    load_model(other, str(tmp_path / "m.safetensors"))
    x = torch.randn(3, 12)
    assert torch.equal(module(x), other(x))


def test_copies_and_pickles() -> None:
    module, x = _module(), torch.randn(3, 12)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


def test_float32_adapters_over_a_bfloat16_base() -> None:
    linear = nn.Linear(12, 8, dtype=torch.bfloat16)
    module = LoRALinear.from_linear(linear, 3, adapter_dtype=torch.float32)
    y = module(torch.randn(5, 12, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert module.lora_b.grad is not None and module.lora_b.grad.dtype == torch.float32


def test_trains() -> None:
    target = nn.Linear(12, 8)
    module = LoRALinear.from_linear(copy.deepcopy(target), 8)
    with torch.no_grad():
        target.weight += torch.randn(8, 1) @ torch.randn(1, 12)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(200):
        x = torch.randn(64, 12)
        loss = (module(x) - target(x)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": 2, "dropout": 1.0}, "dropout is 1.0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha is nan"),
        ({"rank": 2, "adapter_dtype": torch.float16}, "adapter_dtype is torch.float16"),
        ({"rank": 2, "impl": "fast"}, "impl is 'fast'"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    linear = nn.Linear(12, 8)
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(linear, **options)
    assert linear.weight.requires_grad


def test_only_a_linear_is_wrapped() -> None:
    with pytest.raises(TypeError, match="linear is torch.nn.modules.conv.Conv2d"):
        LoRALinear.from_linear(nn.Conv2d(1, 1, 1), 2)  # type: ignore[arg-type]


def test_a_linear_with_hooks_is_refused() -> None:
    linear = nn.Linear(12, 8)
    linear.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="linear has hooks"):
        LoRALinear.from_linear(linear, 2)
