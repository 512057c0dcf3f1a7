"""nn.NF4Linear, nn.LoRALinear over it, and the LoftQ and PiSSA initialisations."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftfast.nn import LoRALinear, NF4Linear, loftq_init, pissa_init
from peftfast.ops import nf4

IN, OUT = 128, 40


def _linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(IN, OUT, dtype=dtype)


def _parts(module: NF4Linear) -> list[Tensor]:
    return module.weight.parts


def _same(one: NF4Linear, other: NF4Linear) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_parts(one), _parts(other), strict=True))


@pytest.mark.parametrize("double_quant", [True, False])
def test_forward_is_the_linear_over_the_dequantised_weight(double_quant: bool) -> None:
    linear, x = _linear(), torch.randn(2, 20, IN)
    module = NF4Linear.from_linear(linear, double_quant=double_quant)
    weight = nf4.dequantize(module.weight)
    assert (weight - linear.weight).norm() < 0.15 * linear.weight.norm()
    expected = nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.dequantize()(x), expected)
    assert module.bias is linear.bias


def test_the_state_dict_is_bitsandbytes_own(tmp_path: Path) -> None:
    linear = _linear(torch.bfloat16)
    ours = NF4Linear.from_linear(linear)
    theirs = bnb.nn.Linear4bit(
        IN, OUT, quant_type="nf4", compute_dtype=torch.bfloat16, device="meta"
    )
    theirs.weight = bnb.nn.Params4bit(linear.weight.detach(), quant_type="nf4", module=theirs)
    theirs.bias = linear.bias
    theirs = theirs.to("cpu")
    saved, expected = ours.state_dict(), theirs.state_dict()
    assert set(saved) == set(expected)
    for name, value in expected.items():
        assert torch.equal(saved[name], value), name

    save_file(expected, tmp_path / "theirs.safetensors")
    loaded = NF4Linear(IN, OUT, dtype=torch.bfloat16)
    loaded.load_state_dict(load_file(tmp_path / "theirs.safetensors"))
    assert _same(loaded, ours)
    statistics = {k[7:]: v for k, v in saved.items() if k.startswith("weight.")}
    restored = bnb.nn.Params4bit.from_prequantized(saved["weight"], statistics, device="cpu")
    dense = bnb.functional.dequantize_4bit(restored.data, restored.quant_state)
    assert torch.equal(dense, nf4.dequantize(ours.weight))


def test_loading_copies() -> None:
    module, other = NF4Linear(IN, OUT), NF4Linear(IN, OUT)
    state = other.state_dict()
    module.load_state_dict(state)
    state["weight"].zero_()
    assert module.packed.any()


def _resettle(state: dict[str, Tensor], **changes: Any) -> None:
    """Change the settings in a state_dict."""
    key = "weight.quant_state.bitsandbytes__nf4"
    settings = json.loads(bytes(state[key].tolist())) | changes
    state[key] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("weight"), "Missing key"),
        (lambda s: s.pop("weight.quant_map"), "quant_map is missing"),
        (lambda s: s.pop("weight.nested_absmax"), "nested_absmax is missing"),
        (lambda s: s.update({"weight.absmax": s["weight.absmax"][:-1]}), "absmax is"),
        (lambda s: s.update({"weight": s["weight"][1:]}), "packed is"),
        (lambda s: s["weight.quant_map"].mul_(2), "not the table of nf4"),
        (lambda s: s["weight.nested_absmax"].fill_(float("nan")), "nested_absmax is not finite"),
        (lambda s: s["weight.nested_quant_map"].neg_(), "not an ascending table"),
        (lambda s: s["weight.quant_state.bitsandbytes__nf4"].fill_(255), "holds no JSON"),
        (lambda s: s.update(NF4Linear(IN, 2 * OUT).state_dict()), "is needed"),
        (lambda s: _resettle(s, blocksize=64.0), "block_size is 64.0"),
        (lambda s: _resettle(s, shape=[-40, -128]), "can't be negative"),
        (lambda s: s.pop("weight.quant_state.bitsandbytes__nf4"), "a dense weight has none"),
    ],
)
def test_a_damaged_state_changes_nothing(spoil: Any, message: str) -> None:
    module = NF4Linear(IN, OUT, bias=False)
    before = copy.deepcopy(module)
    state = {k: v.clone() for k, v in NF4Linear(IN, OUT, bias=False).state_dict().items()}
    spoil(state)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    assert _same(module, before)


def test_moving_and_casting_leave_the_statistics_alone() -> None:
    module = NF4Linear.from_linear(_linear())
    before = [part.clone() for part in _parts(module)]
    module.half()
    assert module.bias.dtype == torch.float16
    for part, old in zip(_parts(module), before, strict=True):
        assert part.dtype == old.dtype and torch.equal(part, old)
    module.to("meta")
    assert all(part.is_meta for part in _parts(module)) and module.bias.is_meta
    module.to_empty(device="cpu")
    assert [part.shape for part in _parts(module)] == [part.shape for part in before]


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_a_move_that_fails_changes_nothing(where: str) -> None:
    module, x = NF4Linear.from_linear(_linear()), torch.randn(3, IN)
    y = module(x)

    def fail(tensor: Tensor) -> Tensor:
        if (tensor.dtype == torch.uint8) == (where == "weight"):
            raise RuntimeError("out of memory")
        return tensor

    with pytest.raises(RuntimeError, match="out of memory"):
        module._apply(fail)
    assert torch.equal(module(x), y)


def test_a_cast_of_everything_spares_the_weight() -> None:
    module = NF4Linear.from_linear(_linear())
    before = [part.clone() for part in _parts(module)]
    module.type(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(_parts(module), before, strict=True))


def test_loading_with_assign_takes_the_tensors_and_their_device() -> None:
    state = NF4Linear(IN, OUT).state_dict()
    with torch.device("meta"):
        module = NF4Linear(IN, OUT)
    module.load_state_dict(state, assign=True)
    assert module.packed.data_ptr() == state["weight"].data_ptr()
    assert not any(part.is_meta for part in _parts(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loading_does_not_hang_on_the_default_dtype(dtype: torch.dtype) -> None:
    module, other = NF4Linear(IN, OUT), NF4Linear(IN, OUT)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            state = other.state_dict()
        module.load_state_dict(state)
    finally:
        torch.set_default_dtype(torch.float32)
    assert _same(module, other)


def test_copies_and_pickles() -> None:
    module, x = NF4Linear.from_linear(_linear()), torch.randn(3, IN)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert other.packed.data_ptr() != module.packed.data_ptr()


def test_compute_dtype() -> None:
    linear, x = _linear(), torch.randn(20, IN)
    module = NF4Linear.from_linear(linear, compute_dtype=torch.bfloat16)
    y = module(x)
    assert y.dtype == torch.float32
    weight = nf4.dequantize(module.weight, torch.bfloat16)
    rounded = nn.functional.linear(
        x.bfloat16().double(), weight.double(), linear.bias.bfloat16().double()
    )
    torch.testing.assert_close(y.double(), rounded, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NF4Linear.from_linear(nn.Conv1d(2, 2, 1)), TypeError, "Conv1d"),
        (lambda: NF4Linear(8, 8, block_size=48), ValueError, "block_size is 48"),
        (lambda: NF4Linear(8, 8, quant_type="int4"), ValueError, "quant_type is 'int4'"),
        (lambda: NF4Linear(8, 8, compute_dtype=torch.int8), TypeError, "compute_dtype"),
        (lambda: NF4Linear(8, 8, impl="fast"), ValueError, "impl is 'fast'"),
        (lambda: NF4Linear(8, 8, dtype=torch.float64), TypeError, "w is torch.float64"),
        (lambda: NF4Linear.from_weight(torch.zeros(2, 2)), TypeError, "weight is Tensor"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def _lora(**options: Any) -> LoRALinear:
    module = LoRALinear.from_linear(NF4Linear.from_linear(_linear()), 4, alpha=8, **options)
    nn.init.normal_(module.lora_b, std=0.1)
    return module


def test_lora_over_four_bits() -> None:
    module, x = _lora(), torch.randn(2, 20, IN, requires_grad=True)
    assert isinstance(module.base, NF4Linear)
    weight = nf4.dequantize(module.base.weight)
    delta = x @ module.lora_a.t() @ module.lora_b.t() * 2.0
    y = module(x)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, module.base.bias) + delta)
    y.sum().backward()
    assert module.lora_a.grad is not None and x.grad is not None
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]


def test_lora_over_four_bits_merges_and_unmerges_exactly() -> None:
    module, x = _lora(), torch.randn(20, IN)
    y, state = module(x), {k: v.clone() for k, v in module.state_dict().items()}
    dense = module.dequantize_merged()
    torch.testing.assert_close(dense(x), y, rtol=1e-5, atol=1e-5)
    module.merge()
    assert module.base is not None and module.base.weight.nested
    assert (module(x) - y).norm() < 0.15 * y.norm()
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name
    with pytest.raises(RuntimeError, match="can't load a state_dict"):
        module.load_state_dict(state)
    module.unmerge()
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("scaling", [2.0, 0.25, -1.5])
@pytest.mark.parametrize("niter", [None, 8])
def test_initialisations_honour_the_scaling(scaling: float, niter: int | None) -> None:
    """The loss of the sum is that of the truncated decomposition, whatever the scaling."""
    w = torch.randn(48, 128) * 0.1
    plain = w - nf4.dequantize(nf4.quantize(w))
    for init in (loftq_init, pissa_init):
        quantised, a, b = init(w, 8, scaling=scaling, niter=niter)
        assert a.shape == (8, 128) and b.shape == (48, 8)
        left = w - nf4.dequantize(quantised) - scaling * (b @ a)
        assert left.norm() < 0.9 * plain.norm()
    tail = torch.linalg.svdvals(plain.double())[8:].norm()
    quantised, a, b = loftq_init(w, 8, scaling=scaling)
    left = (w - nf4.dequantize(quantised)).double() - scaling * (b.double() @ a.double())
    torch.testing.assert_close(left.norm(), tail, rtol=1e-5, atol=0.0)


def test_loftq_iterations_lower_the_loss() -> None:
    w = torch.randn(48, 128) * 0.1

    def loss(iterations: int) -> Tensor:
        quantised, a, b = loftq_init(w, 8, scaling=2.0, iterations=iterations)
        return (w - nf4.dequantize(quantised) - 2.0 * (b @ a)).norm()

    assert loss(5) < loss(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 49}, "rank is 49"),
        ({"scaling": 0.0}, "scaling is 0"),
        ({"scaling": float("nan")}, "scaling is nan"),
        ({"weight": torch.randn(4)}, r"weight is \[4\]"),
    ],
)
def test_bad_initialisations(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"weight": torch.randn(48, 64), "rank": 4, "scaling": 1.0}
    for init in (loftq_init, pissa_init):
        with pytest.raises(ValueError, match=message):
            init(**(arguments | changes))
    with pytest.raises(ValueError, match="iterations is 0"):
        loftq_init(torch.randn(8, 8), 2, scaling=1.0, iterations=0)
