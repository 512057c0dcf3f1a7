"""What surrounds a call: transforms that ops take no part in, and recomputation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals


def transform_reason() -> str | None:
    """Why an op with its own autograd does not serve an eager call here; None where it does."""
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    if torch.jit.is_tracing():
        return "inside torch.jit.trace"
    if module_globals._has_any_global_hook():
        return "a hook on all modules is registered"
    return None


def in_backward() -> bool:
    """Whether this thread is inside a backward, where forwards recompute, as a rule."""
    return torch._C._current_graph_task_id() != -1


def saving_is_hooked() -> bool:
    """Whether saved tensors go through hooks, as they do in a non-reentrant checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_released(node: Any) -> bool:
    """Whether a backward has freed what an autograd.Function's node saved; unpacks nothing."""
    try:
        node._raw_saved_tensors  # noqa: B018
    except RuntimeError:
        return True
    return False


def modes(x: Tensor) -> tuple[Any, ...]:
    """What decides how an op on x is recorded and computed: grad mode and autocast."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), x.requires_grad, autocast
