"""Outputs that wait for siblings: nothing stays behind, nothing crosses copies or threads."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftfast.patching import siblings
from peftfast.patching.state import state_of
from tests.patching.attention import Counted, attention, block, group_of, observed, same, waiting


def test_nothing_is_kept_after_a_forward() -> None:
    model, _, source = observed()
    x = source * 2
    y = model(x)
    watched = weakref.ref(x)
    del x
    assert watched() is not None  # the graph holds it
    del y
    gc.collect()
    assert watched() is None


def test_an_exception_leaves_nothing_behind(calls: Counted) -> None:
    """Between q and k: what waits, and with it the whole graph, goes when the exception does."""
    model, peft, x = observed()

    def fail(_: Tensor) -> None:
        assert waiting(model) == 2
        raise MemoryError("between")

    block(model).between = fail
    source = torch.randn(5, 16, requires_grad=True)
    inner = source * 2  # the graph holds it: it saves it, and so do the outputs that wait
    watched = weakref.ref(inner)
    with pytest.raises(MemoryError):
        model(inner)
    del inner
    gc.collect()
    assert waiting(model) == 0
    assert watched() is None

    block(model).between = lambda x: None  # and one exception is no reason to stop
    calls.take()
    same(model, peft, x)
    assert calls.take() == (1, 1)


def test_an_exception_without_grad_leaves_nothing_behind() -> None:
    model, _, _ = observed()

    def fail(_: Tensor) -> None:
        raise MemoryError("between")

    block(model).between = fail
    x = torch.randn(5, 16)
    with torch.no_grad(), pytest.raises(MemoryError):
        model(x)
    assert waiting(model) == 2
    del x
    gc.collect()
    assert waiting(model) == 0


def test_an_exception_in_the_op_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, peft, x = observed()
    group = siblings.lora_linear_group
    monkeypatch.setattr(siblings, "lora_linear_group", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert waiting(model) == 0
    monkeypatch.setattr(siblings, "lora_linear_group", group)
    same(model, peft, x)


def test_a_member_that_is_no_longer_called(calls: Counted) -> None:
    """Its output is dropped with the graph; the second time, the group is given up."""
    model, _, x = observed()
    calls.take()
    for expected in ((0, 1), (0, 1), (1, 0)):
        y = block(model).q(x)
        assert waiting(model) == (2 if expected[1] else 0)
        y.sum().backward()
        del y
        assert waiting(model) == 0
        assert calls.take() == expected
    assert "not all asked for" in group_of(model).stopped


def test_a_member_that_is_gone() -> None:
    """Modules are replaced (merge_and_unload) before the run that they were seen in is closed."""
    model, _, x = attention("qk")
    block(model).q(x)
    block(model).k(x)
    block(model).k = nn.Identity()
    gc.collect()
    for _ in range(3):
        block(model).q(x).sum().backward()
    assert group_of(model) is None


def test_exceptions_now_and_then_are_no_reason_to_stop() -> None:
    model, _, x = observed()
    for _ in range(3):
        block(model).q(x)
        assert waiting(model) == 0
        model(x)
    assert not group_of(model).stopped


def test_leftovers_go_at_the_first_members_next_call() -> None:
    model, _, x = observed()
    first = block(model).q(x)
    kept = group_of(model)._handouts[threading.get_ident()].outputs[1][0]
    ref = weakref.ref(kept)
    del kept
    second = block(model).q(torch.randn(5, 16))
    gc.collect()
    assert ref() is None
    assert first.shape == second.shape


def test_an_unused_output_costs_no_gradient() -> None:
    model, peft, x = observed()
    results = []
    for m in (model, peft):
        m.zero_grad()
        b = block(m)
        q, k, v = b.q(x), b.k(x), b.v(x)
        (q + v).sum().backward()
        results.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
        del k
    for name, grad in results[1].items():
        torch.testing.assert_close(results[0][name], grad)
    for name in results[0].keys() - results[1].keys():
        assert not results[0][name].any()


def test_copies_have_groups_of_their_own(calls: Counted) -> None:
    model, peft, x = observed()
    model(x)
    twin = copy.deepcopy(model)
    assert group_of(twin) is None
    states = [state_of(getattr(block(twin), n)) for n in "qkvo"]
    assert len({id(state.siblings) for state in states}) == 1
    assert states[0].siblings is not state_of(block(model).q).siblings
    twin(x)
    calls.take()
    same(twin, peft, x)
    assert calls.take() == (1, 1)
    same(model, peft, x)
    assert calls.take() == (1, 1)


def test_a_copied_member_drags_no_others_along() -> None:
    model, _, x = observed()
    model(x)
    lone = copy.deepcopy(block(model).q)
    reachable = {id(block(model).k), id(block(model).v)}
    state = state_of(lone)
    assert state.group is None
    assert not any(id(m) in reachable for m in vars(state.siblings).values())
    torch.testing.assert_close(lone(x), block(model).q(x))


def test_threads_do_not_mix() -> None:
    """Two threads in the same modules, in step: each gets the outputs for its own input."""
    model, peft, _ = observed()
    barrier = threading.Barrier(2)
    block(model).between = lambda x: barrier.wait(10)
    inputs = [torch.randn(5, 16) for _ in range(2)]
    outputs: list[Any] = [None, None]

    def work(index: int) -> None:
        with torch.no_grad():
            outputs[index] = model(inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, y in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(y, peft(x))
    assert not group_of(model).stopped


def test_replicas_share_no_outputs() -> None:
    """DataParallel's replicas share the record, and must not share outputs."""
    model, peft, x = observed()
    b = block(model)
    replica = b.k._replicate_for_data_parallel()
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout"):
        replica._modules[name] = copy.deepcopy(b.k._modules[name])
    with torch.no_grad():
        replica.base_layer.weight.mul_(2)
    first = b.q(x)
    assert waiting(model) == 2
    torch.testing.assert_close(replica(x), b.k(x) * 2 - lora_part(b.k, x) - b.k.base_layer.bias)
    assert not group_of(model).stopped
    del first


def lora_part(module: Any, x: Tensor) -> Tensor:
    return module.scaling["default"] * module.lora_B["default"](module.lora_A["default"](x))
