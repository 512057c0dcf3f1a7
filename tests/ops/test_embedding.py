"""embedding: torch's values, and a recipe where the table is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfast.memory import saved_bytes
from peftfast.ops import embedding, recipes, rms_norm

ROWS, WIDTH = 30, 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ROWS, (4, 9), generator=generator)
    return ids.to(DEVICE), torch.randn(ROWS, WIDTH, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_rows_of_a_frozen_table_are_looked_up_again(
    dtype: torch.dtype, ids_dtype: torch.dtype
) -> None:
    ids, weight = _operands(dtype)
    ids = ids.to(ids_dtype)
    y = embedding(ids, weight, padding_idx=3)
    assert torch.equal(y, F.embedding(ids, weight))
    kept = recipes.keep(y)
    assert {leaf.data_ptr() for leaf in kept.leaves} > {weight.data_ptr()}
    ids.zero_()  # the next batch, in the same buffer
    assert torch.equal(recipes.rebuild(kept.spec, kept.leaves), y)


def test_a_reader_saves_no_rows() -> None:
    ids, weight = _operands()
    gain = torch.randn(WIDTH, device=DEVICE, requires_grad=True)

    def forward() -> Tensor:
        return rms_norm(embedding(ids, weight).requires_grad_(), gain, 1e-6)

    assert saved_bytes(forward, exclude=[weight, gain]) == ids.nbytes


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_a_trainable_table_gets_its_gradient_and_no_recipe(padding_idx: int | None) -> None:
    ids, weight = _operands()
    found = []
    for look_up in (embedding, F.embedding):
        w = weight.clone().requires_grad_()
        y = look_up(ids, w, padding_idx=padding_idx)
        assert recipes.keep(y).spec == 0
        y.square().sum().backward()
        found.append(w.grad)
    assert found[0] is not None and torch.equal(found[0], found[1])


def test_no_recipe_unless_asked_and_differentiating() -> None:
    ids, weight = _operands()
    assert recipes.keep(embedding(ids, weight, recipe=False)).spec == 0
    with torch.no_grad():
        assert recipes.keep(embedding(ids, weight)).spec == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i, w: (i.tolist(), w), TypeError, "ids is list"),
        (lambda i, w: (i.float(), w), TypeError, "ids is torch.float32; torch.int64 or"),
        (lambda i, w: (i, w[0]), ValueError, r"weight is \[24\]; 2 dimensions"),
        (lambda i, w: (i, w.long()), TypeError, "weight is torch.int64"),
        (lambda i, w: (i, w.to_sparse()), TypeError, "weight is of layout"),
    ],
)
def test_bad_operands_are_named(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        embedding(*change(*_operands()))


def test_compiles_into_one_graph() -> None:
    ids, weight = _operands()
    gain = torch.randn(WIDTH, device=DEVICE)

    class Net(nn.Module):
        def forward(self, ids: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
            return rms_norm(embedding(ids, weight), gain, 1e-6)

    found = []
    for run in (Net(), torch.compile(Net(), backend="aot_eager", fullgraph=True)):
        g = gain.clone().requires_grad_()
        run(ids, weight, g).square().sum().backward()
        found.append(g.grad)
    torch.testing.assert_close(found[0], found[1])
