"""Where the components of a configuration land on a model; nothing is changed here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftfast.methods import attention
from peftfast.methods.component import EMBEDDING, MODULES, Component
from peftfast.methods.config import MethodConfig
from peftfast.methods.sites import SITES, Block, base_of, find_blocks, linear_sizes

ALL_LINEAR = "all-linear"
# What attention modules call the size and the number of their heads.
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_kv")
_NUMBERS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class BlockRef:
    """The layer in which an adapter is: `position` counts over all stacks."""

    name: str
    stack: str
    index: int
    position: int


@dataclass(frozen=True)
class Placement:
    """One adapter: at the input or output of the module `host`, reading what enters the module
    `tap`, or, without one, what it changes (sequential) or what enters its host (parallel).

    A prefix (side "attention") is beside the linear of q, whose input its gate reads, and in the
    attention module `core`, for `heads` of keys and values [number, size]. A prompt (side
    "embedding") is beside the model's input embeddings.
    """

    component: Component
    host: str
    side: str
    tap: str | None
    in_features: int
    out_features: int
    near: str
    block: BlockRef | None
    core: str | None = None
    heads: tuple[int, int] | None = None


def place(model: nn.Module, config: MethodConfig) -> list[Placement]:
    """The adapters of a configuration on a model, in its layers' order.

    Raises:
        ValueError: a component finds no place, or layers name some that are not there; the
            message says what the model has.
    """
    blocks = find_blocks(model)
    refs = [
        BlockRef(block.name, block.stack, block.index, position)
        for position, block in enumerate(blocks)
    ]
    if config.layers is not None and (beyond := [i for i in config.layers if i >= len(blocks)]):
        raise ValueError(f"layers has {beyond}; the model has {len(blocks)} layers, from 0")
    placements: list[Placement] = []
    for component in config.resolved():
        if component.site == MODULES:
            found = _on_modules(model, component, config, blocks, refs)
        elif component.site == EMBEDDING:
            found = [_on_embedding(model, component)]
        else:
            found = [
                placement
                for block, ref in zip(blocks, refs, strict=True)
                if (config.layers is None or ref.position in config.layers)
                and component.stack in (None, block.stack)
                and (placement := _in_block(model, component, block, ref)) is not None
            ]
        if not found and not component.optional:
            raise ValueError(_nowhere(component, config, blocks))
        placements.extend(found)
    if not placements and not config.train_norms:
        raise ValueError("the configuration's components find no place on this model")
    _check_taps(placements)
    return placements


def fingerprint(placements: Sequence[Placement]) -> dict[str, list[list[Any]]]:
    """For each component [name with # for numbers, places, in, out] of each kind of place."""
    counted = Counter(
        (
            one.component.parameter_name,
            re.sub(r"\b\d+\b", "#", one.host),
            one.in_features,
            one.out_features,
        )
        for one in placements
    )
    found: dict[str, list[list[Any]]] = {}
    for (component, host, *widths), places in counted.items():
        found.setdefault(component, []).append([host, places, *widths])
    return found


def _in_block(
    model: nn.Module, component: Component, block: Block, ref: BlockRef
) -> Placement | None:
    if component.site not in SITES:
        name = block.linears.get(component.site)
        return None if name is None else _on_linear(model, component, name, ref)
    if component.primitive == "prefix":
        return _in_attention(model, component, block, ref)
    point = block.points.get(component.site)
    if point is None:
        return None
    if component.source is None:
        widths = point.features, point.features
        return Placement(component, point.module, point.side, None, *widths, point.near, ref)
    source = block.points.get(component.source)
    if source is None:
        return None
    if source.side != "input":
        raise ValueError(
            f"reads is {component.source!r}, which is known only after its module has run: a"
            " parallel component reads an input (attention_input, ffn_input, ffn_hidden, ...)"
        )
    tap = None if source.module == point.module else source.module
    widths = source.features, point.features
    return Placement(component, point.module, point.side, tap, *widths, point.near, ref)


def _in_attention(
    model: nn.Module, component: Component, block: Block, ref: BlockRef
) -> Placement | None:
    """A prefix: in the attention module, beside the linear of q."""
    sublayer = component.site.removesuffix("_heads")
    read, heads = block.points.get(f"{sublayer}_input"), block.points.get(component.site)
    if read is None or heads is None:
        return None
    core = read.module.rpartition(".")[0]
    module = model.get_submodule(core)
    if (reason := attention.obstacle(module)) is not None:
        raise ValueError(
            f"component {component.name!r} can't reach the attention {core}: {reason}. Looked at"
            f" the layers by structure and found it in {block.name}"
        )
    count, size = _key_value_heads(model, module, block, sublayer, heads.features)
    widths = read.features, count * size
    return Placement(
        component, read.module, "attention", None, *widths, read.near, ref, core, (count, size)
    )


def _key_value_heads(
    model: nn.Module, core: nn.Module, block: Block, sublayer: str, width: int
) -> tuple[int, int]:
    """How many heads the keys have, and their size, by the widths of an attention's linears."""
    known = vars(core)
    size = next((known[name] for name in _SIZES if isinstance(known.get(name), int)), None)
    if size is None:
        number = next((known[name] for name in _NUMBERS if isinstance(known.get(name), int)), 0)
        size = width // number if number else 0
    leaving = {
        role: sizes[1]
        for role in ("k", "kv", "qkv")
        if (name := block.linears.get(f"{sublayer}_{role}")) is not None
        and (sizes := linear_sizes(model.get_submodule(name))) is not None
    }
    keys = 0
    if "k" in leaving:
        keys = leaving["k"]
    elif "kv" in leaving:
        keys = leaving["kv"] // 2
    elif "qkv" in leaving:
        keys = (leaving["qkv"] - width) // 2
    if not size or keys < size or keys % size:
        raise ValueError(
            f"the heads of {type(core).__name__} in {block.name} can't be told: size {size}, keys"
            f" {keys} wide, by its linears {', '.join(sorted(leaving)) or 'none of k, kv, qkv'}"
        )
    return keys // size, size


def _on_embedding(model: nn.Module, component: Component) -> Placement:
    """A prompt: beside the model's input embeddings."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    try:
        held = None if getter is None else getter()
    except NotImplementedError:  # transformers', of models without one embedding
        held = None
    name = next((name for name, module in model.named_modules() if module is held), None)
    features = getattr(held, "embedding_dim", None)
    if held is None or name is None or not isinstance(features, int):
        raise ValueError(
            f"component {component.name!r} finds no input embeddings in {type(model).__name__}: its"
            f" get_input_embeddings() gives {type(held).__name__}"
        )
    return Placement(component, name, "embedding", None, features, features, name, None)


def _on_linear(
    model: nn.Module, component: Component, name: str, ref: BlockRef | None
) -> Placement:
    """At a linear's output, reading that (sequential) or its own input (parallel)."""
    module = base_of(model.get_submodule(name))
    sizes = linear_sizes(module)
    if sizes is None:
        raise ValueError(
            f"target_modules name {name}, a {type(module).__name__}: linears are needed there"
        )
    entering, leaving = sizes
    read = leaving if component.insertion == "sequential" else entering
    return Placement(component, name, "output", None, read, leaving, name, ref)


def _on_modules(
    model: nn.Module,
    component: Component,
    config: MethodConfig,
    blocks: Sequence[Block],
    refs: Sequence[BlockRef],
) -> list[Placement]:
    found = []
    for name, _ in model.named_modules():
        if config.target_modules == ALL_LINEAR:
            wanted = any(name in block.linears.values() for block in blocks)
        else:
            wanted = bool(name) and _named(name, config.target_modules)
        if not wanted:
            continue
        ref = next((r for b, r in zip(blocks, refs, strict=True) if _inside(name, b.name)), None)
        if config.layers is not None and (ref is None or ref.position not in config.layers):
            continue
        if component.stack is not None and (ref is None or ref.stack != component.stack):
            continue
        found.append(_on_linear(model, component, name, ref))
    return found


def _inside(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _named(name: str, wanted: list[str] | str | None) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted or ())


def _nowhere(component: Component, config: MethodConfig, blocks: Sequence[Block]) -> str:
    if component.site == MODULES:
        return f"target_modules is {config.target_modules!r}, and no linear of the model has it"
    there = sorted({site for block in blocks for site in (*block.points, *block.linears)})
    limits = [f"stack {component.stack!r}"] if component.stack is not None else []
    limits += [f"layers {config.layers}"] if config.layers is not None else []
    source = f" reading {component.source}" if component.source is not None else ""
    return (
        f"component {component.name!r} finds no {component.site}{source} on this model"
        f"{' within ' + ' and '.join(limits) if limits else ''}; its {len(blocks)} layers have"
        f" {', '.join(there)}"
    )


def _check_taps(placements: Sequence[Placement]) -> None:
    """A module that is read must not contain one that is wrapped: its children would move."""
    hosts = {one.host for one in placements} | {one.tap for one in placements if one.tap}
    for one in placements:
        inside = [host for host in hosts if one.tap and host.startswith(f"{one.tap}.")]
        inside += [host for host in hosts if host.startswith(f"{one.host}.")]
        if inside:
            raise ValueError(
                f"component {one.component.name!r} wraps {one.tap or one.host}, and another"
                f" {inside[0]} within it: they can't be combined"
            )
