"""What tests of bottleneck adapters share: operands, and the comparison with float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftfast.ops import bottleneck
from peftfast.reference import bottleneck as reference
from tests.tolerance import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 wrong; on a GPU it is the dtype that matters most.
LOW = torch.bfloat16 if torch.cuda.is_available() else torch.float16
# Of x and of the weights.
DTYPES = [(torch.float32, torch.float32), (LOW, LOW), (LOW, torch.float32)]


class Case:
    """Operands exact in their dtypes, with up-projections, gates and norms that are not trivial.

    Args:
        m, d: widths; d_out: the residual's, where it is none or a tensor.
        leading: x's shape but for its features.
        dtypes: of x, residual and dy; of the parameters and the gate.
        residual: "x", "none" or "tensor".
        gate: None, "rows" [..., 1] or "sequences" [B, 1, ..., 1].
        learned: whether the scaling is a tensor.
        affine: whether a norm has parameters (LayerNorm both, RMSNorm a weight).
    """

    def __init__(
        self,
        m: int,
        d: int,
        *,
        d_out: int | None = None,
        leading: tuple[int, ...] = (3, 11),
        dtypes: tuple[torch.dtype, torch.dtype] = DTYPES[0],
        activation: str = "gelu",
        norm: str | None = None,
        affine: bool = True,
        gate: str | None = None,
        residual: str = "x",
        learned: bool = False,
        dropout_p: float = 0.0,
        bias: bool = True,
    ) -> None:
        self.dtypes, self.residual = dtypes, residual
        d_out = d if d_out is None or residual == "x" else d_out

        def draw(*shape: int, scale: float = 1.0, kind: int = 1) -> Tensor:
            value = torch.randn(shape, device=DEVICE, dtype=torch.float64) * scale
            return value.to(dtypes[kind]).double()

        self.leaves = {
            "x": draw(*leading, d, kind=0),
            "down": draw(m, d, scale=d**-0.5),
            "up": draw(d_out, m, scale=m**-0.5),
        }
        if norm is not None:  # rows whose mean is far from zero
            moved = self.leaves["x"] + draw(*leading, 1, scale=10.0)
            self.leaves["x"] = moved.to(dtypes[0]).double()
        if bias:
            self.leaves |= {"down_bias": draw(m), "up_bias": draw(d_out)}
        if norm is not None and affine:
            self.leaves["norm_weight"] = draw(d)
        if norm == "layer" and affine:
            self.leaves["norm_bias"] = draw(d)
        if learned:
            self.leaves["scaling"] = draw(1)
        if gate is not None:
            of_gate = leading if gate == "rows" else (leading[0], *[1] * (len(leading) - 1))
            self.leaves["gate"] = draw(*of_gate, 1)
        if residual == "tensor":
            self.leaves["residual"] = draw(*leading, d_out, kind=0)
        self.options: dict[str, Any] = {
            "activation": activation,
            "norm": norm,
            "norm_eps": 1e-3,
            "dropout_p": dropout_p,
            "seed": torch.tensor([7], device=DEVICE) if dropout_p else None,
            "scaling": 0.7,
            "residual": residual == "x",
        }
        self.dy = draw(*leading, d_out, kind=0)

    def operands(self, wide: bool = False) -> dict[str, Tensor]:
        """The tensors, in their dtypes or in float64, as leaves that ask for gradients."""
        of_x, of_parameters = (torch.float64,) * 2 if wide else self.dtypes
        rows = ("x", "residual")
        return {
            name: value.to(of_x if name in rows else of_parameters).requires_grad_()
            for name, value in self.leaves.items()
        }

    def call(self, operands: dict[str, Tensor], how: str) -> Tensor:
        """`how` is an impl, or "formula" for eager PyTorch."""
        given: dict[str, Any] = {"down_bias": None, "up_bias": None} | self.options | operands
        if how == "formula":
            return reference.bottleneck(**given)
        return bottleneck(**given, impl=how)

    def run(self, how: str, wide: bool = False) -> dict[str, Tensor]:
        """Output and every gradient."""
        operands = self.operands(wide)
        y = self.call(operands, how)
        grads = torch.autograd.grad(y, list(operands.values()), self.dy.to(y.dtype))
        return {"y": y, **{f"d{k}": g for k, g in zip(operands, grads, strict=True)}}


def check(impl: str, m: int, d: int, **options: Any) -> None:
    """Hold an implementation to the tolerance; over several draws where few numbers are summed."""
    draws = max(1, 64 // m)
    if options.get("learned") or options.get("gate"):
        draws = 16  # a gradient of one number, or of one for each row
    if 0 in options.get("leading", ()):
        draws = 1
    cases = [Case(m, d, **options) for _ in range(min(16, draws))]
    runs = [
        [case.run(how, wide) for case in cases]
        for how, wide in ((impl, False), ("formula", False), ("formula", True))
    ]
    for name in runs[0][0]:
        values = [torch.stack([one[name] for one in run]) for run in runs]
        assert values[0].dtype == values[1].dtype, name
        assert_within(*values, what=name)
