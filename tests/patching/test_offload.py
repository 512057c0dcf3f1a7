"""memory="offload": what goes, what stays, and that it comes back as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftfast.patching import offload, patch, unpatch
from tests.patching.tiny import adapted, copy_of, inputs_of, step_is_as_good


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors on a CPU go too, however small; the places of those that went, and came back."""
    places: list[int] = []
    take, lane = offload.Away.take, offload.lane

    def taken(self: Any) -> Tensor:
        places.append(self.place)
        return take(self)

    monkeypatch.setattr(offload, "is_remote", lambda tensor: True)
    monkeypatch.setattr(offload, "SMALL", 1)
    monkeypatch.setattr(offload.Away, "take", taken)
    monkeypatch.setattr(offload, "lane", lane)
    return places


def hooks_of(model: nn.Module) -> int:
    return sum(
        isinstance(getattr(hook, "__self__", None), offload.Offloading)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    )


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_as_good_as_peft(family: str, moved: list[int]) -> None:
    model = adapted(family)
    peft = copy_of(model)
    patch(model, memory="offload", strict=True)
    for _ in range(3):
        step_is_as_good(model, peft, inputs_of(family))
    assert moved


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_checkpoints(reentrant: bool, moved: list[int]) -> None:
    model = adapted()
    peft = copy_of(model)
    patch(model, memory="offload")
    for m in (model, peft):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.enable_input_require_grads()
        m.train()
    for _ in range(3):
        step_is_as_good(model, peft, inputs_of())


def test_on_a_cpu_nothing_goes() -> None:
    saved: list[Any] = []
    model = nn.Sequential(nn.Linear(600, 600), nn.ReLU())
    offload.attach(model)
    x = torch.randn(600, 600, requires_grad=True)
    y = model(x)
    saved.append(y.grad_fn._saved_result)
    assert saved[0].data_ptr() == y.data_ptr()
    y.sum().backward()


def test_parameters_and_small_tensors_stay(
    moved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SMALL", 4 * 100)
    linear = nn.Linear(10, 10)
    offload.attach(linear)
    forward = offload.Forward(linear)
    assert forward.pack(linear.weight) is linear.weight
    assert type(forward.pack(linear.weight.detach().t())) is Tensor
    small, large = torch.randn(99), torch.randn(100)
    assert forward.pack(small) is small
    assert isinstance(forward.pack(large), offload.Packed)
    assert type(forward.pack(large.to_sparse())) is Tensor


def test_an_output_that_its_own_node_saves_is_no_cycle() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    offload.attach(model)
    y = model(torch.ones(2, 3))
    alive = weakref.ref(y)
    gc.disable()
    try:
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_one_copy_of_a_storage(moved: list[int]) -> None:
    forward = offload.Forward(nn.Linear(1, 1))
    base = torch.arange(24.0).view(4, 6)
    views = [base, base.t(), base[1:, ::2], base.view(torch.int32)]
    packed = [forward.pack(view) for view in views]
    assert len({id(one.away) for one in packed}) == 1
    expected = [view.clone() for view in views]
    storage = weakref.ref(base.untyped_storage())
    del base, views
    forward._free_what_left()
    assert storage() is None
    for _ in range(2):  # two backwards over one graph
        back = [forward.unpack(one) for one in packed]
        assert len({one.untyped_storage().data_ptr() for one in back}) == 1
        assert all(torch.equal(one, value) for one, value in zip(back, expected, strict=True))
        assert packed[0].away._there is None  # all that wait for it have it
        del back


def test_a_change_in_place_is_another_value(moved: list[int]) -> None:
    forward = offload.Forward(nn.Linear(1, 1))
    x = torch.ones(8)
    first = forward.pack(x)
    x.mul_(2)
    second = forward.pack(x)
    assert torch.equal(forward.unpack(first), torch.ones(8))
    assert torch.equal(forward.unpack(second), 2 * torch.ones(8))


def test_fetched_before_they_are_asked_for(moved: list[int]) -> None:
    forward = offload.Forward(nn.Linear(1, 1))
    packed = [forward.pack(torch.full((8,), float(i))) for i in range(9)]
    forward._free_what_left()
    forward.unpack(packed[8])
    there = [one.away._there is not None for one in packed]
    assert there == [False] * 4 + [True] * 4 + [False]


def test_two_backwards_over_one_graph(moved: list[int]) -> None:
    model = patch(adapted(), memory="offload")
    plain = unpatch(copy.deepcopy(model))
    results = []
    for m in (model, plain):
        m.zero_grad()
        loss = m(**inputs_of()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        results.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-6)


def test_the_graph_frees_all(moved: list[int]) -> None:
    model = patch(adapted(), memory="offload")
    kept: list[Any] = []
    init = offload.Away.__init__

    def noted(self: Any, *args: Any) -> None:
        init(self, *args)
        kept.append(weakref.ref(self))

    offload.Away.__init__ = noted  # type: ignore[method-assign]
    try:
        loss = model(**inputs_of()).loss
    finally:
        offload.Away.__init__ = init  # type: ignore[method-assign]
    assert any(ref() is not None for ref in kept)
    loss.backward()
    del loss
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_hooks_come_and_go() -> None:
    model = patch(adapted(), memory="offload")
    assert hooks_of(model) == 2
    patch(model, memory="offload")
    assert hooks_of(model) == 2
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hooks_of(twin) == 2
        assert hooks_of(unpatch(twin)) == 0
    patch(model)
    assert hooks_of(model) == 0
    assert not model._forward_hooks_always_called


@pytest.mark.filterwarnings("ignore:Silently ignoring")
def test_an_exception_leaves_no_hooks_behind(moved: list[int]) -> None:
    model = patch(adapted(), memory="offload")
    with pytest.raises(ValueError, match="exactly one of"):
        model(no_such_argument=1)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    with torch.no_grad():
        model(**inputs_of())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not moved


@pytest.mark.gpu
def test_memory_and_numbers_on_a_gpu() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(24)]
    model = nn.Sequential(*layers).cuda()
    x = torch.randn(8192, 1024, device="cuda", requires_grad=True)

    def step() -> tuple[int, Tensor]:
        x.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = model(x).sum()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        y.backward()
        torch.cuda.synchronize()
        assert x.grad is not None
        return held, x.grad.clone()

    plain, expected = step()
    offload.attach(model)
    held, got = step()
    assert torch.equal(got, expected)
    assert held <= plain / 2
