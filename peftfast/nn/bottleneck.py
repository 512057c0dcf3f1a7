"""A bottleneck adapter: down-projection, activation, up-projection, as one module over one op."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfast.ops.activation import activation
from peftfast.ops.bottleneck import ACTIVATIONS, bottleneck
from peftfast.ops.dispatch import parse_impl
from peftfast.ops.norm import layer_norm, rms_norm
from peftfast.ops.operands import autocast_dtype

NORMS = ("layer", "rms", "batch")
NORM_POSITIONS = ("before", "after")
COMPOSITIONS = ("add", "multiply")
INITS = ("near_identity", "lora", "zero")
_MOMENTUM = 0.1  # of BatchNorm's running statistics, as in torch


class BottleneckAdapter(nn.Module):
    """y = residual + s g (act(norm(x) Wd^T + bd) Wu^T + bu)   (Houlsby et al., ICML 2019,
    section 2.1; the parallel form: He et al., ICLR 2022, table 1).

    Args:
        in_features: width of x.
        bottleneck: m, width of the hidden layer, at least 1.
        out_features: width of the residual and of y; None: in_features.
        activation: one of `peftfast.ops.ACTIVATIONS`, the activations of `peftfast.ops.bottleneck`.
        bias: whether both projections have one.
        scaling: s.
        learned_scaling: s is a parameter [1] that starts there (He et al., section 3.3).
        gate: g = mean over the tokens of sigmoid(w x + b), one for each sequence [B, S, d]
            (Mao et al., ACL 2022, UniPELT, section 3.2), padding among them, and with a KV cache
            the tokens of each step; without it g = 1.
        norm: "layer", "rms" or "batch" (over all rows), or None.
        norm_position: "before" the down-projection, or "after" the up-projection.
        depth: number of hidden layers; those after the first are m x m.
        dropout: probability of dropping elements of the last hidden layer, in training.
        composition: "add", or "multiply": y = residual * (1 + s g (...)).
        init: "near_identity": weights normal with deviation init_std, cut off at two deviations
            (Houlsby et al., section 2.1); "lora": Kaiming-uniform down, zero up (He et al.);
            "zero": normal down, zero up. Biases start at zero. With the last two the adapter starts
            as the identity, exactly.
        init_std: sigma of "near_identity" and "zero".
        impl: which implementation serves the op, as in `peftfast.ops.bottleneck`.
        device, dtype: of the parameters.

    Parameters: down_weight [m, in], down_bias [m], up_weight [out, m], up_bias [out]; norm_weight,
    norm_bias [in] or, after, [out]; inner_i_weight [m, m], inner_i_bias [m]; scaling_factor [1];
    gate_weight [1, in], gate_bias [1]; BatchNorm has buffers norm_mean and norm_variance. Absent
    ones are None.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    down_weight: nn.Parameter
    down_bias: nn.Parameter | None
    up_weight: nn.Parameter
    up_bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None
    norm_mean: Tensor
    norm_variance: Tensor
    scaling_factor: nn.Parameter | None
    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        bottleneck: int,
        out_features: int | None = None,
        *,
        activation: str = "relu",
        bias: bool = True,
        scaling: float = 1.0,
        learned_scaling: bool = False,
        gate: bool = False,
        norm: str | None = None,
        norm_position: str = "before",
        depth: int = 1,
        dropout: float = 0.0,
        composition: str = "add",
        init: str = "near_identity",
        init_std: float = 1e-2,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        _positive(in_features=in_features, bottleneck=bottleneck, out_features=out_features)
        _positive(depth=depth)
        _one_of("activation", activation, ACTIVATIONS)
        _one_of("norm", norm, (None, *NORMS))
        _one_of("norm_position", norm_position, NORM_POSITIONS)
        _one_of("composition", composition, COMPOSITIONS)
        _one_of("init", init, INITS)
        _number("scaling", scaling)
        if not 0.0 <= _number("dropout", dropout) <= 1.0:
            raise ValueError(f"dropout is {dropout}; a probability in [0, 1] is needed")
        if not _number("init_std", init_std) >= 0.0:
            raise ValueError(f"init_std is {init_std}; it can't be negative")
        parse_impl(impl)
        self.in_features, self.bottleneck, self.out_features = in_features, bottleneck, out_features
        self.activation, self.depth, self.dropout = activation, depth, float(dropout)
        self.norm, self.norm_position, self.norm_eps = norm, norm_position, 1e-5
        self.scaling, self.composition = float(scaling), composition
        self.init, self.init_std, self.impl = init, float(init_std), impl
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_weights(bias, made)
        for index in range(depth - 1):
            self._parameter(f"inner_{index}_weight", True, (bottleneck, bottleneck), made)
            self._parameter(f"inner_{index}_bias", bias, (bottleneck,), made)
        normed = in_features if norm_position == "before" else out_features
        self._parameter("norm_weight", norm is not None, (normed,), made)
        self._parameter("norm_bias", norm in ("layer", "batch"), (normed,), made)
        if norm == "batch":
            wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            self.register_buffer("norm_mean", torch.zeros(normed, device=device, dtype=wide))
            self.register_buffer("norm_variance", torch.ones(normed, device=device, dtype=wide))
        self._parameter("scaling_factor", learned_scaling, (1,), made)
        self._parameter("gate_weight", gate, (1, in_features), made)
        self._parameter("gate_bias", gate, (1,), made)
        self.reset_parameters()

    def _parameter(
        self, name: str, present: bool, size: tuple[int, ...], made: dict[str, Any]
    ) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(size, **made)) if present else None)

    def _make_weights(self, bias: bool, made: dict[str, Any]) -> None:
        """Register the parameters of the two projections."""
        self._parameter("down_weight", True, (self.bottleneck, self.in_features), made)
        self._parameter("down_bias", bias, (self.bottleneck,), made)
        self._parameter("up_weight", True, (self.out_features, self.bottleneck), made)
        self._parameter("up_bias", bias, (self.out_features,), made)

    def _reset_weights(self) -> None:
        """Initialise the two projections."""
        self._reset(self.down_weight)
        if self.init == "near_identity":
            self._reset(self.up_weight)
        else:
            nn.init.zeros_(self.up_weight)

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """down [m, in], its bias [m], up [out, m], its bias [out]."""
        return self.down_weight, self.down_bias, self.up_weight, self.up_bias

    def _reset(self, weight: Tensor) -> None:
        if self.init == "near_identity":
            std = self.init_std
            nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)
        elif self.init == "lora":
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        else:
            nn.init.normal_(weight, std=self.init_std)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter as `init` says."""
        self._reset_weights()
        for name, value in self.named_parameters(recurse=False):
            if name.startswith("inner_") and name.endswith("_weight"):
                self._reset(value)
            elif name.endswith("_bias"):
                nn.init.zeros_(value)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
        if self.norm == "batch":
            self.norm_mean.zero_()
            self.norm_variance.fill_(1.0)
        if self.scaling_factor is not None:
            self.scaling_factor.fill_(self.scaling)
        if self.gate_weight is not None:
            nn.init.kaiming_uniform_(self.gate_weight, a=math.sqrt(5))

    def forward(self, x: Tensor, residual: bool | Tensor = True) -> Tensor:
        """The adapted value.

        Args:
            x: [..., in], what the adapter reads; with a gate [B, S, in].
            residual: True: x; a tensor [..., out]: what the adapter's delta joins (parallel form);
                False: the delta alone (not with "multiply").

        Returns:
            [..., out] in x's dtype, or in the residual's where that is a tensor.
        """
        if isinstance(residual, Tensor):
            joined: Tensor | None = residual
        else:
            joined = x if residual else None
        if joined is None and self.composition == "multiply":
            raise ValueError('composition "multiply" needs a residual; it is False')
        down, down_bias, up, up_bias = self._weights()
        options: dict[str, Any] = {
            "activation": self.activation,
            "dropout_p": self.dropout if self.training else 0.0,
            "impl": self.impl,
        }
        read = x
        if self.norm is not None and self.norm_position == "before":
            if self.norm == "batch" or self.depth > 1:
                read = self._normed(x)
            else:
                options.update(
                    norm=self.norm,
                    norm_weight=self.norm_weight,
                    norm_bias=self.norm_bias,
                    norm_eps=self.norm_eps,
                )
        for index in range(self.depth - 1):
            read = self._act(_linear(read, down, down_bias))
            down = getattr(self, f"inner_{index}_weight")
            down_bias = getattr(self, f"inner_{index}_bias")
        weights = down, down_bias, up, up_bias
        scaling = self.scaling if self.scaling_factor is None else self.scaling_factor
        gate = self._gate(x)
        after = self.norm is not None and self.norm_position == "after"
        if not after:
            options.update(scaling=scaling, gate=gate)
            if self.composition == "add" and joined is not None:
                given = True if joined is read else joined
                return bottleneck(read, *weights, residual=given, **options)
        delta = bottleneck(read, *weights, residual=False, **options)
        if after:
            delta = self._normed(delta) * (scaling if gate is None else scaling * gate)
        if joined is None:
            return delta.to(x.dtype)
        y = joined + delta if self.composition == "add" else joined * (1.0 + delta)
        return y.to(joined.dtype)

    def _act(self, z: Tensor) -> Tensor:
        return z if self.activation == "identity" else activation(z, self.activation)

    def _gate(self, x: Tensor) -> Tensor | None:
        """[B, 1, 1] for x [B, S, in]."""
        if self.gate_weight is None:
            return None
        if x.ndim < 3:
            raise ValueError(
                f"x is {list(x.shape)}; a gate averages over each sequence's tokens, [B, S, in]"
            )
        each = torch.sigmoid(_linear(x, self.gate_weight, self.gate_bias))  # [B, S, 1]
        return each.mean(dim=-2, keepdim=True)

    def _normed(self, x: Tensor) -> Tensor:
        eps = self.norm_eps
        weight: Tensor | None = self.norm_weight
        bias: Tensor | None = self.norm_bias
        if self.norm == "layer":
            return layer_norm(x, weight, bias, eps)
        if self.norm == "rms":
            return rms_norm(x, weight, eps, form="float")
        # In float32 or better throughout: PEFT widens parameters of 16 bits, not buffers.
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        mean, variance = self.norm_mean.to(dtype), self.norm_variance.to(dtype)
        weight, bias = (None if one is None else one.to(dtype) for one in (weight, bias))
        y = F.batch_norm(rows, mean, variance, weight, bias, self.training, _MOMENTUM, eps)
        if self.training and mean is not self.norm_mean:
            self.norm_mean.copy_(mean)
            self.norm_variance.copy_(variance)
        return y.view(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        parts = [f"{self.in_features}, {self.bottleneck}, {self.out_features}", self.activation]
        if self.depth > 1:
            parts.append(f"depth={self.depth}")
        if self.norm is not None:
            parts.append(f"norm={self.norm!r} {self.norm_position}")
        if self.scaling_factor is not None:
            parts.append("learned scaling")
        elif self.scaling != 1.0:
            parts.append(f"scaling={self.scaling}")
        if self.gate_weight is not None:
            parts.append("gate")
        if self.dropout > 0.0:
            parts.append(f"dropout={self.dropout}")
        if self.composition != "add":
            parts.append(f"composition={self.composition!r}")
        return ", ".join(parts)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the weight's dtype, but under autocast in autocast's."""
    return F.linear(x.to(weight.dtype) if autocast_dtype(x) is None else x, weight, bias)


def _positive(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {type(value).__name__}; an integer is needed")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {type(value).__name__}; a number is needed")
    return float(value)
