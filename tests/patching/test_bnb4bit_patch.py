"""patch and report over 4-bit models: what is compared, refused, excluded, asked for, and said."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn

from peftfast.methods import ParallelAdapterConfig
from peftfast.ops import ImplUnavailable, nf4
from peftfast.patching import FusedModule, NotFusedModule, lora_call, patch, report
from peftfast.patching.state import state_of
from tests.patching.hosts import with_method
from tests.patching.quantised import (
    HALF,
    Attention,
    base_model,
    linear4bit,
    linears4bit,
    qlora,
    step_is_as_good,
)
from tests.patching.tiny import copy_of, inputs_of, layers_of, left_layers, randomise

ROOT = Path(__file__).resolve().parents[2]
LORA = {"target_modules": ["q_proj", "k_proj", "gate_proj"]}


@pytest.fixture
def broken_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ops off by a thousandth."""

    def off(right: Any) -> Any:
        return lambda *args, **settings: right(*args, **settings) * 1.001

    monkeypatch.setattr(lora_call, "lora_linear", off(lora_call.lora_linear))
    monkeypatch.setattr(nf4, "linear", off(nf4.linear))


def test_modules_that_differ_are_left_alone(broken_ops: None) -> None:
    model = qlora(lora=LORA, compute_dtype=torch.float32)
    own = copy_of(model)
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(model)
    reasons = {e.path.rpartition(".")[2]: e.reasons[0] for e in report(model).not_fused}
    assert "its output differs from PEFT's by" in reasons["q_proj"]
    assert "its output differs from bitsandbytes' by" in reasons["o_proj"]
    assert torch.equal(model(**inputs_of()).logits, own(**inputs_of()).logits)
    with pytest.raises(RuntimeError, match="14 modules that could be fused were not"):
        patch(model, strict=True)
    found = report(patch(model, verify=False))
    assert len(layers_of(found.fused)) == 14
    assert all(
        "not compared with its own forward: verify=False" in e.note for e in layers_of(found.fused)
    )


def test_float32_inputs_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op wrong for those alone, as they come after float32 norms, is found."""
    adapted, plain = lora_call.lora_linear, nf4.linear

    def wrong_for_float32(right: Any) -> Any:
        def op(x: Tensor, *rest: Any, **settings: Any) -> Tensor:
            return right(x, *rest, **settings) * (1.5 if x.dtype == torch.float32 else 1.0)

        return op

    monkeypatch.setattr(lora_call, "lora_linear", wrong_for_float32(adapted))
    monkeypatch.setattr(nf4, "linear", wrong_for_float32(plain))
    model = qlora(lora=LORA, dtype=HALF, compute_dtype=HALF)
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rounding_is_no_difference(quant_type: str, dtype: torch.dtype) -> None:
    model = qlora("qwen2", dtype, lora=LORA, compute_dtype=dtype, quant_type=quant_type)
    found = report(patch(model, strict=True))
    assert len(layers_of(found.fused)) == 14
    assert all(not entry.note for entry in layers_of(found.fused))


def test_meta_parameters_cannot_be_compared() -> None:
    """As offloading leaves them between calls."""
    model = qlora(lora=LORA, compute_dtype=torch.float32)
    for linear in linears4bit(model).values():
        weight, state = linear.weight, linear.weight.quant_state
        state.to("meta")
        linear.weight = bnb.nn.Params4bit(
            weight.data.to("meta"), quant_state=state, bnb_quantized=True
        )
    found = report(patch(model, strict=True))
    assert len(layers_of(found.fused)) == 14
    assert all("meta device" in entry.note for entry in layers_of(found.fused))


def test_merged_models_are_compared_all_the_same(broken_ops: None) -> None:
    model = qlora(lora=LORA, compute_dtype=torch.float32)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="nothing was fused"):
        patch(model)


def test_exclude() -> None:
    model = patch(qlora(lora=LORA), exclude=["q_proj", "mlp.down_proj", "*.layers.1.*"])
    left = {entry.path.partition("layers.")[2]: entry.reasons for entry in left_layers(model)}
    assert len(left) == 9
    assert left["0.self_attn.q_proj"] == ("excluded by 'q_proj'",)
    assert left["0.mlp.down_proj"] == ("excluded by 'mlp.down_proj'",)
    with pytest.raises(ValueError, match="'base_layer' matches none of the 26 modules"):
        patch(model, exclude=["base_layer"])  # those are not layers of their own


@pytest.mark.parametrize("make", [qlora, base_model])
@pytest.mark.parametrize("verify", [True, False])
def test_an_implementation_that_cannot_serve(make: Any, verify: bool) -> None:
    model = make(compute_dtype=HALF)
    before = [type(m) for m in model.modules()]
    reason = "interpreter computes bfloat16 wrong|needs a CUDA device"
    if torch.cuda.is_available():
        pytest.skip("asks for what a machine without a GPU lacks")
    with pytest.raises(ImplUnavailable, match=reason):
        patch(model, impl="triton", verify=verify)
    assert [type(m) for m in model.modules()] == before


def test_the_implementation_reaches_both_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, set[str]] = {"lora_linear": set(), "linear": set()}
    for owner, name in ((lora_call, "lora_linear"), (nf4, "linear")):
        run = getattr(owner, name)

        def counted(*a: Any, impl: str, run: Any = run, name: str = name, **k: Any) -> Any:
            asked[name].add(impl)
            return run(*a, impl=impl, **k)

        monkeypatch.setattr(owner, name, counted)
    model = patch(qlora(lora=LORA), impl="reference", verify=False)
    model(**inputs_of())
    assert asked == {"lora_linear": {"reference"}, "linear": {"reference"}}


def test_plain_linears_are_nobody_s_siblings() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Attention("qkvo", torch.float32), LoraConfig(target_modules=["q"]))
    block = patch(model, strict=True).base_model.model
    model(torch.randn(3, 64))
    assert all(state_of(m).siblings is None for m in (block.q, block.k, block.v, block.o))


# The report


class Mixed(nn.Module):
    """Layers of every kind: adapted, plain, of 8 bits, dense."""

    is_loaded_in_4bit = True

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention("qkvo", torch.float32)
        self.four = linear4bit(nn.Linear(64, 64), kind=bnb.nn.LinearFP4, compute_dtype=HALF)
        self.eight = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        self.dense = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.eight(self.four(self.attention(x))))


def test_lines_of_the_report() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q", "k", "v", "dense"])
    model = randomise(get_peft_model(Mixed().to("cpu"), config))
    before = report(model)
    assert not before.fused
    assert [entry.path.rpartition("model.")[2] for entry in before.not_fused] == [
        *(f"attention.{name}" for name in "qkvo"), "four", "eight", "dense",
    ]  # fmt: skip
    patch(model, strict=True)
    x = torch.randn(3, 64)
    for _ in range(2):
        model(x)
    with torch.autocast("cpu", dtype=torch.float16):
        model(x)
    found = report(model)
    qkv = tuple(f"base_model.model.attention.{name}" for name in "qkv")
    autocast = "the base layer computes in {}, autocast in torch.float16, the input is {}"
    at_first = {autocast.format("torch.float32", "torch.float32"): 1}
    assert layers_of(found.fused)[0] == FusedModule(
        qkv[0], "lora_linear", "auto", "recompute", qkv, 2, at_first, ""
    )
    assert layers_of(found.fused)[3] == FusedModule(
        "base_model.model.attention.o", "nf4_linear", "auto", "recompute", (), 2, at_first, ""
    )
    assert [entry.op for entry in layers_of(found.fused)] == [
        *["lora_linear"] * 3, "nf4_linear", "nf4_linear", "lora_linear",
    ]  # fmt: skip
    assert found.not_fused == [
        NotFusedModule(
            "base_model.model.eight",
            "bitsandbytes.nn.modules.Linear8bitLt",
            ("bitsandbytes.nn.modules.Linear8bitLt has no fused op",),
        )
    ]
    rows = [line.split() for line in str(found).splitlines()]
    assert [
        "base_model.model.attention.q",
        "1",
        "lora_linear",
        "auto",
        "q",
        "+",
        "k",
        "+",
        "v",
    ] in [row[:9] for row in rows]
    assert ["base_model.model.four", "1", "nf4_linear", "auto"] in [row[:4] for row in rows]


def test_other_tuners_over_4_bits() -> None:
    """Named as they are, with their bases not listed beside them."""
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = get_peft_model(base_model(compute_dtype=torch.float32), config)
    own = copy_of(model)
    patch(model, strict=True)
    found = report(model)
    assert {entry.op for entry in layers_of(found.fused)} == {"nf4_linear"}
    assert len(layers_of(found.fused)) == 12
    assert [entry.reasons[0] for entry in found.not_fused] == [
        "peft.tuners.ia3.bnb.Linear4bit over Linear4bit has no fused op"
    ] * 2
    got, expected = model(**inputs_of()).logits, own(**inputs_of()).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_without_bitsandbytes() -> None:
    """Where it is missing, the table lacks its layers and all else works."""
    script = """
        import sys

        class Without:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                hidden = name.partition(".")[0] == "bitsandbytes"
                return None if hidden else self.finder.find_spec(name, path, target)

            def __getattr__(self, name):
                return getattr(self.finder, name)

        sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
        import torch
        from peft import LoraConfig, get_peft_model
        import peftfast
        from peftfast.patching.handlers import handlers

        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        peftfast.patch(model, strict=True)
        model(torch.randn(2, 8)).sum().backward()
        (entry,) = peftfast.report(model).fused
        assert entry.hits == 1
        assert "Linear" in {kind.__name__ for kind in handlers()}
        assert not any("4bit" in kind.__name__ for kind in handlers())
        assert "bitsandbytes" not in sys.modules
        peftfast.unpatch(model)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=True)


def test_a_fresh_process_loads_a_pickled_model(tmp_path: Path) -> None:
    model = patch(qlora("qwen2", lora=LORA, compute_dtype=torch.float32))
    with torch.no_grad():
        expected = model(**inputs_of()).logits
    torch.save((model, inputs_of(), expected), tmp_path / "all.pt")
    script = f"""
        import torch

        model, inputs, expected = torch.load({str(tmp_path / "all.pt")!r}, weights_only=False)
        with torch.no_grad():
            got = model(**inputs).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        from peftfast.patching import report, unpatch

        found = [e for e in report(model).fused if e.op != "linear_cross_entropy"]
        assert len(found) > 14 and all(e.hits == 1 and not e.delegations for e in found)
        unpatch(model)
        assert not report(model).fused
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=True)


def test_adapters_of_the_project_over_4_bit_linears() -> None:
    plain = with_method(ParallelAdapterConfig(bottleneck=4), base_model())
    model = patch(copy_of(plain))
    step_is_as_good(model, plain, inputs_of())
    found = report(model)
    linears = {one.path for one in found.fused if one.op == "nf4_linear"}
    assert linears == linears4bit(model).keys()
    assert any(path.endswith("down_proj.base_layer") for path in linears)
    assert all(one.hits for one in found.fused if one.op in ("nf4_linear", "bottleneck"))
