"""Gated MLPs: down(act(gate(x)) * up(x)), with one linear for gate and up in some models.

The children are told apart by their sizes and by comparison: which of two linears is the gate,
which activation it is, and whether a dropout comes before the last linear.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peftfast.ops import gated_activation
from peftfast.ops.activation import KINDS, activation_reasons
from peftfast.patching.activations import is_activation
from peftfast.patching.forwards import bypass_reason
from peftfast.patching.handlers import Comparison
from peftfast.patching.inputs import input_reason
from peftfast.patching.parts import CPU, Part, source_of
from peftfast.patching.probe import compared, gradients_compared, normal_on, shallow
from peftfast.patching.state import state_of

_DROPOUTS = (nn.Dropout, nn.Identity)
_OUTER, _INNER = 6, 10  # features in a probe


class GatedPlan(NamedTuple):
    """Which child is which, by name.

    Attributes:
        gate, up, down: the linears; up is "" where `gate` gives both halves.
        gate_first: whether the first half of such an output is the gate.
        act, act_type, kind: the activation, its class, and what it computes.
        dropout: a dropout before `down`; "" where there is none.
        last: a dropout after it, which is called; "" where there is none.
    """

    gate: str
    up: str
    down: str
    gate_first: bool
    act: str
    act_type: type[nn.Module]
    kind: str
    dropout: str
    last: str


class GatedCall(NamedTuple):
    module: Any
    plan: GatedPlan
    p: float

    def output(self, x: Tensor, impl: str) -> Tensor:
        plan, modules = self.plan, self.module._modules
        if plan.up:
            gate, up = modules[plan.gate](x), modules[plan.up](x)
        else:
            first, second = modules[plan.gate](x).chunk(2, -1)
            gate, up = (first, second) if plan.gate_first else (second, first)
        h = gated_activation(gate, up, plan.kind, dropout_p=self.p, impl=impl)
        y: Tensor = modules[plan.down](h)
        return modules[plan.last](y) if plan.last else y


class GatedMLP(Part):
    """The handler of gated MLPs of one class."""

    op = "gated_activation"

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        return _children(module) is not None

    @staticmethod
    def read(module: Any, x: Tensor) -> GatedCall | str:
        if reason := input_reason(x):
            return reason
        state = state_of(module)
        assert state is not None
        plan: GatedPlan = state.plan
        modules = module._modules
        act = modules[plan.act]
        if type(act) is not plan.act_type:
            return f"its {plan.act} is a {type(act).__name__}"
        if reason := bypass_reason(act):
            return f"its {plan.act} {reason}"
        p = 0.0
        if plan.dropout:
            dropout = modules[plan.dropout]
            if type(dropout) not in _DROPOUTS or getattr(dropout, "inplace", False):
                return f"its {plan.dropout} is a {dropout}"
            if reason := bypass_reason(dropout):
                return f"its {plan.dropout} {reason}"
            p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        first, last = _weight_dtype(modules[plan.gate]), _weight_dtype(modules[plan.down])
        if first is not None and last is not None and first != last:
            return f"its {plan.gate} is {first}, its {plan.down} {last}"
        return GatedCall(module, plan, p)

    def claims(self, plan: GatedPlan) -> tuple[str, ...]:
        return tuple(filter(None, (plan.act, plan.dropout)))

    def find(self, module: Any) -> Comparison:
        found = _children(module)
        assert found is not None
        probe = self._probe(module, found)
        x = normal_on(CPU)(2, 3, found.small(found.outer))
        expected = self.source.forward(probe, x)
        if not isinstance(expected, Tensor):
            return Comparison(unserved=f"it returns a {type(expected).__name__}")
        best: tuple[float, GatedPlan] | None = None
        act_type = source_of(module._modules[found.act])
        for plan in _plans(found, act_type):
            got = _reference(probe, plan, x)
            if compared(expected, got, {x.dtype}, "the module's") != Comparison():
                continue
            apart = (expected - got).abs().max().item()
            if best is None or apart < best[0]:
                best = apart, plan
        if best is None:
            return Comparison(unserved="it computes no gated product that has an op")
        if self._gradients(probe, found, best[1], x) != Comparison():
            return Comparison(unserved="its gradients are not those of a gated product")
        return Comparison(plan=best[1])

    def _gradients(self, probe: Any, found: _Children, plan: GatedPlan, x: Tensor) -> Comparison:
        """How those of the input and of the linears differ from the op's."""
        leaves = [x.requires_grad_()]
        for name in found.linears:
            leaves += [one.requires_grad_() for one in probe._modules[name].parameters()]
        with torch.enable_grad():
            expected, got = self.source.forward(probe, x), _reference(probe, plan, x)
            return gradients_compared(expected, got, leaves, "the module's")

    def _probe(self, module: Any, found: _Children) -> Any:
        """A view of `module` with small linears, and a factor in the place of dropout."""
        normal = normal_on(CPU)
        modules = dict(module._modules)
        for name in found.linears:
            linear = module._modules[name]
            sizes = [found.small(linear.out_features), found.small(linear.in_features)]
            small = nn.utils.skip_init(nn.Linear, sizes[1], sizes[0])
            small.weight = nn.Parameter(normal(*sizes), requires_grad=False)
            small.bias = nn.Parameter(normal(sizes[0]), requires_grad=False)
            modules[name] = small
        act = module._modules[found.act]
        modules[found.act] = shallow(act, source_of(act))
        if found.dropout:
            modules[found.dropout] = _Factor()
        return shallow(module, self.source, _modules=modules)

    def impl_reasons(
        self, module: Any, impl: str, device: torch.device, dtype: torch.dtype
    ) -> list[str]:
        return activation_reasons(impl, device, dtype)


class _Children(NamedTuple):
    linears: tuple[str, ...]
    act: str
    dropout: str
    is_plain: bool  # whether that is a dropout itself, not a tuner layer around one
    inner: int  # features of the product
    outer: int

    def small(self, features: int) -> int:
        """The number of features that stands for `features` in a probe."""
        halves, rest = divmod(features, self.inner)
        return _OUTER if rest or halves > 2 else _INNER * halves


class _Factor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5


def _children(module: nn.Module) -> _Children | None:
    """The children of what may be a gated MLP; None where a module can be none."""
    linears, acts, dropouts = [], [], []
    for name, child in module._modules.items():
        if child is None:
            continue
        if _is_linear(child):
            linears.append(name)
        elif is_activation(child):
            acts.append(name)
        elif _is_dropout(child):
            dropouts.append(name)
        else:
            return None
    if len(linears) not in (2, 3) or len(acts) != 1 or len(dropouts) > 1:
        return None
    sizes: list[Any] = [module._modules[name] for name in linears]
    found = [(one.in_features, one.out_features) for one in sizes]
    halves = 1 if len(linears) == 3 else 2
    for last in found:
        inner, outer = last
        if sorted(found) == sorted([(outer, halves * inner)] * (3 - halves) + [last]):
            dropout = dropouts[0] if dropouts else ""
            is_plain = not isinstance(module._modules.get(dropout), BaseTunerLayer)
            return _Children(tuple(linears), acts[0], dropout, is_plain, inner, outer)
    return None


def _plans(found: _Children, act: type[nn.Module]) -> Iterator[GatedPlan]:
    dropouts = [("", "")]
    if found.dropout:
        dropouts.append(("", found.dropout))
    if found.dropout and found.is_plain:  # else it is to be called
        dropouts.append((found.dropout, ""))
    if len(found.linears) == 3:
        roles = [(gate, up, down, True) for gate, up, down in itertools.permutations(found.linears)]
    else:
        pairs = itertools.permutations(found.linears)
        roles = [(gate, "", down, first) for gate, down in pairs for first in (True, False)]
    for (gate, up, down, first), kind, dropout in itertools.product(roles, KINDS, dropouts):
        yield GatedPlan(gate, up, down, first, found.act, act, kind, *dropout)


def _reference(probe: Any, plan: GatedPlan, x: Tensor) -> Tensor:
    """What a module with that plan gives of x; a tensor of no elements where sizes don't fit."""
    modules = probe._modules
    halves = 1 if plan.up else 2
    if modules[plan.gate].out_features != halves * modules[plan.down].in_features:
        return x[:0]
    if plan.up and modules[plan.up].weight.shape != modules[plan.gate].weight.shape:
        return x[:0]
    if modules[plan.gate].in_features != x.shape[-1]:
        return x[:0]
    if plan.dropout:
        down = modules[plan.down]
        scaled = nn.Sequential(modules[plan.dropout], down)
        modules = {**modules, plan.down: scaled}
    view = shallow(probe, nn.Module, _modules=modules)
    return GatedCall(view, plan, 0.0).output(x, "reference")


def _is_linear(module: Any) -> bool:
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes)


def _is_dropout(module: nn.Module) -> bool:
    """Whether it is one, or a tuner layer around one."""
    plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return source_of(plain) in _DROPOUTS


def _weight_dtype(linear: Any) -> torch.dtype | None:
    """The dtype of a linear's weight; None where it is quantised."""
    while "base_layer" in linear._modules:
        linear = linear._modules["base_layer"]
    weight = linear._parameters.get("weight")
    return None if weight is None or not weight.dtype.is_floating_point else weight.dtype
