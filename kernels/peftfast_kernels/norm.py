"""RMSNorm and LayerNorm over rows that one program holds whole.

    xhat = x r, r = 1 / sqrt(mean(x^2) + eps)                          y = w xhat (+ b)
    dx = r (g - xhat mean(g xhat)), g = w dy      dw = sum over rows of dy xhat      db = sum of dy

and for LayerNorm x - mean(x) in place of x, and dx less r mean(g). The forward moves x and y once,
the backward dy, x and dx; row statistics are computed again from the row at hand. dw and db are
summed over each program's rows, written to a float32 workspace [programs, columns], two programs a
processor, and summed once more in a fixed order: the result is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import device, tiles, workspace
from peftfast_kernels.lane import triton_dtype
from peftfast_kernels.launch import launch, recording
from peftfast_kernels.split_reduce import split_reduce
from peftfast_kernels.variant import Variant


@triton.jit
def _normalise(x, eps, N, rn, inside, CENTER: tl.constexpr, EVEN_N: tl.constexpr):
    """xhat and r of rows [BLOCK_M, BLOCK_N] in float32, zero outside of the matrix."""
    if CENTER:
        x = x - (tl.sum(x, axis=1) / N)[:, None]
        if not EVEN_N:
            x = tl.where(rn[None, :] < N, x, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
    scale = tl.where(inside, scale, 0.0)
    return x * scale[:, None], scale


@triton.jit
def _factors(w_ptr, N, rn, OFFSET: tl.constexpr, EVEN_N: tl.constexpr):
    if EVEN_N:
        w = tl.load(w_ptr + rn).to(tl.float32)
    else:
        w = tl.load(w_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)
    if OFFSET:
        w = 1.0 + w
    return w


@triton.jit(do_not_specialize=["M"])
def _norm_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    eps,
    stride_xm,
    stride_xn,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rm = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.arange(0, BLOCK_N)
    inside = rm < M
    mask = inside[:, None]
    if not EVEN_N:
        mask = mask & (rn[None, :] < N)
    x = tl.load(x_ptr + rm[:, None] * stride_xm + rn[None, :] * stride_xn, mask=mask, other=0.0)
    y, _ = _normalise(x.to(tl.float32), eps, N, rn, inside, CENTER, EVEN_N)
    if ROUNDED is not None:
        y = y.to(ROUNDED).to(tl.float32)
    if w_ptr is not None:
        y = y * _factors(w_ptr, N, rn, OFFSET, EVEN_N)[None, :]
    if b_ptr is not None:
        y = y + _factors(b_ptr, N, rn, False, EVEN_N)[None, :]
    position = rm[:, None] * N + rn[None, :]
    tl.store(y_ptr + position, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "span"])
def _norm_grad_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    M,
    N,
    span,
    eps,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xn,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    rn = tl.arange(0, BLOCK_N)
    if dw_ptr is not None:
        dw = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if db_ptr is not None:
        db = tl.zeros((BLOCK_N,), dtype=tl.float32)
    start = pid * span
    for first in range(start, tl.minimum(start + span, M), BLOCK_M):
        rm = first + tl.arange(0, BLOCK_M)
        inside = rm < M
        mask = inside[:, None]
        if not EVEN_N:
            mask = mask & (rn[None, :] < N)
        at_x = rm[:, None] * stride_xm + rn[None, :] * stride_xn
        at_dy = rm[:, None] * stride_dym + rn[None, :] * stride_dyn
        x = tl.load(x_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + at_dy, mask=mask, other=0.0).to(tl.float32)
        xhat, scale = _normalise(x, eps, N, rn, inside, CENTER, EVEN_N)
        if db_ptr is not None:
            db += tl.sum(g, axis=0)
        if dw_ptr is not None:
            rounded = xhat
            if ROUNDED is not None:
                rounded = xhat.to(ROUNDED).to(tl.float32)
            dw += tl.sum(g * rounded, axis=0)
        if dx_ptr is not None:
            if w_ptr is not None:
                g = g * _factors(w_ptr, N, rn, OFFSET, EVEN_N)[None, :]
            dx = g - xhat * (tl.sum(g * xhat, axis=1) / N)[:, None]
            if CENTER:
                dx = dx - (tl.sum(g, axis=1) / N)[:, None]
            dx = (dx * scale[:, None]).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + rm[:, None] * N + rn[None, :], dx, mask=mask)
    if dw_ptr is not None:
        tl.store(dw_ptr + pid * N + rn, dw, mask=rn < N)
    if db_ptr is not None:
        tl.store(db_ptr + pid * N + rn, db, mask=rn < N)


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float, form: str, y: Tensor) -> None:
    """Fill y, contiguous, of x's shape.

    Args:
        x: [..., d], any strides.
        weight: [d] or None.
        form: as in `peftfast.reference.norm`.
    """
    _forward(x, weight, None, eps, y, False, form == "gemma", _rounded(x, weight, form))


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    form: str,
    dx: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """Fill dx, contiguous, of x's shape, and dweight; None: not wanted."""
    settings = False, form == "gemma", _rounded(x, weight, form)
    _backward(dy, x, weight, eps, dx, dweight, None, *settings)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor
) -> None:
    """Fill y, as `rms_norm_forward` does."""
    _forward(x, weight, bias, eps, y, True, False, None)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Fill dx, dweight and dbias, as `rms_norm_backward` does."""
    _backward(dy, x, weight, eps, dx, dweight, dbias, True, False, None)


def _rounded(x: Tensor, weight: Tensor | None, form: str) -> torch.dtype | None:
    """The 16-bit dtype to which xhat is rounded before the product, if to any."""
    dtype = x.dtype if form == "llama" else None
    if form == "t5" and weight is not None:
        dtype = weight.dtype
    return dtype if dtype is not None and dtype.itemsize == 2 else None


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    center: bool,
    offset: bool,
    rounded: torch.dtype | None,
) -> None:
    if y.numel() == 0:
        return
    rows = _matrix(x)
    count, columns = rows.shape
    tile = tiles.norm_tile(columns)
    with device.current(x):
        launch(
            _norm_kernel,
            (triton.cdiv(count, tile.block_m),),
            rows,
            _contiguous(weight),
            _contiguous(bias),
            y,
            count,
            columns,
            eps,
            rows.stride(0),
            rows.stride(1),
            mma="none",
            CENTER=center,
            OFFSET=offset,
            ROUNDED=None if rounded is None else triton_dtype(rounded),
            EVEN_N=columns == tile.block_n,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    center: bool,
    offset: bool,
    rounded: torch.dtype | None,
) -> None:
    parameters = [one for one in (dweight, dbias) if one is not None]
    if x.numel() == 0:
        for one in parameters:
            one.zero_()
        return
    rows, grads = _matrix(x), _matrix(dy)
    count, columns = rows.shape
    tile = tiles.norm_tile(columns)
    sms = device.sm_count(x.device)
    span, programs = tiles.norm_spans(count, tile.block_m, bool(parameters), sms)
    with device.current(x):
        parts = [workspace.allocate((programs, columns), x.device) for _ in parameters]
        given = iter(parts)
        launch(
            _norm_grad_kernel,
            (programs,),
            grads,
            rows,
            _contiguous(weight),
            dx,
            None if dweight is None else next(given),
            None if dbias is None else next(given),
            count,
            columns,
            span,
            eps,
            grads.stride(0),
            grads.stride(1),
            rows.stride(0),
            rows.stride(1),
            mma="none",
            CENTER=center,
            OFFSET=offset,
            ROUNDED=None if rounded is None else triton_dtype(rounded),
            EVEN_N=columns == tile.block_n,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if parameters:
            split_reduce(parts, parameters)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def aot_variants(arch: int) -> Iterator[Variant]:
    """Both norms, forward and backward, at the longest rows and at a head's."""
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [
        ("bf16", bf16, bf16, 4096, True),
        ("bf16+fp32", bf16, fp32, 128, False),
        ("fp32", fp32, fp32, tiles.norm_limit(False), True),
        ("bf16", bf16, bf16, tiles.norm_limit(True), False),
    ]
    for label, dtype, weight_dtype, columns, layer_norm in cases:
        x, w = (
            torch.empty(shape, dtype=kind, device="meta")
            for shape, kind in (((8192, columns), dtype), ((columns,), weight_dtype))
        )
        parameter = w if layer_norm else None
        with recording(arch) as launches:
            rms_norm_forward(x, w, 1e-6, "llama", x)
            rms_norm_backward(x, x, w, 1e-6, "llama", x, parameter)
            if layer_norm:
                layer_norm_forward(x, w, w, 1e-6, x)
                layer_norm_backward(x, x, w, 1e-6, x, w, w)
                layer_norm_backward(x, x, w, 1e-6, x, None, None)
        for launched in launches:
            if launched.kernel in (_norm_kernel, _norm_grad_kernel):
                yield launched.variant(label)
