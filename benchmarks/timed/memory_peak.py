"""Predicted against measured peak memory of a training step, over families of models.

The measured side knows nothing of the predicting one: on a CPU it is the sum of what torch's
allocator reports to the profiler, on a GPU `max_memory_allocated`, the process capped to 40 GiB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import peftfast
from benchmarks.cases import short
from benchmarks.quantised import bitsandbytes
from benchmarks.registry import Outcome, Request, Row, timed
from benchmarks.targets import Target
from peftfast.memory import PROFILES, DeviceProfile, MemoryReport, estimate
from peftfast.memory.build import model_class, put_four_bit_linears, to_quantise
from peftfast.memory.simulate import step_options
from peftfast.memory.storages import storages
from peftfast.ops.scratch import clear_scratch, scratch_bytes

RANK = 16
CAP = 40 << 30  # bytes that a GPU's process may take
EACH, MEDIAN = 0.05, 0.02
_VOCABULARY = 1000


@dataclass(frozen=True)
class Case:
    """A step to predict and to run."""

    family: str
    method: str
    batch: int
    seq: int
    dtype: torch.dtype
    checkpointing: bool = False
    dropout: float = 0.0
    patched: bool = True

    @property
    def title(self) -> str:
        """The case in a line."""
        extra = ", checkpointing" if self.checkpointing else ""
        extra += f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.family} {self.method} {self.batch} x {self.seq} {short(self.dtype)}{extra}"

    def as_dict(self) -> Row:
        """The fields that tell rows apart, for JSON."""
        fields = dataclasses.asdict(self)
        del fields["patched"]
        return {**fields, "dtype": short(self.dtype)}


def cases(request: Request) -> list[Case]:
    """On a CPU every family; on a GPU larger models of two."""
    wide, narrow = torch.float32, torch.bfloat16
    if request.device.type == "cuda":
        found = [
            Case("llama-large", "lora", 1, 4096, narrow),
            Case("llama-large", "qlora", 1, 8192, narrow),
            Case("llama-large", "qlora", 4, 2048, narrow, checkpointing=True),
            Case("llama-large", "lora", 2, 2048, narrow, dropout=0.1),
            Case("qwen3-large", "lora", 1, 4096, narrow),
            Case("qwen3-large", "qlora", 1, 4096, narrow, patched=False),
            Case("llama-large", "full", 1, 2048, narrow),
        ]
        return found[:4] if request.quick else found
    found = []
    for family in FAMILIES:
        if family.endswith("-large"):
            continue
        found += [
            Case(family, "full", 1, 256, narrow, checkpointing=True),
            Case(family, "lora", 2, 256, wide),
            Case(family, "lora", 1, 512, narrow, dropout=0.1),
            Case(family, "lora", 1, 384, narrow, patched=False),
            Case(family, "qlora", 1, 512, narrow),
            Case(family, "qlora", 4, 128, wide, checkpointing=True),
        ]
    return found[::7] if request.quick else found


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocabulary,
        max_position_embeddings=1 << 15,
    )  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=hidden // heads,
        vocab_size=vocabulary,
    )  # fmt: skip


def _gemma3() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=_VOCABULARY, sliding_window=128,
    )  # fmt: skip


def _bert() -> Any:
    from transformers import BertConfig

    return BertConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=_VOCABULARY, architectures=["BertForMaskedLM"],
    )  # fmt: skip


def _t5() -> Any:
    from transformers import T5Config

    config = T5Config(
        d_model=256, d_ff=1024, num_layers=4, num_heads=4, d_kv=64, vocab_size=_VOCABULARY,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    return config


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=256, n_layer=4, n_head=4, vocab_size=_VOCABULARY, n_positions=1024,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(256, 704, 4, 8, 2, _VOCABULARY),
    "qwen3": lambda: _qwen3(256, 768, 4, 8, 4, _VOCABULARY),
    "gemma3": _gemma3,
    "bert": _bert,
    "t5": _t5,
    "gpt2": _gpt2,
    "llama-large": lambda: _llama(2048, 5632, 8, 16, 4, 32000),
    "qwen3-large": lambda: _qwen3(2048, 6144, 8, 16, 8, 151936),
}


@timed("memory_peak", "predicted against measured peak memory of a step, six families of models")
def time(request: Request) -> Iterator[Outcome]:
    """One outcome a case, and the median of the errors at last."""
    errors: list[float] = []
    with capped(request.device):
        for case in cases(request):
            if request.expired(case.title):
                break
            start = perf_counter()
            predicted = predict(case, request.device)
            seconds = perf_counter() - start
            measured = measure_peak(case, request.device)
            error = (predicted.peak_bytes - measured) / measured
            errors.append(abs(error))
            row = {
                "variant": "peftfast" if case.patched else "peft",
                "config": case.as_dict(),
                "time": {"median": seconds, "low": seconds, "high": seconds},
                "back_to_back": None,
                "tokens_per_second": None,
                "distance_to_floor": None,
                "peak_bytes": measured,
                "predicted_bytes": predicted.peak_bytes,
                "error": error,
                "predicted_at": predicted.peak_at,
            }
            yield Outcome([row], [Target(f"error of {case.title}", abs(error), EACH)])
    if errors:
        what = f"median error of {len(errors)} predictions"
        yield Outcome([], [Target(what, statistics.median(errors), MEDIAN)])


def predict(case: Case, device: torch.device) -> MemoryReport:
    """The prediction, from the configuration alone."""
    return estimate(
        FAMILIES[case.family](),
        method=_method(case),
        four_bit=case.method == "qlora",
        batch=case.batch,
        seq=case.seq,
        dtype=case.dtype,
        checkpointing=case.checkpointing,
        patched=case.patched,
        device_profile=_profile(device),
    )


def measure_peak(case: Case, device: torch.device) -> int:
    """Bytes at the peak of a real step, the third, and of all that lives through it."""
    clear_scratch()
    gc.collect()
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    model = _model(case, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    options = step_options(model)

    def step() -> None:
        names = ("input_ids", "attention_mask", "labels")
        shape = (case.batch, case.seq)
        batch = {name: torch.ones(shape, dtype=torch.int64, device=device) for name in names}
        model(**batch, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    gc.collect()
    gc.disable()
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        return held_bytes(model, optimizer) + scratch_bytes() + _profiled_peak(step)
    finally:
        gc.enable()


def held_bytes(model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages that live through every step."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors += [] if part is None else vars(part).values()
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    found = {
        storage._cdata: storage.nbytes()
        for tensor in tensors
        if isinstance(tensor, Tensor)
        for storage in storages(tensor)
    }
    return sum(found.values())


def _profiled_peak(step: Callable[[], None]) -> int:
    """The peak of what torch's CPU allocator hands out and takes back during a step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, size in changes:
        now += size
        peak = max(peak, now)
    return peak


def _model(case: Case, device: torch.device) -> Any:
    from peft import get_peft_model

    config = FAMILIES[case.family]()
    torch.manual_seed(0)
    with device:
        model = model_class(config)._from_config(config, dtype=case.dtype)
    method = _method(case)
    if case.method == "qlora":
        _quantise(model, case.dtype)
    if case.method != "full":
        model = get_peft_model(model, method)
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if case.method != "full":
            model.enable_input_require_grads()
    if case.patched:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="nothing was fused")
            peftfast.patch(model)
    return model


def _quantise(model: Any, dtype: torch.dtype) -> None:
    """As transformers and bitsandbytes do when they load a model in 4 bits."""
    bnb = bitsandbytes()
    dense = to_quantise(model)
    put_four_bit_linears(model, dtype)
    for name, module in dense.items():
        fresh = model.get_submodule(name)
        weight = module.weight.detach()
        if type(module) is not torch.nn.Linear:
            weight = weight.t().contiguous()
        fresh.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", module=fresh
        )
        fresh.bias = module.bias
        fresh.to(weight.device)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True


def _method(case: Case) -> Any:
    from peft import LoraConfig

    if case.method == "full":
        return "full"
    return LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=case.dropout, target_modules="all-linear"
    )


def _profile(device: torch.device) -> DeviceProfile:
    if device.type == "cpu":
        return PROFILES["cpu"]
    properties = torch.cuda.get_device_properties(device)
    arch = properties.major * 10 + properties.minor
    like = PROFILES["h100" if arch >= 90 else "a100-40gb"]
    return dataclasses.replace(like, arch=arch, sm_count=properties.multi_processor_count)


@contextlib.contextmanager
def capped(device: torch.device) -> Iterator[None]:
    """On a GPU the process takes no more than `CAP`."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
