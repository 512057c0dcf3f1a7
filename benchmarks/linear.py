"""What the timed benchmarks of a LoRA linear share: configurations, variants, inputs, rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import (
    LoraOperands,
    LoraShape,
    adapter_parameters,
    lora_operands,
    peft_layer,
)
from benchmarks.cases import Case, short
from benchmarks.ceilings import Ceilings, Floor, cache_bytes
from benchmarks.gates import NAMES, Gate, exact_lora_step, gate
from benchmarks.registry import Row
from benchmarks.timing import Samples
from peftfast.ops import lora_linear

FROZEN = "frozen"
Step = Callable[[int], object]


@dataclass(frozen=True)
class Config:
    """One configuration: sizes, the dtype of x and W, and the probability of dropout."""

    shape: LoraShape
    dtype: torch.dtype
    dropout_p: float

    @property
    def title(self) -> str:
        """The configuration in a line."""
        return ", ".join(f"{key} {value}" for key, value in self.as_dict().items())

    def as_dict(self) -> Row:
        """The fields, for JSON."""
        return {**self.shape.as_dict(), "dtype": short(self.dtype), "dropout": self.dropout_p}


@dataclass(frozen=True)
class Checked:
    """A variant and the gate that it passed; None for the frozen linear, PyTorch's own."""

    case: Case
    gate: Gate | None


def floor(config: Config, ceilings: Ceilings) -> Floor:
    """The work of a forward and backward with W frozen, each tensor read or written once a pass.

    Forward: x, W in, y out. Backward: dy, x, W in, dx out. A, B and the bottleneck are rank-sized
        and left out.
    """
    shape = config.shape
    m, k, n, r = shape.rows, shape.in_features, shape.out_features, shape.rank
    flops = 4 * m * k * n + 6 * m * r * (k + n)
    elements = (m * k + k * n + m * n) + (m * n + m * k + k * n + m * k)
    return Floor.of(flops, elements * config.dtype.itemsize, ceilings)


def inputs(config: Config, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Enough pairs (x, dy) that one round's are out of the cache by the next."""
    shape = config.shape
    size = shape.rows * (shape.in_features + shape.out_features) * config.dtype.itemsize
    sets = 1 + -(-2 * cache_bytes(device) // size)
    made = [lora_operands(shape, config.dtype, config.dtype, device, n) for n in range(sets)]
    return [(one.x, one.dy) for one in made]


def step(case: Case, pairs: list[tuple[Tensor, Tensor]]) -> Step:
    """The step of `case` on one of `pairs` after the other."""

    def run(round_: int) -> object:
        x, dy = pairs[round_ % len(pairs)]
        return replace(case, x=x, dys=[dy]).step()

    return run


def variant_name(who: str, adapter_dtype: torch.dtype) -> str:
    """ "peftfast, bfloat16 adapters"."""
    return f"{who}, {short(adapter_dtype)} adapters"


def frozen(config: Config, device: torch.device) -> Checked:
    """The linear alone, with a gradient for x."""
    operands = lora_operands(config.shape, config.dtype, config.dtype, device)
    weight = operands.weight
    case = Case(FROZEN, lambda x: F.linear(x, weight), operands.x, [], [operands.dy])
    return Checked(case, None)


def ours(config: Config, adapter_dtype: torch.dtype, device: torch.device) -> Checked:
    """peftfast, checked with the mask of a given seed, timed with seeds that it draws itself."""
    operands = lora_operands(config.shape, config.dtype, adapter_dtype, device)
    p = config.dropout_p
    given = torch.tensor([20240229], dtype=torch.int64, device=device) if p > 0 else None

    def case(seed: Tensor | None) -> Case:
        a, b = operands.lora_a, operands.lora_b

        def forward(x: Tensor) -> Tensor:
            weight, scaling = operands.weight, operands.scaling
            return lora_linear(x, weight, None, a, b, scaling, dropout_p=p, seed=seed)

        name = variant_name("peftfast", adapter_dtype)
        return Case(name, forward, operands.x, [a, b], [operands.dy])

    return Checked(case(None), _check(case(given), operands, p, given))


def peft(
    config: Config, adapter_dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Checked:
    """PEFT's layer as it is, or compiled; checked with dropout off, its masks being unknown."""
    operands = lora_operands(config.shape, config.dtype, adapter_dtype, device)
    layer = peft_layer(operands, config.dropout_p)
    if compiled:  # else earlier layers' compilations count towards the limit of recompilations
        torch.compiler.reset()
    case = Case(
        variant_name("peft compiled" if compiled else "peft", adapter_dtype),
        torch.compile(layer) if compiled else layer,
        operands.x,
        adapter_parameters(layer),
        [operands.dy],
    )
    layer.eval()
    checked = _check(case, operands, 0.0, None)
    layer.train()
    return Checked(case, checked)


def _check(case: Case, operands: LoraOperands, dropout_p: float, seed: Tensor | None) -> Gate:
    y = case.forward(case.x)
    if not isinstance(y, Tensor):
        raise TypeError(f"{case.variant}: one output is expected, got {type(y).__name__}")
    gradients = torch.autograd.grad(y, [case.x, *case.parameters], case.dys)
    checked = gate(
        "PyTorch at float64",
        dict(zip(NAMES, (y.detach(), *gradients), strict=True)),
        exact_lora_step(operands, dropout_p, seed, operands.x.dtype),
        exact_lora_step(operands, dropout_p, seed, torch.float64),
    )
    checked.require(case.variant)
    return checked


def row(
    checked: Checked,
    config: Config,
    taken: Samples,
    ceilings: Ceilings,
    back_to_back: float | None = None,
    peak_bytes: int | None = None,
) -> Row:
    """A row of what was measured of one variant."""
    least = floor(config, ceilings)
    return {
        "variant": checked.case.variant,
        "config": config.as_dict(),
        "time": taken.as_dict(),
        "back_to_back": back_to_back,
        "tokens_per_second": config.shape.rows / taken.median,
        "peak_bytes": peak_bytes,
        "floor": least.as_dict(),
        "distance_to_floor": taken.median / least.seconds,
        "ceilings": ceilings.as_dict(),
        "gate": None if checked.gate is None else checked.gate.as_dict(),
    }
