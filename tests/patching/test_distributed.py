"""DistributedDataParallel and FSDP2 around a patched model, in a world of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peftfast.patching import patch, unpatch
from tests.patching.tiny import adapted, copy_of, fused_layers, inputs_of, lora_linears


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model: Any, source: Any) -> dict[str, Tensor]:
    """Loss and gradients; `source` is the module whose parameters have them."""
    source.zero_grad()
    loss = model(**inputs_of()).loss
    loss.backward()
    grads = {name: p.grad for name, p in source.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | {
        name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()
    }


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


def groups(model: Any) -> int:
    return len({entry.siblings for entry in fused_layers(model) if entry.siblings})


@pytest.mark.parametrize("first", ["patch", "wrap"])
def test_ddp(first: str) -> None:
    model = adapted()
    peft = copy_of(model)
    if first == "patch":
        wrapped = DistributedDataParallel(patch(model))
    else:
        wrapped = patch(DistributedDataParallel(model))
    for _ in range(3):
        same(step(wrapped, model), step(peft, peft))
    assert groups(model) == 4
    assert all(not entry.delegations for entry in fused_layers(model))


@pytest.mark.parametrize("first", ["patch", "shard"])
def test_fsdp_of_blocks(first: str) -> None:
    model = adapted()
    peft = copy_of(model)
    if first == "patch":
        patch(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    if first == "shard":
        patch(model, strict=True)
        assert "sharded" in fused_layers(model)[0].note
    for _ in range(3):
        same(step(model, model), step(peft, peft))
    assert groups(model) == 4
    assert all(not entry.delegations for entry in fused_layers(model))


def test_fsdp_of_every_linear() -> None:
    """A sibling's weights are there only while it is called itself: each is computed alone."""
    model = adapted()
    peft = copy_of(model)
    patch(model)
    for module in lora_linears(model).values():
        fully_shard(module)
    fully_shard(model)
    for _ in range(3):
        same(step(model, model), step(peft, peft))
    assert groups(model) == 0
    assert all(entry.hits == 3 and not entry.note for entry in fused_layers(model))
    with pytest.warns(UserWarning, match="FSDPFusedLoraLinear was derived"):
        unpatch(model)
    same(step(model, model), step(peft, peft))


@pytest.mark.parametrize("settings", [{"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp_that_scans_the_outputs(settings: dict[str, bool]) -> None:
    """Logits whose values nobody has asked for pass through it."""
    model = adapted()
    peft = copy_of(model)
    wrapped = DistributedDataParallel(patch(model), **settings)
    for _ in range(3):
        same(step(wrapped, model), step(peft, peft))
    output = wrapped(**inputs_of())
    torch.testing.assert_close(output.logits + 0, peft(**inputs_of()).logits)
