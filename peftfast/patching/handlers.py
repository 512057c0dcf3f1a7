"""Which layers can be fused: one handler for each exact type.

Another layer is another file and one line here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A fused op against its module's own forward: how they differ, or why that is not known."""

    difference: str = ""
    unchecked: str = ""


class Handler(Protocol):
    """What `patch` and `report` ask about a layer type; documented at `PeftLora`.

    `has_siblings`: whether modules of this type under one parent may be computed in one call.
    """

    name: str
    op: str
    has_siblings: bool
    source: type[nn.Module]
    fused: type[nn.Module]

    def unsupported(self, module: Any) -> list[str]: ...

    def obstacles(self, module: Any) -> list[str]: ...

    def compare(self, module: Any, impl: str) -> Comparison: ...

    def prepare(self, module: Any) -> None: ...

    def require(self, impl: str, modules: Iterable[Any]) -> None: ...


# Files with a list HANDLERS, each with the package whose layers they handle. Where nothing has
# imported that package there are no such layers, and it is not imported for their sake.
_FILES = (
    ("peft_lora", "peft"),
    ("peft_lora_4bit", "bitsandbytes"),
    ("bnb_linear4bit", "bitsandbytes"),
)


def handlers() -> dict[type[nn.Module], Handler]:
    """The handlers by the exact type that they recognise."""
    return _handlers(tuple(name for name, package in _FILES if sys.modules.get(package)))


@functools.cache
def _handlers(files: tuple[str, ...]) -> dict[type[nn.Module], Handler]:
    found = [importlib.import_module(f"peftfast.patching.{name}").HANDLERS for name in files]
    return {handler.source: handler for known in found for handler in known}


def handler_of(module: nn.Module) -> Handler | None:
    """The handler of an unfused module, by its exact type, or of a fused one."""
    known = handlers()
    if type(module) in known:
        return known[type(module)]
    return next((h for h in known.values() if isinstance(module, h.fused)), None)
