"""A parent of four linears, three of which read one input, and counted calls of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peftfast.patching import lora_call, patch, siblings
from peftfast.patching.state import state_of
from tests.patching.tiny import copy_of, randomise


class Attention(nn.Module):
    """q, k, v over one input, and o; `between` runs after q."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.between: Callable[[Tensor], Any] = lambda x: None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x) * 0.5
        self.between(x)
        return self.o(torch.tanh(q + self.k(x) * self.v(x)))


class Counted:
    """How often the op was called alone and for a group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alone = self.grouped = 0
        alone, grouped = lora_call.lora_linear, siblings.lora_linear_group

        def count_alone(*args: Any, **kwargs: Any) -> Any:
            self.alone += 1
            return alone(*args, **kwargs)

        def count_grouped(*args: Any, **kwargs: Any) -> Any:
            self.grouped += 1
            return grouped(*args, **kwargs)

        monkeypatch.setattr(lora_call, "lora_linear", count_alone)
        monkeypatch.setattr(siblings, "lora_linear_group", count_grouped)

    def take(self) -> tuple[int, int]:
        counts, self.alone, self.grouped = (self.alone, self.grouped), 0, 0
        return counts


def attention(targets: str = "qkvo", **settings: Any) -> tuple[Any, Any, Tensor]:
    """A patched attention block, PEFT's own, and an input."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list(targets), **settings)
    model = randomise(get_peft_model(Attention(), config)).eval()
    peft = copy_of(model)
    return patch(model, verify=False), peft, torch.randn(5, 16, requires_grad=True)


def block(model: Any) -> Any:
    return model.base_model.model


def observed(targets: str = "qkvo", **settings: Any) -> tuple[Any, Any, Tensor]:
    """The same, after one forward has shown who reads one input."""
    model, peft, x = attention(targets, **settings)
    model(torch.randn(5, 16))
    return model, peft, x


def same(model: Any, peft: Any, x: Tensor) -> None:
    """Outputs and gradients of one step agree."""
    results = []
    for m in (model, peft):
        m.zero_grad()
        x.grad = None
        y = m(x)
        y.pow(2).sum().backward()
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad, **grads})
    got, expected = results
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)


def group_of(model: Any, name: str = "q") -> Any:
    state = state_of(getattr(block(model), name))
    assert state is not None
    return state.group


def waiting(model: Any) -> int:
    return sum(len(h.outputs) for h in group_of(model)._handouts.values())
