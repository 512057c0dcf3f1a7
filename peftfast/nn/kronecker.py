"""A bottleneck adapter whose projections are sums of Kronecker products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftfast.nn.bottleneck import BottleneckAdapter


class KroneckerAdapter(BottleneckAdapter):
    """An adapter with W = sum_i A_i (x) (u_i v_i^T) for both projections, i < n (Karimi Mahabadi et
    al., "Compacter", NeurIPS 2021, section 3): parameterised hypercomplex multiplication with
    factors of low rank, and A shared by both projections and, where asked for, by many adapters.

    Args:
        in_features, bottleneck, out_features: as in `BottleneckAdapter`; multiples of divisions.
        divisions: n.
        rank: r of each u_i v_i^T.
        shared: another adapter, whose A this one uses; None makes A here. The parameter is that
            adapter's alone: here `shared` is None.

    Further arguments as in `BottleneckAdapter`; init_std is the deviation of A where
    init is "near_identity", as in the authors' code; with the others the up-projection's u is zero.

    Parameters: shared [n, n, n], down_left [n, m / n, r], down_right [n, in / n, r], up_left
    [n, out / n, r], up_right [n, m / n, r]; biases and the rest as in `BottleneckAdapter`. The
    weights are made anew in each forward; gradients go through that product.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    divisions: int
    shared: nn.Parameter | None
    down_left: nn.Parameter
    down_right: nn.Parameter
    up_left: nn.Parameter
    up_right: nn.Parameter

    def __init__(
        self,
        in_features: int,
        bottleneck: int,
        out_features: int | None = None,
        *,
        divisions: int = 4,
        rank: int = 1,
        shared: KroneckerAdapter | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("divisions", divisions), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {type(value).__name__}; an integer is needed")
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        widths = {
            "in_features": in_features,
            "bottleneck": bottleneck,
            "out_features": in_features if out_features is None else out_features,
        }
        for name, value in widths.items():
            if isinstance(value, int) and value % divisions:
                raise ValueError(
                    f"{name} is {value}; a multiple of divisions, {divisions}, is needed"
                )
        if shared is not None and not isinstance(shared, KroneckerAdapter):
            raise TypeError(
                f"shared is {type(shared).__name__}; another KroneckerAdapter is needed"
            )
        if shared is not None and shared.divisions != divisions:
            raise ValueError(
                f"shared has {shared.divisions} divisions; an adapter with {divisions} is needed"
            )
        # In a tuple, so that it is no submodule, and its parameter not one of this adapter.
        self._owner = () if shared is None else (shared,)
        self.divisions, self.rank = divisions, rank
        super().__init__(in_features, bottleneck, out_features, **options)

    def _make_weights(self, bias: bool, made: dict[str, Any]) -> None:
        n, r, m = self.divisions, self.rank, self.bottleneck
        self._parameter("shared", not self._owner, (n, n, n), made)
        self._parameter("down_left", True, (n, m // n, r), made)
        self._parameter("down_right", True, (n, self.in_features // n, r), made)
        self._parameter("down_bias", bias, (m,), made)
        self._parameter("up_left", True, (n, self.out_features // n, r), made)
        self._parameter("up_right", True, (n, m // n, r), made)
        self._parameter("up_bias", bias, (self.out_features,), made)

    def _reset_weights(self) -> None:
        if self.shared is not None:
            std = self.init_std if self.init == "near_identity" else self.divisions**-0.5
            nn.init.normal_(self.shared, std=std)
        for factor in (self.down_left, self.down_right, self.up_left, self.up_right):
            nn.init.xavier_uniform_(factor)
        if self.init != "near_identity":
            nn.init.zeros_(self.up_left)

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        shared: Any = self._owner[0].shared if self._owner else self.shared
        shared = shared.to(self.down_left)
        down = _product(shared, self.down_left, self.down_right)
        up = _product(shared, self.up_left, self.up_right)
        return down, self.down_bias, up, self.up_bias


def _product(shared: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_i A_i (x) (u_i v_i^T): [n a, n b] from [n, n, n], [n, a, r] and [n, b, r]."""
    low_rank = left @ right.transpose(1, 2)  # [n, a, b]
    n, (_, rows, columns) = shared.shape[0], low_rank.shape
    whole = torch.einsum("ipq,iab->paqb", shared, low_rank)
    return whole.reshape(n * rows, n * columns)
