from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from peft.tuners.p_tuning import PromptEncoder

from peftfast.nn.prompt import PromptEmbedding


def prompt(**options: Any) -> PromptEmbedding:
    torch.manual_seed(0)
    return PromptEmbedding(5, 8, **options)


def test_the_rows_start_as_init_says() -> None:
    torch.manual_seed(0)
    uniform = PromptEmbedding(200, 32).rows()
    normal = PromptEmbedding(200, 32, init="normal", init_std=2.0).rows()
    assert uniform.abs().max() <= 0.5 and uniform.std().item() == pytest.approx(
        1 / math.sqrt(12), 0.05
    )
    assert normal.std().item() == pytest.approx(2.0, 0.05)
    awaiting = PromptEmbedding(5, 8, tasks=2, init="embeddings")
    assert awaiting.awaits_rows and not awaiting.rows().any()
    awaiting.start(uniform[:5, :8])
    assert not awaiting.awaits_rows
    assert torch.equal(awaiting.rows(), uniform[:5, :8].repeat(2, 1))


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_encoders_are_those_of_peft(encoder: str) -> None:
    torch.manual_seed(1)
    theirs = PromptEncoder(
        peft.PromptEncoderConfig(
            num_virtual_tokens=5, token_dim=8, num_transformer_submodules=1, encoder_hidden_size=6,
            encoder_reparameterization_type=encoder.upper(),
        )
    )  # fmt: skip
    ours = prompt(encoder=encoder, hidden=6)
    held = theirs.state_dict()
    mapped = {"embedding": held.pop("embedding.weight")}
    for name, value in held.items():
        if name.startswith("lstm_head."):
            mapped[name.replace("lstm_head.", "lstm_")] = value
        else:
            _, index, kind = name.split(".")
            mapped[f"linear_{int(index) // 2}_{kind}"] = value
    ours.load_state_dict({**mapped, "weight": torch.zeros(5, 8)})
    want, got = theirs(torch.arange(5)), ours()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    upstream = torch.randn(5, 8)
    want.backward(upstream)
    got.backward(upstream)
    torch.testing.assert_close(ours.embedding.grad, theirs.embedding.weight.grad)
    torch.testing.assert_close(ours.linear_0_weight.grad, theirs.mlp_head[0].weight.grad)


def test_the_papers_lstm_is_half_as_wide_in_each_direction() -> None:
    made = prompt(encoder="lstm")
    assert made.hidden == 4
    assert made.lstm_weight_ih_l0.shape == (16, 8) and made.lstm_weight_ih_l1.shape == (16, 8)
    assert made.linear_0_weight.shape == (8, 8)
    assert all(value.requires_grad and value.any() for value in made.parameters())


def test_each_task_has_a_prompt_of_its_own() -> None:
    for encoder in (None, "lstm", "mlp"):
        made = prompt(tasks=3, encoder=encoder, init="normal")
        chosen = made(torch.tensor([2, 0, 2]))
        assert chosen.shape == (3, 5, 8)
        assert torch.equal(chosen[0], made.rows()[10:]) and torch.equal(chosen[1], made.rows()[:5])
        assert torch.equal(chosen[0], chosen[2])
    # A task's LSTM reads that task's prompt alone.
    made = prompt(tasks=2, encoder="lstm", init="normal")
    before = made.rows()[:5]
    with torch.no_grad():
        made.embedding[5:] += 1.0
    assert torch.equal(made.rows()[:5], before) and not torch.equal(made.rows()[5:], before)


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_both_forms_of_a_checkpoint_load(encoder: str) -> None:
    made = prompt(encoder=encoder, tasks=2, init="normal")
    with torch.no_grad():
        rows = made.rows()
    saved = made.state_dict()
    torch.testing.assert_close(saved["weight"], rows, rtol=0, atol=0)
    same = PromptEmbedding(5, 8, encoder=encoder, tasks=2)
    same.load_state_dict(saved)
    torch.testing.assert_close(same.rows(), made.rows(), rtol=0, atol=0)
    finished = PromptEmbedding(5, 8, tasks=2)
    finished.load_state_dict(saved)
    assert torch.equal(finished.rows(), saved["weight"])
    without = PromptEmbedding(5, 8, encoder=encoder, tasks=2)
    without.load_state_dict({"weight": rows})
    assert not without.has_encoder and torch.equal(without.rows(), rows)
    assert [name for name, _ in without.named_parameters()] == ["weight"]
    with pytest.raises(RuntimeError, match="Missing key.*linear_0_weight"):
        same.load_state_dict({"embedding": saved["embedding"], "weight": rows})


def test_a_checkpoint_of_another_size_leaves_the_encoder() -> None:
    made = prompt(encoder="lstm")
    before = made.rows()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(4, 8\) .* \(5, 8\) here"):
        made.load_state_dict({"weight": torch.zeros(4, 8)})
    assert made.has_encoder and torch.equal(made.rows(), before)


def test_finalize_keeps_what_the_encoder_makes() -> None:
    made = prompt(encoder="lstm")
    with torch.no_grad():
        rows = made.rows()
    twin = copy.deepcopy(made)
    made.finalize()
    made.finalize()
    assert torch.equal(made.rows(), rows) and not made.has_encoder and twin.has_encoder
    assert list(made.state_dict()) == ["weight"] and made.weight.requires_grad
    assert "encoder" not in repr(made) and "encoder='lstm', hidden=4" in repr(twin)


def test_it_is_made_on_a_device_and_in_a_dtype() -> None:
    made = prompt(encoder="lstm", device="meta", dtype=torch.bfloat16)
    assert made.embedding.is_meta and made.rows().shape == (5, 8)
    assert made.linear_1_bias.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens is 0; it must be at least 1"),
        ({"num_virtual_tokens": 2.0}, TypeError, "num_virtual_tokens is float"),
        ({"tasks": True}, TypeError, "tasks is bool"),
        ({"encoder": "gru"}, ValueError, "encoder is 'gru'; allowed: None, 'mlp', 'lstm'"),
        ({"init": "zeros"}, ValueError, "init is 'zeros'; allowed: 'uniform'"),
        ({"hidden": 3}, ValueError, "hidden is 3, and encoder is None"),
        ({"init": "embeddings", "encoder": "mlp"}, ValueError, "rows can't be chosen"),
        ({"init_std": -1.0}, ValueError, "init_std is -1.0"),
        ({"init_range": "1"}, TypeError, "init_range is str"),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        PromptEmbedding(**{"num_virtual_tokens": 5, "embedding_dim": 8, **options})


def test_wrong_rows_and_tasks_are_named() -> None:
    made = prompt(tasks=2)
    with pytest.raises(ValueError, match="task_ids is None; of 2 tasks"):
        made()
    for wrong in (-1, 2):
        with pytest.raises(IndexError):
            made(torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match=r"task_ids has the shape \(1, 1\)"):
        made(torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"rows has the shape \(4, 8\); \(10, 8\) is needed"):
        made.start(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="the rows come from an encoder"):
        prompt(encoder="mlp").start(torch.zeros(5, 8))
