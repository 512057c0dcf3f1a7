"""prefix_attention: numbers against float64, bad operands, what is saved, autograd's corners."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftfast.ops import ImplUnavailable, prefix_attention, recipes
from peftfast.reference import prefix_attention as reference
from tests.prefix_attention import DEVICE, DTYPES, LOW, MASKS, Case, check
from tests.tolerance import assert_within

IMPL = "auto"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_masks_and_groups(mask: str, groups: int) -> None:
    for at, rows in enumerate((1, 5, 64)):
        dtypes = DTYPES[(at + groups) % 3]
        check(IMPL, 2, 1 + at % 2, groups, 9 + at, None, rows, 32, dtypes=dtypes, mask=mask)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_long_prefix(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(IMPL, 2, 2, 4, 17, None, 1000, 64, dtypes=dtypes, mask="causal")


@pytest.mark.parametrize("sizes", [(1, 1), (1, 33), (5, 33), (7, 3), (33, 1), (31, 31)])
@pytest.mark.parametrize("mask", ["none", "causal", "sliding", "both"])
def test_lengths_of_queries_and_keys(sizes: tuple[int, int], mask: str) -> None:
    dtypes = DTYPES[sum(sizes) % 3]
    check(IMPL, 2, 2, 2, *sizes, 5, 16, dtypes=dtypes, mask=mask)


@pytest.mark.parametrize("width", [1, 3, 80, 128, 256])
def test_head_sizes(width: int) -> None:
    check(IMPL, 2, 2, 2, 6, None, 5, width, mask="causal", dtypes=DTYPES[width % 3])
    check(IMPL, 2, 2, 2, 6, None, 5, width, value_width=7, dtypes=DTYPES[width % 3])


OPTIONS: list[dict[str, Any]] = [
    {"gate": True},
    {"sinks": True},
    {"softcap": 3.0},
    {"dropout_p": 0.3},
    {"form": "relu"},
    {"form": "relu", "gate": True, "sinks": True},
    {"form": "relu", "dropout_p": 0.3},
    {"prefixes": 3},
    {"prefixes": 3, "lengths": True, "mask": "sliding"},
    {"lengths": True},
    {"prefixes": 1, "gate": True},
    {"of_prefix": "bool", "mask": "bool"},
    {"of_prefix": "additive", "gate": True, "softcap": 3.0},
    {"gate": True, "sinks": True, "softcap": 3.0, "dropout_p": 0.2, "prefixes": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_options(options: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(IMPL, 4, 2, 2, 11, None, 6, 16, dtypes=dtypes, **({"mask": "causal"} | options))


@pytest.mark.parametrize(
    "options", [{"form": "relu"}, {"form": "relu", "dropout_p": 0.2}, {"softcap": 3.0}, {}]
)
def test_a_dtypes_least_value_hides_as_minus_infinity_does(options: dict[str, Any]) -> None:
    """Models' own masks have it; rows that see nothing of the sequence must not see all of it."""
    results = []
    for value in (-math.inf, torch.finfo(torch.float32).min):
        torch.manual_seed(0)
        case = Case(mask="additive", **options)
        mask = torch.zeros(2, 1, 7, 7, device=DEVICE)
        mask[0, :, :3] = mask[:, :, :, 0] = value
        case.options["attn_mask"] = mask
        results.append(case.run(IMPL))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive(scale: float) -> None:
    case = Case(mask="causal")
    case.options["scale"] = scale
    ours, expected = case.run(IMPL), case.run("formula")
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name].to(ours[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"mask": "causal"}, {"dropout_p": 0.2}])
@pytest.mark.parametrize("compiled", [False, True])
def test_each_gradient_alone_beside_the_form_relu(options: dict[str, Any], compiled: bool) -> None:
    """Those of sinks need what the softmax gives, also where k and v ask for nothing."""
    torch.compiler.reset()
    call = prefix_attention
    if compiled:
        call = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    given, leaves = _plain(form="relu", sinks=True, gate=True, **options)
    given = given | {name: leaf.detach() for name, leaf in leaves.items()}

    def gradients(*names: str) -> list[Tensor]:
        asked = {name: given[name].clone().requires_grad_() for name in names}
        y = call(**given | asked, impl=IMPL)
        return list(torch.autograd.grad(y.square().sum(), list(asked.values())))

    names = list(leaves)
    together = dict(zip(names, gradients(*names), strict=True))
    for name in names:
        torch.testing.assert_close(gradients(name)[0], together[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_sizes(empty: str) -> None:
    for mask in ("none", "causal"):
        case = Case(**{empty: 0}, mask=mask)
        ours, expected = case.run(IMPL), case.run("formula")
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name])


def _good(**options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of a call with everything in it, and those that are leaves."""
    everything: dict[str, Any] = {
        "mask": "both", "of_prefix": "bool", "prefixes": 2, "lengths": True, "gate": True,
        "sinks": True, "softcap": 3.0, "dropout_p": 0.3,
    }  # fmt: skip
    case = Case(**(everything | options))
    operands = case.operands()
    return case.options | operands, operands


def _plain(**options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    case = Case(**options)
    operands = case.operands()
    return case.options | operands, operands


# q is [2, 4, 7, 16], k and v [2, 2, 7, 16], two prefixes [2, 2, 5, 16].
BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"q": [1.0]}, TypeError, "q is list"),
    ({"q": torch.ones(2, 7, 16)}, ValueError, r"q is \[2, 7, 16\]; \[B, H, S, D\]"),
    ({"q": torch.ones(2, 3, 7, 16)}, ValueError, "k has 2 heads, q 3: .* a multiple"),
    ({"q": torch.ones(2, 4, 7, 8)}, ValueError, r"k is \[2, 2, 7, 16\]; q .* needs \[2, Hkv, T, 8"),
    ({"q": torch.ones(2, 4, 7, 16).half()}, TypeError, "k is torch.float32, q is torch.float16"),
    ({"k": torch.ones(3, 2, 7, 16)}, ValueError, r"k is \[3, 2, 7, 16\]; q"),
    ({"v": torch.ones(2, 2, 8, 16)}, ValueError, r"v is \[2, 2, 8, 16\]; k"),
    ({"v": None}, TypeError, "v is NoneType"),
    ({"prefix_k": torch.ones(2, 2, 5, 8)}, ValueError, r"prefix_k is \[2, 2, 5, 8\].*\[2, P, 16\]"),
    ({"prefix_k": torch.ones(2, 4, 5, 16)}, ValueError, r"prefix_k is \[2, 4, 5, 16\]"),
    ({"prefix_k": torch.ones(5, 16)}, ValueError, r"prefix_k is \[5, 16\]"),
    ({"prefix_v": torch.ones(2, 2, 6, 16)}, ValueError, "N or P differ"),
    ({"prefix_v": torch.ones(2, 2, 5, 16).half()}, TypeError, "prefix_v is torch.float16"),
    ({"prefix_k": torch.ones(2, 2, 5, 16, device="meta")}, ValueError, "prefix_k is on meta"),
    (
        {"prefix_k": torch.ones(2, 2, 0, 16), "prefix_v": torch.ones(2, 2, 0, 16)},
        ValueError,
        r"prefix_k is \[2, 2, 0, 16\]; N and P of at least 1",
    ),
    ({"prefix_index": None}, ValueError, "prefix_index is None, and .* holds 2 prefixes"),
    ({"prefix_index": torch.ones(3, dtype=torch.long)}, ValueError, r"prefix_index is \[3\]; \[2"),
    ({"prefix_index": torch.ones(2)}, TypeError, "prefix_index is torch.float32; int32 or int64"),
    ({"prefix_lengths": torch.ones(3, dtype=torch.int32)}, ValueError, "prefix_lengths is"),
    ({"sinks": torch.ones(2)}, ValueError, r"sinks is \[2\]; \[4\]"),
    ({"gate": torch.ones(3)}, ValueError, r"gate is \[3\]; \[2\], \[2, 1, 1\] or one element"),
    ({"gate": 0.5}, TypeError, "gate is float"),
    ({"attn_mask": torch.ones(7, 6)}, ValueError, r"attn_mask is \[1, 1, 7, 6\], which does not"),
    ({"attn_mask": torch.ones(7, 7).long()}, TypeError, "attn_mask is torch.int64; bool or a"),
    ({"attn_mask": torch.ones(1, 1, 1, 7, 7)}, ValueError, "at most four dimensions"),
    (
        {"attn_mask": torch.ones(7, 7, requires_grad=True)},
        ValueError,
        "attn_mask requires a gradient",
    ),
    ({"prefix_mask": torch.ones(7, 4)}, ValueError, r"prefix_mask is \[1, 1, 7, 4\], which does"),
    ({"window": 0}, ValueError, "window is 0; it must be at least 1"),
    ({"window": 2.0}, TypeError, "window is float"),
    ({"softcap": 0.0}, ValueError, "softcap is 0.0; a positive number"),
    ({"scale": "1"}, TypeError, "scale is str"),
    ({"form": "tanh"}, ValueError, "form is 'tanh'; allowed: 'softmax', 'relu'"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
    ({"seed": torch.tensor([1.0])}, TypeError, "seed is torch.float32"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'; allowed: 'auto', 'triton'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_operand_is_named(change: dict[str, Any], error: type, message: str) -> None:
    good, _ = _good()
    moved = {
        name: value.to(DEVICE)
        if isinstance(value, Tensor) and not value.is_meta and value.is_leaf
        else value
        for name, value in change.items()
    }
    with pytest.raises(error, match=message):
        prefix_attention(**(good | moved))


def test_an_implementation_that_can_not_serve_says_why() -> None:
    good, _ = _good()
    with pytest.raises(ImplUnavailable, match="has no native implementation"):
        prefix_attention(**good, impl="native")
    values = {name: good[name][..., :7] for name in ("v", "prefix_v")}
    with pytest.raises(ImplUnavailable, match="v has heads of 7, q and k of 16"):
        prefix_attention(**(good | values), impl="triton")
    wide, _ = _plain(width=257)
    with pytest.raises(ImplUnavailable, match="the head size is 257; a kernel holds 256"):
        prefix_attention(**wide, impl="triton")


def test_equivalent_ways_to_say_a_call() -> None:
    """Gates of several shapes, masks of few dimensions, a prefix with and without a dimension."""
    good, _ = _plain(gate=True, queries=6, keys=9)
    y = prefix_attention(**good)
    assert torch.equal(y, prefix_attention(**(good | {"gate": good["gate"].view(2, 1, 1)})))
    one = good["gate"][:1]
    same = prefix_attention(**(good | {"gate": one.expand(2)}))
    for gate in (one, one.view(()), one.view(1, 1, 1)):
        assert torch.equal(same, prefix_attention(**(good | {"gate": gate})))
    batched = {name: good[name][None] for name in ("prefix_k", "prefix_v")}
    assert torch.equal(y, prefix_attention(**(good | batched)))
    mask = torch.rand(6, 9, device=DEVICE) < 0.7
    expected = prefix_attention(**good, attn_mask=mask)
    for other in (mask[None], mask[None, None], mask.expand(2, 4, 6, 9)):
        assert torch.equal(expected, prefix_attention(**good, attn_mask=other))
    additive = torch.zeros(6, 9, device=DEVICE).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(expected, prefix_attention(**good, attn_mask=additive))


def test_each_subset_of_gradients() -> None:
    for good, leaves in (_good(), _plain(mask="causal", gate=True, sinks=True)):
        y = prefix_attention(**good)
        dy = torch.randn_like(y)
        every = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
        names = list(leaves)
        for wanted in ((), *((name,) for name in names), *zip(names, names[1:], strict=False)):
            some = {k: leaf.detach().requires_grad_(k in wanted) for k, leaf in leaves.items()}
            y = prefix_attention(**(good | some))
            assert y.requires_grad == bool(wanted)
            if wanted:
                grads = torch.autograd.grad(y, [some[name] for name in wanted], dy)
                for name, grad in zip(wanted, grads, strict=True):
                    torch.testing.assert_close(grad, every[name])


def _saved(run: Any) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


def _bytes(kept: list[Tensor]) -> int:
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
    return sum(storages.values())


@pytest.mark.parametrize("dtypes", DTYPES)
def test_nothing_is_saved_for_the_prefix_but_the_prefix(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    sizes = {}
    for batch in (2, 4):
        good, leaves = _plain(batch=batch, queries=64, rows=32, dtypes=dtypes, mask="causal")

        def alone(leaves: dict[str, Tensor] = leaves) -> Tensor:
            q, k, v = (leaves[name] for name in "qkv")
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        prefix = leaves["prefix_k"].nbytes + leaves["prefix_v"].nbytes
        sizes[batch] = [
            _bytes(_saved(lambda good=good: prefix_attention(**good))) - prefix,
            _bytes(_saved(alone)),
        ]
    if DEVICE == "cpu":
        assert all(ours == theirs for ours, theirs in sizes.values())
    assert sizes[4][0] == 2 * sizes[2][0]


def test_keys_are_not_kept_where_only_the_prefix_learns() -> None:
    good, leaves = _plain()
    for name in "qkv":
        leaves[name].requires_grad_(False)
    held = {one.untyped_storage().data_ptr() for one in _saved(lambda: prefix_attention(**good))}
    assert good["q"].untyped_storage().data_ptr() in held
    assert good["k"].untyped_storage().data_ptr() not in held


def test_the_output_is_as_attention_modules_go_on_with_it() -> None:
    good, _ = _good()
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            y = prefix_attention(**good).transpose(1, 2)
        assert y.is_contiguous()
        assert recipes.is_saved(y) == graph


def test_changing_an_operand_in_place_before_the_backward_raises() -> None:
    good, _ = _plain()
    q = good["q"] * 1
    y = prefix_attention(**(good | {"q": q}))
    q += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_backward_writes_into_nothing_that_was_saved() -> None:
    for good, leaves in (_good(), _plain(mask="causal"), _plain(form="relu")):
        every = list(leaves.values())
        before = [leaf.detach().clone() for leaf in every]
        y = prefix_attention(**good)
        dy = torch.randn_like(y)
        first = torch.autograd.grad(y, every, dy, retain_graph=True)
        second = torch.autograd.grad(y, every, dy)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, every, strict=True))


def test_second_derivatives_raise() -> None:
    good, leaves = _good()
    y = prefix_attention(**good)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), leaves["prefix_k"], create_graph=True)
    with pytest.raises(RuntimeError, match="prefix_attention has no second derivative"):
        (grad.sum() + leaves["prefix_k"].sum()).backward()


def test_batched_gradients_raise() -> None:
    good, leaves = _plain()
    y = prefix_attention(**good)
    dys = torch.randn(3, *y.shape, device=DEVICE)
    with pytest.raises(RuntimeError, match="prefix_attention has no batched gradients"):
        torch.autograd.grad(y, leaves["prefix_k"], dys, is_grads_batched=True)


def test_drawn_seeds_follow_torchs_generator() -> None:
    good, _ = _good()
    good["seed"] = None
    torch.manual_seed(5)
    first, other = (prefix_attention(**good) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, prefix_attention(**good)) and not torch.equal(first, other)
    state = torch.get_rng_state()
    prefix_attention(**(good | {"dropout_p": 0.0}))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant: bool) -> None:
    good, leaves = _good(dropout_p=0.5)
    good["seed"] = None

    def run(q: Tensor) -> Tensor:
        return prefix_attention(**(good | {"q": q})).sin()

    every = list(leaves.values())
    torch.manual_seed(1)
    plain = torch.autograd.grad(run(good["q"]).sum(), every)
    torch.manual_seed(1)
    checkpoint(run, good["q"], use_reentrant=reentrant).sum().backward()
    for leaf, grad in zip(every, plain, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("of_prefix", [torch.float32, torch.float16])
def test_autocast_is_that_of_the_concatenation(dtype: torch.dtype, of_prefix: torch.dtype) -> None:
    case = Case(dtypes=(dtype, of_prefix), queries=40, mask="causal")

    def eager(operands: dict[str, Tensor]) -> Tensor:
        q, k, v, prefix_k, prefix_v = operands.values()
        pairs = ((prefix_k, k), (prefix_v, v))
        both = [torch.cat([a.expand(2, -1, -1, -1).to(b.dtype), b], dim=2) for a, b in pairs]
        seen = torch.ones(40, 45, dtype=torch.bool, device=DEVICE).tril(5)
        return F.scaled_dot_product_attention(q, *both, seen, enable_gqa=True)

    results = []
    for wide, run in ((False, lambda one: case.call(one, IMPL)), (False, eager), (True, eager)):
        operands = case.operands(wide)
        with torch.autocast(DEVICE, dtype=LOW, enabled=not wide):
            y = run(operands)
        grads = torch.autograd.grad(y, list(operands.values()), case.dy.to(y.dtype))
        results.append({"y": y, **dict(zip(operands, grads, strict=True))})
    for name in results[0]:
        assert results[0][name].dtype == results[1][name].dtype, name
        assert_within(*(one[name] for one in results), what=name)


@pytest.mark.parametrize("layout", ["model", "strided", "expanded"])
def test_layouts(layout: str) -> None:
    for options in ({"mask": "causal"}, {"softcap": 3.0}):
        good, leaves = _plain(batch=2, **options)
        results = []
        for contiguous in (False, True):
            given = {}
            for name, leaf in leaves.items():
                value = leaf.detach()
                if layout == "model":  # as projections leave it
                    value = value.transpose(-2, -3).contiguous().transpose(-2, -3)
                elif layout == "strided":
                    value = value.repeat_interleave(2, -1)[..., ::2]
                elif value.ndim == 4:
                    value = value[:1].expand(2, -1, -1, -1)
                given[name] = (value.contiguous() if contiguous else value).requires_grad_()
            y = prefix_attention(**(good | given))
            dy = torch.full((), 0.5, device=DEVICE).expand(y.shape)
            results.append([y, *torch.autograd.grad(y, list(given.values()), dy)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_meta_tensors() -> None:
    for good, leaves in (_good(), _plain(mask="causal")):
        there = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in good.items()}
        there |= {k: v.detach().to("meta").requires_grad_() for k, v in leaves.items()}
        y = prefix_attention(**there)
        y.sum().backward()
        assert y.is_meta and y.shape == (2, 4, 7, 16)
        assert there["prefix_k"].grad.shape == leaves["prefix_k"].shape


@pytest.mark.parametrize("everything", [True, False])
def test_opcheck(everything: bool) -> None:
    good, leaves = _good() if everything else _plain(mask="causal")
    names = reference.GRADIENTS
    others = ("attn_mask", "prefix_mask", "prefix_index", "prefix_lengths", "seed")
    tensors = [leaves.get(name) for name in names]
    if not everything:
        tensors[3:5] = [leaf.detach()[None].requires_grad_() for leaf in tensors[3:5]]
    rest = [good.get(name) for name in others]
    settings = (True, 0.25, None, good["softcap"], "softmax", good["dropout_p"], "reference")
    operands = [*tensors, *rest, recipes.encode(settings)]
    opcheck(torch.ops.peftfast.prefix_attention.default, operands)
    y, lse = (one.detach() for one in torch.ops.peftfast.prefix_attention(*operands))
    plain = [one.detach() if isinstance(one, Tensor) else one for one in operands]
    needs = [one is not None for one in tensors]
    dy = torch.randn(2, 4, 7, 16, device=DEVICE)
    backward = torch.ops.peftfast.prefix_attention_backward
    opcheck(backward.default, (dy, y, lse, *plain, needs))
    with pytest.raises(ValueError, match=r"lse is \[2, 4, 6\]; \[2, 4, 7\] is needed"):
        backward(dy, y, lse[..., 1:], *plain, needs)
    with pytest.raises(ValueError, match=r"prefix_k is .*\[2, P, 16\]"):
        wrong = [*plain[:3], plain[3][..., 1:], *plain[4:]]
        torch.ops.peftfast.prefix_attention(*wrong)


def test_compiles_into_one_graph() -> None:
    good, leaves = _good()

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(leaves, tensors, strict=True))
        named["q"] = named["q"].sin()
        return prefix_attention(**(good | named)).transpose(1, 2).flatten(2).sin().sum()

    torch._dynamo.reset()
    every = list(leaves.values())
    eager = torch.autograd.grad(run(*every), every)
    options = {"fullgraph": True, "backend": "aot_eager"}
    compiled = torch.autograd.grad(torch.compile(run, **options)(*every), every)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
