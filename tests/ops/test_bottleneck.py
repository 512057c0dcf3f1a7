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


def _good(**options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of a call with everything in it, and those that are leaves."""
    everything = {"norm": "layer", "gate": "sequences", "residual": "tensor", "learned": True}
    case = Case(8, 24, **({"d_out": 16, "dropout_p": 0.3} | everything | options))
    operands = case.operands()
    return {"down_bias": None, "up_bias": None} | case.options | operands, operands


BAD = [
    ({"x": [1.0]}, TypeError, "x is list"),
    ({"x": torch.tensor(1.0)}, ValueError, "x is a scalar"),
    ({"x": torch.ones(3, 24, dtype=torch.int64)}, TypeError, "x is torch.int64"),
    ({"x": torch.ones(3, 24).to_sparse()}, TypeError, "x is of layout torch.sparse_coo"),
    (
        {"x": torch.ones(3, 11, 25)},
        ValueError,
        r"down is \[8, 24\]; x \[3, 11, 25\] needs \[m, 25\]",
    ),
    ({"down": torch.ones(24)}, ValueError, r"down is \[24\]"),
    ({"down": torch.ones(0, 24)}, ValueError, r"down is \[0, 24\].*m at least 1"),
    ({"down": None}, TypeError, "down is NoneType"),
    ({"down": torch.ones(8, 24).half()}, TypeError, "down is torch.float16, x is torch.float32"),
    ({"down": torch.ones(8, 24, device="meta")}, ValueError, "down is on meta"),
    ({"down_bias": torch.ones(7)}, ValueError, r"down_bias is \[7\]; \[8\]"),
    ({"up": torch.ones(8, 16)}, ValueError, r"up is \[8, 16\]; down \[8, 24\] needs \[d_out, 8\]"),
    ({"up": torch.ones(16, 8).half()}, TypeError, "up is torch.float16, down is torch.float32"),
    ({"up_bias": 1.0}, TypeError, "up_bias is float"),
    ({"up_bias": torch.ones(17)}, ValueError, r"up_bias is \[17\]; \[16\]"),
    ({"activation": "swish"}, ValueError, "activation is 'swish'; allowed: 'identity', 'relu'"),
    ({"scaling": "1"}, TypeError, "scaling is str"),
    ({"scaling": float("inf")}, ValueError, "scaling is inf"),
    ({"scaling": torch.ones(2)}, ValueError, r"scaling is \[2\]; one element"),
    ({"residual": None}, TypeError, "residual is NoneType; True, False or a tensor"),
    ({"residual": True}, ValueError, r"residual is True.*up is \[16, 8\]"),
    ({"residual": torch.ones(3, 11, 24)}, ValueError, r"residual is \[3, 11, 24\]; \[3, 11, 16\]"),
    ({"norm": "batch"}, ValueError, "norm is 'batch'; allowed: None, 'layer', 'rms'"),
    ({"norm": None, "norm_weight": None}, ValueError, "norm_bias is given, and neither"),
    ({"norm_weight": torch.ones(16)}, ValueError, r"norm_weight is \[16\]; \[24\]"),
    ({"norm_eps": "1e-5"}, TypeError, "norm_eps is str"),
    ({"gate": torch.ones(3, 11)}, ValueError, r"gate is \[3, 11\], which does not broadcast"),
    ({"gate": torch.ones(2, 3, 11, 1)}, ValueError, r"gate is \[2, 3, 11, 1\]"),
    ({"gate": 0.5}, TypeError, "gate is float"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
    ({"seed": torch.tensor([1.0])}, TypeError, "seed is torch.float32"),
    ({"seed": torch.tensor([1, 2])}, ValueError, r"seed is \[2\]"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'; allowed: 'auto', 'triton'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_operand_is_named(change: dict[str, Any], error: type, message: str) -> None:
    good, _ = _good()
    moved = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in change.items()
    }
    with pytest.raises(error, match=message):
        bottleneck(**(good | moved))


def test_an_implementation_that_can_not_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    good, _ = _good()
    monkeypatch.setattr(library, "missing", lambda kind: "the library was not built")
    why = "csrc has no bottleneck for a GPU" if CUDA else "the library was not built"
    with pytest.raises(ImplUnavailable, match=why):
        bottleneck(**good, impl="native")
    double = {k: v.double() if k in _good()[1] else v for k, v in good.items()}
    with pytest.raises(ImplUnavailable, match="dtype torch.float64"):
        bottleneck(**double, impl="triton")
    bottleneck(**double)
    wide = {"down": torch.ones(300, 24, device=DEVICE), "up": torch.ones(16, 300, device=DEVICE)}
    with pytest.raises(ImplUnavailable, match="the bottleneck is 300 wide; 256 is the most"):
        bottleneck(**(good | wide | {"down_bias": None}), impl="triton")


def test_a_norm_weight_means_a_layer_norm() -> None:
    good, _ = _good()
    assert torch.equal(bottleneck(**(good | {"norm": None})), bottleneck(**good))


@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_each_subset_of_gradients(norm: str | None) -> None:
    good, leaves = _good(norm=norm)
    y = bottleneck(**good)
    dy = torch.randn_like(y)
    every = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    names = list(leaves)
    subsets = [(), *((name,) for name in names), *zip(names, names[1:], strict=False)]
    for wanted in subsets:
        some = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in leaves.items()}
        y = bottleneck(**(good | some))
        assert y.requires_grad == bool(wanted)
        if wanted:
            grads = torch.autograd.grad(y, [some[name] for name in wanted], dy)
            for name, grad in zip(wanted, grads, strict=True):
                torch.testing.assert_close(grad, every[name])


def test_x_itself_as_the_residual_is_the_same_as_true() -> None:
    good, _ = _good(residual="x")
    grads = []
    for residual in (True, good["x"]):
        y = bottleneck(**(good | {"residual": residual}))
        grads.append(torch.autograd.grad(y.square().sum(), good["x"])[0])
    torch.testing.assert_close(*grads)


def _saved(run: Any) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


def _bytes(kept: list[Tensor], leaves: dict[str, Tensor]) -> int:
    """Bytes of the distinct storages among them that are no parameters."""
    parameters = {v.untyped_storage().data_ptr() for k, v in leaves.items() if k != "x"}
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_no_more_is_saved_than_by_eager_modules(activation: str, norm: str | None) -> None:
    case = Case(64, 1024, activation=activation, norm=norm)
    leaves = case.operands()
    x = leaves["x"]

    def eager() -> Tensor:
        n = x
        if norm is not None:
            n = F.layer_norm(x, (1024,), leaves["norm_weight"], leaves["norm_bias"])
        z = F.linear(n, leaves["down"], leaves["down_bias"])
        h = torch.relu(z) if activation == "relu" else F.gelu(z)
        return x + F.linear(h, leaves["up"], leaves["up_bias"])

    ours = _bytes(_saved(lambda: case.call(leaves, "auto")), leaves)
    theirs = _bytes(_saved(eager), leaves)
    assert ours <= (theirs if norm is None else 0.55 * theirs)
    rows = x.shape[0] * x.shape[1]
    assert ours == x.nbytes + 4 * rows * (64 + (2 if norm else 0))


def test_a_residual_is_not_saved_and_x_only_where_it_is_read() -> None:
    good, leaves = _good(norm=None, residual="tensor")
    held = {one.untyped_storage().data_ptr() for one in _saved(lambda: bottleneck(**good))}
    assert good["x"].untyped_storage().data_ptr() in held
    assert good["residual"].untyped_storage().data_ptr() not in held
    good["down"].requires_grad_(False)
    held = {one.untyped_storage().data_ptr() for one in _saved(lambda: bottleneck(**good))}
    assert good["x"].untyped_storage().data_ptr() not in held
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    good["residual"].requires_grad_()
    assert _saved(lambda: bottleneck(**good)) == []


@pytest.mark.parametrize("norm", [None, "rms"])
def test_x_is_kept_as_what_it_is_rebuilt_from(norm: str | None) -> None:
    good, leaves = _good(norm=norm, residual="x")
    w = torch.randn(24, device=DEVICE)

    def run(recipe: bool) -> Tensor:
        x = layer_norm(leaves["x"], w, None, 1e-5, recipe=recipe)
        assert (recipes.keep(x).spec != 0) == recipe
        return bottleneck(**(good | {"x": x}))

    pair = [torch.autograd.grad(run(one).sum(), list(leaves.values())) for one in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    sizes = [_bytes(_saved(lambda one=one: run(one)), leaves) for one in (True, False)]
    assert sizes[1] - sizes[0] == leaves["x"].nbytes - 4  # one element stands in for x


def test_the_output_and_the_residual_may_be_changed_in_place() -> None:
    good, leaves = _good()
    every = list(leaves.values())
    expected = torch.autograd.grad(bottleneck(**good).relu().sum(), every)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            torch.autograd.grad(bottleneck(**good).relu_().sum(), every), expected, strict=True
        )
    )
    residual = good["residual"] * 1
    y = bottleneck(**(good | {"residual": residual})).relu()
    residual.zero_()
    grads = torch.autograd.grad(y.sum(), every[:-1])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[:-1], strict=True))


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_changing_x_in_place_before_the_backward_raises(activation: str) -> None:
    good, _ = _good(residual="x", activation=activation, dropout_p=0.0)
    x = good["x"] * 1
    y = bottleneck(**(good | {"x": x}))
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_backward_writes_into_nothing_that_was_saved() -> None:
    for norm, activation in itertools.product(CHOICES["norm"], ("identity", "tanh")):
        good, leaves = _good(norm=norm, activation=activation, residual="x")
        every = list(leaves.values())
        before = [leaf.detach().clone() for leaf in every]
        y = bottleneck(**good)
        first = torch.autograd.grad(y.sum(), every, retain_graph=True)
        second = torch.autograd.grad(y.sum(), every)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, every, strict=True))


def test_second_derivatives_raise() -> None:
    good, leaves = _good(residual="x")
    y = bottleneck(**good)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="bottleneck has no second derivative"):
        (grad.sum() + leaves["x"].sum()).backward()


def test_drawn_seeds_follow_torchs_generator() -> None:
    good, _ = _good()
    good["seed"] = None
    torch.manual_seed(5)
    first, other = (bottleneck(**good) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, bottleneck(**good)) and not torch.equal(first, other)
    state = torch.get_rng_state()
    bottleneck(**(good | {"dropout_p": 0.0}))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant: bool) -> None:
    good, leaves = _good(dropout_p=0.5)
    good["seed"] = None

    def run(x: Tensor) -> Tensor:
        return bottleneck(**(good | {"x": x})).sin()

    every = list(leaves.values())
    torch.manual_seed(1)
    plain = torch.autograd.grad(run(good["x"]).sum(), every)
    torch.manual_seed(1)
    checkpoint(run, good["x"], use_reentrant=reentrant).sum().backward()
    for leaf, grad in zip(every, plain, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", CHOICES["residual"])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_autocast_is_that_of_eager_modules(
    dtype: torch.dtype, residual: str, norm: str | None
) -> None:
    case = Case(64, 64, dtypes=(dtype, torch.float32), norm=norm, residual=residual)

    def eager(operands: dict[str, Tensor]) -> Tensor:
        n = operands["x"]
        if norm is not None:
            parameters = operands["norm_weight"], operands["norm_bias"]
            n = F.layer_norm(n.to(parameters[0].dtype), (64,), *parameters, 1e-3)
        h = F.gelu(F.linear(n, operands["down"], operands["down_bias"]))
        delta = F.linear(h, operands["up"], operands["up_bias"]) * 0.7
        if residual == "none":
            return delta
        kept = operands["x" if residual == "x" else "residual"]
        return kept + delta

    results = []
    for wide, run in ((False, lambda one: case.call(one, "auto")), (False, eager), (True, eager)):
        operands = case.operands(wide)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not wide):
            y = run(operands)
        grads = torch.autograd.grad(y, list(operands.values()), case.dy.to(y.dtype))
        results.append({"y": y, **dict(zip(operands, grads, strict=True))})
    for name in results[0]:
        assert results[0][name].dtype == results[1][name].dtype, name
        assert_within(*(one[name] for one in results), what=name)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        kept = _saved(lambda: case.call(case.operands(), "auto"))
    # z is what the products gave; no cast copy of a weight is kept.
    assert [one.dtype for one in kept if one.shape == (33, 64)] == [torch.bfloat16]
    assert all(one.dtype == torch.float32 for one in kept if one.shape == (64, 64))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "one dimension"])
@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_layouts(layout: str, norm: str | None) -> None:
    d = 24
    make = {
        "transposed": lambda: torch.randn(d, 20, device=DEVICE).t(),
        "strided": lambda: torch.randn(4, 5, 2 * d, device=DEVICE)[..., ::2].transpose(0, 1),
        "expanded": lambda: torch.randn(1, d, device=DEVICE).expand(20, d),
        "one dimension": lambda: torch.randn(d, device=DEVICE),
    }
    good, _ = _good(residual="x", gate=None, norm=norm)
    good["down"] = good["down"].detach().t().contiguous().t()
    results = []
    x = make[layout]()
    for given in (x, x.contiguous().clone()):
        leaf = given.detach().requires_grad_()
        y = bottleneck(**(good | {"x": leaf}))
        dy = torch.full((), 0.5, device=DEVICE).expand(y.shape)
        results.append([y, *torch.autograd.grad(y, [leaf, good["up"]], dy)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_batched_gradients(norm: str | None) -> None:
    for residual in ("x", "none"):
        good, leaves = _good(norm=norm, residual=residual)
        every = list(leaves.values())
        y = bottleneck(**good)
        dys = torch.randn(3, *y.shape, device=DEVICE)
        batched = torch.autograd.grad(y, every, dys, is_grads_batched=True, retain_graph=True)
        for k in range(3):
            single = torch.autograd.grad(y, every, dys[k], retain_graph=True)
            for ours, theirs in zip(batched, single, strict=True):
                torch.testing.assert_close(ours[k], theirs, rtol=1e-4, atol=1e-5)


def test_meta_tensors() -> None:
    good, leaves = _good()
    there = {k: v.detach().to("meta").requires_grad_() for k, v in leaves.items()}
    there["seed"] = good["seed"].to("meta")
    y = bottleneck(**(good | there))
    y.sum().backward()
    assert y.is_meta and y.shape == (3, 11, 16) and there["down"].grad.shape == (8, 24)


@pytest.mark.parametrize("options", [{}, {"norm": None, "gate": None, "learned": False}])
def test_opcheck(options: dict[str, Any]) -> None:
    good, leaves = _good(**options)
    if not options:
        leaves["down_bias"].requires_grad_(False)
    settings = ("gelu", 0.7, False, good["norm"], 1e-3, 0.3, None, "reference")
    names = (
        "x", "down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias", "scaling", "gate",
        "residual",
    )  # fmt: skip
    tensors = [leaves.get(name) for name in names]
    operands = [*tensors, good["seed"], [], "0", recipes.encode(settings)]
    opcheck(torch.ops.peftfast.bottleneck.default, (*operands, True))
    _, z, statistics = (t.detach() for t in torch.ops.peftfast.bottleneck(*operands, True))
    plain = [one.detach() if isinstance(one, Tensor) else one for one in operands]
    needs = [one is not None and one.requires_grad for one in tensors[:9]]
    dy = torch.randn(3, 11, 16, device=DEVICE)
    opcheck(torch.ops.peftfast.bottleneck_backward.default, (dy, z, statistics, *plain, needs))
    with pytest.raises(ValueError, match=r"z is \[32, 8\]; \[33, 8\] is needed"):
        torch.ops.peftfast.bottleneck_backward(dy, z[1:], statistics, *plain, needs)
    with pytest.raises(ValueError, match=r"up is \[16, 7\]"):
        wrong = [*plain[:3], plain[3][:, 1:], *plain[4:]]
        torch.ops.peftfast.bottleneck(*wrong, True)


def test_compiles_into_one_graph() -> None:
    good, leaves = _good()
    module = nn.Linear(24, 24, device=DEVICE)

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(leaves, tensors, strict=True))
        named["x"] = layer_norm(module(named["x"]), None, None, 1e-5)
        return bottleneck(**(good | named)).sin().sum()

    torch._dynamo.reset()
    every = list(leaves.values())
    eager = torch.autograd.grad(run(*every), every)
    options = {"fullgraph": True, "backend": "aot_eager"}
    compiled = torch.autograd.grad(torch.compile(run, **options)(*every), every)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    drawn = torch.compile(lambda x: bottleneck(**(good | {"x": x, "seed": None})), **options)
    with torch.no_grad():
        assert not torch.equal(drawn(good["x"]), drawn(good["x"]))
