"""Training jobs over prefixes: gradient checkpointing with dropout, Trainer and resuming, 4-bit
bases, torch.compile, and adapters that come back in a fresh process."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import Trainer

from peftfast.methods import (
    MAMConfig,
    MethodConfig,
    MultiHeadParallelAdapterConfig,
    PrefixConfig,
    PTuningV2Config,
    UniPELTConfig,
    finalize,
)
from tests.methods.models import inputs_of, made
from tests.methods.test_families import ROOT, logits, randomised
from tests.methods.test_trainer import STEPS, arguments, four_bit, losses
from tests.patching.quantised import linears4bit
from tests.patching.test_training import Sentences
from tests.patching.tiny import VOCAB, decoder

P = 4
METHODS: dict[str, Callable[[], MethodConfig]] = {
    "prefix": lambda: PrefixConfig(
        num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=6, prefix_dropout=0.2
    ),
    "ptuning_v2": lambda: PTuningV2Config(num_virtual_tokens=P, prefix_dropout=0.2),
    "mam": lambda: MAMConfig(num_virtual_tokens=P, bottleneck=4, dropout=0.2, learned_scaling=True),
    "heads": lambda: MultiHeadParallelAdapterConfig(bottleneck=P, dropout=0.2),
    "unipelt": lambda: UniPELTConfig(num_virtual_tokens=P, reduction=8, r=2, prefix_dropout=0.2),
}


def _dropping(family: str) -> Any:
    """A base model with dropout in its attention and elsewhere."""
    torch.manual_seed(0)
    if family == "llama":
        return decoder("LlamaForCausalLM", "LlamaConfig", attention_dropout=0.3)()
    if family == "bert":
        return hf.BertForTokenClassification(
            hf.BertConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=40, num_labels=VOCAB,
                hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.3,
            )
        )  # fmt: skip
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            dropout_rate=0.3, decoder_start_token_id=0,
        )
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any, inputs: dict[str, Tensor], seed: int = 7) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["prefix", "ptuning_v2", "unipelt", "heads"])
def test_gradients_are_the_same_with_checkpointing(family: str, method: str) -> None:
    """Dropout of attention, of prefixes and of the model included."""
    model = peft.get_peft_model(_dropping(family), METHODS[method]())
    randomised(model)
    model.train()
    expected = gradients(model, batch())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert expected.keys() == trained
    assert all(value.abs().max() > 0 for value in expected.values())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = gradients(model, batch())
        for name, value in expected.items():
            if family == "t5" and reentrant:  # gradients of what the encoder gives add up otherwise
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found[name], value), name
    other = gradients(model, batch(), seed=8)
    assert not any(torch.equal(other[name], value) for name, value in expected.items())


@pytest.mark.parametrize("method", ["prefix", "mam"])
def test_checkpointed_training_over_a_4_bit_base_resumes_as_if_never_stopped(
    method: str, tmp_path: Path
) -> None:
    """Where an encoder makes the prefixes, it goes on from the checkpoint too."""

    def job(folder: Path, **settings: Any) -> Trainer:
        model = four_bit(METHODS[method]())
        assert linears4bit(model)
        settings["gradient_checkpointing"] = True
        return Trainer(model, arguments(folder, **settings), train_dataset=Sentences())

    whole = job(tmp_path / "whole")
    whole.train()
    expected = losses(whole)
    assert len(expected) == STEPS and len(set(expected)) == STEPS
    job(tmp_path / "cut", save_strategy="steps", save_steps=3).train()
    resumed = job(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert losses(resumed) == expected
    trained = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
    if method == "prefix":
        assert any(name.endswith(".down_weight") for name in trained)
    again = dict(resumed.model.named_parameters())
    assert trained and all(torch.equal(again[name], value) for name, value in trained.items())


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_compiled_step(family: str) -> None:
    """In one graph."""
    base = made(family).train()
    model = peft.get_peft_model(base, PTuningV2Config(num_virtual_tokens=P, prefix_dropout=0.0))
    randomised(model)
    inputs = inputs_of(family)
    inputs["labels"] = inputs["input_ids"] if family == "llama" else torch.tensor([0, 2])
    expected = gradients(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad(set_to_none=True)
    compiled(**inputs).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_token_and_half_precision(rows: int) -> None:
    """Prefixes stay float32 over a base of 16 bits, as PEFT keeps adapters."""
    base = made("llama").to(torch.bfloat16)
    model = peft.get_peft_model(base, PrefixConfig(num_virtual_tokens=1))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    out = model(input_ids=torch.full((rows, 1), 5)).logits
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    exact = copy.deepcopy(model).double()
    expected = exact(input_ids=torch.full((rows, 1), 5)).logits
    torch.testing.assert_close(out.double(), expected, rtol=3e-2, atol=3e-2)


_LOAD = """
import copy, sys
from pathlib import Path
import peft, torch
import peftfast.methods
from tests.methods.models import inputs_of, made

for path in sorted(Path(sys.argv[1]).iterdir()):
    base = made(path.name)
    for folder in sorted(path.iterdir()):
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        with torch.no_grad():
            out = model(**inputs_of(path.name)).logits
        expected = torch.load(folder / "expected.pt")
        if not torch.allclose(out, expected, rtol=1e-5, atol=1e-6):
            print(path.name, folder.name)
"""


@pytest.mark.slow
def test_comes_back_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the encoder in the checkpoint, and without it after `finalize`."""
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *args: None)
    for family in ("gpt2", "bert", "t5"):
        plain = logits(made(family), family)
        for name, config in METHODS.items():
            model = peft.get_peft_model(made(family), config()).eval()
            randomised(model)
            expected = logits(model, family)
            assert not torch.allclose(expected, plain)
            folder = tmp_path / family / name
            model.save_pretrained(folder)
            torch.save(expected, folder / "expected.pt")
            if name == "prefix":
                finalize(model)
                folder = tmp_path / family / "finished"
                model.save_pretrained(folder)
                torch.save(expected, folder / "expected.pt")
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", f"other outputs after loading: {done.stdout}"
