"""Small kernels with known faults, and the variants of them that the tests compile."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from peftfast_kernels.variant import Variant


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, IEEE: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + start + depth[None, :])
        b = tl.load(b_ptr + rows[None, :] * K + start + depth[:, None])
        total = tl.dot(a, b, total, input_precision="ieee" if IEEE else "tf32")
    tl.store(c_ptr + rows[:, None] * BLOCK + rows[None, :], total.to(c_ptr.dtype.element_ty))


@triton.jit
def hold_too_much(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(n):
        total += tl.load(x_ptr + row * BLOCK + columns)
    tl.store(y_ptr + columns, total)


@triton.jit
def mismatched(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.dot(tl.zeros((BLOCK, 32), tl.float32), tl.zeros((BLOCK, 32), tl.float32)))


def matmul_variant(name: str, block: int, block_k: int, stages: int, ieee: bool, mma: str):
    pointer = "*fp32" if ieee else "*bf16"
    return Variant(
        kernel=matmul,
        name=name,
        config=f"{block}x{block}x{block_k} s{stages}",
        dtype=pointer[1:],
        signature={
            "a_ptr": pointer,
            "b_ptr": pointer,
            "c_ptr": pointer,
            "K": "i32",
            "BLOCK": "constexpr",
            "BLOCK_K": "constexpr",
            "IEEE": "constexpr",
        },
        constexprs={"BLOCK": block, "BLOCK_K": block_k, "IEEE": ieee},
        attrs={(index,): [["tt.divisibility", 16]] for index in range(4)},
        num_stages=stages,
        mma=mma,
    )


def aot_variants(arch: int) -> Iterator[Variant]:
    yield matmul_variant("good", 64, 32, stages=2, ieee=False, mma="native")
    yield matmul_variant("too_small_for_native", 16, 32, stages=2, ieee=False, mma="native")
    yield matmul_variant("too_much_shared", 128, 64, stages=8, ieee=False, mma="any")
    yield matmul_variant("no_tensor_core", 16, 16, stages=2, ieee=True, mma="any")
    yield Variant(
        kernel=hold_too_much,
        name="spills",
        config="8192 w1",
        dtype="fp32",
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": 8192},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
        num_warps=1,
    )
    yield Variant(
        kernel=mismatched,
        name="mismatched",
        config="16",
        dtype="fp32",
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": 16},
    )
