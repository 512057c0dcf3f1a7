"""Norms, gated MLPs, activations and dropouts: how they are found, and what is left alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense, T5LayerNorm

from peftfast.patching import patch, report, unpatch
from peftfast.patching.parts import part_of
from peftfast.patching.state import state_of
from tests.patching.tiny import adapted, copy_of, inputs_of, randomise, step_is_as_good


class Holder(nn.Module):
    """A module beside a linear that an adapter is put on."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.held(self.linear(x))
        return y


def held(module: nn.Module) -> tuple[Any, Any]:
    """The module patched in a model, and as it was."""
    torch.manual_seed(0)
    model = randomise(get_peft_model(Holder(module), LoraConfig(r=2, target_modules=["linear"])))
    with torch.no_grad():
        for parameter in model.base_model.model.held.parameters():
            parameter.normal_()
    own = copy_of(model.base_model.model.held)
    patch(model)
    return model.base_model.model.held, own


def reason_of(module: nn.Module) -> str:
    """Why a module is left alone, as the report of its model says."""
    model = get_peft_model(Holder(module), LoraConfig(r=2, target_modules=["linear"]))
    left = report(patch(model)).not_fused
    return "; ".join(r for entry in left if entry.path.endswith("held") for r in entry.reasons)


def same(module: Any, own: Any, x: Tensor) -> None:
    """Output and gradients of a patched module are those of the module itself."""
    results = []
    for m in (module, own):
        m.zero_grad()
        given = x.clone().requires_grad_()
        torch.manual_seed(0)
        y = m(given)
        y.float().pow(2).sum().backward()
        results.append([y, given.grad, *(p.grad for p in m.parameters())])
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert got.dtype == expected.dtype
            tolerance = 16 * torch.finfo(got.dtype).eps
            torch.testing.assert_close(
                got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
            )


class PlusOne(nn.Module):
    """A norm that no op computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (16,), self.weight, self.eps) + 1


class WithGate(PlusOne):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return x * gate


NORMS = {
    "llama": (lambda: LlamaRMSNorm(16, eps=1e-5), "llama"),
    "gemma": (lambda: Gemma3RMSNorm(16, eps=1e-5), "gemma"),
    "t5": (lambda: T5LayerNorm(16, eps=1e-5), "t5"),
    "torch": (lambda: nn.RMSNorm(16, eps=1e-5), "torch"),
    "layer": (lambda: nn.LayerNorm(16), "layer"),
    "layer-without-bias": (lambda: nn.LayerNorm(16, bias=False), "layer"),
    "layer-without-parameters": (lambda: nn.LayerNorm(16, elementwise_affine=False), "layer"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_told_apart(name: str, dtype: torch.dtype) -> None:
    make, form = NORMS[name]
    module, own = held(make())
    assert state_of(module).plan.form == form
    for m in (module, own):
        m.to(dtype)
    same(module, own, torch.randn(2, 3, 16, dtype=dtype))
    assert state_of(module).hits == 1


def test_t5_and_llama_differ_where_dtypes_do() -> None:
    for make, form in (NORMS["llama"], NORMS["t5"]):
        module, own = held(make())
        x = torch.randn(4, 16, dtype=torch.bfloat16)
        assert module(x).dtype == own(x).dtype
        assert torch.equal(module(x), own(x)), form
        assert not state_of(module).delegations


def test_eps_and_weight_are_read_at_each_call() -> None:
    module, own = held(LlamaRMSNorm(16))
    for m in (module, own):
        m.variance_epsilon = 3.0
        m.weight = nn.Parameter(torch.arange(16.0))
    same(module, own, torch.randn(2, 16))
    for m in (module, own):
        m.double()
    x = torch.randn(2, 16)
    assert module(x).dtype == own(x).dtype
    assert state_of(module).delegations == {
        "its weight is torch.float64, the input torch.float32": 1
    }


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (PlusOne(), "none of the norms"),
        (WithGate(), "raised TypeError"),
        (nn.LayerNorm((4, 16)), "over 2 dimensions"),
        (nn.RMSNorm(16), "eps is not a number"),
        (nn.Softplus(), "none of the activations"),
        (nn.SiLU(inplace=True), "in place"),
        (nn.ReLU(), "keeps its output alone"),
        (nn.Dropout(0.5, inplace=True), "in place"),
    ],
)
def test_what_no_op_computes_is_left_with_a_reason(module: nn.Module, reason: str) -> None:
    assert reason in reason_of(module)
    model = get_peft_model(Holder(module), LoraConfig(r=2, target_modules=["linear"]))
    patch(model, strict=True)  # no failure: no op could serve it


def test_what_could_be_served_counts_for_strict() -> None:
    module = nn.LayerNorm(16)
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert "replaced on the instance" in reason_of(module)
    model = get_peft_model(Holder(module), LoraConfig(r=2, target_modules=["linear"]))
    with pytest.raises(RuntimeError, match="held: its forward was replaced"):
        patch(model, strict=True)


def test_a_forward_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    assert "LlamaRMSNorm.forward was replaced, by tests" in reason_of(LlamaRMSNorm(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "quick_gelu", "relu2"]
)
def test_activations(kind: str, dtype: torch.dtype) -> None:
    module, own = held(ACT2FN[kind])
    expected = {"gelu_pytorch_tanh": "gelu_tanh"}.get(kind, kind)
    assert state_of(module).plan == expected
    same(module, own, torch.randn(3, 16, dtype=dtype))
    assert state_of(module).hits == 1


def llama_mlp(act: str = "silu", inner: int = 24) -> Any:
    return LlamaMLP(
        hf.LlamaConfig(
            hidden_size=16, intermediate_size=inner, hidden_act=act, num_attention_heads=2
        )
    )


def phi3_mlp() -> Any:
    return Phi3MLP(
        hf.Phi3Config(hidden_size=16, intermediate_size=24, pad_token_id=0, num_attention_heads=2)
    )


def t5_mlp() -> Any:
    return T5DenseGatedActDense(
        hf.T5Config(d_model=16, d_ff=24, feed_forward_proj="gated-gelu", dropout_rate=0.5)
    )


class UpFirst(nn.Module):
    """Gate and up the other way round; dropout after the last linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.b(self.c(x) * self.act(self.a(x))))


class Ungated(UpFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(x) + self.act(self.a(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (llama_mlp, ("gate_proj", "up_proj", "down_proj", "silu", "")),
        (lambda: llama_mlp("gelu", 16), ("gate_proj", "up_proj", "down_proj", "gelu", "")),
        (lambda: llama_mlp("relu", 32), ("gate_proj", "up_proj", "down_proj", "relu", "")),
        (phi3_mlp, ("gate_up_proj", "", "down_proj", "silu", "")),
        (t5_mlp, ("wi_0", "wi_1", "wo", "gelu_new", "dropout")),
        (UpFirst, ("a", "c", "b", "gelu", "")),
    ],
)
def test_gated_mlps(make: Any, plan: tuple[str, ...], dtype: torch.dtype) -> None:
    module, own = held(make())
    found = state_of(module).plan
    assert (found.gate, found.up, found.down, found.kind, found.dropout) == plan
    assert found.gate_first
    for m in (module, own):
        m.to(dtype).eval()
    same(module, own, torch.randn(2, 3, 16, dtype=dtype))
    assert state_of(module).hits == 1


def test_a_block_of_other_maths_is_left_alone() -> None:
    assert "no gated product" in reason_of(Ungated())
    model = get_peft_model(Holder(Ungated()), LoraConfig(r=2, target_modules=["linear"]))
    fused = {entry.path.rpartition("held.")[2] for entry in report(patch(model)).fused}
    assert {"act", "drop"} <= fused  # its parts are served on their own


class HalfDetached(UpFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(x).detach() * self.act(self.a(x)))


def test_a_block_of_other_gradients_is_left_alone() -> None:
    assert "gradients are not those" in reason_of(HalfDetached())


def test_the_activation_of_a_fused_mlp_is_not_listed() -> None:
    model = adapted()
    patch(model, exclude=["mlp"])
    assert sum(entry.path.endswith("act_fn") for entry in report(model).fused) == 2
    patch(model)
    for entry in [*report(model).fused, *report(model).not_fused]:
        assert not entry.path.endswith("act_fn")
    assert type(model.base_model.model.model.layers[0].mlp.act_fn).__name__ == "SiLUActivation"


def test_mlps_whose_children_change() -> None:
    module, own = held(llama_mlp())
    x = torch.randn(2, 16)
    for m in (module, own):
        m.act_fn = nn.GELU()
    same(module, own, x)
    for m in (module, own):
        m.act_fn = ACT2FN["silu"]
        m.act_fn.register_forward_hook(lambda _, __, y: y * 2)
    same(module, own, x)
    for m in (module, own):
        m.act_fn = ACT2FN["silu"]
        m.down_proj.double()
        m.down_proj.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    assert torch.equal(module(x), own(x))
    assert set(state_of(module).delegations) == {
        "its act_fn is a GELU",
        "its act_fn has hooks",
        "its gate_proj is torch.float32, its down_proj torch.float64",
    }
    assert state_of(module).hits == 0


def test_hooks_on_the_linears_of_an_mlp_fire() -> None:
    module, own = held(llama_mlp())
    for m in (module, own):
        m.up_proj.register_forward_hook(lambda _, __, y: y * 3)
    same(module, own, torch.randn(2, 16))
    assert state_of(module).hits == 1


def test_dropout_drops_in_training_alone() -> None:
    module, _ = held(nn.Dropout(0.25))
    x = torch.ones(400, 100)
    assert module.eval()(x) is x
    torch.manual_seed(0)
    y = module.train()(x)
    assert set(y.unique().tolist()) == {0.0, y.max().item()}
    assert abs((y == 0).float().mean().item() - 0.25) < 0.01
    torch.testing.assert_close(y.max().item(), 1 / 0.75)
    torch.manual_seed(0)
    assert torch.equal(module(x), y)
    assert not torch.equal(module(x), y)


def dropping(family: str, **settings: Any) -> Any:
    """A tiny model that drops in its hidden layers."""
    model = adapted(family, **settings)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.25
    return model.train()


class Ours(nn.Dropout):
    """`nn.Dropout` with the op's masks, which keeps what autograd keeps."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        from peftfast.ops.dropout import draw_seed
        from peftfast.reference.dropout import dropout

        return dropout(x, draw_seed(x), self.p) if self.p > 0 else x


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_models_that_drop(family: str, checkpointing: bool | None) -> None:
    """With one generator state the step is that of a model with the same masks, kept."""
    model = dropping(family)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    plain = copy_of(model)
    patch(model, strict=True)
    for module in plain.modules():
        if type(module) is nn.Dropout and not any(
            module is inner
            for layer in plain.modules()
            if hasattr(layer, "lora_dropout")
            for inner in layer.lora_dropout.values()
        ):
            module.__class__ = Ours
    results = []
    for m in (model, plain):
        torch.manual_seed(0)
        output = m(**inputs_of(family))
        output.loss.backward()
        results.append(
            {"loss": output.loss}
            | {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        )
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        torch.testing.assert_close(
            results[0][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any(entry.op == "dropout" for entry in report(model).fused)


def test_copies_and_the_way_back() -> None:
    model = adapted("t5")
    classes = {path: type(module) for path, module in model.named_modules()}
    patch(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        plans = {e.path: state_of(twin.get_submodule(e.path)) for e in report(model).fused if e.op}
        assert all(state is not None for path, state in plans.items() if "lm_head" not in path)
        unpatch(twin)
        assert {path: type(module) for path, module in twin.named_modules()} == classes
    for _ in range(2):
        step_is_as_good(model, unpatch(copy.deepcopy(model)), inputs_of("t5"))


def test_classes_are_made_once() -> None:
    one, other = part_of(LlamaRMSNorm(4)), part_of(LlamaRMSNorm(8))
    assert one is other
    assert part_of(nn.Linear(2, 2)) is None
    assert part_of(nn.BatchNorm1d(4)) is None
    assert part_of(nn.Dropout(0.0)) is None


def test_nothing_without_an_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())
    assert not report(model).not_fused
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(model)
    assert type(model[1]) is nn.LayerNorm


def test_transforms_and_other_arguments_run_the_module_itself() -> None:
    module, own = held(nn.LayerNorm(16))
    x = torch.randn(3, 16)
    got = torch.func.vmap(module)(x)
    torch.testing.assert_close(got, own(x))
    torch.testing.assert_close(module(input=x), own(x))
    assert set(state_of(module).delegations) == {
        "inside a torch.func transform",
        "called with arguments besides the input",
    }


def test_impl_of_parts() -> None:
    """A part takes an implementation that its op has, and says so."""
    model = patch(adapted(), impl="triton", verify=False)
    impls = {entry.op: entry.impl for entry in report(model).fused}
    assert impls["lora_linear"] == impls["rms_norm"] == impls["gated_activation"] == "triton"
    patch(model, impl="native", verify=False)
    impls = {entry.op: entry.impl for entry in report(model).fused}
    assert (impls["lora_linear"], impls["rms_norm"]) == ("native", "auto")
