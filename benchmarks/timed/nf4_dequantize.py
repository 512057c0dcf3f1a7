"""Dequantising a 4-bit weight into a given buffer, beside a copy of that buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.cases import short
from benchmarks.ceilings import Ceilings, Floor, cache_bytes, measure_ceilings
from benchmarks.gates import GateFailed
from benchmarks.quantised import bnb_parameter
from benchmarks.registry import Outcome, Request, Row, timed
from benchmarks.targets import Target
from benchmarks.timing import back_to_back, interleaved
from peftfast.ops import nf4
from peftfast.ops.dispatch import Impl
from peftfast.ops.nf4 import NF4Weight, implementation

COPY, OURS = "copy", "peftfast"
BNB, BNB_WARM = "bitsandbytes", "bitsandbytes, warm buffer"
HEADLINE = (4096, 4096)


@dataclass(frozen=True)
class Config:
    """A weight [out_features, in_features], the dtype of its values, nested statistics."""

    out_features: int
    in_features: int
    dtype: torch.dtype

    def as_dict(self) -> Row:
        """The fields, for JSON."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "dtype": short(self.dtype),
            "quant_type": "nf4",
            "nested": True,
        }

    @property
    def title(self) -> str:
        """The configuration in a line."""
        return f"{self.out_features} x {self.in_features}, {short(self.dtype)}"


def configs(request: Request) -> list[Config]:
    """The headline shape first; float32 on a CPU, further shapes on a GPU unless `quick`."""
    found = [Config(*HEADLINE, torch.bfloat16)]
    if request.quick:
        return found
    if request.device.type == "cpu":
        return [*found, Config(*HEADLINE, torch.float32)]
    shapes = [(14336, 4096), (4096, 14336), (1024, 4096)]
    return found + [Config(*shape, torch.bfloat16) for shape in shapes]


Fill = Callable[[NF4Weight, Tensor], object]


def variants(config: Config, device: torch.device) -> dict[str, Fill]:
    """What fills a buffer with a weight's values; bitsandbytes' where it is installed."""

    def ours(impl: Impl) -> Fill:
        return lambda w4, out: nf4.dequantize(w4, out=out, impl=impl)

    chosen = implementation("dequantize", device, config.dtype, Impl.AUTO)
    found = {f"{OURS}, {chosen.value}": ours(chosen)}
    if device.type == "cuda" and chosen is not Impl.TRITON:
        found[f"{OURS}, triton"] = ours(Impl.TRITON)
    if find_spec("bitsandbytes") is not None:
        found |= _bitsandbytes(device)
    return found


def _bitsandbytes(device: torch.device) -> dict[str, Fill]:
    from bitsandbytes import functional

    def fill(w4: NF4Weight, out: Tensor) -> object:
        return functional.dequantize_4bit(*bnb_parameter(w4), out=out)

    if device.type == "cuda":
        return {BNB: fill}

    def allocate(w4: NF4Weight, out: Tensor) -> Tensor:
        return functional.dequantize_4bit(*bnb_parameter(w4))

    return {BNB: allocate, BNB_WARM: _Warm()}


class _Warm:
    """bitsandbytes' CPU kernel alone, into a given buffer, from statistics that are not nested."""

    def __init__(self) -> None:
        self._absmax: dict[int, Tensor] = {}

    def __call__(self, w4: NF4Weight, out: Tensor) -> Tensor:
        import ctypes

        from bitsandbytes.cextension import lib

        from peftfast.reference.nf4 import scales

        if id(w4) not in self._absmax:
            self._absmax[id(w4)] = scales(w4.absmax, w4.nested_absmax, w4.nested_code, w4.offset)
        kind = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[out.dtype]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (w4.packed, self._absmax[id(w4)], out)]
        sizes = [ctypes.c_longlong(n) for n in (w4.block_size, *w4.shape)]
        getattr(lib, f"cdequantize_blockwise_cpu_nf4_{kind}")(*pointers, *sizes)
        return out


@timed("nf4_dequantize", "dequantising a 4-bit weight into a given buffer, beside a copy")
def time(request: Request) -> Iterator[Outcome]:
    """A copy of the output; peftfast; bitsandbytes, and on a CPU its kernel alone."""
    ceilings: Ceilings | None = None
    for config in configs(request):
        if request.expired(config.title):
            return
        ceilings = ceilings or measure_ceilings(request.device, torch.float32)
        yield _time_config(config, request, ceilings)


def _time_config(config: Config, request: Request, ceilings: Ceilings) -> Outcome:
    device, on_gpu = request.device, request.device.type == "cuda"
    shape = (config.out_features, config.in_features)
    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(shape, generator=generator, device=device).to(config.dtype)
    w4 = nf4.quantize(w)
    nbytes = w.numel() * w.element_size()
    # On a GPU enough weights and buffers that one round's are out of the cache by the next. On a
    # CPU the buffer is warm, as the linears' own is.
    sets = 1 + -(-2 * cache_bytes(device) // (nbytes + w4.nbytes)) if on_gpu else 1
    weights = [w4.clone() for _ in range(sets)]
    outs = [torch.empty_like(w) for _ in range(sets)]
    fills = variants(config, device)
    expected = nf4.dequantize(w4, impl="reference")
    for name, fill in fills.items():
        outs[0].fill_(torch.nan)
        result = fill(weights[0], outs[0])
        filled = result if isinstance(result, Tensor) else outs[0]
        if not torch.equal(filled, expected):
            raise GateFailed(f"{name}: the values differ from the reference's")

    def call(fill: Fill) -> Callable[[int], object]:
        return lambda round_: fill(weights[round_ % sets], outs[round_ % sets])

    calls: dict[str, Callable[[int], object]] = {COPY: lambda r: outs[r % sets].copy_(w)}
    calls |= {name: call(fill) for name, fill in fills.items()}
    samples = 15 if request.quick else 60
    times = interleaved(calls, device, warmup=5, samples=samples, keep_queue_full=True)
    streamed = back_to_back(calls, device, calls=20, rounds=5) if on_gpu else {}
    rows: dict[str, Row] = {}
    for name, taken in times.items():
        moved = 2 * nbytes if name == COPY else nbytes + w4.nbytes
        least = Floor.of(0, moved, ceilings)
        rows[name] = {
            "variant": name,
            "config": config.as_dict(),
            "time": taken.as_dict(),
            "back_to_back": streamed.get(name),
            "tokens_per_second": None,
            "output_bytes_per_second": nbytes / taken.median,
            "bytes_per_second": moved / taken.median,
            "peak_bytes": None,
            "floor": least.as_dict(),
            "distance_to_floor": taken.median / least.seconds,
            "ceilings": ceilings.as_dict(),
            "gate": None if name == COPY else {"reference": "bit-equal"},
        }
    return Outcome(list(rows.values()), list(_targets(config, on_gpu, rows)))


def _targets(config: Config, on_gpu: bool, rows: dict[str, Row]) -> Iterator[Target]:
    name = next(name for name in rows if name.startswith(OURS))
    ours = rows[name]
    if on_gpu:
        share = ours["bytes_per_second"] / rows[COPY]["bytes_per_second"]
        yield Target(f"{config.title}: bandwidth, {name} / copy", share, 0.8, at_least=True)
        if BNB in rows:
            gain = rows[BNB]["time"]["median"] / ours["time"]["median"]
            yield Target(f"{config.title}: time, {BNB} / {name}", gain, 1.8, at_least=True)
        return
    speed = rows[COPY]["time"]["median"] / ours["time"]["median"]
    yield Target(f"{config.title}: speed, {name} / copy", speed, 0.85, at_least=True)
    if BNB_WARM in rows:
        against = ours["time"]["median"] / rows[BNB_WARM]["time"]["median"]
        yield Target(f"{config.title}: time, {name} / {BNB_WARM}", against, 1.0)
