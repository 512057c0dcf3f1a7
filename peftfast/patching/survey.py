"""Finding every candidate, each with why it can't be fused, if it can't.

Candidates are PEFT's tuner layers, and bitsandbytes' linears that no tuner layer is on.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import nn

from peftfast.patching.handlers import Handler, handler_of, handlers
from peftfast.patching.state import State, state_of


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer that could be fused, or one of a kind that can't be.

    `unsupported` says why no op serves its kind, `obstacles` what is in this instance's way.
    """

    path: str
    module: Any
    handler: Handler | None
    unsupported: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()

    @property
    def fusable(self) -> bool:
        return self.handler is not None and not self.unsupported and not self.obstacles

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def state(self) -> State | None:
        return state_of(self.module)


def require_module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    return model


def survey(model: nn.Module) -> list[Candidate]:
    """Every candidate of `model`, in the order of `named_modules`."""
    from peft.tuners.lora import layer as lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = list(model.named_modules())
    layers: list[Any] = [m for _, m in modules if isinstance(m, BaseTunerLayer)]
    merged_by_parent = {
        id(m.base_layer.out_proj) for m in layers if isinstance(m, lora.MultiheadAttention)
    }
    bases = {id(m.base_layer) for m in layers}
    quantised = _quantised_types()
    return [
        _candidate(path, module, id(module) in merged_by_parent)
        for path, module in modules
        if isinstance(module, BaseTunerLayer)
        or (isinstance(module, quantised) and id(module) not in bases)
    ]


def _quantised_types() -> tuple[type[nn.Module], ...]:
    """bitsandbytes' linears; none where nothing has imported bitsandbytes."""
    bnb: Any = sys.modules.get("bitsandbytes")
    return () if bnb is None else (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def _candidate(path: str, module: Any, merged_by_parent: bool) -> Candidate:
    handler = handler_of(module)
    if state_of(module) is not None:
        return Candidate(path, module, handler)
    if merged_by_parent:
        reason = "peft's MultiheadAttention around it merges its weights and never calls it"
        return Candidate(path, module, None, unsupported=(reason,))
    if handler is None:
        return Candidate(path, module, None, unsupported=(_no_handler(module),))
    if unsupported := handler.unsupported(module):
        return Candidate(path, module, handler, unsupported=tuple(unsupported))
    return Candidate(path, module, handler, obstacles=tuple(handler.obstacles(module)))


def _no_handler(module: Any) -> str:
    """Why a type is not in the handlers' table."""
    from peft.tuners.lora import layer as lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    for handler in handlers().values():
        if isinstance(module, handler.source):
            return f"{kind} is a subclass of {handler.name} with a forward that may differ"
    if not isinstance(module, BaseTunerLayer):
        return f"{kind} has no fused op"
    base = type(module.get_base_layer()).__name__
    if isinstance(module, lora.ParamWrapper):
        return f"LoRA on the parameter {module.parameter_name!r} of {base} has no fused op"
    if isinstance(module, lora.LoraLayer):
        return f"LoRA over {base} ({kind}) has no fused op"
    return f"{kind} over {base} has no fused op"
