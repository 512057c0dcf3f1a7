"""The CUDA library on a GPU. What needs none is in test_cuda_sources.py."""

from __future__ import annotations

import shutil

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.native import library, nf4
from peftfast.reference import nf4 as reference
from tests.native import bnb
from tests.tolerance import assert_within

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GUARD = 64


@pytest.fixture(autouse=True)
def built_for_cuda() -> None:
    if reason := library.missing("cuda"):
        if shutil.which("nvcc"):
            pytest.fail(reason)
        pytest.skip(reason)


def on_gpu(q: bnb.Quantized, shift: int = 0) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """packed, `shift` bytes behind a boundary, and the statistics."""
    room = torch.zeros(q.packed.numel() + shift, dtype=torch.uint8, device="cuda")
    packed = room[shift:].copy_(q.packed)
    return packed, tuple(None if t is None else t.cuda() for t in q.statistics)


def guarded(count: int, dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, Tensor]:
    """NaN between two rows of sevens: the whole, and the part for a kernel to fill."""
    whole = torch.full((count + 2 * GUARD + shift,), 7.0, dtype=dtype, device="cuda")
    part = whole[GUARD + shift : GUARD + shift + count].fill_(float("nan"))
    return whole, part


def assert_guarded(whole: Tensor, part: Tensor) -> None:
    start = part.storage_offset()
    assert (whole[:start] == 7).all() and (whole[start + part.numel() :] == 7).all()


def dequantized(
    q: bnb.Quantized,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    packed_shift: int = 0,
    out_shift: int = 0,
) -> Tensor:
    packed, statistics = on_gpu(q, packed_shift)
    whole, out = guarded(q.shape.numel(), out_dtype, out_shift)
    nf4.dequantize(packed, *statistics, q.block_size, q.quant_type, dtype, out)
    assert_guarded(whole, out)
    return out.cpu().view(q.shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 1024, 4096])
@pytest.mark.parametrize("shape", [(1,), (1023,), (3, 1024), (129, 1031), (2048, 4096)])
def test_dequantized_bits_are_bitsandbytes(
    shape: tuple[int, ...], block_size: int, quant_type: str, nested: bool
) -> None:
    q = bnb.quantize(torch.randn(shape), block_size, quant_type, nested)
    for dtype in DTYPES:
        for out_dtype in {dtype, torch.float32}:
            found = dequantized(q, dtype, out_dtype)
            assert torch.equal(found, q.dequantized(dtype).to(out_dtype)), (dtype, out_dtype)


@pytest.mark.parametrize(("packed_shift", "out_shift"), [(1, 0), (0, 1), (8, 0), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_off_the_boundaries_of_vectors(
    dtype: torch.dtype, packed_shift: int, out_shift: int
) -> None:
    q = bnb.quantize(torch.randn(101, 1031), 64, "nf4", True)
    for out_dtype in {dtype, torch.float32}:
        found = dequantized(q, dtype, out_dtype, packed_shift, out_shift)
        assert torch.equal(found, q.dequantized(dtype).to(out_dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_bits_are_those_of_bitsandbytes_on_the_gpu(nested: bool) -> None:
    w = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
    packed, state = bnb_functional.quantize_4bit(
        w, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    statistics = (state.absmax, None, None, None)
    if nested:
        statistics = (state.absmax, state.state2.absmax, state.state2.code, state.offset)
    out = torch.full_like(w, float("nan"))
    nf4.dequantize(packed.view(-1), *statistics, 64, "nf4", torch.bfloat16, out)
    assert torch.equal(out, bnb_functional.dequantize_4bit(packed, state))


def test_dequantize_beyond_32_bits() -> None:
    n = (1 << 32) + 12345
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * n:
        pytest.skip("needs 13 GB of GPU memory")
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, device="cuda")
    scales = torch.rand(-(-n // 4096), device="cuda")
    out = torch.full((n,), float("nan"), dtype=torch.bfloat16, device="cuda")
    nf4.dequantize(packed, scales, None, None, None, 4096, "nf4", torch.bfloat16, out)
    for begin in (0, (1 << 32) - 8192, n // 4096 * 4096):
        count = min(16384, n - begin)
        expected = torch.empty(count, dtype=torch.bfloat16, device="cuda")
        part = packed[begin // 2 : (begin + count + 1) // 2]
        reference.dequantize(
            part, scales[begin // 4096 :], None, None, None, 4096, "nf4", torch.bfloat16, expected
        )
        assert torch.equal(out[begin : begin + count], expected)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out_features", "in_features", "block_size", "nested"),
    [
        (1024, 4096, 64, True),
        (4096, 14336, 64, True),
        (1000, 14368, 64, False),
        (97, 12320, 32, True),
        (512, 6144, 4096, True),
        (301, 96, 64, False),
        (77, 1023, 64, True),
        (64, 33, 32, False),
    ],
)
def test_gemv_is_within_tolerance(
    out_features: int,
    in_features: int,
    block_size: int,
    nested: bool,
    dtype: torch.dtype,
    rows: int,
) -> None:
    q = bnb.quantize(torch.randn(out_features, in_features), block_size, "nf4", nested)
    packed, statistics = on_gpu(q)
    x = torch.randn(rows, in_features, device="cuda", dtype=dtype)
    bias = torch.randn(out_features, device="cuda", dtype=dtype) if nested else None
    whole, flat = guarded(rows * out_features, dtype)
    out = flat.view(rows, out_features)
    nf4.gemv(x, packed, *statistics, block_size, "nf4", bias, out)
    assert_guarded(whole, flat)
    w = q.dequantized(dtype).cuda()
    truth = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert_within(out, F.linear(x, w, bias), truth)
    again = torch.full_like(out, float("nan"))
    nf4.gemv(x, packed, *statistics, block_size, "nf4", bias, again)
    assert torch.equal(out, again)


@pytest.mark.parametrize("shift", [1, 4, 15])
def test_gemv_off_the_boundaries_of_vectors(shift: int) -> None:
    q = bnb.quantize(torch.randn(130, 2048), 64, "nf4", True)
    packed, statistics = on_gpu(q, shift)
    x = torch.randn(3 * 2048 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(3, 2048)
    out = torch.full((3, 130), float("nan"), device="cuda", dtype=torch.bfloat16)
    nf4.gemv(x, packed, *statistics, 64, "nf4", None, out)
    w = q.dequantized(torch.bfloat16).cuda()
    assert_within(out, F.linear(x, w), F.linear(x.double(), w.double()))


def test_work_is_ordered_on_the_current_stream() -> None:
    q = bnb.quantize(torch.randn(512, 4096), 64, "nf4", True)
    ready, statistics = on_gpu(q)
    expected = q.dequantized(torch.bfloat16).cuda()
    packed = torch.zeros_like(ready)
    out = torch.empty_like(expected)
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy
        packed.copy_(ready)
        nf4.dequantize(packed, *statistics, 64, "nf4", torch.bfloat16, out)
        copy = out.clone()
    stream.synchronize()
    assert torch.equal(copy, expected)


def test_calls_are_captured_into_a_graph() -> None:
    q = bnb.quantize(torch.randn(512, 4096), 64, "nf4", True)
    packed, statistics = on_gpu(q)
    x = torch.randn(2, 4096, device="cuda", dtype=torch.bfloat16)
    w = torch.empty(512, 4096, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(2, 512, device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        nf4.dequantize(packed, *statistics, 64, "nf4", torch.bfloat16, w)
        nf4.gemv(x, packed, *statistics, 64, "nf4", None, y)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    packed.bitwise_xor_(0x0F)
    x.normal_()
    w.fill_(float("nan"))
    y.fill_(float("nan"))
    graph.replay()
    changed = torch.empty_like(w)
    reference.dequantize(packed, *statistics, 64, "nf4", torch.bfloat16, changed)
    assert torch.equal(w, changed)
    assert_within(y, F.linear(x, changed), F.linear(x.double(), changed.double()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_operands_on_another_than_the_current_device() -> None:
    q = bnb.quantize(torch.randn(64, 1024), 64, "nf4", False)
    packed, scales = q.packed.to("cuda:1"), q.statistics[0].to("cuda:1")
    out = torch.full((64, 1024), float("nan"), device="cuda:1", dtype=torch.bfloat16)
    with torch.cuda.device(0):
        nf4.dequantize(packed, scales, None, None, None, 64, "nf4", torch.bfloat16, out)
    assert torch.equal(out.cpu(), q.dequantized(torch.bfloat16))
