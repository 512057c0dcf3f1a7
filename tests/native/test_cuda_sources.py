"""The CUDA kernels from their own source, thread by thread on the host (see cuda_emulation.h): bits
against bitsandbytes, products against float64, and every access checked. A GPU's tests are in
test_cuda_gpu.py.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from peftfast.reference import nf4 as reference
from tests.native import bnb, cuda_emulation
from tests.native.cuda_emulation import Emulation, aligned_empty, copied
from tests.tolerance import assert_within

pytestmark = pytest.mark.skipif(
    cuda_emulation.compiler() is None, reason="the emulation needs a C++ compiler"
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CHUNK = 1024

drawn = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
dtypes = st.sampled_from(DTYPES)
block_sizes = st.sampled_from(reference.BLOCK_SIZES)
quant_types = st.sampled_from(("nf4", "fp4"))
seeds = st.integers(0, 999)


@pytest.fixture(scope="module")
def built_emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return Emulation(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulation(built_emulation: Emulation) -> Emulation:
    built_emulation.seed, built_emulation.sms, built_emulation.only = 1, 4, None
    return built_emulation


def quantized(
    shape: tuple[int, ...], block_size: int, quant_type: str, nested: bool, seed: int = 0
) -> bnb.Quantized:
    """Normal numbers, of somewhat different sizes a row."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    w *= 1 + torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return bnb.quantize(w, block_size, quant_type, nested)


def enough(rows: int, out_features: int, dtype: torch.dtype) -> int:
    """Output columns that make float32's error a mean over 64 sums or more, as the tolerance, a
    multiple of another implementation's error, means it; 16-bit results are good for one rounding.
    """
    return max(out_features, -(-64 // rows)) if dtype == torch.float32 else out_features


def run_dequantize(
    emulation: Emulation,
    q: bnb.Quantized,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    packed_shift: int = 0,
    out_shift: int = 0,
) -> Tensor:
    """The kernel's values, after all that the emulation can find was found absent."""
    out = aligned_empty(q.shape.numel(), out_dtype, out_shift).fill_(float("nan"))
    packed = copied(q.packed, packed_shift)
    status = emulation.dequantize(packed, q.statistics, q.block_size, q.quant_type, dtype, out)
    assert status == 0
    assert emulation.report == ""
    assert emulation.writes == (1, 1)
    return out.view(q.shape)


def run_gemv(
    emulation: Emulation, x: Tensor, q: bnb.Quantized, bias: Tensor | None, packed_shift: int = 0
) -> Tensor:
    out = torch.full((x.shape[0], q.shape[0]), float("nan"), dtype=x.dtype)
    status = emulation.gemv(
        copied(x), copied(q.packed, packed_shift), q.statistics, q.block_size, q.quant_type, bias,
        out,
    )  # fmt: skip
    assert status == 0
    assert emulation.report == ""
    assert emulation.writes == (1, 1)
    return out


def check_gemv(
    emulation: Emulation, q: bnb.Quantized, rows: int, dtype: torch.dtype, biased: bool, seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, q.shape[1], generator=generator).to(dtype)
    bias = torch.randn(q.shape[0], generator=generator).to(dtype) if biased else None
    out = run_gemv(emulation, x, q, bias)
    w = q.dequantized(dtype)
    truth = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert_within(out, F.linear(x, w, bias), truth)
    return out


# What a launch of 4 SMs' blocks takes at once is 160 chunks of 1024 elements.
sizes = st.one_of(
    st.integers(1, 3 * CHUNK), st.integers(1, 12).map(lambda n: n * CHUNK), st.just(165 * CHUNK + 7)
)


@drawn
@given(sizes, dtypes, block_sizes, quant_types, st.booleans(), st.booleans(), seeds)
def test_dequantized_bits_are_bitsandbytes(
    emulation: Emulation,
    n: int,
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
    nested: bool,
    wide: bool,
    seed: int,
) -> None:
    emulation.seed = seed
    q = quantized((n,), block_size, quant_type, nested, seed)
    out_dtype = torch.float32 if wide else dtype
    found = run_dequantize(emulation, q, dtype, out_dtype)
    assert torch.equal(found, q.dequantized(dtype).to(out_dtype))
    suffix = "" if out_dtype == dtype else "_fp32"
    assert emulation.kernel == f"pf_nf4_dequantize_{NAMES[dtype]}{suffix}"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", reference.BLOCK_SIZES)
def test_dequantize_with_every_block_size(
    emulation: Emulation, block_size: int, dtype: torch.dtype, nested: bool
) -> None:
    q = quantized((9 * CHUNK + 333,), block_size, "nf4", nested)
    for out_dtype in {dtype, torch.float32}:
        found = run_dequantize(emulation, q, dtype, out_dtype)
        assert torch.equal(found, q.dequantized(dtype).to(out_dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("sms", [1, 2])
def test_dequantize_takes_many_chunks_a_warp(emulation: Emulation, nested: bool, sms: int) -> None:
    emulation.sms = sms
    q = quantized((401, 1031), 64, "nf4", nested)
    found = run_dequantize(emulation, q, torch.bfloat16, torch.bfloat16)
    assert torch.equal(found, q.dequantized(torch.bfloat16))
    assert emulation.blocks == 5 * sms


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("packed_shift", "out_shift"), [(1, 0), (0, 1), (8, 0), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1500, 2049])
def test_dequantize_off_the_boundaries_of_vectors(
    emulation: Emulation,
    n: int,
    dtype: torch.dtype,
    packed_shift: int,
    out_shift: int,
    quant_type: str,
) -> None:
    q = quantized((n,), 128, quant_type, True)
    for out_dtype in {dtype, torch.float32}:
        found = run_dequantize(emulation, q, dtype, out_dtype, packed_shift, out_shift)
        assert torch.equal(found, q.dequantized(dtype).to(out_dtype))
        assert emulation.kernel == "pf_nf4_dequantize_any"


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scales_round_as_torch_does(
    emulation: Emulation, value: float, dtype: torch.dtype
) -> None:
    q = quantized((4096,), 64, "nf4", False)
    q.statistics[0][::3] = value
    expected = torch.empty(4096, dtype=dtype)
    reference.dequantize(q.packed, *q.statistics, 64, "nf4", dtype, expected)
    found = run_dequantize(emulation, q, dtype, dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@drawn
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 20).map(lambda n: 32 * n),
    dtypes,
    block_sizes,
    quant_types,
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_gemv_is_within_tolerance(
    emulation: Emulation,
    rows: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
    nested: bool,
    biased: bool,
    seed: int,
) -> None:
    emulation.seed = seed
    columns = enough(rows, out_features, dtype)
    q = quantized((columns, in_features), block_size, quant_type, nested, seed)
    check_gemv(emulation, q, rows, dtype, biased, seed)
    eights = "" if dtype == torch.float32 else "_8" if rows <= 8 else "_16"
    assert emulation.kernel == f"pf_nf4_gemv_{NAMES[dtype]}{eights}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "block_size"),
    [
        (1, 20, 4096, 64),  # as models have it
        (2, 33, 2048, 128),  # one round of all warps
        (9, 5, 2080, 64),  # blocks straddle rows, and a round begins anew
        (5, 17, 12320, 32),  # scales in three segments, the last one short
        (3, 2, 14336 + 32, 64),  # a second segment, blocks of which straddle rows
        (4, 3, 20000, 32),  # four
        (3, 20, 480, 128),  # rows of four blocks that are cut into five
        (5, 1, 4096, 4096),  # a block a row
        (2, 6, 6144, 4096),  # blocks of one row and a half
    ],
)
def test_gemv_over_rounds_and_segments(
    emulation: Emulation,
    rows: int,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    for nested in (False, True):
        columns = enough(rows, out_features, dtype)
        q = quantized((columns, in_features), block_size, "nf4", nested)
        check_gemv(emulation, q, rows, dtype, nested, 3)
        assert emulation.kernel.startswith(f"pf_nf4_gemv_{NAMES[dtype]}")


@drawn
@given(
    st.integers(1, 10),
    st.integers(1, 20),
    st.integers(1, 300).filter(lambda n: n % 32),
    dtypes,
    block_sizes,
    quant_types,
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_gemv_of_any_row_length(
    emulation: Emulation,
    rows: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
    nested: bool,
    biased: bool,
    seed: int,
) -> None:
    emulation.seed = seed
    columns = enough(rows, out_features, dtype)
    q = quantized((columns, in_features), block_size, quant_type, nested, seed)
    check_gemv(emulation, q, rows, dtype, biased, seed)
    assert emulation.kernel == "pf_nf4_gemv_any"


@pytest.mark.parametrize("in_features", [1, 2, 16, 31, 33, 48, 272])
def test_gemv_of_rows_that_are_no_run_of_vectors(emulation: Emulation, in_features: int) -> None:
    for dtype in DTYPES:
        q = quantized((70, in_features), 32, "nf4", True)
        check_gemv(emulation, q, 2, dtype, True, 1)
        assert emulation.kernel == "pf_nf4_gemv_any"


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemv_off_the_boundaries_of_vectors(emulation: Emulation, dtype: torch.dtype) -> None:
    q = quantized((7, 128), 64, "nf4", True)
    x = torch.randn(3, 128).to(dtype)
    expected = run_gemv(emulation, x, q, None)
    found = run_gemv(emulation, x, q, None, packed_shift=1)
    assert emulation.kernel == "pf_nf4_gemv_any"
    w = q.dequantized(dtype)
    truth = x.double() @ w.double().t()
    assert_within(found, x @ w.t(), truth)
    assert_within(expected, x @ w.t(), truth)


def test_the_order_in_which_threads_run_changes_nothing(emulation: Emulation) -> None:
    q = quantized((19, 2080), 64, "nf4", True)
    for dtype in DTYPES:
        for rows in (1, 11):
            x = torch.randn(rows, 2080).to(dtype)
            results = []
            for seed in range(4):
                emulation.seed = 100 + seed
                results.append(run_gemv(emulation, x, q, None))
            assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty_operands_launch_nothing(emulation: Emulation) -> None:
    q = quantized((4, 32), 32, "nf4", True)
    assert emulation.dequantize(
        q.packed[:0], q.statistics, 32, "nf4", torch.bfloat16, torch.empty(0, dtype=torch.bfloat16)
    ) == 0  # fmt: skip
    for rows, columns in ((0, 4), (3, 0)):
        x, out = torch.randn(rows, 32), torch.empty(rows, columns)
        assert emulation.gemv(x, q.packed, q.statistics, 32, "nf4", None, out) == 0
    assert emulation.kernel == ""


def test_gemv_without_columns_is_the_bias(emulation: Emulation) -> None:
    q = quantized((4, 32), 32, "nf4", False)
    bias, out = torch.randn(4), torch.full((3, 4), float("nan"))
    empty = (q.statistics[0][:0], None, None, None)
    assert emulation.gemv(torch.empty(3, 0), q.packed[:0], empty, 32, "nf4", bias, out) == 0
    assert torch.equal(out, bias.expand(3, 4))


def sparse(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which only pages that are touched take memory."""
    try:
        room = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | 0x4000)  # NORESERVE
    except OSError as error:
        pytest.skip(f"no room for {count * dtype.itemsize} bytes of addresses: {error}")
    return torch.frombuffer(room, dtype=dtype)


def test_dequantize_beyond_32_bits(emulation: Emulation) -> None:
    """The last elements of more than 2**33; one block of a launch on very many SMs runs."""
    n = (1 << 33) + 5 * CHUNK + 777
    emulation.sms = 60_000
    chunks, warps = n // CHUNK, emulation.sms * 5 * 8
    owner = chunks % warps // 8
    assert (chunks - 5) % warps // 8 == owner
    emulation.only = (owner, 0)
    begin, whole = (chunks - 5) * CHUNK, (n + 63) // 64
    packed, out = sparse((n + 1) // 2, torch.uint8), sparse(n, torch.bfloat16)
    codes, outer = sparse(whole, torch.uint8), sparse(-(-whole // 256), torch.float32)
    packed[begin // 2 :] = torch.randint(0, 256, packed[begin // 2 :].shape, dtype=torch.uint8)
    codes[begin // 64 :] = torch.randint(0, 256, codes[begin // 64 :].shape, dtype=torch.uint8)
    outer[begin // 64 // 256 :] = 0.5
    code, offset = reference.nested_code(torch.device("cpu")), torch.tensor(0.25)
    assert 0 == emulation.dequantize(
        packed, (codes, outer, code, offset), 64, "nf4", torch.bfloat16, out
    )
    assert emulation.report == ""
    expected = torch.empty(n - begin, dtype=torch.bfloat16)
    reference.dequantize(
        packed[begin // 2 :], codes[begin // 64 :], outer[begin // 64 // 256 :], code, offset, 64,
        "nf4", torch.bfloat16, expected,
    )  # fmt: skip
    assert torch.equal(out[begin:], expected)


@pytest.mark.parametrize("in_features", [8192, 8191])
def test_gemv_beyond_32_bits(emulation: Emulation, in_features: int) -> None:
    """The last rows of a weight of more than 2**32 elements; one block runs."""
    rows = 600_000
    count = rows * in_features
    whole = -(-count // 64)
    packed, scales = sparse(-(-count // 2), torch.uint8), sparse(whole, torch.float32)
    first = rows - 16
    begin = first * in_features
    assert begin > 1 << 32
    packed[begin // 2 :] = torch.randint(0, 256, packed[begin // 2 :].shape, dtype=torch.uint8)
    scales[begin // 64 :] = torch.rand(scales[begin // 64 :].shape) + 0.5
    x, out = torch.randn(2, in_features), torch.full((2, rows), float("nan"))
    emulation.only = (0, rows // 16 - 1) if in_features % 32 == 0 else (rows // 8 - 1, 0)
    assert emulation.gemv(x, packed, (scales, None, None, None), 64, "nf4", None, out) == 0
    assert emulation.report == ""
    last = out[:, -8:]
    assert not last.isnan().any()
    elements = torch.arange((rows - 8) * in_features, count)
    both = packed[elements // 2]
    codes = torch.where(elements % 2 == 0, both >> 4, both & 15).int()
    w = reference.table("nf4", torch.device("cpu"))[codes] * scales[elements // 64]
    w = w.view(8, in_features)
    assert_within(last, x @ w.t(), x.double() @ w.double().t())


BAD = [
    ("block_size", 48, -4),
    ("block_size", 16, -4),
    ("block_size", 8192, -4),
    ("block_size", 0, -4),
    ("block_size", -64, -4),
    ("quant_type", 2, -5),
    ("value_dtype", 3, -6),
    ("value_dtype", -1, -6),
    ("out_dtype", 1, -6),
    ("n", -1, -3),
    ("n", (1 << 62) + 1, -8),
    ("packed", None, -1),
    ("absmax", None, -1),
    ("out", None, -1),
    ("nested_code", None, -2),
    ("nested_absmax", None, -2),
    ("offset", None, -2),
    ("out", 1, -7),
    ("nested_absmax", 2, -7),
]


@pytest.mark.parametrize(("name", "value", "status"), BAD)
def test_a_bad_argument_has_a_status_with_words(
    emulation: Emulation, name: str, value: int | None, status: int
) -> None:
    q = quantized((64,), 64, "nf4", True)
    tensors = dict(
        zip(("absmax", "nested_absmax", "nested_code", "offset"), q.statistics, strict=True)
    )
    tensors |= {"packed": q.packed, "out": torch.empty(64, dtype=torch.bfloat16)}
    arguments = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    arguments |= {"n": 64, "block_size": 64, "quant_type": 0, "value_dtype": 2, "out_dtype": 2}
    offset_only = isinstance(value, int) and name in tensors
    arguments[name] = arguments[name] + value if offset_only else value
    order = ["packed", "absmax", "nested_absmax", "nested_code", "offset", "n", "block_size"]
    order += ["quant_type", "value_dtype", "out_dtype", "out"]
    found = emulation.library.pf_cuda_nf4_dequantize(*(arguments[key] for key in order), None)
    assert found == status
    words = emulation.library.pf_cuda_error(found).decode()
    assert words != emulation.library.pf_cuda_error(-99).decode()
    assert name.split("_")[-1] in words or status in (-1, -3, -7, -8)


def test_a_bad_size_of_gemv(emulation: Emulation) -> None:
    q = quantized((2, 64), 64, "nf4", True)
    x, out = torch.randn(1, 64), torch.empty(1, 2)
    statistics = [t.data_ptr() for t in q.statistics]

    def status(m: int, n: int, k: int, dtype: int = 0, x: int = x.data_ptr()) -> int:
        return emulation.library.pf_cuda_nf4_gemv(
            x, q.packed.data_ptr(), *statistics, m, n, k, 64, 0, dtype, None, out.data_ptr(), None
        )

    assert [status(-1, 2, 64), status(1, -2, 64), status(1, 2, -64)] == [-3, -3, -3]
    assert status(1, 2, 64, dtype=4) == -6
    assert status(1 << 40, 1 << 40, 64) == status(1, 1 << 60, 64) == -8
    assert status(1 << 60, 1, 64) == -8
    assert status(1, 2, 64, x=x.data_ptr() + 2) == -7
    assert status(1, 2, 64, x=0) == -1


def test_errors_of_cuda_come_through(emulation: Emulation) -> None:
    q = quantized((64,), 64, "nf4", True)
    out = torch.empty(64, dtype=torch.bfloat16)
    emulation.dequantize(q.packed, q.statistics, 64, "nf4", torch.bfloat16, out)
    emulation.library.pf_emulation_fail(709)
    arguments = [q.packed.data_ptr(), *(t.data_ptr() for t in q.statistics)]
    status = emulation.library.pf_cuda_nf4_dequantize(
        *arguments, 64, 64, 0, 2, 2, out.data_ptr(), None
    )
    assert status == 709
    assert emulation.library.pf_cuda_error(709) == b"an error of CUDA's"
    assert emulation.library.pf_cuda_error(0) == b"no error"
    emulation.library.pf_emulation_fail(0)


def test_reading_behind_the_operands_would_be_noticed(emulation: Emulation) -> None:
    q = quantized((3000,), 64, "nf4", True)
    out = torch.empty(3000, dtype=torch.bfloat16)
    shorter = (q.statistics[0][:-1], *q.statistics[1:])
    emulation.dequantize(copied(q.packed), shorter, 64, "nf4", torch.bfloat16, out)
    assert "a read of 1 bytes out of bounds" in emulation.report


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = Path(cuda_emulation.HERE, "faulty_kernels.cu")
    library = cuda_emulation.build(source, tmp_path_factory.mktemp("faulty"))
    library.run.argtypes = [ctypes.c_void_p] * 3
    return library


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("sound", ""),
        ("reads_outside", "a read of 1 bytes out of bounds (block 0, 0, thread 63)"),
        ("writes_outside", "a write of 4 bytes out of bounds (block 0, 0, thread 63)"),
        ("reads_off_a_boundary", "a read of 16 bytes off its boundary"),
        ("writes_an_input", "a write of 1 bytes into what is only read"),
        ("shuffles_in_a_branch", "threads wait for others that do not come"),
        ("diverges", "lanes of a warp are at different operations"),
        ("leaves_before_a_barrier", "threads wait for others that do not come"),
        ("writes_behind_shared_memory", "a write behind an array of shared memory"),
        ("writes_twice", ""),
        ("lacks_a_barrier", ""),
        ("does_not_wait_for_a_copy", ""),
    ],
)
def test_the_emulation_finds_faults(faulty: ctypes.CDLL, kernel: str, fault: str) -> None:
    values = copied(torch.arange(64, dtype=torch.uint8))
    out = torch.zeros(64, dtype=torch.int32)
    faulty.pf_emulation_begin(1, 4)
    faulty.pf_emulation_range(values.data_ptr(), 64, 0, 0)
    faulty.pf_emulation_range(out.data_ptr(), 256, 1, 1)
    faulty.run(getattr(faulty, kernel), values.data_ptr(), out.data_ptr())
    report = faulty.pf_emulation_report().decode()
    if fault:
        assert fault in report
        return
    assert report == ""
    least, most = ctypes.c_int(), ctypes.c_int()
    faulty.pf_emulation_writes(out.data_ptr(), ctypes.byref(least), ctypes.byref(most))
    assert (least.value, most.value) == ((0, 2) if kernel == "writes_twice" else (1, 1))
    # What was read too early is rubbish.
    expected = torch.arange(64, dtype=torch.int32).flip(0)
    assert torch.equal(out, expected) == (kernel == "sound")
    if kernel in ("lacks_a_barrier", "does_not_wait_for_a_copy"):
        assert (out == -0x24242425).any()
