"""Weights in 4 bits: quantise, dequantise, and the linear over one.

Contract, checks, dispatch and autograd; the format is in `peftfast.reference.nf4`. A linear
dequantises its weight into one scratch buffer, forward and backward, and keeps only the 4-bit
parts; for few rows (decoding) a fused kernel reads those directly.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfast.ops.dispatch import (
    Impl,
    choose,
    native_reasons,
    none,
    parse_impl,
    triton_reasons,
)
from peftfast.ops.nf4_weight import (
    DTYPES,
    NF4Weight,
    Weight,
    check_block_size,
    check_quant_type,
    flatten,
    out_features,
    part_count,
    row_step,
    rows_of,
    unflatten,
)
from peftfast.ops.operands import check_input, is_traced, no_autocast, shape
from peftfast.ops.scratch import clear_scratch, scratch
from peftfast.ops.second_order import first_order_only
from peftfast.reference import nf4 as reference
from peftfast.reference.linear import base_gradient, base_linears

__all__ = ["NF4Weight", "clear_scratch", "dequantize", "linear", "quantize"]

_MODULES = {
    Impl.NATIVE: "peftfast.native.nf4",
    Impl.TRITON: "peftfast_kernels.nf4",
    Impl.REFERENCE: "peftfast.reference.nf4",
}
_BLOCK_BYTES = 2 << 20  # of a dense block on a CPU: about a core's own cache
_ORDER = (Impl.NATIVE, Impl.REFERENCE)
_ORDER_ON_GPU = (Impl.NATIVE, Impl.TRITON, Impl.REFERENCE)


def quantize(
    w: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    quant_type: str = "nf4",
    impl: str | Impl = "auto",
) -> NF4Weight:
    """A tensor in 4 bits, bit for bit as bitsandbytes 0.50 quantises it on the same device.

    Args:
        w: any shape and strides, not empty; bfloat16, float16 or float32.
        block_size: elements that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: keep the scales in 8 bits too, 0.127 bits an element instead of 0.5 at a
            block size of 64 (Dettmers et al., NeurIPS 2023, section 3).
        quant_type: "nf4" or "fp4".
        impl: "auto", "triton", "native" or "reference"; an explicit request never falls back.

    Raises:
        TypeError, ValueError: an argument is wrong, or w holds values that are not finite.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    if not isinstance(w, Tensor):
        raise TypeError(f"w is {type(w).__name__}; a tensor is needed")
    if w.dtype not in DTYPES:
        raise TypeError(f"w is {w.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    if w.numel() == 0:
        raise ValueError(f"w is empty, {shape(w)}")
    check_block_size(block_size)
    check_quant_type(quant_type)
    asked = parse_impl(impl)
    parts = torch.ops.peftfast.nf4_quantize(
        w.detach(), block_size, double_quant, quant_type, asked.value
    )
    packed, absmax, *nested = parts
    return NF4Weight(packed, absmax, w.shape, w.dtype, block_size, quant_type, *nested)


def dequantize(
    w4: NF4Weight,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    impl: str | Impl = "auto",
) -> Tensor:
    """The dense tensor of a 4-bit weight, bit for bit as bitsandbytes 0.50 gives it.

    Args:
        w4: of any shape.
        dtype: bfloat16, float16 or float32; None: out's, or that of the tensor once quantised.
        out: filled and returned where given: contiguous, of w4's shape and that dtype.
        impl: as in `quantize`.

    Raises:
        TypeError, ValueError: an argument is wrong. ImplUnavailable: `impl` was named and can't
            serve the call.
    """
    if not isinstance(w4, NF4Weight):
        raise TypeError(f"w4 is {type(w4).__name__}; an NF4Weight is needed")
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out is {type(out).__name__}; a tensor is needed")
    if dtype is None:
        dtype = w4.dtype if out is None else out.dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: {', '.join(map(str, DTYPES))}")
    if out is None:
        out = torch.empty(w4.shape, dtype=dtype, device=w4.device)
    elif out.dtype != dtype or out.shape != w4.shape or out.device != w4.device:
        raise ValueError(
            f"out is {out.dtype} {shape(out)} on {out.device}; {dtype} {list(w4.shape)} on"
            f" {w4.device} is needed"
        )
    elif not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}; a contiguous tensor is needed")
    elif out.requires_grad:
        raise ValueError("out requires a gradient; dequantize has none to give")
    five = (w4.packed, w4.absmax, w4.nested_absmax, w4.nested_code, w4.offset)
    asked = parse_impl(impl)
    if is_traced():
        settings = (w4.block_size, w4.quant_type, dtype, asked.value)
        torch.ops.peftfast.nf4_dequantize(*five, *settings, out)
    else:
        _dequantize_into(w4, dtype, out, asked)
    return out


def linear(
    x: Tensor, w4: NF4Weight, bias: Tensor | None = None, impl: str | Impl = "auto"
) -> Tensor:
    """x W^T + b over a 4-bit weight, differentiable in x and the bias.

    Args:
        x: [..., in], bfloat16, float16 or float32, any strides; under autocast cast as in
            `F.linear`.
        w4: [out, in]. Where it has a compute_dtype, x and the bias are cast to that for the
            product, and the product to x's dtype.
        bias: [out] of any floating dtype, or None.
        impl: as in `quantize`.

    Returns:
        [..., out] in x's dtype (under autocast: in autocast's).

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device is wrong.
        ImplUnavailable: `impl` was named and can't serve the call.
    """
    x = check_input(x)
    check_weight(x, w4, "w4")
    check_bias(x, w4, bias, "w4", "bias")
    asked = parse_impl(impl)
    parts, spec = flatten([w4])
    if is_traced():
        return torch.ops.peftfast.nf4_linear(x, parts, spec, bias, asked.value)
    if not torch.is_grad_enabled():
        return _forward(x, w4, bias, asked.value)
    return _NF4Linear.apply((spec, asked.value), x, bias, *parts)


def check_weight(x: Tensor, w4: NF4Weight, name: str) -> None:
    """Hold a 4-bit weight to what a linear over x needs."""
    if not isinstance(w4, NF4Weight):
        raise TypeError(f"{name} is {type(w4).__name__}; an NF4Weight is needed")
    if w4.ndim != 2:
        raise ValueError(f"{name} is {list(w4.shape)}; 2 dimensions are needed")
    if w4.device != x.device:
        raise ValueError(f"{name} is on {w4.device}, x is on {x.device}")
    if w4.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name} is {list(w4.shape)}, [out, in], and x is {shape(x)}: in is {w4.shape[1]} in"
            f" one, {x.shape[-1]} in the other"
        )


def check_bias(x: Tensor, w: Weight, bias: Tensor | None, w_name: str, name: str) -> None:
    """Hold a bias to what a linear needs, except for its dtype."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name} is {type(bias).__name__}; a tensor is needed")
    if not bias.is_floating_point():
        raise TypeError(f"{name} is {bias.dtype}; a floating dtype is needed")
    if bias.device != x.device:
        raise ValueError(f"{name} is on {bias.device}, x is on {x.device}")
    if bias.shape != (w.shape[0],):
        raise ValueError(f"{name} is {shape(bias)}; {w_name} {list(w.shape)} needs [{w.shape[0]}]")


# Dispatch


def implementation(op: str, device: torch.device, dtype: torch.dtype, asked: Impl) -> Impl:
    """Who serves `op` ("quantize", "dequantize" or "gemv") for values of this dtype."""

    def native() -> list[str]:
        if op == "quantize" and device.type == "cuda":
            return ["csrc quantises on a CPU only"]
        if dtype not in DTYPES:
            return [f"dtype {dtype} is none of {', '.join(map(str, DTYPES))}"]
        return native_reasons(device)

    reasons = {
        Impl.NATIVE: native,
        Impl.TRITON: lambda: triton_reasons(device, dtype),
        Impl.REFERENCE: none,
    }
    on_gpu = device.type == "cuda"
    return choose(f"nf4.{op}", asked, _ORDER_ON_GPU if on_gpu else _ORDER, reasons)


def _module(op: str, device: torch.device, dtype: torch.dtype, asked: Impl) -> Any:
    return _import(implementation(op, device, dtype, asked))


@functools.cache
def _import(impl: Impl) -> Any:
    return importlib.import_module(_MODULES[impl])


def _dequantize_into(w4: NF4Weight, dtype: torch.dtype, out: Tensor, asked: Impl) -> None:
    """Fill out with the values rounded to `dtype`; out's dtype may be wider."""
    module = _module("dequantize", w4.device, dtype, asked)
    parts = (w4.packed, w4.absmax, w4.nested_absmax, w4.nested_code, w4.offset)
    module.dequantize(*parts, w4.block_size, w4.quant_type, dtype, out)


class DenseWeights(Sequence[Tensor]):
    """Weights as implementations read them: element j is a dense [N_j, K], valid only until the
    next one is read.

    Args:
        weights: dense or 4-bit ones.
        compute_dtypes: dtype of the values, a weight.
        gemm_dtype: the dtype to widen values of a 16-bit dtype to, or None to leave them.
        asked: as in `quantize`, for the dequantising.
    """

    transient = True

    def __init__(
        self,
        weights: Sequence[Weight],
        compute_dtypes: Sequence[torch.dtype],
        gemm_dtype: torch.dtype | None,
        asked: Impl,
    ) -> None:
        self._weights, self._dtypes = weights, compute_dtypes
        self._gemm_dtype, self._asked = gemm_dtype, asked
        self._last: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, j: Any) -> Any:
        w, dtype = self._weights[j], self._dtypes[j]
        wide = dtype if self._gemm_dtype is None else torch.promote_types(dtype, self._gemm_dtype)
        if self._last is not None and self._last[0] == j:
            return self._last[1]
        if isinstance(w, Tensor):
            w = w.to(dtype)
            if wide == dtype:
                return w
            dense = scratch(w.shape, wide, w.device)
            dense.copy_(w)
        else:
            dense = scratch(w.shape, wide, w.device)
            _dequantize_into(w, dtype, dense, self._asked)
        self._last = (j, dense)
        return dense

    def blocks(self, j: int) -> Iterator[tuple[int, int, Tensor]]:
        """Weight j as (first row, number of rows in all, dense block).

        On a CPU what becomes dense stays in the cache until it is used, and the buffer small,
        where rows and blocks of statistics come together often enough.
        """
        w, dtype = self._weights[j], self._dtypes[j]
        wide = dtype if self._gemm_dtype is None else torch.promote_types(dtype, self._gemm_dtype)
        rows = w.shape[0]
        step = self._block_rows(w, wide) if w.device.type == "cpu" else rows
        if step >= rows or (isinstance(w, Tensor) and wide == dtype):
            yield 0, rows, self[j]
            return
        self._last = None
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            dense = scratch((stop - start, w.shape[1]), wide, w.device)
            if isinstance(w, Tensor):
                dense.copy_(w[start:stop].to(dtype))
            else:
                _dequantize_into(rows_of(w, start, stop), dtype, dense, self._asked)
            yield start, rows, dense

    @staticmethod
    def _block_rows(w: Weight, dtype: torch.dtype) -> int:
        """Rows a block: as many whole statistics as fit, or all of them."""
        row_bytes = w.shape[1] * dtype.itemsize
        if w.shape[0] * row_bytes <= 2 * _BLOCK_BYTES:
            return w.shape[0]
        step = 1 if isinstance(w, Tensor) else row_step(w)
        return max(1, _BLOCK_BYTES // (step * row_bytes)) * step


def gemm_dtype(dtype: torch.dtype, device: torch.device, asked: Impl) -> torch.dtype | None:
    """float32 where a CPU multiplies numbers of this 16-bit dtype slower than those; None: leave
    the dtype, as everything but the extension's implementation does.
    """
    others = (Impl.REFERENCE, Impl.TRITON)
    if device.type != "cpu" or asked in others or native_reasons(device):
        return None
    from peftfast.native.lora import gemm_dtype as fastest

    wide = fastest(dtype, device)
    return None if wide == dtype else wide


def few_row_outputs(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    compute_dtypes: Sequence[torch.dtype],
    asked: Impl,
) -> list[Tensor] | None:
    """x W_j^T + b_j by the fused kernels, in x's dtype; None where dequantising is the better way.

    x is [M, K]. The rule is `few_rows` of the implementation that serves.
    """
    rows = x.shape[0]
    if rows == 0:
        return None
    modules = []
    for w, dtype in zip(weights, compute_dtypes, strict=True):
        if not isinstance(w, NF4Weight) or 0 in w.shape:
            return None
        device = w.packed.device
        module = _module("gemv", device, dtype, asked)
        if rows > module.few_rows(device, dtype, w.shape[1], w.shape[0]):
            return None
        modules.append(module)
    ys = []
    for module, w, bias, dtype in zip(modules, weights, biases, compute_dtypes, strict=True):
        assert isinstance(w, NF4Weight)
        y = x.new_empty((rows, w.shape[0]), dtype=dtype)
        parts = (w.packed, w.absmax, w.nested_absmax, w.nested_code, w.offset)
        b = None if bias is None else bias.to(dtype).contiguous()
        module.gemv(x.to(dtype).contiguous(), *parts, w.block_size, w.quant_type, b, y)
        ys.append(y if dtype == x.dtype else y.to(x.dtype))
    return ys


# The linear, forward and backward; eager calls go through an autograd.Function, compiled ones
# through the library op, and both call these.


def _forward(x: Tensor, w4: NF4Weight, bias: Tensor | None, impl: str) -> Tensor:
    asked = Impl(impl)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    dtype = w4.compute_dtype or x.dtype
    with no_autocast(x):
        few = few_row_outputs(rows, [w4], [bias], [dtype], asked)
        if few is not None:
            y = few[0]
        else:
            wide = gemm_dtype(dtype, x.device, asked)
            dense = DenseWeights([w4], [dtype], wide, asked)
            y = base_linears(rows, dense, [bias], [dtype])[0].to(x.dtype)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], w4.shape[0]))


def _backward(dy: Tensor, w4: NF4Weight, impl: str) -> Tensor:
    asked = Impl(impl)
    rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    dtype = w4.compute_dtype or dy.dtype
    with no_autocast(dy):
        wide = gemm_dtype(dtype, dy.device, asked)
        dense = DenseWeights([w4], [dtype], wide, asked)
        dx = base_gradient([rows], dy.dtype, dense, [dtype])
        assert dx is not None
        dx = dx.to(dy.dtype)
    return torch.ops.aten._unsafe_view(dx, (*dy.shape[:-1], w4.shape[1]))


def _bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0).to(dtype)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Any, x: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        spec, impl = settings
        (w4,) = unflatten(parts, spec)
        assert isinstance(w4, NF4Weight)
        ctx.settings = settings
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*parts)
        return _forward(x, w4, bias, impl)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        spec, impl = ctx.settings
        parts = ctx.saved_tensors
        (w4,) = unflatten(parts, spec)
        assert isinstance(w4, NF4Weight)
        _, need_x, need_bias, *_ = ctx.needs_input_grad
        with torch.no_grad():
            grads = [_backward(dy, w4, impl)] if need_x else []
            if need_bias:
                grads.append(_bias_gradient(dy, ctx.bias_dtype))
        given = iter(first_order_only("nf4_linear", grads))
        dx, db = (next(given) if need else None for need in (need_x, need_bias))
        return (None, dx, db, *[None] * len(parts))


# The library ops


@torch.library.custom_op(
    "peftfast::nf4_quantize",
    mutates_args=(),
    schema="(Tensor w, int block_size, bool double_quant, str quant_type, str impl) -> Tensor[]",
)
def _library_quantize(
    w: Tensor, block_size: int, double_quant: bool, quant_type: str, impl: str
) -> list[Tensor]:
    module = _module("quantize", w.device, w.dtype, Impl(impl))
    packed, absmax = module.quantize_blocks(w.contiguous(), block_size, quant_type)
    if not bool(absmax.isfinite().all()):
        raise ValueError("w holds values that are not finite")
    if not double_quant:
        return [packed, absmax]
    offset = absmax.mean()
    code = reference.nested_code(w.device).clone()
    codes, nested_absmax = module.quantize_absmax(absmax - offset, code)
    return [packed, codes, nested_absmax, code, offset]


@_library_quantize.register_fake
def _fake_quantize(
    w: Tensor, block_size: int, double_quant: bool, quant_type: str, impl: str
) -> list[Tensor]:
    count = w.numel()
    blocks = (count + block_size - 1) // block_size
    packed = w.new_empty((count + 1) // 2, dtype=torch.uint8)
    if not double_quant:
        return [packed, w.new_empty(blocks, dtype=torch.float32)]
    sizes: list[tuple[int, ...]] = [((blocks + 255) // 256,), (256,), ()]
    nested = [w.new_empty(size, dtype=torch.float32) for size in sizes]
    return [packed, w.new_empty(blocks, dtype=torch.uint8), *nested]


@torch.library.custom_op(
    "peftfast::nf4_dequantize",
    mutates_args=("out",),
    schema="(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code,"
    " Tensor? offset, int block_size, str quant_type, ScalarType dtype, str impl, Tensor(a!) out)"
    " -> ()",
)
def _library_dequantize(*args: Any) -> None:
    *five, block_size, quant_type, dtype, impl, out = args
    packed, absmax, *nested = five
    NF4Weight(packed, absmax, out.shape, dtype, block_size, quant_type, *nested)  # or raises
    if not out.is_contiguous() or out.device != packed.device:
        raise ValueError(f"out has strides {out.stride()} on {out.device}; contiguous is needed")
    module = _module("dequantize", out.device, dtype, Impl(impl))
    module.dequantize(*five, block_size, quant_type, dtype, out)


@_library_dequantize.register_fake
def _fake_dequantize(*args: Any) -> None:
    return None


@torch.library.custom_op(
    "peftfast::nf4_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] parts, int[] spec, Tensor? bias, str impl) -> Tensor",
)
def _library_linear(x: Tensor, parts: Any, spec: Any, bias: Tensor | None, impl: str) -> Tensor:
    (w4,) = unflatten(parts, spec, check=True)
    assert isinstance(w4, NF4Weight)
    check_weight(x, w4, "w4")
    check_bias(x, w4, bias, "w4", "bias")
    return _forward(x, w4, bias, impl)


@_library_linear.register_fake
def _fake_linear(x: Tensor, parts: Any, spec: Any, bias: Tensor | None, impl: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features(spec)[0])


@torch.library.custom_op(
    "peftfast::nf4_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor[] parts, int[] spec, str impl) -> Tensor",
)
def _library_linear_backward(dy: Tensor, parts: Any, spec: Any, impl: str) -> Tensor:
    (w4,) = unflatten(parts, spec, check=True)
    assert isinstance(w4, NF4Weight)
    if dy.shape[-1] != w4.shape[0]:
        raise ValueError(f"dy is {shape(dy)}; [..., {w4.shape[0]}] is needed")
    return _backward(dy, w4, impl)


@_library_linear_backward.register_fake
def _fake_linear_backward(dy: Tensor, parts: Any, spec: Any, impl: str) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], spec[2])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, parts, spec, bias, impl = inputs
    ctx.settings = (spec, impl)
    ctx.needs = (x.requires_grad, bias is not None and bias.requires_grad)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*parts)


def _library_autograd(ctx: Any, dy: Tensor) -> Any:
    spec, impl = ctx.settings
    need_x, need_bias = ctx.needs
    parts = list(ctx.saved_tensors)
    dx = torch.ops.peftfast.nf4_linear_backward(dy, parts, spec, impl) if need_x else None
    db = _bias_gradient(dy, ctx.bias_dtype) if need_bias else None
    return dx, [None] * part_count(spec), None, db, None


_library_linear.register_autograd(_library_autograd, setup_context=_setup_context)
