"""4-bit weights: bits against bitsandbytes on every implementation, the linear against float64,
and the contract.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from peftfast.native import library
from peftfast.ops import ImplUnavailable, lora_linear, nf4
from peftfast.ops.nf4_weight import flatten, unflatten
from peftfast.reference import nf4 as reference
from tests.tolerance import assert_within

try:
    import bitsandbytes.functional as bnb
except ImportError:
    bnb = None

against_bnb = pytest.mark.skipif(bnb is None, reason="bitsandbytes is not installed")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NATIVE_MISSING = library.missing("cuda" if CUDA else "cpu")
native = pytest.param(
    "native", marks=pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))
)
IMPLS = ["reference", "triton", native]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def _skip_what_cant_run(impl: str, dtype: torch.dtype) -> None:
    if impl == "triton" and dtype == torch.bfloat16 and not CUDA:
        pytest.skip("the interpreter computes bfloat16 wrong")


def _oracle(
    w: Tensor, block_size: int, quant_type: str, double_quant: bool
) -> tuple[Tensor, Any, Tensor]:
    """bitsandbytes' packed weight, its state, and its values.

    The values are those of the flat tensor: on a CPU with AVX-512 its kernel takes a wrong scale
    where rows are not whole blocks (0.50).
    """
    packed, state = bnb.quantize_4bit(
        w, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
    )
    flat = copy.copy(state)
    flat.shape = torch.Size([w.numel()])
    values = bnb.dequantize_4bit(packed.view(-1, 1), flat).reshape(-1)[: w.numel()]
    return packed, state, values.view(w.shape)


def _draw_weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.05
    kind = seed % 4
    if kind == 1:  # zero blocks, and values at the ends of the table
        w.view(-1)[: min(70, w.numel())] = 0.0
        w.view(-1)[-1] = 4.0
    elif kind == 2:  # exact midpoints of the table, where rounding decides
        table = reference.table("nf4" if seed % 8 < 4 else "fp4", w.device).sort().values
        middles = (table[1:] + table[:-1]) / 2
        w = middles[torch.randint(15, w.shape, generator=generator)]
        w.view(-1)[0] = 1.0
    elif kind == 3:
        w *= 1e-6
    return w.to(DEVICE, dtype)


@against_bnb
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_bits_are_those_of_bitsandbytes(
    impl: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
    double_quant: bool,
    seed: int,
) -> None:
    if impl == "triton" and dtype == torch.bfloat16 and not CUDA:
        dtype = torch.float16
    w = _draw_weight(rows, columns, dtype, seed)
    packed, state, values = _oracle(w, block_size, quant_type, double_quant)
    quantise_impl = "triton" if impl == "native" and CUDA else impl
    ours = nf4.quantize(
        w,
        block_size=block_size,
        double_quant=double_quant,
        quant_type=quant_type,
        impl=quantise_impl,
    )
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    if double_quant:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.nested_code, state.state2.code)
        assert torch.equal(ours.offset, state.offset)
    out = torch.full(w.shape, torch.nan, dtype=dtype, device=DEVICE)
    assert nf4.dequantize(ours, out=out, impl=impl) is out
    assert torch.equal(out, values)


@pytest.mark.parametrize("impl", ["triton", native])
@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_implementations_agree_on_a_device(
    impl: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
    double_quant: bool,
    seed: int,
) -> None:
    if impl == "triton" and dtype == torch.bfloat16 and not CUDA:
        dtype = torch.float16
    w = _draw_weight(rows, columns, dtype, seed)
    settings = {"block_size": block_size, "double_quant": double_quant, "quant_type": quant_type}
    expected = nf4.quantize(w, **settings, impl="reference")
    if impl == "triton" or not CUDA:
        ours = nf4.quantize(w, **settings, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(ours.parts, expected.parts, strict=True))
    values = nf4.dequantize(expected, impl="reference")
    out = torch.full(w.shape, torch.nan, dtype=dtype, device=DEVICE)
    assert torch.equal(nf4.dequantize(expected, out=out, impl=impl), values)


@against_bnb
@pytest.mark.parametrize("impl", IMPLS)
def test_a_weight_of_a_real_size(impl: str) -> None:
    w = _draw_weight(384, 1536, torch.float16, 0)
    _, _, values = _oracle(w, 64, "nf4", True)
    ours = nf4.quantize(w, impl="auto")
    assert torch.equal(nf4.dequantize(ours, impl=impl), values)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_values(impl: str, dtype: torch.dtype) -> None:
    """The values are products in float32, rounded once to whatever dtype is asked for."""
    _skip_what_cant_run(impl, dtype)
    w4 = nf4.quantize(_draw_weight(33, 65, torch.float32, 0))
    exact = nf4.dequantize(w4, torch.float32, impl="reference")
    assert torch.equal(nf4.dequantize(w4, dtype, impl=impl), exact.to(dtype))


@against_bnb
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_bitsandbytes_weight_is_shared(nested: bool, storage: torch.dtype) -> None:
    w = _draw_weight(64, 128, torch.bfloat16, 0)
    packed, state = bnb.quantize_4bit(
        w, quant_type="nf4", compress_statistics=nested, quant_storage=storage
    )
    w4 = nf4.NF4Weight.from_bnb(packed, state)
    assert w4.shape == w.shape and w4.dtype == w.dtype and w4.nested == nested
    assert w4.packed.data_ptr() == packed.data_ptr()
    assert w4.absmax is state.absmax
    assert torch.equal(nf4.dequantize(w4), bnb.dequantize_4bit(packed, state))


def _state(**changes: Any) -> tuple[Tensor, Any]:
    packed, state = bnb.quantize_4bit(
        _draw_weight(64, 128, torch.float32, 0), quant_type="nf4", compress_statistics=True
    )
    for name, value in changes.items():
        target, _, attribute = name.rpartition("__")
        owner = state.state2 if target else state
        setattr(owner, attribute, value(getattr(owner, attribute)) if callable(value) else value)
    return packed, state


@against_bnb
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"absmax": lambda v: v[:-1]}, ValueError, r"absmax is \[127\]; \[128\] is needed"),
        ({"absmax": lambda v: v.float()}, TypeError, "absmax is torch.float32; torch.uint8"),
        ({"absmax": lambda v: v.repeat(2)[::2]}, ValueError, "absmax is not contiguous"),
        ({"absmax": None}, TypeError, "absmax is NoneType"),
        ({"code": lambda v: v.flip(0)}, ValueError, "not the table of nf4"),
        ({"code": lambda v: v[:8]}, ValueError, r"quant_state.code is \[8\]"),
        ({"code": None}, ValueError, "quant_state.code is NoneType"),
        ({"quant_type": "fp4"}, ValueError, "not the table of fp4"),
        ({"quant_type": "int4"}, ValueError, "quant_type is 'int4'"),
        ({"blocksize": 48}, ValueError, "block_size is 48"),
        ({"blocksize": 128}, ValueError, "absmax is"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
        ({"shape": torch.Size((64, 130))}, ValueError, "packed is"),
        ({"shape": None}, ValueError, "quant_state.shape is None"),
        ({"offset": None}, ValueError, "belong together"),
        ({"offset": lambda v: v.int()}, TypeError, "offset is torch.int32"),
        ({"offset": lambda v: v * torch.nan}, ValueError, "offset is not finite"),
        ({"state2__absmax": lambda v: v[:0]}, ValueError, "nested_absmax is"),
        ({"state2__absmax": lambda v: v * torch.inf}, ValueError, "nested_absmax is not finite"),
        ({"state2__code": lambda v: v.double()}, TypeError, "nested_code is torch.float64"),
        ({"state2__code": lambda v: v.flip(0)}, ValueError, "not an ascending table"),
        ({"state2__blocksize": 128}, ValueError, "blocks of 128; 256 is needed"),
    ],
)
def test_a_damaged_state_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    packed, state = _state(**changes)
    with pytest.raises(error, match=message):
        nf4.NF4Weight.from_bnb(packed, state)


@against_bnb
def test_other_things_than_states_are_refused() -> None:
    packed, state = _state()
    with pytest.raises(ValueError, match=r"packed is \[4095\]; \[4096\] is needed"):
        nf4.NF4Weight.from_bnb(packed[1:], state)
    with pytest.raises(ValueError, match="not quantised yet"):
        nf4.NF4Weight.from_bnb(packed)
    with pytest.raises(TypeError, match="packed is list"):
        nf4.NF4Weight.from_bnb([1], state)  # type: ignore[arg-type]
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="packing for CPU inference"):
        nf4.NF4Weight.from_bnb(packed, state)


GOOD = torch.linspace(-1, 1, 64 * 128).view(64, 128)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: nf4.quantize([1.0]), TypeError, "w is list"),
        (lambda w: nf4.quantize(w.double()), TypeError, "w is torch.float64"),
        (lambda w: nf4.quantize(w[:0]), ValueError, "w is empty"),
        (lambda w: nf4.quantize(w, block_size=16), ValueError, "block_size is 16"),
        (lambda w: nf4.quantize(w, block_size=64.0), ValueError, "block_size is 64.0"),
        (lambda w: nf4.dequantize(nf4.quantize(w), out=[1]), TypeError, "out is list"),
        (lambda w: nf4.quantize(w, quant_type="NF4"), ValueError, "quant_type is 'NF4'"),
        (lambda w: nf4.quantize(w / 0), ValueError, "not finite"),
        (lambda w: nf4.quantize(w, impl="fast"), ValueError, "impl is 'fast'"),
        (lambda w: nf4.dequantize(w), TypeError, "w4 is Tensor"),
        (lambda w: nf4.dequantize(nf4.quantize(w), torch.int8), TypeError, "dtype is torch.int8"),
        (
            lambda w: nf4.dequantize(nf4.quantize(w), out=torch.empty(64, 127)),
            ValueError,
            r"out is torch.float32 \[64, 127\]",
        ),
        (
            lambda w: nf4.dequantize(nf4.quantize(w), torch.float16, out=torch.empty(64, 128)),
            ValueError,
            "torch.float16",
        ),
        (
            lambda w: nf4.dequantize(nf4.quantize(w), out=torch.empty(128, 64).t()),
            ValueError,
            "contiguous",
        ),
        (lambda w: nf4.linear(w, w), TypeError, "w4 is Tensor"),
        (lambda w: nf4.linear(w[:, :5], nf4.quantize(w)), ValueError, "in is 128 in one, 5"),
        (lambda w: nf4.linear(w, nf4.quantize(w.view(-1))), ValueError, "2 dimensions"),
        (lambda w: nf4.linear(w.int(), nf4.quantize(w)), TypeError, "x is torch.int32"),
        (lambda w: nf4.linear(w, nf4.quantize(w), w[0]), ValueError, r"bias is \[128\]"),
        (lambda w: nf4.linear(w, nf4.quantize(w).to("meta")), ValueError, "w4 is on meta"),
        (lambda w: nf4.quantize(w).with_compute_dtype(torch.int8), TypeError, "compute_dtype"),
    ],
)
@pytest.mark.skipif(CUDA, reason="the same on every device")
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(GOOD)


def test_an_explicit_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    w4 = nf4.quantize(GOOD.to(DEVICE))
    monkeypatch.setattr(library, "missing", lambda kind: "the library was not built")
    x = torch.randn(3, 128, device=DEVICE)
    for call in (
        lambda impl: nf4.dequantize(w4, impl=impl),
        lambda impl: nf4.linear(x, w4, impl=impl),
    ):
        with pytest.raises(ImplUnavailable, match="the library was not built"):
            call("native")
        call("auto")
        if not CUDA:
            with pytest.raises(ImplUnavailable, match="interpreter computes bfloat16 wrong"):
                nf4.dequantize(w4, torch.bfloat16, impl="triton")


def test_non_contiguous_tensors_are_quantised_in_their_logical_order() -> None:
    w = GOOD.to(DEVICE)
    assert torch.equal(nf4.quantize(w.t()).packed, nf4.quantize(w.t().contiguous()).packed)


# The linear


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "outs", "block_size"),
    [(1, 128, 96, 64), (2, 130, 33, 64), (5, 127, 40, 32), (40, 256, 70, 64), (0, 64, 8, 64)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_against_float64(
    impl: str,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    outs: int,
    block_size: int,
    bias: bool,
) -> None:
    _skip_what_cant_run(impl, dtype)
    w4 = nf4.quantize(_draw_weight(outs, columns, dtype, 0), block_size=block_size)
    w = nf4.dequantize(w4, dtype, impl="reference")
    x = torch.randn(rows, columns, device=DEVICE).to(dtype).requires_grad_()
    b = torch.randn(outs, device=DEVICE).to(dtype).requires_grad_() if bias else None
    dy = torch.randn(rows, outs, device=DEVICE).to(dtype)
    leaves = [x] if b is None else [x, b]

    y = nf4.linear(x, w4, b, impl=impl)
    grads = torch.autograd.grad(y, leaves, dy)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        inputs = [v.detach().to(dtype).requires_grad_() for v in leaves]
        out = torch.nn.functional.linear(inputs[0], w.to(dtype), *inputs[1:])
        return [out, *torch.autograd.grad(out, inputs, dy.to(dtype))]

    for ours, eager, truth in zip([y, *grads], plain(dtype), plain(torch.float64), strict=True):
        assert ours.dtype == dtype
        assert_within(ours, eager, truth)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_a_compute_dtype_of_its_own(rows: int, dtype: torch.dtype, compute: torch.dtype) -> None:
    w4 = nf4.quantize(_draw_weight(48, 128, torch.float32, 0)).with_compute_dtype(compute)
    w = nf4.dequantize(w4, compute)
    x = torch.randn(rows, 128, device=DEVICE, dtype=dtype, requires_grad=True)
    bias = torch.randn(48, device=DEVICE)
    dy = torch.randn(rows, 48, device=DEVICE, dtype=dtype)
    y = nf4.linear(x, w4, bias)
    (dx,) = torch.autograd.grad(y, x, dy)
    eager = torch.nn.functional.linear(x.detach().to(compute), w, bias.to(compute)).to(dtype)
    rounded = x.detach().to(compute).double()
    truth = torch.nn.functional.linear(rounded, w.double(), bias.to(compute).double())
    assert y.dtype == dx.dtype == dtype
    assert_within(y, eager, truth, "y")
    given = dy.to(compute)
    assert_within(dx, (given @ w).to(dtype), given.double() @ w.double(), "dx")


def test_only_the_packed_weight_is_saved() -> None:
    w4 = nf4.quantize(GOOD.to(DEVICE))
    x = torch.randn(7, 128, device=DEVICE, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = nf4.linear(x, w4)
    parts = {part.data_ptr() for part in w4.parts}
    assert {t.data_ptr() for t in kept} == parts
    y.sum().backward()


def test_autocast_casts_the_input() -> None:
    w4 = nf4.quantize(GOOD.to(DEVICE))
    x = torch.randn(7, 128, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = nf4.linear(x, w4)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_second_derivatives_raise() -> None:
    w4 = nf4.quantize(GOOD.to(DEVICE))
    x = torch.randn(7, 128, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(nf4.linear(x, w4).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="nf4_linear has no second derivative"):
        dx.sum().backward()


@pytest.mark.skipif(CUDA, reason="a CPU's buffer")
def test_one_scratch_buffer_serves_every_layer() -> None:
    from peftfast.ops.scratch import scratch_bytes

    nf4.clear_scratch()
    assert scratch_bytes() == 0
    x = torch.randn(600, 128)
    weights = [nf4.quantize(torch.randn(n, 128)) for n in (64, 256, 32)]
    for w4 in weights:
        nf4.linear(x, w4, impl="reference")
    assert scratch_bytes() == 256 * 128 * 4
    with torch.inference_mode():
        nf4.clear_scratch()
        nf4.linear(x, weights[0], impl="reference")
    y = nf4.linear(x.requires_grad_(), weights[0], impl="reference")
    y.sum().backward()


# Library ops and compilation


def test_opcheck() -> None:
    w = _draw_weight(40, 128, torch.float32, 0)
    for double_quant in (True, False):
        arguments = (w, 64, double_quant, "nf4", "reference")
        opcheck(torch.ops.peftfast.nf4_quantize.default, arguments)
        w4 = nf4.quantize(w, double_quant=double_quant)
        five = (w4.packed, w4.absmax, w4.nested_absmax, w4.nested_code, w4.offset)
        out = torch.zeros(40, 128, dtype=torch.float16, device=DEVICE)
        settings = (64, "nf4", torch.float16, "reference", out)
        opcheck(torch.ops.peftfast.nf4_dequantize.default, (*five, *settings))
        parts, spec = flatten([w4])
        x = torch.randn(3, 5, 128, device=DEVICE, requires_grad=True)
        bias = torch.randn(40, device=DEVICE, requires_grad=True)
        opcheck(torch.ops.peftfast.nf4_linear.default, (x, parts, spec, bias, "reference"))
        dy = torch.randn(3, 5, 40, device=DEVICE)
        opcheck(torch.ops.peftfast.nf4_linear_backward.default, (dy, parts, spec, "reference"))


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    w4 = nf4.quantize(_draw_weight(40, 128, torch.float32, 0))
    x = torch.randn(7, 128, device=DEVICE, requires_grad=True)
    bias = torch.randn(40, device=DEVICE, requires_grad=True)

    def run(x: Tensor, bias: Tensor) -> Tensor:
        dense = nf4.dequantize(w4)
        return nf4.linear(x.sin(), w4, bias) + torch.nn.functional.linear(x, dense)

    compiled = torch.compile(run, fullgraph=True)
    for rows in (7, 9):
        x = torch.randn(rows, 128, device=DEVICE, requires_grad=True)
        eager, got = run(x, bias), compiled(x, bias)
        torch.testing.assert_close(got, eager)
        expected = torch.autograd.grad(eager.sum(), [x, bias])
        for ours, theirs in zip(torch.autograd.grad(got.sum(), [x, bias]), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_an_adapter_over_four_bits_compiles_into_one_graph() -> None:
    w4 = nf4.quantize(_draw_weight(40, 128, torch.float32, 0))
    shapes = ((7, 128), (4, 128), (40, 4))
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    seed = torch.tensor([5], device=DEVICE)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x.sin(), w4, None, a, b, 0.5, dropout_p=0.1, seed=seed).square()

    eager, got = run(*leaves), torch.compile(run, fullgraph=True)(*leaves)
    torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-3)
    expected = torch.autograd.grad(eager.sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad(got.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_weights_travel_as_tensors_and_integers() -> None:
    w = _draw_weight(40, 128, torch.float16, 0)
    plain = nf4.quantize(w, double_quant=False, quant_type="fp4", block_size=128)
    weights = [nf4.quantize(w).with_compute_dtype(torch.bfloat16), w, plain]
    tensors, spec = flatten(weights)
    first, dense, last = unflatten(tensors, spec)
    assert dense is w
    for ours, sent in ((first, weights[0]), (last, plain)):
        assert isinstance(ours, nf4.NF4Weight) and isinstance(sent, nf4.NF4Weight)
        assert ours.__dict__ == sent.__dict__
    assert repr(last) == repr(plain)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gpu_rules_of_rounding(quant_type: str) -> None:
    """Written out number by number, as bitsandbytes' CUDA kernels decide (csrc/kernels.cu)."""
    w = _draw_weight(5, 77, torch.float32, 2 if quant_type == "nf4" else 6).cpu()
    packed, absmax = reference.quantize_blocks(w, 64, quant_type, gpu_rules=True)
    indices = torch.stack((packed >> 4, packed & 15), 1).view(-1)[: w.numel()].tolist()
    table = reference.table(quant_type, w.device)
    ascending = sorted(range(16), key=lambda i: (table[i].item(), i != 0))
    literals = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
    for e, value in enumerate(w.view(-1)):
        scaled = value * (1.0 / absmax[e // 64])
        if quant_type == "nf4":
            above = sum(bool(scaled > (table[i] + table[i + 1]) / 2) for i in range(15))
            expected = ascending[above]
        else:
            above = sum(bool(scaled.abs() > torch.tensor(bound)) for bound in literals)
            expected = [0, 1, 6, 7, 4, 5, 2, 3][above] + (8 if scaled < 0 else 0)
        assert indices[e] == expected, (e, scaled)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gpu_rules_of_a_block_of_zeros(quant_type: str) -> None:
    """0 / 0 is above no threshold: bitsandbytes' CUDA kernels give index 0."""
    w = torch.cat([torch.ones(64), torch.zeros(65)])
    packed, absmax = reference.quantize_blocks(w, 64, quant_type, gpu_rules=True)
    assert absmax.tolist() == [1.0, 0.0, 0.0] and not packed[32:].any()


def test_gpu_rules_of_the_statistics() -> None:
    """The bisection ends at the nearest entry of the code, or beside it at a tie."""
    code = reference.nested_code(torch.device("cpu"))
    values = torch.randn(1000)
    codes, absmax = reference.quantize_absmax(values, code, gpu_rules=True)
    padded = torch.nn.functional.pad(values, (0, 24)).view(-1, 256)
    scaled = (padded * (1 / absmax)[:, None]).view(-1)[:1000]
    best = (scaled[:, None] - code[None, :]).abs().min(1).values
    torch.testing.assert_close((scaled - code[codes.int()]).abs(), best, rtol=0.0, atol=1e-7)
    exact, _ = reference.quantize_absmax(code, code, gpu_rules=True)
    assert torch.equal(exact, torch.arange(256, dtype=torch.uint8))


@pytest.mark.skipif(CUDA, reason="a CPU's cache")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("columns", [96, 128, 127])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_is_used_block_by_block(
    nested: bool, columns: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of rows give what the whole weight gives; the buffer holds no more than a block."""
    from peftfast.ops import nf4 as op
    from peftfast.ops.scratch import scratch_bytes

    w4 = nf4.quantize(_draw_weight(2000, columns, dtype, 0), double_quant=nested)
    x = torch.randn(70, columns, dtype=dtype, requires_grad=True)
    b = torch.randn(2000, dtype=dtype) if bias else None
    dy = torch.randn(70, 2000, dtype=dtype)

    def run() -> tuple[Tensor, ...]:
        nf4.clear_scratch()
        y = nf4.linear(x, w4, b)
        return (y, *torch.autograd.grad(y, x, dy))

    whole = run()
    monkeypatch.setattr(op, "_BLOCK_BYTES", 1 << 17)
    blocks = run()
    if columns != 127:  # whose rows come together with the statistics' blocks after 16,384 only
        assert scratch_bytes() <= 1 << 18
    for ours, expected in zip(blocks, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4 if dtype.itemsize == 4 else 2e-2,
                                   atol=1e-4 if dtype.itemsize == 4 else 1e-1)  # fmt: skip


# Surroundings: default devices and dtypes, tracers, fake tensors


@pytest.mark.skipif(CUDA, reason="CPU tensors")
def test_a_default_device_elsewhere_is_not_followed() -> None:
    w4 = nf4.quantize(GOOD)
    x, a, b = torch.randn(40, 128), torch.randn(4, 128), torch.randn(64, 4)
    seed = torch.tensor([3])
    expected = lora_linear(x, w4, None, a, b, 1.0, dropout_p=0.5, seed=seed)
    nf4.clear_scratch()
    with torch.device("meta"):
        again = nf4.quantize(GOOD)
        got = lora_linear(x, w4, None, a, b, 1.0, dropout_p=0.5, seed=seed)
    assert torch.equal(got, expected)
    assert all(torch.equal(p, q) for p, q in zip(again.parts, w4.parts, strict=True))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers_see_library_ops(rows: int) -> None:
    w4 = nf4.quantize(GOOD.to(DEVICE))
    x = torch.randn(rows, 128, device=DEVICE)
    a, b = torch.randn(4, 128, device=DEVICE), torch.randn(64, 4, device=DEVICE)

    def run(x: Tensor) -> Tensor:
        return lora_linear(x, w4, None, a, b, 0.5) + nf4.linear(x, w4)

    expected = run(x)
    for traced in (make_fx(run)(x), torch.jit.trace(run, x, check_trace=False)):
        nf4.clear_scratch()
        nf4.linear(torch.randn(40, 128, device=DEVICE), nf4.quantize(GOOD.flip(0).to(DEVICE)))
        torch.testing.assert_close(traced(x), expected)


@pytest.mark.slow
def test_a_scaling_may_be_symbolic() -> None:
    w4 = nf4.quantize(GOOD.to(DEVICE))
    x, a = torch.randn(7, 128, device=DEVICE), torch.randn(4, 128, device=DEVICE)
    b = torch.randn(64, 4, device=DEVICE)

    def run(x: Tensor, scaling: float) -> Tensor:
        return lora_linear(x, w4, None, a, b, scaling)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for scaling in (2.0, 1.0, 0.25):
        torch.testing.assert_close(compiled(x, scaling), run(x, scaling))


def test_fake_tensors_leave_nothing_behind() -> None:
    with FakeTensorMode() as mode:
        w4 = nf4.quantize(torch.randn(64, 128))
        y = nf4.linear(torch.randn(40, 128), w4)
    assert isinstance(y, FakeTensor) and y.shape == (40, 64) and mode is not None
    real = nf4.quantize(GOOD.to(DEVICE))
    assert type(nf4.dequantize(real, impl="reference")) is Tensor


@pytest.mark.skipif(CUDA, reason="a CPU's GEMM")
def test_autocast_rounds_small_and_large_dense_weights_alike() -> None:
    """A weight that is used whole, and one that is cut into blocks, with the same first rows."""
    x, w = torch.randn(40, 1024), torch.randn(2200, 1024)
    a, b = torch.randn(4, 1024), torch.zeros(2200, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        large = lora_linear(x, w, None, a, b, 1.0)
        small = lora_linear(x, w[:1000], None, a, b[:1000], 1.0)
    # A few sums end beside each other where the products are added in another order; a third
    # of them does where only one of the weights is rounded.
    assert (large[:, :1000] == small).double().mean() > 0.98
    eager = torch.nn.functional.linear(x.bfloat16(), w.bfloat16())
    assert_within(large, eager, x.bfloat16().double() @ w.bfloat16().double().t())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda parts, spec: parts.__setitem__(0, parts[0][:4]), "packed is"),
        (lambda parts, spec: parts.__setitem__(1, parts[1][:1]), "absmax is"),
        (lambda parts, spec: spec.__setitem__(1, 200000), "packed is"),
        (lambda parts, spec: spec.__setitem__(2, 64), "packed is"),
        (lambda parts, spec: spec.__setitem__(3, 48), "block_size is 48"),
        (lambda parts, spec: parts.pop(), "spec has 7 numbers for 4 tensors"),
    ],
)
def test_library_ops_check_what_they_are_given(spoil: Any, message: str) -> None:
    parts, spec = flatten([nf4.quantize(GOOD.to(DEVICE))])
    spoil(parts, spec)
    x, a = torch.randn(40, 128, device=DEVICE), torch.randn(4, 128, device=DEVICE)
    b = torch.randn(64, 4, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        torch.ops.peftfast.nf4_linear(x, parts, spec, None, "auto")
    with pytest.raises(ValueError, match=message):
        torch.ops.peftfast.nf4_linear_backward(x[:, :64], parts, spec, "auto")
    with pytest.raises(ValueError, match=message):
        torch.ops.peftfast.lora_linear(
            x, parts, spec, [], [a], [b], [0], [1.0], [0.0], None, [0], [], "", False, "auto"
        )


def test_the_library_dequantiser_checks_its_output() -> None:
    w4 = nf4.quantize(GOOD.to(DEVICE))
    five = (w4.packed, w4.absmax, w4.nested_absmax, w4.nested_code, w4.offset)
    out = torch.empty(2048, 2048, device=DEVICE)
    with pytest.raises(ValueError, match=r"packed is \[4096\]; \[2097152\] is needed"):
        torch.ops.peftfast.nf4_dequantize(*five, 64, "nf4", torch.float32, "auto", out)


def test_a_bitsandbytes_offset_in_another_dtype_is_taken() -> None:
    """Its loading gives the offset torch's default dtype."""
    pytest.importorskip("bitsandbytes")
    packed, state = _state(offset=lambda v: v.bfloat16())
    w4 = nf4.NF4Weight.from_bnb(packed, state)
    assert w4.offset is not None and w4.offset.dtype == torch.float32
    assert torch.equal(nf4.dequantize(w4).flatten(), bnb.dequantize_4bit(packed, state).flatten())
