"""What peftfast is compared with: PEFT's own layers, and the frozen linear alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraShape:
    """Sizes of a LoRA linear: x [rows, in_features], W [out_features, in_features], the rank."""

    rows: int
    in_features: int
    out_features: int
    rank: int

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LoraOperands:
    """Random operands of one LoRA linear; `lora_b` is not zero, so that every gradient counts."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    scaling: float


def lora_operands(
    shape: LoraShape,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> LoraOperands:
    """Operands of unit-variance outputs; x, A, B require gradients, W is frozen; alpha is 2 r."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float, to: torch.dtype) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device)
        return (values * scale).to(to)

    inward = shape.in_features**-0.5
    return LoraOperands(
        x=normal(shape.rows, shape.in_features, scale=1.0, to=dtype).requires_grad_(),
        weight=normal(shape.out_features, shape.in_features, scale=inward, to=dtype),
        lora_a=normal(
            shape.rank, shape.in_features, scale=inward, to=adapter_dtype
        ).requires_grad_(),
        lora_b=normal(
            shape.out_features, shape.rank, scale=shape.rank**-0.5, to=adapter_dtype
        ).requires_grad_(),
        dy=normal(shape.rows, shape.out_features, scale=1.0, to=dtype),
        scaling=2.0,
    )


def peft_layer(operands: LoraOperands, dropout_p: float) -> nn.Module:
    """PEFT's LoRA layer in training mode over the operands' own weight and adapter parameters.

    `autocast_adapter_dtype` is what makes PEFT hold float32 adapters over a 16-bit weight; it
    follows the operands.
    """
    out_features, in_features = operands.weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(operands.weight, requires_grad=False)
    rank = operands.lora_a.shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(operands.scaling * rank),
        lora_dropout=dropout_p,
        target_modules=["0"],
    )
    widened = operands.lora_a.dtype == torch.float32
    model = get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=widened)
    tuner: Any = model.base_model
    layer = tuner.model[0]
    if layer.scaling["default"] != operands.scaling:
        raise ValueError(f"PEFT scales by {layer.scaling['default']}, not {operands.scaling}")
    pairs: list[tuple[Any, Tensor]] = [
        (layer.lora_A, operands.lora_a),
        (layer.lora_B, operands.lora_b),
    ]
    for created, given in pairs:
        if created["default"].weight.dtype != given.dtype:
            raise ValueError(
                f"PEFT made {created['default'].weight.dtype} adapters, not {given.dtype}"
            )
        created["default"].weight = nn.Parameter(given.detach())
    return layer.train()


def adapter_parameters(layer: nn.Module) -> list[Tensor]:
    """[A, B] of a layer from `peft_layer`."""
    found: Any = layer
    return [found.lora_A["default"].weight, found.lora_B["default"].weight]
