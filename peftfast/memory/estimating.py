"""`estimate`: the memory of a step, before it is run and without a model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftfast.memory import build, simulate
from peftfast.memory.build import ConfigError, Recipe
from peftfast.memory.profiles import PROFILES, DeviceProfile
from peftfast.memory.report import MemoryReport, report_of
from peftfast.memory.trace import INDEX, Trace, extrapolate
from peftfast.patching.rewire import POLICIES

MOST_TOKENS = 1 << 25  # of a pass
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
MODES = ("train", "generate")


def estimate(
    model_or_config: Any,
    *,
    method: Any = None,
    batch: int = 1,
    seq: int = 512,
    dtype: torch.dtype | str | None = None,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    memory: str = "recompute",
    device_profile: str | DeviceProfile = "a100-40gb",
    patched: bool | None = None,
    four_bit: bool = False,
    mode: str = "train",
    adapter_slots: int = 1,
    accumulate: bool = False,
) -> MemoryReport:
    """Predict the peak memory of one training step, or of generation, and where it lies.

    The model's own code runs, without values, on tensors that only know their shapes, as it would
    on the device: transformers', PEFT's, and peftfast's operations with what their kernels
    allocate. Of a configuration with many alike layers a few are run, and the rest is computed
    from those.

    Args:
        model_or_config: a model, which is neither run nor changed; a configuration of
            transformers, as an object, a dict, a JSON file or the folder of one.
        method: "full", "lora" or "qlora" (NF4 with nested statistics, as bitsandbytes has it; the
            output head stays dense), the last two of rank 16 on all linears, another rank after a
            colon ("qlora:8"); or any config of PEFT. None: the model as it is.
        batch, seq: sequences, and tokens of each. Generation: of prompt and answer together.
        dtype: of the weights, and of what is computed; None: the configuration's, else bfloat16.
            Adapters are float32, as PEFT makes them. Not for a model: it has its own.
        optimizer: "adamw" and "sgd" (torch's), "adamw_fused", "adamw_8bit" (bitsandbytes'), or
            "none". Its state counts from the start, as in every step but the first.
        checkpointing: recompute every layer in the backward. A model that does so already does.
        memory: the policy of `peftfast.patch`, where `patched` says that it is called.
        device_profile: one of `peftfast.memory.PROFILES`, by name, or one of your own.
        patched: whether `peftfast.patch` is called. None: for a configuration it is; a model is
            taken as it is, patched with the policy that it has, or not patched.
        four_bit: put the linears of the base in 4 bits for a method that is a config of PEFT.
        mode: "train", or "generate": the prompt's pass and a step of decoding, with the whole
            cache of keys and values.
        adapter_slots: how many sets of adapters of the same size are held, one of them in use.
        accumulate: gradients are there from the start, as in all but the first pass of an
            accumulated step.

    Raises:
        TypeError, ValueError: an argument is wrong. ConfigError (a ValueError): no model can be
            built from the configuration. NeedsValues: the model's code asks for values.
    """
    options: dict[str, Any] = {
        "method": method,
        "optimizer": optimizer,
        "checkpointing": checkpointing,
        "memory": memory,
        "device_profile": device_profile,
        "patched": patched,
        "four_bit": four_bit,
        "mode": mode,
        "adapter_slots": adapter_slots,
        "accumulate": accumulate,
    }
    _check(method, batch, seq, optimizer, memory, mode, adapter_slots)
    if isinstance(model_or_config, nn.Module):
        name = type(model_or_config).__name__
    else:
        model_or_config = build.load_config(model_or_config)
        name = type(model_or_config).__name__.removesuffix("Config")
    return Predictor(model_or_config, name, dtype=dtype, **options).report(batch, seq)


class Predictor:
    """Predictions for one model and many sizes; the arguments are those of `estimate`."""

    def __init__(
        self,
        source: Any,
        name: str,
        *,
        method: Any = None,
        dtype: torch.dtype | str | None = None,
        optimizer: str = "adamw",
        checkpointing: bool = False,
        memory: str = "recompute",
        device_profile: str | DeviceProfile = "a100-40gb",
        patched: bool | None = None,
        four_bit: bool = False,
        mode: str = "train",
        adapter_slots: int = 1,
        accumulate: bool = False,
    ) -> None:
        self._profile = _profile(device_profile)
        self._slots = adapter_slots
        live = isinstance(source, nn.Module)
        if patched is None and live:
            own = build.policy_of(source)
            patched, memory = own is not None, own or memory
        patched = patched is not False
        chosen = build.dtype_of(source) if live else _dtype(dtype, source)
        recipe = Recipe(method, chosen, four_bit, patched, memory, checkpointing)
        self._models: Models = _Twin(source, recipe) if live else Models(source, recipe)
        self._step = (self._profile, optimizer, mode, accumulate)
        self._settings = {
            "model": name,
            "method": (
                method if isinstance(method, str) or method is None else type(method).__name__
            ),
            "dtype": str(chosen).removeprefix("torch."),
            "optimizer": optimizer,
            "checkpointing": checkpointing,
            "memory": memory if patched else None,
            "patched": patched,
            "device_profile": self._profile.name,
            "mode": mode,
        }
        self._reports: dict[tuple[int, int], MemoryReport] = {}

    def report(self, batch: int, seq: int) -> MemoryReport:
        """The prediction for a size; kept."""
        check_tokens(batch, seq)
        if (batch, seq) not in self._reports:
            profile, optimizer, mode, accumulate = self._step
            step = _Step(profile, batch, seq, optimizer, mode, accumulate)
            trace = _with_slots(self._models.trace(step), self._slots)
            of = self._settings
            how = f"patched, memory={of['memory']!r}" if of["patched"] else "not patched"
            what = f"{of['model']}, {of['method'] or 'as it is'}, {how}, {batch} x {seq} tokens"
            settings = {**of, "batch": batch, "seq": seq}
            largest = max((moment.size for moment in trace.moments), default=0)
            report = report_of(trace, profile, f"{what}, {profile.name}", settings, largest)
            self._reports[batch, seq] = report
        return self._reports[batch, seq]


class _Step:
    """A step to simulate."""

    def __init__(
        self,
        profile: DeviceProfile,
        batch: int,
        seq: int,
        optimizer: str,
        mode: str,
        accumulate: bool,
    ) -> None:
        self.profile, self.batch, self.seq = profile, batch, seq
        self.optimizer, self.mode, self.accumulate = optimizer, mode, accumulate

    def run(self, model: nn.Module) -> Trace:
        if self.mode == "generate":
            return simulate.generation(model, self.profile, self.batch, self.seq)
        return simulate.training_step(
            model,
            self.profile,
            self.batch,
            self.seq,
            self.optimizer,
            accumulate=self.accumulate,
        )


class Models:
    """Models of one configuration and recipe: two short ones, or where they don't tell the whole
    one. Built when they are needed, and kept, for one prediction after the other.
    """

    def __init__(self, config: Any, recipe: Recipe) -> None:
        self._config, self._recipe = config, recipe
        # What is on its way to the host does not grow with the layers.
        self._plan = None if recipe.memory == "offload" else build.layer_plan(config)
        self._built: dict[int | None, nn.Module] = {}

    def trace(self, step: _Step) -> Trace:
        if self._plan is not None:
            first, second, steps = self._plan
            short, long = step.run(self._model(first)), step.run(self._model(second))
            whole = extrapolate(short, long, steps)
            if whole is not None:
                return whole
        return step.run(self._model(None))

    def _model(self, layers: int | None) -> nn.Module:
        if layers not in self._built:
            config = self._config if layers is None else build.with_layers(self._config, layers)
            self._built[layers] = build.build(config, self._recipe)
        return self._built[layers]


class _Twin(Models):
    """A copy of a live model."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._plan = None
        self._built = {None: build.prepare(build.twin(model), recipe)}


def _profile(profile: str | DeviceProfile) -> DeviceProfile:
    if isinstance(profile, DeviceProfile):
        return profile
    if profile not in PROFILES:
        raise ValueError(f"device_profile is {profile!r}; allowed: {', '.join(PROFILES)}")
    return PROFILES[profile]


def _dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    if dtype is None:
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    return dtype  # type: ignore[return-value]


def check_tokens(batch: int, seq: int) -> None:
    """Raise ValueError for a pass of more tokens than a prediction goes through in a while."""
    if batch * seq > MOST_TOKENS:
        raise ValueError(
            f"{batch:,} x {seq:,} tokens are more than the {MOST_TOKENS:,} that a pass may have"
        )


def _check(
    method: Any, batch: int, seq: int, optimizer: str, memory: str, mode: str, slots: int
) -> None:
    build.check_method(method)
    for name, value in (("batch", batch), ("seq", seq), ("adapter_slots", slots)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; a positive whole number is needed")
    check_tokens(batch, seq)
    for name, choice, allowed in (
        ("optimizer", optimizer, simulate.OPTIMIZERS),
        ("memory", memory, POLICIES),
        ("mode", mode, MODES),
    ):
        if choice not in allowed:
            raise ValueError(f"{name} is {choice!r}; allowed: {', '.join(allowed)}")


def _with_slots(trace: Trace, slots: int) -> Trace:
    if slots > 1:
        trace.live[:, INDEX["adapters"]] *= slots
    return trace


__all__ = ["ConfigError", "Models", "estimate"]
