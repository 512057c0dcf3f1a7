"""What a small module's forward is made of: its code, read, and its operations, run on symbols.

A forward passes only where nothing but its input, its children, its parameters, and plain
attributes of the instance can bear on what it does, and where it changes nothing.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F

from peftfast.patching.probe import shallow

NUMBERS = (int, float)
PLAIN = (bool, str, type(None), *NUMBERS)
# The activations that a forward may call as functions or methods of a tensor.
ACTIVATIONS: Mapping[Any, str] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    torch.tanh: "tanh", "tanh": "tanh",
    torch.sigmoid: "sigmoid", "sigmoid": "sigmoid",
}  # fmt: skip
_FUNCTIONS = (*(f for f in ACTIVATIONS if callable(f)), F.tanh, F.sigmoid)
_GLOBALS = (torch, nn, F, super, *_FUNCTIONS, F.dropout, torch.add, torch.mul)
_NAMES = {
    "nn", "functional", "relu", "gelu", "silu", "tanh", "sigmoid", "dropout", "add", "mul",
}  # fmt: skip
_OPERATIONS = (
    "LOAD_FAST", "LOAD_CONST", "LOAD_SMALL_INT", "STORE_FAST", "COPY", "SWAP", "DUP_TOP", "ROT_",
    "POP_TOP", "POP_JUMP", "JUMP", "RETURN_", "RESUME", "NOP", "NOT_TAKEN", "CACHE",
    "EXTENDED_ARG", "PUSH_NULL", "PRECALL", "KW_NAMES", "CALL_FUNCTION", "CALL_METHOD",
    "COMPARE_OP", "IS_OP", "TO_BOOL", "UNARY_NOT", "UNARY_NEGATIVE", "BINARY_", "BUILD_TUPLE",
)  # fmt: skip
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_BASE = frozenset(name for kind in nn.Module.__mro__ for name in kind.__dict__)
_EVERYWHERE = frozenset(nn.Module().__dict__)
_MACHINERY = ("__getattr__", "__getattribute__", "__call__")


def is_plain(value: Any) -> bool:
    """Whether a value can't change but by being replaced."""
    return type(value) in PLAIN or any(value is function for function in _FUNCTIONS)


class Unclear(Exception):
    """Why it can't be told for certain what a forward does."""


def attributes_read(
    module: nn.Module, source: type[nn.Module]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The instance's attributes that its forward, that of `source`, may read, with their values;
    and the methods that it may call.

    Raises:
        Unclear: where it may read or change anything else, or could do so.
    """
    for name in _MACHINERY:
        if getattr(source, name, None) is not getattr(nn.Module, name, None):
            raise Unclear(f"its class defines {name}")
    found: dict[str, Any] = {}
    methods: list[str] = []
    waiting, seen = ["forward"], {"training"}
    while waiting:
        for name in _names(source, waiting.pop()):
            if name in seen:
                continue
            seen.add(name)
            own = [kind for kind in source.__mro__ if name in kind.__dict__]
            if name == "forward":
                continue
            if name in _BASE or name in _EVERYWHERE:
                raise Unclear(f"its forward uses {name!r}")
            if own:
                if any(type(kind.__dict__[name]) is not types.FunctionType for kind in own):
                    raise Unclear(f"its forward reads {name!r} of its class")
                waiting.append(name)
                methods.append(name)
            if name in module.__dict__:
                found[name] = module.__dict__[name]
                if not is_plain(found[name]):
                    kind = type(found[name]).__name__
                    raise Unclear(f"its forward reads its attribute {name!r}, a {kind}")
            elif not own and name not in {*module._modules, *module._parameters, *_NAMES}:
                raise Unclear(f"its forward uses {name!r}")
    return found, tuple(methods)


def _names(source: type[nn.Module], name: str) -> Iterator[str]:
    """The names of attributes in the code of all methods of that name."""
    for kind in source.__mro__:
        function = kind.__dict__.get(name)
        if function is None or kind in nn.Module.__mro__:
            continue
        if kind is nn.Sequential and name == "forward":
            if source.__iter__ is not kind.__iter__:  # type: ignore[attr-defined]
                raise Unclear("its class defines __iter__")
            continue
        if type(function) is not types.FunctionType:
            raise Unclear(f"its {name} is a {type(function).__name__}")
        given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if any(type(value) not in PLAIN for value in given):
            raise Unclear(f"its {name} has defaults that are not plain")
        yield from _attributes(function)


def _attributes(function: types.FunctionType) -> Iterator[str]:
    code = function.__code__
    if set(code.co_freevars) - {"__class__"} or code.co_cellvars:
        raise Unclear("its forward reads variables of another function")
    if code.co_flags & _SUSPENDED:
        raise Unclear("its forward is a generator or a coroutine")
    for one in dis.get_instructions(code):
        operation, name = one.opname, one.argval
        if operation in ("LOAD_ATTR", "LOAD_METHOD") or operation.startswith("LOAD_SUPER_"):
            yield name
        elif operation == "LOAD_GLOBAL":
            value = function.__globals__.get(name, super if name == "super" else None)
            if not any(value is known for known in _GLOBALS):
                raise Unclear(f"its forward reads the global {name!r}")
        elif operation in ("LOAD_DEREF", "COPY_FREE_VARS", "CALL", "CALL_KW"):
            pass  # the class, for super; a call of what was checked where it was loaded
        elif operation in ("STORE_ATTR", "DELETE_ATTR"):
            raise Unclear(f"its forward sets {name!r}")
        elif operation.startswith("BINARY_OP") and one.argrepr.endswith("="):
            raise Unclear(f"its forward has {one.argrepr}")
        elif not operation.startswith(_OPERATIONS):
            raise Unclear(f"its forward has {operation}")


def graph_of(
    module: nn.Module, source: type[nn.Module], read: Mapping[str, Any], training: bool
) -> fx.Graph:
    """The operations of the forward of `source`, as `attributes_read` let it pass.

    Its input is a symbol, and so are parameters and the numbers among the attributes `read`: they
    are nodes `get_attr`.

    Raises:
        Unclear: where it needs a symbol's value, or can't be run so.
    """
    tracer = GraphAppendingTracer(fx.Graph())
    x = tracer.create_proxy("placeholder", "x", (), {})

    def symbol(name: str) -> fx.Proxy:
        return tracer.create_proxy("get_attr", name, (), {})

    def call(name: str) -> Any:
        return lambda *args, **kwargs: tracer.create_proxy("call_module", name, args, kwargs)

    parameters = module._parameters.items()
    numbers = {name: symbol(name) for name, value in read.items() if type(value) in NUMBERS}
    view = shallow(
        module,
        source,
        **numbers,
        training=training,
        _parameters={n: None if p is None else symbol(n) for n, p in parameters},
        _modules={n: None if c is None else call(n) for n, c in module._modules.items()},
    )
    try:
        y: Any = source.forward(view, x)
    except Exception as error:  # a condition on a value, most often
        raise Unclear(f"its forward can't be run on symbols: {error}".splitlines()[0]) from error
    if not isinstance(y, fx.Proxy):
        raise Unclear(f"it returns a {type(y).__name__}")
    tracer.graph.output(y.node)
    return tracer.graph
