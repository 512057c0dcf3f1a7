"""LoRA without PEFT: peftfast's module in a plain PyTorch loop.

A frozen linear layer is taught to follow another one that differs from it by a matrix of rank 4.
"""

from __future__ import annotations

import torch
from torch import nn

from peftfast.nn import LoRALinear

torch.manual_seed(0)
frozen = nn.Linear(128, 64)
target = nn.Linear(128, 64)
with torch.no_grad():
    target.weight.copy_(frozen.weight + torch.randn(64, 4) @ torch.randn(4, 128) / 16)
    target.bias.copy_(frozen.bias)

layer = LoRALinear.from_linear(frozen, rank=4, alpha=8)
trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)

for step in range(301):
    x = torch.randn(32, 128)
    loss = nn.functional.mse_loss(layer(x), target(x))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:3}: loss {loss.item():.6f}")

layer.merge()
print(f"largest error of the merged weight: {(layer.weight - target.weight).abs().max():.1e}")
