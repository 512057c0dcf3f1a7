"""Finding every candidate, each with why it can't be fused, if it can't.

Candidates are layers: PEFT's tuner layers, attention modules that read a prefix of PEFT's,
bitsandbytes' linears that no tuner layer is on, the project's own adapters and trained bottlenecks
of other code. And where a layer of a method is among
them that can be fused, or is, the parts around: norms, gated MLPs, activations, dropouts and
attention.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from peftfast.patching.handlers import Handler, handler_of, handlers
from peftfast.patching.parts import Part, part_of, source_of
from peftfast.patching.state import State, state_of

if TYPE_CHECKING:
    from peftfast.patching.peft_prefix import PeftPrefix


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
    def is_part(self) -> bool:
        return isinstance(self.handler, Part) and not self.is_method

    @property
    def is_method(self) -> bool:
        """Whether a method trains it, and what surrounds it is worth rewiring."""
        return self.handler is not None and self.handler.is_method

    @property
    def op(self) -> str:
        """The op of a fused one."""
        state, handler = self.state, self.handler
        assert state is not None and handler is not None
        return handler.op_of(state.plan) if isinstance(handler, Part) else handler.op

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
    hosts, adapters = _own_types()
    bases = {id(m.base_layer) for m in layers if not isinstance(m, hosts)}
    quantised = _quantised_types()
    inside = {id(inner) for layer in layers for inner in _inside(layer)}
    inside |= {id(inner) for _, m in modules if isinstance(m, adapters) for inner in m.modules()}
    found: list[Candidate] = []
    parts: list[Candidate] = []
    prefixed, shifted = _prefixed(modules)
    inside |= shifted
    for path, module in modules:
        if id(module) in prefixed:
            found.append(prefixed[id(module)])
        elif isinstance(module, adapters) or (
            isinstance(module, BaseTunerLayer) and not isinstance(module, hosts)
        ):
            found.append(_candidate(path, module, id(module) in merged_by_parent))
        elif isinstance(module, quantised) and id(module) not in bases:
            found.append(_candidate(path, module, False))
        elif id(module) not in inside and (handler := part_of(module)) is not None:
            (found if handler.is_method else parts).append(_part(path, module, handler))
    wanted = any(candidate.is_method and candidate.fusable for candidate in found)
    return found + [part for part in parts if wanted or part.state is not None]


def claimed_children(candidates: list[Candidate], plans: dict[str, Any]) -> dict[str, str]:
    """Paths of parts that another part no longer calls, each with that one's path.

    Args:
        plans: of the parts that are rewired, or will be, by path.
    """
    claimed = {}
    for candidate in candidates:
        if candidate.path in plans and isinstance(candidate.handler, Part):
            for name in candidate.handler.claims(plans[candidate.path]):
                claimed[f"{candidate.path}.{name}" if candidate.path else name] = candidate.path
    return claimed


def _inside(layer: Any) -> list[nn.Module]:
    """The modules of a tuner layer that are its own, and those of a linear below it."""
    base = layer.base_layer
    kept = {id(module) for module in base.modules()}
    return [module for module in layer.modules() if id(module) not in kept]


def _prefixed(modules: list[tuple[str, nn.Module]]) -> tuple[dict[int, Candidate], set[int]]:
    """What reads PEFT's prefixes: attention modules, or the PeftModel where they can't be told; and
    the embeddings of positions, which are theirs.
    """
    from peftfast.patching.peft_prefix import PeftPrefix, prefix_models

    found: dict[int, Candidate] = {}
    shifted: set[int] = set()
    for path, model in prefix_models(modules).items():
        handler = PeftPrefix(model)
        shifted |= {id(module) for module in handler.shifted}
        if handler.reason:
            found[id(model)] = Candidate(path, model, None, unsupported=(handler.reason,))
        for name, (core, _) in handler.cores.items():
            whole = f"{path}.{name}" if path else name
            found[id(core)] = _part(whole, core, handler)
    return found, shifted


def _part(path: str, module: Any, handler: Part | PeftPrefix) -> Candidate:
    if state_of(module) is not None:
        return Candidate(path, module, handler)
    if unsupported := handler.unsupported(module):
        return Candidate(path, module, handler, unsupported=tuple(unsupported))
    return Candidate(path, module, handler, obstacles=tuple(handler.obstacles(module)))


def _own_types() -> tuple[tuple[type[nn.Module], ...], tuple[type[nn.Module], ...]]:
    """The tuner layers of `peftfast.methods`, whose adapters are found beside them, and those."""
    methods: Any = sys.modules.get("peftfast.methods.layer")
    names = {"bottleneck": "BottleneckAdapter", "prefix_attention": "PrefixAttention"}
    files = {name: sys.modules.get(f"peftfast.nn.{name}") for name in names}
    return (
        () if methods is None else (methods.AdapterHost,),
        tuple(getattr(files[n], kind) for n, kind in names.items() if files[n] is not None),
    )


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
    base = source_of(module.get_base_layer()).__name__
    if isinstance(module, lora.ParamWrapper):
        return f"LoRA on the parameter {module.parameter_name!r} of {base} has no fused op"
    if isinstance(module, lora.LoraLayer):
        return f"LoRA over {base} ({kind}) has no fused op"
    return f"{kind} over {base} has no fused op"
