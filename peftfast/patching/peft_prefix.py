"""PEFT's Prefix-Tuning and CARTRIDGE, whose keys and values attention reads where they are.

PEFT copies its prefix for every row of a batch into a cache, before which each layer's keys and
values are concatenated. In a fused forward there is no such cache, PEFT takes its prefix for one of
no rows, and each attention module has a `Source` that hands it its layer's part of what PEFT's
encoder gives, made once a forward. Which part that is, PEFT's own `get_prompt` tells: it is asked
with numbers in place of values.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from peftfast.methods import attention, positions
from peftfast.methods.sites import find_blocks
from peftfast.ops import prefix_attention
from peftfast.patching.forwards import rebind, replaced_forward
from peftfast.patching.handlers import ClassSwap, Comparison
from peftfast.patching.probe import elsewhere, shallow
from peftfast.patching.state import state_of
from peftfast.patching.surroundings import in_backward, saving_is_hooked, transform_reason

_RECORD = "_peftfast_prefixes"
_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
_DIGITS, _BASE = 3, 16  # of a number written into a head, exact in any dtype
_TOKENS = 7  # of a row on which models are compared
_PREPARE = "prepare_inputs_for_generation"  # which PEFT replaces on instances


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which of an encoder's 2 L parts are a layer's keys and values, and how much of them."""

    key: int
    value: int
    heads: int
    size: int


class _Run(threading.local):
    """What a thread's forward has of the prefix."""

    adapter: str | None = None  # whose it is; None: no fused forward is running
    made: tuple[Tensor, ...] | None = None
    config: Any = None  # what PEFT sees


class Prefixes:
    """The prefix of a fused PeftModel, during its forwards and their backwards.

    Copies and pickles belong to the copy of the model, and carry no values.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model: Any = model
        self.offset = positions.Offset()
        self._start()

    def _start(self) -> None:
        self._run = _Run()
        # Whether forwards with gradients had the prefix, those since the last backward.
        self._trained: set[bool] = set()
        self._went_back = False
        self._redone: tuple[int, Any] = (-1, None)
        self._layouts: dict[str, tuple[Any, dict[int, Rows]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "offset": self.offset}

    def __setstate__(self, held: dict[str, Any]) -> None:
        self.__dict__.update(held)
        self._start()

    @property
    def config(self) -> Any:
        return self.model.peft_config[self.model.active_adapter]

    @contextmanager
    def run(self) -> Iterator[None]:
        """Have attention see the prefix, and PEFT none."""
        now, made = self._run, self._encoded()
        before = now.adapter, now.made, now.config
        shadow = copy.copy(self.config)
        shadow.num_virtual_tokens = 0
        if torch.is_grad_enabled():
            self._trains(True)
        now.adapter, now.made, now.config = self.model.active_adapter, made, shadow
        try:
            yield
        finally:
            now.adapter, now.made, now.config = before

    @property
    def running(self) -> bool:
        """Whether a fused forward of this thread is running."""
        return self._run.adapter is not None

    def runs_another(self) -> bool:
        """Whether it is of another adapter than the active one."""
        return self._run.adapter not in (None, self.model.active_adapter)

    def seen_by_peft(self, config: Any) -> Any:
        return self._run.config if self.running else config

    def _trains(self, has_prefix: bool) -> None:
        if torch.compiler.is_compiling():
            return
        if self._went_back:
            self._trained, self._went_back = set(), False
        self._trained.add(has_prefix)

    def length(self) -> int:
        """How many rows attention sees now.

        In a backward, where a checkpoint computes a forward again: as many as that forward saw.

        Raises:
            RuntimeError: forwards with the prefix and without it went before that backward.
        """
        on = self.running and not self.model._adapters_disabled
        if not on and not torch.compiler.is_compiling():
            if in_backward():
                self._went_back = True
                if len(self._trained) > 1:
                    raise RuntimeError(
                        "under gradient checkpointing, forwards with PEFT's prefix and without it"
                        " went before one backward, which can't tell them apart: call backward"
                        " after each, make those without gradients under torch.no_grad(), or"
                        " load the adapter by peftfast.methods.load_from_peft"
                    )
                on = True in self._trained
            elif torch.is_grad_enabled():
                self._trains(False)
        return self.config.num_virtual_tokens if on else 0

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [H, P, D]."""
        made = self._run.made
        if made is None:
            made = self._recomputed()
        rows = self.layout()[layer]
        k, v = made[rows.key], made[rows.value]
        if k.shape[0] != rows.heads or k.shape[2] != rows.size:
            k, v = (t[: rows.heads, :, : rows.size] for t in (k, v))
        return k, v

    def _recomputed(self) -> tuple[Tensor, ...]:
        """What a checkpoint's recomputation needs.

        Where what it saves is taken by hooks, only values count. Else it is a graph of its own, of
        which each layer's backward goes to the parameters by itself.
        """
        if not saving_is_hooked():
            return self._encoded()
        task = torch._C._current_graph_task_id()
        if self._redone[0] != task:
            with torch.no_grad():
                made = self._encoded()
            learned = any(p.requires_grad for p in self._encoder().parameters())
            self._redone = task, tuple(t.requires_grad_(learned) for t in made)
        return self._redone[1]

    def _encoder(self) -> Any:
        return self.model.prompt_encoder[self.model.active_adapter]

    def _encoded(self) -> tuple[Tensor, ...]:
        """The 2 L parts [H, P, D] of the encoder's output, in the dtype that PEFT gives them."""
        config, encoder = self.config, self._encoder()
        self._redone = -1, None
        if config.inference_mode:
            flat = encoder.embedding.weight
        else:
            tokens = self.model.prompt_tokens[self.model.active_adapter]
            tokens = tokens[: config.num_virtual_tokens].to(encoder.embedding.weight.device)
            flat = encoder(tokens[None])[0]
        if self.model.base_model_torch_dtype is not None:
            flat = flat.to(self.model.base_model_torch_dtype)
        heads = config.num_attention_heads
        shape = (config.num_virtual_tokens, 2 * config.num_layers, heads, -1)
        return flat.view(shape).permute(1, 2, 0, 3).unbind()

    def layout(self) -> dict[int, Rows]:
        """Of each layer of the model that PEFT gives a prefix, by layer_idx."""
        name, config = self.model.active_adapter, self.config
        held = self._layouts.get(name)
        if held is None or held[0] is not config:
            held = self._layouts[name] = config, layout_of(self.model)
        return held[1]


@dataclasses.dataclass(eq=False)
class PeftSource:
    """The `attention.Source` of one attention module."""

    prefixes: Prefixes
    core: Any
    layer: int

    def length(self) -> int:
        return self.prefixes.length()

    def shift(self) -> int:
        return self.prefixes.length()

    def take(self) -> attention.Prefix:
        k, v = self.prefixes.of(self.layer)
        device = next((p.device for p in self.core.parameters()), k.device)
        if device != k.device and device.type != "meta":  # a model on several devices
            k, v = k.to(device), v.to(device)
        state = state_of(self.core)
        if state is None:
            return attention.Prefix(k, v)
        if not torch.compiler.is_compiling():
            state.hits += 1
        return attention.Prefix(k, v, impl=state.impl)


class FusedPrefixModel(nn.Module):
    """A mixin of the classes that `patch` gives to PeftModels with a prefix."""

    _peftfast_source: type[PeftModel]

    @property
    def active_peft_config(self) -> Any:
        config = self.peft_config[self.active_adapter]  # type: ignore[index]
        prefixes: Prefixes | None = self.__dict__.get(_RECORD)
        return config if prefixes is None else prefixes.seen_by_peft(config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        prefixes = _served(self, kwargs)
        if prefixes is None:
            return super().forward(*args, **kwargs)
        with prefixes.run():
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        prefixes = _served(self, kwargs)
        if prefixes is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with prefixes.run():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def get_prompt(self, *args: Any, **kwargs: Any) -> Any:
        prefixes: Prefixes | None = self.__dict__.get(_RECORD)
        if prefixes is not None and prefixes.running:
            return None
        return super().get_prompt(*args, **kwargs)  # type: ignore[misc]

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        """As PEFT's, which refuses gradient checkpointing: it can be on."""
        on = [m for m in self.base_model.modules() if m.__dict__.get("gradient_checkpointing")]  # type: ignore[union-attr]
        for module in on:
            module.__dict__["gradient_checkpointing"] = False
        try:
            super()._setup_prompt_encoder(adapter_name)  # type: ignore[misc]
        finally:
            for module in on:
                module.__dict__["gradient_checkpointing"] = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self._peftfast_source,), self.__dict__


class FusedGenerator(FusedPrefixModel):
    """The same, of those that prepare the inputs of generate."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, but the cache stays generate's own: PEFT would put one with the prefix in its
        place, which it can't where the cache is static.
        """
        prefixes: Prefixes | None = self.__dict__.get(_RECORD)
        running = prefixes is not None and prefixes.running
        cache = kwargs.get("past_key_values")
        if running and getattr(cache, "is_compileable", False):
            own: Any = self.base_model_prepare_inputs_for_generation
            made = own(*args, **kwargs)
            made.pop("token_type_ids", None)
            return made
        made = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if running and made.get("past_key_values") is None:
            made["past_key_values"] = cache
        return made


@functools.cache
def _fused_class(source: Any) -> type[FusedPrefixModel]:
    members: dict[str, Any] = {
        "__doc__": f"{source.__qualname__}, whose prefix attention reads where it is.",
        "__module__": __name__,
        "_peftfast_source": source,
    }
    kind = FusedGenerator if hasattr(source, _PREPARE) else FusedPrefixModel
    return type(f"Fused{source.__name__}", (kind, source), members)


def _unpickled(source: Any) -> nn.Module:
    kind = _fused_class(source)
    made: nn.Module = kind.__new__(kind)
    return made


def _served(model: Any, given: dict[str, Any]) -> Prefixes | None:
    """A model's prefixes, where a call with such arguments can be fused."""
    prefixes: Prefixes | None = model.__dict__.get(_RECORD)
    if prefixes is None or model._adapters_disabled:
        return None
    if prefixes.running and not prefixes.runs_another():
        return None
    if any(attention.source_of(one.core) is not one for one in prefixes.offset.sources):  # type: ignore[attr-defined]
        raise RuntimeError(
            "attention modules of this patched model have been given to another adapter, or taken"
            " away: unpatch it and patch it again"
        )
    reason = None if torch.compiler.is_compiling() else transform_reason()
    asked = given.get("output_attentions")
    if asked or (asked is None and getattr(model.base_model.config, "output_attentions", False)):
        reason = "attention probabilities are wanted"
    cores = [source.core for source in prefixes.offset.sources]  # type: ignore[attr-defined]
    reason = reason or next((found for core in cores if (found := attention.obstacle(core))), None)
    if reason is None:
        return prefixes
    for core in cores:
        if (state := state_of(core)) is not None and not torch.compiler.is_compiling():
            state.delegated(reason)
    return None


class _Numbered(nn.Module):
    """An encoder whose output tells which of its parts is where."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        parts, heads = 2 * config.num_layers, config.num_attention_heads
        digits = torch.arange(config.token_dim // heads) % _DIGITS
        numbers = torch.arange(parts)[:, None] // _BASE**digits % _BASE  # [2 L, D]
        flat = numbers.float()[:, None].expand(-1, heads, -1).reshape(1, -1)
        self.embedding = nn.Embedding.from_pretrained(flat.repeat(config.num_virtual_tokens, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding.weight.expand(tokens.shape[0], -1, -1)


def layout_of(model: Any) -> dict[int, Rows]:
    """Which parts of its encoder's output PEFT gives to the model's layers, by layer_idx.

    Raises:
        ValueError: PEFT gives them otherwise than in transformers' caches, or refuses to.
    """
    config, source = model.peft_config[model.active_adapter], _source_of(model)
    size = config.token_dim // config.num_attention_heads
    if size < _DIGITS or 2 * config.num_layers > _BASE**_DIGITS:
        raise ValueError(f"{config.num_layers} layers with heads of {size} can't be told apart")
    encoders = nn.ModuleDict({model.active_adapter: _Numbered(config)})
    modules = {**model._modules, "prompt_encoder": encoders}
    view = shallow(model, source, _modules=modules)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what PEFT says of skipped layers it says in forwards
        made: Any = source.get_prompt(view, 1)
    cache = made.self_attention_cache if isinstance(made, EncoderDecoderCache) else made
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"PEFT gives its prefix as a {type(cache).__name__}, which is no cache")
    found = {}
    for index, layer in enumerate(layers):
        if getattr(layer, "is_initialized", layer.keys is not None):
            _, heads, _, width = layer.keys.shape
            found[index] = Rows(_number(layer.keys), _number(layer.values), heads, width)
    return found


def _number(part: Tensor) -> int:
    digits = part[0, 0, 0, :_DIGITS].round().long().tolist()
    return sum(digit * _BASE**place for place, digit in enumerate(digits))


def _source_of(model: Any) -> Any:
    return model._peftfast_source if isinstance(model, FusedPrefixModel) else type(model)


def prefix_models(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Any]:
    """The PeftModels whose active adapter is a prefix, by path."""
    return {
        path: module
        for path, module in modules
        if isinstance(module, PeftModel)
        and module._is_prompt_learning
        and module.peft_config[module.active_adapter].peft_type in _TYPES
    }


def handler_of_core(core: nn.Module) -> PeftPrefix | None:
    """The handler of an attention module that reads a PeftModel's prefix; None of any other."""
    source = attention.source_of(core)
    return PeftPrefix(source.prefixes.model) if isinstance(source, PeftSource) else None


class PeftPrefix(ClassSwap):
    """The handler of the attention modules that a PeftModel has a prefix for: all, or none.

    Attributes:
        model: the PeftModel.
        cores: its attention modules, by name in it, each with its layer_idx.
        shifted: the modules that give positions to them.
        reason: why they can't be told; "" where they can.
    """

    op = "prefix_attention"
    is_method = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.name = f"peft's {model.peft_config[model.active_adapter].peft_type.value}"
        self.cores: dict[str, tuple[Any, int]] = {}
        self.shifted: list[Any] = []
        self.reason = ""
        self._compared: Comparison | None = None
        try:
            layout = self._record().layout()
            self.cores = _cores(model, layout)
            self.shifted = _position_modules(model, self.cores)
        except (ValueError, IndexError, RuntimeError, TypeError) as error:
            self.reason = f"{type(error).__name__}: {error}".splitlines()[0]

    def _record(self) -> Prefixes:
        held: Prefixes | None = self.model.__dict__.get(_RECORD)
        return Prefixes(self.model) if held is None else held

    def unsupported(self, module: Any) -> list[str]:
        """Why no op computes what this attention does with PEFT's prefix."""
        if hasattr(module, "has_relative_attention_bias"):
            return [
                f"{type(module).__name__} adds a relative position bias, which with PEFT reaches"
                " the prefix too"
            ]
        reason = attention.obstacle(module)
        return [] if reason is None else [reason]

    def obstacles(self, module: Any) -> list[str]:
        found = []
        if (reason := replaced_forward(self.model, type(self.model).forward)) is not None:
            found.append(f"of {type(self.model).__name__}: {reason}")
        source = attention.source_of(module)
        if source is not None and not isinstance(source, PeftSource):
            found.append("it has a prefix of another method")
        elif isinstance(source, PeftSource) and source.prefixes.model is not self.model:
            found.append("it has another PeftModel's prefix")
        return found

    def whole(self, modules: list[Any]) -> str:
        """Why these modules can't be fused by themselves; "" where they can."""
        if len(modules) == len(self.cores):
            return ""
        return (
            f"PEFT's prefix is one for {len(self.cores)} attention modules, of which some are left"
            " alone"
        )

    def compare(self, module: Any, impl: str) -> Comparison:
        """The whole model's output, in a fused forward and in PEFT's own, on random tokens; once
        for all of its modules, and without a trace.
        """
        if self._compared is None:
            self._compared = self._compare()
        return self._compared

    def _compare(self) -> Comparison:
        model = self.model
        if unchecked := elsewhere(model):
            return Comparison(unchecked=unchecked)
        if any(self.unsupported(core) or self.obstacles(core) for core, _ in self.cores.values()):
            return Comparison(unchecked="not all of the model's attention can be fused")
        found = _random_inputs(model)
        if isinstance(found, str):
            return Comparison(unchecked=found)
        modes = [(module, module.training) for module in model.modules()]
        device = next(model.base_model.parameters()).device
        try:
            model.eval()
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                expected = [_of_real_tokens(model, inputs) for inputs in found]
                for core, _ in self.cores.values():
                    self.rewire(core)
                got = [_of_real_tokens(model, inputs) for inputs in found]
        except (IndexError, ValueError, RuntimeError, TypeError) as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            return Comparison(unchecked=f"a forward on random tokens raised {what}")
        finally:
            for core, _ in self.cores.values():
                self.restore(core)
            for module, training in modes:
                module.training = training
        results = [_compared(*pair, len(self.cores)) for pair in zip(expected, got, strict=True)]
        return next((one for one in results if one != Comparison()), Comparison())

    def prepare(self, module: Any) -> None:
        """Nothing is left to be looked at."""

    def require(self, impl: str, modules: Iterable[Any]) -> None:
        """Raise ImplUnavailable where `impl`, asked for by name, can't serve these modules."""
        rows = next(iter(self._record().layout().values()))
        kinds = {(p.device, p.dtype) for m in modules for p in m.parameters()}
        for device, dtype in kinds:
            if device.type != "meta" and dtype.is_floating_point:
                one = torch.ones(1, 1, 1, rows.size, device=device, dtype=dtype)
                with torch.no_grad(), torch.autocast(device.type, enabled=False):
                    prefix_attention(one, one, one, one[0], one[0], impl=impl)

    def rewire(self, module: Any) -> None:
        prefixes = self.model.__dict__.get(_RECORD)
        if prefixes is None:
            prefixes = self.model.__dict__[_RECORD] = Prefixes(self.model)
            prefixes.layout()  # which a compiled call could not look at
            own: Any = type(self.model)
            self.model.__class__ = fused = _fused_class(own)
            _rebind(self.model, own, fused)
            for one in self.shifted:
                positions.shift(one, prefixes.offset)
        layer = next(layer for core, layer in self.cores.values() if core is module)
        source = PeftSource(prefixes, module, layer)
        attention.attach(module, source)
        prefixes.offset.sources.append(source)

    def restore(self, module: Any) -> None:
        source = attention.source_of(module)
        if not isinstance(source, PeftSource):
            return
        attention.detach(module)
        prefixes = source.prefixes
        prefixes.offset.sources.remove(source)
        if prefixes.offset.sources:
            return
        model = prefixes.model
        for one in model.modules():
            if positions.offset_of(one) is prefixes.offset:
                positions.unshift(one)
        fused: Any = type(model)
        own = model._peftfast_source
        model.__class__ = own
        _rebind(model, fused, own)
        del model.__dict__[_RECORD]


def _rebind(model: Any, old: Any, new: Any) -> None:
    """Point bound methods that PEFT left on the instance at another class's."""
    rebind(model, old.forward, new.forward)
    held = model.__dict__.get(_PREPARE)
    if isinstance(held, MethodType) and held.__self__ is model and hasattr(new, _PREPARE):
        model.__dict__[_PREPARE] = MethodType(getattr(new, _PREPARE), model)


def _cores(model: Any, layout: dict[int, Rows]) -> dict[str, tuple[Any, int]]:
    """The self-attention modules that PEFT has a prefix for, with their layer_idx, by name.

    Raises:
        ValueError: PEFT has prefixes for layers that are not found, or none for some.
    """
    decoder = model.peft_config[model.active_adapter].num_transformer_submodules == 2
    found: dict[str, tuple[Any, int]] = {}
    for block in find_blocks(model.base_model):
        point = block.points.get("attention_input")
        if point is None or (decoder and block.stack != "decoder"):
            continue
        name = f"base_model.{point.module.rpartition('.')[0]}"
        core = model.get_submodule(name)
        index = getattr(core, "layer_idx", None)
        found[name] = core, index if isinstance(index, int) else block.index
    indices = [index for _, index in found.values()]
    if sorted(indices) != sorted(layout):
        raise ValueError(
            f"PEFT has prefixes for the layers {_few(sorted(layout))}, and self-attention was found"
            f" in {_few(sorted(indices))}"
        )
    return found


def _few(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return f"{shown}, ..." if len(indices) > 8 else shown or "none"


def _position_modules(model: Any, cores: dict[str, tuple[Any, int]]) -> list[Any]:
    """The modules that give positions to the layers with a prefix."""
    base = model.base_model
    stacks = list(dict.fromkeys(block.name.rpartition(".")[0] for block in find_blocks(base)))
    found: dict[str, None] = {}
    for stack in stacks:
        if any(name.startswith(f"base_model.{stack}.") for name in cores):
            others = [one for one in stacks if one != stack]
            found.update(dict.fromkeys(positions.find(base, stack, others)))
    return [base.get_submodule(name) for name in found]


def _random_inputs(model: Any) -> list[dict[str, Tensor]] | str:
    """A row of tokens, and one whose first is masked, or why there is none."""
    getter = getattr(model.base_model, "get_input_embeddings", None)
    embedding = None if getter is None else getter()
    size = getattr(embedding, "num_embeddings", None)
    if not isinstance(size, int):
        return "the model has no input embeddings"
    generator = torch.Generator().manual_seed(0)
    device = next(model.base_model.parameters()).device
    tokens = torch.randint(size, (1, _TOKENS), generator=generator).to(device)
    padding = getattr(model.base_model.config, "pad_token_id", None)
    if padding is not None:
        tokens = torch.where(tokens == padding, (tokens + 1) % size, tokens)
    masked = torch.ones_like(tokens)
    masked[:, 0] = 0
    rows = [{"input_ids": tokens, "attention_mask": m} for m in (torch.ones_like(tokens), masked)]
    if model.peft_config[model.active_adapter].num_transformer_submodules == 2:
        rows = [{**row, "decoder_input_ids": tokens} for row in rows]
    return rows


def _of_real_tokens(model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """The output for a row, where it is of tokens that are there; None where of the first, masked
    one.
    """
    output = model(**inputs).to_tuple()
    found: Tensor = next(one for one in output if isinstance(one, Tensor) and one.ndim)
    if found.shape[1:2] == (_TOKENS,):
        return found[inputs["attention_mask"].bool()]
    return found if bool(inputs["attention_mask"].all()) else None


def _compared(expected: Tensor | None, got: Tensor | None, layers: int) -> Comparison:
    """Roundings add up over layers; whatever else is wrong is larger than all of them."""
    if expected is None or got is None:
        return Comparison()
    if not bool(expected.isfinite().all()):
        return Comparison(unchecked="PEFT's own output on random tokens is not finite")
    apart = float((got.double() - expected.double()).norm() / expected.double().norm())
    allowed = max(2.0**-12, 4 * torch.finfo(expected.dtype).eps * math.sqrt(layers))
    if apart <= allowed:
        return Comparison()
    return Comparison(
        difference=f"the model's output differs from PEFT's by {apart:.2e} on random tokens"
        f" (allowed: {allowed:.2e})"
    )
