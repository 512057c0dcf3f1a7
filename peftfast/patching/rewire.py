"""`patch` and `unpatch`: the class of each recognised instance is swapped, and swapped back."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from peftfast.ops.dispatch import Impl, parse_impl
from peftfast.patching.forwards import rebind
from peftfast.patching.handlers import handler_of
from peftfast.patching.siblings import Siblings
from peftfast.patching.state import KEY, LeftAlone, State
from peftfast.patching.survey import Candidate, require_module, survey

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    *,
    impl: str | Impl = "auto",
    exclude: Iterable[str] = (),
    strict: bool = False,
    verify: bool = True,
) -> Model:
    """Rewire the PEFT layers and the 4-bit linears of `model` onto the fused ops, in place.

    Only instances are changed: of each recognised module the class, to a subclass, and one
    attribute. Parameters, state_dict keys, hooks and everything that PEFT does with its layers stay
    as they were; where a layer's own forward, PEFT's or bitsandbytes', would compute something else
    than the op does, that forward runs. Calling it again takes modules that were added since, and
    applies `impl` and `exclude` to the others.

    Args:
        model: a model with PEFT adapters or 4-bit linears of bitsandbytes, anything that contains
            them, or a part of it.
        impl: "auto", "triton", "native" or "reference", as the ops take it.
        exclude: which modules to leave alone: glob patterns over module paths ("*.layers.0.*"), or
            whole names at a path's end ("q_proj", "mlp.down_proj").
        strict: raise where a module that could be fused is not (modules of a kind that no op
            serves, and excluded ones, don't count), or where there is nothing to fuse.
        verify: compare each module's fused output with its own on small random inputs first, and
            leave a module alone where they differ by more than rounding; the reason is in the
            report.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: `model` is not a module, or `exclude` is not an iterable of strings.
        ValueError: `impl` is unknown, or a pattern of `exclude` matches nothing.
        ImplUnavailable: `impl` was named and can't serve these modules.
        RuntimeError: `strict`, and something that could be fused was not. After any of these the
            model is as it was.
    """
    candidates = survey(require_module(model))
    impl = _impl_name(impl)
    excluded = _excluded(candidates, exclude)
    open_to = [c for c in candidates if c.fusable and c.path not in excluded]
    if parse_impl(impl) is not Impl.AUTO:
        _require_impl(impl, open_to)
    left = {path: f"excluded by {pattern!r}" for path, pattern in excluded.items()}
    unchecked: dict[str, str] = {}
    for candidate in open_to:
        if candidate.state is None and candidate.handler is not None and verify:
            found = candidate.handler.compare(candidate.module, impl)
            unchecked[candidate.path] = found.unchecked
            if found.difference:
                left[candidate.path] = found.difference
    chosen = [candidate for candidate in open_to if candidate.path not in left]
    if strict:
        _require_all(candidates, chosen, left, excluded)
    listed = {id(candidate.module) for candidate in candidates}
    for module in model.modules():
        if id(module) not in listed:  # fused, until an adapter was put on it
            restore(module)
    for candidate in candidates:
        if candidate.path in left or candidate.state is None:
            restore(candidate.module)
        if candidate.path in left:
            candidate.module.__dict__[KEY] = LeftAlone(left[candidate.path])
    for candidate in chosen:
        _fuse(candidate, impl, unchecked.get(candidate.path, "verify=False"))
    _join_siblings(chosen)
    if not chosen:
        warnings.warn(_nothing_fused(candidates, left), stacklevel=2)
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
    for module in list(require_module(model).modules()):
        restore(module)
    return model


def restore(module: nn.Module) -> None:
    """Undo what `patch` did to this one module, if anything."""
    record = module.__dict__.pop(KEY, None)
    if not isinstance(record, State):
        return
    handler = handler_of(module)
    assert handler is not None
    if type(module) is handler.fused:
        module.__class__ = handler.source
    else:
        warnings.warn(
            f"{type(module).__name__} was derived from {handler.fused.__name__} by other code after"
            " patch: the class is left in place, and runs the original's forward from now on",
            stacklevel=3,
        )
    rebind(module, handler.fused.forward, handler.source.forward)


def _fuse(candidate: Candidate, impl: str, unchecked: str) -> None:
    module, handler, state = candidate.module, candidate.handler, candidate.state
    assert handler is not None
    if state is not None:
        state.impl = impl
        return
    module.__dict__[KEY] = State(impl, unchecked)
    module.__class__ = handler.fused
    rebind(module, handler.source.forward, handler.fused.forward)
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


def _excluded(candidates: list[Candidate], exclude: Iterable[str]) -> dict[str, str]:
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
        matches = [c.path for c in candidates if _matches(c.path, pattern)]
        if not matches:
            raise ValueError(
                f"exclude: {pattern!r} matches none of the {len(candidates)} layers; it is"
                " matched against their whole path, as a glob pattern ('*.layers.0.*'), or names"
                " the path's last parts ('mlp.down_proj')"
            )
        found.update(dict.fromkeys(matches, pattern))
    return found


def _matches(path: str, pattern: str) -> bool:
    return path == pattern or path.endswith("." + pattern) or fnmatch.fnmatchcase(path, pattern)


def _require_all(
    candidates: list[Candidate],
    chosen: list[Candidate],
    left: dict[str, str],
    excluded: dict[str, str],
) -> None:
    """Raise where something that could be fused will not be, or nothing will."""
    missed = [
        f"{c.path}: {'; '.join(c.obstacles)}"
        for c in candidates
        if c.obstacles and c.path not in excluded
    ]
    missed += [f"{path}: {reason}" for path, reason in left.items() if path not in excluded]
    if missed:
        raise RuntimeError(
            f"strict: {len(missed)} modules that could be fused were not, and the model is as it"
            " was:\n  " + "\n  ".join(missed)
        )
    if not chosen:
        raise RuntimeError("strict: " + _nothing_fused(candidates, left))


def _nothing_fused(candidates: list[Candidate], left: dict[str, str]) -> str:
    if not candidates:
        return "nothing was fused: the model has no PEFT adapter layer and no 4-bit linear"
    first = candidates[0]
    reasons = left.get(first.path) or "; ".join(first.unsupported + first.obstacles)
    return (
        f"nothing was fused: none of the {len(candidates)} layers qualifies; the first,"
        f" {first.path!r}: {reasons} (peftfast.report lists all)"
    )
