"""The tuner registered with PEFT that realises any declared method on a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from peftfast.methods.config import MethodConfig
from peftfast.methods.connections import connect, disconnect, unchanged_on_failure
from peftfast.methods.initial import saved_prefixes, start_from
from peftfast.methods.layer import AdapterHost, weight_of
from peftfast.methods.placement import Placement, fingerprint, place
from peftfast.methods.registration import PREFIX
from peftfast.methods.sites import base_of, find_norms


class AdapterModel(BaseTuner):
    """A model with the adapters of declared methods: what `peft.get_peft_model` makes of a
    `MethodConfig`. Of `peft.tuners.tuners_utils.BaseTuner`, with places found by structure instead
    of by names.
    """

    prefix = PREFIX
    tuner_layer_cls = AdapterHost
    target_module_mapping: dict[str, list[str]] = {}

    # Placements of the adapter that is being injected, by host.
    _plan: dict[str, list[Placement]]
    # The modules of which others use a part, by what that is for.
    _shared: dict[Any, nn.Module]

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As in PEFT; then attention modules, positions and embeddings learn of what is new."""
        config = self.peft_config[adapter_name]
        path: str | None = getattr(config, "initial_prefix", None)
        with unchanged_on_failure(self.model):
            if path is None or getattr(config, "is_saved", False):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                connect(self.model)
                return
            values = saved_prefixes(path)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            connect(self.model)
            start_from(self.model, adapter_name, values, path)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT."""
        super().delete_adapter(adapter_name)
        connect(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        disconnect(self.model)
        unloaded: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        return unloaded

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to several adapters in one batch."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names is given; a batch has one set of active adapters of declared methods"
            )
        yield

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Any) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Find every place, and refuse what doesn't fit, before anything is changed."""
        if not isinstance(peft_config, MethodConfig):
            raise TypeError(
                f"the configuration is a {type(peft_config).__name__}; a MethodConfig is needed"
            )
        placements = place(model, peft_config)
        found = fingerprint(placements)
        if peft_config.is_saved and peft_config.placed not in (None, found):
            raise ValueError(
                f"the configuration was made for another model: its components had"
                f" {_described(peft_config.placed)}; this model has {_described(found)}."
                " Each is [name, places, width in, width out]; set placed=None to use the"
                " configuration on another model"
            )
        for placement in placements:
            for name in (placement.host, placement.tap):
                module = None if name is None else model.get_submodule(name)
                if isinstance(module, BaseTunerLayer) and not isinstance(module, AdapterHost):
                    raise ValueError(
                        f"{name} is already adapted by another method"
                        f" ({type(module).__name__}); one place can have one kind of tuner"
                    )
        peft_config.placed = found
        if peft_config.train_norms:
            peft_config.save_norms(find_norms(model))
        self._plan = {}
        for placement in placements:
            self._plan.setdefault(placement.host, []).append(placement)
        self._shared = {}

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._plan

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        host = self._host(current_key, self._plan[current_key][0])
        for placement in self._plan[current_key]:
            near = base_of(self.model.get_submodule(placement.near))
            module = self._make(placement, near)
            module.requires_grad_(adapter_name in self.active_adapters)
            host.update_layer(adapter_name, placement, module, near)
        for placement in self._plan[current_key]:
            if placement.tap is not None:
                host.read_from(adapter_name, self._host(placement.tap, placement))

    def _host(self, name: str, placement: Placement) -> AdapterHost:
        """The host at a module, put there where there is none."""
        module = self.model.get_submodule(name)
        if isinstance(module, AdapterHost):
            return module
        host = AdapterHost(module, placement.block)
        host.train(module.training)
        host._active_adapter = list(self.active_adapters)
        parent, _, child = name.rpartition(".")
        self._replace_module(self.model.get_submodule(parent), child, host, module)
        return host

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)

    def _make(self, placement: Placement, near: nn.Module) -> nn.Module:
        """A component's module, beside the linear that it stands near."""
        weight = weight_of(near)
        dtype: Any = weight.dtype
        if not dtype.is_floating_point:  # quantised
            dtype = getattr(near, "compute_dtype", None) or getattr(self.model, "dtype", None)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            dtype = torch.float32
        component = placement.component
        device = weight.device
        if device.type == "meta":  # offloaded by accelerate, which says where it computes
            device = getattr(getattr(near, "_hf_hook", None), "execution_device", None) or device
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        key: Any = None
        if component.primitive == "kronecker":
            key = component.divisions
        elif component.primitive == "prefix" and component.encoder_hidden is not None:
            assert placement.block is not None
            key = component.parameter_name, placement.block.stack
        if key is not None:
            options["shared"] = self._shared.get(key)
        module = component.make(
            placement.in_features, placement.out_features, placement.heads, **options
        )
        if key is not None:
            self._shared.setdefault(key, module)
        return module

    # Merging

    def _refuse_merge(self, adapter_names: Sequence[str] | None) -> None:
        names = list(adapter_names) if adapter_names is not None else self.active_adapters
        for key, module in self.model.named_modules():
            if not isinstance(module, AdapterHost):
                continue
            for name in names:
                if reasons := module.merge_reasons(name, names):
                    raise ValueError(
                        f"adapter {name!r} can't be merged into the base weights at {key}:"
                        f" {'; '.join(reasons)}. unload() gives the base model without it"
                    )

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """As in PEFT; raises ValueError, before anything is changed, where a component is not
        linear in the input of the linear that it changes.
        """
        self._refuse_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As in PEFT; raises as `merge_adapter` does."""
        self._refuse_merge(adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)


def _described(placed: Any) -> str:
    return ", ".join(f"{name} {places}" for name, places in placed.items()) or "none"


def finalize(model: nn.Module, adapter: str | None = None) -> None:
    """Drop what only training needs, the networks that make prefixes and prompts, keeping what
    they make now; outputs stay the same, and checkpoints become as small as they can be. Where
    there is no such network nothing happens.

    Args:
        model: one with adapters of declared methods.
        adapter: only this one's; None: every adapter's.

    Raises:
        ValueError: there is no such adapter.
    """
    modules = [
        (placement, module)
        for host in hosts(model)
        for name in host.adapters()
        if adapter in (None, name)
        for placement, module in host.components(name)
    ]
    if not modules:
        what = "adapter of a declared method" if adapter is None else f"adapter {adapter!r}"
        raise ValueError(f"the model has no {what}")
    made = [one for placement, one in modules if not placement.component.is_bottleneck]
    with torch.no_grad():
        # Those whose encoder others share come last.
        for module in sorted(made, key=lambda one: one.owns_encoder):
            module.finalize()
    for one in model.modules():
        for name, config in getattr(one, "peft_config", {}).items():
            if isinstance(config, MethodConfig) and adapter in (None, name):
                config.finished = True


def hosts(model: nn.Module) -> list[AdapterHost]:
    """The places of a model that have adapters of declared methods, in the model's order."""
    return [
        module
        for module in model.modules()
        if isinstance(module, AdapterHost) and len(module.adapter_layer_names) > 1
    ]


@contextmanager
def muted(model: nn.Module, layers: Iterable[int], adapter: str | None = None) -> Iterator[None]:
    """Skip the adapters of some layers within the context.

    Args:
        model: one with adapters of declared methods.
        layers: positions of layers, counted over the stacks in their order, from 0.
        adapter: only this one's; None: every adapter's.

    Raises:
        ValueError: the model has no such adapters, or none in such a layer.
    """
    places = hosts(model)
    if not places:
        raise ValueError("the model has no adapters of a declared method")
    known = {host.block.position for host in places if host.block is not None}
    wanted = set(layers)
    if beyond := sorted(wanted - known):
        raise ValueError(f"layers has {beyond}; adapters are in layers {sorted(known)}")
    chosen = [one for one in places if one.block is not None and one.block.position in wanted]
    before = [one.muted for one in chosen]
    try:
        for host in chosen:
            names = host.adapters() if adapter is None else {adapter}
            host.muted = host.muted | names
        yield
    finally:
        for host, value in zip(chosen, before, strict=True):
            host.muted = value
