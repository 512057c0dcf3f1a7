"""Which values go where in a module: its forward, run on symbols.

Nothing is computed. Views run, second objects over the modules' attributes; the modules
themselves, their hooks, and whatever replaced their forwards stay out of it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = ("forward", "_old_forward", "_hf_hook")
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_SCALINGS = (operator.mul, operator.imul, operator.truediv, torch.mul, "mul", "mul_", "div")
_PASSING = (
    F.dropout, torch.clone, torch.reshape, torch.transpose, torch.permute,
    "clone", "contiguous", "to", "type_as", "view", "reshape", "transpose", "permute",
    "flatten", "unflatten",
)  # fmt: skip


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> fx.Graph | None:
    """The graph of a module's forward in evaluation; leaves are called by their paths in it.

    Arguments without a default are symbols, and those with the default None too where the forward
    takes that; a condition on a symbol is false. Returns None where the forward can't be run so.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in named if p.default is p.empty]
    optional = [p.name for p in named if p.default is None]
    return _run(module, is_leaf, needed + optional) or _run(module, is_leaf, needed)


def _run(
    module: nn.Module, is_leaf: Callable[[nn.Module], bool], names: list[str]
) -> fx.Graph | None:
    tracer = _Tracer(fx.Graph())
    given = {name: tracer.create_proxy("placeholder", name, (), {}) for name in names}
    try:
        type(module).forward(_view(module, "", is_leaf, tracer), **given)
    except Exception:  # any code may be behind a forward; who asks must do without
        return None
    return tracer.graph


def calls(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The calls of every leaf, by its path."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), []).append(node)
    return found


def passed_until_added(node: fx.Node) -> list[str] | None:
    """The leaves that a value goes through, one after the other, before it is added to another.

    Returns None where it branches, meets another value in any other way, or is never added.
    """
    found = []
    while True:
        users = [user for user in node.users if not _is_aside(user)]
        if len(users) != 1:
            return None
        node = users[0]
        if node.op == "call_module" and len(node.all_input_nodes) == 1:
            found.append(str(node.target))
        elif node.target in _ADDITIONS and len(_values(node)) == 2:
            return found
        elif not _passes(node):
            return None


def reaches(node: fx.Node, leaf: str, ends: Container[str]) -> bool:
    """Whether a leaf gets a value, or what was made of it by others than the leaves `ends`."""
    seen = {node}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op == "call_module" and user.target == leaf:
                return True
            if user not in seen and user.target not in ends:
                seen.add(user)
                waiting.append(user)
    return False


def multiplies(node: fx.Node) -> bool:
    """Whether a node is the product of two values."""
    return node.target in _SCALINGS and len(_values(node)) == 2


def _values(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _passes(node: fx.Node) -> bool:
    """Whether an operation gives its one input as it is, scaled, or in another shape."""
    if node.target in _PASSING or node.target in _SCALINGS:
        return len(node.all_input_nodes) == 1
    return node.target is operator.getitem


def _is_aside(node: fx.Node) -> bool:
    """Whether a node takes an attribute of a value, or of several in a tuple not the first."""
    if node.target is not operator.getitem:
        return node.target is getattr
    index = node.args[1]
    return index != 0 if isinstance(index, int) else isinstance(index, slice) and bool(index.start)


class _Tracer(GraphAppendingTracer):
    def create_arg(self, a: Any) -> Any:
        try:
            return super().create_arg(a)
        except NotImplementedError:  # a tensor, or an object of any class: no symbol is in it
            return None

    def to_bool(self, obj: Any) -> bool:
        return False

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter((obj,))


def _view(
    module: nn.Module, path: str, is_leaf: Callable[[nn.Module], bool], tracer: _Tracer
) -> nn.Module:
    kind = type(module)
    attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
    if path and is_leaf(module):
        kind = _recording(kind)  # type: ignore[arg-type]
        attributes["_record"] = functools.partial(tracer.create_proxy, "call_module", path)
    else:
        attributes |= {name: {} for name in _HOOKS} | {"training": False}
        attributes |= {name: dict(attributes[name]) for name in ("_parameters", "_buffers")}
        attributes["_modules"] = {
            name: child and _view(child, f"{path}.{name}" if path else name, is_leaf, tracer)
            for name, child in module._modules.items()
        }
    view = kind.__new__(kind)
    view.__dict__ = attributes
    return view


@functools.cache
def _recording(kind: Any) -> Any:
    """A subclass whose calls are recorded instead."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._record(args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})
