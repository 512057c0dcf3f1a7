"""One kernel as it is pinned for one architecture and one combination of dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MMA_KINDS = ("none", "any", "native")


@dataclass(frozen=True)
class Variant:
    """A Triton kernel with everything that its compilation ahead of time needs.

    `signature`, `constexprs` and `attrs` are what `triton.compiler.ASTSource` takes: the type of
    each argument by name (a tuple of types for a tuple argument, "constexpr" for a constexpr), the
    value of each constexpr by name or by (argument index, element index), and the known properties
    of arguments by (argument index,) or (argument index, element index), such as
    `{(0,): [["tt.divisibility", 16]]}`.

    `dtype` names the activations' dtype, after a plus sign the adapters' where it differs, after a
    slash that of the base's product: "bf16", "fp16", "fp32", "bf16+fp32", "fp32/bf16".

    `mma` says which tensor-core instructions the machine code must hold: "none" (no tensor core is
    meant), "any" (those of any generation), "native" (the architecture's own: HGMMA on sm_90,
    UTC*MMA on sm_100, HMMA or IMMA before).

    Raises ValueError on an unknown `mma`, and on warps or stages below one.
    """

    kernel: Any
    name: str
    config: str
    dtype: str
    signature: Mapping[str, Any]
    constexprs: Mapping[Any, Any] = field(default_factory=dict)
    attrs: Mapping[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    mma: str = "none"

    def __post_init__(self) -> None:
        if self.mma not in MMA_KINDS:
            raise ValueError(f"mma is {self.mma!r}; allowed: {', '.join(MMA_KINDS)}")
        if self.num_warps < 1 or self.num_stages < 1:
            raise ValueError(
                f"num_warps is {self.num_warps} and num_stages is {self.num_stages}; "
                "both are at least 1"
            )
