"""The layer that stands in a model where adapters are: a module and what joins its value."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftfast.methods import attention
from peftfast.methods.placement import BlockRef, Placement
from peftfast.methods.registration import PREFIX
from peftfast.nn.bottleneck import BottleneckAdapter

READERS = f"{PREFIX}readers"


class _Waiting(threading.local):
    """What a host of one thread's forward holds for others of it."""

    seen: Tensor | None = None  # its input, for the hosts that read it,
    awaited: int = 0  # of which so many are to come
    gates: list[Tensor | None] = []  # of its prefixes, until attention takes them


class AdapterHost(nn.Module, BaseTunerLayer):
    """A module of the model, `base_layer`, with adapters at its input or its output.

    Each component of a method has a ModuleDict `peftfast_<component>` here, with one
    `nn.BottleneckAdapter` for each adapter that has it. Several components, and then several active
    adapters, act one after another, in the order of their declaration; parallel ones add up. A
    host without components only remembers its input for those that read it (parallel components).

    Prefixes are here too, beside the linear of q, and their attention module asks for them: the
    host is its `attention.Source`. So are prompts, beside the input embeddings; `prompts` puts them
    into what the model embeds.
    """

    def __init__(self, base_layer: nn.Module, block: BlockRef | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.block = block
        self.adapter_layer_names: tuple[str, ...] = (READERS,)
        self.other_param_names: tuple[str, ...] = ()
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        # The adapters that `muted` leaves out.
        self.muted: frozenset[str] = frozenset()
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        # An empty module for each adapter of which a component reads this host's input.
        setattr(self, READERS, nn.ModuleDict())
        self._placed: dict[str, dict[str, Placement]] = {}
        self._taps: dict[str, AdapterHost] = {}
        self._read_by: list[AdapterHost] = []
        self._near: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule
        self._waiting = _Waiting()

    def update_layer(
        self,
        adapter_name: str,
        placement: Placement,
        module: nn.Module,
        near: nn.Module,
    ) -> None:
        """Add one component of an adapter, which is to be on the device of the linear `near`."""
        self._near = (near,)
        name = placement.component.parameter_name
        attribute = f"{PREFIX}{name}"
        if attribute not in self.adapter_layer_names:
            setattr(self, attribute, nn.ModuleDict())
            self.adapter_layer_names = (*self.adapter_layer_names, attribute)
        getattr(self, attribute)[adapter_name] = module.train(self.training)
        self._placed.setdefault(adapter_name, {})[name] = placement

    def read_from(self, adapter_name: str, tap: AdapterHost) -> None:
        """Take the input of another host for those components of an adapter that read it."""
        getattr(tap, READERS)[adapter_name] = nn.Module()
        if not any(one is self for one in tap._read_by):
            tap._read_by.append(self)
        for placement in self._placed[adapter_name].values():
            if placement.tap is not None:
                self._taps[placement.tap] = tap

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module that is wrapped: models read some (a dropout's p)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith(PREFIX):
                raise
            return getattr(self.base_layer, name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As in PEFT, but no value is rounded to the base's dtype on the way."""
        if device is None and self._near:
            device = weight_of(self._near[0]).device
        for _, module in self.components(adapter_name):
            if device is not None and not any(one.is_meta for one in module.parameters()):
                module.to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._placed.pop(adapter_name, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without an input that an interrupted forward left behind: it belongs to no copy."""
        return {**self.__dict__, "_waiting": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_waiting": _Waiting()})

    def state(self) -> dict[str, Any]:
        """Which adapters it has, and which of them are on, to be put back into `__dict__`."""
        placed = {adapter: dict(found) for adapter, found in self._placed.items()}
        names = "adapter_layer_names", "_active_adapter", "_disable_adapters", "_near"
        held = {name: self.__dict__[name] for name in names}
        return {**held, "_placed": placed, "_taps": dict(self._taps), "_read_by": [*self._read_by]}

    def adapters(self) -> set[str]:
        """The adapters that have components here."""
        return set(self._placed)

    def components(self, adapter_name: str) -> Iterator[tuple[Placement, Any]]:
        """The components that an adapter has here, in the order of their declaration."""
        for name, placement in self._placed.get(adapter_name, {}).items():
            yield placement, getattr(self, f"{PREFIX}{name}")[adapter_name]

    def has(self, primitive: str) -> bool:
        """Whether an adapter has a component of a primitive here, acting or not."""
        return any(
            placement.component.primitive == primitive
            for placed in self._placed.values()
            for placement in placed.values()
        )

    @property
    def is_in_self_attention(self) -> bool:
        """Whether a prefix here is in self-attention."""
        return any(
            placement.component.site == "attention_heads" and placement.core is not None
            for placed in self._placed.values()
            for placement in placed.values()
        )

    def acting(self, primitive: str) -> list[tuple[Placement, Any]]:
        """The components of one primitive that act in a forward now."""
        return [one for one in self._acting() if one[0].component.primitive == primitive]

    def _acting(self) -> list[tuple[Placement, Any]]:
        """What acts in a forward now."""
        if self._disable_adapters:
            return []
        return [
            found
            for name in self.active_adapters
            if name not in self.merged_adapters and name not in self.muted
            for found in self.components(name)
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._disable_adapters and self.merged:
            self.unmerge()
        self._remember(args, kwargs)
        acting = self._acting()
        if not acting:
            return self.base_layer(*args, **kwargs)
        taps = {one.tap for one, _ in acting if one.tap is not None}
        read: dict[str | None, Tensor] = {tap: self._taps[tap]._take(self) for tap in taps}
        entering = _entering(args, kwargs, type(self.base_layer).__name__)
        self._make_gates(entering)
        changed = entering
        for placement, module in acting:
            if placement.side == "input":
                changed = self._joined(placement, module, changed, entering, read)
        if changed is not entering:
            args, kwargs = _with_entering(args, kwargs, changed)
        out = self.base_layer(*args, **kwargs)
        leaving = out[0] if isinstance(out, tuple) else out
        for placement, module in acting:
            if placement.side == "output":
                leaving = self._joined(placement, module, leaving, entering, read)
        return (leaving, *out[1:]) if isinstance(out, tuple) else leaving

    # A prefix's source, for the attention module in which it is.

    def length(self) -> int:
        """How many rows of prefixes there are now."""
        return sum(module.num_virtual_tokens for _, module in self.acting("prefix"))

    def shift(self) -> int:
        """At which position the sequence begins after them."""
        return sum(
            module.num_virtual_tokens
            for placement, module in self.acting("prefix")
            if placement.component.shift_positions
        )

    def take(self) -> attention.Prefix | None:
        """The prefixes of this forward, joined."""
        acting = self.acting("prefix")
        if any(module.gate_weight is not None for _, module in acting):
            gates, self._waiting.gates = self._waiting.gates, []
            if len(gates) != len(acting):
                raise RuntimeError(
                    f"a gated prefix's attention ran without the {type(self.base_layer).__name__}"
                    " of its query before it"
                )
        else:
            gates = [module.gate_of(None) for _, module in acting]
        found = []
        for (_, module), gate in zip(acting, gates, strict=True):
            k, v = module.prefixes()
            found.append(attention.Prefix(k, v, gate=gate, form=module.form, impl=module.impl))
        return attention.joined(found)

    def _make_gates(self, entering: Tensor) -> None:
        acting = self.acting("prefix")
        if any(module.gate_weight is not None for _, module in acting):
            self._waiting.gates = [module.gate_of(entering) for _, module in acting]

    @staticmethod
    def _joined(
        placement: Placement,
        module: BottleneckAdapter,
        value: Tensor,
        entering: Tensor,
        read: dict[str | None, Tensor],
    ) -> Tensor:
        if placement.component.insertion == "sequential":
            return module(value)
        given = entering if placement.tap is None else read[placement.tap]
        return module(given, residual=value)

    def _remember(self, args: Any, kwargs: Any) -> None:
        """Keep the input until every host that reads it now has taken it."""
        if not self._read_by:
            return
        self._waiting.awaited = sum(one._reads(self) for one in self._read_by)
        name = type(self.base_layer).__name__
        self._waiting.seen = _entering(args, kwargs, name) if self._waiting.awaited else None

    def _reads(self, tap: AdapterHost) -> bool:
        """Whether this host will take another's input in this forward."""
        names = {placement.tap for placement, _ in self._acting() if placement.tap is not None}
        return any(self._taps[name] is tap for name in names)

    def _take(self, reader: AdapterHost) -> Tensor:
        if self._waiting.seen is None:
            raise RuntimeError(
                f"a parallel adapter on {type(reader.base_layer).__name__} reads the input of a"
                f" {type(self.base_layer).__name__} that has not run before it. Copies of a model"
                " in threads (torch.nn.DataParallel) are not supported: use"
                " DistributedDataParallel"
            )
        seen = self._waiting.seen
        self._waiting.awaited -= 1
        if self._waiting.awaited == 0:
            self._waiting.seen = None
        return seen

    # Merging: what is linear in a linear's own input is a change of its weight.

    def merge_reasons(self, adapter_name: str, merged: Sequence[str]) -> list[str]:
        """Why an adapter's components here can't be merged into the base, together with those of
        the others in `merged`; empty where they can.
        """
        reasons = []
        if adapter_name in self._placed:
            reasons += [
                f"adapter {name!r}, which is active and not merged, changes what goes into"
                " or comes out of the same module"
                for name in self.active_adapters
                if name not in merged and name not in self.merged_adapters
                for placement, _ in self.components(name)
                if not _is_added(placement)
            ]
        for placement, module in self.components(adapter_name):
            component = placement.component
            what = f"component {component.name!r}"
            if not component.is_bottleneck:
                reasons.append(f"{what} is a {component.primitive}: it is no change of a weight")
            elif component.insertion == "sequential":
                reasons.append(f"{what} is sequential: it reads what it changes")
            elif placement.tap is not None or placement.side == "input":
                reasons.append(f"{what} reads another place than the linear that it changes")
            elif component.form != "identity":
                reasons.append(f"{what} is not linear: its form is {component.form!r}")
            elif component.norm is not None or component.gate or component.depth > 1:
                reasons.append(f"{what} is not linear: it has a norm, a gate or several layers")
            elif component.composition != "add":
                reasons.append(f"{what} is composed by {component.composition!r}, not added")
            elif type(self.base_layer) not in (nn.Linear, Conv1D):
                kind = type(self.base_layer).__name__
                reasons.append(f"its base is a {kind}; nn.Linear and Conv1D can take a change")
            elif self.base_layer.bias is None and _shift(module) is not None:
                reasons.append(f"{what} has biases, and the base linear has none")
        return reasons

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters' changes to the base weight.

        Raises:
            ValueError: an adapter is not linear in the linear's own input, or safe_merge finds
                values that are not finite; nothing is changed then.
        """
        names = check_adapters_to_merge(self, adapter_names)
        for name in names:
            if reasons := self.merge_reasons(name, names):
                raise ValueError(f"adapter {name!r} can't be merged: {'; '.join(reasons)}")
        names = [name for name in names if name in self._placed]
        self._add(names, 1.0, safe_merge)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take the merged adapters' changes out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._add(self.merged_adapters, -1.0, False)
        self.merged_adapters.clear()

    @torch.no_grad()
    def _add(self, adapter_names: list[str], sign: float, safe: bool) -> None:
        modules = [module for name in adapter_names for _, module in self.components(name)]
        if not modules:
            return
        base: Any = self.base_layer
        change: Tensor = sum(_linear_delta(module) for module in modules)  # type: ignore[assignment]
        if isinstance(base, Conv1D):
            change = change.T
        weight = base.weight + (sign * change).to(base.weight.dtype)
        bias = base.bias
        for module in modules:
            if (shift := _shift(module)) is not None:
                bias = bias + (sign * shift).to(bias.dtype)
        for value in (weight, bias):
            if safe and value is not None and not torch.isfinite(value).all():
                raise ValueError(
                    f"NaNs detected in the merged weights: an adapter of {adapter_names} seems to"
                    " be broken"
                )
        base.weight.data = weight
        if bias is not None:
            base.bias.data = bias

    def __repr__(self) -> str:
        return "peftfast." + super().__repr__()


def weight_of(linear: nn.Module) -> Tensor:
    """A linear's weight, in whatever form it is held."""
    held: Any = linear
    weight: Tensor | None = getattr(held, "weight", None)
    return held.qweight if weight is None else weight


def _is_added(placement: Placement) -> bool:
    """Whether an adapter only adds to a module's output."""
    component = placement.component
    parallel = component.insertion == "parallel" and component.composition == "add"
    return parallel and placement.side == "output"


def _scale(module: BottleneckAdapter) -> Any:
    return module.scaling if module.scaling_factor is None else module.scaling_factor


def _linear_delta(module: BottleneckAdapter) -> Tensor:
    """s Wu Wd [out, in], in float32 or better."""
    down, _, up, _ = module._weights()
    dtype = torch.promote_types(down.dtype, torch.float32)
    return _scale(module) * (up.to(dtype) @ down.to(dtype))


def _shift(module: BottleneckAdapter) -> Tensor | None:
    """s (Wu bd + bu) [out], or None without biases."""
    _, down_bias, up, up_bias = module._weights()
    if down_bias is None or up_bias is None:
        return None
    dtype = torch.promote_types(up.dtype, torch.float32)
    shift: Tensor = _scale(module) * (up.to(dtype) @ down_bias.to(dtype) + up_bias.to(dtype))
    return shift


def _entering(args: Any, kwargs: Any, name: str) -> Tensor:
    """The value that enters a module: its first argument."""
    value = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(value, Tensor):
        raise TypeError(f"the first argument of {name} is {type(value).__name__}, not a tensor")
    return value


def _with_entering(args: Any, kwargs: Any, value: Tensor) -> tuple[Any, Any]:
    if args:
        return (value, *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: value}
