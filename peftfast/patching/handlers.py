"""Which layers can be fused: one handler for each exact type.

Another layer is another file and one line here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

from torch import nn


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A fused op against its module's own forward: how they differ, or why that is not known."""

    difference: str = ""
    unchecked: str = ""


class Handler(Protocol):
    """What `patch` and `report` ask about a layer type; documented at `PeftLoraLinear`."""

    op: str
    source: type[nn.Module]
    fused: type[nn.Module]

    def unsupported(self, module: Any) -> list[str]: ...

    def obstacles(self, module: Any) -> list[str]: ...

    def compare(self, module: Any, impl: str) -> Comparison: ...


@functools.cache
def handlers() -> dict[type[nn.Module], Handler]:
    """The handlers by the exact type that they recognise."""
    from peftfast.patching.peft_lora import PeftLoraLinear

    known: list[Handler] = [PeftLoraLinear()]
    return {handler.source: handler for handler in known}


def handler_of(module: nn.Module) -> Handler | None:
    """The handler of an unfused module, by its exact type, or of a fused one."""
    known = handlers()
    if type(module) in known:
        return known[type(module)]
    return next((h for h in known.values() if isinstance(module, h.fused)), None)
