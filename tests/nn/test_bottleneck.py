"""BottleneckAdapter against the same module written out in torch, its initialisation and errors."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.nn import BottleneckAdapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, M = 24, 8


def _filled(*args: int, **options: Any) -> BottleneckAdapter:
    """An adapter whose parameters are far from their start."""
    made = BottleneckAdapter(*(args or (D, M)), device=DEVICE, **options)
    for value in made.parameters():
        torch.nn.init.normal_(value, std=0.5)
    return made


def _act(z: Tensor, kind: str) -> Tensor:
    return {"relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh, "identity": lambda v: v}[kind](
        z
    )


def _by_hand(of: BottleneckAdapter, x: Tensor, residual: Any = True) -> Tensor:
    """The module in plain torch, by its parameters' names."""
    p = dict(of.named_parameters())

    def norm(v: Tensor) -> Tensor:
        weight, bias, width = p["norm_weight"], p.get("norm_bias"), v.shape[-1:]
        if of.norm == "layer":
            return F.layer_norm(v, width, weight, bias)
        if of.norm == "rms":
            return F.rms_norm(v, width, weight, 1e-5)
        return F.batch_norm(v.reshape(-1, *width), None, None, weight, bias, training=True).view_as(
            v
        )

    h = norm(x) if of.norm is not None and of.norm_position == "before" else x
    h = _act(F.linear(h, p["down_weight"], p.get("down_bias")), of.activation)
    for i in range(of.depth - 1):
        inner = F.linear(h, p[f"inner_{i}_weight"], p.get(f"inner_{i}_bias"))
        h = _act(inner, of.activation)
    delta = F.linear(h, p["up_weight"], p.get("up_bias"))
    if of.norm is not None and of.norm_position == "after":
        delta = norm(delta)
    delta = delta * p.get("scaling_factor", of.scaling)
    if "gate_weight" in p:
        each = torch.sigmoid(F.linear(x, p["gate_weight"], p["gate_bias"]))
        delta = delta * each.mean(-2, keepdim=True)
    joined = x if residual is True else residual
    if joined is False:
        return delta
    return joined + delta if of.composition == "add" else joined * (1 + delta)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "activation": "gelu", "scaling": 4.0},
    {"learned_scaling": True, "gate": True},
    {"norm": "layer", "activation": "tanh"},
    {"norm": "rms", "gate": True},
    {"norm": "batch"},
    {"norm": "layer", "norm_position": "after", "learned_scaling": True},
    {"norm": "rms", "norm_position": "after", "gate": True},
    {"norm": "batch", "norm_position": "after"},
    {"depth": 3, "activation": "identity"},
    {"depth": 2, "norm": "layer", "bias": False},
    {"composition": "multiply", "learned_scaling": True, "gate": True},
    {"composition": "multiply", "norm": "layer", "norm_position": "after"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_those_of_the_module_by_hand(options: dict[str, Any]) -> None:
    adapter = _filled(**options).double()
    for kind in ("x", "tensor", "none"):
        if kind == "none" and adapter.composition == "multiply":
            continue
        x, other, dy = torch.randn(3, 3, 5, D, device=DEVICE, dtype=torch.float64)
        x.requires_grad_()
        residual: Any = {"x": True, "tensor": other.requires_grad_(), "none": False}[kind]
        names = ["x", *dict(adapter.named_parameters())]
        leaves = [x, *adapter.parameters()]
        if kind == "tensor":
            names, leaves = [*names, "residual"], [*leaves, other]
        runs = []
        for y in (adapter(x, residual), _by_hand(adapter, x, residual)):
            runs.append([y, *torch.autograd.grad(y, leaves, dy)])
        for name, ours, theirs in zip(["y", *names], *runs, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda why, at=name: f"{at}: {why}")


def test_other_widths_for_the_output() -> None:
    adapter = _filled(D, M, 16)
    x, residual = torch.randn(4, D, device=DEVICE), torch.randn(4, 16, device=DEVICE)
    torch.testing.assert_close(adapter(x, residual), _by_hand(adapter, x, residual))
    assert adapter(x, residual=False).shape == (4, 16)
    with pytest.raises(ValueError, match="residual is True"):
        adapter(x)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2 * D * M + D + M),  # Houlsby et al., section 2.1: 2md + d + m
        ({"bias": False}, 2 * D * M),
        ({"norm": "layer"}, 2 * D * M + D + M + 2 * D),
        ({"norm": "rms", "gate": True}, 2 * D * M + D + M + D + D + 1),
        ({"learned_scaling": True, "depth": 3}, 2 * D * M + D + M + 1 + 2 * (M * M + M)),
    ],
)
def test_counts(options: dict[str, Any], count: int) -> None:
    adapter = BottleneckAdapter(D, M, **options)
    assert sum(value.numel() for value in adapter.parameters()) == count
    assert set(adapter.state_dict()) == {name for name, _ in adapter.named_parameters()}


def test_near_identity_is_a_normal_cut_off_at_two_deviations() -> None:
    adapter = BottleneckAdapter(256, 64, init_std=0.02, norm="layer", depth=2)
    for name, value in adapter.named_parameters():
        if name == "norm_weight":
            assert (value == 1).all()
        elif name.endswith("_bias"):
            assert not value.any(), name
        else:
            assert 0.03 < value.abs().max() <= 0.04, name
            assert 0.016 < value.std() < 0.019, name  # 0.88 sigma
    # |y - x| <= |Wu| |relu(Wd x)|, every weight at most 2 sigma
    x = torch.randn(5, 256)
    plain = BottleneckAdapter(256, 64, init_std=1e-3)
    bound = 256 * 64 * (2e-3) ** 2 * x.abs().max()
    assert 0 < (plain(x) - x).abs().max() < bound


@pytest.mark.parametrize("init", ["lora", "zero"])
def test_zero_up_projections_are_exactly_the_identity(init: str) -> None:
    for options in ({}, {"norm": "rms"}, {"composition": "multiply"}, {"learned_scaling": True}):
        adapter = BottleneckAdapter(D, M, init=init, **options)
        x = torch.randn(3, D, requires_grad=True)
        y = adapter(x)
        assert torch.equal(y, x) and adapter.down_weight.any()
        y.sum().backward()
        assert adapter.up_weight.grad is not None and adapter.up_weight.grad.any()
    scale = BottleneckAdapter(D, M, learned_scaling=True, scaling=4.0).scaling_factor
    assert scale is not None and scale.tolist() == [4.0]


def test_dropout_acts_in_training_only() -> None:
    adapter, x = _filled(dropout=0.5), torch.randn(6, D, device=DEVICE)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))
    torch.testing.assert_close(adapter(x), _by_hand(adapter, x))


def test_batch_norm_evaluates_with_what_it_has_seen() -> None:
    adapter, torchs = _filled(norm="batch"), torch.nn.BatchNorm1d(D, device=DEVICE)
    x = torch.randn(4, 6, D, device=DEVICE) + 2
    adapter(x)
    torchs(x.view(-1, D))
    torch.testing.assert_close(adapter.norm_mean, torchs.running_mean)
    torch.testing.assert_close(adapter.norm_variance, torchs.running_var)
    seen = adapter.norm_mean.clone()
    first = adapter.eval()(x[:1])
    assert torch.equal(seen, adapter.norm_mean)
    assert torch.equal(first, adapter(x)[:1])
    assert {"norm_mean", "norm_variance"} <= set(adapter.state_dict())


LOW: list[dict[str, Any]] = [
    {},
    {"norm": "layer", "gate": True},
    {"depth": 2, "learned_scaling": True},
    {"norm": "batch"},
    {"norm": "rms", "norm_position": "after"},
    {"composition": "multiply"},
]


@pytest.mark.parametrize("options", LOW, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_over_bfloat16(options: dict[str, Any], autocast: bool) -> None:
    adapter = _filled(**options)
    for x_dtype, residual_dtype in itertools.product((torch.bfloat16, torch.float32), repeat=2):
        if not autocast and x_dtype != residual_dtype:
            continue
        x = torch.randn(3, 5, D, device=DEVICE).to(x_dtype).requires_grad_()
        residual = torch.randn(3, 5, D, device=DEVICE).to(residual_dtype)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            y, sequential = adapter(x, residual), adapter(x)
        assert y.dtype == residual_dtype and sequential.dtype == x_dtype
        expected = _by_hand(adapter, x.float(), residual.float())
        assert (y - expected).norm() / expected.norm() < 0.02
        y.sum().backward()
        assert all(value.grad is not None for value in adapter.parameters())
        assert x.grad is not None and x.grad.dtype == x_dtype


def test_copies_and_pickles_compute_the_same() -> None:
    adapter, x = _filled(norm="layer", gate=True, depth=2), torch.randn(2, 3, D, device=DEVICE)
    expected = adapter(x)
    assert torch.equal(copy.deepcopy(adapter)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(adapter))(x), expected)
    fresh = BottleneckAdapter(D, M, norm="layer", gate=True, depth=2, device=DEVICE)
    fresh.load_state_dict(adapter.state_dict())
    assert torch.equal(fresh(x), expected)


def test_its_representation() -> None:
    adapter = BottleneckAdapter(
        D, M, norm="rms", depth=2, gate=True, scaling=2.0, dropout=0.1, composition="multiply"
    )
    assert repr(adapter) == (
        "BottleneckAdapter(24, 8, 24, relu, depth=2, norm='rms' before, scaling=2.0, gate,"
        " dropout=0.1, composition='multiply')"
    )


BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"bottleneck": 0}, ValueError, "bottleneck is 0; it must be at least 1"),
    ({"bottleneck": 2.5}, TypeError, "bottleneck is float; an integer"),
    ({"in_features": True}, TypeError, "in_features is bool"),
    ({"depth": 0}, ValueError, "depth is 0"),
    ({"activation": "swish"}, ValueError, "activation is 'swish'; allowed: 'identity', 'relu'"),
    ({"norm": "group"}, ValueError, "norm is 'group'"),
    ({"norm_position": "inside"}, ValueError, "norm_position is 'inside'; allowed: 'before'"),
    ({"composition": "concat"}, ValueError, "composition is 'concat'"),
    ({"init": "xavier"}, ValueError, "init is 'xavier'"),
    ({"init_std": -1.0}, ValueError, "init_std is -1.0"),
    ({"dropout": 1.5}, ValueError, "dropout is 1.5"),
    ({"scaling": "2"}, TypeError, "scaling is str"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_argument_is_named(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        BottleneckAdapter(**({"in_features": D, "bottleneck": M} | change))


def test_calls_that_make_no_sense_are_named() -> None:
    with pytest.raises(ValueError, match='composition "multiply" needs a residual'):
        BottleneckAdapter(D, M, composition="multiply")(torch.randn(2, D), residual=False)
    with pytest.raises(ValueError, match="a gate averages over each sequence's tokens"):
        BottleneckAdapter(D, M, gate=True)(torch.randn(D))
    with pytest.raises(ValueError, match=r"down is \[8, 24\]; x \[2, 25\]"):
        BottleneckAdapter(D, M)(torch.randn(2, 25))
