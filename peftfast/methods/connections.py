"""What modules outside of a host know of it: attention, positions and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peftfast.methods import attention, positions, prompts
from peftfast.methods.layer import AdapterHost
from peftfast.methods.sites import find_blocks


def connect(model: nn.Module) -> None:
    """Have attention modules, positions and embeddings know the prefixes and prompts in a model,
    and no others.
    """
    found = {name: one for name, one in model.named_modules() if isinstance(one, AdapterHost)}
    prefixed = {name: host for name, host in found.items() if host.has("prefix")}
    for name, host in found.items():
        core = model.get_submodule(name.rpartition(".")[0])
        if name in prefixed:
            attention.attach(core, host)
        elif attention.source_of(core) is host:
            attention.detach(core)
    _connect_positions(model, prefixed)
    prompted = [host for host in found.values() if host.has("prompt")]
    if prompted:
        prompts.attach(model, prompted[0])
    else:
        prompts.detach(model)


def disconnect(model: nn.Module) -> None:
    """Undo `connect`."""
    for module in model.modules():
        if isinstance(attention.source_of(module), AdapterHost):
            attention.detach(module)
        if _is_hosts(positions.offset_of(module)):
            positions.unshift(module)
    prompts.detach(model)


def _connect_positions(model: nn.Module, prefixed: dict[str, AdapterHost]) -> None:
    stacks: dict[str, list[AdapterHost]] = {}
    if prefixed:
        for block in find_blocks(model):
            stacks.setdefault(block.name.rpartition(".")[0], []).extend(
                host
                for name, host in prefixed.items()
                if name.startswith(f"{block.name}.") and host.is_in_self_attention
            )
    wanted: dict[str, list[AdapterHost]] = {}
    for stack, inside in stacks.items():
        if inside:
            for name in positions.find(model, stack, [one for one in stacks if one != stack]):
                wanted.setdefault(name, []).extend(inside)
    for name, module in model.named_modules():
        if name in wanted:
            positions.unshift(module)
            positions.shift(module, positions.Offset(wanted[name]))
        elif _is_hosts(positions.offset_of(module)):
            positions.unshift(module)


def _is_hosts(offset: positions.Offset | None) -> bool:
    """Whether an offset is of hosts, and of no other source."""
    return offset is not None and all(isinstance(one, AdapterHost) for one in offset.sources)


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Give the model its modules, its adapters and what trains back where an error ends this."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    states = [(one, one.state()) for one in model.modules() if isinstance(one, AdapterHost)]
    trained = [(value, value.requires_grad) for value in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    known = model.__dict__.get("peft_config")
    try:
        yield
    except BaseException:
        disconnect(model)
        for module, held in children:
            module._modules.clear()
            module._modules.update(held)
        for host, state in states:
            host.__dict__.update(state)
        if known is None:
            model.__dict__.pop("peft_config", None)
        for value, before in trained:
            value.requires_grad_(before)
        for module, training in modes:
            module.training = training
        connect(model)
        raise
