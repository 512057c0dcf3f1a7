"""A user's own method, as the example declares it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch.nn import functional as F

from peftfast.methods import MethodConfig, hosts, method_names, register_method
from tests.patching.tiny import FAMILIES

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_method.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    specification = importlib.util.spec_from_file_location("own_method", EXAMPLE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["own_method"] = module  # where pickles look for the class
    specification.loader.exec_module(module)
    return module


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(FAMILIES["llama"].make(), config).eval()


def test_it_takes_at_most_thirty_lines(example: ModuleType) -> None:
    lines = inspect.getsource(example.TwinConfig).splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


def test_it_computes_what_it_declares(example: ModuleType) -> None:
    model = model_of(example.TwinConfig(width=5, rank=2))
    places = {host.block.position: 0 for host in hosts(model) if host.block is not None}
    for host in hosts(model):
        places[host.block.position] += 1
        ((placement, adapter),) = host.components("default")
        for value in adapter.parameters():
            torch.nn.init.normal_(value)
        if placement.component.site.startswith("attention"):
            x = torch.randn(2, 32)
            expected = host.base_layer(x) + x @ adapter.down_weight.T @ adapter.up_weight.T
            torch.testing.assert_close(host(x), expected)
        else:
            x = torch.randn(2, 3, 32)
            hidden = F.silu(F.linear(x, adapter.down_weight, adapter.down_bias))
            delta = F.linear(hidden, adapter.up_weight, adapter.up_bias) * adapter.scaling_factor
            torch.testing.assert_close(adapter(x, residual=False), delta)
    assert places == {0: 3, 1: 3}


def test_it_is_saved_under_its_name(example: ModuleType, tmp_path: Path) -> None:
    model = model_of(example.TwinConfig())
    for value in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["method"] == "twin"
    again = peft.PeftModel.from_pretrained(FAMILIES["llama"].make(), tmp_path)
    assert type(again.peft_config["default"]) is example.TwinConfig
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert all(torch.equal(again.get_parameter(name), value) for name, value in trained)


def test_without_its_module_the_error_names_it(example: ModuleType, tmp_path: Path) -> None:
    model_of(example.TwinConfig()).save_pretrained(tmp_path)
    program = f"import peft, peftfast.methods\npeft.PeftConfig.from_pretrained({str(tmp_path)!r})\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "'twin', which is not registered. Import the module that declares it" in done.stderr


def test_a_name_is_taken_once(example: ModuleType) -> None:
    assert "twin" in method_names()
    with pytest.raises(ValueError, match="already TwinConfig's"):
        register_method("twin")(type("Other", (MethodConfig,), {}))
    with pytest.raises(ValueError, match="lower case"):
        register_method("Not-a-name")(type("Other", (MethodConfig,), {}))
