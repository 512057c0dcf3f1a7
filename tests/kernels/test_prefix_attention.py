"""The kernels of prefix-extended attention: numbers at odd sizes, both plans, spans, launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfast.reference import prefix_attention as reference
from peftfast_kernels import device, tiles, workspace
from peftfast_kernels import prefix_attention as kernels
from tests.bottleneck import DEVICE, LOW
from tests.tolerance import assert_within

F32 = torch.float32
SEED = torch.tensor([3], device=DEVICE)
# B, Hq, Hkv, S, T, P, D, and what is on; dtypes take turns.
CASES: list[tuple[Sequence[int], dict[str, Any]]] = [
    ((2, 4, 4, 9, 9, 5, 16), {"is_causal": True}),
    ((2, 4, 1, 19, 19, 64, 32), {"is_causal": True, "gate": True}),
    ((1, 8, 1, 1, 20, 1000, 16), {"is_causal": True, "prefix_dtype": F32}),
    ((2, 8, 2, 1, 37, 1, 64), {"is_causal": True, "sinks": True}),
    ((2, 2, 1, 7, 21, 5, 24), {"mask": "bool", "prefix_mask": "bool"}),
    ((2, 2, 2, 21, 7, 20, 16), {"mask": "add", "prefix_mask": "add", "softcap": 2.0}),
    ((1, 2, 1, 37, 37, 33, 16), {"is_causal": True, "window": 20, "softcap": 5.0}),
    ((4, 4, 2, 5, 19, 12, 16), {"bank": True, "gate": True, "prefix_dtype": F32}),
    ((4, 1, 1, 19, 20, 11, 16), {"bank": True, "window": 15, "dropout_p": 0.3}),
    ((2, 4, 1, 17, 17, 16, 16), {"is_causal": True, "dropout_p": 0.5, "sinks": True, "gate": True}),
    ((4, 2, 1, 9, 9, 40, 16), {"form": "relu", "is_causal": True, "bank": True, "gate": True}),
    ((2, 2, 2, 10, 13, 3, 80), {"form": "relu", "dropout_p": 0.2, "mask": "bool"}),
    ((1, 1, 1, 19, 18, 9, 256), {"gate": True}),
    ((2, 2, 1, 3, 0, 4, 16), {}),
]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that is allocated without values holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Operands exact in their dtypes; the first query of a row sees no key by its mask."""

    def __init__(
        self,
        sizes: Sequence[int],
        dtype: torch.dtype,
        *,
        mask: str = "none",
        prefix_mask: str = "none",
        sinks: bool = False,
        gate: bool = False,
        bank: bool = False,
        prefix_dtype: torch.dtype | None = None,
        dropout_p: float = 0.0,
        **options: Any,
    ) -> None:
        batch, heads, kv_heads, queries, keys, rows, width = sizes
        self.dtype = dtype

        def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=DEVICE).to(kind)

        def masked(kind: str, *shape: int) -> Tensor | None:
            if kind == "none":
                return None
            if kind == "add":
                return draw(*shape)
            kept = torch.rand(shape, device=DEVICE) > 0.3
            kept[0, :, 0] = False
            return kept

        prefix = (3 if bank else 1, kv_heads, rows, width)
        of_prefix = prefix_dtype or dtype
        self.leaves = {
            "q": draw(batch, heads, queries, width),
            "k": draw(batch, kv_heads, keys, width),
            "v": draw(batch, kv_heads, keys, width),
            "prefix_k": draw(*prefix, kind=of_prefix),
            "prefix_v": draw(*prefix, kind=of_prefix),
            "sinks": draw(heads) if sinks else None,
            "gate": draw(batch, kind=of_prefix) if gate else None,
        }
        index = torch.tensor([2, -1, 0, 2], dtype=torch.int32, device=DEVICE)
        lengths = torch.tensor([rows, rows, (rows + 1) // 2], device=DEVICE)
        self.settings: dict[str, Any] = {
            "attn_mask": masked(mask, batch, 1, queries, keys),
            "prefix_mask": masked(prefix_mask, batch, 1, 1, rows),
            "is_causal": False,
            "scale": width**-0.5,
            "window": None,
            "softcap": None,
            "prefix_index": index[:batch] if bank else None,
            "prefix_lengths": lengths if bank else None,
            "form": "softmax",
            "dropout_p": dropout_p,
            "seed": SEED if dropout_p else None,
            **options,
        }
        self.dy = draw(batch, queries, heads, width).transpose(1, 2)
        self.needs = [one is not None for one in self.leaves.values()]

    @property
    def names(self) -> list[str]:
        """Of the gradients there are."""
        return [name for name, one in self.leaves.items() if one is not None]

    def operands(self) -> dict[str, Any]:
        return {**self.leaves, **self.settings}

    def run(self) -> dict[str, Tensor]:
        """The kernels' output and gradients."""
        y, lse = kernels.prefix_attention_forward(**self.operands())
        return {"y": y, **self.backward(y, lse)}

    def backward(self, y: Tensor, lse: Tensor) -> dict[str, Tensor]:
        grads = kernels.prefix_attention_backward(
            self.dy, y=y, lse=lse, needs=self.needs, **self.operands()
        )
        return dict(zip(self.names, grads, strict=True))

    def formula(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The concatenation's at a dtype, of every operand."""
        leaves = {
            name: None if one is None else one.to(dtype).requires_grad_()
            for name, one in self.leaves.items()
        }
        y = reference.prefix_attention(**leaves, **self.settings)  # type: ignore[arg-type]
        wanted = [leaves[name] for name in self.names]
        grads = torch.autograd.grad(y, wanted, self.dy.to(dtype))  # type: ignore[arg-type]
        return {"y": y.detach(), **dict(zip(self.names, grads, strict=True))}


def _assert_all_within(
    ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    for name, exact in truth.items():
        if exact.numel() > 8:
            assert_within(ours[name], eager[name], exact, name)
        else:  # a few sums: eager's own error may be small by chance
            tolerance = 100 * torch.finfo(ours["y"].dtype).eps
            torch.testing.assert_close(ours[name].double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_against_float64(number: int) -> None:
    torch.manual_seed(number)
    sizes, options = CASES[number]
    dtype = LOW if number % 2 or "prefix_dtype" in options else F32
    case = Case(sizes, dtype, **options)
    ours, eager, truth = case.run(), case.formula(dtype), case.formula(torch.float64)
    _assert_all_within(ours, eager, truth)
    for name in ("q", "k", "v"):
        assert ours[name].dtype == dtype
    assert ours["prefix_k"].dtype == ours["prefix_v"].dtype == F32


@pytest.mark.parametrize("number", [0, 3, 8, 10])
def test_the_log_sum_exp_is_the_references(number: int) -> None:
    sizes, options = CASES[number]
    case = Case(sizes, F32, **options)
    y, lse = kernels.prefix_attention_forward(**case.operands())
    expected, of_reference = reference.prefix_attention_forward(**case.operands())
    torch.testing.assert_close(lse, of_reference, rtol=1e-5, atol=1e-5)
    assert y.stride() == expected.stride()


def test_a_row_that_sees_nothing_is_zero() -> None:
    case = Case((2, 2, 2, 4, 6, 3, 16), F32, mask="bool")
    case.settings["prefix_index"] = torch.tensor([-1, 0], device=DEVICE)
    results = case.run()
    _, lse = kernels.prefix_attention_forward(**case.operands())
    assert torch.isposinf(lse[0, :, 0]).all() and torch.isfinite(lse[1]).all()
    assert not results["y"][0, :, 0].any() and not results["q"][0, :, 0].any()
    assert results["y"][1].all()


LIBRARY: list[tuple[Sequence[int], dict[str, Any]]] = [
    ((2, 4, 2, 20, 20, 9, 16), {"is_causal": True, "sinks": True, "gate": True}),
    ((3, 2, 1, 1, 23, 5, 32), {"is_causal": True, "bank": True}),
    ((2, 2, 1, 5, 23, 40, 16), {"prefix_dtype": F32}),
]


@pytest.mark.parametrize("number", range(len(LIBRARY)))
def test_the_library_plan_adds_the_prefix_to_torchs_attention(number: int) -> None:
    sizes, options = LIBRARY[number]
    dtype = LOW if DEVICE == "cuda" or "prefix_dtype" in options else F32
    case = Case(sizes, dtype, **options)
    with tiles.forced_attention_plan("library"):
        ours = case.run()
    with tiles.forced_attention_plan("fused"):
        fused = case.run()
    eager, truth = case.formula(dtype), case.formula(torch.float64)
    _assert_all_within(ours, eager, truth)
    assert any(not torch.equal(ours[name], fused[name]) for name in truth)


@pytest.mark.parametrize(
    "options",
    [{"mask": "bool"}, {"window": 4}, {"softcap": 1.0}, {"dropout_p": 0.1}, {"form": "relu"}],
)
def test_what_torchs_attention_lacks_is_fused(options: dict[str, Any]) -> None:
    case = Case((1, 2, 1, 5, 5, 3, 16), F32, **options)
    expected = case.run()
    with tiles.forced_attention_plan("library"):
        ours = case.run()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_the_rule_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTFAST_PREFIX_ATTENTION", raising=False)
    assert tiles.prefix_attention_plan(torch.bfloat16, 128, True) == "library"
    assert tiles.prefix_attention_plan(torch.bfloat16, 100, True) == "fused"
    assert tiles.prefix_attention_plan(F32, 128, True) == "fused"
    assert tiles.prefix_attention_plan(torch.bfloat16, 128, False) == "fused"
    monkeypatch.setenv("PEFTFAST_PREFIX_ATTENTION", "fused")
    assert tiles.prefix_attention_plan(torch.bfloat16, 128, True) == "fused"
    monkeypatch.setenv("PEFTFAST_PREFIX_ATTENTION", "fast")
    with pytest.raises(ValueError, match="'fast'; allowed: 'fused', 'library'"):
        tiles.prefix_attention_plan(torch.bfloat16, 128, True)


def test_spans_of_queries_are_summed_in_order() -> None:
    case = Case((4, 4, 1, 17, 3, 8, 16), F32, bank=True)
    results = []
    for sms in (132, 132, 1):
        with device.pretend(80, sms), workspace.observe() as seen:
            results.append(case.run())
        assert bool(seen) == (sms > 1)
    many, again, few = results
    assert all(torch.equal(many[name], again[name]) for name in many)
    for name in many:
        torch.testing.assert_close(many[name], few[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["softmax", "relu"])
@pytest.mark.parametrize("plan", ["fused", "library"])
def test_each_gradient_alone(plan: str, form: str) -> None:
    case = Case((2, 2, 1, 9, 9, 6, 16), F32, is_causal=True, sinks=True, gate=True, form=form)
    y, lse = kernels.prefix_attention_forward(**case.operands())
    with tiles.forced_attention_plan(plan):
        together = case.backward(y, lse)
        for i, name in enumerate(case.names):
            case.needs = [i == j for j in range(7)]
            grads = kernels.prefix_attention_backward(
                case.dy, y=y, lse=lse, needs=case.needs, **case.operands()
            )
            assert len(grads) == 1
            if form == "relu" and name == "sinks":  # from y, for k and v may not be there
                torch.testing.assert_close(grads[0], together[name], rtol=1e-3, atol=1e-3)
            else:
                assert torch.equal(grads[0], together[name]), name
        case.needs = [False] * 7
        nothing = kernels.prefix_attention_backward(
            case.dy, y=y, lse=lse, needs=case.needs, **case.operands()
        )
    assert nothing == []


def test_any_strides() -> None:
    case = Case((1, 2, 1, 9, 11, 6, 16), F32, mask="bool")
    expected = case.run()
    for name in ("q", "k", "v", "prefix_k", "prefix_v"):
        one = case.leaves[name]
        assert one is not None
        case.leaves[name] = one.transpose(1, 3).contiguous().transpose(1, 3)
    mask = case.settings["attn_mask"]
    case.settings["attn_mask"] = mask.transpose(2, 3).contiguous().transpose(2, 3)
    ours = case.run()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    case.dy = torch.ones((), device=DEVICE).expand(case.dy.shape)
    alike = case.run()
    case.dy = case.dy.contiguous()
    expected = case.run()
    assert all(torch.equal(alike[name], expected[name]) for name in expected)


def test_no_queries() -> None:
    case = Case((2, 2, 1, 0, 5, 3, 16), F32, sinks=True, gate=True)
    results = case.run()
    assert results["y"].shape == (2, 2, 0, 16)
    assert not any(results[name].any() for name in case.names)


def test_few_queries_share_a_program() -> None:
    long, short = (
        kernels.record(90, 8, queries, 2048, 64, 128, torch.bfloat16, backward=False)[0]
        for queries in (2048, 1)
    )
    assert (long.meta["PACK"], short.meta["PACK"]) == (1, 4)
    assert short.programs == 8 * 8
    assert short.meta["BLOCK_M"] == 16


def test_programs_of_the_prefix_fill_the_gpu() -> None:
    launches = kernels.record(90, 8, 2048, 2048, 128, 128, torch.bfloat16)
    (of_prefix,) = [one for one in launches if "grad_prefix" in one.name]
    assert of_prefix.programs >= 132
