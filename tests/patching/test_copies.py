"""deepcopy, pickle and torch.save of a patched model, into a fresh process too."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners import lora
from torch import nn

from peftfast.patching import patch, report, unpatch
from tests.patching.tiny import (
    adapted,
    copy_of,
    fused_layers,
    inputs_of,
    lora_linears,
    step_is_as_good,
)

ROOT = Path(__file__).resolve().parents[2]


def reloaded(model: Any, tmp_path: Path) -> Any:
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
}


@pytest.mark.parametrize("how", COPIES)
def test_copy_is_patched_and_independent(how: str, tmp_path: Path) -> None:
    model = adapted("llama", lora_bias=True)
    peft = copy_of(model)
    patch(model, impl="reference")
    for _ in range(3):
        model(**inputs_of()).loss.backward()
    model.zero_grad()
    twin = COPIES[how](model, tmp_path)
    assert {entry.impl for entry in fused_layers(twin)} == {"reference"}
    assert all(entry.hits == 0 for entry in fused_layers(twin))
    for _ in range(3):
        step_is_as_good(twin, peft, inputs_of())
    assert all(entry.hits == 3 for entry in fused_layers(twin))
    assert all(entry.hits == 3 for entry in fused_layers(model))

    unpatch(model)
    assert len(fused_layers(twin)) == 14
    step_is_as_good(twin, peft, inputs_of())
    unpatch(twin)
    assert all(type(module) is lora.Linear for module in lora_linears(twin).values())
    step_is_as_good(twin, peft, inputs_of())


def test_copied_while_an_output_waits() -> None:
    model = patch(adapted())
    model(**inputs_of())
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(2, 32, requires_grad=True)
    attention.q_proj(x)
    waiting = attention.q_proj(x)  # k's and v's outputs wait, with a graph that can't be copied
    twin = copy.deepcopy(attention)
    torch.testing.assert_close(twin.q_proj(x), waiting)
    pickle.dumps(attention)


def test_what_was_left_alone_is_so_in_the_copy() -> None:
    model = patch(adapted(), exclude=["q_proj"])
    twin = copy.deepcopy(model)
    assert report(twin).not_fused == report(model).not_fused


def test_a_fresh_process(tmp_path: Path) -> None:
    model = patch(adapted())
    model(**inputs_of())
    with torch.no_grad():
        expected = model(**inputs_of()).logits
    torch.save((model, inputs_of(), expected), tmp_path / "all.pt")
    script = (
        "import torch\n"
        f"model, inputs, expected = torch.load({str(tmp_path / 'all.pt')!r}, weights_only=False)\n"
        "with torch.no_grad():\n"
        "    got = model(**inputs).logits\n"
        "torch.testing.assert_close(got, expected)\n"
        "from peftfast.patching import report, unpatch\n"
        "found = report(model).fused\n"
        "assert len(found) == 25, len(found)\n"
        "assert all(entry.hits == 1 for entry in found if entry.op != 'linear_cross_entropy')\n"
        "unpatch(model)\n"
        "assert not report(model).fused\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_importing_needs_neither_peft_nor_transformers() -> None:
    script = (
        "import sys\n"
        "import peftfast.patching\n"
        "loaded = {'peft', 'transformers', 'accelerate', 'rich'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_data_parallel_replicas() -> None:
    """Replicas as DataParallel makes them: plain tensors for parameters, records shared."""
    model = patch(adapted())
    module = next(iter(lora_linears(model).values()))
    peft = unpatch(copy_of(model))
    original = next(iter(lora_linears(peft).values()))

    def replicate(source: nn.Module) -> nn.Module:
        replica = source._replicate_for_data_parallel()
        for name, child in source._modules.items():
            replica._modules[name] = None if child is None else replicate(child)
        for name, parameter in source._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1.0)
        return replica

    x = torch.randn(3, 32)
    y = replicate(module)(x)
    torch.testing.assert_close(y, original(x))
    y.sum().backward()
    assert module.lora_B["default"].weight.grad is not None
    assert {entry.path: entry.delegations for entry in fused_layers(module)} == {"": {}}
