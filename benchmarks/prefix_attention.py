"""What the benchmarks of prefix-extended attention share: sizes, operands, baselines, peftfast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from benchmarks.registry import Row
from peftfast.ops import prefix_attention

OURS, CONCATENATED, ALONE = "peftfast", "concatenation", "no prefix"


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of causal attention: a batch of sequences and a prefix that all of them share."""

    batch: int
    tokens: int
    prefix: int
    heads: int
    kv_heads: int
    head_size: int

    def as_dict(self) -> Row:
        """The fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class AttentionOperands:
    """Random operands; everything but dy requires a gradient.

    q, dy: [B, heads, S, D]; k, v: [B, kv_heads, S, D], all views of [B, S, heads, D], as a
    projection leaves them; prefix_k, prefix_v: [kv_heads, P, D].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    dy: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """All but dy, by name."""
        return {name: value for name, value in vars(self).items() if name != "dy"}

    def at(self, dtype: torch.dtype, batch: int) -> AttentionOperands:
        """Copies in another dtype, of the first rows of the batch."""
        copies = {
            name: (value if name.startswith("prefix") else value[:batch]).detach().to(dtype)
            for name, value in vars(self).items()
        }
        for name in self.leaves():
            copies[name].requires_grad_()
        return AttentionOperands(**copies)


def attention_operands(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> AttentionOperands:
    """Numbers of unit variance."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    def heads(count: int) -> Tensor:
        return normal(shape.batch, shape.tokens, count, shape.head_size).transpose(1, 2)

    leaves = {
        "q": heads(shape.heads),
        "k": heads(shape.kv_heads),
        "v": heads(shape.kv_heads),
        "prefix_k": normal(shape.kv_heads, shape.prefix, shape.head_size),
        "prefix_v": normal(shape.kv_heads, shape.prefix, shape.head_size),
    }
    return AttentionOperands(
        **{name: value.requires_grad_() for name, value in leaves.items()},
        dy=heads(shape.heads),
    )


Forward = Callable[[AttentionOperands], Tensor]


def alone(of: AttentionOperands) -> Tensor:
    """Torch's attention without the prefix."""
    return F.scaled_dot_product_attention(of.q, of.k, of.v, is_causal=True, enable_gqa=True)


def concatenated(of: AttentionOperands) -> Tensor:
    """The prefix expanded to the batch and concatenated, then torch's attention."""
    batch, _, tokens, _ = of.q.shape
    k, v = (
        torch.cat([prefix.expand(batch, -1, -1, -1), own], dim=2)
        for prefix, own in ((of.prefix_k, of.k), (of.prefix_v, of.v))
    )
    keys = k.shape[2]
    mask: Tensor
    if of.q.is_cuda:
        mask = causal_lower_right(tokens, keys)
    else:  # torch's CPU attention takes a mask in full
        mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    return F.scaled_dot_product_attention(of.q, k, v, attn_mask=mask, enable_gqa=True)


def ours(impl: str = "auto") -> Forward:
    """The same without a concatenation."""

    def forward(of: AttentionOperands) -> Tensor:
        return prefix_attention(
            of.q, of.k, of.v, of.prefix_k, of.prefix_v, is_causal=True, impl=impl
        )

    return forward


def step(forward: Forward, of: AttentionOperands) -> dict[str, Tensor]:
    """Output and every gradient, by name; those of the prefix where the output has one."""
    y = forward(of)
    leaves = of.leaves()
    grads = torch.autograd.grad(y, list(leaves.values()), of.dy, allow_unused=True)
    found = {f"d{name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    return {"y": y.detach(), **found}
