"""`nn.Linear`, or one in 4 bits, with a LoRA adapter, on the fused op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.nn.nf4 import NF4Linear, check_no_hooks, check_plain_linear
from peftfast.ops import Impl, lora_linear, nf4
from peftfast.ops.dispatch import parse_impl
from peftfast.ops.nf4 import NF4Weight


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` with an adapter: y = x W^T + b + (alpha / r) (dropout(x) A^T) B^T.

    A starts Kaiming-uniform (a = sqrt 5) and B at zero, so that the module starts equal to its
    linear (Hu et al., ICLR 2022, section 4.1). Dropout acts in training mode only.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        rank: r, at least 1.
        alpha: the scaling's numerator; None means `rank`, a scaling of 1.
        dropout: probability in [0, 1) on the adapter's input.
        adapter_dtype: dtype of A and B: None for W's, or torch.float32.
        impl: as in `peftfast.ops.lora_linear`.

    Parameters: weight [out, in] and bias [out] (frozen), lora_a [r, in], lora_b [out, r].
    `state_dict` has these names and always the weight without the adapter, merged or not. Over an
    `NF4Linear` (QLoRA), that module is the submodule `base`, and weight and bias are None.

    Raises:
        ValueError: rank below 1, dropout outside [0, 1), alpha not finite, an adapter_dtype that
            is neither W's nor float32, or an unknown impl.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    base: NF4Linear | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        adapter_dtype: torch.dtype | None = None,
        impl: str | Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_up(linear, rank, alpha, dropout, adapter_dtype, impl)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | NF4Linear,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        impl: str | Impl = "auto",
    ) -> LoRALinear:
        """Wrap a linear, dense or in 4 bits: its parameters are shared, not copied, and frozen.
        Arguments as in the constructor; adapter_dtype None is, in 4 bits, the dtype that was
        quantised.
        """
        if type(linear) is NF4Linear:
            check_no_hooks(linear)
        else:
            check_plain_linear(linear)
        module = cls.__new__(cls)
        module._set_up(linear, rank, alpha, dropout, adapter_dtype, impl)
        return module.train(linear.training)

    def _set_up(
        self,
        linear: nn.Linear | NF4Linear,
        rank: int,
        alpha: float | None,
        dropout: float,
        adapter_dtype: torch.dtype | None,
        impl: str | Impl,
    ) -> None:
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank is {rank!r}; a whole number of at least 1 is needed")
        if alpha is not None and not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; a finite number is needed")
        if adapter_dtype not in (None, torch.float32, linear.weight.dtype):
            allowed = f"None, {linear.weight.dtype} or torch.float32"
            raise ValueError(f"adapter_dtype is {adapter_dtype}; {allowed} is needed")
        parse_impl(impl)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; a probability in [0, 1) is needed")
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.dropout, self.impl, self.merged = dropout, impl, False
        self.base = linear if isinstance(linear, NF4Linear) else None
        dense = None if isinstance(linear, NF4Linear) else linear
        for name in ("weight", "bias"):
            self.register_parameter(name, None if dense is None else getattr(dense, name))
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        self._unmerged: NF4Weight | None = None
        options: dict[str, Any] = {
            "device": linear.weight.device,
            "dtype": adapter_dtype or linear.weight.dtype,
        }
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, **options))
        self.reset_adapter()

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def reset_adapter(self) -> None:
        """Draw A anew and set B to zero."""
        self._refuse_when_merged("reset the adapter")
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        if self.merged:
            if self.base is not None:
                return self.base(x)
            return nn.functional.linear(x, self.weight, self.bias)
        return lora_linear(
            x,
            self.weight if self.base is None else self.base.weight,
            self.bias if self.base is None else self.base.bias,
            self.lora_a,
            self.lora_b,
            self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter into the weight, in place: forward is then a plain linear, without
        gradients for A and B. A 4-bit weight is quantised anew, which rounds the sum, and the one
        before is kept for `unmerge`; `dequantize_merged` merges without that rounding.

        Raises:
            RuntimeError: merged already.
            ValueError: the merged weight would not be finite; nothing is changed then.
        """
        self._refuse_when_merged("merge")
        merged = self._merged_weight()
        if self.base is None:
            self.weight.copy_(merged)
        else:
            old = self._unmerged = self.base.weight
            self.base.weight = nf4.quantize(
                merged,
                block_size=old.block_size,
                double_quant=old.nested,
                quant_type=old.quant_type,
            ).with_compute_dtype(old.compute_dtype)
        self.merged = True

    @torch.no_grad()
    def dequantize_merged(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense `nn.Linear` with the adapter added into its weight; this module stays as it is.

        Args:
            dtype: of the result; None: the weight's, or that of the tensor once quantised.
        """
        self._refuse_when_merged("merge")
        merged = self._merged_weight()
        bias = self.bias if self.base is None else self.base.bias
        dtype = dtype or merged.dtype
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(merged.to(dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        return linear.train(self.training)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out again, exact up to one rounding of the weight's dtype, and bit for
        bit in 4 bits. RuntimeError if not merged.
        """
        if not self.merged:
            raise RuntimeError("can't unmerge: the adapter is not merged")
        if self.base is None:
            self.weight.copy_(self._shifted(-1.0))
        else:
            assert self._unmerged is not None
            self.base.weight, self._unmerged = self._unmerged.to(self.base.packed.device), None
        self.merged = False

    def _merged_weight(self) -> Tensor:
        merged = self._shifted(1.0)
        if not torch.isfinite(merged).all():
            raise ValueError("the merged weight is not finite; the adapter holds bad values")
        return merged

    def _shifted(self, sign: float) -> Tensor:
        """W plus or minus the adapter's product, summed in float32 or wider."""
        weight = self.weight if self.base is None else nf4.dequantize(self.base.weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self.lora_b.to(wide) @ self.lora_a.to(wide)
        return torch.add(weight.to(wide), delta, alpha=sign * self.scaling).to(weight.dtype)

    def _refuse_when_merged(self, what: str) -> None:
        if self.merged:
            raise RuntimeError(f"can't {what}: the adapter is merged; call unmerge() first")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and self.base is None:
            destination[prefix + "weight"] = self._shifted(-1.0).detach()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in `nn.Module`; the weight is the one without the adapter."""
        if self._unmerged is None or self.base is None:
            return super().state_dict(*args, **kwargs)
        merged, self.base.weight = self.base.weight, self._unmerged.to(self.base.packed.device)
        try:
            return super().state_dict(*args, **kwargs)
        finally:
            self.base.weight = merged

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_when_merged("load a state_dict")
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        bias = self.bias if self.base is None else self.base.bias
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank},"
            f" alpha={self.alpha:g}, dropout={self.dropout:g}, bias={bias is not None}"
        )
