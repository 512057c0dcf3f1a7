"""QLoRA jobs, patched and not: Trainer, checkpointing, dropout, compiled graphs, generation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peftfast.patching import patch, report, unpatch
from tests.patching.quantised import (
    HALF,
    Attention,
    base_model,
    exact_copy,
    linears4bit,
    qlora,
    step_is_as_good,
)
from tests.patching.test_training import Sentences
from tests.patching.tiny import (
    VOCAB,
    adapted,
    copy_of,
    fused_layers,
    inputs_of,
    layers_of,
    randomise,
    train_step,
)

FLOAT = torch.float32
STEPS = 30


def losses_of(model: Any, data: Any, folder: Path, **settings: Any) -> list[float]:
    """The losses of a Trainer's steps; `model` is trained."""
    collator = settings.pop("data_collator", None)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1,
        learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        seed=0, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_losses_as_good(got: list[float], peft: list[float], exact: list[float]) -> None:
    """Apart from float64's losses by at most twice PEFT's own error at any step so far."""
    assert len(got) == len(peft) == len(exact) == STEPS
    own = 0.0
    for step, (loss, expected, truth) in enumerate(zip(got, peft, exact, strict=True)):
        own = max(own, abs(expected - truth))
        assert abs(loss - truth) <= 2 * own + 1e-6 * truth, f"step {step}"
    assert exact[-1] < exact[0]


def prepared(compute: torch.dtype) -> Any:
    """A Llama in 4 bits as PEFT's documentation prepares it; loaded in bf16, so norms are cast."""
    model = base_model("llama", HALF, compute_dtype=compute)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    return randomise(model)


@pytest.mark.parametrize("compute", [FLOAT, HALF])
def test_trainer_on_llama(compute: torch.dtype, tmp_path: Path) -> None:
    """Thirty steps, then each one's adapter in the other's model."""
    peft = prepared(compute)
    assert {p.dtype for n, p in peft.named_parameters() if "norm" in n} == {FLOAT}
    peft(**inputs_of())
    exact, model = exact_copy(peft), copy_of(peft)
    patch(model, strict=True)
    jobs = {"plain": peft, "patched": model, "exact": exact}
    losses = {name: losses_of(m, Sentences(), tmp_path) for name, m in jobs.items()}
    assert_losses_as_good(losses["patched"], losses["plain"], losses["exact"])
    found = report(model)
    assert all(entry.hits == STEPS and not entry.delegations for entry in layers_of(found.fused))
    assert len({entry.siblings for entry in layers_of(found.fused) if entry.siblings}) == 4

    with torch.no_grad():
        logits = {name: m.eval()(**inputs_of()).logits for name, m in jobs.items()}
    for name in ("plain", "patched"):
        jobs[name].save_pretrained(tmp_path / name)
    for source, target in (("plain", model), ("patched", peft)):
        target.load_adapter(tmp_path / source, "default")
        with torch.no_grad():
            got = target(**inputs_of()).logits
        limit = 1e-5 if compute == FLOAT else 0.05
        assert (got - logits[source]).abs().max() <= limit * logits[source].abs().max()


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, list[dict[str, Any]], Any]:
    """MiniLM's real weights quantised by transformers, texts, and what collates them."""
    classifier = pytest.importorskip("peftfast.demo.classifier")
    from peftfast.demo.data import banking77

    folder = classifier.bundled_model()
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=FLOAT, llm_int8_skip_modules=["classifier"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=quantisation, device_map={"": "cpu"}, num_labels=77,
        dtype=FLOAT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [e for e in banking77().train if e.label < 4][::9][: 2 * STEPS]
    data = [{**tokenizer(e.text), "labels": e.label} for e in examples]
    return get_peft_model(model, config), data, DataCollatorWithPadding(tokenizer)


def test_trainer_on_minilm(minilm: Any, tmp_path: Path) -> None:
    """Real weights, quantised as transformers loads them; B is zero at first."""
    peft, data, collator = minilm
    assert len(linears4bit(peft)) == 37
    exact, model = exact_copy(peft), copy_of(peft)
    patch(model, strict=True)
    jobs = {"plain": peft, "patched": model, "exact": exact}
    losses = {
        name: losses_of(m, data, tmp_path, data_collator=collator) for name, m in jobs.items()
    }
    assert_losses_as_good(losses["patched"], losses["plain"], losses["exact"])
    found = report(model)
    assert all(entry.hits == STEPS and not entry.delegations for entry in layers_of(found.fused))
    model.save_pretrained(tmp_path / "patched")
    merged = PeftModel.from_pretrained(peft.unload(), tmp_path / "patched").eval()
    batch = collator(data[:4])
    with torch.no_grad():
        got, expected = merged(**batch).logits, model.eval()(**batch).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# Gradient checkpointing and dropout


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compute", [FLOAT, HALF])
def test_checkpointing(compute: torch.dtype, reentrant: bool) -> None:
    model = qlora("qwen2", compute_dtype=compute)
    peft = checkpointed(copy_of(model), reentrant)
    checkpointed(patch(model, strict=True), reentrant)
    for _ in range(4):
        step_is_as_good(model, peft, inputs_of())
    found = fused_layers(model)
    assert {entry.hits for entry in found} - {4} == {8}  # forward and recomputation
    assert len({entry.siblings for entry in found if entry.siblings}) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_masks_are_drawn_again(reentrant: bool) -> None:
    model = qlora("llama", lora={"lora_dropout": 0.1}, compute_dtype=FLOAT)
    plain = patch(copy_of(model), strict=True).train()
    plain.enable_input_require_grads()
    checkpointed(patch(model, strict=True), reentrant)
    for step in range(4):
        results = []
        for m in (plain, model):
            torch.manual_seed(step)
            results.append(train_step(m, inputs_of()))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_is_the_reference_s() -> None:
    """The same masks from the same seeds, whichever implementation runs; and they do drop."""
    model = qlora("qwen2", lora={"lora_dropout": 0.1}, compute_dtype=FLOAT)
    without = train_step(copy_of(model), inputs_of())
    reference = patch(copy_of(model), impl="reference").train()
    patch(model).train()
    for step in range(3):
        results = []
        for m in (reference, model):
            torch.manual_seed(step)
            results.append(train_step(m, inputs_of()))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.allclose(results[0]["logits"], without["logits"], atol=1e-3)


# torch.compile


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, **settings: Any) -> tuple[Any, list[str], CompileCounterWithBackend]:
    """A compiled model, the ops that its graphs hold, and a counter of them."""
    counter, ops = CompileCounterWithBackend("aot_eager"), []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return counter(graph, examples)

    return torch.compile(model, backend=backend, **settings), ops, counter


def block(compute: torch.dtype, dtype: torch.dtype = FLOAT) -> tuple[Any, Any, Tensor]:
    """An attention block with adapters on q and k, v and o plain, its copy, and an input."""
    torch.manual_seed(0)
    model = Attention("qkvo", compute).to(dtype)
    model = randomise(get_peft_model(model, LoraConfig(r=2, target_modules=["q", "k"])))
    peft, x = copy_of(model), torch.randn(5, 64).to(dtype)
    peft(x)  # casts biases in place, which no graph can
    return patch(model, strict=True), peft, x.requires_grad_()


def gradients(model: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x.grad = None
    y = model(x)
    y.float().pow(2).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "run-before"])
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (FLOAT, HALF), (HALF, HALF)])
def test_one_graph_of_fused_ops(
    dtypes: tuple[torch.dtype, torch.dtype], seen: bool, fresh_compiler: None
) -> None:
    rest, compute = dtypes
    model, peft, x = block(compute, rest)
    if seen:
        for _ in range(2):
            model(x)
    graph, ops, counter = compiled(model, fullgraph=True)
    for _ in range(2):
        pairs = zip(gradients(graph, x), gradients(peft, x), strict=True)
        for got, expected in pairs:
            assert got.dtype == expected.dtype
            limit = 1e-5 if compute == FLOAT else 0.02
            assert (got - expected).abs().max() <= limit * expected.abs().max()
    assert counter.frame_count == 1
    assert sum("peftfast.lora_linear" in op for op in ops) == 2
    assert sum("peftfast.nf4_linear" in op for op in ops) == 2
    assert not any("bitsandbytes" in op for op in ops)
    assert {entry.hits for entry in fused_layers(model)} == {2 if seen else 0}


def test_compiled_models_follow_changes(fresh_compiler: None) -> None:
    """Merging and moving make new parameters and statistics; disabled adapters are PEFT's."""
    model, peft, x = block(FLOAT)
    graph, ops, _ = compiled(model)

    def same(*changes: Callable[[Any], Any]) -> None:
        for change in changes:
            change(model)
            change(peft)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), peft(x), rtol=1e-4, atol=1e-5)

    def roll(m: Any) -> None:
        for linear in linears4bit(m).values():
            linear.weight.data = linear.weight.data.roll(7, 0)

    same()
    with model.disable_adapter(), peft.disable_adapter():
        same()
    same(lambda m: m.merge_adapter())
    same(lambda m: m.unmerge_adapter())
    same(roll)
    torch._dynamo.reset()
    ops.clear()
    same(lambda m: m.to(torch.float64).to(FLOAT))
    assert sum("peftfast.nf4_linear" in op for op in ops) == 2


def test_a_weight_that_no_one_has_looked_at(fresh_compiler: None) -> None:
    """A graph can't look at values: bitsandbytes' own ops are in it, until an eager call has."""
    model, peft, x = block(FLOAT)
    for m in (model, peft):
        for linear in linears4bit(m).values():
            linear.weight.quant_state = copy.copy(linear.weight.quant_state)
    graph, ops, _ = compiled(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), peft(x))
    assert sum("bitsandbytes" in op for op in ops) == 4
    assert not any("peftfast" in op for op in ops)
    with torch.no_grad():
        model(x)
        ops.clear()
        torch.testing.assert_close(graph(x), peft(x))
    assert sum("peftfast" in op for op in ops) == 4


def test_dropout_in_a_graph(fresh_compiler: None) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q", "k"], lora_dropout=0.4)
    model = patch(randomise(get_peft_model(Attention("qkvo", FLOAT), config)), strict=True).train()
    graph, _, counter = compiled(model, fullgraph=True)
    x = torch.randn(5, 64)
    assert not torch.equal(graph(x), graph(x))
    assert counter.frame_count == 1


# Generation


@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (HALF, HALF)])
def test_generate(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rest, compute = dtypes
    lora = {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]}
    model = qlora("qwen2", rest, compute_dtype=compute, lora=lora)
    peft = copy_of(model)
    patch(model, strict=True)
    ids = torch.randint(3, VOCAB, (1, 5))
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True)
    for _ in range(2):
        outputs = [
            m.generate(input_ids=ids, return_dict_in_generate=True, **settings)
            for m in (model, peft)
        ]
        first = [output.logits[0] for output in outputs]
        apart = (first[0] - first[1]).abs().max() / first[1].abs().max()
        assert apart <= (1e-5 if compute == FLOAT else 0.05)
        if compute == FLOAT:
            assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    found = report(model)
    assert all(entry.hits and not entry.delegations for entry in layers_of(found.fused))
    assert {len(entry.siblings) for entry in layers_of(found.fused)} == {0, 2, 3}
    assert not any(entry.note for entry in layers_of(found.fused))


def test_unpatched_in_between() -> None:
    model = qlora("qwen2", compute_dtype=FLOAT)
    peft = copy_of(model)
    for _ in range(2):
        patch(model, strict=True)
        step_is_as_good(model, peft, inputs_of())
        unpatch(model)
        got, expected = train_step(model, inputs_of()), train_step(peft, inputs_of())
        assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_dense_model_beside_it() -> None:
    """Nothing outside of the patched instances changes."""
    quantised, other, dense = qlora(), qlora(), adapted()
    patch(quantised)
    for model in (other, dense):
        before = [type(m) for m in model.modules()]
        assert not fused_layers(model)
        model(**inputs_of())
        assert [type(m) for m in model.modules()] == before
