"""Kernels of 4-bit weights: bits against bitsandbytes, few rows against float64, and what their
launches are on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftfast.reference import nf4 as reference
from peftfast_kernels import nf4, tiles, workspace
from peftfast_kernels.launch import Launch, recording
from peftfast_kernels.nf4_quantize import quantize_absmax, quantize_blocks
from tests.tolerance import assert_within

bnb = pytest.importorskip("tests.native.bnb", reason="bitsandbytes is not installed")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LOW = torch.bfloat16 if CUDA else torch.float16
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def _draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal weights with a wide spread of scales, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    n = torch.Size(shape).numel()
    spread = 4.0 ** torch.randint(-4, 3, (n // 32 + 1,), generator=generator)
    w = torch.randn(n, generator=generator) * spread.repeat_interleave(32)[:n]
    return w.view(shape).to(dtype)


def _parts(weight: bnb.Quantized) -> tuple[Tensor | None, ...]:
    """The operands of the kernels that say what a weight is, up to its block size."""
    parts = (weight.packed, *weight.statistics)
    return tuple(None if part is None else part.to(DEVICE) for part in parts)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 33),
    columns=st.integers(1, 220),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.float16, torch.float16),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
        ]
    ),
    seed=st.integers(0, 1 << 20),
)
def test_values_are_those_of_bitsandbytes(
    rows: int,
    columns: int,
    block_size: int,
    quant_type: str,
    nested: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    dtype, stored = dtypes
    w = _draw((rows, columns), dtype, seed)
    weight = bnb.quantize(w, block_size, quant_type, nested)
    out = torch.full(w.shape, torch.nan, dtype=stored, device=DEVICE)
    nf4.dequantize(*_parts(weight), block_size, quant_type, dtype, out)
    assert torch.equal(out.cpu(), weight.dequantized(dtype).to(stored))


@pytest.mark.skipif(CUDA, reason="on a GPU weights are quantised by its own rules")
@settings(max_examples=40)
@given(
    n=st.integers(1, 9000),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    coarse=st.booleans(),
    zeros=st.integers(0, 200),
    seed=st.integers(0, 1 << 20),
)
def test_codes_are_those_of_bitsandbytes_on_a_cpu(
    n: int,
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
    coarse: bool,
    zeros: int,
    seed: int,
) -> None:
    w = _draw((n,), dtype, seed)
    if coarse:  # multiples of 1/24 hit the midpoints of FP4's table
        w = (w.float().clamp(-1, 1) * 24).round().div(24).to(dtype)
    w[:zeros] = 0
    weight = bnb.quantize(w, block_size, quant_type, nested=False)
    packed, absmax = quantize_blocks(w, block_size, quant_type)
    assert torch.equal(packed, weight.packed)
    assert torch.equal(absmax, weight.statistics[0])


@pytest.mark.skipif(CUDA, reason="on a GPU weights are quantised by its own rules")
@settings(max_examples=40)
@given(count=st.integers(1, 1500), zeros=st.integers(0, 600), seed=st.integers(0, 1 << 20))
def test_scales_codes_are_those_of_bitsandbytes_on_a_cpu(count: int, zeros: int, seed: int) -> None:
    values = _draw((count,), torch.float32, seed)
    values[:zeros] = 0
    code = reference.nested_code(torch.device("cpu"))
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    codes, nested_absmax = quantize(values, code, 256)
    ours = quantize_absmax(values, code)
    assert torch.equal(ours[0], codes)
    assert torch.equal(ours[1], nested_absmax)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # blocks past the end
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "block_size"), [(4096, 64), (1000, 64), (777, 32), (9001, 4096)])
def test_gpu_rules(n: int, block_size: int, quant_type: str) -> None:
    w = _draw((n,), torch.float32, n).to(DEVICE)
    w[::3] = (w[::3] * 24).round() / 24
    w[:2] = torch.tensor([-1e-30, 0.0])  # FP4 has a negative zero there
    packed, absmax = quantize_blocks(w, block_size, quant_type, gpu_rules=True)
    expected = reference.quantize_blocks(w, block_size, quant_type, gpu_rules=True)
    assert torch.equal(absmax, expected[1])
    if CUDA:  # hardware's reciprocal is one unit in the last place off, where it decides
        assert (packed != expected[0]).float().mean() < 1e-3
    else:
        assert torch.equal(packed, expected[0])
    code = reference.nested_code(w.device)
    values = absmax.repeat(40) * torch.linspace(-1, 1, 40 * len(absmax), device=DEVICE)
    codes, nested_absmax = quantize_absmax(values, code, gpu_rules=True)
    wanted = reference.quantize_absmax(values, code, gpu_rules=True)
    assert torch.equal(nested_absmax, wanted[1])
    assert (codes != wanted[0]).float().mean() <= (1e-3 if CUDA else 0)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_block_of_zeros_has_codes_of_zero_on_a_gpu(quant_type: str) -> None:
    # 0 / 0 is no number, which every comparison of bitsandbytes' kernels sends to code 0.
    w = torch.zeros(64, device=DEVICE)
    packed, absmax = quantize_blocks(w, 64, quant_type, gpu_rules=True)
    assert not packed.any() and not absmax.any()
    codes, nested_absmax = quantize_absmax(w, reference.nested_code(w.device), gpu_rules=True)
    assert not codes.any() and not nested_absmax.any()


def _outputs(
    rows: int,
    shape: tuple[int, int],
    block_size: int,
    quant_type: str,
    nested: bool,
    bias: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The kernel's output, eager PyTorch's, float64's, and the workspaces."""
    weight = bnb.quantize(_draw(shape, dtype, rows), block_size, quant_type, nested)
    w = weight.dequantized(dtype).to(DEVICE)
    x = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
    b = torch.randn(shape[0], device=DEVICE).to(dtype) if bias else None
    out = torch.full((rows, shape[0]), torch.nan, dtype=dtype, device=DEVICE)
    with workspace.observe() as workspaces:
        nf4.gemv(x, *_parts(weight), block_size, quant_type, b, out)
    truth = x.double() @ w.double().t()
    return (
        out,
        torch.nn.functional.linear(x, w, b),
        truth if b is None else truth + b.double(),
        workspaces,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(
    ("rows", "shape", "block_size", "quant_type", "nested", "bias"),
    [
        (1, (64, 64), 64, "nf4", True, True),
        (3, (33, 7), 32, "fp4", True, False),  # rows that start within a byte
        (2, (40, 257), 128, "fp4", False, True),
        (5, (17, 96), 64, "nf4", True, True),  # blocks that straddle rows
        (4, (16, 160), 4096, "nf4", False, False),  # one block
        (1, (1, 1), 64, "nf4", True, False),
        (17, (48, 128), 256, "fp4", True, True),  # more rows than a tile has
    ],
)
def test_few_rows_against_float64(
    rows: int,
    shape: tuple[int, int],
    block_size: int,
    quant_type: str,
    nested: bool,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    out, eager, truth, _ = _outputs(rows, shape, block_size, quant_type, nested, bias, dtype)
    assert_within(out, eager, truth)  # fmt: skip


@pytest.mark.parametrize("shape", [(20, 4096), (20, 2081)])
def test_a_narrow_linear_splits_its_depth(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = workspace.allocate
    monkeypatch.setattr(workspace, "allocate", lambda *a: allocate(*a).fill_(torch.nan))
    out, eager, truth, workspaces = _outputs(9, shape, 64, "nf4", True, True, LOW)
    assert [v.shape[1:] for v in workspaces] == [(9, 20)] and workspaces[0].shape[0] > 1
    assert_within(out, eager, truth)


def test_nothing_to_do() -> None:
    empty = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    scales = torch.empty(0, device=DEVICE)
    nf4.dequantize(empty, scales, None, None, None, 64, "nf4", torch.float32, scales)
    packed, absmax = quantize_blocks(scales, 64, "nf4")
    assert packed.numel() == absmax.numel() == 0
    codes, nested_absmax = quantize_absmax(scales, reference.nested_code(scales.device))
    assert codes.numel() == nested_absmax.numel() == 0
    x, out = torch.empty(2, 0, device=DEVICE), torch.full((2, 3), torch.nan, device=DEVICE)
    bias = torch.arange(3.0, device=DEVICE)
    nf4.gemv(x, empty, scales, None, None, None, 64, "nf4", bias, out)
    assert torch.equal(out, bias.expand(2, 3))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    n, extra = 1 << 31, 4096 + 40
    packed = torch.randint(256, ((n + extra) // 2,), dtype=torch.uint8, device=DEVICE)
    absmax = torch.rand((n + extra + 63) // 64, device=DEVICE)
    out = torch.full((n + extra,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    plain = (None, None, None, 64, "nf4", torch.bfloat16)
    nf4.dequantize(packed, absmax, *plain, out)
    for start in (0, n - 4096, n):
        end = min(start + 4096, n + extra)
        expected = torch.empty(end - start, dtype=torch.bfloat16, device=DEVICE)
        part = (packed[start // 2 : end // 2], absmax[start // 64 : (end + 63) // 64])
        reference.dequantize(*part, *plain, expected)
        assert torch.equal(out[start:end], expected)


# What is launched on a GPU


def _launches(rows: int, columns: int, depth: int, arch: int = 90) -> list[Launch]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n = columns * depth
    packed = empty(n // 2, dtype=torch.uint8)
    scales = (empty(n // 64, dtype=torch.uint8), empty(n // 64 // 256), empty(256), empty())
    x, out = (empty(rows, k, dtype=torch.bfloat16) for k in (depth, columns))
    with recording(arch, sm_count=132) as launches:
        nf4.dequantize(packed, *scales, 64, "nf4", x.dtype, empty(n, dtype=x.dtype))
        nf4.gemv(x, packed, *scales, 64, "nf4", None, out)
    return launches


@pytest.mark.parametrize(("columns", "depth"), [(4096, 4096), (14336, 4096), (4096, 14336)])
def test_one_launch_fills_a_gpu_of_132_processors(columns: int, depth: int) -> None:
    launches = _launches(1, columns, depth)
    assert [launch.name for launch in launches] == ["_nf4_dequantize_kernel", "_nf4_gemv_kernel"]
    assert all(launch.programs >= 132 for launch in launches)


def test_a_narrow_linear_fills_it_with_splits() -> None:
    _, product, total = _launches(1, 1024, 4096)
    assert product.programs >= 0.9 * 132 and total.name == "_split_reduce_kernel"


@pytest.mark.parametrize("arch", tiles.ARCHES)
def test_the_rule_for_few_rows(arch: int) -> None:
    rows = tiles.few_rows(arch, 2, 4096)
    assert rows in (8, 16)  # no more than one tile of x
    assert tiles.gemv_tile(rows, 4096, 2, True, 132).block_m >= rows
    assert tiles.few_rows(arch, 4, 4096) == 8
    assert tiles.few_rows(arch, 2, 4097) == 0
    assert nf4.few_rows(torch.device(DEVICE), torch.float32, 4097, 4096) == 0


_COMPILE = """
import json, re, subprocess, tempfile, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peftfast_kernels import nf4
code = {}
for v in nf4.aot_variants(80):
    if v.constexprs.get("NESTED") and v.name not in code:
        source = ASTSource(v.kernel, dict(v.signature), dict(v.constexprs), dict(v.attrs))
        options = {"num_warps": v.num_warps, "num_stages": v.num_stages}
        compiled = triton.compile(source, GPUTarget("cuda", 80, 32), options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            listing = subprocess.run(
                [knobs.nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True
            ).stdout
        line = r"^ +/[*][0-9a-f]{4,}[*]/ +(?:@!?P[0-9T] +)?(.*?);"
        code[v.name] = re.findall(line, listing, re.M)
print(json.dumps(code))
"""


def test_machine_code() -> None:
    """No fused multiply-add joins the product and the offset of a scale, and memory is read and
    written in wide accesses.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    code = {
        name: [line.replace(".reuse", "").split() for line in lines]
        for name, lines in json.loads(ran.stdout).items()
    }
    for name in ("_nf4_dequantize_kernel", "_nf4_gemv_kernel"):
        fused = [line for line in code[name] if line[0] == "FFMA"]
        assert fused and all(line[-1] == "RZ" for line in fused), name
    dequantize = [line[0] for line in code["_nf4_dequantize_kernel"]]
    # A thread has 32 elements: four words, each of which makes a store of 16 bytes.
    assert dequantize.count("STG.E.128") == 4
    assert not any(op.startswith("STG") and op != "STG.E.128" for op in dequantize)
    assert sum(op == "LDS" for op in dequantize) == 32  # one look-up an element
    assert len(dequantize) < 10 * 32
    gemv = [line[0] for line in code["_nf4_gemv_kernel"]]
    assert gemv.count("LDG.E.128") >= 2 and "HMMA.16816.F32.BF16" in gemv
