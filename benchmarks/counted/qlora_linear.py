"""Bytes of a LoRA linear over a 4-bit weight, against the same over the dense weight."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines import lora_operands
from benchmarks.cases import Case, count_case, short
from benchmarks.counted.lora_linear import CPU, DTYPE, SHAPE, frozen_case
from benchmarks.plans import plan_forced
from benchmarks.registry import CountedReport, Say, counted
from benchmarks.targets import Target
from peftfast.ops import lora_linear, nf4

DENSE, OURS = "peftfast, dense weight", "peftfast, 4-bit weight"


def case(variant: str, adapter_dtype: torch.dtype, dropout_p: float) -> Case:
    """One call of `lora_linear` in its Triton implementation, over either weight."""
    operands = lora_operands(SHAPE, DTYPE, adapter_dtype, CPU)
    a, b, scaling = operands.lora_a, operands.lora_b, operands.scaling
    w = nf4.quantize(operands.weight) if variant == OURS else operands.weight

    def forward(x: Tensor) -> Tensor:
        return lora_linear(x, w, None, a, b, scaling, dropout_p=dropout_p, impl="triton")

    settings = {"adapters": short(adapter_dtype), "dropout": dropout_p}
    return Case(variant, forward, operands.x, [a, b], [operands.dy], settings)


def budget_bytes() -> int:
    """What the 4-bit weight may add: twice the packed weight with its statistics, read, and the
    dequantised one, written; that this is read is the GEMM's own traffic.
    """
    w = lora_operands(SHAPE, DTYPE, DTYPE, CPU).weight
    return 2 * (nf4.quantize(w).nbytes + w.nbytes)


@counted("qlora_linear", "one LoRA linear, forward + backward: dense and 4-bit weight")
def count(say: Say) -> CountedReport:
    """Float32 and 16-bit adapters, dropout 0 and 0.1."""
    unit = SHAPE.rows * SHAPE.in_features * DTYPE.itemsize
    first, frozen = count_case(frozen_case(), unit, None)
    rows, targets = [first], []
    limit = budget_bytes() / unit
    with plan_forced("fused"):
        for adapter_dtype, dropout_p in ((torch.float32, 0.0), (DTYPE, 0.0), (DTYPE, 0.1)):
            pair = []
            for variant in (DENSE, OURS):
                one = case(variant, adapter_dtype, dropout_p)
                say(one.title)
                pair.append(count_case(one, unit, frozen)[0])
            rows += pair
            added = pair[1]["total_u"] - pair[0]["total_u"]
            which = f"{short(adapter_dtype)} adapters, dropout {dropout_p}"
            targets.append(Target(f"{which}: u that 4 bits add", added, limit))
    return CountedReport({**SHAPE.as_dict(), "dtype": short(DTYPE)}, unit, rows, {}, targets)
