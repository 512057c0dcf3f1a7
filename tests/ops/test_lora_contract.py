"""lora_linear's contract: bad operands, choice of implementation, what is saved, autograd's
corners.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from peftfast.native import library
from peftfast.ops import ImplUnavailable, lora_linear, lora_linear_group, lora_linear_reasons
from peftfast.ops.nf4_weight import flatten

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
IN, OUT, RANK = 24, 16, 4


def _good(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    return {
        "x": draw(2, 5, IN),
        "weight": draw(OUT, IN),
        "bias": draw(OUT),
        "lora_a": draw(RANK, IN),
        "lora_b": draw(OUT, RANK),
        "scaling": 0.5,
    }


BAD = [
    ("x", [1.0], TypeError, "x is list"),
    ("x", torch.tensor(1.0), ValueError, "x is a scalar"),
    ("x", torch.ones(3, IN, dtype=torch.int64), TypeError, "x is torch.int64"),
    ("x", torch.ones(3, IN + 1), ValueError, r"weight is \[16, 24\].*x is \[3, 25\]"),
    ("weight", torch.ones(OUT), ValueError, r"weight is \[16\]; 2 dimensions"),
    (
        "weight",
        torch.ones(OUT, IN).half(),
        TypeError,
        "weight is torch.float16, x is torch.float32",
    ),
    ("weight", torch.ones(OUT, IN, device="meta"), ValueError, "weight is on meta"),
    ("bias", torch.ones(OUT + 1), ValueError, r"bias is \[17\]"),
    ("bias", 0.0, TypeError, "bias is float"),
    ("lora_a", torch.ones(RANK, IN + 1), ValueError, r"lora_a is \[4, 25\]"),
    ("lora_a", torch.ones(0, IN), ValueError, "rank must be at least 1"),
    ("lora_a", torch.ones(RANK, IN).bfloat16(), TypeError, "lora_a is torch.bfloat16"),
    ("lora_a", [torch.ones(RANK, IN)] * 2, ValueError, "lora_a has 2 adapters and lora_b has 1"),
    ("lora_a", 3, TypeError, "lora_a is int"),
    ("lora_b", torch.ones(OUT, RANK + 1), ValueError, r"lora_b is \[16, 5\]"),
    ("lora_b", torch.ones(RANK, OUT), ValueError, r"lora_b is \[4, 16\]"),
    ("scaling", float("nan"), ValueError, "scaling is nan"),
    ("scaling", "1", TypeError, "scaling is str"),
    ("scaling", torch.tensor(0.5), TypeError, "scaling is Tensor"),
    ("scaling", [1.0, 2.0], ValueError, "scaling has 2 entries for 1 adapters"),
    ("dropout_p", 1.5, ValueError, "dropout_p is 1.5"),
    ("dropout_p", -0.1, ValueError, "dropout_p is -0.1"),
    ("seed", torch.tensor([1.0]), TypeError, "seed is torch.float32"),
    ("seed", torch.tensor([1, 2]), ValueError, r"seed is \[2\]"),
    (
        "impl",
        "cuda",
        ValueError,
        "impl is 'cuda'; allowed: 'auto', 'triton', 'native', 'reference'",
    ),
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), BAD)
def test_a_bad_operand_is_named(name: str, value: Any, kind: type, message: str) -> None:
    operands = _good()
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = value.to(DEVICE)
    operands[name] = value
    with pytest.raises(kind, match=message):
        lora_linear(**operands)


def test_a_bad_operand_of_a_group_is_named_with_its_place() -> None:
    good = _good()
    lists = {k: [good[k]] * 2 for k in ("lora_a", "lora_b", "scaling")}
    lists["lora_b"] = [good["lora_b"], good["lora_b"][:3]]
    weights, biases = [good["weight"]] * 2, [None, None]
    with pytest.raises(ValueError, match=r"lora_b\[1\] is \[3, 4\]"):
        lora_linear_group(good["x"], weights, biases, **lists)
    with pytest.raises(ValueError, match="biases has 1 entries for 2 weights"):
        lora_linear_group(good["x"], weights, [None], **lists)
    with pytest.raises(ValueError, match="scaling is one value"):
        lora_linear_group(good["x"], weights, biases, **(lists | {"scaling": 1.0}))
    with pytest.raises(ValueError, match="weights is empty"):
        lora_linear_group(good["x"], [], [], [], [], [])


def test_reasons_are_what_the_op_would_raise() -> None:
    good = _good()
    x, w, a, b = good["x"], good["weight"], good["lora_a"], good["lora_b"]
    assert lora_linear_reasons(x, [w], [None], [a], [b]) == []
    (reason,) = lora_linear_reasons(x, [w], [None], [a.bfloat16()], [b])
    assert reason.startswith("lora_a is torch.bfloat16")


def test_an_explicit_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    good = _good(torch.float64)
    why = "csrc has dropout and 4-bit weights" if CUDA else "the library was not built"
    monkeypatch.setattr(library, "missing", lambda kind: "the library was not built")
    with pytest.raises(ImplUnavailable, match=why) as native:
        lora_linear(**good, impl="native")
    assert len(native.value.reasons) == 1
    with pytest.raises(ImplUnavailable, match="dtype torch.float64"):
        lora_linear(**good, impl="triton")


@pytest.mark.skipif(CUDA, reason="the interpreter is not in use")
def test_the_interpreter_refuses_bfloat16() -> None:
    with pytest.raises(ImplUnavailable, match="interpreter computes bfloat16 wrong"):
        lora_linear(**_good(torch.bfloat16), impl="triton")


@pytest.mark.skipif(CUDA, reason="Triton serves CUDA tensors")
def test_triton_refuses_cpu_tensors_without_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ImplUnavailable, match="needs a CUDA device or TRITON_INTERPRET=1"):
        lora_linear(**_good(), impl="triton")
    lora_linear(**_good())  # auto chooses what can serve


def test_the_environment_takes_the_place_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFAST_IMPL", "triton")
    with pytest.raises(ImplUnavailable):
        lora_linear(**_good(torch.float64))
    lora_linear(**_good(torch.float64), impl="reference")
    monkeypatch.setenv("PEFTFAST_IMPL", "fast")
    with pytest.raises(ValueError, match="PEFTFAST_IMPL is 'fast'"):
        lora_linear(**_good())


def _leaves(operands: dict[str, Any]) -> list[Tensor]:
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    return [operands[name].requires_grad_() for name in names]


def test_no_adapter_is_the_plain_linear() -> None:
    good = _good()
    none: dict[str, Any] = {"lora_a": [], "lora_b": [], "scaling": []}
    y = lora_linear(**(good | none))
    expected = torch.nn.functional.linear(good["x"], good["weight"], good["bias"])
    assert torch.equal(y, expected)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "wanted", [("x",), ("lora_a",), ("lora_b",), ("bias",), ("weight",), ("x", "lora_b"), ()]
)
def test_each_subset_of_gradients(impl: str, wanted: tuple[str, ...]) -> None:
    good = _good()
    _leaves(good)
    full = lora_linear(**good, dropout_p=0.2, seed=torch.tensor([5], device=DEVICE), impl=impl)
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    every = dict(zip(names, torch.autograd.grad(full.sum(), [good[n] for n in names]), strict=True))
    some = {
        k: v.detach().requires_grad_(k in wanted) if isinstance(v, Tensor) else v
        for k, v in good.items()
    }
    y = lora_linear(**some, dropout_p=0.2, seed=torch.tensor([5], device=DEVICE), impl=impl)
    assert y.requires_grad == bool(wanted)
    if wanted:
        for name, grad in zip(
            wanted, torch.autograd.grad(y.sum(), [some[n] for n in wanted]), strict=True
        ):
            torch.testing.assert_close(grad, every[name])


def _saved(run: Any) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_saved_are_x_the_parameters_the_bottleneck_and_the_seed(impl: str) -> None:
    good = _good()
    good["x"].requires_grad_()
    for name in ("lora_a", "lora_b"):
        good[name].requires_grad_()
    kept = _saved(lambda: lora_linear(**good, dropout_p=0.1, impl=impl))
    own = {good[n].untyped_storage().data_ptr() for n in ("x", "weight", "lora_a", "lora_b")}
    extra = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert sorted(tuple(t.shape) for t in extra) == [(1,), (10, RANK)]
    assert own <= {t.untyped_storage().data_ptr() for t in kept}


def test_x_is_not_kept_where_no_gradient_reads_it() -> None:
    good = _good()
    good["x"].requires_grad_()
    kept = _saved(lambda: lora_linear(**good))
    assert all(
        t.untyped_storage().nbytes() < good["x"].nbytes for t in kept if t.shape == good["x"].shape
    )


def test_siblings_keep_one_x() -> None:
    good = _good()
    good["lora_a"].requires_grad_()
    lists = [[good[n]] * 3 for n in ("weight", "bias", "lora_a", "lora_b", "scaling")]
    kept = _saved(lambda: lora_linear_group(good["x"], *lists))
    assert sum(t.shape == good["x"].shape for t in kept) == 1


def test_changing_x_in_place_before_the_backward_raises() -> None:
    good = _good()
    _leaves(good)
    x = good["x"] * 1
    y = lora_linear(**(good | {"x": x}))
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_backward_writes_into_nothing_that_was_saved() -> None:
    good = _good()
    leaves = _leaves(good)
    before = [leaf.detach().clone() for leaf in leaves]
    y = lora_linear(**good, dropout_p=0.1)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


def test_second_derivatives_raise() -> None:
    good = _good()
    leaves = _leaves(good)
    (grad,) = torch.autograd.grad(lora_linear(**good).pow(2).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear has no second derivative"):
        (grad.sum() + leaves[0].sum()).backward()


def test_drawn_seeds_follow_torchs_generator() -> None:
    good = _good()
    torch.manual_seed(5)
    first, other = (lora_linear(**good, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, lora_linear(**good, dropout_p=0.5))
    assert not torch.equal(first, other)


def test_no_dropout_draws_nothing() -> None:
    good = _good()
    state = torch.get_rng_state()
    lora_linear(**good)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant: bool) -> None:
    good = _good()
    leaves = _leaves(good)

    def run(x: Tensor) -> Tensor:
        return lora_linear(**(good | {"x": x}), dropout_p=0.5).sin()

    torch.manual_seed(1)
    plain = torch.autograd.grad(run(good["x"]).sum(), leaves)
    torch.manual_seed(1)
    checkpoint(run, good["x"], use_reentrant=reentrant).sum().backward()
    for leaf, grad in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_autocast_casts_the_base_and_not_the_adapters() -> None:
    good = _good()
    leaves = _leaves(good)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = lora_linear(**good)
        kept = _saved(lambda: lora_linear(**good))
    assert y.dtype == torch.bfloat16
    # The bottleneck stays float32 and the cast copy of W is not kept.
    assert {t.dtype for t in kept if t.shape == (10, RANK)} == {torch.float32}
    assert not any(t.shape == (OUT, IN) and t.dtype == torch.bfloat16 for t in kept)
    y.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)
    truth = copy.deepcopy({k: v for k, v in good.items() if isinstance(v, Tensor)})
    low_rank = truth["x"] @ truth["lora_a"].t() @ truth["lora_b"].t() * 0.5
    expected = torch.nn.functional.linear(truth["x"], truth["weight"], truth["bias"]) + low_rank
    assert (y - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(bias: bool, dropout_p: float) -> None:
    good = _good()
    leaves = _leaves(good)
    x, w, b, a, up = leaves
    seed = torch.tensor([5, 6], device=DEVICE) if dropout_p else None
    biases, has = ([b], [1, 0]) if bias else ([], [0, 0])
    settings = ([0, 1], [0.5, 2.0], [dropout_p, 0.0], seed, has, [], "", False, "reference")
    _, spec = flatten([w, w.detach()])
    args = (x, [w, w.detach()], spec, biases, [a, a.detach()], [up, up.detach()], *settings)
    opcheck(torch.ops.peftfast.lora_linear.default, args)
    t = torch.randn(10, 2 * RANK, device=DEVICE)
    needs = [True, True, False, bias, False, True, False, True, False]
    dys: list[Tensor | None] = [torch.randn(2, 5, OUT, device=DEVICE), None]
    plain = [v.detach() for v in (x, w, a, up)]
    backward = (dys, t, plain[0], [plain[1]] * 2, spec, [plain[2]] * 2, [plain[3]] * 2)
    opcheck(
        torch.ops.peftfast.lora_linear_backward.default,
        (*backward, *settings[:4], needs, [], "", "reference"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_into_one_graph(dropout_p: float) -> None:
    good = _good()
    leaves = _leaves(good)
    seed = torch.tensor([5, 6], device=DEVICE) if dropout_p else None

    def run(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        pair = lora_linear_group(
            x.sin(),
            [w, w],
            [bias, None],
            [a, a],
            [b, b],
            [0.5, 2.0],
            dropout_p=dropout_p,
            seed=seed,
        )
        return (pair[0] * pair[1]).sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True)(*leaves), leaves)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_call_draws_a_new_mask_each_time() -> None:
    good = _good()
    torch._dynamo.reset()
    run = torch.compile(lambda x: lora_linear(**(good | {"x": x}), dropout_p=0.5), fullgraph=True)
    assert not torch.equal(run(good["x"]), run(good["x"]))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", ["bias", "lora_a", "lora_b", "weight", "seed"])
@pytest.mark.parametrize("layout", ["strided", "expanded", "negated"])
def test_operands_of_any_layout(impl: str, name: str, layout: str) -> None:
    good = _good() | {"dropout_p": 0.3, "seed": torch.tensor([3, 4], device=DEVICE)}
    for key in ("lora_a", "lora_b"):
        good[key] = [good[key], good[key].clone()]
    value = good[name][1] if name in ("lora_a", "lora_b") else good[name]
    if layout == "strided":
        odd = torch.stack([value, value + 9], dim=-1)[..., 0]
    elif layout == "expanded":
        odd = value[:1].expand(value.shape)
    else:
        odd = torch._neg_view(value)
    plain = odd.clone().contiguous()
    results = []
    for one, how in ((odd, impl), (plain, "reference")):
        operands = good | {name: [good[name][0], one] if isinstance(good[name], list) else one}
        results.append(lora_linear(**operands, impl=how))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_negated_inputs_and_gradients(impl: str) -> None:
    good = _good()
    results = []
    for x, how in ((torch._neg_view(good["x"]), impl), (-good["x"], "reference")):
        leaf = x.detach().requires_grad_()
        y = lora_linear(**(good | {"x": leaf}), impl=how)
        dy = torch.ones_like(y)
        dy = torch._neg_view(dy) if how == impl else -dy
        results.append([y, *torch.autograd.grad(y, leaf, dy)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_output_may_be_changed_in_place(impl: str) -> None:
    good = _good()
    leaves = _leaves(good)
    out_of_place = torch.autograd.grad(lora_linear(**good, impl=impl).relu().sum(), leaves)
    in_place = torch.autograd.grad(lora_linear(**good, impl=impl).relu_().sum(), leaves)
    for ours, theirs in zip(in_place, out_of_place, strict=True):
        assert torch.equal(ours, theirs)


def test_no_gradient_reaches_an_unused_sibling() -> None:
    good = _good()
    bs = [good["lora_b"].clone().requires_grad_() for _ in range(2)]
    lists = [[good[n]] * 2 for n in ("weight", "bias", "lora_a")]
    y, _ = lora_linear_group(good["x"], *lists, bs, [1.0, 1.0])
    y.sum().backward()
    assert bs[0].grad is not None and bs[1].grad is None


def test_a_frozen_sibling_asks_for_no_gradient() -> None:
    good = _good()
    bs = [good["lora_b"].clone().requires_grad_(), good["lora_b"]]
    lists = [[good[n]] * 2 for n in ("weight", "bias", "lora_a")]
    trained, frozen = lora_linear_group(good["x"], *lists, bs, [1.0, 1.0])
    assert trained.requires_grad and not frozen.requires_grad


def test_batched_gradients() -> None:
    good = _good()
    leaves = _leaves(good)
    y = lora_linear(**good, dropout_p=0.2)
    dys = torch.randn(3, *y.shape, device=DEVICE)
    batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        single = torch.autograd.grad(y, leaves, dys[k], retain_graph=True)
        for ours, theirs in zip(batched, single, strict=True):
            torch.testing.assert_close(ours[k], theirs, rtol=1e-4, atol=1e-5)


def test_layouts_that_are_not_dense_are_named() -> None:
    good = _good()
    with pytest.raises(TypeError, match="x is of layout torch.sparse_coo"):
        lora_linear(**(good | {"x": torch.eye(IN, device=DEVICE).to_sparse()}))
    parts = [torch.randn(2, IN, device=DEVICE), torch.randn(3, IN, device=DEVICE)]
    with pytest.raises(TypeError, match="x is nested"):
        lora_linear(**(good | {"x": torch.nested.nested_tensor(parts)}))


def test_no_features_at_all() -> None:
    empty = {"x": torch.randn(3, 0), "weight": torch.randn(4, 0), "lora_a": torch.randn(2, 0)}
    operands = {**empty, "bias": None, "lora_b": torch.randn(4, 2), "scaling": 1.0}
    assert torch.equal(lora_linear(**operands), torch.zeros(3, 4))
    with pytest.raises(ImplUnavailable):
        lora_linear(**operands, impl="triton")


def test_meta_tensors() -> None:
    good = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in _good().items()}
    assert lora_linear(**good).shape == (2, 5, OUT)
