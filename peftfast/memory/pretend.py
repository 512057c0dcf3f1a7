"""Meta tensors that pass for tensors of another device, so that the code for that device runs.

No operator computes anything on the meta device. A mode answers questions about a tensor's device
with the pretended one, makes what is asked for there on the meta device, and takes the ways that
torch takes there by the type of a device: for attention and dropout. The project's kernels are
called with all that their launchers allocate, and launch nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from peftfast.memory.attention import attention
from peftfast.memory.host import pretended_host
from peftfast.memory.profiles import DeviceProfile
from peftfast.ops.dry_run import dry_run

_META = torch.device("meta")
_PLAIN = (Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
_MOVES = (Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.new_tensor)


class NeedsValues(RuntimeError):
    """A model's code asks for values of tensors, which a simulation does not have."""


@contextlib.contextmanager
def pretending(profile: DeviceProfile, disown: Callable[[Tensor], None]) -> Iterator[None]:
    """Let meta tensors pass for tensors of `profile`'s device in this thread.

    Args:
        disown: takes what the code itself wants on the meta device.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(dry_run(profile.arch, profile.sm_count))
        if profile.kind == "cuda":
            stack.enter_context(pretended_host())
        stack.enter_context(_Pretence(profile, disown))
        yield


class _Pretence(TorchFunctionMode):
    def __init__(self, profile: DeviceProfile, disown: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._disown = disown
        self._gpu = profile.kind == "cuda"
        self._device = torch.device("cuda", 0) if self._gpu else torch.device("cpu")
        self._profile = profile
        own: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: self._device_of,
            Tensor.is_cuda.__get__: lambda x: self._gpu and x.is_meta or x.is_cuda,  # type: ignore[attr-defined]
            Tensor.is_cpu.__get__: lambda x: not self._gpu and x.is_meta or x.is_cpu,  # type: ignore[attr-defined]
            Tensor.is_meta.__get__: lambda x: False,  # type: ignore[attr-defined]
            Tensor.backward: self._backward,
            torch.autograd.backward: self._backward,
            Tensor.get_device: lambda x: 0 if self._gpu else -1,
            Tensor.is_pinned: lambda x, *_: False,
            F.scaled_dot_product_attention: functools.partial(attention, profile),
        }
        if self._gpu:
            own |= {F.dropout: _gpu_dropout, torch.dropout: _gpu_dropout, F.softmax: _gpu_softmax}
            own |= {torch.softmax: _gpu_softmax}
        self._own = own
        self._factories = _device_constructors()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        asked = torch._C._is_torch_function_enabled()  # not from within the subclass's own answer
        if asked and any(kind.__torch_function__ not in _PLAIN for kind in types):
            return NotImplemented  # the subclass is asked first, and this mode for what it calls
        own = self._own.get(func)
        if own is not None:
            return own(*args, **kwargs)
        if "device" in kwargs:
            if kwargs["device"] is not None and torch.device(kwargs["device"]).type == "meta":
                found = func(*args, **kwargs)
                self._disown(found)
                return found
            kwargs = {**kwargs, "device": self._meta_for(kwargs["device"], func)}
        elif func in self._factories:
            kwargs = {**kwargs, "device": self._meta_for(None, func)}
        if func in _MOVES and isinstance(args[0], Tensor):
            if func in (Tensor.cuda, Tensor.cpu):
                func, args = Tensor.to, (args[0], "cuda" if func is Tensor.cuda else "cpu")
            args = (args[0], *(self._meta_for(a, func) if _is_device(a) else a for a in args[1:]))
        return func(*args, **kwargs)

    def _backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
        **others: Any,
    ) -> None:
        """`torch.autograd.backward` with this mode on: it is off inside of what it answers, and a
        backward runs code of all kinds.
        """
        roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        given = others.get("gradient", grad_tensors)
        listed = list(given) if isinstance(given, (list, tuple)) else [given] * len(roots)
        grads = tuple(
            torch.ones_like(root) if grad is None else grad
            for root, grad in zip(roots, listed, strict=True)
        )
        only = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        keep = create_graph if retain_graph is None else retain_graph
        with self:
            _engine_run_backward(
                roots, grads, keep, create_graph, only,
                allow_unreachable=True, accumulate_grad=True,
            )  # fmt: skip

    def _device_of(self, x: Tensor) -> torch.device:
        found = x.device
        return self._device if found.type == "meta" else found

    def _meta_for(self, device: Any, func: Any) -> Any:
        """Where to make what is wanted on `device`; None: torch's default device."""
        if device is None:
            makes = func in self._factories and func is not torch.from_numpy
            return _META if makes and not self._gpu else None
        wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return _META if wanted.type == self._device.type else device


def _is_device(value: Any) -> bool:
    return isinstance(value, (torch.device, str, int)) and not isinstance(value, bool)


def _gpu_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One fused kernel, which keeps a mask of a byte an element."""
    if not training or p == 0:
        return x
    if inplace or p == 1:
        return F.dropout(x, p, training, inplace)
    return torch.native_dropout(x, p, True)[0]


def _gpu_softmax(x: Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> Tensor:
    """A wider dtype is the kernel's own business."""
    dtype = kwargs.get("dtype")
    if dtype == torch.float32 and x.dtype == torch.float16:
        return torch._softmax(x, dim, True)
    return F.softmax(x, dim, dtype=dtype)


def answer(func: Any, args: tuple, kwargs: dict) -> Any:
    """What an operator gives that needs values: everything is true, and every number is one."""
    if func is torch.ops.aten._local_scalar_dense.default:
        if not args[0].is_meta:
            return NotImplemented
        dtype = args[0].dtype
        if dtype == torch.bool:
            return not getattr(args[0], "_is_any", False)
        return 1.0 if dtype.is_floating_point else 1
    if func is torch.ops.aten.equal.default and args[0].is_meta:
        return True
    if func in _ANY and args[0].is_meta:
        found = func(*args, **kwargs)
        found._is_any = True
        return found
    if func in _OF_VALUES and any(isinstance(a, Tensor) and a.is_meta for a in args):
        raise NeedsValues(
            f"the model's code calls {func}, whose result's size depends on values; such a model"
            " can't be predicted"
        )
    return NotImplemented


_ANY = (torch.ops.aten.any.default, torch.ops.aten.any.dim)
_OF_VALUES = (
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
)
