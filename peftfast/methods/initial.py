"""Prefixes that start from those of a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from peftfast.methods.layer import AdapterHost
from peftfast.methods.registration import PREFIX

_ROOT = "base_model.model."


def saved_prefixes(path: str | Path) -> dict[str, Tensor]:
    """The prefixes of an adapter in a directory, by names as
    "<module>.peftfast_attention_prefix.prefix_k".

    Raises:
        FileNotFoundError: there is no saved adapter.
        ValueError: it has no prefixes.
    """
    file = Path(path) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"initial_prefix is {str(path)!r}, where no {file.name} is")
    values = {
        name.removeprefix(_ROOT): value
        for name, value in load_file(file).items()
        if name.endswith((".prefix_k", ".prefix_v")) and PREFIX in name
    }
    if not values:
        raise ValueError(f"initial_prefix is {str(path)!r}; the adapter there has no prefixes")
    return values


@torch.no_grad()
def start_from(
    model: nn.Module, adapter_name: str, values: Mapping[str, Tensor], path: str | Path
) -> None:
    """Give an adapter's prefixes the values of another's.

    Raises:
        ValueError: places or shapes differ, or an encoder makes them; nothing is changed then.
    """
    targets: dict[str, Tensor] = {}
    for name, host in model.named_modules():
        if not isinstance(host, AdapterHost):
            continue
        for placement, module in host.components(adapter_name):
            if placement.component.primitive != "prefix":
                continue
            if module.has_encoder:
                raise ValueError(
                    "initial_prefix gives keys and values, and prefix_projection is True: an"
                    " encoder can't be made to give them"
                )
            at = f"{name}.{PREFIX}{placement.component.parameter_name}"
            targets[f"{at}.prefix_k"] = module.prefix_k
            targets[f"{at}.prefix_v"] = module.prefix_v
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    wanted = {name: tuple(value.shape) for name, value in targets.items()}
    if differing := sorted(
        name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name)
    ):
        first = differing[0]
        raise ValueError(
            f"initial_prefix {str(path)!r} doesn't fit: {len(differing)} of {len(wanted)} tensors"
            f" differ, as {first}: {shapes.get(first)} there, {wanted.get(first)} in the model"
        )
    for name, target in targets.items():
        target.copy_(values[name])
