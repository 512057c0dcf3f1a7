"""The report: what it says, as data and as text."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from peftfast.patching import FusedModule, NotFusedModule, PatchReport, patch, report
from tests.patching.tiny import adapted, inputs_of, layers_of, lora_linears


def example() -> PatchReport:
    model = patch(
        adapted("llama", target_modules=["q_proj", "k_proj", "o_proj", "embed_tokens"]),
        exclude=["layers.1.self_attn.o_proj"],
    )
    for _ in range(2):
        model(**inputs_of())
    with model.disable_adapter():
        model(**inputs_of())
    return report(model)


def test_as_data() -> None:
    found = example()
    base = "base_model.model.model.layers.0.self_attn."
    pair = (base + "q_proj", base + "k_proj")
    assert found.fused[0] == FusedModule(
        path=base + "q_proj", op="lora_linear", impl="auto", memory="recompute", siblings=pair,
        hits=2,
        delegations={"adapters are disabled": 1}, note="",
    )  # fmt: skip
    alone = {entry.path for entry in layers_of(found.fused) if not entry.siblings}
    assert alone == {base + "o_proj"}
    reasons = {entry.path.rpartition("model.")[2]: entry.reasons for entry in found.not_fused}
    assert reasons == {
        "embed_tokens": ("LoRA over Embedding (peft.tuners.lora.layer.Embedding) has no fused op",),
        "layers.1.self_attn.o_proj": ("excluded by 'layers.1.self_attn.o_proj'",),
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.fused = []  # type: ignore[misc]


def test_to_dict_is_plain() -> None:
    found = example()
    data = json.loads(json.dumps(found.to_dict()))
    assert len(data["fused"]) == len(found.fused)
    assert data["fused"][0]["delegations"] == {"adapters are disabled": 1}
    assert data["not_fused"][0]["reasons"] == list(found.not_fused[0].reasons)


def test_as_text() -> None:
    text = str(example())
    assert "\x1b" not in text
    assert "fused (16), memory='recompute'" in text
    assert "not fused (2)" in text
    (row,) = [line.split() for line in text.splitlines() if "layers.*.self_attn.q_proj" in line]
    siblings = ["q_proj", "+", "k_proj"]
    assert row[1:] == [
        "2",
        "lora_linear",
        "auto",
        *siblings,
        "4",
        *"2: adapters are disabled".split(),
    ]
    assert "layers.0.self_attn.o_proj" in text
    assert "excluded by 'layers.1.self_attn.o_proj'" in text
    assert max(map(len, text.splitlines())) <= 165


def test_text_of_odd_paths_and_models() -> None:
    odd = PatchReport(
        [], [NotFusedModule("[red]x[/red]", "a.B", ("why",)), NotFusedModule("", "a.B", ("w",))]
    )
    assert "[red]x[/red]" in str(odd)
    assert "(the model itself)" in str(odd)
    path = ".".join(["block"] * 60)
    text = str(PatchReport([], [NotFusedModule(path, "a.B", ("why",))]))
    assert [path, "1", "a.B", "why"] in [line.split() for line in text.splitlines()]


def test_before_patching() -> None:
    found = report(adapted())
    assert not found.fused
    assert all("peftfast.patch was not called" in "".join(e.reasons) for e in found.not_fused)


def test_reporting_changes_nothing() -> None:
    model = adapted()
    versions = [p._version for p in model.parameters()]
    state = torch.get_rng_state()
    report(model)
    report(patch(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert [p._version for p in model.parameters()] == versions
    assert all(module._peftfast.hits == 0 for module in lora_linears(model).values())
