"""What norms, activations and dropout share: autograd's corners, what is saved, recipes, the
library ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from peftfast.memory import saved_bytes
from peftfast.ops import activation, dropout, gated_activation, layer_norm, recipes, rms_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
IMPLS = ["reference", "triton"]


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()


def _seed() -> Tensor:
    return torch.tensor([7], device=DEVICE)


class Op(NamedTuple):
    """A call with given operands; `saves` of them are read by the backward."""

    run: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    saves: int


X = (3, 5, 24)
OPS = {
    "rms_norm": Op(lambda x, w, **k: rms_norm(x, w, 1e-3, **k), (X, X[-1:]), 2),
    "rms_norm alone": Op(lambda x, **k: rms_norm(x, None, 1e-3, form="float", **k), (X,), 1),
    "layer_norm": Op(lambda x, w, b, **k: layer_norm(x, w, b, 1e-3, **k), (X, X[-1:], X[-1:]), 2),
    "activation": Op(lambda x, **k: activation(x, "gelu", **k), (X,), 1),
    "gated_activation": Op(lambda g, u, **k: gated_activation(g, u, "silu", **k), (X, X), 2),
    "gated_activation, dropped": Op(
        lambda g, u, **k: gated_activation(g, u, "silu", dropout_p=0.3, seed=_seed(), **k),
        (X, X),
        2,
    ),
    "dropout": Op(lambda x, **k: dropout(x, 0.3, seed=_seed(), **k), (X,), 0),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
every_impl = pytest.mark.parametrize("impl", IMPLS)


def _leaves(op: Op, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=True) for s in op.shapes]


@every_op
@every_impl
def test_two_backward_passes_and_nothing_written(op: Op, impl: str) -> None:
    leaves = _leaves(op)
    before = [leaf.detach().clone() for leaf in leaves]
    y = op.run(*leaves, impl=impl)
    dy = torch.randn_like(y)
    kept = dy.clone()
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    for a, b in zip([*first, *leaves, dy], [*second, *before, kept], strict=True):
        assert torch.equal(a, b)


@every_op
@every_impl
def test_saved_are_the_operands_that_the_backward_reads(op: Op, impl: str) -> None:
    leaves = _leaves(op)
    run = op.run
    seeds = 8 if "seed" in run.__code__.co_names or "_seed" in run.__code__.co_names else 0
    found = saved_bytes(lambda: run(*leaves, impl=impl))
    assert found == sum(leaf.nbytes for leaf in leaves[: op.saves]) + seeds
    assert saved_bytes(lambda: run(*leaves, impl=impl), exclude=leaves) == seeds
    with torch.no_grad():
        assert saved_bytes(lambda: run(*leaves, impl=impl)) == 0


@every_op
@every_impl
def test_gradients_only_where_asked(op: Op, impl: str) -> None:
    leaves = _leaves(op)
    y = op.run(*leaves, impl=impl)
    dy = torch.randn_like(y)
    every = torch.autograd.grad(y, leaves, dy)
    for wanted in range(len(leaves)):
        some = [leaf.detach().requires_grad_(i == wanted) for i, leaf in enumerate(leaves)]
        (grad,) = torch.autograd.grad(op.run(*some, impl=impl), some[wanted], dy)
        torch.testing.assert_close(grad, every[wanted])
    assert not op.run(*(leaf.detach() for leaf in leaves), impl=impl).requires_grad


def test_an_up_that_nothing_reads_is_not_kept() -> None:
    gate, up = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(lambda: gated_activation(gate, up, "silu")) == gate.nbytes
    x, bias = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    assert saved_bytes(lambda: layer_norm(x, torch.ones(8), bias, 1e-5)) == 0


@every_op
def test_second_derivatives_raise(op: Op) -> None:
    leaves = _leaves(op)
    y = op.run(*leaves)
    dy = torch.randn_like(y, requires_grad=True)
    (grad,) = torch.autograd.grad(y, leaves[0], dy, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


@every_op
def test_an_operand_changed_in_place_raises(op: Op) -> None:
    if not op.saves:
        return
    leaves = _leaves(op)
    x = leaves[0] * 1
    y = op.run(x, *leaves[1:])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_op
def test_an_output_may_be_changed_in_place(op: Op) -> None:
    leaves = _leaves(op)
    (expected,) = torch.autograd.grad(op.run(*leaves).mul(2).sum(), leaves[0])
    (grad,) = torch.autograd.grad(op.run(*leaves).mul_(2).sum(), leaves[0])
    assert torch.equal(grad, expected)


@every_op
@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recipes_rebuild_the_very_same_bits(op: Op, impl: str, dtype: torch.dtype) -> None:
    if impl == "triton" and dtype == torch.bfloat16 and not CUDA:
        return
    leaves = [leaf.to(dtype) for leaf in _leaves(op)]
    source = [activation(leaves[0], "relu", impl=impl), *leaves[1:]]
    y = op.run(*source, impl=impl)
    kept = recipes.keep(y)
    assert kept.spec != 0
    assert {leaf.data_ptr() for leaf in kept.leaves} >= {leaves[0].data_ptr()}
    assert source[0].data_ptr() not in {leaf.data_ptr() for leaf in kept.leaves}
    assert torch.equal(recipes.rebuild(kept.spec, kept.leaves), y)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(recipes.rebuild(kept.spec, kept.leaves), y)


@every_op
def test_no_recipe_where_none_is_wanted(op: Op) -> None:
    leaves = _leaves(op)
    assert recipes.keep(op.run(*leaves, recipe=False)).spec == 0
    with torch.no_grad():
        assert recipes.keep(op.run(*leaves)).spec == 0


@every_op
@every_impl
def test_a_rebuilt_operand_is_not_saved_and_gives_the_same_gradients(op: Op, impl: str) -> None:
    leaves = _leaves(op)
    inner = leaves[0].detach().requires_grad_()

    def run(recipe: bool) -> Tensor:
        return op.run(activation(inner, "gelu", recipe=recipe, impl=impl), *leaves[1:], impl=impl)

    assert saved_bytes(lambda: run(True), exclude=[inner, *leaves[1:]]) <= 8  # a seed
    dy = torch.randn(X, device=DEVICE)
    grads = [torch.autograd.grad(run(r), [inner, *leaves[1:]], dy) for r in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_op
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_the_same(op: Op, reentrant: bool) -> None:
    leaves = _leaves(op)

    def block(*operands: Tensor) -> Tensor:
        return op.run(activation(operands[0], "relu"), *operands[1:])

    y = block(*leaves)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, dy)
    checkpointed: Any = checkpoint(block, *leaves, use_reentrant=reentrant)
    assert torch.equal(checkpointed, y)
    checkpointed.backward(dy)
    assert all(torch.equal(v.grad, g) for v, g in zip(leaves, expected, strict=True))


@every_op
def test_batched_gradients(op: Op) -> None:
    leaves = _leaves(op)
    y = op.run(*leaves)
    dys = torch.randn(3, *y.shape, device=DEVICE)
    every = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for one, batch in zip(
            torch.autograd.grad(y, leaves, dy, retain_graph=True), every, strict=True
        ):
            torch.testing.assert_close(batch[i], one)


@every_op
@every_impl
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "chunk"])
def test_layouts(op: Op, impl: str, layout: str) -> None:
    rows, columns = 6, X[-1]
    make = {
        "transposed": lambda: torch.randn(columns, rows, device=DEVICE).t(),
        "strided": lambda: torch.randn(rows, 2 * columns, device=DEVICE)[:, ::2],
        "expanded": lambda: torch.randn(1, columns, device=DEVICE).expand(rows, columns),
        "chunk": lambda: torch.randn(rows, 2 * columns, device=DEVICE).chunk(2, dim=1)[1],
    }[layout]
    odd = [make() if len(shape) > 1 else torch.randn(shape, device=DEVICE) for shape in op.shapes]
    results = []
    for operands in (odd, [one.clone(memory_format=torch.contiguous_format) for one in odd]):
        leaves = [one.detach().requires_grad_() for one in operands]
        y = op.run(*leaves, impl=impl)
        assert y.is_contiguous()
        dy = torch.ones((), device=DEVICE).expand(y.shape)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_op
@every_impl
@pytest.mark.parametrize("rows", [(), (0,), (2, 0)])
def test_any_rank_and_no_rows(op: Op, impl: str, rows: tuple[int, ...]) -> None:
    leaves = [
        torch.randn((*rows, X[-1]) if len(s) > 1 else s, device=DEVICE, requires_grad=True)
        for s in op.shapes
    ]
    y = op.run(*leaves, impl=impl)
    assert y.shape == leaves[0].shape
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all(
        g.shape == v.shape and g.isfinite().all() for g, v in zip(grads, leaves, strict=True)
    )


@every_op
def test_compiled(op: Op) -> None:
    leaves = _leaves(op)

    def step(*operands: Tensor) -> Tensor:
        return op.run(activation(operands[0], "gelu") * 2, *operands[1:])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    y, expected = compiled(*leaves), step(*leaves)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(compiled(*leaves), step(*leaves))


@every_op
def test_compiled_keeps_no_more_than_eager(op: Op) -> None:
    leaves = _leaves(op)

    def step(*operands: Tensor) -> Tensor:
        return op.run(activation(operands[0], "gelu"), *operands[1:])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(*leaves)
    eager = saved_bytes(lambda: step(*leaves))
    assert saved_bytes(lambda: compiled(*leaves)) <= eager


def test_compiled_with_numbers_that_change() -> None:
    x, w = torch.randn(4, 16, device=DEVICE), torch.randn(16, device=DEVICE)

    def step(x: Tensor, number: float) -> Tensor:
        y = layer_norm(rms_norm(x, w, number), w, w, number)
        y = gated_activation(y, x, "silu", dropout_p=number, seed=_seed())
        return dropout(activation(y, "relu"), number, seed=_seed())

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number in (0.1, 0.25, 0.5):
        assert torch.equal(compiled(x, number), step(x, number))


@every_op
def test_the_library_op(op: Op) -> None:
    leaves = _leaves(op)
    for call in _library_calls(op, leaves):
        opcheck(call[0], call[1:])


def _library_calls(op: Op, leaves: list[Tensor]) -> list[tuple[Any, ...]]:
    """The library ops that a trace of a call with a rebuilt operand holds, with their arguments."""
    from torch.fx.experimental.proxy_tensor import make_fx

    calls: list[tuple[Any, ...]] = []

    def step(x: Tensor) -> Tensor:
        return op.run(activation(x, "relu"), *leaves[1:])

    graph = make_fx(step)(leaves[0])

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if str(target).startswith("peftfast"):
                given = [
                    [v.detach().requires_grad_(v.requires_grad) for v in a]
                    if isinstance(a, list)
                    else a
                    for a in args
                ]
                calls.append((target, *given))
            return super().call_function(target, args, kwargs)

    Recorder(graph).run(leaves[0])
    assert len(calls) == 2
    return calls


def test_library_ops_hold_their_operands_to_each_other() -> None:
    x, w, seed = torch.randn(3, 8), torch.ones(7), _seed()
    ops = torch.ops.peftfast
    rms, gated = (
        recipes.encode(("llama", 1e-5, None, "auto")),
        recipes.encode(("silu", 0.3, "auto")),
    )
    with pytest.raises(ValueError, match=r"weight is \[7\]"):
        ops.rms_norm([x, w], rms, [], "((0, 0), (0, 0))")
    with pytest.raises(ValueError, match=r"up is torch.float32 \[7\]"):
        ops.gated_activation([x, w, seed], gated, [], "((0, 0), (0, 0), (0, 0))")
    with pytest.raises(ValueError, match=r"seed is \[2\]"):
        ops.dropout([x, torch.tensor([1, 2])], recipes.encode((0.3, "auto")), [], "(None, (0, 0))")
    with pytest.raises(ValueError, match=r"dy is \[3, 7\] for an input of \[3, 8\]"):
        ops.rms_norm_backward(x[:, :7], [x], "((0, 0),)", "float32", [2], rms, [True])
