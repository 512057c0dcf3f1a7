"""`nn.Linear` over a weight in 4 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfast.ops import Impl, nf4
from peftfast.ops.dispatch import parse_impl
from peftfast.ops.nf4 import NF4Weight
from peftfast.reference.nf4 import NESTED_BLOCK, table

_PARTS = ("packed", "absmax", "nested_absmax", "nested_code", "offset")


class NF4Linear(nn.Module):
    """A linear whose frozen weight is held in 4 bits (QLoRA): y = x W^T + b.

    `state_dict` has the keys and the format of `bitsandbytes.nn.Linear4bit`, so that each loads
    what the other saved; all of it goes into safetensors. `.to(dtype)` casts the bias alone: the
    weight's statistics stay as they are.

    Args:
        in_features, out_features, bias: as in `nn.Linear`, whose initialisation the weight gets
            before it is quantised.
        block_size, double_quant, quant_type: as in `nf4.quantize`.
        compute_dtype: dtype of the product, whatever the input's; None: the input's.
        impl: as in `nf4.linear`.

    Attributes:
        weight: the `NF4Weight` [out, in], of the dtype of the linear that it was made from.
        bias: parameter [out] or None.

    Raises:
        ValueError: an unknown block size, table or impl. TypeError: a dtype that is not bfloat16,
            float16 or float32.
    """

    packed: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        compute_dtype: torch.dtype | None = None,
        impl: str | Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_up(linear, block_size, double_quant, quant_type, compute_dtype, impl)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        compute_dtype: torch.dtype | None = None,
        impl: str | Impl = "auto",
    ) -> NF4Linear:
        """Quantise a linear, which is left as it is; its bias is shared, not copied."""
        check_plain_linear(linear)
        module = cls.__new__(cls)
        module._set_up(linear, block_size, double_quant, quant_type, compute_dtype, impl)
        return module.train(linear.training)

    @classmethod
    def from_weight(
        cls, weight: NF4Weight, bias: Tensor | None = None, *, impl: str | Impl = "auto"
    ) -> NF4Linear:
        """A linear over a weight [out, in] that is in 4 bits already, and shared."""
        if not isinstance(weight, NF4Weight):
            raise TypeError(f"weight is {type(weight).__name__}; an NF4Weight is needed")
        if weight.ndim != 2:
            raise ValueError(f"weight is {list(weight.shape)}; 2 dimensions are needed")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._start(weight, bias, impl)
        return module

    def _set_up(
        self,
        linear: nn.Linear,
        block_size: int,
        double_quant: bool,
        quant_type: str,
        compute_dtype: torch.dtype | None,
        impl: str | Impl,
    ) -> None:
        parse_impl(impl)
        weight = nf4.quantize(
            linear.weight, block_size=block_size, double_quant=double_quant, quant_type=quant_type
        ).with_compute_dtype(compute_dtype)
        super().__init__()
        self._start(weight, linear.bias, impl)

    def _start(self, weight: NF4Weight, bias: Tensor | None, impl: str | Impl) -> None:
        parse_impl(impl)
        self.out_features, self.in_features = weight.shape
        self.impl = impl
        for name in _PARTS:
            self.register_buffer(name, None, persistent=False)
        self._hold(weight)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    def _hold(self, weight: NF4Weight) -> None:
        for name in _PARTS:
            setattr(self, name, getattr(weight, name))
        self.block_size, self.quant_type = weight.block_size, weight.quant_type
        self.dtype, self.compute_dtype = weight.dtype, weight.compute_dtype

    @property
    def weight(self) -> NF4Weight:
        """The weight, of the tensors that the module holds now."""
        parts: Any = [getattr(self, name) for name in _PARTS]
        packed, absmax, *nested = parts
        shape = torch.Size((self.out_features, self.in_features))
        settings = (self.block_size, self.quant_type, *nested, self.compute_dtype)
        return NF4Weight(packed, absmax, shape, self.dtype, *settings)

    @weight.setter
    def weight(self, weight: NF4Weight) -> None:
        if not isinstance(weight, NF4Weight):
            raise TypeError(f"weight is {type(weight).__name__}; an NF4Weight is needed")
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"weight is {list(weight.shape)};"
                f" [{self.out_features}, {self.in_features}] is needed"
            )
        self._hold(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return nf4.linear(x, self.weight, self.bias, self.impl)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An `nn.Linear` with the dense weight, and a copy of the bias, in `dtype` (None: that of
        the linear that was quantised).
        """
        dtype = dtype or self.dtype
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(nf4.dequantize(self.weight, dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # Seen as bytes, the parts go where fn puts them, and no cast of dtypes touches them. They
        # are taken out of torch's sight for the bias, and put back whatever happens.
        parts = {name: part for name in _PARTS if (part := getattr(self, name)) is not None}
        held = {name: _moved(part, fn) for name, part in parts.items()}
        for name in parts:
            setattr(self, name, None)
        try:
            super()._apply(fn, recurse)
            parts = held
        finally:
            for name, part in parts.items():
                setattr(self, name, part)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_weight(self.weight, destination, prefix + "weight")

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        found = {key: state_dict[key] for key in list(state_dict) if _belongs(key, name)}
        if name not in found:
            missing_keys.append(name)
        else:
            try:
                loaded = load_weight(found, name)
                if not local_metadata.get("assign_to_params_buffers", False):
                    loaded = loaded.clone().to(self.packed.device)
                self.weight = loaded.with_compute_dtype(self.compute_dtype)
            except (KeyError, TypeError, ValueError) as error:
                error_msgs.append(f"{name}: {error}")
        rest = {key: value for key, value in state_dict.items() if key not in found}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, {self.quant_type}, block_size={self.block_size},"
            f" double_quant={self.nested_absmax is not None}, compute_dtype={self.compute_dtype}"
        )


def _moved(part: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    moved = fn(part.reshape(-1).view(torch.uint8))
    if moved.dtype != torch.uint8:  # a cast of everything, as `Module.type` makes
        return part.to(moved.device)
    return moved.view(part.dtype).view(part.shape)


def check_plain_linear(linear: Any) -> None:
    """Refuse what is not a plain `nn.Linear`, and one whose hooks would be lost."""
    if type(linear) is not nn.Linear:
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        raise TypeError(f"linear is {kind}; a plain torch.nn.Linear is needed")
    check_no_hooks(linear)


def check_no_hooks(linear: nn.Module) -> None:
    """Refuse a module whose hooks, or whose own forward, would be lost."""
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__:
        raise ValueError("linear has hooks or a forward of its own, which would be lost")


# A weight in a state_dict, as bitsandbytes keeps it: the packed indices as [n / 2, 1] under the
# weight's name, the statistics and tables beside it, and the settings as JSON in a tensor of bytes.


def save_weight(weight: NF4Weight, destination: dict[str, Any], name: str) -> None:
    """Add a weight's entries to a state_dict."""
    settings: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": _dtype_name(weight.dtype),
        "shape": list(weight.shape),
    }
    destination[name] = weight.packed.view(-1, 1)
    destination[f"{name}.absmax"] = weight.absmax
    destination[f"{name}.quant_map"] = table(weight.quant_type, weight.device).clone()
    if weight.nested:
        assert weight.offset is not None
        destination[f"{name}.nested_absmax"] = weight.nested_absmax
        destination[f"{name}.nested_quant_map"] = weight.nested_code
        settings |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": 0.0 if _is_empty(weight.offset) else weight.offset.item(),
        }
    text = list(json.dumps(settings).encode())
    data = torch.tensor(text, dtype=torch.uint8, device="cpu")
    destination[f"{name}.quant_state.bitsandbytes__{weight.quant_type}"] = data


def _is_empty(tensor: Tensor) -> bool:
    """Whether it has no value to read."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def load_weight(entries: dict[str, Tensor], name: str) -> NF4Weight:
    """The weight of a state_dict's entries.

    Raises:
        KeyError, TypeError, ValueError: an entry is missing or damaged.
    """
    from types import SimpleNamespace

    keys = [key for key in entries if key.startswith(f"{name}.quant_state.bitsandbytes__")]
    if len(keys) != 1:
        raise ValueError(
            f"{len(keys)} entries {name}.quant_state.bitsandbytes__* beside it; one is needed (a"
            " dense weight has none: load it into an nn.Linear, and `from_linear`)"
        )
    try:
        settings = json.loads(bytes(entries[keys[0]].cpu().tolist()))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"quant_state holds no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"quant_state holds a {type(settings).__name__}; an object is needed")
    missing = {"quant_type", "blocksize", "dtype", "shape"} - set(settings)
    if missing:
        raise ValueError(f"quant_state lacks {', '.join(sorted(missing))}")

    def entry(part: str) -> Tensor:
        if f"{name}.{part}" not in entries:
            raise ValueError(f"{part} is missing")
        return entries[f"{name}.{part}"]

    absmax, second, offset = entry("absmax"), None, None
    if "nested_offset" in settings or f"{name}.nested_absmax" in entries:
        second = SimpleNamespace(
            absmax=entry("nested_absmax"),
            code=entry("nested_quant_map"),
            blocksize=settings.get("nested_blocksize"),
        )
        value = float(settings["nested_offset"])
        offset = torch.tensor(value, dtype=torch.float32, device=absmax.device)
    state = SimpleNamespace(
        quant_type=settings["quant_type"],
        blocksize=settings["blocksize"],
        dtype=getattr(torch, str(settings["dtype"]), settings["dtype"]),
        shape=torch.Size(settings["shape"]),
        absmax=absmax,
        code=entry("quant_map"),
        state2=second,
        offset=offset,
    )
    return NF4Weight.from_bnb(entries[name], state)


def _belongs(key: str, name: str) -> bool:
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    return (
        key == name
        or key in [f"{name}.{part}" for part in parts]
        or key.startswith(f"{name}.quant_state.bitsandbytes__")
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
