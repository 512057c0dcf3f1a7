"""Bottlenecks of other code: up(act(down(norm(x)))), trained, with or without x added.

A module is recognised by its children: two linears, first the one to few features, and at most an
activation, a norm and dropouts. What it makes of them is read off its forward, run on symbols: a
forward that has any other operation is left alone. A comparison on random inputs, with all
gradients, confirms it.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftfast.ops import bottleneck
from peftfast.ops.operands import autocast_dtype
from peftfast.patching.activations import is_activation, kind_of
from peftfast.patching.forwards import bypass_reason
from peftfast.patching.handlers import Comparison
from peftfast.patching.inputs import PLAIN_TENSORS, input_reason
from peftfast.patching.parts import CPU, Part, source_of
from peftfast.patching.probe import compared, gradients_compared, normal_on, shallow
from peftfast.patching.state import state_of
from peftfast.patching.symbolic import (
    ACTIVATIONS,
    NUMBERS,
    PLAIN,
    Unclear,
    attributes_read,
    graph_of,
    is_plain,
)

_NORMS = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}
_IN, _INNER, _OUT = 12, 5, 14  # features in a probe
_OTHER = 0.7317  # what a probe puts in the place of a number on the module
_LARGE = 1e3
_ADDITIONS = (operator.add, torch.add, "add")
_PRODUCTS = (operator.mul, torch.mul, "mul")
_EVERYWHERE = frozenset(nn.Module().__dict__)


class BottleneckPlan(NamedTuple):
    """What a bottleneck computes.

    Attributes:
        types: of every child, by name.
        settings: every other attribute that its forward reads, as it was.
        act_settings: those of `act`.
        methods: of its class, which its forward calls.
        down, up, act, norm: the children, by name; "" where there is none.
        scaling: the name of a factor, a parameter or an attribute; "" where there is none.
        kind: what lies between the linears, of the op's `ACTIVATIONS`.
        adds_input: whether x is added in the end.
        dropout: the one before `up`, a child, or an attribute that holds the probability; "" where
            there is none.
        last: the one after `up`, a child, which is called; "" where there is none.
    """

    types: Mapping[str, type[Any]]
    settings: Mapping[str, Any]
    act_settings: Mapping[str, Any]
    methods: tuple[str, ...]
    down: str
    up: str
    act: str
    norm: str
    scaling: str
    kind: str
    adds_input: bool
    dropout: str
    last: str


class BottleneckCall(NamedTuple):
    module: Any
    plan: BottleneckPlan
    scaling: float | Tensor
    p: float

    def output(self, x: Tensor, impl: str) -> Tensor:
        plan, modules = self.plan, self.module._modules
        down, up = modules[plan.down], modules[plan.up]
        normed: dict[str, Any] = {}
        if plan.norm:
            norm = modules[plan.norm]
            normed = {
                "norm": _NORMS[plan.types[plan.norm]],
                "norm_weight": norm._parameters["weight"],
                "norm_bias": norm._parameters.get("bias"),
                "norm_eps": norm.eps,
            }
        y = bottleneck(
            x,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            activation=plan.kind,
            scaling=self.scaling,
            residual=plan.adds_input and not plan.last,
            dropout_p=self.p,
            impl=impl,
            **normed,
        )
        if plan.last:
            y = modules[plan.last](y)
            y = x + y if plan.adds_input else y
        return y


class Bottleneck(Part):
    """The handler of bottlenecks of one class."""

    op = "bottleneck"
    is_method = True
    recomputes = False

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return _children(module) is not None

    @staticmethod
    def read(module: Any, x: Tensor) -> BottleneckCall | str:
        if reason := input_reason(x):
            return reason
        state = state_of(module)
        assert state is not None
        plan: BottleneckPlan = state.plan
        if reason := _change(module, plan):
            return reason
        p = 0.0
        if plan.dropout:
            dropout = module._modules.get(plan.dropout)
            p = getattr(module, plan.dropout) if dropout is None else dropout.p
            if type(p) not in NUMBERS:
                return f"its {plan.dropout} is a {type(p).__name__}"
            p = p if (module if dropout is None else dropout).training else 0.0
        call = BottleneckCall(module, plan, _factor(module, plan.scaling), p)
        return _operand_reason(call, x) or call

    def claims(self, plan: BottleneckPlan) -> tuple[str, ...]:
        return tuple(name for name in (plan.act, plan.norm, plan.dropout) if name in plan.types)

    def unsupported(self, module: Any) -> list[str]:
        found = _children(module)
        assert found is not None
        reasons = [
            f"its {name} is a {type(module._modules[name]).__qualname__}, a subclass of nn.Linear"
            for name in (found.down, found.up)
            if type(module._modules[name]) is not nn.Linear
        ]
        norm = module._modules.get(found.norm)
        if norm is not None and len(norm.normalized_shape) > 1:
            reasons.append(f"its {found.norm} normalises over several dimensions")
        return reasons

    def obstacles(self, module: Any) -> list[str]:
        found = _children(module)
        assert found is not None
        reasons = super().obstacles(module)
        for name in filter(None, (found.down, found.up, found.act, found.norm)):
            if reason := bypass_reason(module._modules[name]):
                reasons.append(f"its {name} {reason}")
        return reasons

    def find(self, module: Any) -> Comparison:
        found = _children(module)
        assert found is not None
        try:
            plan = _plan(module, self.source, found)
        except Unclear as error:
            return Comparison(unserved=str(error))
        return self._confirmed(module, found, plan)

    def _confirmed(self, module: Any, found: _Children, plan: BottleneckPlan) -> Comparison:
        """The plan, if the op gives what the module does by it, and all gradients."""
        wide = _Probe(module, self.source, found)
        short = _Probe(module, self.source, found, torch.bfloat16)
        attribute = plan.scaling if plan.scaling not in module._parameters else ""
        other = {attribute: _OTHER} if attribute else {}
        trials: list[tuple[str, _Probe, Tensor, bool, dict[str, Any]]] = [
            ("", wide, wide.x, False, {}),
            (" of rows", wide, wide.x[0].contiguous(), False, other),
            (" of large values", wide, wide.x * _LARGE, False, {}),
            (" in evaluation", wide, wide.x, False, {"training": False, **other}),
            (" in bfloat16", short, short.x, False, {}),
        ]
        if not _autocast_reason(wide.call(plan), wide.x, torch.bfloat16):
            trials.append((" under autocast", wide, wide.x, True, {}))
        for when, probe, x, casts, changed in trials:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=casts):
                x = x.clone().requires_grad_()
                expected, got = probe.own(x, **changed), probe.ours(plan, x, **changed)
            dtypes = {torch.bfloat16 if casts else got.dtype}
            result = compared(expected.detach(), got.detach(), dtypes, "the module's")
            if result == Comparison() and probe is wide and not casts:
                result = gradients_compared(expected, got, [x, *wide.leaves], "the module's")
            if result != Comparison():
                what = result.difference or result.unchecked
                return Comparison(unserved=f"{f'on an input{when}, ' * bool(when)}{what}")
        return Comparison(plan=plan)

    def require(self, impl: str, modules: Iterable[Any]) -> None:
        """Raise ImplUnavailable where `impl`, asked for by name, can't serve these modules."""
        require_op(impl, modules)


def require_op(impl: str, modules: Iterable[nn.Module]) -> None:
    """Raise ImplUnavailable where the op has no `impl` for the parameters of these modules."""
    kinds = {(p.device, p.dtype) for module in modules for p in module.parameters()}
    for device, dtype in kinds:
        if device.type != "meta":
            one = torch.ones(1, 1, device=device, dtype=dtype)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                bottleneck(one, one, None, one, None, impl=impl)


class _Children(NamedTuple):
    """The children of what may be a bottleneck, by name; "" where there is none."""

    down: str
    up: str
    act: str
    norm: str
    dropouts: tuple[str, ...]


def _children(module: nn.Module) -> _Children | None:
    """The children of what may be a trained bottleneck; None where a module can be none."""
    if type(module).forward is nn.Module.forward or module._buffers:
        return None
    if len(module._parameters) > 1 or any(
        p is None or p.numel() != 1 for p in module._parameters.values()
    ):
        return None
    linears: list[tuple[str, nn.Linear]] = []
    others: dict[str, list[str]] = {"act": [], "norm": [], "dropout": []}
    for name, child in module._modules.items():
        if isinstance(child, nn.Linear):
            linears.append((name, child))
        elif child is not None and source_of(child) is nn.Dropout:
            others["dropout"].append(name)
        elif child is not None and source_of(child) in _NORMS:
            others["norm"].append(name)
        elif child is not None and is_activation(child):
            others["act"].append(name)
        elif child is not None and source_of(child) is not nn.Identity:
            return None
    if len(linears) != 2 or len(others["act"]) > 1 or len(others["norm"]) > 1:
        return None
    (first, down), (second, up) = linears
    inner = down.out_features
    if up.in_features != inner or inner >= min(down.in_features, up.out_features):
        return None
    if not any(p.requires_grad for one in (down, up) for p in one.parameters()):
        return None
    act, norm = ("".join(others[kind]) for kind in ("act", "norm"))
    return _Children(first, second, act, norm, tuple(others["dropout"]))


def _plan(module: Any, source: type[nn.Module], found: _Children) -> BottleneckPlan:
    """What the forward of a module is made of.

    Raises:
        Unclear: where that is not certain, or no bottleneck.
    """
    act = module._modules.get(found.act)
    act_settings = {} if act is None else {n: vars(act)[n] for n in vars(act).keys() - _EVERYWHERE}
    if not all(is_plain(value) for value in act_settings.values()):
        raise Unclear(f"its {found.act} computes no activation that has an op")
    read, methods = attributes_read(module, source)
    forms = [
        _Reading(graph_of(module, source, read, training), module, found, training).form()
        for training in (True, False)
    ]
    if forms[0] != forms[1]:
        raise Unclear("in evaluation it computes another thing")
    kind, scaling, adds_input, norm, dropout, last = forms[0]
    if not kind:
        known = kind_of(shallow(act, source_of(act)))
        if known is None:
            raise Unclear(f"its {found.act} computes no activation that has an op")
        kind = known
    types = {name: _type_of(child) for name, child in module._modules.items()}
    settings = {name: value for name, value in read.items() if name not in (scaling, dropout)}
    return BottleneckPlan(
        types=types,
        settings=settings,
        act_settings=act_settings,
        methods=methods,
        down=found.down,
        up=found.up,
        act="" if forms[0].kind else found.act,
        norm=norm,
        scaling=scaling,
        kind=kind,
        adds_input=adds_input,
        dropout=dropout,
        last=last,
    )


class _Form(NamedTuple):
    """The rest of a `BottleneckPlan`; its `kind` is "" where the child `act` tells it."""

    kind: str
    scaling: str
    adds_input: bool
    norm: str
    dropout: str
    last: str


class _Reading:
    """The operations of a forward, read from the last one back to the input."""

    def __init__(self, graph: fx.Graph, module: Any, found: _Children, training: bool) -> None:
        self._module, self._found, self._training = module, found, training
        nodes = list(graph.nodes)
        self._x = next(node for node in nodes if node.op == "placeholder")
        self._at: Any = nodes[-1].args[0]
        self._left = [node for node in nodes if node.op.startswith("call_")]

    def form(self) -> _Form:
        """What they are together.

        Raises:
            Unclear: where there is any that is no part of a bottleneck.
        """
        found = self._found
        adds_input, scaling, last = self._addition(), "", ""
        while True:
            if not last and (last := self._child(found.dropouts)):
                continue
            if not scaling and (scaling := self._factor()):
                continue
            break
        self._needed(found.up)
        dropout = self._child(found.dropouts) or self._dropout()
        kind = "" if self._child([found.act]) else self._activation()
        self._needed(found.down)
        norm = self._child([found.norm])
        if self._at is not self._x or self._left:
            raise self._unclear(self._left[-1] if self._at is self._x else self._at)
        if last == dropout != "":
            raise Unclear(f"it calls its {last} twice")
        return _Form(kind, scaling, adds_input, norm, dropout, last)

    def _take(self, to: Any) -> None:
        """Goes on from the node here to `to`, the one that it reads."""
        self._left.remove(self._at)
        self._at = to
        while (name := self._called()) and source_of(self._module._modules[name]) is nn.Identity:
            self._left.remove(self._at)
            self._at = self._at.args[0]

    def _called(self) -> str:
        """The child that the node here calls with one value alone; "" where it is no such call."""
        node = self._at
        is_call = isinstance(node, fx.Node) and node.op == "call_module" and node in self._left
        return str(node.target) if is_call and len(node.args) == 1 and not node.kwargs else ""

    def _child(self, names: Iterable[str]) -> str:
        name = self._called()
        if not name or name not in names:
            return ""
        self._take(self._at.args[0])
        return name

    def _needed(self, name: str) -> None:
        if not self._child([name]):
            raise self._unclear(self._at)

    def _operands(self, targets: Iterable[Any]) -> tuple[Any, ...]:
        """The two values that an operation reads, where the node here is one of these."""
        node = self._at
        is_one = isinstance(node, fx.Node) and node in self._left and node.target in targets
        return node.args if is_one and len(node.args) == 2 and not node.kwargs else ()

    def _addition(self) -> bool:
        while (name := self._called()) and source_of(self._module._modules[name]) is nn.Identity:
            self._take(self._at.args[0])
        operands = self._operands(_ADDITIONS)
        if self._x not in operands:
            return False
        self._take(operands[operands[0] is self._x])
        return True

    def _factor(self) -> str:
        operands = self._operands(_PRODUCTS)
        for one, other in (operands, operands[::-1]) if operands else ():
            if isinstance(one, fx.Node) and one.op == "get_attr":
                self._take(other)
                return str(one.target)
        return ""

    def _dropout(self) -> str:
        """The attribute that holds the probability, where the node here is `F.dropout`."""
        node = self._at
        if not isinstance(node, fx.Node) or node.target is not F.dropout or node not in self._left:
            return ""
        p: Any = node.kwargs.get("p")
        training = node.kwargs.get("training")
        is_attribute = isinstance(p, fx.Node) and p.op == "get_attr" and len(node.args) == 1
        if not is_attribute or p.target in self._module._parameters:
            raise Unclear("it drops elements with a probability that is no attribute")
        if training is not self._training or node.kwargs.get("inplace"):
            raise Unclear("it drops elements in another way than in training alone")
        self._take(node.args[0])
        return str(p.target)

    def _activation(self) -> str:
        node = self._at
        if not isinstance(node, fx.Node) or node not in self._left:
            return "identity"
        kind = ACTIVATIONS.get(node.target) if node.op != "call_module" else None
        given = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        if kind is None or len(node.args) != 1:
            return "identity"
        if given == {"approximate": "tanh"}:
            kind = "gelu_tanh"
        elif given not in ({}, {"approximate": "none"}):
            return "identity"
        self._take(node.args[0])
        return kind

    def _unclear(self, node: Any) -> Unclear:
        if not isinstance(node, fx.Node):
            return Unclear(f"it computes with {node!r}, which is no bottleneck that the op does")
        name = getattr(node.target, "__name__", node.target)
        what = (
            "its input" if node is self._x else f"its {name}" * (node.op == "call_module") or name
        )
        return Unclear(f"it computes no bottleneck that the op does: it comes upon {what}")


class _Probe:
    """A view of a module with small children, and known factors in the place of dropouts."""

    def __init__(
        self,
        module: Any,
        source: type[nn.Module],
        found: _Children,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        normal = normal_on(CPU)

        def parameter(*sizes: int) -> nn.Parameter:
            leaf = nn.Parameter(normal(math.prod(sizes)).view(sizes).to(dtype))
            self.leaves.append(leaf)
            return leaf

        self.leaves: list[Tensor] = []
        self.x = normal(2, 3, _IN).to(dtype)
        self._module, self._source, self._found = module, source, found
        self._modules: dict[str, Any] = dict(module._modules)
        outer = _IN if _keeps_width(module, found) else _OUT
        for name, sizes in ((found.down, (_INNER, _IN)), (found.up, (outer, _INNER))):
            linear = module._modules[name]
            bias = None if linear.bias is None else parameter(sizes[0])
            own = {"weight": parameter(*sizes), "bias": bias}
            self._modules[name] = shallow(linear, nn.Linear, _parameters=own)
        if found.act:
            act = module._modules[found.act]
            self._modules[found.act] = shallow(act, source_of(act))
        if found.norm:
            norm = module._modules[found.norm]
            own = {n: None if p is None else parameter(_IN) for n, p in norm._parameters.items()}
            self._modules[found.norm] = shallow(
                norm, source_of(norm), _parameters=own, normalized_shape=(_IN,)
            )
        for name in found.dropouts:
            self._modules[name] = _Factor(name)
        self._parameters = {name: parameter(*p.shape) for name, p in module._parameters.items()}

    def own(self, x: Tensor, **changed: Any) -> Tensor:
        """What the module's own forward gives of x in training, with some attributes changed."""
        source: Any = self._source
        with _Dropping():
            y = source.forward(self._view(self._modules, **changed), x)
        if not isinstance(y, Tensor):
            raise TypeError(f"it returns a {type(y).__name__}")
        return y

    def ours(self, plan: BottleneckPlan, x: Tensor, **changed: Any) -> Tensor:
        """What the op gives of x by a plan."""
        return self.call(plan, **changed).output(x, "reference")

    def call(self, plan: BottleneckPlan, **changed: Any) -> BottleneckCall:
        modules = self._modules
        view = self._view(modules, **changed)
        is_child = plan.dropout in modules
        if is_child or (plan.dropout and view.training):  # a factor of up's columns
            up = modules[plan.up]
            factors = _factors(up.weight, plan.dropout if is_child else "")
            scaled = {**up._parameters, "weight": up.weight * factors}
            view._modules = {**modules, plan.up: shallow(up, nn.Linear, _parameters=scaled)}
        return BottleneckCall(view, plan, _factor(view, plan.scaling), 0.0)

    def _view(self, modules: dict[str, Any], **changed: Any) -> Any:
        own = {"_modules": modules, "_parameters": self._parameters, "training": True}
        return shallow(self._module, self._source, **{**own, **changed})


class _Dropping(TorchFunctionMode):
    """Puts a known factor in the place of `F.dropout`."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.dropout:
            return self._dropped(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _dropped(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return input * _factors(input, "") if training else input


class _Factor(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return x * _factors(x, self.name)


def _factors(x: Tensor, name: str) -> Tensor:
    """A factor for each feature in the place of the dropout of that name ("" for `F.dropout`),
    which commutes with nothing around.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(x.shape[-1], generator=generator).to(x.dtype)


def _keeps_width(module: Any, found: _Children) -> bool:
    down, up = module._modules[found.down], module._modules[found.up]
    return bool(down.in_features == up.out_features)


def _type_of(child: nn.Module | None) -> type[Any]:
    return type(None) if child is None else source_of(child)


def _factor(module: Any, name: str) -> Any:
    """The factor that a plan names: a number or a tensor."""
    return getattr(module, name) if name else 1.0


def _change(module: Any, plan: BottleneckPlan) -> str:
    """What is no longer as it was when the plan was found; "" where nothing is."""
    modules = module._modules
    if len(modules) != len(plan.types):
        return "its children have changed"
    called = plan.last
    for name, kind in plan.types.items():
        child = modules.get(name)
        if _type_of(child) is not kind:
            return f"its {name} is a {type(child).__name__}"
        if child is not None and name != called and (reason := bypass_reason(child)):
            return f"its {name} {reason}"
    for name in plan.methods:
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
    if name := _changed(module, plan.settings):
        return f"its attribute {name!r} has changed"
    if plan.act and (name := _changed(modules[plan.act], plan.act_settings)):
        return f"the {name} of its {plan.act} has changed"
    return ""


def _changed(module: Any, settings: Mapping[str, Any]) -> str:
    """The first attribute that has not its value in `settings`; "" where all have."""
    for name, was in settings.items():
        now = getattr(module, name, None)
        if now is not was and not (type(now) is type(was) in PLAIN and now == was):
            return name
    return ""


def _operand_reason(call: BottleneckCall, x: Tensor) -> str:
    """Why the op would not compute what the module does of x; "" where it would."""
    module, plan = call.module, call.plan
    if plan.scaling in module._parameters or not plan.scaling:
        factor = module._parameters.get(plan.scaling)
        if factor is not None and (factor.ndim > 1 or factor.numel() != 1):
            return f"its {plan.scaling} is {list(factor.shape)}"
        named = [(plan.scaling, factor)]
    elif type(call.scaling) in NUMBERS and math.isfinite(call.scaling):
        named = []
    else:
        return f"its attribute {plan.scaling!r} is {call.scaling!r}"
    for name in (plan.down, plan.up, plan.norm):
        held = module._modules[name]._parameters.items() if name else ()
        named += [(f"{name}.{own}", value) for own, value in held]
    autocast = autocast_dtype(x)
    for name, value in named:
        if value is None:
            continue
        if type(value) not in PLAIN_TENSORS:
            return f"its {name} is a {type(value).__name__}"
        if value.device != x.device:
            return f"its {name} is on {value.device}, the input on {x.device}"
        if value.dtype != x.dtype and autocast is None:
            return f"its {name} is {value.dtype}, the input {x.dtype}"
    if plan.norm and not isinstance(module._modules[plan.norm].eps, float):
        return f"the eps of its {plan.norm} is {module._modules[plan.norm].eps!r}"
    return "" if autocast is None else _autocast_reason(call, x, autocast)


def _autocast_reason(call: BottleneckCall, x: Tensor, autocast: torch.dtype) -> str:
    """Why the op's output under autocast would have another dtype than the module's."""
    if x.dtype not in (torch.float32, autocast):
        return f"the input is {x.dtype}, autocast computes in {autocast}"
    into_input = call.plan.adds_input and not call.plan.last and x.dtype == torch.float32
    if isinstance(call.scaling, Tensor) and not into_input:
        return "its output is multiplied by a parameter, under autocast"
    return ""
