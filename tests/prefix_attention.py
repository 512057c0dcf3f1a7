"""What tests of attention over a prefix share: operands, and the comparison with float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftfast.ops import prefix_attention
from peftfast.reference import prefix_attention as reference
from tests.tolerance import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16
# Of q, k and v, and of the prefix.
DTYPES = [(torch.float32, torch.float32), (LOW, LOW), (LOW, torch.float32)]
MASKS = ("none", "causal", "padding", "left padding", "sliding", "bool", "additive", "both")


class Case:
    """Operands exact in their dtypes.

    Args:
        batch, heads, groups, queries, keys, rows, width: B, Hkv, Hq / Hkv, S, T (None: S), P, D.
        mask: of `MASKS`; "padding" hides keys of some rows, and all of one's first queries;
            "bool" and "additive" have rows without a key, "both" is a triangle beside a mask.
        prefixes: 0 for one of all rows, else N of them, one without; lengths: whether they have
            lengths.
        of_prefix: the prefix's mask: None, "bool" or "additive".
    """

    def __init__(
        self,
        batch: int = 2,
        heads: int = 2,
        groups: int = 2,
        queries: int = 7,
        keys: int | None = None,
        rows: int = 5,
        width: int = 16,
        *,
        dtypes: tuple[torch.dtype, torch.dtype] = DTYPES[0],
        mask: str = "none",
        of_prefix: str | None = None,
        prefixes: int = 0,
        lengths: bool = False,
        gate: bool = False,
        sinks: bool = False,
        softcap: float | None = None,
        form: str = "softmax",
        dropout_p: float = 0.0,
        value_width: int | None = None,
    ) -> None:
        self.dtypes = dtypes
        keys = queries if keys is None else keys
        value_width = width if value_width is None else value_width

        def draw(*shape: int, kind: int = 0, scale: float = 1.0) -> Tensor:
            value = torch.randn(shape, device=DEVICE, dtype=torch.float64) * scale
            return value.to(dtypes[kind]).double()

        each = (prefixes,) if prefixes else ()
        # With "relu" the prefix's part of the output is far larger than the softmax's.
        scale = 3.0 if form == "relu" else 1.0
        self.leaves = {
            "q": draw(batch, heads * groups, queries, width),
            "k": draw(batch, heads, keys, width),
            "v": draw(batch, heads, keys, value_width),
            "prefix_k": draw(*each, heads, rows, width, kind=1, scale=scale),
            "prefix_v": draw(*each, heads, rows, value_width, kind=1, scale=scale),
        }
        if sinks:
            self.leaves["sinks"] = draw(heads * groups, kind=1)
        if gate:
            self.leaves["gate"] = draw(batch, kind=1)
        size = (batch, heads * groups, queries, keys)
        self.options: dict[str, Any] = {"form": form, "softcap": softcap, "dropout_p": dropout_p}
        self.options |= _masks(mask, size, DEVICE)
        if of_prefix is not None:
            of_size = (*size[:3], rows)
            self.options["prefix_mask"] = _masks(of_prefix, of_size, DEVICE)["attn_mask"]
        if prefixes:
            index = torch.arange(batch, device=DEVICE) % (prefixes + 1) - 1
            self.options["prefix_index"] = index
        if lengths:
            count = torch.arange(1, max(prefixes, 1) + 1, device=DEVICE)
            self.options["prefix_lengths"] = (rows - count).clamp(min=0)
        if dropout_p:
            self.options["seed"] = torch.tensor([7], device=DEVICE)
        self.dy = draw(*size[:3], value_width)

    def operands(self, wide: bool = False) -> dict[str, Tensor]:
        """The tensors, in their dtypes or in float64, as leaves that ask for gradients."""
        dtypes = (torch.float64,) * 2 if wide else self.dtypes
        return {
            name: value.to(dtypes[name not in ("q", "k", "v")]).requires_grad_()
            for name, value in self.leaves.items()
        }

    def call(self, operands: dict[str, Tensor], how: str) -> Tensor:
        """`how` is an impl, or "formula" for eager PyTorch, which concatenates in q's dtype."""
        if how == "formula":
            dtype = operands["q"].dtype
            same = {name: value.to(dtype) for name, value in operands.items()}
            return reference.prefix_attention(**same, **self.options)
        return prefix_attention(**operands, **self.options, impl=how)

    def run(self, how: str, wide: bool = False) -> dict[str, Tensor]:
        """Output and every gradient."""
        operands = self.operands(wide)
        y = self.call(operands, how)
        grads = torch.autograd.grad(
            y, list(operands.values()), self.dy.to(y.dtype), allow_unused=True
        )
        made = {"y": y}
        for (name, leaf), grad in zip(operands.items(), grads, strict=True):
            made[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
        return made


def _masks(mask: str, size: tuple[int, ...], device: str) -> dict[str, Any]:
    """attn_mask, is_causal and window of a kind of mask."""
    batch, heads, queries, keys = size
    key = torch.arange(keys, device=device)
    if mask == "none":
        return {}
    if mask == "causal":
        return {"is_causal": True}
    if mask == "sliding":
        return {"is_causal": True, "window": 4}
    row = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    if mask == "padding":
        return {"attn_mask": key < keys - 2 * row}
    if mask == "left padding":
        query = torch.arange(queries, device=device)[:, None] + keys - queries
        return {"attn_mask": (key >= 2 * row) & (key <= query)}
    seen = torch.rand(batch, 1, queries, keys, device=device) < 0.6
    seen[0, :, 0] = False
    if mask == "bool":
        return {"attn_mask": seen}
    if mask == "both":
        return {"attn_mask": seen, "is_causal": True}
    added = torch.randn(1, heads, queries, keys, device=device).half().double()
    return {"attn_mask": added.masked_fill(~seen[:1], float("-inf"))}


def check(impl: str, *sizes: int, **options: Any) -> None:
    """Hold an implementation to the tolerance, all draws together where few numbers are summed."""
    draws = 16 if options.get("gate") or options.get("sinks") else 2
    ours: list[dict[str, Tensor]] = []
    eager: list[dict[str, Tensor]] = []
    truth: list[dict[str, Tensor]] = []
    for _ in range(draws):
        case = Case(*sizes, **options)
        ours.append(case.run(impl))
        eager.append(case.run("formula"))
        truth.append(case.run("formula", wide=True))
    for name in ours[0]:
        assert ours[0][name].dtype == eager[0][name].dtype, name
        together = [torch.stack([one[name] for one in kind]) for kind in (ours, eager, truth)]
        assert_within(*together, what=f"{name} of {sizes} {options}")
