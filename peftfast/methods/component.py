"""What a method is made of: components, each a primitive in a functional form at a site."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from peftfast.methods.sites import ROLES, SITES
from peftfast.nn.bottleneck import BottleneckAdapter
from peftfast.nn.kronecker import KroneckerAdapter
from peftfast.nn.prefix_attention import PrefixAttention
from peftfast.nn.prompt import PromptEmbedding

PRIMITIVES: dict[str, type[nn.Module]] = {
    "bottleneck": BottleneckAdapter,
    "kronecker": KroneckerAdapter,
    "prefix": PrefixAttention,
    "prompt": PromptEmbedding,
}
INSERTIONS = ("sequential", "parallel")
MODULES = "modules"  # the site that a configuration's target_modules name
EMBEDDING = "embedding"  # the site of prompts: the model's input embeddings
_HEADS = ("attention_heads", "cross_attention_heads")  # the sites of prefixes
_DEFAULTS = {
    "bottleneck": {"form": "relu", "init": "near_identity", "insertion": "sequential"},
    "kronecker": {"form": "relu", "init": "near_identity", "insertion": "sequential"},
    "prefix": {"form": "softmax", "init": "normal", "insertion": "parallel"},
    "prompt": {"form": "identity", "init": "uniform", "insertion": "parallel"},
}
# Fields that some primitives only have.
_WIDTHS = ("bottleneck", "reduction", "reads", "bias", "norm", "norm_position", "depth")
_VIRTUAL = ("virtual_tokens", "encoder_hidden")
_PROMPT = ("template", "encoder", "tasks", "init_tokens", "position")
_OWN = {
    "bottleneck": _WIDTHS,
    "kronecker": (*_WIDTHS, "divisions", "rank"),
    "prefix": (*_VIRTUAL, "shift_positions"),
    "prompt": (*_VIRTUAL, *_PROMPT),
}
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
    """One primitive at one kind of site: h <- compose(h, s g f(x W_down) W_up)   (He et al., ICLR
    2022, section 3.1), in which a prefix is f = softmax over learned keys and values.

    Args:
        site: where h is: "attention_heads" (what the output projection reads), "attention_output"
            (after it, before the residual), the same with "cross_" before, "ffn_hidden",
            "ffn_output"; a linear's role such as "attention_q" or "ffn_up" (its output);
            "modules": the outputs of the modules that the configuration's target_modules name; or
            "embedding": the model's input embeddings (prompts).
        primitive: "bottleneck"; "kronecker" (W as a sum of Kronecker products, Compacter);
            "prefix" (keys and values before the sequence's, at "attention_heads" or
            "cross_attention_heads"); "prompt" (input rows, at "embedding").
        form: f, the activation: of bottlenecks "relu", "gelu", "gelu_tanh", "silu", "tanh",
            "identity" and others of `peftfast.ops.bottleneck`; of prefixes "softmax", or "relu"
            (multi-head parallel adapter: no softmax, no scale). Empty: "relu", or "softmax".
        insertion: "sequential": x is h; "parallel": x is what `reads` says. Empty: sequential for
            bottlenecks; prefixes and prompts are parallel.
        composition: "add": h + delta; "multiply": h * (1 + delta). Of bottlenecks.
        reads: the site that a parallel component reads; None: the input of the sublayer, and for a
            linear or a module its own input.
        bottleneck: m, the hidden width; or
        reduction: m as a fraction of x's width: m = width // reduction. A bottleneck needs one.
        scaling, learned_scaling, gate, dropout, init, init_std: as in `peftfast.nn`'s module of
            the primitive; empty, or None: as there.
        bias, norm, norm_position, depth: of bottlenecks, as in `peftfast.nn.BottleneckAdapter`.
        divisions, rank: of "kronecker" only, as in `peftfast.nn.KroneckerAdapter`.
        virtual_tokens: P, how many rows a prefix or a prompt has.
        encoder_hidden: the width of the network that makes a prefix in training, shared by all
            layers but for its last linear (Li & Liang, ACL 2021, section 4.3); None: none. Of a
            prompt: of its encoder.
        shift_positions: whether the sequence's positions begin after a prefix, as they do where
            it is in the cache (PEFT).
        encoder, template, position, tasks, init_tokens: of "prompt" only, as in
            `peftfast.methods.PromptConfig` and `PTuningConfig`.
        stack: "encoder" or "decoder": only there; None: both.
        optional: whether a model without that site will do.
        name: what the parameters are called, unique in a method; None: the site's name, with
            "_parallel" where it is, or "_prefix"; a prompt's is "prompt".

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    site: str
    primitive: str = "bottleneck"
    form: str = ""
    insertion: str = ""
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
    init: str = ""
    init_std: float | None = None
    divisions: int = field(default=4)
    rank: int = field(default=1)
    virtual_tokens: int | None = None
    encoder_hidden: int | None = None
    shift_positions: bool = True
    encoder: str | None = None
    template: list[Any] | None = None
    position: str | None = None
    tasks: int = 1
    init_tokens: list[Any] | None = None
    stack: str | None = None
    optional: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        _one_of("primitive", self.primitive, tuple(PRIMITIVES))
        for name, value in _DEFAULTS[self.primitive].items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        self._check_site()
        self._check_fields()
        _one_of("insertion", self.insertion, INSERTIONS)
        _one_of("stack", self.stack, (None, "encoder", "decoder"))
        if self.is_bottleneck:
            self._check_widths()
        else:
            self._check_virtual()
        if self.name is None:
            object.__setattr__(self, "name", self._own_name())
        elif not re.fullmatch(r"[a-z][a-z0-9_]*", str(self.name)):
            raise ValueError(
                f"name is {self.name!r}; lower-case letters, digits and underscores are needed"
            )
        # Whatever else is wrong, the module's own checks say; no values are made.
        width = 64 * self.divisions if isinstance(self.divisions, int) else 64
        self.make(width, width, heads=(1, 8), device="meta")

    def _check_site(self) -> None:
        writable = (*_READ_FROM, *(role for role in ROLES if role not in SITES), MODULES)
        if self.primitive == "prefix":
            writable = _HEADS
        elif self.primitive == "prompt":
            writable = (EMBEDDING,)
        elif self.site == EMBEDDING:
            raise ValueError("site is 'embedding', where only prompts are: say primitive='prompt'")
        if self.site in SITES and self.is_bottleneck and self.site not in writable:
            raise ValueError(
                f"site is {self.site!r}: it can be read by parallel components, not written;"
                f" sites: {', '.join(writable)}"
            )
        _one_of("site", self.site, writable)

    def _check_fields(self) -> None:
        """No field of another primitive's is set."""
        own = _OWN[self.primitive]
        for one in fields(self):
            others = [kind for kind, names in _OWN.items() if one.name in names]
            if not others or one.name in own or getattr(self, one.name) == one.default:
                continue
            raise ValueError(
                f"{one.name} is {getattr(self, one.name)!r}, and primitive {self.primitive!r} has"
                f" no {one.name}; {' and '.join(map(repr, others))} have"
            )

    def _check_widths(self) -> None:
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

    def _check_virtual(self) -> None:
        _one_of("insertion", self.insertion, ("parallel",))
        _one_of("composition", self.composition, ("add",))
        for name in _VIRTUAL:
            value = getattr(self, name)
            if value is None and name == "encoder_hidden":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; a number of 1 or more is needed")
            if value < 1:
                raise ValueError(f"{name} is {value}; 1 or more are needed")

    def _own_name(self) -> str:
        if self.primitive == "prompt":
            return "prompt"
        if self.primitive == "prefix":
            return f"{self.site.removesuffix('_heads')}_prefix"
        return f"{self.site}_parallel" if self.insertion == "parallel" else self.site

    @property
    def is_bottleneck(self) -> bool:
        """Whether it changes a value in place, as a BottleneckAdapter does."""
        return issubclass(PRIMITIVES[self.primitive], BottleneckAdapter)

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

    def finished(self) -> Component:
        """Without what only training needs."""
        if self.encoder_hidden is None and self.encoder is None:
            return self
        return replace(self, encoder_hidden=None, encoder=None)

    def width(self, in_features: int) -> int:
        """m for an x of that width."""
        if self.bottleneck is not None:
            return self.bottleneck
        assert self.reduction is not None
        return max(1, int(in_features // self.reduction))

    def make(
        self,
        in_features: int,
        out_features: int,
        heads: tuple[int, int] | None = None,
        **options: Any,
    ) -> nn.Module:
        """The module for widths of x and h, and heads of keys and values [number, size] for a
        prefix; options: device, dtype, and a shared parameter.
        """
        if self.init_std is not None:
            options["init_std"] = self.init_std
        if self.primitive == "prompt":
            return self._make_prompt(out_features, **options)
        shared: dict[str, Any] = {
            "scaling": self.scaling,
            "learned_scaling": self.learned_scaling,
            "gate": self.gate,
            "dropout": self.dropout,
            "init": self.init,
        }
        if self.primitive == "prefix":
            assert self.virtual_tokens is not None and heads is not None
            number, size = heads
            return PrefixAttention(
                self.virtual_tokens,
                number,
                size,
                in_features=in_features,
                form=self.form,
                hidden=self.encoder_hidden,
                embedding_dim=None if self.encoder_hidden is None else in_features,
                **shared,
                **options,
            )
        kind: Any = PRIMITIVES[self.primitive]
        if self.primitive == "kronecker":
            options = {"divisions": self.divisions, "rank": self.rank, **options}
        made: nn.Module = kind(
            in_features,
            self.width(in_features),
            out_features,
            activation=self.form,
            bias=self.bias,
            norm=self.norm,
            norm_position=self.norm_position,
            depth=self.depth,
            composition=self.composition,
            **shared,
            **options,
        )
        return made

    def _make_prompt(self, features: int, **options: Any) -> nn.Module:
        assert self.virtual_tokens is not None
        return PromptEmbedding(
            self.virtual_tokens,
            features,
            encoder=self.encoder,
            hidden=self.encoder_hidden,
            tasks=self.tasks,
            init=self.init,
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
