"""The bottleneck adapter's kernels: numbers at odd sizes, spans of rows, launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast.reference import bottleneck as reference
from peftfast_kernels import bottleneck as kernels
from peftfast_kernels import device, tiles, workspace
from tests.bottleneck import DEVICE, DTYPES, Case
from tests.tolerance import assert_within

F32 = torch.float32
# Sizes and what is on: every activation, each option in several combinations.
CASES: list[tuple[int, int, dict[str, Any]]] = [
    (8, 64, {"activation": "relu"}),
    (24, 100, {"activation": "gelu", "norm": "layer", "gate": "rows", "dropout_p": 0.1}),
    (64, 100, {"activation": "silu", "norm": "rms", "residual": "none", "learned": True}),
    (1, 64, {"activation": "tanh", "residual": "tensor", "d_out": 37, "dropout_p": 0.5}),
    (17, 130, {"activation": "identity", "norm": "layer", "affine": False, "bias": False}),
    (130, 70, {"activation": "sigmoid", "norm": "rms", "gate": "sequences"}),
    (256, 64, {"activation": "gelu_tanh", "norm": "layer", "learned": True, "residual": "none"}),
    (5, 33, {"activation": "relu2", "d_out": 150, "residual": "tensor", "gate": "rows"}),
    (16, 520, {"activation": "quick_gelu", "norm": "layer", "residual": "tensor", "d_out": 7}),
    (3, 40, {"activation": "gelu_new", "leading": (60,), "learned": True}),
    (2, 300, {"activation": "gelu_fast", "norm": "rms", "affine": False}),
]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that is allocated without values holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_against_float64(number: int) -> None:
    m, d, options = CASES[number]
    dtypes = DTYPES[number % 3]
    case = Case(m, d, **{"leading": (2, 17), **options}, dtypes=dtypes)
    ours, eager, truth = case.run("triton"), case.run("formula"), case.run("formula", wide=True)
    for name, exact in truth.items():
        if exact.numel() > 1:
            assert_within(ours[name], eager[name], exact, name)
        else:  # one number: eager's own error may be small by chance
            tolerance = 100 * torch.finfo(min(dtypes, key=lambda one: one.itemsize)).eps
            torch.testing.assert_close(ours[name].double(), exact, rtol=tolerance, atol=tolerance)


def _operands(rows: int, d: int, m: int, norm: str | None, sequential: bool) -> dict[str, Any]:
    """What the backward takes, with a z and statistics of the reference's forward."""

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE)

    d_out = d if sequential else d + 3
    x, settings = (
        draw(rows, d) + 0.5,
        {
            "activation": "gelu",
            "scaling": draw(1),
            "norm": norm,
            "norm_weight": None if norm is None else draw(d),
            "norm_bias": draw(d) if norm == "layer" else None,
            "norm_eps": 1e-3,
            "gate": draw(rows),
            "dropout_p": 0.1,
            "seed": torch.tensor([3], device=DEVICE),
        },
    )
    weights = {
        "down": draw(m, d),
        "down_bias": draw(m),
        "up": draw(d_out, m),
        "up_bias": draw(d_out),
    }
    _, z, statistics = reference.bottleneck_forward(
        x, **weights, residual=None, dtype=F32, keep=True, **settings
    )
    given = {"dy": draw(rows, d_out), "x": x, "z": z, "statistics": statistics}
    return {**given, **weights, **settings, "sequential": sequential}


def _needs(operands: dict[str, Any]) -> list[bool]:
    return [operands[name] is not None for name in reference.GRADIENTS]


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_each_gradient_alone(norm: str | None, sequential: bool) -> None:
    operands = _operands(9, 20, 6, norm, sequential)
    needs = _needs(operands)
    together = iter(kernels.bottleneck_backward(**operands, needs=needs))
    for i, need in enumerate(needs):
        if not need:
            continue
        alone = [i == j for j in range(len(needs))]
        given = dict(operands)
        if not reference.reads_x(norm, alone):
            given["x"] = operands["x"].new_empty(()).expand(operands["x"].shape)
        (one,) = kernels.bottleneck_backward(**given, needs=alone)
        assert torch.equal(one, next(together)), reference.GRADIENTS[i]
    assert kernels.bottleneck_backward(**operands, needs=[False] * len(needs)) == []


@pytest.mark.parametrize("norm", [None, "layer"])
def test_spans_of_rows_are_summed_in_order(norm: str | None) -> None:
    operands = _operands(70, 20, 2, norm, True)
    results = []
    for sms, spans in ((132, 2), (132, 2), (1, 1)):
        with device.pretend(80, sms), workspace.observe() as seen:
            results.append(kernels.bottleneck_backward(**operands, needs=_needs(operands)))
        sizes = {part.shape[0] for part in seen if part.ndim == 2 and part.shape[1] == 40}
        assert sizes == ({spans} if spans > 1 or norm is not None else set())
    many, again, few = results
    assert all(torch.equal(a, b) for a, b in zip(many, again, strict=True))
    torch.testing.assert_close(many, few, rtol=1e-4, atol=1e-4)
    expected = reference.bottleneck_backward(**operands, needs=_needs(operands))
    torch.testing.assert_close(many, expected, rtol=1e-4, atol=1e-4)


def test_one_span_needs_no_workspace() -> None:
    operands = _operands(9, 20, 6, None, True)
    names = ("x", "down", "down_bias", "up", "up_bias", "gate")
    with workspace.observe() as seen:
        needs = [name in names for name in reference.GRADIENTS]
        kernels.bottleneck_backward(**operands, needs=needs)
    assert not seen


def test_any_strides() -> None:
    operands = _operands(9, 20, 6, "layer", True)
    strided = {
        name: one.t().contiguous().t() if isinstance(one, Tensor) and one.ndim == 2 else one
        for name, one in operands.items()
    }
    for name in ("z", "statistics"):
        strided[name] = operands[name]
    needs = _needs(operands)
    expected = kernels.bottleneck_backward(**operands, needs=needs)
    assert all(map(torch.equal, kernels.bottleneck_backward(**strided, needs=needs), expected))
    strided["dy"] = torch.ones((), device=DEVICE).expand(9, 20)
    operands["dy"] = torch.ones(9, 20, device=DEVICE)
    expected = kernels.bottleneck_backward(**operands, needs=needs)
    assert all(map(torch.equal, kernels.bottleneck_backward(**strided, needs=needs), expected))


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_statistics_of_rows_far_from_zero(offset: float) -> None:
    x = torch.randn(5, 700, device=DEVICE) + offset
    x[:, :64] += 3.0  # the shift is the mean of these
    one = torch.randn(2, 700, device=DEVICE)
    settings = _operands(5, 700, 2, "layer", False)
    given = {
        name: settings[name]
        for name in ("activation", "norm", "norm_weight", "norm_bias", "norm_eps")
    }
    _, _, statistics = kernels.bottleneck_forward(
        x, one, None, one.t(), None, scaling=1.0, residual=None, gate=None, dropout_p=0.0,
        seed=None, dtype=F32, keep=True, **given,
    )  # fmt: skip
    wide = x.double()
    assert statistics is not None
    torch.testing.assert_close(statistics[0].double(), wide.mean(1), rtol=3e-7, atol=1e-6)
    scale = (wide.var(1, correction=0) + 1e-3).rsqrt()
    torch.testing.assert_close(statistics[1].double(), scale, rtol=2e-6, atol=0)


@pytest.mark.parametrize("arch", tiles.ARCHES)
def test_launches(arch: int) -> None:
    low = torch.bfloat16
    plain = kernels.record(arch, 8192, 4096, 64, low, low)
    assert [one.name for one in plain] == [
        "_bottleneck_kernel",
        "_bottleneck_grad_z_kernel",
        "_bottleneck_grad_kernel",
        "_split_reduce_kernel",
    ]
    assert all(one.programs >= 128 for one in plain)
    normed = kernels.record(arch, 8192, 4096, 64, low, low, norm="layer")
    assert [one.name for one in normed[1:]] == [
        "_bottleneck_fold_kernel",
        "_bottleneck_grad_z_kernel",
        "_bottleneck_grad_kernel",
        "_bottleneck_finish_kernel",
        "_split_reduce_kernel",
    ]
    parallel = kernels.record(arch, 8192, 4096, 64, low, low, out_features=1024)
    names = [one.name for one in parallel]
    assert names.count("_bottleneck_grad_kernel") == 2


@pytest.mark.parametrize("rows", [1, 31, 2048, 8192, 100_001])
@pytest.mark.parametrize("width", [1, 24, 64, 256])
def test_spans_cover_every_row_once(rows: int, width: int) -> None:
    for block_m in (16, 32):
        span, splits = tiles.bottleneck_splits(rows, width, 64, block_m, 132)
        assert span % block_m == 0 and (splits - 1) * span < rows <= splits * span
        assert splits == 1 or span >= 16 * width


@pytest.mark.gpu
def test_addresses_beyond_31_bits() -> None:
    rows, d, m = (1 << 31) // 4096 + 16, 4096, 16
    x = torch.zeros(rows, d, dtype=torch.float16, device="cuda")
    x[-1] = torch.randn(d)
    down, up = torch.randn(m, d, device="cuda").half() / 64, torch.randn(d, m, device="cuda").half()
    settings: dict[str, Any] = {
        "activation": "relu", "scaling": 1.0, "residual": None, "norm": None, "norm_weight": None,
        "norm_bias": None, "norm_eps": 1e-5, "gate": None, "dropout_p": 0.0, "seed": None,
        "dtype": torch.float16, "keep": True,
    }  # fmt: skip
    y, z, _ = kernels.bottleneck_forward(x, down, None, up, None, **settings)
    last, of_z, _ = reference.bottleneck_forward(x[-1:], down, None, up, None, **settings)
    torch.testing.assert_close(y[-1:], last, rtol=1e-2, atol=1e-2)
    assert z is not None and of_z is not None
    torch.testing.assert_close(z[-1:], of_z, rtol=1e-2, atol=1e-2)
    assert not y[:-1].any()
