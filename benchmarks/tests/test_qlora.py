# mypy: disable-error-code="no-untyped-def"
"""Benchmarks of 4-bit weights: their variants on small sizes, and what 4 bits add in bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.baselines import LoraShape
from benchmarks.cases import count_case
from benchmarks.ceilings import Ceilings
from benchmarks.counted import qlora_linear
from benchmarks.models import base_model, token_batches
from benchmarks.plans import plan_forced
from benchmarks.quantised import dense, four_bit_bytes, quantised
from benchmarks.registry import Request
from benchmarks.timed import nf4_dequantize, nf4_linear, train_step_qlora

CPU = torch.device("cpu")
TINY = replace(
    train_step_qlora.SMALL, hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2,
    vocabulary=128, sequence=128,
)  # fmt: skip


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    for module in (nf4_dequantize, nf4_linear, train_step_qlora):
        monkeypatch.setattr(module, "measure_ceilings", lambda *_: Ceilings(1e10, 1e11, "float32"))


def _request(said):
    return Request(CPU, quick=True, deadline=None, say=said.append)


def test_four_bits_add_the_packed_weight_read_and_the_dense_one_written(monkeypatch):
    monkeypatch.setattr(qlora_linear, "SHAPE", LoraShape(128, 128, 128, 16))
    with plan_forced("fused"):
        totals = [
            count_case(qlora_linear.case(variant, torch.float32, 0.0), 1, None)[1].moved
            for variant in (qlora_linear.DENSE, qlora_linear.OURS)
        ]
    added = totals[1] - totals[0]
    assert 0.99 * qlora_linear.budget_bytes() < added <= qlora_linear.budget_bytes()


def test_dequantising_is_timed_only_where_it_is_right(monkeypatch):
    shape = nf4_dequantize.Config(256, 256, torch.bfloat16)
    monkeypatch.setattr(nf4_dequantize, "configs", lambda request: [shape])
    (outcome,) = nf4_dequantize.time(_request([]))
    names = [row["variant"] for row in outcome.rows]
    assert names[0] == "copy" and names[1].startswith("peftfast, ")
    assert {"bitsandbytes", "bitsandbytes, warm buffer"} < set(names)
    assert len(outcome.targets) == 2
    monkeypatch.setattr(
        nf4_dequantize, "variants", lambda *_: {"wrong": lambda w4, out: out.fill_(0)}
    )
    with pytest.raises(nf4_dequantize.GateFailed, match="wrong: the values differ"):
        list(nf4_dequantize.time(_request([])))


def test_a_linear_is_timed_both_ways(monkeypatch):
    configs = [
        nf4_linear.Config(nf4_linear.DECODE, LoraShape(1, 128, 128, 0), torch.bfloat16),
        nf4_linear.Config(nf4_linear.TRAIN, LoraShape(40, 128, 128, 8), torch.bfloat16),
    ]
    monkeypatch.setattr(nf4_linear, "configs", lambda request: configs)
    decode, train = nf4_linear.time(_request([]))
    assert {row["variant"] for row in decode.rows} == {"peftfast", "dense", "bitsandbytes"}
    assert len(train.rows) == 6 and all(row["peak_bytes"] for row in train.rows)


def test_a_training_and_a_decode_step_of_a_quantised_model(monkeypatch):
    config = train_step_qlora.Config(TINY, torch.float32, torch.float32, dropout_p=0.1)
    monkeypatch.setattr(train_step_qlora, "configs", lambda request: [config])
    train, decode = train_step_qlora.time(_request([]))
    for outcome in (train, decode):
        assert [row["variant"] for row in outcome.rows] == ["peftfast", "peft + bitsandbytes"]
    assert train.rows[0]["scratch_bytes"] > 0 and train.rows[1]["scratch_bytes"] == 0


def test_a_dense_copy_holds_the_quantised_values():
    base = quantised(base_model(TINY, torch.bfloat16, CPU), torch.bfloat16)
    (tokens,) = token_batches(TINY, CPU, 1)
    copy = dense(base, torch.bfloat16, torch.float64)
    assert four_bit_bytes(base) > 0 and four_bit_bytes(copy) == 0
    with torch.no_grad():
        ours, exact = base(input_ids=tokens).logits, copy(input_ids=tokens).logits
    assert (ours - exact).norm() < 0.05 * exact.norm()
