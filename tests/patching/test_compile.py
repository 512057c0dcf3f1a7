"""torch.compile and torch.export of a patched model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from peftfast.patching import patch
from tests.patching.tiny import adapted, copy_of, fused_layers, inputs_of, lora_linears, train_step


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "siblings-known"])
def test_one_graph_and_no_recompilation(seen: bool) -> None:
    model = adapted().train()
    peft = copy_of(model)
    patch(model)
    if seen:
        for _ in range(2):
            model(**inputs_of())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(4):
        got, expected = train_step(compiled, inputs_of()), train_step(peft, inputs_of())
        for name, value in expected.items():
            key = name if name == "logits" else f"_orig_mod.{name}"
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for module in [*lora_linears(model).values(), *lora_linears(peft).values()]:
                module.lora_B["default"].weight.mul_(1.01)
    assert counter.frame_count == 1
    hits = {entry.hits for entry in fused_layers(model)}
    assert hits == ({2} if seen else {0})  # compiled calls are not counted
    assert torch.allclose(model(**inputs_of()).logits, peft(**inputs_of()).logits, atol=1e-5)


def test_calls_left_to_peft_are_one_graph_too() -> None:
    """Counting them in Python would compile again at each call."""
    model = patch(adapted())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), model.disable_adapter():
        for _ in range(3):
            compiled(**inputs_of())
    assert counter.frame_count == 1
    assert all(not entry.delegations for entry in fused_layers(model))


def test_dropout_draws_new_masks_in_one_graph() -> None:
    model = patch(adapted("llama", lora_dropout=0.4)).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    losses = [compiled(**inputs_of()).loss for _ in range(3)]
    losses[-1].backward()
    assert len({loss.item() for loss in losses}) == 3
    assert counter.frame_count == 1


def test_library_op_is_in_the_graph() -> None:
    model = patch(adapted())
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs_of())
    assert sum("peftfast.lora_linear" in target for target in seen) == 14


def test_adapter_state_is_guarded() -> None:
    """A compiled model follows disable_adapter, merging and set_adapter."""
    model = adapted()
    peft = copy_of(model)
    patch(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs_of()).logits, peft(**inputs_of()).logits)
        with model.disable_adapter(), peft.disable_adapter():
            torch.testing.assert_close(compiled(**inputs_of()).logits, peft(**inputs_of()).logits)
        model.merge_adapter()
        torch.testing.assert_close(
            compiled(**inputs_of()).logits, peft(**inputs_of()).logits, rtol=1e-4, atol=1e-5
        )
        model.unmerge_adapter()
        for module in [*lora_linears(model).values(), *lora_linears(peft).values()]:
            module.scaling["default"] = 3.0
        torch.testing.assert_close(compiled(**inputs_of()).logits, peft(**inputs_of()).logits)


def test_export_holds_no_op_of_ours() -> None:
    """An exported program runs where peftfast is not installed."""
    module = next(iter(lora_linears(patch(adapted())).values())).eval()
    x = torch.randn(3, 32)
    exported = torch.export.export(module, (x,))
    assert not any("peftfast" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), module(x))
