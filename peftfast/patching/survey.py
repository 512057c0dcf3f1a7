"""Finding every candidate: PEFT's tuner layers, each with why it can't be fused, if it can't."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from peftfast.patching.handlers import Handler, handler_of
from peftfast.patching.state import State, state_of


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tuner layer.

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
    """Every tuner layer of `model`, in the order of `named_modules`."""
    from peft.tuners.lora import layer as lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    merged_by_parent = {
        id(m.base_layer.out_proj) for _, m in layers if isinstance(m, lora.MultiheadAttention)
    }
    return [_candidate(path, module, id(module) in merged_by_parent) for path, module in layers]


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

    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    base = type(module.get_base_layer()).__name__
    if isinstance(module, lora.ParamWrapper):
        return f"LoRA on the parameter {module.parameter_name!r} of {base} has no fused op"
    if isinstance(module, lora.Linear):
        return f"{kind} is a subclass of peft's lora.Linear with a forward that may differ"
    if isinstance(module, lora.LoraLayer):
        return f"LoRA over {base} ({kind}) has no fused op"
    return f"{kind} over {base} has no fused op"
