"""KroneckerAdapter: its weights as sums of Kronecker products, counts, sharing, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from peftfast.nn import BottleneckAdapter, KroneckerAdapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, M, N = 24, 8, 4


def _filled(**options: Any) -> KroneckerAdapter:
    made = KroneckerAdapter(D, M, divisions=N, device=DEVICE, **options)
    for value in made.parameters():
        torch.nn.init.normal_(value)
    return made


@pytest.mark.parametrize("rank", [1, 3])
def test_weights_are_sums_of_kronecker_products(rank: int) -> None:
    adapter = _filled(rank=rank).double()
    down, down_bias, up, up_bias = adapter._weights()
    for whole, left, right in (
        (down, adapter.down_left, adapter.down_right),
        (up, adapter.up_left, adapter.up_right),
    ):
        terms = [torch.kron(adapter.shared[i], left[i] @ right[i].t()) for i in range(N)]
        torch.testing.assert_close(whole, torch.stack(terms).sum(0))
    assert down.shape == (M, D) and up.shape == (D, M)
    plain = BottleneckAdapter(D, M, device=DEVICE, dtype=torch.float64)
    values = {"down_weight": down, "down_bias": down_bias, "up_weight": up, "up_bias": up_bias}
    plain.load_state_dict(values)
    x = torch.randn(2, 5, D, device=DEVICE, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(adapter(x), plain(x))
    adapter(x).square().sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in adapter.parameters())
    # Gradients of the factors are those that go through the product.
    (through,) = torch.autograd.grad(plain(x).square().sum(), plain.down_weight)
    again = adapter._weights()[0]
    (expected,) = torch.autograd.grad(again, adapter.down_left, through)
    torch.testing.assert_close(adapter.down_left.grad, expected)


def test_counts_are_those_of_the_paper() -> None:
    """Mahabadi et al.: a projection of k x d has r (k + d) numbers in its factors, and n^3 are
    shared by all.
    """
    first = KroneckerAdapter(768, 48, divisions=4)
    others = [KroneckerAdapter(768, 48, divisions=4, shared=first) for _ in range(23)]
    every = torch.nn.ModuleList([first, *others])
    biases = 768 + 48
    assert sum(p.numel() for p in every.parameters()) == 24 * (2 * (768 + 48) + biases) + 4**3
    wide = KroneckerAdapter(768, 48, rank=2, bias=False)
    assert sum(p.numel() for p in wide.parameters()) == 2 * 2 * (768 + 48) + 4**3


def test_shared_factors_are_one_parameter_whatever_becomes_of_it() -> None:
    first = _filled()
    assert first.shared is not None
    before = first.shared.detach().clone()
    second = KroneckerAdapter(D, M, divisions=N, shared=first, device=DEVICE)
    assert torch.equal(first.shared, before)
    assert second.shared is None and "shared" not in second.state_dict()
    x = torch.randn(3, D, device=DEVICE)
    pair = torch.nn.ModuleList([first, second])
    copied = copy.deepcopy(pair)
    first.shared = torch.nn.Parameter(first.shared.detach() * 2.0)  # as a cast or a load may do
    down, *_ = second._weights()
    torch.testing.assert_close(down, 2.0 * copied[1]._weights()[0])
    (first(x) + second(x)).sum().backward()
    assert first.shared.grad is not None
    assert copied[1]._owner[0] is copied[0]


@pytest.mark.parametrize("init", ["lora", "zero"])
def test_a_zero_up_projection_is_exactly_the_identity(init: str) -> None:
    adapter = KroneckerAdapter(D, M, init=init)
    x = torch.randn(3, D)
    y = adapter(x)
    assert torch.equal(y, x) and adapter._weights()[0].any()
    y.sum().backward()
    assert adapter.up_left.grad is not None and adapter.up_left.grad.any()


def test_near_identity_starts_near_the_identity() -> None:
    adapter, x = KroneckerAdapter(64, 16, init_std=1e-2), torch.randn(50, 64)
    assert 0 < (adapter(x) - x).norm() < 0.01 * x.norm()
    assert not any(v.any() for k, v in adapter.named_parameters() if k.endswith("_bias"))


def test_the_other_options_are_those_of_its_base() -> None:
    adapter = _filled(norm="layer", gate=True, learned_scaling=True, depth=2, dropout=0.5)
    x = torch.randn(2, 3, D, device=DEVICE)
    assert not torch.equal(adapter(x), adapter(x))
    assert torch.equal(adapter.eval()(x, residual=x), adapter(x))


BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"bottleneck": 10}, ValueError, "bottleneck is 10; a multiple of divisions, 4, is needed"),
    ({"in_features": 30}, ValueError, "in_features is 30"),
    ({"out_features": 30}, ValueError, "out_features is 30"),
    ({"divisions": 0}, ValueError, "divisions is 0"),
    ({"divisions": 2.0}, TypeError, "divisions is float"),
    ({"rank": 0}, ValueError, "rank is 0"),
    ({"shared": torch.nn.Parameter(torch.ones(4, 4, 4))}, TypeError, "shared is Parameter"),
    ({"shared": KroneckerAdapter(8, 4, divisions=2)}, ValueError, "shared has 2 divisions"),
    ({"bottleneck": 0}, ValueError, "bottleneck is 0"),
    ({"form": "relu"}, TypeError, "form"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_argument_is_named(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        KroneckerAdapter(**({"in_features": D, "bottleneck": M} | change))
