"""PrefixAttention: what it computes, the network that makes a prefix, checkpoints of both forms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfast.nn import PrefixAttention
from peftfast.reference import prefix_attention as reference

NETWORK: dict[str, Any] = {"hidden": 3, "embedding_dim": 6}


def _qkv(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (4, 7, 8), (2, 7, 8), (2, 7, 8)
    q, k, v = (torch.randn(batch, *shape) for shape in shapes)
    return q, k, v


def test_attends_to_its_rows_first() -> None:
    module = PrefixAttention(5, 2, 8)
    q, k, v = _qkv()
    assert module.prefix_k is not None and module.prefix_v is not None
    expected = reference.prefix_attention(
        q, k, v, module.prefix_k, module.prefix_v, is_causal=True, window=6
    )
    y = module(q, k, v, is_causal=True, window=6)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    assert all(one.grad is not None and one.grad.norm() > 0 for one in module.parameters())


def test_the_network_by_hand() -> None:
    module = PrefixAttention(5, 2, 8, value_head_dim=4, **NETWORK)
    held = dict(module.named_parameters())
    inner = torch.tanh(F.linear(held["embedding"], held["down_weight"], held["down_bias"]))
    made = F.linear(inner, held["up_weight"], held["up_bias"])
    k, v = module.prefixes()
    torch.testing.assert_close(k[1, 3], made[3, 8:16])
    torch.testing.assert_close(v[1, 3], made[3, 20:])
    assert set(held) == {"embedding", "down_weight", "down_bias", "up_weight", "up_bias"}
    y = module(*_qkv()[:2], torch.randn(2, 2, 7, 4))
    y.square().sum().backward()
    assert all(one.grad is not None and one.grad.norm() > 0 for one in held.values())


def test_gate_and_scaling() -> None:
    module = PrefixAttention(5, 2, 8, in_features=6, gate=True, form="relu", scaling=4.0)
    learned = PrefixAttention(5, 2, 8, form="relu", scaling=4.0, learned_scaling=True)
    x = torch.randn(2, 7, 6)
    assert module.gate_weight is not None
    gate = torch.sigmoid(F.linear(x, module.gate_weight, module.gate_bias)).mean(1, keepdim=True)
    given = module.gate_of(x)
    assert given is not None
    torch.testing.assert_close(given, 4.0 * gate)
    q, k, v = _qkv()
    prefixes = module.prefixes()
    expected = reference.prefix_attention(q, k, v, *prefixes, form="relu", gate=4.0 * gate)
    torch.testing.assert_close(module(q, k, v, gate=given), expected)
    fixed = PrefixAttention(5, 2, 8, form="relu", scaling=4.0)
    fixed.load_state_dict(learned.state_dict(), strict=False)
    torch.testing.assert_close(fixed(q, k, v), learned(q, k, v))
    learned(q, k, v).sum().backward()
    assert learned.scaling_factor is not None and learned.scaling_factor.grad is not None
    assert PrefixAttention(5, 2, 8).gate_of(x) is None
    with pytest.raises(ValueError, match="gate is None, and this module has one"):
        module(q, k, v)
    for wrong in (None, x[0], x[..., 1:]):
        with pytest.raises(ValueError, match=r"the gate reads \[B, S, 6\]"):
            module.gate_of(wrong)


def test_dropout_in_training_alone() -> None:
    module = PrefixAttention(50, 2, 8, dropout=0.5)
    assert module.prefix_k is not None
    dropped = [one == 0 for one in module.prefixes()]
    assert all(0.4 < one.float().mean() < 0.6 for one in dropped)
    assert not torch.equal(*dropped)
    k, _ = module.prefixes()
    torch.testing.assert_close(k[k != 0], 2 * module.prefix_k[k != 0])
    module.eval()
    assert module.prefixes()[0] is module.prefix_k


@pytest.mark.parametrize("network", [False, True])
def test_initial_values(network: bool) -> None:
    sizes = NETWORK if network else {}
    for init, std, expected in (("normal", None, 1.0), ("small", None, 0.02), ("normal", 3.0, 3.0)):
        module = PrefixAttention(400, 2, 8, init=init, init_std=std, **sizes)
        rows = module.embedding if network else module.prefix_k
        assert rows is not None and rows.std().item() == pytest.approx(expected, rel=0.1)
    k, v = PrefixAttention(5, 2, 8, init="zero", **sizes).prefixes()
    assert (v == 0).all() and k.norm() > 0


def _stack(**options: Any) -> nn.ModuleList:
    """Two modules, the second sharing the first's network if it has one."""
    first = PrefixAttention(5, 2, 8, **options)
    shared = {"shared": first} if options else {}
    return nn.ModuleList([first, PrefixAttention(5, 2, 8, **shared)])


def test_a_shared_network_is_the_first_ones() -> None:
    first, second = _stack(**NETWORK)
    assert {name for name, _ in second.named_parameters()} == {"up_weight", "up_bias"}
    assert second.has_encoder and first.owns_encoder and not second.owns_encoder
    second.prefixes()[0].sum().backward()
    assert first.embedding.grad.norm() > 0
    one, other = copy.deepcopy(nn.ModuleList([first, second]))
    with torch.no_grad():
        one.embedding.zero_()
    assert not torch.equal(second.prefixes()[0], other.prefixes()[0])


def test_finalize_keeps_the_values() -> None:
    stack = _stack(**NETWORK).eval()
    before = [one.prefixes() for one in stack]
    first, second = stack
    stray = copy.deepcopy(stack)
    for module in (second, first):
        module.finalize()
        module.finalize()
    for module, wanted in zip(stack, before, strict=True):
        assert {name for name, _ in module.named_parameters()} == {"prefix_k", "prefix_v"}
        assert not module.has_encoder
        for ours, theirs in zip(module.prefixes(), wanted, strict=True):
            assert torch.equal(ours, theirs) and ours.is_contiguous()
    stray[0].finalize()
    with pytest.raises(RuntimeError, match="was finalized before it"):
        stray[1].prefixes()


def test_checkpoints_load_in_either_form() -> None:
    trained, finished = _stack(**NETWORK), _stack()
    held = trained.state_dict()
    assert {"0.prefix_k", "0.embedding", "1.prefix_v", "1.up_weight"} <= set(held)
    finished.load_state_dict(held)  # for use
    resumed = _stack(**NETWORK)
    resumed.load_state_dict(held)  # for more training
    dropped = _stack(**NETWORK)
    dropped.load_state_dict(finished.state_dict())
    for other in (finished, resumed, dropped):
        for ours, theirs in zip(other, trained, strict=True):
            for a, b in zip(ours.prefixes(), theirs.prefixes(), strict=True):
                torch.testing.assert_close(a, b)
    assert resumed[0].has_encoder and not dropped[0].has_encoder and not dropped[1].has_encoder
    torch.testing.assert_close(resumed[1].up_weight, trained[1].up_weight)
    with pytest.raises(RuntimeError, match="size mismatch for prefix_k"):
        PrefixAttention(6, 2, 8).load_state_dict(finished[0].state_dict())
    kept = PrefixAttention(6, 2, 8, **NETWORK)
    with pytest.raises(RuntimeError, match="size mismatch for prefix_k: .* the network is kept"):
        kept.load_state_dict(finished[0].state_dict())
    assert kept.has_encoder and all(value.isfinite().all() for value in kept.prefixes())
    with pytest.raises(RuntimeError, match="Missing key.*up_bias"):
        PrefixAttention(5, 2, 8, **NETWORK).load_state_dict({"up_weight": held["0.up_weight"]})


BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens is 0; it must be at least 1"),
    ({"num_key_value_heads": 2.0}, TypeError, "num_key_value_heads is float; an integer"),
    ({"head_dim": -1}, ValueError, "head_dim is -1"),
    ({"form": "tanh"}, ValueError, "form is 'tanh'; allowed: 'softmax', 'relu'"),
    ({"init": "ones"}, ValueError, "init is 'ones'; allowed: 'normal', 'zero', 'small'"),
    ({"init_std": -1.0}, ValueError, "init_std is -1.0"),
    ({"dropout": 1.5}, ValueError, "dropout is 1.5; a probability"),
    ({"gate": True}, ValueError, "in_features is None; a gate needs"),
    ({"scaling": 2.0}, ValueError, "with form 'softmax' a prefix has no scaling"),
    ({"learned_scaling": True}, ValueError, "with form 'softmax' a prefix has no scaling"),
    ({"hidden": 4}, ValueError, "hidden is 4, embedding_dim is None; a network needs both"),
    ({"shared": nn.Linear(1, 1)}, TypeError, "shared is Linear; another PrefixAttention"),
    ({"shared": PrefixAttention(5, 2, 8)}, ValueError, "shared has no network of its own"),
    ({"shared": PrefixAttention(4, 2, 8, **NETWORK)}, ValueError, "shared has 4 virtual tokens"),
    ({"shared": PrefixAttention(5, 2, 8, **NETWORK), "hidden": 4}, ValueError, "hidden is 4; sha"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_argument_is_named(change: dict[str, Any], error: type, message: str) -> None:
    good = {"num_virtual_tokens": 5, "num_key_value_heads": 2, "head_dim": 8}
    with pytest.raises(error, match=message):
        PrefixAttention(**(good | change))


def test_in_words() -> None:
    owner = PrefixAttention(5, 2, 8, dropout=0.1, **NETWORK)
    assert repr(owner) == "PrefixAttention(5, 2, 8, hidden=3, embedding_dim=6, dropout=0.1)"
    other = PrefixAttention(5, 2, 8, shared=owner, form="relu", in_features=6, gate=True)
    expected = "PrefixAttention(5, 2, 8, form='relu', hidden=3, embedding_dim=6, shared, gate)"
    assert repr(other) == expected
