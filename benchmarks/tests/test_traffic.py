# mypy: disable-error-code="no-untyped-def"
"""The counter against operators and kernels whose bytes are known by hand."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from benchmarks.counting import SECTOR_BYTES, SectorSet, Tally, TrafficCounter
from peftfast_kernels import workspace


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def _strided_copy_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets * stride))


@triton.jit
def _add_row_kernel(x_ptr, row_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) + row)


@triton.jit
def _atomic_sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.atomic_add(y_ptr + tl.arange(0, BLOCK), x, mask=mask)


@triton.jit
def _atomic_cas_kernel(lock_ptr):
    tl.atomic_cas(lock_ptr, 0, 1)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, k, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    accumulator = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + rows[:, None] * k + columns[None, :])
        b = tl.load(b_ptr + columns[:, None] * BLOCK + rows[None, :])
        accumulator += tl.dot(a, b)
    tl.store(c_ptr + rows[:, None] * BLOCK + rows[None, :], accumulator)


@triton.jit
def _block_pointer_copy_kernel(x_ptr, y_ptr, m, n, BLOCK: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (m, n), (n, 1), (0, 0), (BLOCK, BLOCK), (1, 0))
    y = tl.make_block_ptr(y_ptr, (m, n), (n, 1), (0, 0), (BLOCK, BLOCK), (1, 0))
    tl.store(y, tl.load(x, boundary_check=(0, 1)), boundary_check=(0, 1))


@triton.jit
def _descriptor_copy_kernel(x_ptr, y_ptr, m, n, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [m, n], [n, 1], [BLOCK, BLOCK])
    y = tl.make_tensor_descriptor(y_ptr, [m, n], [n, 1], [BLOCK, BLOCK])
    y.store([0, 0], x.load([0, 0]))


def _aligned(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.rand(n).to(dtype)
    assert tensor.data_ptr() % SECTOR_BYTES == 0
    return tensor


def _only(traffic: TrafficCounter) -> Tally:
    (tally,) = traffic.tallies.values()
    return tally


def test_copy_kernel_reads_and_writes_each_byte_once():
    x = _aligned(1000)
    y = torch.empty_like(x)
    with TrafficCounter() as traffic:
        _copy_kernel[(4,)](x, y, 1000, BLOCK=256)
    assert torch.equal(x, y)
    tally = _only(traffic)
    assert (tally.kind, tally.name, tally.calls) == ("triton", "_copy_kernel", 1)
    assert (tally.read, tally.written) == (4000, 4000)
    assert (tally.atomics, tally.flops, tally.programs) == (0, 0, 4)


def test_masked_lanes_are_not_counted():
    x, y = _aligned(256), torch.empty(256)
    with TrafficCounter() as traffic:
        _copy_kernel[(1,)](x, y, 9, BLOCK=256)  # 36 bytes: two sectors
    assert (_only(traffic).read, _only(traffic).written) == (64, 64)


def test_strided_load_pays_whole_sectors():
    x, y = _aligned(64 * 16), torch.empty(64)
    with TrafficCounter() as traffic:
        _strided_copy_kernel[(1,)](x, y, 16, BLOCK=64)  # one element in each 64 bytes
    assert (_only(traffic).read, _only(traffic).written) == (64 * SECTOR_BYTES, 64 * 4)


def test_row_read_by_every_program_counts_once_a_launch():
    x, row, y = _aligned(8 * 64), _aligned(64), torch.empty(8 * 64)
    with TrafficCounter() as traffic:
        _add_row_kernel[(8,)](x, row, y, BLOCK=64)
        _add_row_kernel[(8,)](x, row, y, BLOCK=64)
    assert _only(traffic).calls == 2
    assert _only(traffic).read == 2 * (8 * 64 * 4 + 64 * 4)
    assert _only(traffic).written == 2 * 8 * 64 * 4


def test_atomics_read_write_and_are_numbered():
    x, y = _aligned(200), torch.zeros(64)
    with TrafficCounter() as traffic:
        _atomic_sum_kernel[(4,)](x, y, 200, BLOCK=64)
    tally = _only(traffic)
    assert tally.read == 200 * 4 + 64 * 4
    assert tally.written == 64 * 4
    assert tally.atomics == 200


def test_compare_and_swap_counts():
    lock = torch.zeros(1, dtype=torch.int32)
    with TrafficCounter() as traffic:
        _atomic_cas_kernel[(3,)](lock)
    assert (_only(traffic).read, _only(traffic).written) == (SECTOR_BYTES, SECTOR_BYTES)
    assert _only(traffic).atomics == 3


@pytest.mark.parametrize("kernel", [_block_pointer_copy_kernel, _descriptor_copy_kernel])
def test_block_pointers_and_descriptors_count_inside_their_bounds(kernel):
    x, y = _aligned(24 * 16).view(24, 16), torch.zeros(24, 16)
    with TrafficCounter() as traffic:
        kernel[(1,)](x, y, 24, 16, BLOCK=32)
    assert torch.equal(x, y)
    assert (_only(traffic).read, _only(traffic).written) == (24 * 16 * 4, 24 * 16 * 4)


def test_dot_flops_and_traffic():
    a, b = _aligned(16 * 64, torch.float16), _aligned(64 * 16, torch.float16)
    c = torch.empty(16, 16)
    with TrafficCounter() as traffic:
        _matmul_kernel[(1,)](a, b, c, 64, BLOCK=16)
    torch.testing.assert_close(c, a.view(16, 64).float() @ b.view(64, 16).float())
    assert _only(traffic).flops == 2 * 16 * 16 * 64
    assert _only(traffic).read == 2 * (2 * 16 * 64)
    assert _only(traffic).written == 16 * 16 * 4


def test_unaligned_element_touches_both_sectors():
    sectors = SectorSet()
    sectors.touch(torch.tensor([SECTOR_BYTES - 2]).numpy().astype("uint64"), 4)
    assert sectors.nbytes() == 2 * SECTOR_BYTES


def test_sectors_across_megabytes_and_ranges():
    sectors = SectorSet()
    megabyte = 1 << 20
    sectors.touch(torch.arange(0, 3 * megabyte, 4096).numpy().astype("uint64"), 2)
    assert sectors.nbytes() == 3 * 256 * SECTOR_BYTES
    assert sectors.nbytes_within([(megabyte, megabyte), (0, 0)]) == 256 * SECTOR_BYTES
    assert sectors.nbytes_within([(0, 8), (0, 16)]) == SECTOR_BYTES


def test_workspace_has_its_own_column():
    x = _aligned(256)
    with TrafficCounter() as traffic:
        partial = workspace.allocate((256,), x.device)
        _copy_kernel[(1,)](x, partial, 256, BLOCK=256)
        partial.sum()
    kernel, reduction = traffic.tallies["_copy_kernel"], traffic.tallies["aten.sum.default"]
    assert (kernel.read, kernel.written, kernel.workspace_written) == (1024, 0, 1024)
    assert (reduction.read, reduction.workspace_read, reduction.written) == (0, 1024, 4)
    assert traffic.total.moved == 1024 + 4
    assert traffic.total.workspace == 2048


def test_interpreter_is_restored_even_after_an_error():
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    before = (dict(vars(builder)), dict(vars(executor)))
    with pytest.raises(RuntimeError, match="stop"), TrafficCounter():
        raise RuntimeError("stop")
    with pytest.raises(interpreter.InterpreterError), TrafficCounter():
        _copy_kernel[(1,)](torch.ones(4), torch.ones(4), "n", BLOCK=4)
    assert (dict(vars(builder)), dict(vars(executor))) == before
    with TrafficCounter() as traffic:
        torch.ones(8).add(1)
    assert traffic.tallies["aten.add.Tensor"].moved == 64


def test_elementwise_and_matmul():
    a, b = torch.rand(32, 16), torch.rand(16, 8)
    with TrafficCounter() as traffic:
        torch.relu(a @ b)
    product = traffic.tallies["aten.mm.default"]
    assert (product.read, product.written) == (4 * (32 * 16 + 16 * 8), 4 * 32 * 8)
    assert product.flops == 2 * 32 * 16 * 8
    assert traffic.tallies["aten.relu.default"].moved == 2 * 4 * 32 * 8


def test_views_allocations_and_metadata_move_nothing():
    a = torch.rand(32, 16)
    with TrafficCounter() as traffic:
        a.t().reshape(16, 32).unsqueeze(0).expand(4, 16, 32)
        a.split(8)
        a.detach()
        torch.empty_like(a)
        a.new_empty(3)
        torch.ops.aten._unsafe_view(a, [512])
    assert traffic.tallies == {}


def test_expanded_and_repeated_operands_count_once():
    row, a = torch.rand(1, 16), torch.rand(64, 16)
    with TrafficCounter() as traffic:
        row.expand(64, 16) + a
        torch.mul(a, a)
        torch.mm(a.t(), a)
    assert traffic.tallies["aten.add.Tensor"].read == 4 * (16 + 64 * 16)
    assert traffic.tallies["aten.mul.Tensor"].read == 4 * 64 * 16
    assert traffic.tallies["aten.mm.default"].read == 4 * 64 * 16


def test_in_place_out_and_overwriting_operators():
    a, b, out = torch.rand(64), torch.rand(64), torch.rand(64)
    with TrafficCounter() as traffic:
        a.add_(b)
        torch.mul(a, b, out=out)
        a.copy_(b)
        a.bernoulli_(0.5)
    for name in ("aten.add_.Tensor", "aten.mul.out"):
        assert (traffic.tallies[name].read, traffic.tallies[name].written) == (512, 256)
    assert traffic.tallies["aten.copy_.default"].moved == 512
    assert traffic.tallies["aten.bernoulli_.float"].moved == 256


def test_casts_count_each_side_at_its_own_size():
    a = torch.rand(64)
    with TrafficCounter() as traffic:
        a.to(torch.float16)
    assert (traffic.total.read, traffic.total.written) == (256, 128)


def test_backward_is_counted():
    x, w = torch.rand(32, 16, requires_grad=True), torch.rand(8, 16)
    with TrafficCounter() as traffic:
        y = torch.nn.functional.linear(x, w)
        torch.autograd.grad(y, x, torch.ones_like(y))
    product = traffic.tallies["aten.mm.default"]
    assert product.calls == 2
    assert product.read == 4 * (32 * 16 + 16 * 8) + 4 * (32 * 8 + 16 * 8)
    assert product.written == 4 * 32 * 8 + 4 * 32 * 16


def test_library_operator_counts_only_what_it_does_inside():
    @torch.library.custom_op("peftfast_benchmarks::scaled_copy", mutates_args=())
    def scaled_copy(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        _copy_kernel[(1,)](x, y, x.numel(), BLOCK=256)
        return y.mul_(2)

    x = _aligned(256)
    with TrafficCounter() as traffic:
        y = scaled_copy(x)
    assert torch.equal(y, 2 * x)
    assert set(traffic.tallies) == {"_copy_kernel", "aten.mul_.Tensor"}
    assert traffic.total.moved == 4 * 1024


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="counted on the CPU"), TrafficCounter():
        torch.empty(4, device="meta").add(1)
