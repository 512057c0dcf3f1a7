"""linear_cross_entropy: contract, numbers, what is saved, autograd's corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftfast.memory import peak_bytes, saved_bytes
from peftfast.native import library
from peftfast.ops import ImplUnavailable
from peftfast.ops.cross_entropy import linear_cross_entropy
from peftfast.ops.norm import layer_norm, rms_norm
from peftfast.reference import cross_entropy as reference
from tests.tolerance import assert_within

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
IN, VOCABULARY, RANK = 24, 37, 4


def _good(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    target = torch.randint(VOCABULARY, (2, 9), device=DEVICE)
    target[:, ::3] = -100
    return {
        "hidden": draw(2, 9, IN),
        "weight": draw(VOCABULARY, IN) * 0.3,
        "bias": draw(VOCABULARY),
        "target": target,
        "lora_a": draw(RANK, IN),
        "lora_b": draw(VOCABULARY, RANK) * 0.1,
        "scaling": 0.5,
        "chunk_rows": 5,
    }


LEAVES = ("hidden", "bias", "lora_a", "lora_b")


def _leaves(operands: dict[str, Any], names: tuple[str, ...] = LEAVES) -> list[Tensor]:
    return [operands[name].requires_grad_() for name in names]


def _eager(operands: dict[str, Any], dtype: torch.dtype | None = None, **settings: Any) -> Tensor:
    """The same maths by autograd, on copies in `dtype` where one is given."""
    given = dict(operands)
    given.pop("chunk_rows")
    for name in ("weight", *LEAVES):
        if dtype is not None and given[name] is not None:
            given[name] = given[name].to(dtype)
    hidden, target = given.pop("hidden"), given.pop("target")
    p = given.pop("dropout_p", 0.0)
    for name in ("lora_a", "lora_b", "scaling"):
        given[name] = [given[name]]
    loss = reference.linear_cross_entropy(
        hidden.reshape(-1, IN), target=target.reshape(-1), **given, dropout_p=[p], **settings
    )
    return loss.view(target.shape) if loss.ndim else loss


BAD = [
    ("hidden", [1.0], TypeError, "x is list"),
    ("hidden", torch.ones(2, 9, IN + 1), ValueError, r"weight is \[37, 24\].*hidden is \[2, 9, 25"),
    ("weight", torch.ones(VOCABULARY), ValueError, r"weight is \[37\]; 2 dimensions"),
    ("weight", torch.ones(0, IN), ValueError, "vocabulary is empty"),
    ("weight", torch.ones(VOCABULARY, IN).half(), TypeError, "weight is torch.float16"),
    ("bias", torch.ones(VOCABULARY - 1), ValueError, r"bias is \[36\]"),
    ("target", torch.ones(2, 9), TypeError, "target is torch.float32"),
    ("target", torch.ones(18, dtype=torch.int64), ValueError, r"target is \[18\].*\[2, 9\] on"),
    ("lora_a", torch.ones(RANK, IN + 1), ValueError, r"lora_a is \[4, 25\]"),
    ("lora_a", torch.ones(RANK, IN).bfloat16(), TypeError, "lora_a is torch.bfloat16"),
    ("lora_a", [torch.ones(RANK, IN)] * 2, ValueError, "lora_a has 2 adapters and lora_b has 1"),
    ("lora_b", torch.ones(RANK, VOCABULARY), ValueError, r"lora_b is \[4, 37\]"),
    ("scaling", float("nan"), ValueError, "scaling is nan"),
    ("dropout_p", 1.5, ValueError, "dropout_p is 1.5"),
    ("seed", torch.tensor([1, 2]), ValueError, r"seed is \[2\]"),
    ("reduction", "max", ValueError, "reduction is 'max'; allowed: 'mean', 'sum', 'none'"),
    ("softcap", 0.0, ValueError, "softcap is 0.0; a positive"),
    ("logit_scale", float("inf"), ValueError, "logit_scale is inf"),
    ("chunk_rows", 0, ValueError, "chunk_rows is 0"),
    ("impl", "cuda", ValueError, "impl is 'cuda'"),
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), BAD)
def test_a_bad_operand_is_named(name: str, value: Any, kind: type, message: str) -> None:
    operands = _good()
    operands[name] = value.to(DEVICE) if isinstance(value, Tensor) else value
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**operands)


def test_a_trained_head_is_refused() -> None:
    good = _good()
    good["weight"].requires_grad_()
    with pytest.raises(ValueError, match="weight requires a gradient"):
        linear_cross_entropy(**good)
    with torch.no_grad():
        linear_cross_entropy(**good)


def test_a_target_outside_of_the_vocabulary_raises() -> None:
    if CUDA:
        pytest.skip("a GPU asserts, for good")
    good = _good()
    good["target"][0, 1] = VOCABULARY
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(**good)


def test_an_explicit_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing", lambda kind: "the library was not built")
    with pytest.raises(ImplUnavailable):
        linear_cross_entropy(**_good(), impl="native")
    with pytest.raises(ImplUnavailable):
        linear_cross_entropy(**_good(), impl="triton")
    linear_cross_entropy(**_good())


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, None), (2.0, 0.7)])
def test_loss_and_gradients(
    impl: str,
    dtype: torch.dtype,
    reduction: str,
    softcap: float | None,
    logit_scale: float | None,
) -> None:
    good = _good(dtype) | {"dropout_p": 0.25, "seed": torch.tensor([7], device=DEVICE)}
    leaves = _leaves(good)
    settings = dict(reduction=reduction, softcap=softcap, logit_scale=logit_scale)
    weights = torch.rand(good["target"].shape if reduction == "none" else (), device=DEVICE) + 0.5
    ours = linear_cross_entropy(**good, **settings, impl=impl)
    eager, truth = _eager(good, **settings), _eager(good, torch.float64, **settings)
    assert ours.dtype == eager.dtype and ours.shape == eager.shape
    rows = [_eager(good, d, **(settings | {"reduction": "none"})) for d in (dtype, torch.float64)]
    own_error = (rows[0] - rows[1]).abs()
    allowed = 2 * own_error + torch.finfo(torch.float32).eps * rows[1].abs().max()
    if reduction != "none":  # the error of a sum may be small by luck
        kept = allowed[good["target"] >= 0]
        allowed = kept.sum() if reduction == "sum" else kept.mean()
        assert (ours - truth).abs() <= allowed
    else:
        assert_within(ours, eager, truth, "losses")
    results = [torch.autograd.grad((x * weights).sum(), leaves) for x in (ours, eager, truth)]
    for name, leaf, got, own, exact in zip(LEAVES, leaves, *results, strict=True):
        assert got.dtype == leaf.dtype
        assert_within(got, own, exact, name)


@pytest.mark.parametrize(
    "wanted", [("hidden",), ("lora_a",), ("lora_b",), ("bias",), ("hidden", "lora_b"), ()]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_subset_of_gradients(wanted: tuple[str, ...], reduction: str) -> None:
    good = _good()
    every = _leaves(good)
    full = torch.autograd.grad(_eager(good, reduction=reduction).sum(), every)
    some = {
        k: v.detach().requires_grad_(k in wanted) if k in LEAVES else v for k, v in good.items()
    }
    loss = linear_cross_entropy(**some, reduction=reduction).sum()
    assert loss.requires_grad == bool(wanted)
    if wanted:
        grads = torch.autograd.grad(loss, [some[n] for n in wanted])
        for name, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, full[LEAVES.index(name)])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_as_in_torch(reduction: str) -> None:
    good = _good()
    good["target"].fill_(-100)
    leaves = _leaves(good)
    ours = linear_cross_entropy(**good, reduction=reduction)
    eager = _eager(good, reduction=reduction)
    torch.testing.assert_close(ours, eager, equal_nan=True)
    grads = torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(eager.sum(), leaves)
    for got, own in zip(*grads, strict=True):
        torch.testing.assert_close(got, own, equal_nan=True)


def test_another_ignore_index_and_no_rows() -> None:
    good = _good()
    good["target"] = torch.where(good["target"] < 0, 3, good["target"])
    expected = _eager(good, ignore_index=3)
    torch.testing.assert_close(linear_cross_entropy(**good, ignore_index=3), expected)
    empty = good | {"hidden": good["hidden"][:, :0].requires_grad_()}
    empty["target"] = good["target"][:, :0]
    loss = linear_cross_entropy(**empty, reduction="sum")
    assert loss == 0
    loss.backward()
    assert empty["hidden"].grad.shape == (2, 0, IN)


def test_no_adapter_and_float32_adapters_over_16_bits() -> None:
    good = _good(torch.bfloat16)
    plain = {k: good[k] for k in ("hidden", "weight", "target", "chunk_rows")}
    logits = F.linear(good["hidden"].float(), good["weight"].float())
    expected = F.cross_entropy(logits.view(-1, VOCABULARY), good["target"].view(-1))
    loss = linear_cross_entropy(**plain, bias=None)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    mixed = good | {name: good[name].float() for name in ("lora_a", "lora_b")}
    leaves = _leaves(mixed)
    truth = torch.autograd.grad(_eager(mixed, torch.float64), leaves)
    eager = torch.autograd.grad(_eager(mixed, torch.bfloat16), leaves)
    for grad, own, exact in zip(
        torch.autograd.grad(linear_cross_entropy(**mixed), leaves), eager, truth, strict=True
    ):
        assert_within(grad, own, exact)


def test_a_small_scale_is_not_lost_in_float16() -> None:
    """The gradient is kept before its division by the number of rows, and scaled in float32."""
    good = _good(torch.float16)
    (hidden,) = _leaves(good, ("hidden",))
    (grad,) = torch.autograd.grad(linear_cross_entropy(**good) * 1e-6 * 1e6, hidden)
    (twice,) = torch.autograd.grad(linear_cross_entropy(**good) * 1e-7 * 65536, hidden)
    (expected,) = torch.autograd.grad(_eager(good, torch.float64), hidden)
    torch.testing.assert_close(grad, expected, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(twice, expected * 65536e-7, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_gradient_goes_through_a_frozen_norm(kind: str) -> None:
    good = _good()
    h = good["hidden"].requires_grad_()
    scale, shift = torch.rand(2, IN, device=DEVICE) + 0.5

    def norm(x: Tensor) -> Tensor:
        if kind == "rms":
            return rms_norm(x, scale, 1e-6)
        return layer_norm(x, scale, shift, 1e-5)

    expected = _eager(good | {"hidden": norm(h)})
    (wanted,) = torch.autograd.grad(expected, h)
    loss = linear_cross_entropy(**(good | {"hidden": norm(h)}), through_norm=True)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, h)
    torch.testing.assert_close(grad, wanted)

    def forward() -> Tensor:
        return linear_cross_entropy(**(good | {"hidden": norm(h * 1)}), through_norm=True)

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = forward()
    nodes, todo = [], [loss.grad_fn]
    while todo:
        node = todo.pop()
        nodes.append(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert nodes == ["_KnownBackward", "MulBackward0", "AccumulateGrad"]


def test_a_norm_that_trains_or_is_watched_keeps_its_own_backward() -> None:
    good = _good()
    h = good["hidden"].requires_grad_()
    scale = (torch.rand(IN, device=DEVICE) + 0.5).requires_grad_()
    options: dict[str, Any] = dict(through_norm=True)
    loss = linear_cross_entropy(**(good | {"hidden": rms_norm(h, scale, 1e-6)}), **options)
    expected = _eager(good | {"hidden": rms_norm(h, scale, 1e-6)})
    for ours, own in zip(
        torch.autograd.grad(loss, [h, scale]),
        torch.autograd.grad(expected, [h, scale]),
        strict=True,
    ):
        torch.testing.assert_close(ours, own)
    watched = rms_norm(h, scale.detach(), 1e-6)
    watched.retain_grad()
    linear_cross_entropy(**(good | {"hidden": watched}), **options).backward()
    assert watched.grad is not None
    unasked = rms_norm(h, scale.detach(), 1e-6)
    loss = linear_cross_entropy(**(good | {"hidden": unasked}))
    assert torch.autograd.grad(loss, unasked)[0].any()


def _head(tokens: int = 2048, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    return {
        "hidden": torch.randn(tokens, 1024, device=DEVICE).to(dtype).requires_grad_(),
        "weight": torch.randn(32000, 1024, device=DEVICE).to(dtype) * 0.05,
        "target": torch.randint(32000, (tokens,), device=DEVICE),
        "bias": None,
    }


@pytest.mark.slow
def test_no_logits_are_kept_and_few_are_held() -> None:
    tokens = 1024
    head = _head(tokens)
    kept = saved_bytes(lambda: linear_cross_entropy(**head), exclude=[head["weight"]])
    assert kept <= head["hidden"].nbytes + 64
    logits = tokens * 32000

    def plain() -> Tensor:
        logits = F.linear(head["hidden"], head["weight"])
        return F.cross_entropy(logits.float(), head["target"])

    ours = peak_bytes(lambda: linear_cross_entropy(**head).backward())
    eager = peak_bytes(lambda: plain().backward())
    assert eager >= 10 * logits  # in bfloat16, in float32, and the gradients of both
    assert ours < 0.25 * eager


def test_changing_hidden_in_place_later_is_no_matter() -> None:
    """It is not read again: its gradient is known."""
    good = _good()
    hidden = good["hidden"].requires_grad_() * 1
    loss = linear_cross_entropy(**(good | {"hidden": hidden}))
    (expected,) = torch.autograd.grad(_eager(good), good["hidden"])
    hidden.detach().mul_(2)
    (grad,) = torch.autograd.grad(loss, good["hidden"])
    torch.testing.assert_close(grad, expected)


def test_two_backwards_and_second_derivatives() -> None:
    good = _good()
    leaves = _leaves(good)
    loss = linear_cross_entropy(**good)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (grad,) = torch.autograd.grad(linear_cross_entropy(**good), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant: bool, reduction: str) -> None:
    good = _good()
    leaves = _leaves(good)

    def run(hidden: Tensor) -> Tensor:
        operands = good | {"hidden": hidden}
        return linear_cross_entropy(**operands, dropout_p=0.5, reduction=reduction)

    torch.manual_seed(1)
    plain = torch.autograd.grad(run(good["hidden"]).sum(), leaves)
    torch.manual_seed(1)
    checkpoint(run, good["hidden"], use_reentrant=reentrant).sum().backward()
    for leaf, grad in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def test_autocast_casts_hidden_and_head() -> None:
    good = _good()
    leaves = _leaves(good)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = linear_cross_entropy(**good)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, leaves)
    assert all(g.dtype == torch.float32 for g in grads)
    exact = torch.autograd.grad(_eager(good), leaves)
    for grad, truth in zip(grads, exact, strict=True):
        assert (grad - truth).norm() / truth.norm() < 0.02


def test_strided_operands() -> None:
    good = _good()
    wide = torch.randn(9, 2, 2 * IN, device=DEVICE)
    good["hidden"] = wide[..., ::2].transpose(0, 1).requires_grad_()
    good["weight"] = good["weight"].t().contiguous().t()
    good["target"] = good["target"].t().contiguous().t()
    (expected,) = torch.autograd.grad(_eager(good), good["hidden"])
    (grad,) = torch.autograd.grad(linear_cross_entropy(**good), good["hidden"])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("row_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool, row_weights: bool) -> None:
    good = _good()
    target = good["target"].reshape(-1)
    seed = torch.tensor([5, 6], device=DEVICE)
    adapters = [good["lora_a"]] * 2, [good["lora_b"]] * 2, [0.5, 2.0], [0.3, 0.0], seed
    needs = [True, bias, True, False, False, True]
    weights = torch.rand(18, device=DEVICE) if row_weights else None
    args = (good["hidden"], good["weight"], good["bias"] if bias else None, target, *adapters)
    args += (-100, 2.0, None, 5, needs, weights, "reference")
    opcheck(torch.ops.peftfast.linear_cross_entropy.default, args)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normed", [False, True])
def test_compiles_into_one_graph(reduction: str, normed: bool) -> None:
    good = _good() | {"dropout_p": 0.3, "seed": torch.tensor([5], device=DEVICE)}
    leaves = _leaves(good)
    scale = torch.rand(IN, device=DEVICE)

    def run(hidden: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = hidden.sin()
        hidden = rms_norm(hidden, scale, 1e-6) if normed else hidden
        operands = good | {"hidden": hidden, "bias": bias, "lora_a": a, "lora_b": b}
        return linear_cross_entropy(**operands, reduction=reduction).sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True)(*leaves), leaves)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
