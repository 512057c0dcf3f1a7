"""`patch` and `unpatch`: the class of each recognised instance is swapped, and swapped back."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from peftfast.ops.dispatch import Impl, parse_impl
from peftfast.patching import offload
from peftfast.patching.handlers import handler_of
from peftfast.patching.parts import Part, part_of
from peftfast.patching.siblings import Siblings
from peftfast.patching.state import KEY, LeftAlone, State
from peftfast.patching.survey import Candidate, claimed_children, require_module, survey

if TYPE_CHECKING:
    from peftfast.patching.peft_prefix import PeftPrefix

POLICIES = ("recompute", "keep", "compress", "offload")

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    *,
    impl: str | Impl = "auto",
    exclude: Iterable[str] = (),
    strict: bool = False,
    verify: bool = True,
    memory: str = "recompute",
) -> Model:
    """Rewire the PEFT layers, 4-bit linears and bottleneck adapters of `model` onto the fused ops,
    in place; PEFT's Prefix-Tuning and CARTRIDGE too.

    And, where LoRA layers, prefixes or bottlenecks are fused, the norms, gated MLPs, activations,
    dropouts and attention modules around them, so that the step keeps little for its backward.

    Only instances are changed: of each recognised module the class, to a subclass (of an attention
    module the config, to one that shares everything with its own), and one attribute. Parameters,
    state_dict keys, hooks and everything that PEFT does with its layers stay as they were; where a
    module's own forward would compute something else than the op does, that forward runs. Calling
    it again takes modules that were added since, and applies `impl`, `exclude` and `memory` to the
    others.

    Args:
        model: a model with PEFT adapters, 4-bit linears of bitsandbytes, or trained bottlenecks
            (linear, activation, linear) of any source, anything that contains them, or a part of
            it. Adapters of `peftfast.methods` and `peftfast.nn` run their op in any case: they are
            counted, and take `impl`.
        impl: "auto", "triton", "native" or "reference", as the ops take it. Parts around the layers
            take "auto" where their op lacks that implementation; the report shows it.
        exclude: which modules to leave alone: glob patterns over module paths ("*.layers.0.*"), or
            whole names at a path's end ("q_proj", "mlp.down_proj").
        strict: raise where a module that could be fused is not (modules of a kind that no op
            serves, and excluded ones, don't count), or where there is nothing to fuse.
        verify: compare each module's fused output with its own on small random inputs first, and
            leave a module alone where they differ by more than rounding; the reason is in the
            report. (What the parts around compute is found by comparing in any case.)
        memory: how a step keeps what its backward needs; results are the same but where it is said.

            - "recompute": norms, activations, gated products and dropouts are made again in the
              backward from what is kept anyway. No matrix product is ever computed again; it costs
              reading and writing those tensors once more.
            - "keep": those modules run their own forwards, and all that autograd keeps is kept.
            - "compress": "recompute", and what is kept for the gradients of LoRA's A and B alone is
              kept in 8 bits a value with a scale for each row: inputs that can't be made again, and
              the products with A. Those gradients are of values off by at most 1/254 of their row's
              largest; every other result is exact.
            - "offload": "recompute", and what is kept goes from the GPU to pinned host memory on a
              stream of its own, and comes back ahead of the backward. It costs two copies over the
              bus, which overlap with computing, and as much host memory.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: `model` is not a module, or `exclude` is not an iterable of strings.
        ValueError: `impl` or `memory` is unknown, or a pattern of `exclude` matches nothing.
        ImplUnavailable: `impl` was named and can't serve these modules.
        RuntimeError: `strict`, and something that could be fused was not. After any of these the
            model is as it was.
    """
    from peftfast.patching import head  # imports transformers

    candidates = survey(require_module(model))
    impl = _impl_name(impl)
    if memory not in POLICIES:
        allowed = ", ".join(map(repr, POLICIES))
        raise ValueError(f"memory is {memory!r}; allowed: {allowed}")
    excluded = _excluded([c.path for c in candidates], head.paths(model), exclude)
    open_to = [c for c in candidates if c.fusable and c.path not in excluded]
    if parse_impl(impl) is not Impl.AUTO:
        _require_impl(impl, open_to)
    choice = _Choice(
        {path: f"excluded by {pattern!r}" for path, pattern in excluded.items()},
        set(excluded),
    )
    for candidate in open_to:
        _look_at(candidate, impl, memory, verify, choice)
    claimed = claimed_children(open_to, choice.plans)
    chosen = [c for c in open_to if c.path not in choice.left and c.path not in claimed]
    for candidate, reason in _incomplete(chosen):
        chosen.remove(candidate)
        choice.leave(candidate, reason)
    if not any(candidate.is_method for candidate in chosen):
        for candidate in [c for c in chosen if c.is_part]:
            chosen.remove(candidate)
            choice.leave(candidate, "no layer of a method around is fused")
    if strict:
        _require_all([c for c in candidates if c.path not in claimed], chosen, choice)
    known = head.leave(model)
    listed = {id(candidate.module) for candidate in candidates}
    for module in model.modules():
        if id(module) not in listed:  # fused, until an adapter was put on it
            restore(module)
    for candidate in candidates:
        if candidate.path in choice.left or candidate.path in claimed or candidate.state is None:
            restore(candidate.module)
        if candidate.path in choice.left:
            candidate.module.__dict__[KEY] = LeftAlone(choice.left[candidate.path])
    tensor = _tensor_of_first_layer(chosen)
    for candidate in chosen:
        _fuse(candidate, _impl_of(candidate, impl, tensor), memory, choice)
    _join_siblings(chosen)
    if any(candidate.is_method for candidate in chosen):
        head.join(model, memory, impl, choice.left, known)
    offload.detach(model)
    if memory == "offload" and chosen:
        offload.attach(model)
    if not chosen:
        warnings.warn(_nothing_fused(candidates, choice), stacklevel=2)
    return model


def unpatch(model: Model) -> Model:
    """Give every module that `patch` changed its own class back.

    Modules, parameters and hooks stay the same objects. Does nothing to a model that is not
    patched.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: `model` is not a module.
    """
    from peftfast.patching import head  # imports transformers

    head.leave(require_module(model))
    for module in list(model.modules()):
        restore(module)
    offload.detach(model)
    return model


def restore(module: nn.Module) -> None:
    """Undo what `patch` did to this one module, if anything."""
    if not isinstance(module.__dict__.get(KEY), State):
        module.__dict__.pop(KEY, None)
        return
    handler = _core_handler(module) or part_of(module) or handler_of(module)
    assert handler is not None
    del module.__dict__[KEY]
    handler.restore(module)


def _core_handler(module: nn.Module) -> PeftPrefix | None:
    from peftfast.patching.peft_prefix import handler_of_core  # imports transformers

    return handler_of_core(module)


def _incomplete(chosen: list[Candidate]) -> list[tuple[Candidate, str]]:
    """What a handler can't fuse without others that were not chosen, with the reason."""
    kinds: dict[int, list[Candidate]] = {}
    for candidate in chosen:
        kinds.setdefault(id(candidate.handler), []).append(candidate)
    found = []
    for alike in kinds.values():
        handler = alike[0].handler
        assert handler is not None
        if reason := handler.whole([candidate.module for candidate in alike]):
            found += [(candidate, reason) for candidate in alike]
    return found


class _Choice:
    """What `patch` has found out about the candidates, by path.

    Attributes:
        left: why modules are left alone.
        meant: those of them that are left on purpose, or can't be fused: strict doesn't count them.
        unchecked: why a chosen one was not compared with its own forward.
        plans: what was found of a chosen part.
    """

    def __init__(self, left: dict[str, str], meant: set[str]) -> None:
        self.left, self.meant = left, meant
        self.unchecked: dict[str, str] = {}
        self.plans: dict[str, Any] = {}

    def leave(self, candidate: Candidate, reason: str, meant: bool = True) -> None:
        self.left[candidate.path] = reason
        if meant:
            self.meant.add(candidate.path)


def _look_at(candidate: Candidate, impl: str, memory: str, verify: bool, choice: _Choice) -> None:
    """Compare a candidate with its own forward, where that is to be done."""
    path, handler, state = candidate.path, candidate.handler, candidate.state
    assert handler is not None
    if memory == "keep" and handler.recomputes:
        choice.leave(candidate, "memory='keep': its own forward keeps what autograd keeps")
    elif state is not None:
        choice.plans[path] = state.plan
    elif verify or handler.found_by_comparing:
        found = handler.compare(candidate.module, impl)
        choice.unchecked[path] = found.unchecked
        if found.difference or found.unserved:
            choice.leave(candidate, found.difference or found.unserved, bool(found.unserved))
        else:
            choice.plans[path] = found.plan


def _tensor_of_first_layer(chosen: list[Candidate]) -> Tensor | None:
    """A tensor on the device, and of the dtype, that the model computes on and in."""
    layers = (candidate.module for candidate in chosen if candidate.is_method)
    parameters = (p for layer in layers for p in layer.parameters())
    return next((p for p in parameters if p.dtype.is_floating_point), None)


def _impl_of(candidate: Candidate, impl: str, tensor: Tensor | None) -> str:
    if not candidate.is_part or tensor is None:
        return impl
    assert isinstance(candidate.handler, Part)
    return candidate.handler.impl(candidate.module, impl, tensor.device, tensor.dtype)


def _fuse(candidate: Candidate, impl: str, memory: str, choice: _Choice) -> None:
    module, handler, state = candidate.module, candidate.handler, candidate.state
    assert handler is not None
    if state is not None:
        state.impl, state.memory = impl, memory
        return
    unchecked = choice.unchecked.get(candidate.path, "verify=False")
    module.__dict__[KEY] = State(impl, unchecked, memory, choice.plans.get(candidate.path))
    handler.rewire(module)
    handler.prepare(module)


def _join_siblings(chosen: list[Candidate]) -> None:
    """Let the fused children of one parent share a record, in which siblings find each other."""
    families: dict[str, list[State]] = {}
    for candidate in chosen:
        handler = candidate.handler
        assert handler is not None
        if candidate.path and handler.has_siblings and candidate.state is not None:
            families.setdefault(candidate.parent, []).append(candidate.state)
    for states in families.values():
        known = {id(state.siblings) for state in states}
        if len(states) > 1 and (len(known) > 1 or states[0].siblings is None):
            shared = Siblings()
            for state in states:
                state.siblings, state.group, state.index = shared, None, 0


def _impl_name(impl: str | Impl) -> str:
    parse_impl(impl)
    return impl.value if isinstance(impl, Impl) else impl


def _require_impl(impl: str, candidates: list[Candidate]) -> None:
    """Raise ImplUnavailable where an implementation asked for by name can't serve these modules."""
    kinds: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        kinds.setdefault(id(candidate.handler), []).append(candidate)
    for alike in kinds.values():
        handler = alike[0].handler
        assert handler is not None
        handler.require(impl, [candidate.module for candidate in alike])


def _excluded(paths: list[str], heads: list[str], exclude: Iterable[str]) -> dict[str, str]:
    """The pattern that excludes each excluded path."""
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise TypeError(
            f"exclude is a {type(exclude).__name__}; an iterable of patterns is needed, such as"
            " ['q_proj']"
        )
    found: dict[str, str] = {}
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude holds a {type(pattern).__name__}; patterns are strings")
        matches = [path for path in (*paths, *heads) if _matches(path, pattern)]
        if not matches:
            raise ValueError(
                f"exclude: {pattern!r} matches none of the {len(paths)} modules; it is"
                " matched against their whole path, as a glob pattern ('*.layers.0.*'), or names"
                " the path's last parts ('mlp.down_proj')"
            )
        found.update(dict.fromkeys(matches, pattern))
    return found


def _matches(path: str, pattern: str) -> bool:
    return path == pattern or path.endswith("." + pattern) or fnmatch.fnmatchcase(path, pattern)


def _require_all(candidates: list[Candidate], chosen: list[Candidate], choice: _Choice) -> None:
    """Raise where something that could be fused will not be, or nothing will."""
    missed = [
        f"{c.path}: {'; '.join(c.obstacles)}"
        for c in candidates
        if c.obstacles and c.path not in choice.meant
    ]
    missed += [
        f"{path}: {reason}" for path, reason in choice.left.items() if path not in choice.meant
    ]
    if missed:
        raise RuntimeError(
            f"strict: {len(missed)} modules that could be fused were not, and the model is as it"
            " was:\n  " + "\n  ".join(missed)
        )
    if not chosen:
        raise RuntimeError("strict: " + _nothing_fused(candidates, choice))


def _nothing_fused(candidates: list[Candidate], choice: _Choice) -> str:
    layers = [candidate for candidate in candidates if not candidate.is_part]
    if not layers:
        return (
            "nothing was fused: the model has no PEFT adapter layer, no 4-bit linear and no trained"
            " bottleneck"
        )
    first = layers[0]
    reasons = choice.left.get(first.path) or "; ".join(first.unsupported + first.obstacles)
    return (
        f"nothing was fused: none of the {len(layers)} layers qualifies; the first,"
        f" {first.path!r}: {reasons} (peftfast.report lists all)"
    )
