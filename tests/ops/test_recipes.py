"""Recipes: what is saved in a tensor's place, when a tag is believed, and lora_linear over them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from peftfast.memory import saved_bytes
from peftfast.ops import lora_linear, lora_linear_group, recipes
from peftfast.ops.nf4_weight import flatten

ROWS, IN, OUT, RANK = 50, 96, 40, 4


@recipes.builder("test_square")
def _square(inputs: Sequence[Tensor], settings: recipes.Settings) -> Tensor:
    return inputs[0] * inputs[0] * settings[0]


@recipes.builder("test_product")
def _product(inputs: Sequence[Tensor], settings: recipes.Settings) -> Tensor:
    return inputs[0] * inputs[1]


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(x)
        return x * x * factor

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return 2 * ctx.factor * ctx.saved_tensors[0] * dy, None


def square(x: Tensor, factor: float = 1.0, tagged: bool = True) -> Tensor:
    y = _Square.apply(x, factor)
    if tagged:
        recipes.tag(y, "test_square", (factor,), [x])
    return y


def _x() -> Tensor:
    return torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _adapter(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((OUT, IN), (RANK, IN), (OUT, RANK))
    w, a, b = (torch.randn(*shape, generator=generator) for shape in shapes)
    return w, a.requires_grad_(), b.requires_grad_()


def test_an_untagged_tensor_is_kept_itself() -> None:
    x = _x()
    kept = recipes.keep(x)
    assert kept.spec == 0 and kept.leaves[0] is x
    assert recipes.rebuild(kept.spec, kept.leaves) is x


def test_leaves_share_storage_and_rebuild_the_same_bits() -> None:
    x = _x()
    y = square(x, 3.0)
    kept = recipes.keep(y)
    (leaf,) = kept.leaves
    assert leaf.data_ptr() == x.data_ptr() and not leaf.requires_grad
    assert torch.equal(recipes.rebuild(recipes.decode(recipes.encode(kept.spec)), [leaf]), y)


def test_recipes_nest_and_share_leaves() -> None:
    x = _x()
    y = square(square(x, 3.0), 0.5)
    z = y * y
    recipes.tag(z, "test_product", (), [y, y])
    kept = recipes.keep(z, torch.float16)
    assert [leaf.data_ptr() for leaf in kept.leaves] == [x.data_ptr()]
    assert torch.equal(recipes.rebuild(kept.spec, kept.leaves), z.half())


def test_views_of_the_whole_are_known_and_others_are_not() -> None:
    y = square(_x())
    for view in (y[:, :], y.view(5, 10, IN), y.view(-1)):
        kept = recipes.keep(view)
        rebuilt = recipes.rebuild(kept.spec, kept.leaves)
        assert kept.spec != 0 and rebuilt.shape == view.shape and torch.equal(rebuilt, view)
    for other in (y[1:], y.t(), y.detach(), y.clone(), y[:, ::2]):
        assert recipes.keep(other).spec == 0


def test_source_gives_the_inputs_with_their_graph() -> None:
    x = _x()
    y = square(x, 2.0)
    assert recipes.source(y, "test_product") is None
    found = recipes.source(y, "test_product", "test_square")
    assert found is not None and found[:2] == ("test_square", (2.0,)) and found[2][0] is x
    assert recipes.source(square(y), "test_square") is None  # y itself is not held


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x, y: y.detach().add_(1), id="the tensor"),
        pytest.param(lambda x, y: x.detach().add_(1), id="its input"),
    ],
)
def test_a_change_in_place_ends_belief(change: Callable[[Tensor, Tensor], object]) -> None:
    x = _x()
    y = square(x)
    z = square(y)
    change(x, y)
    assert recipes.keep(y).spec == 0
    if y._version == 0:
        assert recipes.keep(z).spec == 0


def test_a_later_change_in_place_raises_in_the_backward() -> None:
    x = _x()
    h = x * 1.0
    y = lora_linear(square(h), *_with_bias(), 1.0)
    h.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def _with_bias(seed: int = 1) -> tuple[Tensor, None, Tensor, Tensor]:
    w, a, b = _adapter(seed)
    return w, None, a, b


def test_no_tag_without_grad_or_in_inference_mode() -> None:
    with torch.no_grad():
        y = square(_x())
    assert recipes.keep(y).spec == 0
    with torch.inference_mode():
        x = torch.ones(3)
    y = torch.ones(3)
    recipes.tag(y, "test_square", (1.0,), [x])
    assert recipes.keep(y).spec == 0


def test_tags_hold_within_a_checkpoint_and_not_beyond() -> None:
    x = _x()
    specs, alive = [], []

    def region(h: Tensor) -> tuple[Tensor, Tensor]:
        inner = h * 1.0
        alive.append(weakref.ref(inner))
        y = square(inner)
        specs.append(recipes.keep(y).spec)
        return y, y.exp()

    y, e = checkpoint(region, x, use_reentrant=False)
    assert specs == [("test_square", (1.0,), (0,))]
    assert recipes.keep(y).spec == 0
    gc.collect()
    assert alive[0]() is None, "the tag of a checkpoint's output keeps its input alive"
    outer = square(x)
    z = checkpoint(
        lambda h: specs.append(recipes.keep(h).spec) or h * h, outer, use_reentrant=False
    )
    (y + e + z).sum().backward()
    assert specs[:2] == [specs[0], 0]
    assert sorted(specs[2:], key=str) == sorted(specs[:2], key=str)  # recomputed as they were


def test_copies_and_pickles_carry_no_recipe() -> None:
    y = square(_x()).detach()
    recipes.tag(y, "test_square", (1.0,), [torch.ones(1)])
    assert recipes.keep(y).spec != 0
    assert recipes.keep(copy.deepcopy(y)).spec == 0


def _kept_by(forward: Callable[[], Tensor], exclude: Sequence[Any]) -> tuple[int, Tensor]:
    """The bytes that a forward saves, and its output."""
    held: list[Tensor] = []
    tensors = [one for one in exclude if one is not None]
    return saved_bytes(lambda: held.append(forward()), exclude=tensors), held[0]


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("autocast", [False, True])
def test_lora_linear_saves_the_leaves_and_gives_the_same(dropout_p: float, autocast: bool) -> None:
    seed = torch.tensor([7])

    def run(tagged: bool) -> tuple[int, list[Any]]:
        x, operands = _x(), _with_bias()
        options: dict[str, Any] = dict(dropout_p=dropout_p, seed=seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept, y = _kept_by(
                lambda: lora_linear(square(x, 2.0, tagged), *operands, 1.5, **options),
                exclude=[x, *operands],
            )
        y.float().square().sum().backward()
        return kept, [y, x.grad, operands[2].grad, operands[3].grad]

    (plain, expected), (ours, got) = run(False), run(True)
    size = 2 if autocast else 4
    assert plain - ours == (ROWS * IN - 1) * size  # one value stands in for x
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def test_siblings_over_a_recipe() -> None:
    found = []
    for tagged in (False, True):
        x, (w1, a1, b1), (w2, a2, b2) = _x(), _adapter(1), _adapter(2)
        ys = lora_linear_group(
            square(x, 2.0, tagged), [w1, w2], [None, None], [a1, a2], [b1, b2], [1.0, 0.5]
        )
        torch.stack(ys).square().sum().backward(retain_graph=True)
        torch.stack(ys).sum().backward()
        found.append([x.grad, a1.grad, a2.grad, b1.grad, b2.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_frozen_down_projection_needs_no_x() -> None:
    x, (w, _, a, b) = _x(), _with_bias()
    kept, _ = _kept_by(lambda: lora_linear(x * 1.0, w, None, a.detach(), b, 1.0), [w, a, b])
    assert kept < x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compression_changes_only_the_gradients_of_adapters(dtype: torch.dtype) -> None:
    """They are those of values that are off by at most 1/254 of their row's largest magnitude."""

    def run(compress: bool) -> tuple[int, list[Any], list[Any]]:
        x = _x().detach().to(dtype).requires_grad_()
        w, a, b = (t.detach().to(dtype).requires_grad_(i > 0) for i, t in enumerate(_adapter()))
        h = x * 1.0
        kept, y = _kept_by(lambda: lora_linear(h, w, None, a, b, 0.5, compress=compress), [w, a, b])
        y.float().square().sum().backward()
        return kept, [y, x.grad, h.detach(), a.detach(), b.detach()], [a.grad, b.grad]

    (plain, expected, exact), (ours, got, near) = run(False), run(True)
    saving = ROWS * (IN * (dtype.itemsize - 1) - 4 + RANK * (dtype.itemsize - 1) - 4)
    assert plain - ours == saving - dtype.itemsize  # one value stands in for x
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
    y, _, h, a, b = (one.detach().double() for one in got)
    dy = (2 * y.float()).to(dtype).double()
    for grad, grad_near, left, right in (
        (exact[0], near[0], 0.5 * dy @ b, h),
        (exact[1], near[1], dy, 0.5 * h @ a.t()),
    ):
        off = right.abs().amax(1, keepdim=True) / 254
        rounding = 8 * torch.finfo(dtype).eps * (left.abs().t() @ right.abs())
        assert not torch.equal(grad, grad_near)
        assert bool(((grad_near - grad).double().abs() <= left.abs().t() @ off + rounding).all())


def test_siblings_are_compressed_each_with_scales_of_its_own() -> None:
    """A weak sibling's adapter loses nothing to a strong one's."""

    def gradients(compress: bool) -> list[Tensor]:
        x, (w, a1, b1), (_, a2, b2) = _x().detach(), _adapter(1), _adapter(2)
        a2.data *= 1e-4
        a2.data = a2.data[:3].clone()
        b2.data = b2.data[:, :3].clone()
        a2, b2 = a2.detach().requires_grad_(), b2.detach().requires_grad_()
        ys = lora_linear_group(
            x, [w, w], [None, None], [a1, a2], [b1, b2], [1.0, 1.0], compress=compress
        )
        (ys[0].square().sum() + ys[1].square().sum()).backward()
        return [t.grad for t in (a1, a2, b1, b2) if t.grad is not None]

    for exact, near in zip(gradients(False), gradients(True), strict=True):
        assert not torch.equal(exact, near)
        assert (exact - near).norm() <= 0.01 * exact.norm()


def test_compress_leaves_alone_what_is_kept_anyway() -> None:
    x, operands = _x(), _with_bias()
    h = x * 1.0
    recipes.mark_saved(h)
    assert recipes.is_saved(h.view(-1)) and not recipes.is_saved(x)

    def exact(y: Tensor, **options: Any) -> Tensor:
        """The gradient of A."""
        operands[2].grad = None
        lora_linear(y, *operands, 1.0, **options).sum().backward()
        assert operands[2].grad is not None
        return operands[2].grad

    assert torch.equal(exact(h, compress=True), exact(x * 1.0))
    assert torch.equal(exact(square(x), compress=True), exact(square(x)))


@pytest.mark.parametrize("compress", [False, True])
def test_compiled_whole(compress: bool) -> None:
    """One graph, the same numbers, and x is rebuilt inside of the opaque op."""

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
            y = torch.ops.aten.mul(x, x)
            if not compress:
                recipes.tag(y, "test_square", (1.0,), [x])
            return lora_linear(y, w, None, a, b, 1.0, compress=compress)

    found = []
    for run in (Net(), torch.compile(Net(), backend="aot_eager", fullgraph=True)):
        x, (w, a, b) = _x(), _adapter()
        run(x, w, a, b).square().sum().backward()
        found.append([x.grad, a.grad, b.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("compress", [False, True])
def test_opcheck_with_leaves(compress: bool) -> None:
    x, (w, a, b) = _x(), _adapter()
    h = x.detach()
    y = (h * h).requires_grad_()
    parts, spec = flatten([w])
    recipe = recipes.encode(("test_square", (1.0,), (0,)))
    settings = ([0], [1.0], [0.0], None, [0], [h], recipe, compress, "reference")
    opcheck(torch.ops.peftfast.lora_linear.default, (y, parts, spec, [], [a], [b], *settings))


def test_rows_int8_bound_and_bad_rows() -> None:
    from peftfast.reference.rows_int8 import dequantize_rows, quantize_rows

    x = torch.randn(3, 7, 33, generator=torch.Generator().manual_seed(0)) * 10
    x[0, 0] = 0
    x[1, 2, 3], x[2, 6, 0] = float("nan"), float("inf")
    codes, scales = quantize_rows(x)
    back = dequantize_rows(codes, scales, torch.float32)
    bad = torch.zeros(3, 7, dtype=torch.bool)
    bad[1, 2] = bad[2, 6] = True
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scales.shape == x.shape[:-1]
    assert bool((~back[bad].isfinite()).all())
    off = (back - x)[~bad].abs().amax(1)
    assert bool((off <= x[~bad].abs().amax(1) / 254 * (1 + 1e-5)).all())
    for shape in ((0, 5), (4, 0), (7,)):
        codes, scales = quantize_rows(torch.ones(shape))
        assert torch.equal(dequantize_rows(codes, scales, torch.float32), torch.ones(shape))
