"""One step of a model without values, and what each moment of it holds."""

from __future__ import annotations

import contextlib
import gc
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.memory.hidden import hidden_bytes
from peftfast.memory.pretend import answer, pretending
from peftfast.memory.profiles import DeviceProfile
from peftfast.memory.trace import Block, Trace, trace_of
from peftfast.memory.tracker import Tracker
from peftfast.ops.scratch import scratch_buffer

OPTIMIZERS = ("adamw", "adamw_fused", "adamw_8bit", "sgd", "none")
_SMALL_STATE = 4096  # elements up to which bitsandbytes keeps a parameter's state in 32 bits


def training_step(
    model: nn.Module,
    profile: DeviceProfile,
    batch: int,
    seq: int,
    optimizer: str,
    *,
    accumulate: bool = False,
) -> Trace:
    """Forward, backward and the optimizer's step of a model on the meta device.

    The state of the optimizer counts from the beginning, as in every step but the first; with
    `accumulate` so do gradients, as in every backward pass but the first.
    """
    tracker = _tracker(model, profile)
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    state: list[Tensor] = []
    vocabulary = vocabulary_of(model)
    options = step_options(model)
    with _running(model, tracker, profile):
        inputs = _inputs(model, profile, batch, seq)
        _relabel(tracker, list(inputs.values()), "inputs and buffers")
        tracker.phase = "forward"
        output = model(**inputs, **options)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise TypeError(f"{type(model).__name__} gives no loss for input_ids and labels")
        del output
        kept = len(tracker.moments)
        tracker.phase = "backward"
        loss.backward()
        del loss
        grads = [p.grad for p in trained if p.grad is not None]
        _relabel(tracker, grads, "gradients", from_start=accumulate)
        tracker.phase = "optimizer step"
        state = _optimizer_step(optimizer, trained, profile)
        _relabel(tracker, state, "optimizer state", from_start=True)
        buffer = scratch_buffer()
        if buffer is not None:
            _relabel(tracker, [buffer], "scratch and workspaces", from_start=True)
    for block in tracker.blocks:
        if block.label in ("forward", "backward", "optimizer step"):
            block.label = label_of(block, kept, vocabulary)
    moments, blocks = tracker.moments, tracker.blocks
    trace = trace_of(moments, blocks, profile.block)
    model.zero_grad(set_to_none=True)
    return trace


def generation(model: nn.Module, profile: DeviceProfile, batch: int, seq: int) -> Trace:
    """The prompt's pass and one step of decoding, with a cache of `seq` tokens in all."""
    tracker = _tracker(model, profile)
    model.eval()
    with _running(model, tracker, profile), torch.no_grad():
        ids = torch.ones(batch, max(seq - 1, 1), dtype=torch.int64, device=profile.kind)
        _relabel(tracker, [ids], "inputs and buffers")
        options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(_base(model).forward).parameters:
            options["logits_to_keep"] = 1
        tracker.phase = "prompt"
        output = model(input_ids=ids, **options)
        cache = output.past_key_values
        del output
        _relabel(tracker, _cached(cache), "KV cache")
        tracker.phase = "decoding"
        last = torch.ones(batch, 1, dtype=torch.int64, device=profile.kind)
        _relabel(tracker, [last], "inputs and buffers")
        output = model(input_ids=last, past_key_values=cache, use_cache=True)
        _relabel(tracker, _cached(output.past_key_values), "KV cache")
        del output, cache
        buffer = scratch_buffer()
        if buffer is not None:
            _relabel(tracker, [buffer], "scratch and workspaces", from_start=True)
    vocabulary = vocabulary_of(model)
    for block in tracker.blocks:
        if block.label in ("prompt", "decoding"):
            wide = block.shape[-1:] == (vocabulary,)
            block.label = "logits and loss" if wide else "scratch and workspaces"
    model.train()
    return trace_of(tracker.moments, tracker.blocks, profile.block)


def _tracker(model: nn.Module, profile: DeviceProfile) -> Tracker:
    threads = torch.get_num_threads()
    tracker = Tracker(
        "meta", hidden=lambda *call: hidden_bytes(profile, threads, *call), answer=answer
    )
    register_model(tracker, model)
    if profile.workspace:
        tracker.blocks.append(Block(profile.workspace, 0, "cuBLAS", "scratch and workspaces"))
    return tracker


def register_model(tracker: Tracker, model: nn.Module) -> None:
    """Count what a model holds, by class."""
    is_peft = hasattr(model, "peft_config")
    for parameter in model.parameters():
        adapter = is_peft and parameter.requires_grad
        tracker.register(parameter, "adapters" if adapter else "base weights")
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            second = [] if state.state2 is None else vars(state.state2).values()
            for value in (*vars(state).values(), *second):
                if isinstance(value, Tensor):
                    tracker.register(value, "quantisation statistics")
    for buffer in model.buffers():
        tracker.register(buffer, "inputs and buffers")


@contextlib.contextmanager
def _running(model: nn.Module, tracker: Tracker, profile: DeviceProfile) -> Iterator[None]:
    """Everything inside is tracked and computes nothing."""
    tracker.paths = {id(module): name for name, module in model.named_modules()}
    collecting = gc.isenabled()
    gc.disable()  # a cycle lives until it is collected, at a moment that depends on everything
    try:
        with warnings.catch_warnings(), pretending(profile, tracker.disown), tracker:
            warnings.simplefilter("ignore")
            yield
    finally:
        tracker.paths = {}
        if collecting:
            gc.enable()


def _base(model: Any) -> Any:
    """The model of transformers under PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vocabulary_of(model: nn.Module) -> int:
    """The size by which logits are known; -1 where there is none."""
    config = getattr(_base(model), "config", None)
    return -1 if config is None else getattr(config.get_text_config(), "vocab_size", -1)


def _inputs(model: Any, profile: DeviceProfile, batch: int, seq: int) -> dict[str, Tensor]:
    ids = torch.ones(batch, seq, dtype=torch.int64, device=profile.kind)
    one_label = type(_base(model)).__name__.endswith("ForSequenceClassification")
    shape = (batch,) if one_label else (batch, seq)
    labels = torch.ones(shape, dtype=torch.int64, device=profile.kind)
    mask = torch.ones(batch, seq, dtype=torch.int64, device=profile.kind)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step_options(model: Any) -> dict[str, Any]:
    """What a trainer passes besides: no cache of keys and values, where there would be one."""
    takes = "use_cache" in inspect.signature(_base(model).forward).parameters
    return {"use_cache": False} if takes else {}


def _cached(cache: Any) -> list[Tensor]:
    found = []
    for layer in getattr(cache, "layers", ()):
        found += [v for v in vars(layer).values() if isinstance(v, Tensor)]
    return found


def _relabel(
    tracker: Tracker, tensors: list[Tensor], label: str, *, from_start: bool = False
) -> None:
    for tensor in tensors:
        block = tracker.block_of(tensor)
        if block is not None:
            block.label = label
            block.born = 0 if from_start else block.born


def label_of(block: Block, kept: int, vocabulary: int) -> str:
    """The class of what a phase made, which is its label so far; the forward ends at `kept`."""
    if block.label != "optimizer step" and block.shape[-1:] == (vocabulary,):
        return "logits and loss"
    if block.label == "forward" and (block.died is None or block.died > kept):
        return "saved activations"
    return "scratch and workspaces"


def _optimizer_step(name: str, trained: list[Tensor], profile: DeviceProfile) -> list[Tensor]:
    """The tensors that the optimizer keeps."""
    if name == "none" or not trained:
        return []
    if name in ("adamw", "sgd"):
        kind: Any = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
        optimizer = kind(trained, lr=1e-4, foreach=profile.kind == "cuda")
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values()]
        return [v for v in states if isinstance(v, Tensor)]
    kept: list[Tensor] = []
    for parameter in trained:
        if name == "adamw_8bit" and parameter.numel() >= _SMALL_STATE:
            count = parameter.numel()
            kept += [parameter.new_empty(count, dtype=torch.uint8) for _ in range(2)]
            kept += [parameter.new_empty(-(-count // 256), dtype=torch.float32) for _ in range(2)]
        else:
            dtype = parameter.dtype if name == "adamw_fused" else torch.float32
            kept += [torch.empty_like(parameter, dtype=dtype) for _ in range(2)]
    return kept
