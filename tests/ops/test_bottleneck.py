"""bottleneck: the numbers against float64, bad operands, what is saved, autograd's corners."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftfast.native import library
from peftfast.ops import ACTIVATIONS, ImplUnavailable, bottleneck, layer_norm, recipes
from tests.bottleneck import DEVICE, DTYPES, LOW, Case, check
from tests.tolerance import assert_within

CUDA = torch.cuda.is_available()
IMPLS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            CUDA or library.missing("cpu") is not None, reason="csrc has none here"
        ),
    ),
]
WIDTHS = list(itertools.product((1, 8, 24, 64, 256), (64, 100, 1024)))
CHOICES: dict[str, list[Any]] = {
    "activation": list(ACTIVATIONS),
    "norm": [None, "layer", "rms"],
    "gate": [None, "rows", "sequences"],
    "residual": ["x", "none", "tensor"],
    "dropout_p": [0.0, 0.1],
    "learned": [False, True],
}


# Which choice each size takes: every pair of choices of two options meets at some size.
def _turns(count: int) -> list[dict[str, Any]]:
    """Options for that many cases; their choices walk at paces of their own."""
    return [
        {
            name: values[(i * (k + 1) + i // 7) % len(values)]
            for k, (name, values) in enumerate(CHOICES.items())
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("turn", range(3))
def test_sizes(impl: str, turn: int) -> None:
    options = _turns(3 * len(WIDTHS))[turn::3]
    for i, ((m, d), chosen) in enumerate(zip(WIDTHS, options, strict=True)):
        dtypes = DTYPES[(i + turn) % 3]
        if impl == "native":
            dtypes = tuple(torch.bfloat16 if one == LOW else one for one in dtypes)
        check(impl, m, d, d_out=d // 2, dtypes=dtypes, bias=i % 4 > 0, affine=i % 3 > 0, **chosen)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    for dtypes, norm in zip(DTYPES, CHOICES["norm"], strict=True):
        check("reference", 64, 64, dtypes=dtypes, activation=activation, norm=norm)


@pytest.mark.parametrize("norm", CHOICES["norm"])
@pytest.mark.parametrize("residual", CHOICES["residual"])
def test_every_combination(norm: str | None, residual: str) -> None:
    others = [CHOICES[name] for name in ("gate", "dropout_p", "learned")]
    for i, (gate, dropout_p, learned) in enumerate(itertools.product(*others)):
        chosen = {"gate": gate, "dropout_p": dropout_p, "learned": learned}
        chosen |= {"norm": norm, "residual": residual, "dtypes": DTYPES[i % 3]}
        check("reference", 24, 50, d_out=36, **chosen)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("leading", [(0,), (2, 0), (1,), (), (2, 3, 5)])
def test_leading_dimensions(impl: str, leading: tuple[int, ...]) -> None:
    gate = "rows" if leading else None
    for norm, residual in zip(CHOICES["norm"], CHOICES["residual"], strict=True):
        check(impl, 64, 40, leading=leading, norm=norm, residual=residual, gate=gate)
