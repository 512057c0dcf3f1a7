"""Activations, activations that gate a product, and dropout, in one pass.

    y = drop(round(act(gate)) up)      dh = mask / keep dy
    dup = dh round(act(gate))          dgate = dh up act'(gate)

Moves each operand and result once, the floor; masks are regenerated in registers. All is computed
in float32, by exponentials and erf alone: the interpreter has no other functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles
from peftfast_kernels.launch import launch, recording
from peftfast_kernels.philox import keep_scale, keep_tile, limit
from peftfast_kernels.variant import Variant


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # From a polynomial near zero, where 1 - 2 / (1 + exp(2x)) cancels (Cephes, tanhf).
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = (p * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = x + x * z * (p * z - 3.33332819422e-1)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """act(x) in float32."""
    if KIND == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    elif KIND == "relu2":
        y = tl.where(x < 0.0, 0.0, x)
        y = y * y
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "silu":
        y = x * _sigmoid(x)
    elif KIND == "quick_gelu":
        y = x * _sigmoid(1.702 * x)
    elif KIND == "tanh":
        y = _tanh(x)
    elif KIND == "sigmoid":
        y = _sigmoid(x)
    else:
        tl.static_assert(KIND == "identity")
        y = x
    return y


@triton.jit
def differentiate(x, KIND: tl.constexpr):
    """act'(x) in float32."""
    if KIND == "relu":
        d = tl.where(x <= 0.0, 0.0, 1.0)
    elif KIND == "relu2":
        d = tl.where(x <= 0.0, 0.0, 2.0 * x)
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif KIND == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        d = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif KIND == "silu":
        s = _sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif KIND == "quick_gelu":
        s = _sigmoid(1.702 * x)
        d = s * (1.0 + 1.702 * x * (1.0 - s))
    elif KIND == "tanh":
        t = _tanh(x)
        d = 1.0 - t * t
    elif KIND == "sigmoid":
        s = _sigmoid(x)
        d = s * (1.0 - s)
    else:
        tl.static_assert(KIND == "identity")
        d = tl.full(x.shape, 1.0, tl.float32)
    return d


@triton.jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr):
    """Rows, first column, columns and mask of a program's tile."""
    across = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    rm = pid // across * BLOCK_M + tl.arange(0, BLOCK_M)
    first = pid % across * BLOCK_N
    rn = first + tl.arange(0, BLOCK_N)
    mask = rm[:, None] < M
    if not EVEN_N:
        mask = mask & (rn[None, :] < N)
    return rm, first, rn, mask


@triton.jit(do_not_specialize=["M", "limit"])
def _activation_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    seed_ptr,
    M,
    N,
    scale,
    limit,
    stride_gm,
    stride_gn,
    stride_um,
    stride_un,
    KIND: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rm, first, rn, mask = _place(M, N, BLOCK_M, BLOCK_N, EVEN_N)
    at_gate = rm[:, None] * stride_gm + rn[None, :] * stride_gn
    x = tl.load(gate_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
    y = activate(x, KIND).to(y_ptr.dtype.element_ty)
    if up_ptr is not None:
        at_up = rm[:, None] * stride_um + rn[None, :] * stride_un
        up = tl.load(up_ptr + at_up, mask=mask, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) * up).to(y_ptr.dtype.element_ty)
    if DROPOUT:
        keep = keep_tile(tl.load(seed_ptr), limit, rm, first, N, BLOCK_M, BLOCK_N)
        y = tl.where(keep, y.to(tl.float32) * scale, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rm[:, None] * N + rn[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["M", "limit"])
def _activation_grad_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    seed_ptr,
    M,
    N,
    scale,
    limit,
    stride_dm,
    stride_dn,
    stride_gm,
    stride_gn,
    stride_um,
    stride_un,
    KIND: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rm, first, rn, mask = _place(M, N, BLOCK_M, BLOCK_N, EVEN_N)
    at_dy = rm[:, None] * stride_dm + rn[None, :] * stride_dn
    at_gate = rm[:, None] * stride_gm + rn[None, :] * stride_gn
    position = rm[:, None] * N + rn[None, :]
    g = tl.load(dy_ptr + at_dy, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(gate_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = keep_tile(tl.load(seed_ptr), limit, rm, first, N, BLOCK_M, BLOCK_N)
        g = tl.where(keep, g * scale, 0.0)
    if dup_ptr is not None:
        y = activate(x, KIND).to(gate_ptr.dtype.element_ty).to(tl.float32)
        tl.store(dup_ptr + position, (g * y).to(dup_ptr.dtype.element_ty), mask=mask)
    if dgate_ptr is not None:
        if up_ptr is not None:
            at_up = rm[:, None] * stride_um + rn[None, :] * stride_un
            g = g * tl.load(up_ptr + at_up, mask=mask, other=0.0).to(tl.float32)
        g = (g * differentiate(x, KIND)).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + position, g, mask=mask)


def activation_forward(
    gate: Tensor, up: Tensor | None, kind: str, dropout_p: float, seed: Tensor | None, y: Tensor
) -> None:
    """Fill y, contiguous, of gate's shape.

    Args:
        gate, up: of one shape, any strides; up may be None: y is the activation alone.
        kind: as in `peftfast.reference.activation`, or "identity".
        dropout_p, seed: probability, and int64 [1]; None where the former is 0.
    """
    if y.numel() == 0:
        return
    flat, tile = _matrices([gate, up, y], dropout_p > 0)
    gates, ups, out = flat
    assert gates is not None and out is not None
    rows, columns = out.shape
    with device.current(gate):
        launch(
            _activation_kernel,
            _grid(rows, columns, tile),
            gates,
            ups,
            out,
            seed,
            rows,
            columns,
            keep_scale(dropout_p),
            limit(dropout_p),
            *_strides(gates),
            *_strides(ups),
            mma="none",
            KIND=KERNEL_KINDS.get(kind, kind),
            DROPOUT=dropout_p > 0,
            EVEN_N=columns % tile.block_n == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def activation_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    dropout_p: float,
    seed: Tensor | None,
    dgate: Tensor | None,
    dup: Tensor | None,
) -> None:
    """Fill dgate and dup, contiguous, of gate's shape; None: not wanted.

    The other arguments are the forward's; up may be None where dgate is, too.
    """
    if gate.numel() == 0:
        return
    flat, tile = _matrices([dy, gate, up, dgate, dup], dropout_p > 0)
    grads, gates, ups, dgates, dups = flat
    assert grads is not None and gates is not None
    rows, columns = gates.shape
    with device.current(gate):
        launch(
            _activation_grad_kernel,
            _grid(rows, columns, tile),
            grads,
            gates,
            ups,
            dgates,
            dups,
            seed,
            rows,
            columns,
            keep_scale(dropout_p),
            limit(dropout_p),
            *_strides(grads),
            *_strides(gates),
            *_strides(ups),
            mma="none",
            KIND=KERNEL_KINDS.get(kind, kind),
            DROPOUT=dropout_p > 0,
            EVEN_N=columns % tile.block_n == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def dropout(x: Tensor, seed: Tensor, p: float, y: Tensor) -> None:
    """Fill y, contiguous, of x's shape, with the elements kept, divided by 1 - p."""
    activation_forward(x, None, "identity", p, seed, y)


# What differs in its rounding only.
KERNEL_KINDS = {"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def _matrices(
    tensors: Sequence[Tensor | None], by_rows: bool
) -> tuple[list[Tensor | None], tiles.Tile]:
    """Tensors of one shape as matrices, and a tile: a single row where strides and masks allow."""
    given = [one for one in tensors if one is not None]
    shape = given[0].shape
    columns = shape[-1] if shape else 1
    if not by_rows and all(one.is_contiguous() for one in given):
        columns = math.prod(shape)
    rows = math.prod(shape) // columns
    flat = [None if one is None else one.reshape(rows, columns) for one in tensors]
    return flat, tiles.elementwise_tile(columns)


def _grid(rows: int, columns: int, tile: tiles.Tile) -> tuple[int]:
    return (triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n),)


def _strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


def aot_variants(arch: int) -> Iterator[Variant]:
    """The gated product of each size class, every kind alone, and dropout."""
    kinds = ("relu", "relu2", "gelu", "gelu_tanh", "silu", "quick_gelu", "tanh", "sigmoid")
    cases = [("bf16", torch.bfloat16, kinds), ("fp32", torch.float32, ("gelu_tanh",))]
    for label, dtype, alone in cases:
        x = torch.empty(8192, 14336, dtype=dtype, device="meta")
        gate, up = torch.empty(8192, 2 * 1000, dtype=dtype, device="meta").chunk(2, dim=-1)
        odd, wide = (
            torch.empty(8192, columns, dtype=dtype, device="meta") for columns in (1000, 11008)
        )
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        with recording(arch) as launches:
            for kind in alone:
                activation_forward(x, None, kind, 0.0, None, x)
                activation_backward(x, x, None, kind, 0.0, None, x, None)
            activation_forward(x, x, "silu", 0.0, None, x)
            activation_backward(x, x, x, "silu", 0.0, None, x, x)
            activation_forward(gate, up, "gelu_tanh", 0.1, seed, odd)
            activation_backward(odd, gate, up, "gelu_tanh", 0.1, seed, odd, odd)
            activation_backward(wide, wide, wide, "silu", 0.1, seed, wide, wide)
            dropout(x, seed, 0.1, x)
        for launched in launches:
            yield launched.variant(label)
