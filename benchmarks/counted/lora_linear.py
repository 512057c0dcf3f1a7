"""Bytes of one LoRA linear, forward and backward, in units u of one activation tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import LoraShape, adapter_parameters, lora_operands, peft_layer
from benchmarks.cases import Case, count_case, short
from benchmarks.plans import plan_forced
from benchmarks.registry import CountedReport, Say, counted
from benchmarks.targets import Target
from peftfast.ops import lora_linear

SHAPE = LoraShape(rows=2048, in_features=1024, out_features=1024, rank=16)
FULL_SIZE = LoraShape(rows=8192, in_features=4096, out_features=4096, rank=16)
DTYPE = torch.float16  # the interpreter computes bfloat16 wrong; the bytes are the same
EXTRA_LIMIT, WORKSPACE_LIMIT = 3.3, 1.0
ARCH, SMS = 90, 132
CPU = torch.device("cpu")
OURS = "peftfast"


def frozen_case() -> Case:
    """The linear alone, with a gradient for x."""
    operands = lora_operands(SHAPE, DTYPE, DTYPE, CPU)
    return Case("frozen", lambda x: F.linear(x, operands.weight), operands.x, [], [operands.dy])


def peft_case(adapter_dtype: torch.dtype, dropout_p: float) -> Case:
    """PEFT's layer as it is."""
    operands = lora_operands(SHAPE, DTYPE, adapter_dtype, CPU)
    layer = peft_layer(operands, dropout_p)
    settings = {"adapters": short(adapter_dtype), "dropout": dropout_p}
    return Case("peft", layer, operands.x, adapter_parameters(layer), [operands.dy], settings)


def peftfast_case(adapter_dtype: torch.dtype, dropout_p: float, plan: str = "fused") -> Case:
    """peftfast's Triton implementation under one plan for the GEMM."""
    operands = lora_operands(SHAPE, DTYPE, adapter_dtype, CPU)
    a, b = operands.lora_a, operands.lora_b

    def forward(x: Tensor) -> Tensor:
        weight, scaling = operands.weight, operands.scaling
        return lora_linear(x, weight, None, a, b, scaling, dropout_p=dropout_p, impl="triton")

    settings = {"adapters": short(adapter_dtype), "dropout": dropout_p}
    variant = OURS if plan == "fused" else f"peftfast, {plan} GEMM"
    return Case(variant, forward, operands.x, [a, b], [operands.dy], settings)


@counted("lora_linear", "one LoRA linear, forward + backward: frozen alone, PEFT, peftfast")
def count(say: Say) -> CountedReport:
    """Frozen alone; PEFT and peftfast with float32 and 16-bit adapters, dropout 0 and 0.1."""
    unit = SHAPE.rows * SHAPE.in_features * DTYPE.itemsize
    first, frozen = count_case(frozen_case(), unit, None)
    rows, targets = [first], []
    with plan_forced("fused"):
        for make in (peft_case, peftfast_case):
            for adapter_dtype in (torch.float32, DTYPE):
                for dropout_p in (0.0, 0.1):
                    case = make(adapter_dtype, dropout_p)
                    say(case.title)
                    row, _ = count_case(case, unit, frozen)
                    rows.append(row)
    with plan_forced("library"):  # what may be faster on newer GPUs: it moves y and dx twice more
        case = peftfast_case(DTYPE, 0.1, "library")
        say(case.title)
        rows.append(count_case(case, unit, frozen)[0])
    for row in rows:
        if row["variant"] == OURS:
            which = f"{row['adapters']} adapters, dropout {row['dropout']}"
            targets.append(Target(f"{which}: extra u", row["extra_u"], EXTRA_LIMIT))
            targets.append(Target(f"{which}: workspace u", row["workspace_u"], WORKSPACE_LIMIT))
    programs = programs_at_full_size()
    targets += _programs_targets(programs)
    return CountedReport({**SHAPE.as_dict(), "dtype": short(DTYPE)}, unit, rows, programs, targets)


def programs_at_full_size() -> dict[str, int]:
    """Programs of each kernel at M=8192, in=out=4096, r=16, bf16, on sm_90 with 132 SMs."""
    from peftfast_kernels import lora

    shape = FULL_SIZE
    return lora.programs(
        shape.rows, shape.in_features, shape.out_features, shape.rank, torch.bfloat16, ARCH, SMS
    )


def _programs_targets(programs: dict[str, int]) -> Iterator[Target]:
    for kernel, count in programs.items():
        what = f"programs of {kernel} at M={FULL_SIZE.rows}, 4096^2, sm_{ARCH}"
        yield Target(what, count, SMS, at_least=True)
