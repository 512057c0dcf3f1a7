"""Learned keys and values before a sequence's own, with or without a network that makes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfast.ops import prefix_attention
from peftfast.ops.dispatch import parse_impl
from peftfast.ops.prefix_attention import FORMS

INITS = ("normal", "zero", "small")
_SMALL = 0.02  # the deviation of BERT's, GPT-2's and T5's own weights
_ENCODER = ("embedding", "down_weight", "down_bias", "up_weight", "up_bias")


class PrefixAttention(nn.Module):
    """P keys and P values of each head, which all rows of a batch attend to before their own (Li &
    Liang, "Prefix-Tuning", ACL 2021, section 4.2; Liu et al., "P-Tuning v2", ACL 2022, section 3).

    With `hidden` they are made in each forward of an embedding (Li & Liang, section 4.3):

        [prefix_k; prefix_v] = up_weight tanh(down_weight embedding + down_bias) + up_bias

    Args:
        num_virtual_tokens: P.
        num_key_value_heads: Hkv, which divides the query's heads.
        head_dim: D. value_head_dim: of the values; None: D.
        in_features: width of what a gate reads; needed for one.
        form: "softmax"; "relu": `peftfast.ops.prefix_attention`'s, the multi-head parallel
            adapter (He et al., ICLR 2022, section 3.3).
        gate: prefixes are multiplied by the mean over tokens of sigmoid(x w + b) (Mao et al.,
            "UniPELT", ACL 2022, section 3.2).
        scaling, learned_scaling: of form "relu", s in y + s relu(q prefix_k^T) prefix_v, and
            whether it learns, from there.
        dropout: of the prefix's elements in training. One mask serves all rows of a batch, where
            P-Tuning v2's code draws one a row, for which it copies the prefix.
        hidden, embedding_dim: widths of the network; None: there is none.
        shared: another PrefixAttention with a network, whose embedding, down_weight and down_bias
            this one uses; those parameters are that module's alone, here they are None.
        init: of the prefix, or of the embedding: "normal", with deviation init_std (None: 1, as
            PEFT's `torch.nn.Embedding`); "small", the same (None: 0.02); "zero", values of zero
            below keys as "normal" has them (the network: up-projections of zero). The network's
            weights are as `torch.nn.Linear`'s.
        impl: of the op.
        device, dtype: of the parameters.

    Parameters: prefix_k [Hkv, P, D], prefix_v [Hkv, P, Dv]; with a network, in their place,
    embedding [P, embedding_dim], down_weight [hidden, embedding_dim], down_bias [hidden], up_weight
    [Hkv (D + Dv), hidden] (keys first) and up_bias; scaling_factor [1]; gate_weight
    [1, in_features], gate_bias [1]. What is absent is None. A state_dict has prefix_k and prefix_v
    with a network too, their finished values, so that a module without one loads it; what has a
    network and is given those two alone drops it.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    prefix_k: nn.Parameter | None
    prefix_v: nn.Parameter | None
    embedding: nn.Parameter | None
    down_weight: nn.Parameter | None
    down_bias: nn.Parameter | None
    up_weight: nn.Parameter | None
    up_bias: nn.Parameter | None
    scaling_factor: nn.Parameter | None
    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None

    def __init__(
        self,
        num_virtual_tokens: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        in_features: int | None = None,
        form: str = "softmax",
        gate: bool = False,
        scaling: float = 1.0,
        learned_scaling: bool = False,
        dropout: float = 0.0,
        hidden: int | None = None,
        embedding_dim: int | None = None,
        shared: PrefixAttention | None = None,
        init: str = "normal",
        init_std: float | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        _positive(
            num_virtual_tokens=num_virtual_tokens,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
        )
        _one_of("form", form, FORMS)
        _one_of("init", init, INITS)
        if not 0.0 <= _number("dropout", dropout) <= 1.0:
            raise ValueError(f"dropout is {dropout}; a probability in [0, 1] is needed")
        if init_std is not None and not _number("init_std", init_std) >= 0.0:
            raise ValueError(f"init_std is {init_std}; it can't be negative")
        if form == "softmax" and (_number("scaling", scaling) != 1.0 or learned_scaling):
            raise ValueError(
                f"scaling is {scaling}, learned_scaling {learned_scaling}; with form 'softmax' a"
                " prefix has no scaling"
            )
        if gate and in_features is None:
            raise ValueError("in_features is None; a gate needs the width of what it reads")
        if in_features is not None:
            _positive(in_features=in_features)
        if shared is not None:
            hidden, embedding_dim = _of_shared(shared, num_virtual_tokens, hidden, embedding_dim)
        if (hidden is None) != (embedding_dim is None):
            raise ValueError(
                f"hidden is {hidden}, embedding_dim is {embedding_dim}; a network needs both"
            )
        if hidden is not None and embedding_dim is not None:
            _positive(hidden=hidden, embedding_dim=embedding_dim)
        parse_impl(impl)
        self.num_virtual_tokens, self.num_key_value_heads = num_virtual_tokens, num_key_value_heads
        self.head_dim, self.value_head_dim = head_dim, value_head_dim
        self.in_features, self.hidden, self.embedding_dim = in_features, hidden, embedding_dim
        self.form, self.scaling, self.dropout = form, float(scaling), float(dropout)
        self.init, self.init_std, self.impl = init, init_std, impl
        # In a tuple, so that it is no submodule, and its parameters not those of this one.
        self._owner = () if shared is None else (shared,)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        heads, rows, network = num_key_value_heads, num_virtual_tokens, hidden is not None
        own = network and shared is None
        self._parameter("prefix_k", not network, (heads, rows, head_dim), made)
        self._parameter("prefix_v", not network, (heads, rows, value_head_dim), made)
        self._parameter("embedding", own, (rows, embedding_dim), made)
        self._parameter("down_weight", own, (hidden, embedding_dim), made)
        self._parameter("down_bias", own, (hidden,), made)
        features = heads * (head_dim + value_head_dim)
        self._parameter("up_weight", network, (features, hidden), made)
        self._parameter("up_bias", network, (features,), made)
        self._parameter("scaling_factor", learned_scaling, (1,), made)
        self._parameter("gate_weight", gate, (1, in_features), made)
        self._parameter("gate_bias", gate, (1,), made)
        self.reset_parameters()

    def _parameter(
        self, name: str, present: bool, size: tuple[Any, ...], made: dict[str, Any]
    ) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(size, **made)) if present else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter as `init` says; not those of `shared`."""
        std = (_SMALL if self.init == "small" else 1.0) if self.init_std is None else self.init_std
        for rows in (self.prefix_k, self.prefix_v, self.embedding):
            if rows is not None:
                nn.init.normal_(rows, std=std)
        pairs = ((self.down_weight, self.down_bias), (self.up_weight, self.up_bias))
        for weight, bias in (*pairs, (self.gate_weight, self.gate_bias)):
            if weight is not None and bias is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                nn.init.uniform_(bias, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        if self.gate_bias is not None:
            nn.init.zeros_(self.gate_bias)
        if self.scaling_factor is not None:
            self.scaling_factor.fill_(self.scaling)
        if self.init == "zero":
            if self.prefix_v is not None:
                nn.init.zeros_(self.prefix_v)
            if self.up_weight is not None and self.up_bias is not None:
                values = self.num_key_value_heads * self.head_dim
                nn.init.zeros_(self.up_weight[values:])
                nn.init.zeros_(self.up_bias[values:])

    def _finished(self) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v without dropout."""
        if self.prefix_k is not None and self.prefix_v is not None:
            return self.prefix_k, self.prefix_v
        assert self.up_weight is not None
        source: Any = self._owner[0] if self._owner else self
        if source.embedding is None:
            raise RuntimeError(
                "the module that this one shares its network with was finalized before it"
            )
        dtype = self.up_weight.dtype
        held = (source.embedding, source.down_weight, source.down_bias)
        embedding, weight, bias = (one.to(self.up_weight.device, dtype) for one in held)
        inner = torch.tanh(F.linear(embedding, weight, bias))
        made = F.linear(inner, self.up_weight, self.up_bias)  # [P, Hkv (D + Dv)]
        heads = self.num_key_value_heads
        keys, values = made.split([heads * self.head_dim, heads * self.value_head_dim], dim=1)
        k = keys.unflatten(1, (heads, self.head_dim)).transpose(0, 1)
        v = values.unflatten(1, (heads, self.value_head_dim)).transpose(0, 1)
        return k, v

    def prefixes(self) -> tuple[Tensor, Tensor]:
        """Keys [Hkv, P, D] and values [Hkv, P, Dv], after dropout in training."""
        k, v = self._finished()
        if self.training and self.dropout > 0.0:
            k, v = F.dropout(k, self.dropout), F.dropout(v, self.dropout)
        return k, v

    def gate_of(self, x: Tensor | None) -> Tensor | None:
        """What the op takes for a gate: this module's, times the scaling of form "relu".

        Args:
            x: [B, S, in_features], what the gate reads; not needed without one.

        Returns:
            [B, 1, 1], or [1] without a gate; None where there is neither gate nor scaling.

        Raises:
            ValueError: there is a gate, and x is None or of another shape.
        """
        scaling = self._scaling()
        weight, bias = self.gate_weight, self.gate_bias
        if weight is None:
            return scaling
        if x is None or x.ndim != 3 or x.shape[-1] != weight.shape[1]:
            given = None if x is None else list(x.shape)
            raise ValueError(f"x is {given}; the gate reads [B, S, {weight.shape[1]}]")
        each = torch.sigmoid(F.linear(x.to(weight.dtype), weight, bias))
        gate = each.mean(dim=1, keepdim=True)
        return gate if scaling is None else gate * scaling

    def _scaling(self) -> Tensor | None:
        if self.scaling_factor is not None or self.scaling == 1.0:
            return self.scaling_factor
        held = self.up_weight if self.prefix_k is None else self.prefix_k
        assert held is not None
        return torch.full((1,), self.scaling, device=held.device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Attention over this prefix and the sequence.

        Args:
            q: [B, Hq, S, D]; k: [B, Hkv, T, D]; v: [B, Hkv, T, Dv].
            gate: what `gate_of` gives; may be None where that needs no x.
            options: `peftfast.ops.prefix_attention`'s: masks, is_causal, scale and the like.

        Returns:
            [B, Hq, S, Dv] in q's dtype.

        Raises:
            ValueError: there is a gate here and none is given, or another operand is wrong.
        """
        if gate is None:
            if self.gate_weight is not None:
                raise ValueError("gate is None, and this module has one: give what gate_of(x) says")
            gate = self.gate_of(None)
        return prefix_attention(
            q, k, v, *self.prefixes(), gate=gate, form=self.form, impl=self.impl, **options
        )

    @property
    def has_encoder(self) -> bool:
        """Whether a network makes the prefix."""
        return self.hidden is not None

    @property
    def owns_encoder(self) -> bool:
        """Whether it has all of the network, which others may share."""
        return self.embedding is not None

    @torch.no_grad()
    def finalize(self) -> None:
        """Drop the network and keep what it makes as prefix_k and prefix_v; without one nothing
        happens. Modules that share this one's part of it must be finalized before it.
        """
        if not self.has_encoder:
            return
        keys, values = (one.contiguous() for one in self._finished())
        self._drop_network(keys, values)

    def _drop_network(self, keys: Tensor, values: Tensor) -> None:
        assert self.up_weight is not None
        trained = self.up_weight.requires_grad
        for name in _ENCODER:
            setattr(self, name, None)
        self.prefix_k = nn.Parameter(keys, requires_grad=trained)
        self.prefix_v = nn.Parameter(values, requires_grad=trained)
        self.hidden = self.embedding_dim = None
        self._owner = ()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.hidden is not None:
            with torch.no_grad():
                for name, value in zip(("prefix_k", "prefix_v"), self._finished(), strict=True):
                    destination[f"{prefix}{name}"] = value.detach().contiguous()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        given = dict(state_dict)
        finished = [f"{prefix}prefix_k", f"{prefix}prefix_v"]
        network = [f"{prefix}{name}" for name in _ENCODER]
        has_finished = all(name in given for name in finished)
        if self.hidden is not None and has_finished and f"{prefix}up_weight" not in given:
            assert self.up_weight is not None
            heads, rows = self.num_key_value_heads, self.num_virtual_tokens
            shapes = [(heads, rows, self.head_dim), (heads, rows, self.value_head_dim)]
            wrong = [
                f"size mismatch for {name}: {tuple(given[name].shape)} in the checkpoint,"
                f" {shape} here; the network is kept"
                for name, shape in zip(finished, shapes, strict=True)
                if tuple(given[name].shape) != shape
            ]
            if wrong:
                errors: list[str] = rest[4] if len(rest) > 4 else more["error_msgs"]
                errors += wrong
                return
            self._drop_network(*(self.up_weight.new_empty(shape) for shape in shapes))
        # Of the two forms only that which this module has.
        others = finished if self.hidden is not None else network if has_finished else []
        for name in others:
            given.pop(name, None)
        super()._load_from_state_dict(given, prefix, *rest, **more)

    def extra_repr(self) -> str:
        said = f"{self.num_virtual_tokens}, {self.num_key_value_heads}, {self.head_dim}"
        if self.value_head_dim != self.head_dim:
            said += f", value_head_dim={self.value_head_dim}"
        if self.form != "softmax":
            said += f", form={self.form!r}"
        if self.hidden is not None:
            said += f", hidden={self.hidden}, embedding_dim={self.embedding_dim}"
            said += ", shared" if self._owner else ""
        if self.dropout:
            said += f", dropout={self.dropout}"
        return said + (", gate" if self.gate_weight is not None else "")


def _of_shared(
    shared: Any, rows: int, hidden: int | None, embedding_dim: int | None
) -> tuple[int, int]:
    """The network's widths, held to those of the module that it is shared with."""
    if not isinstance(shared, PrefixAttention):
        raise TypeError(f"shared is {type(shared).__name__}; another PrefixAttention is needed")
    if shared.embedding is None or shared.hidden is None or shared.embedding_dim is None:
        raise ValueError("shared has no network of its own: it has no hidden, or shares another's")
    if shared.num_virtual_tokens != rows:
        raise ValueError(
            f"shared has {shared.num_virtual_tokens} virtual tokens; num_virtual_tokens is {rows}"
        )
    for name, asked in (("hidden", hidden), ("embedding_dim", embedding_dim)):
        if asked is not None and asked != (held := getattr(shared, name)):
            raise ValueError(f"{name} is {asked}; shared has {held}")
    return shared.hidden, shared.embedding_dim


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {type(value).__name__}; a number is needed")
    return float(value)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        said = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} is {value!r}; allowed: {said}")


def _positive(**sizes: Any) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {type(value).__name__}; an integer is needed")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
