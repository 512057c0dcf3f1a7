"""Heads whose loss needs no logits: against the unpatched model, and when that is not for them."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfast.memory import peak_bytes, saved_bytes
from peftfast.patching import head, patch, unpatch
from peftfast.patching.deferred_logits import DeferredLogits
from tests.patching.heads import joined, made, padded, pair, record, same_gradients
from tests.patching.tiny import FAMILIES, VOCAB, adapted, assert_as_good, copy_of, inputs_of

LANGUAGE_MODELS = [f for f, recipe in FAMILIES.items() if not recipe.classifies]


def loss_and_gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `train_step`, without a look at the logits."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def as_good(model: Any, plain: Any, inputs: dict[str, Tensor]) -> None:
    exact = loss_and_gradients(copy_of(plain).double(), inputs)
    assert_as_good(loss_and_gradients(model, inputs), loss_and_gradients(plain, inputs), exact)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_every_family(family: str) -> None:
    model, plain = pair(family)
    as_good(model, plain, padded(family))
    assert record(model).fused == 1 and record(model).made == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(family: str, dtype: torch.dtype) -> None:
    plain = adapted(family).to(dtype)
    model = joined(copy_of(plain))
    as_good(model, plain, padded(family))
    assert record(model).fused == 1 and record(model).made == 0


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcap_logit_scale_and_bias(name: str, dtype: torch.dtype) -> None:
    model, plain = made(name)
    as_good(model.to(dtype), plain.to(dtype), padded())
    assert record(model).fused == 1 and record(model).made == 0


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_the_logits_are_the_models_own(family: str) -> None:
    model, plain = pair(family)
    inputs = inputs_of(family)
    output, expected = model(**inputs), plain(**inputs)
    assert isinstance(output.logits, DeferredLogits)
    assert output.logits.shape == expected.logits.shape
    assert output.logits.dtype == expected.logits.dtype
    assert record(model).made == 0
    torch.testing.assert_close(output.logits.detach() * 1, expected.logits.detach())
    assert record(model).made == 1
    torch.testing.assert_close(output.loss, expected.loss)


def test_a_loss_and_a_regulariser_of_the_logits() -> None:
    model, plain = pair()
    inputs = padded()
    for m in (model, plain):
        output = m(**inputs)
        regulariser = output.logits.float().logsumexp(-1).pow(2).mean()
        (output.loss + 0.5 * regulariser).backward()
    same_gradients(model, plain)
    assert record(model).fused == 1 and record(model).made == 1


def test_logits_alone() -> None:
    model, plain = pair()
    inputs = padded()
    for m in (model, plain):
        m(**inputs).logits.softmax(-1)[..., 0].sum().backward()
    same_gradients(model, plain)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapter_on_the_head(dropout: float) -> None:
    model, plain = pair(target_modules=["q_proj", "lm_head"], lora_dropout=dropout)
    inputs = padded()
    as_good(model, plain, inputs)
    assert record(model).fused == 1
    model.train()

    model.zero_grad()
    output = model(**inputs)
    logits, labels = output.logits[:, :-1] + 0.0, inputs["labels"][:, 1:]
    real = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))
    torch.testing.assert_close(real, output.loss)  # the loss and the logits see one mask
    output.loss.backward(retain_graph=True)
    fused = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    real.backward()
    assert any("lm_head.lora_A" in name for name in fused)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, fused[name], rtol=1e-4, atol=1e-6)


def test_logits_read_after_the_adapters_step_are_those_of_the_forward() -> None:
    model, plain = pair(target_modules=["q_proj", "lm_head"])
    inputs = padded()
    expected = plain(**inputs).logits
    output = model(**inputs)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(output.logits + 0, expected)


def test_a_changed_head_raises_rather_than_misleads() -> None:
    model, _ = pair()
    output = model(**padded())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        output.logits.sum()


@pytest.mark.parametrize("labels", ["none", "all"])
def test_labels_that_ignore(labels: str) -> None:
    model, plain = pair()
    inputs = inputs_of()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    if labels == "none":
        inputs["labels"][0, 3] = 5
    for m in (model, plain):
        m(**inputs).loss.backward()
    torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss, equal_nan=True)
    same_gradients(model, plain)


@pytest.mark.parametrize("number", [17, torch.tensor(17)])
def test_num_items_in_batch(number: Any) -> None:
    model, plain = pair()
    inputs = padded()
    for m in (model, plain):
        m(**inputs, num_items_in_batch=number).loss.backward()
    same_gradients(model, plain)
    assert record(model).fused == 1 and record(model).made == 0


def test_autocast() -> None:
    model, plain = pair()
    inputs = padded()
    losses = []
    for m in (model, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = m(**inputs)
        losses.append(output.loss)
        output.loss.backward()
        assert output.logits.dtype == torch.bfloat16
    assert losses[0].dtype == losses[1].dtype
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        for m in (model, plain)
    )
    assert (ours - theirs).norm() / theirs.norm() < 0.05


def test_logits_read_after_autocast_has_ended() -> None:
    model, _ = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, other = model(**padded()), model(**padded())
        inside = output.logits + 0
    assert torch.equal(other.logits + 0, inside)


def test_no_labels_no_deferral() -> None:
    model, plain = pair()
    inputs = inputs_of()
    del inputs["labels"]
    output = model(**inputs)
    assert type(output.logits) is Tensor
    torch.testing.assert_close(output.logits, plain(**inputs).logits)
    assert record(model).fused == record(model).made == 0


def test_nothing_deferred_leaves_without_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    base = model.get_base_model()
    monkeypatch.setattr(base, "_loss_function", lambda **_: None, raising=False)
    output = model(**inputs_of())
    assert output.loss is None and type(output.logits) is Tensor
    output.logits.sum().backward()
    plain(**inputs_of()).logits.sum().backward()
    same_gradients(model, plain)


def test_tuples_and_positional_labels() -> None:
    model, plain = pair("gpt2")
    inputs = inputs_of("gpt2")
    loss, logits, *_ = model(**inputs, return_dict=False)
    expected = plain(**inputs)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(logits + 0, expected.logits)
    assert record(model).fused == 1
    assert model(**inputs).to_tuple()[0] == loss


def test_a_models_own_exception_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    base = model.get_base_model()

    def fails(**_: Any) -> Tensor:
        raise KeyError("mine")

    with monkeypatch.context() as patched:
        patched.setattr(base, "_loss_function", fails, raising=False)
        with pytest.raises(KeyError, match="mine"):
            model(**inputs_of())
    hidden = torch.randn(2, 3, 32)
    assert type(base.lm_head(hidden)) is Tensor


def test_two_models_in_two_threads() -> None:
    model, plain = pair()
    inputs = inputs_of()
    without = {k: v for k, v in inputs.items() if k != "labels"}
    kinds: dict[str, set[type]] = {"labels": set(), "none": set()}

    def run(name: str, given: dict[str, Tensor]) -> None:
        for _ in range(10):
            kinds[name].add(type(model(**given).logits))

    threads = [
        threading.Thread(target=run, args=args) for args in (("labels", inputs), ("none", without))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kinds == {"labels": {DeferredLogits}, "none": {Tensor}}


def test_evaluation_without_gradients() -> None:
    model, plain = pair()
    with torch.no_grad():
        output, expected = model(**inputs_of()), plain(**inputs_of())
    torch.testing.assert_close(output.loss, expected.loss)
    assert not output.logits.requires_grad and record(model).fused == 1
    with torch.inference_mode():
        assert type(model(**inputs_of()).logits) is Tensor
    assert record(model).plain == {"in inference mode": 1}


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_whole_model_checkpointed(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, plain = pair()
    inputs = padded()
    for m in (model, plain):
        m.enable_input_require_grads()
        embeds = m.get_input_embeddings()(inputs["input_ids"]).requires_grad_()

        def run(x: Tensor, m: Any = m) -> Tensor:
            return m(inputs_embeds=x, labels=inputs["labels"]).loss

        checkpoint(run, embeds, use_reentrant=reentrant).backward()
    same_gradients(model, plain)
    assert record(model).fused >= 1 and record(model).made == 0


def test_gradient_checkpointing() -> None:
    model, plain = pair()
    for m in (model, plain):
        m.train()
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        m(**padded()).loss.backward()
    same_gradients(model, plain)


def test_copies_and_pickles_defer_on_their_own() -> None:
    model, plain = pair()
    model(**padded())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert record(other).fused == 0
        as_good(other, plain, padded())
        assert record(other).fused == 1 and record(model).fused == 1


def hooks_of(module: nn.Module) -> tuple[list[int], list[int]]:
    return list(module._forward_hooks), list(module._forward_pre_hooks)


def test_leave_gives_back_the_same_objects() -> None:
    plain = adapted()
    model = copy_of(plain)
    before = {n: (m, type(m), set(vars(m))) for n, m in model.named_modules()}
    hooks = {
        n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
    joined(model)
    names = set(model.state_dict())
    head.leave(model)
    unpatch(model)
    for name, module in model.named_modules():
        assert (module, type(module), set(vars(module))) == before[name], name
        assert hooks_of(module) == hooks[name]
    assert names == set(model.state_dict())
    output = model(**inputs_of())
    assert type(output.logits) is Tensor


def test_generate() -> None:
    model, plain = pair()
    model(**padded()).loss.backward()
    inputs = inputs_of()
    del inputs["labels"]
    settings: dict[str, Any] = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**inputs, **settings), plain.generate(**inputs, **settings))


def test_an_adapter_added_to_the_head_later() -> None:
    from peft import LoraConfig

    model, _ = pair()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter("other")
    assert model(**padded()).loss.isfinite()
    joined(model)
    assert not [row for row in head.entries(model)[1]]
    model(**padded()).loss.backward()
    assert record(model).fused == 1


def reason(model: nn.Module) -> str:
    (row,) = head.entries(model)[1]
    assert head.entries(model)[0] == []
    return row.reasons[0]


def test_what_is_not_for_this_op() -> None:
    assert "trained (modules_to_save)" in reason(joined(adapted(modules_to_save=["lm_head"])))
    trained = adapted()
    trained.get_output_embeddings().weight.requires_grad_()
    assert "is trained" in reason(joined(trained))
    hooked = adapted()
    hooked.get_output_embeddings().register_forward_hook(lambda *_: None)
    assert "has hooks" in reason(joined(hooked))
    replaced = adapted()
    lm_head = replaced.get_output_embeddings()
    lm_head.forward = lambda x: nn.functional.linear(x, lm_head.weight)
    assert "forward of its own" in reason(joined(replaced))
    kept = adapted()
    head.join(patch(kept), memory="keep")
    (row,) = head.entries(kept, memory="keep")[1]
    assert "memory='keep'" in row.reasons[0]
    left = adapted()
    head.join(patch(left), left={"base_model.model.lm_head": "excluded by 'lm_head'"})
    assert "excluded by 'lm_head'" in reason(left)
    assert head.entries(joined(adapted("bert"))) == ([], [])


@pytest.mark.parametrize("change", ["trained", "hook"])
def test_what_changes_after_the_patch(change: str) -> None:
    model, plain = pair()
    for m in (model, plain):
        lm_head = m.get_output_embeddings()
        if change == "trained":
            lm_head.weight.requires_grad_()
        else:
            lm_head.register_forward_hook(lambda module, args, output: output * 2)
        m(**padded()).loss.backward()
    same_gradients(model, plain)
    assert record(model).fused == 0 and sum(record(model).plain.values()) == 1


def test_a_bare_model() -> None:
    plain = FAMILIES["qwen2"].make().eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    plain.model.norm.weight.requires_grad_()
    model = copy_of(plain)
    head.join(model)
    for m in (model, plain):
        m(**inputs_of()).loss.backward()
    same_gradients(model, plain)
    assert record(model).fused == 1


@pytest.mark.slow
def test_no_logits_in_memory() -> None:
    """Hidden 256, vocabulary 16000, 512 tokens, bfloat16."""
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    config = hf.LlamaConfig(
        vocab_size=16000, hidden_size=256, intermediate_size=512, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    plain = get_peft_model(
        hf.LlamaForCausalLM(config).bfloat16(), LoraConfig(r=4, target_modules=["q_proj"])
    )
    model = joined(copy_of(plain))
    ids = torch.randint(3, 16000, (2, 256))
    logits = 512 * 16000 * 2

    def step(m: Any) -> None:
        m(input_ids=ids, labels=ids).loss.backward()

    with_logits, without = (
        saved_bytes(lambda m=m: m(input_ids=ids, labels=ids).loss, exclude=m)
        for m in (plain, model)
    )
    assert with_logits - without > 2 * logits
    step(model)  # the scratch buffer is there from now on
    assert peak_bytes(lambda: step(plain)) > 5 * logits
    assert peak_bytes(lambda: step(model)) < 2.6 * logits


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("items", [None, 11])
def test_a_compiled_step_makes_no_logits_for_its_loss(targets: list[str], items: Any) -> None:
    model, plain = pair(target_modules=targets)
    inputs = padded()
    called = []

    def backend(graph: Any, example: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def loss(m: Any) -> Tensor:
        return m(**inputs, num_items_in_batch=items).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for run in (compiled, loss):
        m = model if run is compiled else plain
        run(m).backward()
    same_gradients(model, plain)
    assert sum("linear_cross_entropy" in name for name in called) == 1
    assert not any("log_softmax" in name or "function cross_entropy" in name for name in called)


@pytest.mark.slow
def test_a_compiled_model_gives_its_logits() -> None:
    model, plain = pair()
    inputs = padded()
    torch._dynamo.reset()
    output, expected = torch.compile(model, fullgraph=True)(**inputs), plain(**inputs)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for found in (output, expected):
        (found.loss + found.logits.pow(2).mean()).backward()
    same_gradients(model, plain)
