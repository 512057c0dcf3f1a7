"""Every method on every family: where it lands, what it trains, how it starts, and that it comes
back from disk in another process.
"""

from __future__ import annotations

import copy
import functools
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
from torch import Tensor, nn

from peftfast.methods import (
    AdapterHost,
    CompacterConfig,
    Component,
    HoulsbyConfig,
    MethodConfig,
    ParallelAdapterConfig,
    PfeifferConfig,
    ScaledParallelAdapterConfig,
    UnifiedConfig,
    find_norms,
    hosts,
)
from tests.methods.models import inputs_of, made
from tests.methods.places import EXPECTED, expected_points

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("bert", "roberta", "gpt2", "llama", "qwen3", "t5", "bart", "vit")

_ATTENTION = ("attention_output", "cross_attention_output")
_HEADS = ("attention_heads", "cross_attention_heads")
_FFN = ("ffn_output",)


def houlsby(**options: Any) -> Callable[[], MethodConfig]:
    return lambda: HoulsbyConfig(**{"bottleneck": 4, "train_norms": False, **options})


# A configuration, and the sites that it changes.
METHODS: dict[str, tuple[Callable[[], MethodConfig], tuple[str, ...]]] = {
    "houlsby": (lambda: HoulsbyConfig(bottleneck=4), _ATTENTION + _FFN),
    "attention only": (houlsby(sublayers=["attention"]), _ATTENTION),
    "before the projection": (houlsby(attention_position="before"), _HEADS + _FFN),
    "layer norm": (houlsby(norm="layer"), _ATTENTION + _FFN),
    "batch norm": (houlsby(norm="batch"), _ATTENTION + _FFN),
    "deep": (
        houlsby(depth=2, activation="tanh", norm="rms", norm_position="after"),
        _ATTENTION + _FFN,
    ),
    "multiplied and gated": (houlsby(composition="multiply", gate=True), _ATTENTION + _FFN),
    "pfeiffer": (PfeifferConfig, _FFN),
    "parallel": (lambda: ParallelAdapterConfig(bottleneck=4), _FFN),
    "parallel attention": (
        lambda: ParallelAdapterConfig(bottleneck=4, sublayers=["attention"]),
        _HEADS,
    ),
    "scaled parallel": (lambda: ScaledParallelAdapterConfig(bottleneck=4), _FFN),
    "learned scale": (
        lambda: ScaledParallelAdapterConfig(bottleneck=4, learned_scaling=True),
        _FFN,
    ),
    "compacter": (lambda: CompacterConfig(bottleneck=4), ("attention_output", *_FFN)),
    "unified": (
        lambda: UnifiedConfig(
            components=[
                Component("attention_heads", insertion="parallel", bottleneck=3, init="lora"),
                Component("ffn_output", insertion="parallel", bottleneck=5, scaling=4.0),
                Component("ffn_hidden", form="gelu", bottleneck=2),
            ]
        ),
        ("attention_heads", "ffn_output", "ffn_hidden"),
    ),
}


@functools.cache
def _base(family: str) -> Any:
    return made(family)


def adapted(family: str, config: MethodConfig) -> Any:
    base = copy.deepcopy(_base(family))
    torch.manual_seed(2)
    return peft.get_peft_model(base, config).eval()


def randomised(model: nn.Module) -> None:
    """Random values for all that trains, so that it matters."""
    generator = torch.Generator().manual_seed(3)
    for value in model.parameters():
        if value.requires_grad:
            value.data = torch.randn(value.shape, generator=generator) * 0.2


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    return model(**inputs_of(family)).logits


def expected_places(family: str, method: str) -> set[tuple[str, str]]:
    """The module and the site of every adapter."""
    return {
        (f"{stack.blocks}.{layer}.{expected_points(stack)[site][0]}", site)
        for stack in EXPECTED[family]
        for layer in range(2)
        for site in METHODS[method][1]
        if site in expected_points(stack)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_lands_and_trains_where_it_says(family: str, method: str) -> None:
    model = adapted(family, METHODS[method][0]())
    base = model.base_model.model
    places = {
        (name, placement.component.site)
        for name, host in base.named_modules()
        if isinstance(host, AdapterHost)
        for placement, _ in host.components("default")
    }
    expected = expected_places(family, method)
    assert places == expected

    starts = tuple(f"{name}.peftfast_" for name, _ in expected)
    if model.peft_config["default"].train_norms:
        starts += tuple(f"{name}.modules_to_save." for name in find_norms(base))
    trained = {name for name, value in base.named_parameters() if value.requires_grad}
    of_method = {name for name, _ in base.named_parameters() if name.startswith(starts)}
    assert trained == of_method and all(
        any(name.startswith(start) for name in trained) for start in starts
    )

    randomised(model)
    model.train()
    loss = model(**inputs_of(family)).logits.square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    for name, value in base.named_parameters():
        if name in trained:
            assert value.grad is not None and torch.isfinite(value.grad).all(), name
            assert value.grad.count_nonzero(), name
        else:
            assert value.grad is None, name


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
        if not torch.equal(out, torch.load(folder / "expected.pt")):
            print(path.name, folder.name)
"""


@pytest.mark.slow
def test_comes_back_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *args: None)
    for family in FAMILIES:
        plain = logits(_base(family), family)
        for method, (config, _) in METHODS.items():
            model = adapted(family, config())
            randomised(model)
            expected = logits(model, family)
            assert not torch.allclose(expected, plain)
            folder = tmp_path / family / method
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


# How a method starts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_up_projection_is_the_base_model_exactly(family: str) -> None:
    plain = logits(_base(family), family)
    both: dict[str, Any] = {"sublayers": ["attention", "ffn"]}
    for config in (
        HoulsbyConfig(bottleneck=4, init="zero"),
        HoulsbyConfig(bottleneck=4, init="zero", norm="layer", composition="multiply"),
        ScaledParallelAdapterConfig(bottleneck=4, **both),  # as LoRA starts
        ParallelAdapterConfig(bottleneck=4, attention_position="after", gate=True, **both),
    ):
        assert torch.equal(logits(adapted(family, config), family), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_near_identity_stays_within_what_sigma_implies(family: str) -> None:
    """Weights are at most 2 sigma and |gelu(z)| <= |z|, so that an adapter changes no element by
    more than 4 sigma^2 m |x|_1; and the model's output, by what is sigma^2 times less.
    """
    plain = logits(_base(family).double(), family)
    _base(family).float()
    width, apart = 8, {}
    for sigma in (1e-2, 1e-3):
        config = HoulsbyConfig(bottleneck=width, init_std=sigma, train_norms=False)
        model = adapted(family, config).double()
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(_: Any, args: Any, out: Tensor, seen: list[Any] = seen) -> None:
            seen.append((args[0], out))

        for host in hosts(model):
            (_, adapter) = next(host.components("default"))
            adapter.register_forward_hook(keep)
        apart[sigma] = (logits(model, family) - plain).abs().max().item()
        assert len(seen) == len(hosts(model))
        for x, y in seen:
            bound = 4 * sigma**2 * width * x.abs().sum(-1, keepdim=True)
            assert ((y - x).abs() <= bound).all() and not torch.equal(x, y)
    assert 0 < apart[1e-2] < 0.05 * plain.abs().max()
    assert apart[1e-3] == pytest.approx(apart[1e-2] / 100, rel=0.1)


# How many parameters


def trainable(model: Any, config: MethodConfig, *, norms: bool = False) -> int:
    """Parameters that train, of a model on the meta device."""
    adapters = peft.get_peft_model(model, config)
    return sum(
        value.numel()
        for name, value in adapters.named_parameters()
        if value.requires_grad and (norms or ".peftfast_" in name)
    )


def size(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def on_meta(model: str, config: str, **settings: Any) -> Any:
    with torch.device("meta"):
        return getattr(hf, model)(getattr(hf, config)(**settings))


@pytest.mark.parametrize(("width", "count"), [(8, 835_968), (64, 6_343_680), (256, 25_227_264)])
def test_houlsby_on_bert_large(width: int, count: int) -> None:
    """2md + d + m each, two in each of 24 layers (Houlsby et al., section 2.1)."""
    model = on_meta(
        "BertModel", "BertConfig", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        intermediate_size=4096,
    )  # fmt: skip
    assert (
        trainable(model, HoulsbyConfig(bottleneck=width))
        == count
        == 48 * (2 * width * 1024 + 1024 + width)
    )


def test_pfeiffer_on_bert_base() -> None:
    """Twelve of width 768 / 16: the 894,528 of AdapterHub's documentation."""
    assert trainable(on_meta("BertModel", "BertConfig"), PfeifferConfig()) == 894_528


def test_parallel_on_bart_large() -> None:
    """r = 512 beside the feed-forward networks of all 24 layers (He et al., "FFN PA")."""
    model = on_meta("BartModel", "BartConfig")
    whole = size(model)
    count = trainable(model, ParallelAdapterConfig(bottleneck=512))
    assert count == 24 * (2 * 512 * 1024 + 1024 + 512)
    assert f"{count / whole:.2%}" == "6.20%"


@pytest.mark.parametrize(
    ("config", "count", "share"),
    [
        (
            CompacterConfig(),
            48 * (2 * 4 * (192 + 6) + 24 + 768) + 64 + 62 * 768,
            "0.073%",
        ),
        (
            CompacterConfig(sublayers=["ffn"]),
            24 * (2 * 4 * (192 + 6) + 24 + 768) + 64 + 62 * 768,
            "0.047%",
        ),
    ],
    ids=["compacter", "compacter++"],
)
def test_compacter_on_t5_base(config: MethodConfig, count: int, share: str) -> None:
    """n = 4, rank 1, one A for all; LayerNorms counted (Karimi Mahabadi et al., NeurIPS 2021,
    table 1).
    """
    model = on_meta(
        "T5ForConditionalGeneration", "T5Config", d_model=768, d_ff=3072, num_layers=12,
        num_heads=12,
    )  # fmt: skip
    whole = size(model)
    assert trainable(model, config, norms=True) == count
    assert f"{count / whole:.3%}" == share
