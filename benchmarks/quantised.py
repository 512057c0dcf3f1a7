"""Llama-shaped models over 4-bit weights, as transformers and bitsandbytes make them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import BenchmarkError
from peftfast.ops.nf4 import NF4Weight


def bitsandbytes() -> Any:
    """The package; BenchmarkError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise BenchmarkError(f"bitsandbytes can't be imported: {error}") from None
    return bitsandbytes


def quantised(model: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
    """Replace every linear but the head by bitsandbytes' NF4 one, statistics nested; in place."""
    bnb = bitsandbytes()
    decoder: Any = model
    head = decoder.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child is head:
                continue
            device = child.weight.device
            linear = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            linear.weight = bnb.nn.Params4bit(
                child.weight.detach(), requires_grad=False, quant_type="nf4", module=linear
            )
            linear.bias = child.bias
            setattr(parent, name, linear.to(device))
    decoder.is_loaded_in_4bit = True
    return model


def shared_state(model: nn.Module) -> dict[int, Any]:
    """What a deepcopy of the model is to share: parameters, buffers, and the quantised state."""
    tensors = [*model.parameters(), *model.buffers()]
    states = [getattr(module, "quant_state", None) for module in model.modules()]
    return {id(one): one for one in [*tensors, *states] if one is not None}


def dense(model: nn.Module, values: torch.dtype, held: torch.dtype) -> nn.Module:
    """A copy in which every 4-bit linear is an `nn.Linear` with the dequantised weight.

    Args:
        values: the dtype that the weights are dequantised to; held: the dtype of all parameters.
    """
    bnb = bitsandbytes()
    other = copy.deepcopy(model)
    for parent in list(other.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                state = copy.copy(child.weight.quant_state)
                state.dtype = values
                weight = bnb.functional.dequantize_4bit(child.weight.data, state)
                linear = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(weight.to(held), requires_grad=False)
                setattr(parent, name, linear)
    decoder: Any = other
    decoder.is_loaded_in_4bit = False
    return other.to(held)


def four_bit_bytes(model: nn.Module) -> int:
    """Bytes of the 4-bit weights of a model, with their statistics and tables."""
    bnb = bitsandbytes()
    total = 0
    for module in model.modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        state = module.weight.quant_state
        parts: list[Tensor] = [module.weight.data, state.absmax, state.code]
        if state.nested:
            parts += [state.state2.absmax, state.state2.code, state.offset]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def bnb_parameter(w4: NF4Weight) -> tuple[Tensor, Any]:
    """The weight as bitsandbytes takes it, sharing its memory."""
    from bitsandbytes import functional

    second = functional.QuantState(
        w4.nested_absmax, blocksize=256, code=w4.nested_code, dtype=torch.float32
    )
    code = functional.get_4bit_type(w4.quant_type, device=w4.device)
    state = functional.QuantState(
        w4.absmax, w4.shape, code, w4.block_size, w4.quant_type, w4.dtype, w4.offset, second
    )
    return w4.packed.view(-1, 1), state
