"""Bottlenecks of other code: up(act(down(norm(x)))), trained, with or without x added.

A module is recognised by its children: two linears, first the one to few features, and at most an
activation, a norm and dropouts. What it makes of them is found by comparison: the activation,
whether x is added, a factor, and where dropouts are.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import types
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftfast.ops import bottleneck
from peftfast.ops.bottleneck import ACTIVATIONS
from peftfast.ops.operands import autocast_dtype
from peftfast.patching.activations import is_activation, kind_of
from peftfast.patching.forwards import bypass_reason
from peftfast.patching.handlers import Comparison
from peftfast.patching.inputs import PLAIN_TENSORS, input_reason
from peftfast.patching.parts import CPU, Part, source_of
from peftfast.patching.probe import compared, normal_on, shallow
from peftfast.patching.state import state_of

_NORMS = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}
_IN, _INNER, _OUT = 12, 5, 14  # features in a probe
_OTHER = 0.7317  # what a probe puts in the place of a number on the module
_PLAIN = (bool, int, float, str, type(None))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_READ = "_peftfast_read"
_EVERYWHERE = {"__dict__", "__class__", *nn.Module().__dict__}


class BottleneckPlan(NamedTuple):
    """What a bottleneck computes.

    Attributes:
        types: of every child, by name.
        settings: every other attribute that its forward reads, as it was.
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
            if type(p) not in (int, float):
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
        act = module._modules.get(found.act)
        kind = None if act is None else kind_of(shallow(act, source_of(act)))
        if act is not None and kind is None:
            return Comparison(unserved=f"its {found.act} computes no activation that has an op")
        probe = _Probe(module, self.source, found)
        probe.own(training=False)
        expected, dropped = probe.own()
        settings = probe.settings()
        for name, value in settings.items():
            if not isinstance(value, (*_PLAIN, *_FUNCTIONS)):
                kind = type(value).__name__
                return Comparison(unserved=f"its forward reads its attribute {name!r}, a {kind}")
        factors, probabilities = probe.attributes_read(settings)
        scalings = [*module._parameters, *factors]
        if len(scalings) > 1:
            names = " and ".join(map(repr, scalings))
            return Comparison(unserved=f"its output depends on {names}")
        if len(dropped) != len(probabilities):
            return Comparison(unserved="it drops elements with a probability that is no attribute")
        best: tuple[float, BottleneckPlan] | None = None
        for name in (*scalings, *probabilities):
            settings.pop(name, None)
        for plan in _plans(module, found, settings, kind, "".join(scalings), probabilities):
            got = probe.ours(plan)
            if compared(expected, got, {got.dtype}, "the module's") != Comparison():
                continue
            apart = (expected - got).abs().max().item()
            if best is None or apart < best[0]:
                best = apart, plan
        if best is None:
            return Comparison(unserved="it computes no bottleneck that the op does")
        return self._also_elsewhere(module, found, best[1])

    def _also_elsewhere(self, module: Any, found: _Children, plan: BottleneckPlan) -> Comparison:
        """The plan, if it holds in training, in 16 bits and under autocast too."""
        wide = _Probe(module, self.source, found)
        short = _Probe(module, self.source, found, torch.bfloat16)
        attribute = plan.scaling if plan.scaling not in module._parameters else ""
        other = {attribute: _OTHER} if attribute else {}
        trials: list[tuple[str, _Probe, bool, dict[str, Any]]] = [
            ("in evaluation", wide, False, {"training": False, **other}),
            ("in bfloat16", short, False, {}),
        ]
        if not _autocast_reason(wide.call(plan), wide.x, torch.bfloat16):
            trials.append(("under autocast", wide, True, {}))
        for when, probe, casts, changed in trials:
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                (expected, _), got = probe.own(**changed), probe.ours(plan, **changed)
            dtypes = {torch.bfloat16 if casts else got.dtype}
            found_out = compared(expected, got, dtypes, "the module's")
            if found_out != Comparison():
                what = found_out.difference or found_out.unchecked
                return Comparison(unserved=f"{when} it computes another thing: {what}")
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


def _plans(
    module: Any,
    found: _Children,
    settings: dict[str, Any],
    kind: str | None,
    scaling: str,
    probabilities: list[str],
) -> Iterator[BottleneckPlan]:
    every = {name: _type_of(child) for name, child in module._modules.items()}
    linears = module._modules[found.down], module._modules[found.up]
    residuals = (False, True) if linears[0].in_features == linears[1].out_features else (False,)
    kinds = ACTIVATIONS if kind is None else (kind,)
    drops = {*found.dropouts, *probabilities}
    pairs = itertools.product(("", *drops), ("", *found.dropouts))
    placed = [pair for pair in pairs if sorted(filter(None, pair)) == sorted(drops)]
    children = found.down, found.up, found.act, found.norm
    for each, adds_input, (dropout, last) in itertools.product(kinds, residuals, placed):
        yield BottleneckPlan(every, settings, *children, scaling, each, adds_input, dropout, last)


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
            return nn.Parameter(normal(*sizes).to(dtype), requires_grad=False)

        self.x = normal(2, 3, _IN).to(dtype)
        self._module, self._source, self._found = module, source, found
        self._read: set[str] = set()
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
        self._parameters = {
            name: nn.Parameter(parameter(1).view(p.shape), requires_grad=False)
            for name, p in module._parameters.items()
        }

    def own(self, **changed: Any) -> tuple[Tensor, list[float]]:
        """What the module's own forward gives of x in training, with some attributes changed; and
        the probabilities with which it drops by itself.
        """
        source: Any = self._source
        view = self._view(_reading(source), self._modules, **changed, **{_READ: self._read})
        before = dict(view.__dict__)
        with torch.random.fork_rng(devices=[]), _Dropping() as dropping:
            torch.default_generator.manual_seed(0)
            y = self._source.forward(view, self.x.clone())
        if not isinstance(y, Tensor):
            raise TypeError(f"it returns a {type(y).__name__}")
        for name, value in view.__dict__.items():
            if name not in before or before[name] is not value:
                raise TypeError(f"it sets its attribute {name!r}")
        return y, dropping.probabilities

    def ours(self, plan: BottleneckPlan, **changed: Any) -> Tensor:
        """What the op gives of x by a plan."""
        return self.call(plan, **changed).output(self.x, "reference")

    def call(self, plan: BottleneckPlan, **changed: Any) -> BottleneckCall:
        modules = self._modules
        view = self._view(self._source, modules, **changed)
        is_child = plan.dropout in modules
        if is_child or (plan.dropout and view.training):  # a factor of up's columns
            up = modules[plan.up]
            factors = _factors(up.weight, plan.dropout if is_child else "")
            scaled = {**up._parameters, "weight": up.weight * factors}
            view._modules = {**modules, plan.up: shallow(up, nn.Linear, _parameters=scaled)}
        return BottleneckCall(view, plan, _factor(view, plan.scaling), 0.0)

    def settings(self) -> dict[str, Any]:
        """The attributes that its forward has read here, but for children, parameters, methods and
        what every module has.
        """
        module = self._module
        found = {}
        for name in sorted(self._read - _EVERYWHERE - {*module._modules, *module._parameters}):
            if name in module.__dict__:
                found[name] = module.__dict__[name]
            elif type(value := inspect.getattr_static(self._source, name, _PLAIN)) in _PLAIN:
                found[name] = value
        return found

    def attributes_read(self, settings: dict[str, Any]) -> tuple[list[str], list[str]]:
        """The numbers among these that its output depends on, and those with which it drops."""
        own, dropped = self.own()
        factors, probabilities = [], []
        for name, value in settings.items():
            if type(value) not in (int, float):
                continue
            try:
                y, now_dropped = self.own(**{name: _OTHER})
            except Exception:  # it is read then, and not as a factor is: no plan will do
                factors.append(name)
                continue
            if y.shape != own.shape or not torch.equal(y, own):
                factors.append(name)
            elif now_dropped != dropped:
                probabilities.append(name)
        return factors, probabilities

    def _view(self, kind: type[nn.Module], modules: dict[str, Any], **changed: Any) -> Any:
        own = {"_modules": modules, "_parameters": self._parameters, "training": True}
        return shallow(self._module, kind, **{**own, **changed})


class _Dropping(TorchFunctionMode):
    """Puts a known factor in the place of `F.dropout`, and keeps the probabilities asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: list[float] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.dropout:
            return self._dropped(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _dropped(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training:
            return input
        self.probabilities.append(p)
        return input * _factors(input, "")


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


@functools.cache
def _reading(source: Any) -> Any:
    """A class like `source` that notes the names of the attributes that are read."""

    def read(self: Any, name: str) -> Any:
        object.__getattribute__(self, "__dict__").get(_READ, set()).add(name)
        return source.__getattribute__(self, name)

    return type(source.__name__, (source,), {"__getattribute__": read})


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
    for name, was in plan.settings.items():
        now = getattr(module, name, None)
        if now is not was and not (type(now) is type(was) in _PLAIN and now == was):
            return f"its attribute {name!r} has changed"
    return ""


def _operand_reason(call: BottleneckCall, x: Tensor) -> str:
    """Why the op would not compute what the module does of x; "" where it would."""
    module, plan = call.module, call.plan
    if plan.scaling in module._parameters or not plan.scaling:
        named = [(plan.scaling, module._parameters.get(plan.scaling))]
    elif type(call.scaling) in (int, float) and math.isfinite(call.scaling):
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
