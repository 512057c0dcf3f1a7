"""Trained bottlenecks of other code: which are found, what they give, and what is left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ClippedGELUActivation

from peftfast.memory import saved_bytes
from peftfast.nn import BottleneckAdapter
from peftfast.ops.dispatch import ImplUnavailable
from peftfast.patching import patch, report, unpatch
from peftfast.patching.state import state_of
from tests.patching.tiny import FAMILIES, copy_of, inputs_of, step_is_as_good

D, M = 16, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Adapter(nn.Module):
    """The form in which papers' code has it; `sums` and `scale` may be left out."""

    def __init__(
        self, *, scale: Any = None, p: float = 0.0, sums: bool = True, norm: bool = False
    ) -> None:
        super().__init__()
        self.down_proj = nn.Linear(D, M)
        self.non_linear_func = nn.ReLU(inplace=True)
        self.up_proj = nn.Linear(M, D)
        self.norm_before = nn.LayerNorm(D) if norm else None
        self.scale = scale
        self.dropout, self.sums = p, sums

    def forward(self, x: Tensor, add_residual: bool = True) -> Tensor:
        h = x if self.norm_before is None else self.norm_before(x)
        h = self.non_linear_func(self.down_proj(h))
        h = F.dropout(h, p=self.dropout, training=self.training)
        up = self.up_proj(h)
        if self.scale is not None:
            up = up * self.scale
        return x + up if self.sums and add_residual else up


class Houlsby(nn.Module):
    """An activation that is no module."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(D, M), nn.Linear(M, D), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(self.act(self.first(x)))
        return y


class Hidden(Houlsby):
    """A factor that another method reads, and what no method does; a child that may be there."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0
        self.config, self._calls = {"width": D}, 0
        self.add_module("norm", None)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.norm is None else self.norm(x)
        return x + self._up(h)

    def _up(self, x: Tensor) -> Tensor:
        y: Tensor = self.factor * self.second(self.act(self.first(x)))
        return y


class DroppedAfter(Houlsby):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Dropout(1.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.after(self.second(self.act(self.first(x))))
        return y


FORMS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, D)),
    "linear": lambda: nn.Sequential(nn.Linear(D, M, bias=False), nn.Linear(M, D)),
    "to another width": lambda: nn.Sequential(nn.Linear(D, M), nn.SiLU(), nn.Linear(M, D + 4)),
    "layer norm": lambda: nn.Sequential(
        nn.LayerNorm(D), nn.Linear(D, M), nn.GELU(), nn.Linear(M, D)
    ),
    "rms norm": lambda: nn.Sequential(
        nn.RMSNorm(D, eps=1e-5), nn.Linear(D, M), nn.Identity(), nn.GELU("tanh"), nn.Linear(M, D)
    ),
    "dropouts": lambda: nn.Sequential(
        nn.Linear(D, M), nn.Tanh(), nn.Dropout(0.2), nn.Linear(M, D), nn.Dropout(0.3)
    ),
    "sums": Houlsby,
    "hidden": Hidden,
    "sums, tanh": lambda: Houlsby(torch.tanh),
    "sums, dropout": DroppedAfter,
    "norm and sums": lambda: Adapter(norm=True),
    "a factor": lambda: Adapter(scale=0.3, p=0.1),
    "a whole factor": lambda: Adapter(scale=4, sums=False),
    "a learned factor": lambda: Adapter(scale=nn.Parameter(torch.ones(1))),
    "a learned scalar": lambda: Adapter(scale=nn.Parameter(torch.tensor(2.0)), sums=False),
}


def pair(form: str) -> tuple[Any, Any]:
    """A patched bottleneck in evaluation mode, and as it was."""
    torch.manual_seed(0)
    own = FORMS[form]().eval()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_()
    return patch(copy.deepcopy(own)), own


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.float().pow(2).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]


def agree(module: nn.Module, own: nn.Module, x: Tensor) -> None:
    """Errors against float64 are at most twice the module's own, plus one rounding."""
    exact = step(copy.deepcopy(own).double(), x.double())
    for got, theirs, truth in zip(step(module, x), step(own, x), exact, strict=True):
        assert got.dtype == theirs.dtype and got.shape == theirs.shape
        size = float(truth.norm())
        error, allowed = (float((t.double() - truth).norm()) / size for t in (got, theirs))
        roundings = 16 if got.dtype == torch.float64 else 1  # there the module's own is the truth
        assert error <= 2 * allowed + roundings * torch.finfo(got.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_a_bottleneck_runs_as_the_op(form: str, dtype: torch.dtype) -> None:
    module, own = pair(form)
    agree(module.to(dtype), own.to(dtype), torch.randn(3, 7, D, dtype=dtype))
    (entry,) = (one for one in report(module).fused if one.op == "bottleneck")
    assert entry.path == "" and entry.hits == 1 and not entry.delegations


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(form: str, dtype: torch.dtype) -> None:
    module, own = pair(form)
    x = torch.randn(3, 7, D, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = module(x), own(x)
    assert got.dtype == expected.dtype
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * largest)
    left = state_of(module).delegations
    if "learned" in form and (dtype == torch.bfloat16 or "scalar" in form):
        assert left == {"its output is multiplied by a parameter, under autocast": 1}
    else:
        assert not left


def test_dropouts_drop_where_they_did() -> None:
    x = torch.randn(6, D)
    for form in ("dropouts", "sums, dropout", "a factor"):
        module, own = pair(form)
        module.train()
        assert not torch.equal(module(x), own(x)), form
        for name in ("2", "4", "after"):
            if name in own._modules:
                getattr(module, name).p = 1.0
        module.dropout = 1.0
        expected = x if form == "sums, dropout" else torch.zeros_like(x)
        if form == "a factor":
            expected = x + 0.3 * own.up_proj.bias
        torch.testing.assert_close(module(x), expected)
        assert not state_of(module).delegations


def test_a_dropout_before_the_up_projection_keeps_its_bias() -> None:
    module, own = pair("dropouts")
    module.train()
    module[2].p, module[4].p = 1.0, 0.0
    torch.testing.assert_close(module(torch.randn(6, D)), own[3].bias.expand(6, D))


def test_factors_are_read_at_each_call() -> None:
    module, own = pair("a factor")
    module.scale = own.scale = -2.5
    agree(module, own, torch.randn(4, D))
    module.scale = own.scale = torch.tensor(2.0)
    agree(module, own, torch.randn(4, D))
    assert state_of(module).delegations == {"its attribute 'scale' is tensor(2.)": 1}
    module, own = pair("hidden")
    module.factor, own.factor, module._calls = -3, -3, 7
    agree(module, own, torch.randn(4, D))
    assert not state_of(module).delegations


def _hook(module: Any) -> None:
    module.up_proj.register_forward_hook(lambda m, a, y: 2 * y)


def _subclass(module: Any) -> None:
    module.up_proj.__class__ = type("Other", (nn.Linear,), {"forward": lambda s, x: x[..., :1]})


def _widen(module: Any) -> None:
    module.up_proj.double()


def _add(module: Any) -> None:
    module.other = nn.Linear(D, D)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "sums", False), "its attribute 'sums' has changed"),
        (lambda m: setattr(m, "norm_before", None), "its norm_before is a NoneType"),
        (lambda m: setattr(m, "non_linear_func", nn.GELU()), "its non_linear_func is a GELU"),
        (_hook, "its up_proj has hooks"),
        (_subclass, "its up_proj is a Other"),
        (_add, "its children have changed"),
    ],
)
def test_a_change_after_patch_leaves_it_to_its_own_forward(
    change: Callable[[Any], None], reason: str
) -> None:
    module, own = pair("norm and sums")
    change(module)
    change(own)
    x = torch.randn(4, D)
    assert torch.equal(module(x), own(x))
    assert state_of(module).delegations == {reason: 1}


def test_calls_that_the_op_does_not_make() -> None:
    module, own = pair("norm and sums")
    x = torch.randn(4, D)
    assert torch.equal(module(x, add_residual=False), own(x, add_residual=False))
    assert module(x.to_sparse().to_dense()).shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.half()).dtype == own(x.half()).dtype
    assert state_of(module).delegations == {
        "called with arguments besides the input": 1,
        "the input is torch.float16, autocast computes in torch.bfloat16": 1,
    }
    _widen(module)
    with pytest.raises(RuntimeError, match="must have the same dtype|same dtype"):
        module(x)
    assert "its up_proj.weight is torch.float64, the input torch.float32" in (
        state_of(module).delegations
    )


class Twice(Houlsby):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Counting(Houlsby):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


class Fixed(Houlsby):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.dropout(self.act(self.first(x)), 0.5, self.training))


class InTraining(Houlsby):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x


class Wide(Houlsby):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Sums(Adapter):
    def forward(self, x: Tensor, add_residual: bool = True) -> Tensor:
        return super().forward(x) + self.dropout


class Configured(Houlsby):
    def __init__(self) -> None:
        super().__init__()
        self._config = {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self._config["scale"]


class Pair(Houlsby):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def _hooked() -> nn.Module:
    module = Houlsby()
    module.second.register_forward_hook(lambda m, a, y: None)
    return module


def _replaced() -> nn.Module:
    module = Houlsby()
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other maths": (Twice, "no bottleneck that the op does"),
    "another act": (
        lambda: nn.Sequential(nn.Linear(D, M), nn.Softplus(), nn.Linear(M, D)),
        "its 1 computes no activation that has an op",
    ),
    "dropout before": (
        lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(D, M), nn.ReLU(), nn.Linear(M, D)),
        "no bottleneck that the op does",
    ),
    "norm after": (
        lambda: nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, D), nn.LayerNorm(D)),
        "no bottleneck that the op does",
    ),
    "a fixed dropout": (Fixed, "drops elements with a probability that is no attribute"),
    "training differs": (InTraining, "no bottleneck that the op does: it comes upon its input"),
    "another dtype": (Wide, "its forward uses 'float'"),
    "two numbers": (lambda: Sums(scale=2.0, p=0.5), "it comes upon add"),
    "settings elsewhere": (Configured, "its forward reads its attribute '_config', a dict"),
    "a pair": (Pair, "it returns a tuple"),
    "state": (Counting, "its forward sets 'calls'"),
    "no eps": (
        lambda: nn.Sequential(nn.RMSNorm(D), nn.Linear(D, M), nn.ReLU(), nn.Linear(M, D)),
        "norm_eps is NoneType",
    ),
    "a subclass": (
        lambda: nn.Sequential(nn.Linear(D, M), nn.ReLU(), OwnLinear(M, D)),
        "its 2 is a OwnLinear, a subclass of nn.Linear",
    ),
    "a hook": (_hooked, "its second has hooks"),
    "a forward": (_replaced, "its forward was replaced on the instance"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_and_why(name: str) -> None:
    make, reason = LEFT[name]
    torch.manual_seed(0)
    module = nn.ModuleDict({"held": make()})
    kind, state = type(module["held"]), torch.get_rng_state()
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(module)
    assert type(module["held"]) is kind
    assert torch.equal(torch.get_rng_state(), state)
    (entry,) = (one for one in report(module).not_fused if one.path == "held")
    assert reason in "; ".join(entry.reasons)


G = {"factor": 1.0}
SEEN: list[Tensor] = []


class Of(Houlsby):
    """A bottleneck with a relu, whose forward is that function of itself and x."""

    enabled = True

    def __init__(self) -> None:
        super().__init__(F.relu)
        self.config = SimpleNamespace(factor=1.0)
        self.factors, self.seen = [1.0], SEEN

    @property
    def factor(self) -> float:
        return self.config.factor

    def delta(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.relu(self.first(x)))
        return y

    @classmethod
    def named(cls, forward: Callable[..., Any]) -> Callable[[], nn.Module]:
        return type("Of", (cls,), {"forward": forward, "__module__": __name__})


def _no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = self.first(x)
    return x + self.second(F.relu(h))


def _in_place(self: Any, x: Tensor) -> Tensor:
    x += self.second(F.relu(self.first(x.clone())))
    return x


def _added(self: Any, x: Tensor) -> Tensor:
    x += self.second(F.relu(self.first(x)))
    return x


def _straight_through(self: Any, x: Tensor) -> Tensor:
    h = self.first(x)
    return x + self.second(F.relu(h).detach() + h - h.detach())


def _scaled_gradient(self: Any, x: Tensor) -> Tensor:
    h = self.first(x)
    return x + self.second(F.relu(h * 0.1 + (h * 0.9).detach()))


def _by_rank(self: Any, x: Tensor) -> Tensor:
    return x + (self.delta(x) * 2 if x.ndim == 2 else self.delta(x))


def _by_length(self: Any, x: Tensor) -> Tensor:
    return x + (self.delta(x) * 2 if x.shape[1] > 4 else self.delta(x))


def _by_flag(self: Any, x: Tensor) -> Tensor:
    return x + self.delta(x) if x.requires_grad else x


def _by_mode(self: Any, x: Tensor) -> Tensor:
    return x + self.delta(x) if torch.is_grad_enabled() else x


def _by_type(self: Any, x: Tensor) -> Tensor:
    return x + self.delta(x) if isinstance(x, Tensor) else x


def _logged(self: Any, x: Tensor) -> Tensor:
    h = F.relu(self.first(x))
    self.seen.append(h.detach())
    return x + self.second(h)


def _logged_elsewhere(self: Any, x: Tensor) -> Tensor:
    SEEN.append(x)
    return x + self.delta(x)


def _defaulted(self: Any, x: Tensor, factors: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return x + self.delta(x) * factors[0]


def _enclosed(factor: float) -> Callable[..., Tensor]:
    return lambda self, x: x + factor * self.delta(x)


UNCERTAIN: dict[str, tuple[Callable[..., Any], str]] = {
    "x detached": (
        lambda self, x: x + self.second(F.relu(self.first(x.detach()))),
        "uses 'detach'",
    ),
    "residual detached": (lambda self, x: x.detach() + self.delta(x), "uses 'detach'"),
    "hidden detached": (
        lambda self, x: x + self.second(F.relu(self.first(x)).detach()),
        "uses 'detach'",
    ),
    "no grad": (_no_grad, "its forward "),
    "no grad around": (torch.no_grad()(_by_rank), "variables of another function"),
    "straight-through": (_straight_through, "uses 'detach'"),
    "scaled gradient": (_scaled_gradient, "uses 'detach'"),
    "x changed": (_in_place, "its forward "),
    "x added to": (_added, "its forward has "),
    "x changed by a method": (lambda self, x: x.add_(self.delta(x)), "uses 'add_'"),
    "relu6": (lambda self, x: x + self.second(F.relu6(self.first(x))), "uses 'relu6'"),
    "clamped": (lambda self, x: x + self.delta(x).clamp(max=100.0), "uses 'clamp'"),
    "leaky": (
        lambda self, x: x + self.second(F.leaky_relu(self.first(x), 1e-7)),
        "uses 'leaky_relu'",
    ),
    "rank": (_by_rank, "uses 'ndim'"),
    "length": (_by_length, "uses 'shape'"),
    "a flag of x": (_by_flag, "uses 'requires_grad'"),
    "a mode": (_by_mode, "uses 'is_grad_enabled'"),
    "a class of x": (_by_type, "reads the global 'isinstance'"),
    "log": (_logged, "reads its attribute 'seen', a list"),
    "log elsewhere": (_logged_elsewhere, "reads the global 'SEEN'"),
    "settings": (
        lambda self, x: x + self.config.factor * self.delta(x),
        "reads its attribute 'config', a SimpleNamespace",
    ),
    "list": (lambda self, x: x + self.factors[0] * self.delta(x), "'factors', a list"),
    "property": (lambda self, x: x + self.factor * self.delta(x), "reads 'factor' of its class"),
    "class attribute": (
        lambda self, x: x + self.delta(x) if self.enabled else x,
        "reads 'enabled' of its class",
    ),
    "class": (lambda self, x: x + type(self).enabled * self.delta(x), "the global 'type'"),
    "global": (lambda self, x: x + G["factor"] * self.delta(x), "the global 'G'"),
    "default": (_defaulted, "defaults that are not plain"),
    "enclosed": (_enclosed(1.0), "variables of another function"),
    "a constant": (lambda self, x: x + 1.0 * self.delta(x), "comes upon mul"),
    "tied": (
        lambda self, x: x + F.linear(F.relu(self.first(x)), self.first.weight.t()),
        "uses ",
    ),
    "a child twice": (
        lambda self, x: x + self.second(F.relu(self.first(x))) * self.first(x),
        "comes upon ",
    ),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_is_uncertain_is_left_alone_and_not_run(name: str) -> None:
    forward, reason = UNCERTAIN[name]
    module = nn.ModuleDict({"held": Of.named(forward)()})
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(module)
    (entry,) = (one for one in report(module).not_fused if one.path == "held")
    assert reason in "; ".join(entry.reasons)
    assert not SEEN


def test_other_arguments_are_left_to_its_own_forward() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = x + (self.delta(x) if mask is None else self.delta(x) * mask)
        return y

    own = Of.named(forward)()
    module, x = patch(copy.deepcopy(own)), torch.randn(3, D)
    agree(module, own, x)
    assert torch.equal(module(x, mask=torch.zeros(3, 1)), x)
    assert state_of(module).hits == 1


def test_values_far_from_zero() -> None:
    module = nn.Sequential(
        nn.Linear(D, M), ClippedGELUActivation(-1e2, 1e2), nn.Linear(M, D)
    )  # fmt: skip
    with pytest.warns(UserWarning, match="nothing was fused"):
        assert type(patch(module)) is nn.Sequential
    model, own = pair("relu")
    agree(model, own, 1e4 * torch.randn(4, D))


def test_settings_of_the_activation() -> None:
    own = nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Linear(M, D))
    module, x = patch(copy.deepcopy(own)), torch.randn(4, D)
    module[1].approximate = own[1].approximate = "tanh"
    assert torch.equal(module(x), own(x))
    assert state_of(module).delegations == {"the approximate of its 1 has changed": 1}


def test_a_method_replaced_on_the_instance() -> None:
    module, own = pair("hidden")
    module._up = own._up = torch.sin
    x = torch.randn(4, D)
    assert torch.equal(module(x), own(x))
    assert state_of(module).delegations == {"its _up was replaced on the instance": 1}


def test_a_factor_of_another_shape() -> None:
    module, own = pair("a learned factor")
    for m in (module, own):
        m.scale = nn.Parameter(torch.full((1, 1, 1), 2.0))
    x = torch.randn(4, D)
    assert module(x).shape == own(x).shape == (1, 4, D)
    assert state_of(module).delegations == {"its scale is [1, 1, 1]": 1}


class DetachedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()


def test_a_norm_with_other_gradients_is_left_alone() -> None:
    model = patch(nn.Sequential(DetachedNorm(), Houlsby()))
    assert type(model[0]) is DetachedNorm and type(model[1]) is not Houlsby
    (entry,) = report(model).not_fused
    assert "none of the norms" in "; ".join(entry.reasons)


def _frozen() -> nn.Module:
    return Houlsby().requires_grad_(False)


@pytest.mark.parametrize(
    "make",
    [
        _frozen,
        lambda: nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D)),
        lambda: nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, 3)),
        lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)),
        lambda: nn.ModuleList([nn.Linear(D, M), nn.ReLU(), nn.Linear(M, D)]),
        lambda: nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, D), nn.Sigmoid()),
        lambda: nn.Sequential(nn.Linear(D, M), nn.Conv1d(1, 1, 1), nn.Linear(M, D)),
        lambda: nn.Sequential(nn.Linear(D, M), nn.Linear(M, M), nn.Linear(M, D)),
    ],
)
def test_what_is_no_bottleneck_is_not_listed(make: Callable[[], nn.Module]) -> None:
    found = report(nn.ModuleDict({"held": make()}))
    assert not found.fused and not found.not_fused


def test_patch_and_unpatch() -> None:
    module = nn.Sequential(FORMS["layer norm"](), Adapter(norm=True, p=0.1))
    kinds = {path: type(m) for path, m in module.named_modules()}
    attributes = {path: dict(m.__dict__) for path, m in module.named_modules()}
    keys, parameters = list(module.state_dict()), list(module.parameters())
    assert patch(module) is module
    assert isinstance(module[0], nn.Sequential) and isinstance(module[1], Adapter)
    assert [one.path for one in report(module).fused] == ["0", "1"]  # norms and acts with them
    assert list(module.state_dict()) == keys
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    unpatch(module)
    assert {path: type(m) for path, m in module.named_modules()} == kinds
    assert {path: dict(m.__dict__) for path, m in module.named_modules()} == attributes


def test_copies_and_pickles() -> None:
    module, own = pair("a learned factor")
    x = torch.randn(4, D)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        agree(other, own, x)
        assert state_of(other).hits == 1 and not state_of(other).delegations
        unpatch(other)
        assert type(other) is Adapter


def test_exclude_strict_and_impl() -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"a": Houlsby(), "b": FORMS["relu"]()})

    assert [one.path for one in report(patch(make(), exclude=["a"], strict=True)).fused] == ["b"]
    with pytest.raises(RuntimeError, match=r"b: its forward was replaced"):
        model = make()
        model["b"] = _replaced()
        patch(model, strict=True)
    with pytest.raises(ImplUnavailable, match="float64"):
        patch(make().double(), impl="triton")
    kept = patch(make(), impl="reference", memory="keep")
    assert [(one.path, one.op, one.impl) for one in report(kept).fused] == [
        ("a", "bottleneck", "reference"),
        ("b", "bottleneck", "reference"),
    ]


@pytest.mark.parametrize("form", ["norm and sums", "a learned factor"])
def test_triton_kernels(form: str) -> None:
    _, own = pair(form)
    module = patch(copy.deepcopy(own).to(DEVICE), impl="triton")
    agree(module, own.to(DEVICE), torch.randn(3, 7, D, device=DEVICE))
    (entry,) = report(module).fused
    assert entry.impl == "triton" and entry.hits == 1 and not entry.delegations


class Sublayer(nn.Module):
    """A module of a model, and a bottleneck after it."""

    def __init__(self, inner: nn.Module, features: int) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = nn.Sequential(nn.Linear(features, 4), nn.GELU(), nn.Linear(4, features))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + self.adapter(y)


def adapted_by_hand(family: str = "llama") -> Any:
    """A frozen model with trained bottlenecks."""
    torch.manual_seed(0)
    model: Any = FAMILIES[family].make().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp = Sublayer(layer.mlp, 32)
        with torch.no_grad():
            for parameter in layer.mlp.adapter.parameters():
                parameter.normal_(std=0.2)
    return model.eval()


def test_what_surrounds_them_is_rewired_too() -> None:
    plain = adapted_by_hand()
    model = patch(copy_of(plain))
    inputs = inputs_of(columns=12)
    step_is_as_good(model, plain, inputs)
    found = report(model)
    ops = {one.op for one in found.fused if one.hits}
    assert ops >= {"bottleneck", "rms_norm", "gated_activation", "sdpa", "linear_cross_entropy"}
    left = [one for one in found.fused if one.delegations and one.op != "linear_cross_entropy"]
    assert not left, left
    ours, theirs = (
        saved_bytes(lambda m=m: m(**inputs).loss, exclude=m, at_end=True) for m in (model, plain)
    )
    assert ours < theirs


def test_compiled() -> None:
    module, own = pair("norm and sums")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    agree(compiled, own, torch.randn(4, D))
    assert not state_of(module).delegations


def test_the_projects_own_adapter_is_not_taken_for_one() -> None:
    model = patch(nn.Sequential(BottleneckAdapter(D, M)))
    assert isinstance(model[0], BottleneckAdapter)
    assert [one.op for one in report(model).fused] == ["bottleneck"]
