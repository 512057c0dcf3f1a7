"""Who really runs when a module is called: hooks, and forwards replaced on the instance.

accelerate's `add_hook_to_module` puts a wrapper into the instance as `forward` and keeps the
forward it found as `_old_forward`, a bound method of the class as it was then. A class swapped
afterwards would never be asked; `rebind` points such bound methods at the new class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


def bypass_reason(child: nn.Module) -> str | None:
    """Why `child` may not be read past (its parameters used without calling it); None where it may.

    A hook of accelerate's that only places inputs on a device adds nothing where they are there
    already.
    """
    if (
        child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
    ):
        return "has hooks"
    if "forward" in child.__dict__ and not _only_places(child):
        return "has a forward of its own on the instance (offloading, for example)"
    return None


def replaced_forwards(module: nn.Module, source: type[nn.Module], name: str) -> list[str]:
    """Why `source`'s own forward is not what runs when `module`, one of its kind, is called.

    `name` is what `source` is called in the reasons.
    """
    reasons = []
    if source.forward.__module__ != source.__module__:
        reasons.append(f"{name}.forward was replaced, by {source.forward.__module__}")
    if reason := replaced_forward(module, type(module).forward):
        reasons.append(reason)
    return reasons


def defining_class(source: type[nn.Module]) -> Any:
    """The class of `source`'s ancestry whose forward it runs."""
    return next(kind for kind in source.__mro__ if "forward" in kind.__dict__)


def inherited_forward(source: type[nn.Module], name: str) -> list[str]:
    """Why the forward that `source` has, its own or an inherited one, is not as it was written."""
    owner = defining_class(source)
    written = owner.forward.__module__
    return [] if written == owner.__module__ else [f"{name}.forward was replaced, by {written}"]


def replaced_forward(module: nn.Module, own: Callable[..., Any]) -> str | None:
    """Why a class swap would not reach `module`'s calls; None where it does.

    `own` is the class's forward, which the instance's may be a known wrapper of.
    """
    forward = module.__dict__.get("forward")
    if forward is None or _is_bound(forward, module, own):
        return None
    if _by_accelerate(forward) and _is_bound(module.__dict__.get("_old_forward"), module, own):
        return None
    return f"its forward was replaced on the instance, by {_origin(forward)}"


def rebind(module: nn.Module, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Point the instance's bound methods of `old` (see above) at `new`."""
    for name in ("forward", "_old_forward"):
        if _is_bound(module.__dict__.get(name), module, old):
            module.__dict__[name] = MethodType(new, module)


def _only_places(child: nn.Module) -> bool:
    forward, own = child.__dict__["forward"], type(child).forward
    if _is_bound(forward, child, own):
        return True
    if not _by_accelerate(forward):
        return False
    hook: Any = child.__dict__.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and not hook.io_same_device
        and _is_bound(child.__dict__.get("_old_forward"), child, own)
    )


def _by_accelerate(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks"


def _is_bound(method: Any, module: nn.Module, function: Callable[..., Any]) -> bool:
    return (
        isinstance(method, MethodType) and method.__self__ is module and method.__func__ is function
    )


def _origin(forward: Any) -> str:
    while isinstance(forward, functools.partial):
        forward = forward.func
    module = getattr(forward, "__module__", None) or type(forward).__module__
    name = getattr(forward, "__qualname__", None) or type(forward).__qualname__
    return f"{module}.{name}"
