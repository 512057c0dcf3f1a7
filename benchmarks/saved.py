"""What a forward keeps for its backward: a model of PEFT as it is, and patched.

Counted in units of tokens x layers x hidden x 2 bytes, in two ways. *Saved*: the distinct storages
that autograd keeps when the forward has ended, parameters left out, under saved-tensor hooks.
*Alive*: the bytes that the allocator handed out during the forward and that are not given back at
its end, by the profiler's memory events on a CPU and the allocator's own count on a GPU; this sees
what is kept in other ways too. Both are taken from a later step: the first finds the siblings.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.profiler import profile

import peftfast
from benchmarks.gates import Gate, gate
from benchmarks.models import RANK, Size, base_model, loss_and_gradients, token_batches, trainable
from benchmarks.quantised import dense, quantised, shared_state
from benchmarks.registry import Row, Say
from benchmarks.targets import Target
from peftfast.memory import saved_bytes
from peftfast.methods import AdapterConfig, HoulsbyConfig, ParallelAdapterConfig

SIZE = Size("4 x 1024", 1024, 2816, 4, 16, 4, 1024, 4, 512)
DTYPE = torch.bfloat16
PEFT, OURS = "peft", "peftfast"
WAYS = ("saved_units", "alive_units")
LIMIT, PADDED_LIMIT = 10.5, 11.0
BOTTLENECK = 64
_PADDING = (0.0, 0.08, 0.25, 0.58)  # share of each row, on the right
_SEED = 3


def _lora(base: nn.Module, dropout_p: float) -> nn.Module:
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout_p, target_modules="all-linear"
    )
    model: nn.Module = get_peft_model(copy.deepcopy(base, shared_state(base)), config)
    return model


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: what the base is held in, and the model over a copy of it."""

    quantised: bool
    adapt: Callable[[nn.Module, float], nn.Module]


def _adapters(kind: type[AdapterConfig]) -> Callable[[nn.Module, float], nn.Module]:
    def adapt(base: nn.Module, dropout_p: float) -> nn.Module:
        config = kind(bottleneck=BOTTLENECK, dropout=dropout_p)
        model: nn.Module = get_peft_model(copy.deepcopy(base, shared_state(base)), config)
        return model

    return adapt


METHODS = {
    "lora": Method(False, _lora),
    "qlora": Method(True, _lora),
    "houlsby": Method(False, _adapters(HoulsbyConfig)),
    "parallel adapter": Method(False, _adapters(ParallelAdapterConfig)),
}
LIMITED = ("lora", "qlora")  # what LIMIT is said of; others are held to the model unpatched


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        mask: none, ones (an attention mask that masks nothing) or padding.
        checkpointing: none, reentrant or non-reentrant.
        memory: patch's policy.
    """

    method: str = "lora"
    dropout: float = 0.0
    mask: str = "none"
    checkpointing: str = "none"
    compiled: bool = False
    memory: str = "recompute"

    @property
    def title(self) -> str:
        """The configuration in a line."""
        parts = [self.method, f"dropout {self.dropout}", f"mask {self.mask}"]
        parts += [f"{self.checkpointing} checkpoints"] if self.checkpointing != "none" else []
        parts += ["compiled"] if self.compiled else []
        parts += [f"memory={self.memory!r}"] if self.memory != "recompute" else []
        return ", ".join(parts)


def cases() -> list[Case]:
    """Every method with and without dropout and masks, then checkpoints, policies, compilation."""
    plain = [Case(method, p) for method in METHODS for p in (0.0, 0.1)]
    masked = [Case(dropout=p, mask=mask) for p in (0.0, 0.1) for mask in ("ones", "padding")]
    kinds = ("reentrant", "non-reentrant")
    checkpointed = [Case(dropout=0.1, checkpointing=kind) for kind in kinds]
    policies = [Case(memory=memory) for memory in ("keep", "compress")]
    return [*plain, *masked, *checkpointed, *policies, Case(compiled=True)]


def report(chosen: list[Case], device: torch.device, say: Say, size: Size = SIZE) -> Iterator[Row]:
    """A row for PEFT and one for peftfast, a case."""
    gates: dict[str, Gate] = {}
    bases: dict[bool, nn.Module] = {}
    for case in chosen:
        method = METHODS[case.method]
        if case.method not in gates:
            say(f"checking {case.method}")
            gates[case.method] = check(case.method, device)
        if method.quantised not in bases:
            bases[method.quantised] = _base(size, method, device)
        for variant in (PEFT, OURS):
            if variant == PEFT and case.memory != "recompute":
                continue  # PEFT has no policies
            say(f"{variant}: {case.title}")
            saved, alive = measure(bases[method.quantised], size, case, variant)
            yield {
                "variant": variant,
                "config": {**_config(size), **asdict(case)},
                "saved_units": saved,
                "alive_units": alive,
                "unit_bytes": _unit(size),
                "gate": gates[case.method].as_dict() if variant == OURS else None,
            }


def targets(rows: list[Row]) -> list[Target]:
    """Limits without checkpoints; with them and compiled, PEFT's and the eager figures."""
    found = []
    by_case = {(row["variant"], _key(row)): row for row in rows}
    for row in rows:
        config = row["config"]
        if row["variant"] != OURS or config["memory"] != "recompute":
            continue
        case = _case(row)
        for way in WAYS:
            name = f"{case.title}: units {way.removesuffix('_units')}"
            if case.checkpointing != "none" or case.method not in LIMITED:
                theirs = by_case.get((PEFT, _key(row)))
                limit = None if theirs is None else theirs[way]
            elif case.compiled:
                eager = {**config, "compiled": False}
                other = by_case.get((OURS, tuple(sorted(eager.items()))))
                limit = None if other is None else other[way]
            else:
                limit = PADDED_LIMIT if case.mask == "padding" else LIMIT
            if limit is not None:
                found.append(Target(name, row[way], limit))
    return found


def cells(row: Row) -> list[str]:
    """A row of the table: variant, configuration, units saved, units alive."""
    case = _case(row)
    return [row["variant"], case.title, *(f"{row[way]:.2f}" for way in WAYS)]


def measure(base: nn.Module, size: Size, case: Case, variant: str) -> tuple[float, float]:
    """Units saved and units alive after a forward of the variant."""
    device = next(base.parameters()).device
    model = _model(base, METHODS[case.method], case, variant)
    inputs = _inputs(size, case, device)
    run: Callable[..., Any] = model
    if case.compiled:
        torch.compiler.reset()
        run = torch.compile(model)

    def forward() -> Tensor:
        loss: Tensor = run(**inputs).loss
        return loss

    for _ in range(2):
        forward().backward()
        model.zero_grad()
    saved = saved_bytes(forward, exclude=model, at_end=True)
    gc.collect()
    alive = _alive_bytes(forward, device)
    return saved / _unit(size), alive / _unit(size)


def check(name: str, device: torch.device) -> Gate:
    """Loss and gradients of the patched model, on two layers, without dropout.

    The reference is the same model in float64 (float32 on a GPU), eager PyTorch is PEFT's.
    """
    size = replace(SIZE, layers=2, batch=2, sequence=64)
    method, case = METHODS[name], Case(name)
    wide = torch.float32 if device.type == "cuda" else torch.float64
    (tokens,) = token_batches(size, device, 1)
    base = _base(size, method, device)
    exact_base = dense(base, DTYPE, wide) if method.quantised else copy.deepcopy(base).to(wide)
    exact = loss_and_gradients(_model(exact_base, method, case, PEFT).to(wide), tokens, _SEED)
    eager = loss_and_gradients(_model(base, method, case, PEFT), tokens, _SEED)
    ours = loss_and_gradients(_model(base, method, case, OURS), tokens, _SEED)
    checked = gate(f"PyTorch at {str(wide).removeprefix('torch.')}", ours, eager, exact, DTYPE)
    checked.require(OURS)
    return checked


def _base(size: Size, method: Method, device: torch.device) -> nn.Module:
    base = base_model(size, DTYPE, device)
    return quantised(base, DTYPE) if method.quantised else base


def _model(base: nn.Module, method: Method, case: Case, variant: str) -> nn.Module:
    model: Any = method.adapt(base, case.dropout)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    if case.checkpointing != "none":
        reentrant = {"use_reentrant": case.checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
        model.enable_input_require_grads()
    if variant == OURS:
        peftfast.patch(model, strict=True, memory=case.memory)
    trained: nn.Module = model.train()
    return trained


def _inputs(size: Size, case: Case, device: torch.device) -> dict[str, Tensor]:
    (tokens,) = token_batches(size, device, 1)
    inputs = {"input_ids": tokens, "labels": tokens}
    if case.mask != "none":
        mask = torch.ones_like(tokens)
        if case.mask == "padding":
            for row, share in enumerate(_PADDING):
                mask[row, size.sequence - int(share * size.sequence) :] = 0
        inputs["attention_mask"] = mask
    return inputs


def _alive_bytes(forward: Callable[[], Tensor], device: torch.device) -> int:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        loss = forward()
        return torch.cuda.memory_allocated(device) - before - loss.nbytes
    with profile(profile_memory=True, use_cpu=True) as recorded:
        loss = forward()
    events = recorded.kineto_results.events()
    return sum(one.nbytes() for one in events if one.name() == "[memory]") - loss.nbytes


def _unit(size: Size) -> int:
    return size.tokens * size.layers * size.hidden * 2


def _config(size: Size) -> Row:
    fields = {"model": size.name, "batch": size.batch, "sequence": size.sequence, "rank": RANK}
    return {**fields, "dtype": "bfloat16"}


def _case(row: Row) -> Case:
    return Case(**{name: row["config"][name] for name in asdict(Case())})


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(sorted(row["config"].items()))
