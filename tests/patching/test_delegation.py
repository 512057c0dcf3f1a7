"""Where PEFT does something else than the op, PEFT's forward runs, counted with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from peftfast.ops import ImplUnavailable
from peftfast.patching import patch, report
from tests.patching.tiny import VOCAB, adapted, copy_of, fused_layers, inputs_of, lora_linears


def pair(**settings: Any) -> tuple[Any, Any]:
    """A fused module with biases, and PEFT's own."""
    model = adapted("qwen2", **settings)
    module = next(iter(lora_linears(model).values()))
    peft = copy_of(module)
    return patch(module, strict=True), peft


def reasons(module: nn.Module) -> dict[str, int]:
    return fused_layers(module)[0].delegations


def breaks_parametrization(m: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(m.base_layer, "weight", Doubled())


def breaks_dropout(m: Any) -> None:
    m.lora_dropout["default"] = nn.AlphaDropout(0.0)


def breaks_lora_a(m: Any) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    m.lora_A["default"].__class__ = Doubling


def breaks_base(m: Any) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    m.base_layer.__class__ = Doubling


def doubled(_: nn.Module, __: Any, y: Tensor) -> Tensor:
    return y * 2


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "base-hook": (lambda m: m.base_layer.register_forward_hook(doubled), "base layer has hooks"),
    "base-pre-hook": (
        lambda m: m.base_layer.register_forward_pre_hook(lambda _, a: (a[0] * 2,)),
        "base layer has hooks",
    ),
    "a-hook": (lambda m: m.lora_A["default"].register_forward_hook(doubled), "lora_A .* has hooks"),
    "b-hook": (lambda m: m.lora_B["default"].register_forward_hook(doubled), "lora_B .* has hooks"),
    "dropout-hook": (
        lambda m: m.lora_dropout["default"].register_forward_hook(doubled),
        "lora_dropout .* has hooks",
    ),
    "base-forward": (
        lambda m: setattr(m.base_layer, "forward", lambda x: torch.zeros(*x.shape[:-1], 32)),
        "base layer has a forward of its own",
    ),
    "b-forward": (
        lambda m: setattr(m.lora_B["default"], "forward", lambda x: torch.ones(*x.shape[:-1], 32)),
        "lora_B .* has a forward of its own",
    ),
    "parametrization": (breaks_parametrization, "base layer is a ParametrizedLinear"),
    "spectral-norm": (lambda m: nn.utils.spectral_norm(m.base_layer), "base layer has hooks"),
    "dropout-type": (breaks_dropout, "lora_dropout of adapter 'default' is a AlphaDropout"),
    "lora-a-type": (breaks_lora_a, "lora_A of adapter 'default' is a Doubling"),
    "lora-a-bias": (
        lambda m: m.lora_A.update({"default": nn.Linear(32, 4)}),
        "lora_A of adapter 'default' has a bias",
    ),
    "base-type": (breaks_base, "base layer is a Doubling"),
    "tensor-scaling": (
        lambda m: m.scaling.update({"default": torch.tensor(2.0)}),
        "scaling of adapter 'default' is a Tensor",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_children_are_called(change: str) -> None:
    """Done after patching: the module falls back. Done before: it is not fused."""
    apply, reason = CHANGES[change]
    fused, peft = pair()
    for module in (fused, peft):
        torch.manual_seed(2)
        apply(module)
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(fused(x), peft(x), rtol=0, atol=0)
    ((found, count),) = reasons(fused).items()
    assert count == 1
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(peft)
    (left,) = report(peft).not_fused
    assert left.reasons == (found,)
    with pytest.raises(RuntimeError, match=reason):
        patch(peft, strict=True)


def test_backward_hooks_on_children_fire() -> None:
    fused, _ = pair()
    fired = []
    fused.base_layer.register_full_backward_hook(lambda *_: fired.append("base"))
    fused(torch.randn(2, 32, requires_grad=True)).sum().backward()
    assert fired == ["base"]


def test_hooks_removed_again() -> None:
    fused, _ = pair()
    handle = fused.base_layer.register_forward_hook(doubled)
    fused(torch.randn(2, 32))
    handle.remove()
    fused(torch.randn(2, 32))
    assert fused_layers(fused)[0].hits == 1


def test_extra_arguments() -> None:
    """Mixed batches: each row its own adapter."""
    model = adapted()
    peft = copy_of(model)
    patch(model, strict=True)
    inputs = {name: value for name, value in inputs_of().items() if name != "labels"}
    names = ["default", "__base__"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        assert torch.equal(mixed, peft(**inputs, adapter_names=names).logits)
        assert not torch.allclose(mixed[1], model(**inputs).logits[1], atol=1e-3)
    assert reasons(model) == {"called with arguments besides the input": 1}
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        next(iter(lora_linears(model).values()))(torch.randn(2, 32), adapter_names=["default"])


def test_input_casting_switched_off() -> None:
    fused, peft = pair()
    x = torch.randn(2, 32)
    with disable_input_dtype_casting(fused), disable_input_dtype_casting(peft):
        assert torch.equal(fused(x), peft(x))
    assert reasons(fused) == {"casting of the input is switched off": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_input_of_another_dtype_fails_as_in_peft(dtype: torch.dtype) -> None:
    fused, peft = pair()
    x = torch.randn(2, 32, dtype=dtype)
    with pytest.raises(RuntimeError) as expected:
        peft(x)
    with pytest.raises(RuntimeError) as got:
        fused(x)
    assert str(got.value) == str(expected.value)
    assert len(reasons(fused)) == 1


def test_half_precision_adapters_over_a_float32_base() -> None:
    """The op takes adapters in x's dtype or float32; PEFT computes this in bfloat16."""
    fused, peft = pair()
    for module in (fused, peft):
        module.lora_A.bfloat16()
        module.lora_B.bfloat16()
    x = torch.randn(2, 32)
    y = fused(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, peft(x))
    assert reasons(fused) == {"lora_A is torch.bfloat16, the input torch.float32": 1}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(weights: torch.dtype, dtype: torch.dtype) -> None:
    fused, peft = pair()
    for module in (fused, peft):
        module.base_layer.to(weights)
    x = torch.randn(5, 32, requires_grad=True)
    y = torch.randn(5, 32, requires_grad=True)
    with torch.no_grad():
        y.copy_(x)
    with torch.autocast("cpu", dtype=dtype):
        got, expected = fused(x), peft(y)
        assert got.dtype == expected.dtype == dtype
        got.float().pow(2).sum().backward()
        expected.float().pow(2).sum().backward()
    limit = 16 * torch.finfo(dtype).eps
    for a, b in ((got, expected), (x.grad, y.grad)):
        assert (a - b).abs().max() <= limit * b.abs().max()
    for a, b in zip(fused.parameters(), peft.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert a.grad.dtype == b.grad.dtype
            assert (a.grad - b.grad).abs().max() <= limit * b.grad.abs().max()
    assert not reasons(fused)


def test_tensor_subclass() -> None:
    class Tagged(Tensor):
        pass

    fused, peft = pair()
    x = torch.randn(2, 32).as_subclass(Tagged)
    y = fused(x)
    assert type(y) is Tagged
    assert torch.equal(y, peft(x))
    assert reasons(fused) == {"the input is a Tagged": 1}


def test_weight_of_a_tensor_subclass() -> None:
    class Tagged(nn.Parameter):
        pass

    fused, peft = pair()
    for module in (fused, peft):
        module.base_layer.weight = Tagged(module.base_layer.weight.data)
    x = torch.randn(2, 32)
    assert torch.equal(fused(x), peft(x))
    assert reasons(fused) == {"the base layer's weight is a Tagged": 1}


def test_meta_model() -> None:
    fused, _ = pair()
    fused.to("meta")
    assert fused(torch.randn(2, 32, device="meta")).shape == (2, 32)
    assert reasons(fused) == {"the input is torch.float32 on meta": 1}


def test_weight_on_another_device_fails_as_in_peft() -> None:
    fused, _ = pair()
    fused.base_layer.to("meta")
    with pytest.raises(RuntimeError):
        fused(torch.randn(2, 32))
    assert reasons(fused) == {"the base layer's weight is on meta, the input on cpu": 1}


def test_functorch() -> None:
    """Per-sample gradients: torch.func can't look into an autograd.Function."""
    fused, peft = pair()
    x = torch.randn(4, 32)

    def sample_gradients(module: nn.Module) -> dict[str, Tensor]:
        parameters = {k: v.detach() for k, v in module.named_parameters() if "lora_" in k}

        def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(module, values, (row,)).pow(2).sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    got, expected = sample_gradients(fused), sample_gradients(peft)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    assert set(reasons(fused)) == {"inside a torch.func transform"}


def test_forward_mode_differentiation() -> None:
    import torch.autograd.forward_ad as forward_ad

    fused, peft = pair()
    x, tangent = torch.randn(2, 32), torch.randn(2, 32)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(fused(forward_ad.make_dual(x, tangent))).tangent
        expected = forward_ad.unpack_dual(peft(forward_ad.make_dual(x, tangent))).tangent
    assert torch.equal(got, expected)
    assert reasons(fused) == {"inside forward-mode differentiation": 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_gives_a_portable_graph() -> None:
    import io

    fused, peft = pair()
    x = torch.randn(2, 32)
    traced = torch.jit.trace(fused, x, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), peft(x))
    assert set(reasons(fused)) == {"inside torch.jit.trace"}


def test_hooks_on_all_modules_see_the_children() -> None:
    fused, _ = pair()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        fused(torch.randn(2, 32))
    finally:
        handle.remove()
    assert seen.count("Linear") == 3
    assert reasons(fused) == {"a hook on all modules is registered": 1}


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_that_of_the_dropout_module(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adapter's own probability, where that dropout module itself is training."""
    from peftfast.patching import lora_call

    given = []
    run = lora_call.lora_linear
    monkeypatch.setattr(
        lora_call, "lora_linear", lambda *a, **k: (given.append(k["dropout_p"]), run(*a, **k))[1]
    )
    fused, peft = pair(lora_dropout=0.25)
    given.clear()
    fused.train(not training)
    fused.lora_dropout["default"].train(training)
    x = torch.randn(64, 32)
    y = fused(x)
    assert given == [[0.25 if training else 0.0]]
    assert torch.allclose(y, peft(x)) is not training


def test_dropout_keeps_the_mean() -> None:
    fused, peft = pair(lora_dropout=0.5)
    fused.train()
    x = torch.randn(3, 32)
    with torch.no_grad():
        ys = torch.stack([fused(x) for _ in range(600)])
        expected = peft(x)
    spread = ys.std(0) / 600**0.5
    assert ((ys.mean(0) - expected).abs() <= 5 * spread + 1e-6).all()
    assert spread.max() > 1e-3


def test_dropout_follows_the_seed() -> None:
    fused, _ = pair(lora_dropout=0.5)
    fused.train()
    x = torch.randn(3, 32)
    torch.manual_seed(1)
    first, second = fused(x), fused(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(fused(x), first)


def test_wrong_shape() -> None:
    fused, _ = pair()
    with pytest.raises(ValueError, match=r"\[2, 31\].*31 in the other"):
        fused(torch.randn(2, 31))


def test_impl_that_can_no_longer_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit request never falls back."""
    fused, _ = pair()
    fused.double()
    monkeypatch.setenv("PEFTFAST_IMPL", "triton")
    with pytest.raises(ImplUnavailable):
        fused(torch.randn(2, 32, dtype=torch.float64))


def test_generation_with_a_prompt_cache_has_no_delegations() -> None:
    model = patch(adapted(), strict=True)
    ids = torch.randint(3, VOCAB, (2, 5))
    model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert not reasons(model)


@pytest.mark.parametrize("layout", ["sparse", "nested"])
def test_inputs_that_are_not_dense(layout: str) -> None:
    module, peft = pair()
    eye = torch.eye(4, module.in_features)
    x = eye.to_sparse() if layout == "sparse" else torch.nested.nested_tensor([eye, eye[:2]])
    got, expected = module(x), peft(x)
    for ours, theirs in zip(got.unbind(), expected.unbind(), strict=True):
        assert torch.equal(ours, theirs)
    assert reasons(module) == {"the input is not a dense tensor": 1}
