"""The LoRA linear on a CPU: the reference's steps, and the dtype of its GEMMs."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from peftfast.native import lora
from peftfast.reference import lora as reference
from tests.tolerance import assert_within

CPU = torch.device("cpu")
M, K, N, R = 33, 100, 48, 4


def draw(dtype: torch.dtype, adapters: torch.dtype) -> tuple[Any, ...]:
    """Two linears over one x, three adapters, two of them with dropout."""
    x = torch.randn(M, K).to(dtype)
    weights = [torch.randn(N, K).to(dtype) for _ in range(2)]
    biases = [torch.randn(N).to(dtype), None]
    lora_a = [torch.randn(R, K).to(adapters) for _ in range(3)]
    lora_b = [torch.randn(N, R).to(adapters) for _ in range(3)]
    seed = torch.tensor([3, 4, 5])
    return x, weights, biases, lora_a, lora_b, [0, 1, 1], [0.5, 1.5, 2.0], [0.3, 0.0, 0.1], seed


def results(module: Any, operands: tuple[Any, ...], dys: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, bottleneck and every gradient."""
    ys, t = module.lora_linear_forward(*operands)
    needs = (True, [True] * 2, [True, False], [True] * 3, [True] * 3)
    return [*ys, t, *module.lora_linear_backward(dys, t, *operands, *needs)]


def test_in_float32_the_bits_are_the_references() -> None:
    operands = draw(torch.float32, torch.float32)
    dys = [torch.randn(M, N) for _ in range(2)]
    for found, truth in zip(
        results(lora, operands, dys), results(reference, operands, dys), strict=True
    ):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32", "narrow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_within_the_tolerance(
    dtype: torch.dtype, adapters: torch.dtype | None
) -> None:
    operands = draw(dtype, adapters or dtype)
    dys = [torch.randn(M, N).to(dtype) for _ in range(2)]

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(v) for v in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floating else value

    found, eager = results(lora, operands, dys), results(reference, operands, dys)
    truth = results(reference, tuple(wide(o) for o in operands), wide(dys))
    for i, parts in enumerate(zip(found, eager, truth, strict=True)):
        assert_within(*parts, what=f"result {i}")
        assert parts[0].dtype == parts[1].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_left(dtype: torch.dtype) -> None:
    assert lora.gemm_dtype(dtype, CPU) == dtype


def test_other_devices_are_left() -> None:
    assert lora.gemm_dtype(torch.bfloat16, torch.device("cuda", 0)) == torch.bfloat16


@pytest.mark.parametrize(
    ("bf16", "amx", "fp16", "expected"),
    [
        (False, False, False, (torch.float32, torch.float32)),
        (True, False, False, (torch.bfloat16, torch.float32)),
        (False, True, False, (torch.bfloat16, torch.float32)),
        (True, True, True, (torch.bfloat16, torch.float16)),
    ],
)
def test_instructions_of_an_x86_cpu_decide(
    bf16: bool, amx: bool, fp16: bool, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fp16)
    lora.gemm_dtype.cache_clear()
    try:
        assert lora.gemm_dtype(torch.bfloat16, CPU) == expected[0]
        assert lora.gemm_dtype(torch.float16, CPU) == expected[1]
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        lora.gemm_dtype.cache_clear()
        assert lora.gemm_dtype(torch.bfloat16, CPU) == torch.float32
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        lora.gemm_dtype.cache_clear()
        assert lora.gemm_dtype(torch.float16, CPU) == torch.float16
    finally:
        lora.gemm_dtype.cache_clear()
