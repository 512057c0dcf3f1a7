"""What a method is made of: components, each a primitive in a functional form at a site."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from peftfast.methods.sites import ROLES, SITES
from peftfast.nn.bottleneck import BottleneckAdapter
from peftfast.nn.kronecker import KroneckerAdapter

PRIMITIVES: dict[str, type[BottleneckAdapter]] = {
    "bottleneck": BottleneckAdapter,
    "kronecker": KroneckerAdapter,
}
INSERTIONS = ("sequential", "parallel")
MODULES = "modules"  # the site that a configuration's target_modules name
# What a parallel component reads where it doesn't say so. Elsewhere: its own module's input.
_READ_FROM = {
    "attention_heads": "attention_input",
    "attention_output": "attention_input",
    "cross_attention_heads": "cross_attention_input",
    "cross_attention_output": "cross_attention_input",
    "ffn_hidden": "ffn_input",
    "ffn_output": "ffn_input",
}


@dataclass(frozen=True)
class Component:
    """One adapter at one kind of site: h <- compose(h, s g f(x W_down) W_up)   (He et al.,
    ICLR 2022, section 3.1).

    Args:
        site: where h is: "attention_heads" (what the output projection reads), "attention_output"
            (after it, before the residual), the same with "cross_" before, "ffn_hidden",
            "ffn_output"; a linear's role such as "attention_q" or "ffn_up" (its output); or
            "modules": the outputs of the modules that the configuration's target_modules name.
        primitive: "bottleneck", or "kronecker" (W as a sum of Kronecker products, Compacter).
        form: f, the activation: "relu", "gelu", "gelu_tanh", "silu", "tanh", "identity" and others
            of `peftfast.ops.bottleneck`.
        insertion: "sequential": x is h; "parallel": x is what `reads` says.
        composition: "add": h + delta; "multiply": h * (1 + delta).
        reads: the site that a parallel component reads; None: the input of the sublayer, and for a
            linear or a module its own input.
        bottleneck: m, the hidden width; or
        reduction: m as a fraction of x's width: m = width // reduction. One of both is needed.
        scaling, learned_scaling, gate, bias, norm, norm_position, depth, dropout, init, init_std:
            as in `peftfast.nn.BottleneckAdapter`.
        divisions, rank: of "kronecker" only, as in `peftfast.nn.KroneckerAdapter`.
        stack: "encoder" or "decoder": only there; None: both.
        optional: whether a model without that site will do.
        name: what the parameters are called, unique in a method; None: the site's name, with
            "_parallel" where it is.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    site: str
    primitive: str = "bottleneck"
    form: str = "relu"
    insertion: str = "sequential"
    composition: str = "add"
    reads: str | None = None
    bottleneck: int | None = None
    reduction: float | None = None
    scaling: float = 1.0
    learned_scaling: bool = False
    gate: bool = False
    bias: bool = True
    norm: str | None = None
    norm_position: str = "before"
    depth: int = 1
    dropout: float = 0.0
    init: str = "near_identity"
    init_std: float = 1e-2
    divisions: int = field(default=4)
    rank: int = field(default=1)
    stack: str | None = None
    optional: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        writable = (*_READ_FROM, *(role for role in ROLES if role not in SITES), MODULES)
        if self.site in SITES and self.site not in writable:
            raise ValueError(
                f"site is {self.site!r}: it can be read by parallel components, not written;"
                f" sites: {', '.join(writable)}"
            )
        _one_of("site", self.site, writable)
        _one_of("primitive", self.primitive, tuple(PRIMITIVES))
        _one_of("insertion", self.insertion, INSERTIONS)
        _one_of("stack", self.stack, (None, "encoder", "decoder"))
        if self.reads is not None:
            _one_of("reads", self.reads, (*SITES,))
            if self.insertion == "sequential":
                raise ValueError(
                    f"reads is {self.reads!r} and insertion 'sequential', which reads what it"
                    " changes; say insertion='parallel'"
                )
        if (self.bottleneck is None) == (self.reduction is None):
            raise ValueError(
                f"bottleneck is {self.bottleneck} and reduction is {self.reduction}; give exactly"
                " one of them"
            )
        if self.reduction is not None:
            if isinstance(self.reduction, bool) or not isinstance(self.reduction, (int, float)):
                raise TypeError(f"reduction is {type(self.reduction).__name__}; a number is needed")
            if not self.reduction > 0:
                raise ValueError(f"reduction is {self.reduction}; it must be above 0")
        if self.name is None:
            suffix = "_parallel" if self.insertion == "parallel" else ""
            object.__setattr__(self, "name", f"{self.site}{suffix}")
        elif not re.fullmatch(r"[a-z][a-z0-9_]*", str(self.name)):
            raise ValueError(
                f"name is {self.name!r}; lower-case letters, digits and underscores are needed"
            )
        # Whatever else is wrong, the module's own checks say; no values are made.
        width = 64 * self.divisions if isinstance(self.divisions, int) else 64
        self.make(width, width, device="meta")

    @property
    def parameter_name(self) -> str:
        assert self.name is not None
        return self.name

    @property
    def source(self) -> str | None:
        """The site that is read, where it is another than the one that is written."""
        if self.insertion == "sequential":
            return None
        return self.reads if self.reads is not None else _READ_FROM.get(self.site)

    def width(self, in_features: int) -> int:
        """m for an x of that width."""
        if self.bottleneck is not None:
            return self.bottleneck
        assert self.reduction is not None
        return max(1, int(in_features // self.reduction))

    def make(self, in_features: int, out_features: int, **options: Any) -> BottleneckAdapter:
        """The module for widths of x and h; options: device, dtype, and a shared parameter."""
        kind = PRIMITIVES[self.primitive]
        if self.primitive == "kronecker":
            options = {"divisions": self.divisions, "rank": self.rank, **options}
        return kind(
            in_features,
            self.width(in_features),
            out_features,
            activation=self.form,
            bias=self.bias,
            scaling=self.scaling,
            learned_scaling=self.learned_scaling,
            gate=self.gate,
            norm=self.norm,
            norm_position=self.norm_position,
            depth=self.depth,
            dropout=self.dropout,
            composition=self.composition,
            init=self.init,
            init_std=self.init_std,
            **options,
        )

    @classmethod
    def of(cls, given: Component | dict[str, Any]) -> Component:
        """A component, also from its dictionary, as a saved configuration has it."""
        if isinstance(given, Component):
            return given
        if not isinstance(given, dict):
            raise TypeError(
                f"a component is {type(given).__name__}; a Component or its dictionary is needed"
            )
        known = {one.name for one in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(
                f"a component has {', '.join(unknown)}, which this version does not know; it knows"
                f" {', '.join(sorted(known))}"
            )
        if "site" not in given:
            raise ValueError(f"a component has no site: {given}")
        return cls(**given)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
