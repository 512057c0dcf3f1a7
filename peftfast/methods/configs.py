"""The methods that have names: each a short declaration."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peftfast.methods.component import Component
from peftfast.methods.config import MethodConfig, register_method

SUBLAYERS = ("attention", "ffn")
ATTENTION_POSITIONS = ("after", "before")


@dataclass
class AdapterConfig(MethodConfig):
    """What the adapters of the papers have in common; not a method itself.

    Args:
        bottleneck: m, the hidden width.
        reduction: m as a fraction of the model's width, instead: m = width // reduction.
        activation: f.
        sublayers: which sublayers have adapters, of "attention" and "ffn".
        cross_attention: whether "attention" means cross-attention too, where the model has it.
        attention_position: "after" the attention's output projection, or "before" it, on what the
            heads give.
        adapter_bias: whether the projections have biases.
        scaling, learned_scaling, gate, norm, norm_position, depth, dropout, composition, init,
            init_std: as in `peftfast.nn.BottleneckAdapter`.
    """

    bottleneck: int | None = None
    reduction: float | None = None
    activation: str = "relu"
    sublayers: list[str] = field(default_factory=lambda: list(SUBLAYERS))
    cross_attention: bool = True
    attention_position: str = "after"
    scaling: float = 1.0
    learned_scaling: bool = False
    gate: bool = False
    adapter_bias: bool = True
    norm: str | None = None
    norm_position: str = "before"
    depth: int = 1
    dropout: float = 0.0
    composition: str = "add"
    init: str = "near_identity"
    init_std: float = 1e-2

    # The width where neither bottleneck nor reduction is given, and how x gets in.
    _default: ClassVar[int] = 64
    _insertion: ClassVar[str] = "sequential"
    _primitive: ClassVar[str] = "bottleneck"

    def __post_init__(self) -> None:
        if self.bottleneck is None and self.reduction is None:
            self.bottleneck = self._default
        self.sublayers = _sublayers(self.sublayers)
        if self.attention_position not in ATTENTION_POSITIONS:
            raise ValueError(
                f"attention_position is {self.attention_position!r}; allowed:"
                f" {', '.join(map(repr, ATTENTION_POSITIONS))}"
            )
        super().__post_init__()

    def declare(self) -> list[Component]:
        place = "output" if self.attention_position == "after" else "heads"
        found = []
        if "attention" in self.sublayers:
            found.append(self._component(f"attention_{place}"))
            if self.cross_attention:
                found.append(self._component(f"cross_attention_{place}", optional=True))
        if "ffn" in self.sublayers:
            found.append(self._component("ffn_output"))
        return found

    def _component(self, site: str, **options: Any) -> Component:
        """A component at a site, with every argument that it and this configuration share."""
        shared = {one.name for one in fields(Component)} & {one.name for one in fields(self)}
        return Component(
            site,
            primitive=self._primitive,
            form=self.activation,
            insertion=self._insertion,
            bias=self.adapter_bias,
            **{name: getattr(self, name) for name in shared},
            **options,
        )


@register_method("houlsby")
@dataclass
class HoulsbyConfig(AdapterConfig):
    """Adapters after both sublayers of every layer, before the residual; every LayerNorm trains
    too (Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 2).

    y = x + W2 gelu(W1 x + b1) + b2, near the identity at first: weights normal with deviation
    init_std = 1e-2, cut off at two deviations (the paper's; its code has 1e-3). 2md + d + m
    parameters an adapter. The variants that the paper tried are arguments: sublayers=["attention"],
    norm="layer" or "batch", depth=2, activation="tanh", composition="multiply" (whose formula the
    paper doesn't give; here y = x * (1 + delta)).

    Arguments as in `AdapterConfig` and `MethodConfig`; a task head trains where task_type says so,
    as in PEFT.
    """

    activation: str = "gelu"
    train_norms: bool = True


@register_method("pfeiffer")
@dataclass
class PfeifferConfig(AdapterConfig):
    """One adapter a layer, after the feed-forward sublayer, before the residual (Pfeiffer et al.,
    "AdapterFusion", EACL 2021); the width is a sixteenth of the model's.

    Arguments as in `AdapterConfig` and `MethodConfig`.
    """

    sublayers: list[str] = field(default_factory=lambda: ["ffn"])

    def __post_init__(self) -> None:
        if self.bottleneck is None and self.reduction is None:
            self.reduction = 16.0
        super().__post_init__()


@register_method("parallel_adapter")
@dataclass
class ParallelAdapterConfig(AdapterConfig):
    """An adapter beside a sublayer: it reads what the sublayer reads (He et al., "Towards a Unified
    View of Parameter-Efficient Transfer Learning", ICLR 2022, sections 3.2 and 4.5).

    delta = s relu(x Wd + bd) Wu + bu, initialised like LoRA (Kaiming-uniform down, zero up: exactly
    the identity at first). Beside the feed-forward sublayer by default (the paper's "FFN PA", with
    m = 512); with "attention" it joins what the heads give, before the output projection.

    Arguments as in `AdapterConfig` and `MethodConfig`.
    """

    sublayers: list[str] = field(default_factory=lambda: ["ffn"])
    attention_position: str = "before"
    init: str = "lora"

    _insertion: ClassVar[str] = "parallel"


@register_method("scaled_parallel_adapter")
@dataclass
class ScaledParallelAdapterConfig(ParallelAdapterConfig):
    """A parallel adapter whose delta is scaled, by s = 4 or by a learned factor that starts there
    (He et al., ICLR 2022, sections 3.3 and 4.6).

    Arguments as in `AdapterConfig` and `MethodConfig`.
    """

    scaling: float = 4.0


@register_method("compacter")
@dataclass
class CompacterConfig(AdapterConfig):
    """Adapters whose projections are sums of Kronecker products, W = sum_i A_i (x) B_i, with A
    shared by all layers and B of low rank; after self-attention and the feed-forward sublayer,
    LayerNorms train (Karimi Mahabadi et al., "Compacter", NeurIPS 2021; sublayers=["ffn"] is its
    Compacter++).

    Args:
        divisions: n, of which widths and m must be multiples.
        rank: of each B_i.

    Further arguments as in `AdapterConfig` and `MethodConfig`; the width is a 32nd of the model's.
    """

    divisions: int = 4
    rank: int = 1
    activation: str = "gelu_tanh"
    cross_attention: bool = False
    train_norms: bool = True

    _primitive: ClassVar[str] = "kronecker"

    def __post_init__(self) -> None:
        if self.bottleneck is None and self.reduction is None:
            self.reduction = 32.0
        super().__post_init__()


@register_method("unified")
@dataclass
class UnifiedConfig(MethodConfig):
    """Any combination of components (He et al., ICLR 2022, table 1), declared by the user.

    Args:
        components: what it is made of, as `Component` or their dictionaries.

    Further arguments as in `MethodConfig`.

    Example:
        UnifiedConfig(components=[
            Component("attention_heads", insertion="parallel", bottleneck=30, init="lora"),
            Component("ffn_output", insertion="parallel", bottleneck=512, scaling=4.0, init="lora"),
        ])
    """

    components: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.components, (list, tuple)):
            raise TypeError(
                f"components is {type(self.components).__name__}; a list of components is needed"
            )
        self.components = [Component.of(one) for one in self.components]
        super().__post_init__()

    def declare(self) -> list[Component]:
        return list(self.components)


def _sublayers(given: Any) -> list[str]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, (list, tuple, set)):
        raise TypeError(f"sublayers is {type(given).__name__}; a list of names is needed")
    found = list(given)
    for one in found:
        if one not in SUBLAYERS:
            raise ValueError(f"sublayers has {one!r}; allowed: {', '.join(map(repr, SUBLAYERS))}")
    if not found:
        raise ValueError('sublayers is empty; name "attention", "ffn" or both')
    return [one for one in SUBLAYERS if one in found]
