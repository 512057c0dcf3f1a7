"""Bytes of three LoRA linears that read one x (q, k, v), against three frozen linears on it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import LoraOperands, adapter_parameters, lora_operands, peft_layer
from benchmarks.cases import Case, count_case, short
from benchmarks.counted.lora_linear import CPU, DTYPE, SHAPE, WORKSPACE_LIMIT
from benchmarks.plans import plan_forced
from benchmarks.registry import CountedReport, Say, counted
from benchmarks.targets import Target
from peftfast.ops import lora_linear_group

SIBLINGS = 3
EXTRA_LIMIT = 0.6  # a linear, autograd's sum of the three gradients of x included


def _operands(adapter_dtype: torch.dtype) -> list[LoraOperands]:
    """One set of operands a sibling; the first one's x is read by all."""
    return [lora_operands(SHAPE, DTYPE, adapter_dtype, CPU, seed) for seed in range(SIBLINGS)]


def frozen_case() -> Case:
    """Three frozen linears; autograd adds the three gradients of x."""
    siblings = _operands(DTYPE)
    dys = [one.dy for one in siblings]
    return Case(
        "frozen", lambda x: [F.linear(x, one.weight) for one in siblings], siblings[0].x, [], dys
    )


def peft_case(adapter_dtype: torch.dtype, dropout_p: float) -> Case:
    """Three PEFT layers on one x."""
    siblings = _operands(adapter_dtype)
    layers = [peft_layer(one, dropout_p) for one in siblings]
    return Case(
        "peft",
        lambda x: [layer(x) for layer in layers],
        siblings[0].x,
        [parameter for layer in layers for parameter in adapter_parameters(layer)],
        [one.dy for one in siblings],
        {"adapters": short(adapter_dtype), "dropout": dropout_p},
    )


def peftfast_case(adapter_dtype: torch.dtype, dropout_p: float) -> Case:
    """One call of `lora_linear_group` in its Triton implementation."""
    siblings = _operands(adapter_dtype)

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return lora_linear_group(
            x,
            [one.weight for one in siblings],
            [None] * SIBLINGS,
            [one.lora_a for one in siblings],
            [one.lora_b for one in siblings],
            [one.scaling for one in siblings],
            dropout_p=dropout_p,
            impl="triton",
        )

    return Case(
        "peftfast",
        forward,
        siblings[0].x,
        [parameter for one in siblings for parameter in (one.lora_a, one.lora_b)],
        [one.dy for one in siblings],
        {"adapters": short(adapter_dtype), "dropout": dropout_p},
    )


@counted("lora_siblings", "q, k, v on one x, forward + backward: frozen alone, PEFT, peftfast")
def count(say: Say) -> CountedReport:
    """Frozen alone; PEFT with 16-bit and peftfast with float32 and 16-bit adapters."""
    unit = SHAPE.rows * SHAPE.in_features * DTYPE.itemsize
    first, frozen = count_case(frozen_case(), unit, None)
    rows, targets = [first], []
    for case in (
        peft_case(torch.float32, 0.0),
        peft_case(DTYPE, 0.0),
        peftfast_case(torch.float32, 0.0),
        peftfast_case(DTYPE, 0.0),
        peftfast_case(DTYPE, 0.1),
    ):
        say(case.title)
        with plan_forced("fused"):
            row, _ = count_case(case, unit, frozen)
        row["extra_per_linear_u"] = row["extra_u"] / SIBLINGS
        rows.append(row)
        if case.variant == "peftfast":
            which = f"{row['adapters']} adapters, dropout {row['dropout']}"
            per_linear, workspace = row["extra_per_linear_u"], row["workspace_u"] / SIBLINGS
            targets.append(Target(f"{which}: extra u a linear", per_linear, EXTRA_LIMIT))
            targets.append(Target(f"{which}: workspace u a linear", workspace, WORKSPACE_LIMIT))
    config = {**SHAPE.as_dict(), "dtype": short(DTYPE), "siblings": SIBLINGS}
    return CountedReport(config, unit, rows, {}, targets)
