"""Deferred logits as tensors: whatever is done with them is as with real ones."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast.patching.deferred_logits import DeferredLogits, Head, Record, defer

ROWS, IN, VOCABULARY = (3, 5), 6, 8


class Case:
    """The same head twice: `deferred()` over one input, `real()` over an equal one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.x = torch.randn(*ROWS, IN).to(dtype).requires_grad_()
        self.weight = torch.randn(VOCABULARY, IN).to(dtype)
        self.target = torch.randint(VOCABULARY, ROWS)
        self.target[0, :2] = -100
        self.record = Record("auto")

    def deferred(self) -> DeferredLogits:
        return defer(self.x * 1, Head(self.weight, None), self.record)

    def real(self) -> Tensor:
        return F.linear(self.x * 1, self.weight)

    def both(self, use: Callable[[Any], Tensor]) -> None:
        """Hold value and gradient of a use of the deferred to those of the real."""
        found = []
        for logits in (self.deferred(), self.real()):
            result = use(logits)
            assert type(result) is Tensor or isinstance(result, DeferredLogits)
            grad = None
            if result.requires_grad:
                (grad,) = torch.autograd.grad(result.float().pow(2).sum(), self.x)
            found.append((result.detach() + 0, grad))
        (ours, our_grad), (theirs, their_grad) = found
        torch.testing.assert_close(ours, theirs)
        assert (our_grad is None) == (their_grad is None)
        if their_grad is not None:
            torch.testing.assert_close(our_grad, their_grad)


def masked(logits: Tensor) -> Tensor:
    logits[..., 2] = -1.0
    return logits


def through_a_view(logits: Tensor) -> Tensor:
    logits.view(-1, VOCABULARY).mul_(3)
    return logits.float()


def cast_before(logits: Tensor) -> Tensor:
    before = logits * 2
    logits.add_(1)
    return before + logits


def added_to_a_list(logits: Tensor) -> Tensor:
    return torch.cat([logits, logits.float()], -1)


class Square(torch.autograd.Function):
    """Written against memory: what compiled losses do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.pow(2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * dy


def hooked(logits: Tensor) -> Tensor:
    logits.register_hook(lambda grad: grad * 2)
    return logits.exp()


USES: dict[str, Callable[[Any], Tensor]] = {
    "softmax": lambda z: z.float().softmax(-1),
    "argmax": lambda z: z.argmax(-1),
    "slice": lambda z: z[:, :-1].contiguous().view(-1, VOCABULARY),
    "of the vocabulary": lambda z: z[..., 1:4].exp(),
    "gather": lambda z: z.log_softmax(-1).gather(-1, torch.zeros(*ROWS, 1, dtype=torch.int64)),
    "capped": lambda z: torch.tanh(z / 3.0) * 3.0,
    "transposed": lambda z: z.transpose(1, 2).exp(),
    "in place": lambda z: z.div_(2).exp(),
    "set": masked,
    "through a view": through_a_view,
    "a copy first": cast_before,
    "cat": added_to_a_list,
    "detached": lambda z: z.detach().float(),
    "function": Square.apply,
    "hook": hooked,
    "widened": lambda z: z.to(torch.float64).view(-1),
    "data": lambda z: z.data.clone(),
    "cpu": lambda z: z.cpu().to("cpu", torch.float64),
    "einsum": lambda z: torch.einsum("bsv,bsv->bs", z, z),
    "where": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "matmul": lambda z: z @ torch.ones(VOCABULARY, 2),
    "stack": lambda z: torch.stack([row for row in z]),
    "select": lambda z: z[0].float() * 2,
}


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    Case().both(USES[name])


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "flat": lambda z, t: F.cross_entropy(z.float().view(-1, VOCABULARY), t.view(-1)),
    "reshaped": lambda z, t: F.cross_entropy(z.reshape(-1, VOCABULARY), t.reshape(-1)),
    "flattened": lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()),
    "shifted": lambda z, t: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, VOCABULARY), t[..., 1:].reshape(-1)
    ),
    "last": lambda z, t: F.cross_entropy(z[:, -1], t[:, -1]),
    "row": lambda z, t: F.cross_entropy(z[1], t[1], reduction="sum"),
    "module": lambda z, t: torch.nn.CrossEntropyLoss()(z.view(-1, VOCABULARY), t.view(-1)),
    "none": lambda z, t: F.cross_entropy(z.view(-1, VOCABULARY), t.view(-1), reduction="none").view(
        ROWS
    ),
    "ignored": lambda z, t: F.cross_entropy(
        z.view(-1, VOCABULARY), t.view(-1).clamp(min=0), ignore_index=0
    ),
    "capped": lambda z, t: F.cross_entropy(
        (torch.tanh(z.float() / 2.0) * 2.0).view(-1, VOCABULARY), t.view(-1)
    ),
    "tanh alone": lambda z, t: F.cross_entropy(z.tanh().view(-1, VOCABULARY), t.view(-1)),
    "scaled": lambda z, t: F.cross_entropy((3 * z / 2).view(-1, VOCABULARY), t.view(-1)),
    "scaled and capped": lambda z, t: F.cross_entropy(
        (torch.tanh(z * 0.3) * 5.0 / 2).view(-1, VOCABULARY), t.view(-1)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_logits(name: str) -> None:
    case = Case()
    case.both(lambda logits: LOSSES[name](logits, case.target))
    assert case.record.fused == 1 and case.record.made == 0


REFUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "smoothed": lambda z, t: F.cross_entropy(
        z.view(-1, VOCABULARY), t.view(-1), label_smoothing=0.1
    ),
    "weighted": lambda z, t: F.cross_entropy(
        z.view(-1, VOCABULARY), t.view(-1), weight=torch.arange(1.0, VOCABULARY + 1)
    ),
    "probabilities": lambda z, t: F.cross_entropy(
        z.view(-1, VOCABULARY), torch.ones(15, VOCABULARY) / VOCABULARY
    ),
    "transposed": lambda z, t: F.cross_entropy(z.transpose(1, 2), t),
    "of some classes": lambda z, t: F.cross_entropy(
        z[..., :5].reshape(-1, 5), t.clamp(max=4).view(-1)
    ),
    "two tanhs": lambda z, t: F.cross_entropy(z.tanh().tanh().view(-1, VOCABULARY), t.view(-1)),
    "upside down": lambda z, t: F.cross_entropy((z.tanh() * -2).view(-1, VOCABULARY), t.view(-1)),
    "by nll": lambda z, t: F.nll_loss(z.log_softmax(-1).view(-1, VOCABULARY), t.view(-1)),
    "changed": lambda z, t: F.cross_entropy(z.mul_(2).view(-1, VOCABULARY), t.view(-1)),
    "biased": lambda z, t: F.cross_entropy((z + 1).view(-1, VOCABULARY), t.view(-1)),
    "scaled by a tensor": lambda z, t: F.cross_entropy(
        (z * torch.tensor(2.0)).view(-1, VOCABULARY), t.view(-1)
    ),
    "hooked": lambda z, t: F.cross_entropy(hooked(z).log().view(-1, VOCABULARY), t.view(-1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_losses_of_real_logits(name: str) -> None:
    case = Case()
    case.both(lambda logits: REFUSED[name](logits, case.target))
    assert case.record.fused == 0 and case.record.made == 1


class Reversed(torch.autograd.Function):
    """Gradient reversal: the values say nothing of the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


def test_a_node_between_the_head_and_the_loss_is_not_passed_over() -> None:
    case = Case()
    case.both(lambda logits: LOSSES["flat"](Reversed.apply(logits), case.target))
    assert case.record.fused == 0


def test_a_detached_loss_has_no_gradient() -> None:
    case = Case()
    case.both(lambda logits: LOSSES["flat"](logits.detach(), case.target))
    assert case.record.fused == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("widened", [True, False])
def test_the_losss_dtype(dtype: torch.dtype, widened: bool) -> None:
    case = Case(dtype)
    losses = []
    for logits in (case.deferred(), case.real()):
        logits = logits.float() if widened else logits
        losses.append(F.cross_entropy(logits.view(-1, VOCABULARY), case.target.view(-1)))
    assert losses[0].dtype == losses[1].dtype
    torch.testing.assert_close(*losses, rtol=2e-2, atol=1e-2)


def test_bad_targets_raise_as_in_torch() -> None:
    case = Case()
    for logits in (case.deferred(), case.real()):
        with pytest.raises(ValueError, match="batch_size"):
            F.cross_entropy(logits.view(-1, VOCABULARY), case.target.view(-1)[:3])


def test_metadata_makes_nothing() -> None:
    case = Case(torch.bfloat16)
    ours, theirs = case.deferred(), case.real()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert ours.device == theirs.device and ours.stride() == theirs.stride()
    assert ours.requires_grad and not ours.is_leaf and ours.grad_fn is not None
    assert ours.is_contiguous() and ours.size(-1) == VOCABULARY and len(ours) == 3
    assert isinstance(ours.float()[:, 1:], DeferredLogits)
    assert case.record.made == 0


def test_what_reads_memory() -> None:
    case = Case()
    with torch.no_grad():
        ours, theirs = case.deferred(), case.real()
    assert np.array_equal(ours.numpy(), theirs.numpy())
    assert np.array_equal(np.asarray(ours), theirs.numpy())
    assert ours.tolist() == theirs.tolist()
    assert torch.equal(torch.from_dlpack(ours), theirs)
    assert ours.data_ptr() != 0
    assert repr(ours) == repr(theirs) and f"{ours[0, 0, 0]:.3f}" == f"{theirs[0, 0, 0]:.3f}"
    assert ours[0, 0, 0].item() == theirs[0, 0, 0].item()


def test_copies_and_pickles_are_real() -> None:
    case = Case()
    with torch.no_grad():
        ours, theirs = case.deferred(), case.real()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    found = (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer))
    for other in found:
        assert type(other) is Tensor and torch.equal(other, theirs)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(case.deferred())


def test_a_gradient_of_the_logits_is_given_or_refused() -> None:
    case = Case()
    logits = case.deferred()
    logits.retain_grad()
    LOSSES["flat"](logits, case.target).backward()
    real = case.real()
    real.retain_grad()
    LOSSES["flat"](real, case.target).backward()
    assert logits.grad is not None and real.grad is not None
    torch.testing.assert_close(logits.grad + 0, real.grad)
    late = case.deferred()
    LOSSES["flat"](late, case.target)
    with pytest.raises(RuntimeError, match="no gradient passes through them"):
        late.retain_grad()


def test_the_values_are_made_once() -> None:
    case = Case()
    logits = case.deferred()
    first, second = logits.exp(), logits.float().softmax(-1)
    (first.sum() + second[..., 0].sum()).backward()
    assert case.record.made == 1


def test_second_derivatives_through_the_logits() -> None:
    case = Case()
    found = []
    for logits in (case.deferred(), case.real()):
        (grad,) = torch.autograd.grad(logits.exp().sum(), case.x, create_graph=True)
        found.append(torch.autograd.grad(grad.pow(2).sum(), case.x)[0])
    torch.testing.assert_close(*found)


def test_a_compiled_function_takes_real_logits() -> None:
    case = Case()
    torch._dynamo.reset()
    run = torch.compile(lambda logits: logits.float().logsumexp(-1).sum(), backend="aot_eager")
    case.both(run)
