"""The LoRA kernels over lazy weights, over products of another dtype, and onto outputs that are
there already: float64 is the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.reference.dropout import keep_mask, keep_scale
from peftfast_kernels import lora, tiles
from peftfast_kernels.launch import Launch, recording
from tests.tolerance import assert_within

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LOW = torch.bfloat16 if CUDA else torch.float16
WIDE = torch.float64
# dtype of x, of the adapters, and of the base's product
DTYPES = [
    (torch.float32, torch.float32, LOW),
    (LOW, torch.float32, LOW),
    (LOW, LOW, LOW),
    (LOW, torch.float32, torch.float32),
]


class OneBuffer(Sequence[Tensor]):
    """Weights that share a buffer: reading one overwrites the one before; it counts the reads."""

    transient = True

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._buffer = torch.empty(max(w.numel() for w in weights), dtype=weights[0].dtype).to(
            DEVICE
        )
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, j: Any) -> Any:
        self.reads.append(j)
        self._buffer.fill_(torch.nan)
        w = self._weights[j]
        return self._buffer[: w.numel()].view(w.shape).copy_(w)


class Case:
    """Siblings with an adapter each (or none, where a rank is 0) on random operands."""

    def __init__(
        self,
        dtypes: tuple[torch.dtype, ...],
        rows: int = 19,
        columns: int = 40,
        outs: Sequence[int] = (24, 33, 8),
        ranks: Sequence[int] = (5, 0, 20),
        p: float = 0.3,
    ) -> None:
        self.dtype, adapters, self.compute = dtypes

        def draw(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, device=DEVICE).to(dtype)

        self.x = draw(rows, columns, dtype=self.dtype)
        self.weights = [draw(n, columns, dtype=self.compute) for n in outs]
        self.biases = [draw(n, dtype=self.dtype) for n in outs]
        self.owners = [j for j, r in enumerate(ranks) if r]
        self.lora_a = [draw(ranks[j], columns, dtype=adapters) for j in self.owners]
        self.lora_b = [draw(outs[j], ranks[j], dtype=adapters) for j in self.owners]
        self.dys = [draw(rows, n, dtype=self.dtype) for n in outs]
        self.scaling = [0.5 + i for i in range(len(self.owners))]
        self.p = p
        self.seed = torch.arange(len(self.owners), device=DEVICE) + 3
        self.options = {"compute_dtypes": [self.compute] * len(outs)}

    def settings(self) -> tuple[Any, ...]:
        count = len(self.owners)
        seed = self.seed if self.p else None
        return (self.lora_a, self.lora_b, self.owners, self.scaling, [self.p] * count, seed)

    def forward(self, weights: Sequence[Tensor], **options: Any) -> tuple[list[Tensor], Tensor]:
        return lora.lora_linear_forward(
            self.x, weights, self.biases, *self.settings(), **(self.options | options)
        )

    def backward(
        self, weights: Sequence[Tensor], t: Tensor, present: Sequence[int]
    ) -> list[Tensor]:
        dys = [dy if j in present else None for j, dy in enumerate(self.dys)]
        count = len(self.owners)
        nothing, everything = [False] * len(dys), [True] * count
        return lora.lora_linear_backward(
            dys, t, self.x, weights, [None] * len(dys), *self.settings(), True, nothing, nothing,
            everything, everything, **self.options,
        )  # fmt: skip

    def in_torch(self, wide: bool, present: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients in float64, or in the dtypes given as torch's own ops have them."""

        def lift(v: Tensor, dtype: torch.dtype) -> Tensor:
            return v.to(WIDE if wide else dtype)

        x, compute = self.x, self.compute
        ys, ts, masks = [], [], []
        dx = torch.zeros(x.shape, dtype=WIDE if wide else x.dtype, device=DEVICE)
        grads_a, grads_b = [], []
        for j, (w, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            b = lift(bias.to(compute), compute)
            y = F.linear(lift(x.to(compute), compute), lift(w, compute), b)
            ys.append(lift(y, x.dtype))
            if j in present:
                dx += lift(lift(self.dys[j].to(compute), compute) @ lift(w, compute), x.dtype)
        for i, (a, b, j) in enumerate(zip(self.lora_a, self.lora_b, self.owners, strict=True)):
            kind = a.dtype
            masks.append(keep_mask(self.seed[i], *x.shape, self.p) * keep_scale(self.p))
            dropped = lift(x, kind) * masks[i].to(WIDE if wide else kind)
            ts.append(dropped @ lift(a, kind).t() * self.scaling[i])
            ys[j] = ys[j] + lift(ts[i] @ lift(b, kind).t(), x.dtype)
            dy = lift(self.dys[j] * (j in present), kind)
            g = dy @ lift(b, kind) * self.scaling[i]
            grads_a.append(g.t() @ dropped)
            grads_b.append(dy.t() @ ts[i])
            dx += lift((g @ lift(a, kind)) * masks[i].to(WIDE if wide else kind), x.dtype)
        return ys, [dx, *grads_a, *grads_b]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(v)[6:] for v in d))
@pytest.mark.parametrize("plan", ["fused", "library"])
@pytest.mark.parametrize("transient", [True, False])
@pytest.mark.parametrize("present", [(0, 1, 2), (1, 2), (2,)])
def test_outputs_and_gradients(
    dtypes: tuple[torch.dtype, ...], plan: str, transient: bool, present: tuple[int, ...]
) -> None:
    case = Case(dtypes, p=0.3 if transient else 0.0)
    with tiles.forced_gemm_plan(plan):
        weights = OneBuffer(case.weights) if transient else case.weights
        ys, t = case.forward(weights)
        grads = case.backward(weights, t, present)
    truth, true_grads = case.in_torch(True, present)
    eager, eager_grads = case.in_torch(False, present)
    for j, y in enumerate(ys):
        assert y.dtype == case.dtype
        assert_within(y, eager[j], truth[j], f"y {j}")
    assert grads[0].dtype == case.dtype
    for i, grad in enumerate(grads):
        assert_within(grad, eager_grads[i], true_grads[i], f"gradient {i}")
    if isinstance(weights, OneBuffer):
        assert weights.reads == [0, 1, 2, *present]


@pytest.mark.parametrize("plan", ["fused", "library"])
def test_a_product_of_another_dtype_in_each_sibling(plan: str) -> None:
    case = Case((torch.float32, torch.float32, torch.float32), p=0.0)
    dtypes = [LOW, None, LOW]
    case.options = {"compute_dtypes": dtypes}
    weights = [w if d is None else w.to(d) for w, d in zip(case.weights, dtypes, strict=True)]
    with tiles.forced_gemm_plan(plan):
        ys, t = case.forward(weights)
        dx = case.backward(weights, t, (0, 1, 2))[0]
    true_dx, eager_dx = torch.zeros_like(case.x, dtype=WIDE), torch.zeros_like(case.x)
    for j, w in enumerate(weights):
        x, bias, dy = (v.to(w.dtype) for v in (case.x, case.biases[j], case.dys[j]))
        truth, eager = F.linear(x.double(), w.double(), bias.double()), F.linear(x, w, bias).float()
        true_dx += dy.double() @ w.double()
        eager_dx += (dy @ w).float()
        for i, (a, b) in enumerate(zip(case.lora_a, case.lora_b, strict=True)):
            if case.owners[i] == j:
                delta = b.double() @ a.double() * case.scaling[i]
                truth += case.x.double() @ delta.t()
                eager += case.x @ delta.float().t()
                true_dx += case.dys[j].double() @ delta
                eager_dx += case.dys[j] @ delta.float()
        assert_within(ys[j], eager, truth, f"y {j}")
    assert_within(dx, eager_dx, true_dx, "dx")


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=lambda d: "-".join(str(v)[6:] for v in d))
def test_onto_outputs_that_are_there(dtypes: tuple[torch.dtype, ...]) -> None:
    case = Case(dtypes, rows=3)
    truth, _ = case.in_torch(True, ())
    base = [F.linear(case.x.to(w.dtype), w, b.to(w.dtype)).to(case.dtype)
            for w, b in zip(case.weights, case.biases, strict=True)]  # fmt: skip
    low_rank = [y - F.linear(case.x.to(w.dtype).double(), w.double(), b.to(w.dtype).double())
                for y, w, b in zip(truth, case.weights, case.biases, strict=True)]  # fmt: skip
    given = [y.clone() for y in base]
    weights = OneBuffer(case.weights)
    ys, _ = case.forward(weights, base_ys=given)
    assert weights.reads == []
    eager, _ = case.in_torch(False, ())
    for j, (y, before) in enumerate(zip(ys, base, strict=True)):
        assert y.data_ptr() == given[j].data_ptr()
        assert_within(y, eager[j], before.double() + low_rank[j], f"y {j}")
    assert torch.equal(ys[1], base[1])  # it has no adapter


def test_no_rows() -> None:
    case = Case(DTYPES[0], rows=0)
    ys, t = case.forward(OneBuffer(case.weights))
    assert [y.shape for y in ys] == [(0, 24), (0, 33), (0, 8)] and t.shape == (0, 25)
    assert all(y.dtype == torch.float32 for y in ys)
    dx = case.backward(OneBuffer(case.weights), t, (0, 1, 2))[0]
    assert dx.shape == (0, 40)
    given = [case.x.new_empty((0, 24))] * 3
    assert case.forward(OneBuffer(case.weights), base_ys=given)[0] == given


# What is launched on a GPU


def _matmuls(arch: int, plan: str, compute: torch.dtype | None) -> list[Launch]:
    with tiles.forced_gemm_plan(plan):
        launches = lora.record(
            arch, 8192, 4096, [4096, 4096], [16, 16], torch.float32, torch.float32,
            compute_dtype=compute,
        )  # fmt: skip
    return [launch for launch in launches if launch.name == "_lora_matmul_kernel"]


@pytest.mark.parametrize("arch", tiles.ARCHES)
def test_narrow_products_run_on_tensor_cores(arch: int) -> None:
    launches = _matmuls(arch, "fused", torch.bfloat16)
    assert len(launches) == 4  # two outputs, and a sibling at a time for dx
    for launch in launches:
        arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        assert arguments["out_ptr"].dtype == torch.float32
        assert all(x.dtype == torch.bfloat16 for x in arguments["x_ptrs"])
        assert launch.mma == "native"
        assert launch.meta["RANK_PRECISION"] == "tf32x3"
    again = launches[-1]
    arguments = dict(zip(again.kernel.arg_names, again.args, strict=False))
    assert arguments["base_ptr"] is arguments["out_ptr"] and not arguments["t_ptrs"]


def test_the_library_multiplies_narrow_products_on_newer_gpus() -> None:
    assert tiles.gemm_plan(90, torch.bfloat16, True) == "library"
    for launch in _matmuls(90, "library", torch.bfloat16):
        arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        assert arguments["x_ptrs"] == () and arguments["base_ptr"].dtype == torch.bfloat16


def test_dense_siblings_still_meet_in_registers() -> None:
    with recording(80) as launches:
        case = Case((torch.float16, torch.float16, torch.float16), outs=(16, 16), ranks=(4, 4))
        x = case.x.to("meta")
        case.x, case.seed = x, case.seed.to("meta")
        for name in ("weights", "biases", "lora_a", "lora_b", "dys"):
            setattr(case, name, [v.to("meta") for v in getattr(case, name)])
        case.backward(case.weights, x.new_empty(19, 8), (0, 1))
    (only,) = [launch for launch in launches if launch.name == "_lora_matmul_kernel"]
    arguments = dict(zip(only.kernel.arg_names, only.args, strict=False))
    assert len(arguments["x_ptrs"]) == 2 and arguments["base_ptr"] is None
