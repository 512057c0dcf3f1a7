"""A linear over a 4-bit weight: few rows (decoding), and forward + backward under an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import LoraOperands, LoraShape, lora_operands
from benchmarks.cases import short
from benchmarks.ceilings import Ceilings, Floor, cache_bytes, measure_ceilings
from benchmarks.gates import NAMES, Gate, gate
from benchmarks.quantised import bnb_parameter
from benchmarks.registry import Outcome, Request, Row, timed
from benchmarks.targets import Target
from benchmarks.timing import back_to_back, interleaved
from peftfast.memory import peak_bytes
from peftfast.ops import lora_linear, nf4
from peftfast.ops.nf4_weight import Weight

OURS, BNB, DENSE = "peftfast", "bitsandbytes", "dense"
DECODE, TRAIN = "forward", "forward + backward"
HEADLINE_DECODE = (1, 4096, 14336)
HEADLINE_TRAIN = LoraShape(8192, 4096, 4096, 16)

Call = Callable[[int], object]


@dataclass(frozen=True)
class Config:
    """Rows, sizes, dtype, and what is done: `DECODE`, or `TRAIN` with an adapter of `rank`."""

    mode: str
    shape: LoraShape
    dtype: torch.dtype

    def as_dict(self) -> Row:
        """The fields, for JSON."""
        return {"mode": self.mode, **self.shape.as_dict(), "dtype": short(self.dtype)}

    @property
    def title(self) -> str:
        """The configuration in a line."""
        return ", ".join(f"{key} {value}" for key, value in self.as_dict().items())


def configs(request: Request) -> list[Config]:
    """The headline shapes first."""
    if request.device.type == "cpu":
        decode = [LoraShape(1, 4096, 4096, 0)]
        train = [LoraShape(128, 1024, 1024, 16)]
        if not request.quick:
            decode += [LoraShape(4, 4096, 4096, 0)]
            train += [LoraShape(512, 1024, 2816, 16)]
        dtypes = [torch.bfloat16, torch.float32]
    else:
        decode, train = [LoraShape(1, 4096, 14336, 0)], [HEADLINE_TRAIN]
        if not request.quick:
            decode += [LoraShape(m, 4096, 4096, 0) for m in (1, 2, 4, 8, 16)]
            decode += [LoraShape(1, 14336, 4096, 0), LoraShape(8, 4096, 14336, 0)]
            train += [LoraShape(2048, 4096, 4096, 16), LoraShape(8192, 4096, 14336, 16)]
        dtypes = [torch.bfloat16]
    found = [Config(DECODE, shape, dtype) for shape in decode for dtype in dtypes]
    return found + [Config(TRAIN, shape, dtype) for shape in train for dtype in dtypes]


@timed("nf4_linear", "a 4-bit linear: few rows; forward + backward under an adapter")
def time(request: Request) -> Iterator[Outcome]:
    """peftfast, bitsandbytes (with an adapter: PEFT over it), and the dense linear."""
    ceilings: dict[torch.dtype, Ceilings] = {}
    for config in configs(request):
        if request.expired(config.title):
            return
        if config.dtype not in ceilings:
            ceilings[config.dtype] = measure_ceilings(request.device, config.dtype)
        measure = _decode if config.mode == DECODE else _train
        yield measure(config, request, ceilings[config.dtype])


def _decode(config: Config, request: Request, ceilings: Ceilings) -> Outcome:
    device, shape = request.device, config.shape
    operands = lora_operands(
        LoraShape(shape.rows, shape.in_features, shape.out_features, 1),
        config.dtype, config.dtype, device,
    )  # fmt: skip
    w4 = nf4.quantize(operands.weight)
    w = nf4.dequantize(w4, config.dtype, impl="reference")
    # Enough copies that one round's weight is out of the cache by the next: decoding walks over
    # all layers before it comes back to one.
    sets = 1 + -(-2 * cache_bytes(device) // w4.nbytes)
    weights = [w4.clone() for _ in range(sets)]
    dense = [w.clone() for _ in range(1 + -(-2 * cache_bytes(device) // w.nbytes))]
    x = operands.x.detach()
    forwards: dict[str, Callable[[int], Tensor]] = {
        OURS: lambda r: nf4.linear(x, weights[r % sets]),
        DENSE: lambda r: F.linear(x, dense[r % len(dense)]),
    }
    if find_spec("bitsandbytes") is not None:
        import bitsandbytes

        pairs = [bnb_parameter(one) for one in weights]

        def theirs(round_: int) -> Tensor:
            packed, state = pairs[round_ % sets]
            return bitsandbytes.matmul_4bit(x, packed, state)

        forwards[BNB] = theirs
    exact = {"y": F.linear(x.double(), w.double())}
    eager = {"y": F.linear(x, w)}
    gates = {}
    for name, forward in forwards.items():
        gates[name] = gate("PyTorch at float64", {"y": forward(0)}, eager, exact)
        if name != BNB:  # its kernels round the scales too; theirs is recorded as it is
            gates[name].require(name)
    with torch.inference_mode():
        samples = 15 if request.quick else 50
        times = interleaved(forwards, device, warmup=4, samples=samples, keep_queue_full=True)
        on_gpu = device.type == "cuda"
        streamed = back_to_back(forwards, device, calls=50, rounds=5) if on_gpu else {}
    m, k, n = shape.rows, shape.in_features, shape.out_features
    activations = m * (k + n) * config.dtype.itemsize
    moved = dict.fromkeys(forwards, w4.nbytes + activations) | {DENSE: w.nbytes + activations}
    rows = [
        _row(name, config, taken, Floor.of(2 * m * k * n, moved[name], ceilings), ceilings,
             gates[name], streamed.get(name))
        for name, taken in times.items()
    ]  # fmt: skip
    found = {row["variant"]: row for row in rows}
    targets = []
    if (m, k, n) == HEADLINE_DECODE and on_gpu:
        share = moved[OURS] / found[OURS]["time"]["median"] / ceilings.bytes_per_second
        targets.append(Target(f"{config.title}: share of bandwidth", share, 0.7, at_least=True))
    if BNB in found:
        gain = found[BNB]["time"]["median"] / found[OURS]["time"]["median"]
        limit = 1.0 if on_gpu else 1.5
        targets.append(Target(f"{config.title}: time, {BNB} / {OURS}", gain, limit, at_least=True))
    return Outcome(rows, targets)


def _train(config: Config, request: Request, ceilings: Ceilings) -> Outcome:
    device, shape = request.device, config.shape
    adapter_dtypes = list(dict.fromkeys((config.dtype, torch.float32)))
    calls: dict[str, Call] = {}
    gates: dict[str, Gate] = {}
    for adapter_dtype in adapter_dtypes:
        operands = lora_operands(shape, config.dtype, adapter_dtype, device)
        w4 = nf4.quantize(operands.weight)
        w = nf4.dequantize(w4, config.dtype, impl="reference")
        adapters = f"{short(adapter_dtype)} adapters"
        forwards = {
            f"{OURS}, {adapters}": partial(_lora, operands, w4),
            f"{DENSE}, {adapters}": partial(_lora, operands, w),
        }
        if find_spec("bitsandbytes") is not None:
            forwards[f"peft + {BNB}, {adapters}"] = partial(_peft, operands, *bnb_parameter(w4))
        exact = _plain(operands, w, torch.float64)
        eager = _plain(operands, w, None)
        for name, forward in forwards.items():
            results = dict(zip(NAMES, _step(operands, forward), strict=True))
            gates[name] = gate("PyTorch at float64", results, eager, exact)
            gates[name].require(name)
            calls[name] = partial(_step, operands, forward)
    on_gpu = device.type == "cuda"
    samples = 10 if request.quick else 40 if on_gpu else 15
    times = interleaved(calls, device, warmup=4, samples=samples, keep_queue_full=True)
    m, k, n, r = shape.rows, shape.in_features, shape.out_features, shape.rank
    flops = 4 * m * k * n + 6 * m * r * (k + n)
    activations = (3 * m * k + 2 * m * n) * config.dtype.itemsize
    rows = []
    for name, taken in times.items():
        weight = 2 * (w.nbytes if name.startswith(DENSE) else w4.nbytes)
        least = Floor.of(flops, activations + weight, ceilings)
        peak = peak_bytes(partial(calls[name], 0), device)
        rows.append(_row(name, config, taken, least, ceilings, gates[name], None, peak))
    return Outcome(rows, list(_train_targets(config, on_gpu, adapter_dtypes, rows)))


def _lora(operands: LoraOperands, w: Weight) -> Tensor:
    return lora_linear(operands.x, w, None, operands.lora_a, operands.lora_b, operands.scaling)


def _peft(operands: LoraOperands, packed: Tensor, state: Any) -> Tensor:
    """What PEFT's `Linear4bit` computes, without its bookkeeping."""
    import bitsandbytes

    x, a, b = operands.x, operands.lora_a, operands.lora_b
    base = bitsandbytes.matmul_4bit(x, packed, state).clone()
    return base + (F.linear(F.linear(x.to(a.dtype), a), b) * operands.scaling).to(base.dtype)


def _step(
    operands: LoraOperands, forward: Callable[[], Tensor], round_: int = 0
) -> tuple[Tensor, ...]:
    y = forward()
    leaves = [operands.x, operands.lora_a, operands.lora_b]
    return (y, *torch.autograd.grad(y, leaves, operands.dy))


def _plain(operands: LoraOperands, w: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """y, dx, dA, dB of the dense LoRA linear at the dtypes given, or at `dtype`."""
    x, a, b = (
        v.detach().to(dtype or v.dtype).requires_grad_()
        for v in (operands.x, operands.lora_a, operands.lora_b)
    )
    y = F.linear(x, w.to(x.dtype))
    y = y + (F.linear(F.linear(x.to(a.dtype), a), b) * operands.scaling).to(x.dtype)
    grads = torch.autograd.grad(y, [x, a, b], operands.dy.to(y.dtype))
    return dict(zip(NAMES, (y.detach(), *grads), strict=True))


def _row(
    name: str,
    config: Config,
    taken: Any,
    least: Floor,
    ceilings: Ceilings,
    checked: Gate,
    streamed: float | None,
    peak: int | None = None,
) -> Row:
    return {
        "variant": name,
        "config": config.as_dict(),
        "time": taken.as_dict(),
        "back_to_back": streamed,
        "tokens_per_second": config.shape.rows / taken.median,
        "peak_bytes": peak,
        "floor": least.as_dict(),
        "distance_to_floor": taken.median / least.seconds,
        "ceilings": ceilings.as_dict(),
        "gate": checked.as_dict(),
    }


def _train_targets(
    config: Config, on_gpu: bool, adapter_dtypes: list[torch.dtype], rows: list[Row]
) -> Iterator[Target]:
    found: Mapping[str, float] = {row["variant"]: row["time"]["median"] for row in rows}
    for adapter_dtype in adapter_dtypes:
        adapters = f"{short(adapter_dtype)} adapters"
        ours = found[f"{OURS}, {adapters}"]
        if on_gpu and config.shape == HEADLINE_TRAIN:
            what = f"{adapters}: time, 4-bit / bf16 LoRA linear"
            yield Target(what, ours / found[f"{DENSE}, {adapters}"], 1.07)
        if (theirs := found.get(f"peft + {BNB}, {adapters}")) is not None:
            what = f"{config.title}, {adapters}: time, PEFT + {BNB} / {OURS}"
            yield Target(what, theirs / ours, 1.0, at_least=True)
