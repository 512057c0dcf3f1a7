"""What the benchmarks of a bottleneck adapter share: sizes, operands, eager PyTorch, peftfast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import Row
from peftfast.ops import bottleneck

OURS, EAGER = "peftfast", "eager"
NORMS = (None, "layer")
EPS = 1e-5


@dataclass(frozen=True)
class AdapterShape:
    """Sizes of a sequential adapter: x [rows, features], the bottleneck's width."""

    rows: int
    features: int
    bottleneck: int

    def as_dict(self) -> Row:
        """The fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class AdapterOperands:
    """Random operands; everything but dy requires a gradient."""

    x: Tensor
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    dy: Tensor

    def leaves(self, norm: str | None) -> dict[str, Tensor]:
        """x and the parameters that take part, by name."""
        names = ["x", "down", "down_bias", "up", "up_bias"]
        names += ["norm_weight", "norm_bias"] if norm is not None else []
        return {name: getattr(self, name) for name in names}

    def at(self, dtype: torch.dtype) -> AdapterOperands:
        """Copies in another dtype."""
        copies = {
            name: value.detach().to(dtype).requires_grad_(value.requires_grad)
            for name, value in vars(self).items()
        }
        return AdapterOperands(**copies)


def adapter_operands(
    shape: AdapterShape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> AdapterOperands:
    """Operands whose delta has about unit variance, so that every gradient counts."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float, mean: float = 0.0) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device)
        return (values * scale + mean).to(dtype)

    m, d, r = shape.rows, shape.features, shape.bottleneck
    leaves = {
        "x": normal(m, d, scale=1.0),
        "down": normal(r, d, scale=d**-0.5),
        "down_bias": normal(r, scale=0.1),
        "up": normal(d, r, scale=r**-0.5),
        "up_bias": normal(d, scale=0.1),
        "norm_weight": normal(d, scale=0.1, mean=1.0),
        "norm_bias": normal(d, scale=0.1),
    }
    dy = normal(m, d, scale=1.0)
    return AdapterOperands(
        **{name: value.requires_grad_() for name, value in leaves.items()}, dy=dy
    )


Forward = Callable[[AdapterOperands], Tensor]


def eager(norm: str | None) -> Forward:
    """Layer norm, linear, GELU, linear, add, each its own operation."""

    def forward(of: AdapterOperands) -> Tensor:
        n = of.x
        if norm is not None:
            n = F.layer_norm(n, n.shape[-1:], of.norm_weight, of.norm_bias, EPS)
        h = F.gelu(F.linear(n, of.down, of.down_bias))
        return of.x + F.linear(h, of.up, of.up_bias)

    return forward


def ours(norm: str | None, impl: str = "auto") -> Forward:
    """The same as one operation."""

    def forward(of: AdapterOperands) -> Tensor:
        weight, bias = (None, None) if norm is None else (of.norm_weight, of.norm_bias)
        return bottleneck(
            of.x, of.down, of.down_bias, of.up, of.up_bias, activation="gelu", norm=norm,
            norm_weight=weight, norm_bias=bias, norm_eps=EPS, impl=impl,
        )  # fmt: skip

    return forward


def step(forward: Forward, of: AdapterOperands, norm: str | None) -> dict[str, Tensor]:
    """Output and every gradient, by name."""
    y = forward(of)
    leaves = of.leaves(norm)
    grads = torch.autograd.grad(y, list(leaves.values()), of.dy)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}
