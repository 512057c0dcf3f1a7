"""4-bit linears of bitsandbytes, under LoRA and alone: what they compute, and in which dtypes."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peftfast.memory import saved_bytes
from peftfast.patching import patch, report, unpatch
from tests.patching.attention import Counted
from tests.patching.quantised import (
    HALF,
    Attention,
    adapted_linears,
    base_model,
    exact_copy,
    linear4bit,
    linears4bit,
    qlora,
    step_is_as_good,
)
from tests.patching.tiny import (
    assert_as_good,
    copy_of,
    fused_layers,
    inputs_of,
    layers_of,
    left_layers,
    randomise,
)

FLOAT, FP16 = torch.float32, torch.float16

# dtype of everything but the adapters and the 4-bit weights, of the adapters, compute_dtype
DTYPES = {
    "prepared-for-kbit-training": (FLOAT, FLOAT, HALF),
    "float32": (FLOAT, FLOAT, FLOAT),
    "bf16": (HALF, FLOAT, HALF),
    "bf16-adapters": (HALF, HALF, HALF),
    "fp16": (FLOAT, FLOAT, FP16),
    "not-given": (FLOAT, FLOAT, None),
    "wider-than-the-input": (HALF, FLOAT, FLOAT),
}
FORMATS: dict[str, dict[str, Any]] = {
    "fp4": dict(quant_type="fp4"),
    "not-nested": dict(compress_statistics=False),
    "blocks-of-32": dict(block_size=32),
    "stored-as-bf16": dict(quant_storage=HALF),
    "stored-as-float32": dict(quant_storage=FLOAT, compress_statistics=False),
    "LinearNF4": dict(kind=bnb.nn.LinearNF4),
    "LinearFP4": dict(kind=bnb.nn.LinearFP4),
}


def all_ran_fused(model: Any) -> bool:
    found = report(model)
    return all(e.hits and not e.delegations and not e.note for e in layers_of(found.fused))


def reasons(model: Any) -> dict[str, int]:
    return fused_layers(model)[0].delegations


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("family", "siblings"), [("llama", 4), ("qwen2", 4), ("bert", 2)])
def test_as_good_as_peft(family: str, siblings: int, dtypes: str) -> None:
    rest, adapters, compute = DTYPES[dtypes]
    model = qlora(family, rest, adapters, compute_dtype=compute)
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of(family))
    found = report(model)
    assert len(layers_of(found.fused)) == len(adapted_linears(model)) == len(linears4bit(model))
    assert {entry.op for entry in layers_of(found.fused)} == {"lora_linear"}
    assert not left_layers(model)
    assert all_ran_fused(model)
    assert len({entry.siblings for entry in layers_of(found.fused) if entry.siblings}) == siblings


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(form: str) -> None:
    model = qlora("qwen2", compute_dtype=HALF, **FORMATS[form])
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of())
    assert all_ran_fused(model)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtypes", ["prepared-for-kbit-training", "float32", "bf16"])
def test_moved_after_patching(dtypes: str, device: str) -> None:
    rest, adapters, compute = DTYPES[dtypes]
    lora = {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]}
    model = qlora("qwen2", rest, adapters, lora=lora, compute_dtype=compute)
    peft = copy_of(model).to(device)
    patch(model, strict=True)
    model(**inputs_of())
    model.to(device)
    inputs = {name: value.to(device) for name, value in inputs_of().items()}
    for _ in range(3):
        step_is_as_good(model, peft, inputs)
    for columns in (1, 5):
        tokens = {name: value[:1, :columns] for name, value in inputs.items()}
        with torch.no_grad():
            got, expected = model(**tokens).logits, peft(**tokens).logits
        limit = 1e-4 if compute == FLOAT else 0.05
        assert (got - expected).abs().max() <= limit * expected.abs().max()
    assert all_ran_fused(model)


@pytest.mark.parametrize("columns", [1, 2, 7])
def test_few_rows(columns: int) -> None:
    """Decoding takes other kernels than training does."""
    model = qlora("qwen2", HALF, compute_dtype=HALF)
    peft = copy_of(model)
    patch(model, strict=True)
    inputs = inputs_of(rows=1, columns=columns)
    with torch.no_grad():
        for _ in range(2):
            got, expected = model(**inputs).logits, peft(**inputs).logits
    exact = exact_copy(peft)(**inputs).logits
    assert_as_good({"logits": got}, {"logits": expected}, {"logits": exact.detach()})
    assert all_ran_fused(model)


# Linears without an adapter


@pytest.mark.parametrize("dtypes", DTYPES)
def test_plain_linears(dtypes: str) -> None:
    rest, _, compute = DTYPES[dtypes]
    model = base_model("qwen2", rest, compute_dtype=compute)
    own = copy_of(model)
    patch(model, strict=True)
    found = report(model)
    assert {entry.op for entry in layers_of(found.fused)} == {"nf4_linear"}
    assert [entry.path for entry in layers_of(found.fused)] == list(linears4bit(model))
    torch.manual_seed(0)
    embeddings = torch.randn(2, 7, 64).to(rest)
    results = []
    own(inputs_embeds=embeddings)  # settles what bitsandbytes computes in
    for m, dtype in ((model, rest), (own, rest), (exact_copy(own), torch.float64)):
        x = embeddings.to(dtype, copy=True).requires_grad_()
        logits = m(inputs_embeds=x).logits
        logits.pow(2).sum().backward()
        results.append({"logits": logits.detach(), "x": x.grad})
    assert_as_good(*results)
    assert all_ran_fused(model)
    unpatch(model)
    assert torch.equal(model(inputs_embeds=embeddings).logits, results[1]["logits"])


@pytest.mark.parametrize("kind", [bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_lone_linear(kind: Any, bias: bool) -> None:
    module = linear4bit(nn.Linear(64, 48, bias=bias), kind=kind, compute_dtype=FLOAT)
    x = torch.randn(3, 5, 64)
    expected = module(x)
    patch(module, strict=True)
    assert isinstance(module, kind)
    assert type(module) is not kind
    torch.testing.assert_close(module(x), expected)
    (entry,) = fused_layers(module)
    assert (entry.op, entry.hits, entry.delegations) == ("nf4_linear", 1, {})
    unpatch(module)
    assert type(module) is kind
    assert torch.equal(module(x), expected)


def test_linears_that_no_adapter_is_on() -> None:
    model = qlora(lora={"target_modules": ["q_proj", "v_proj"]}, compute_dtype=FLOAT)
    peft = copy_of(model)
    patch(model, strict=True)
    ops = {entry.path.rpartition(".")[2]: entry.op for entry in fused_layers(model)}
    plain = dict.fromkeys(["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "nf4_linear")
    assert ops == {"q_proj": "lora_linear", "v_proj": "lora_linear", **plain}
    for _ in range(2):
        step_is_as_good(model, peft, inputs_of())
    assert all_ran_fused(model)


def test_a_bias_that_is_trained() -> None:
    module = linear4bit(nn.Linear(64, 48), compute_dtype=FLOAT)
    module.bias.requires_grad_()
    own = copy_of(module)
    patch(module, strict=True)
    x, dy = torch.randn(5, 64), torch.randn(5, 48)
    for m in (module, own):
        m(x).backward(dy)
    torch.testing.assert_close(module.bias.grad, own.bias.grad)


# Siblings


@pytest.mark.parametrize("compute", [FLOAT, HALF])
@pytest.mark.parametrize("quantised", ["qkvo", "qk", "v", "kvo"])
def test_siblings_over_dense_and_4bit_bases(
    quantised: str, compute: torch.dtype, calls: Counted
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list("qkvo"))
    model = randomise(get_peft_model(Attention(quantised, compute), config))
    peft = copy_of(model)
    patch(model, strict=True)
    x = torch.randn(5, 64)
    exact, results = exact_copy(peft), []
    for _ in range(2):
        calls.take()
        results = []
        for m in (model, peft, exact):
            own = x.to(torch.float64 if m is exact else FLOAT, copy=True).requires_grad_()
            m.zero_grad()
            y = m(own)
            y.pow(2).sum().backward()
            grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
            results.append({"logits": y.detach(), "x": own.grad, **grads})
    assert calls.take() == (1, 1)  # o alone, q, k and v together
    assert_as_good(*results)


def test_a_member_whose_compute_dtype_changes_between_the_calls() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list("qkvo"))
    model = patch(randomise(get_peft_model(Attention("qkvo", FLOAT), config)), strict=True)
    x = torch.randn(5, 64)
    for _ in range(2):
        model(x)
    block = model.base_model.model
    q = block.q(x)
    block.k.base_layer.compute_dtype = HALF
    alone = copy_of(block.k)
    assert torch.equal(block.k(x), alone(x))
    assert "an adapter changed" in fused_layers(model)[0].note
    assert q.shape == x.shape


def test_a_bias_written_between_the_calls() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list("qkvo"))
    model = randomise(get_peft_model(Attention("qkvo", FLOAT), config))
    peft = copy_of(model)
    patch(model, strict=True)
    x = torch.randn(5, 64)
    for _ in range(2):
        model(x)
    results = []
    for block in (model.base_model.model, peft.base_model.model):
        q = block.q(x)
        with torch.no_grad():
            block.k.base_layer.bias.add_(1.0)
        results.append((q, block.k(x)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert "a weight or an adapter changed" in fused_layers(model)[0].note


@pytest.mark.parametrize("autocast", [False, True])
def test_biases_of_adapters_keep_their_dtype(autocast: bool) -> None:
    """The base's bias is rounded to the compute_dtype, the adapter's is not."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(linear4bit(nn.Linear(64, 64), compute_dtype=HALF))
    model.is_loaded_in_4bit = True
    config = LoraConfig(r=2, target_modules=["0"], lora_bias=True)
    model = randomise(get_peft_model(model, config))
    peft = copy_of(model)
    patch(model, strict=True)
    x = torch.zeros(3, 64)
    with torch.autocast("cpu", dtype=HALF, enabled=autocast):
        got, expected = model(x), peft(x)
        got.sum().backward()
    assert got.dtype == expected.dtype == FLOAT
    limit = HALF if autocast else FLOAT  # PEFT rounds the adapter's to autocast's dtype
    assert (got - expected).abs().max() <= 4 * torch.finfo(limit).eps * expected.abs().max()
    bias = next(p for n, p in model.named_parameters() if "lora_B" in n and n.endswith("bias"))
    torch.testing.assert_close(bias.grad, torch.full((64,), 3.0 * config.lora_alpha / config.r))
    assert all_ran_fused(model)


# What bitsandbytes settles at the first call


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "plain"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, FP16])
def test_compute_dtype_of_the_first_input(dtype: torch.dtype, adapted: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(linear4bit(nn.Linear(64, 64)))
    if adapted:
        model.is_loaded_in_4bit = True
        model = randomise(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
    own = copy_of(model)
    patch(model, strict=True)
    bases = [next(iter(linears4bit(m).values())) for m in (model, own)]
    assert all(base.compute_dtype is None and not base.compute_type_is_set for base in bases)
    for later in (dtype, HALF, FLOAT, FP16):
        x = torch.randn(3, 64).to(later)
        got, expected = model(x), own(x)
        assert got.dtype == expected.dtype == later
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
        assert [base.compute_type_is_set for base in bases] == [True, True]
        assert len({base.compute_dtype for base in bases}) == 1
    assert bases[0].compute_dtype == (None if dtype == FP16 else dtype)
    assert fused_layers(model)[0].hits == 4


@pytest.mark.parametrize("compute", [FLOAT, HALF, FP16])
def test_a_bias_is_cast_for_good(compute: torch.dtype) -> None:
    module = linear4bit(nn.Linear(64, 48), compute_dtype=compute)
    own = copy_of(module)
    patch(module, strict=True)
    assert module.bias.dtype == FLOAT  # patching calls nothing of the module itself
    bias, x = module.bias, torch.randn(3, 64).to(HALF)
    for m in (module, own):
        m(x)
    assert module.bias is bias
    assert bias.dtype == own.bias.dtype
    assert torch.equal(bias, own.bias)


def test_float16_input_warns_as_bitsandbytes_does(caplog: pytest.LogCaptureFixture) -> None:
    module = patch(linear4bit(nn.Linear(64, 48)))
    module(torch.randn(3, 64).half())
    assert "Input type into Linear4bit is torch.float16" in caplog.text


# Autocast


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "plain"])
@pytest.mark.parametrize(("dtype", "given"), [(HALF, FLOAT), (FP16, FLOAT), (HALF, HALF)])
def test_autocast(dtype: torch.dtype, given: torch.dtype, adapted: bool) -> None:
    """The output has x's dtype, as bitsandbytes gives it, not autocast's."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(linear4bit(nn.Linear(64, 64), compute_dtype=dtype))
    if adapted:
        model.is_loaded_in_4bit = True
        model = randomise(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
    own = copy_of(model)
    patch(model, strict=True)
    results = []
    for m in (model, own):
        x = torch.linspace(-2, 2, 5 * 64).view(5, 64).to(given).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = m(x)
        y.float().pow(2).sum().backward()
        grads = [p.grad for p in m.parameters() if p.grad is not None]
        results.append([y.detach(), x.grad, *grads])
    limit = 16 * torch.finfo(dtype).eps
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).abs().max() <= limit * expected.abs().max()
    assert results[0][0].dtype == given
    assert fused_layers(model)[0].hits == 1


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "plain"])
@pytest.mark.parametrize(
    ("compute", "autocast", "given"),
    [(FLOAT, HALF, FLOAT), (HALF, FP16, FLOAT), (HALF, HALF, FP16), (None, HALF, FLOAT)],
)
def test_autocast_to_another_dtype_is_left_alone(
    compute: torch.dtype | None, autocast: torch.dtype, given: torch.dtype, adapted: bool
) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(linear4bit(nn.Linear(64, 64), compute_dtype=compute))
    if adapted:
        model.is_loaded_in_4bit = True
        model = randomise(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
    own = copy_of(model)
    patch(model, strict=True)
    x = torch.randn(3, 64).to(given)
    with torch.autocast("cpu", dtype=autocast):
        assert torch.equal(model(x), own(x))
    ((reason, count),) = reasons(model).items()
    assert "autocast in" in reason
    assert count == 1


def test_siblings_under_autocast(calls: Counted) -> None:
    model = qlora("qwen2", compute_dtype=HALF)
    peft = copy_of(model)
    patch(model, strict=True)
    for _ in range(3):
        results = []
        for m in (model, peft):
            m.zero_grad()
            with torch.autocast("cpu", dtype=HALF):
                output = m(**inputs_of())
            output.loss.backward()
            grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
            results.append({"logits": output.logits.detach(), **grads})
    assert calls.take()[1] == 8
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        assert results[0][name].dtype == expected.dtype
        apart = torch.linalg.vector_norm((results[0][name] - expected).double())
        assert apart <= 0.1 * torch.linalg.vector_norm(expected.double()), name
    assert all_ran_fused(model)


# Memory


@pytest.mark.parametrize("compute", [FLOAT, HALF])
def test_no_dense_weight_is_kept_for_the_backward(compute: torch.dtype) -> None:
    torch.manual_seed(0)
    linears = [linear4bit(nn.Linear(256, 256, bias=False), compute_dtype=compute) for _ in range(4)]
    model: Any = nn.Sequential(*linears)
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
    patch(model, strict=True)
    x = torch.randn(8, 256, requires_grad=True)

    held = saved_bytes(lambda: model(x), exclude=model)
    statistics = 4 * (256 * 256 // 64 + 4 * 4 + 4 * 256 + 4)
    rows = 8 * 4 * (256 + 2)  # x and t of the two with an adapter
    assert held <= statistics + 2 * rows + 64
    assert held < 256 * 256 * compute.itemsize
