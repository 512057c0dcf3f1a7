"""Which layers can be fused: one handler for each exact type.

Another layer is another file and one line here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import warnings
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from peftfast.patching.forwards import rebind


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A fused op against its module's own forward.

    Attributes:
        difference: how they differ.
        unchecked: why that is not known.
        unserved: why no op computes what the module does, where only comparing could tell.
        plan: what was found of the module that its fused forward needs, if anything.
    """

    difference: str = ""
    unchecked: str = ""
    unserved: str = ""
    plan: Any = None


class Handler(Protocol):
    """What `patch` and `report` ask about a layer type; documented at `PeftLora`.

    `is_method`: whether modules of this type are what a method trains, so that where one is fused
        what surrounds them is rewired too.
    `has_siblings`: whether modules of this type under one parent may be computed in one call.
    `found_by_comparing`: whether only a comparison tells what op a module needs.
    `recomputes`: whether the op saves less than the module by computing something again.
    """

    name: str
    op: str
    is_method: bool
    has_siblings: bool
    found_by_comparing: bool
    recomputes: bool

    def unsupported(self, module: Any) -> list[str]: ...

    def obstacles(self, module: Any) -> list[str]: ...

    def compare(self, module: Any, impl: str) -> Comparison: ...

    def prepare(self, module: Any) -> None: ...

    def whole(self, modules: list[Any]) -> str: ...

    def require(self, impl: str, modules: Iterable[Any]) -> None: ...

    def rewire(self, module: Any) -> None: ...

    def restore(self, module: Any) -> None: ...


class ClassSwap:
    """The part of a handler that gives a module of class `source` the class `fused`, and back."""

    is_method = False
    has_siblings = False
    found_by_comparing = False
    recomputes = False
    source: type[nn.Module]
    fused: type[nn.Module]

    def whole(self, modules: list[Any]) -> str:
        """Why these of its modules can't be fused without others; "" where they can."""
        return ""

    def rewire(self, module: Any) -> None:
        module.__class__ = self.fused
        rebind(module, self.source.forward, self.fused.forward)

    def restore(self, module: Any) -> None:
        if type(module) is self.fused:
            module.__class__ = self.source
        else:
            warnings.warn(
                f"{type(module).__name__} was derived from {self.fused.__name__} by other code"
                " after patch: the class is left in place, and runs the original's forward from"
                " now on",
                stacklevel=4,
            )
        rebind(module, self.fused.forward, self.source.forward)


# Files with a list HANDLERS, each with the package whose layers they handle. Where nothing has
# imported that package there are no such layers, and it is not imported for their sake.
_FILES = (
    ("bottleneck_adapter", "peftfast.nn.bottleneck"),
    ("prefix_adapter", "peftfast.nn.prefix_attention"),
    ("peft_lora", "peft"),
    ("peft_lora_4bit", "bitsandbytes"),
    ("bnb_linear4bit", "bitsandbytes"),
)


def handlers() -> dict[type[nn.Module], Any]:
    """The handlers of layers by the exact type that they recognise."""
    return _handlers(tuple(name for name, package in _FILES if sys.modules.get(package)))


@functools.cache
def _handlers(files: tuple[str, ...]) -> dict[type[nn.Module], Any]:
    found = [importlib.import_module(f"peftfast.patching.{name}").HANDLERS for name in files]
    return {handler.source: handler for known in found for handler in known}


def handler_of(module: nn.Module) -> Any:
    """The handler of an unfused layer, by its exact type, or of a fused one; None where none is."""
    known = handlers()
    if type(module) in known:
        return known[type(module)]
    return next((h for h in known.values() if isinstance(module, h.fused)), None)
