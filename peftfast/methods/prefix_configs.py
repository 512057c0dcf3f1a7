"""The methods that put learned keys and values into attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from peftfast.methods.component import Component
from peftfast.methods.config import MethodConfig, register_method

STACKS = ("encoder", "decoder")
_ENCODER_HIDDEN = 512


@dataclass
class PrefixMethodConfig(MethodConfig):
    """What the methods with prefixes have in common; not a method itself.

    Args:
        num_virtual_tokens: P, how many keys and values come before those of the sequence.
        prefix_projection: whether, in training, one network for all layers makes them: Embedding(P,
            d) -> Linear(d, encoder_hidden_size) -> Tanh -> Linear(encoder_hidden_size, 2 L Hkv D)
            (Li & Liang, ACL 2021, section 4.3). Checkpoints hold what it makes, and itself too, so
            that training can go on, until `peftfast.methods.finalize` drops it.
        encoder_hidden_size: its width; None: 512, as in the paper.
        prefix_dropout: dropout on the prefixes in training, one mask for the rows of a batch.
        stacks: where, of "encoder" and "decoder".
        cross_attention: whether the decoder's cross-attention has prefixes too, where the model
            has it. Self-attention of encoder and decoder, and cross-attention have each their own.
        shift_positions: whether the sequence's positions begin at P, as where PEFT puts prefixes
            into the cache; PEFT's checkpoints need it. Relative positions of T5's kind do not
            reach a prefix.
        prefix_init: "normal" (N(0, prefix_init_std), PEFT's with 1), "zero", or another of
            `peftfast.nn.PrefixAttention`.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    prefix_dropout: float = 0.0
    stacks: list[str] = field(default_factory=lambda: list(STACKS))
    cross_attention: bool = True
    shift_positions: bool = True
    prefix_init: str = "normal"
    prefix_init_std: float | None = None

    def __post_init__(self) -> None:
        self.stacks = _stacks(self.stacks)
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError(
                f"encoder_hidden_size is {self.encoder_hidden_size}, and prefix_projection is"
                " False: there is no encoder without it"
            )
        super().__post_init__()

    def prefixes(self, gate: bool = False) -> list[Component]:
        """The components that are prefixes, one for each kind of attention."""
        hidden = self.encoder_hidden_size or _ENCODER_HIDDEN
        own = Component(
            "attention_heads",
            primitive="prefix",
            virtual_tokens=self.num_virtual_tokens,
            encoder_hidden=hidden if self.prefix_projection else None,
            dropout=self.prefix_dropout,
            shift_positions=self.shift_positions,
            init=self.prefix_init,
            init_std=self.prefix_init_std,
            gate=gate,
            stack=self.stacks[0] if len(self.stacks) == 1 else None,
        )
        if not self.cross_attention or "decoder" not in self.stacks:
            return [own]
        return [own, replace(own, site="cross_attention_heads", optional=True, name=None)]


@register_method("prefix")
@dataclass
class PrefixConfig(PrefixMethodConfig):
    """Prefix-Tuning: learned keys and values before those of the sequence in every layer (Li &
    Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021).

    They are no rows of the KV cache and are never copied for the rows of a batch: attention reads
    them where they are (`peftfast.ops.prefix_attention`). Checkpoints of PEFT's
    `PrefixTuningConfig` are loaded by `peftfast.methods.load_from_peft`, and written by
    `save_as_peft`.

    Arguments as in `PrefixMethodConfig` and `MethodConfig`.
    """

    def declare(self) -> list[Component]:
        return self.prefixes()


@register_method("ptuning_v2")
@dataclass
class PTuningV2Config(PrefixMethodConfig):
    """P-Tuning v2: prefixes in every layer for understanding tasks, made from an embedding without
    a network by default, with dropout (Liu et al., "P-Tuning v2", ACL 2022, section 3.3).

    The sequence keeps its length and places: a classifier on the first token reads the first real
    one, and labels of tokens stay where they are. The head trains as task_type says.

    Args:
        initial_prefix: a saved adapter whose prefixes are where training starts, for instance one
            that was trained on several tasks (section 3.3, "Multi-task Learning").

    Further arguments as in `PrefixMethodConfig` and `MethodConfig`.
    """

    prefix_dropout: float = 0.1
    initial_prefix: str | None = None

    def declare(self) -> list[Component]:
        return self.prefixes()


@register_method("mam")
@dataclass
class MAMConfig(PrefixMethodConfig):
    """Mix-and-match adapter: short prefixes in attention, and a scaled parallel adapter beside the
    feed-forward sublayer (He et al., "Towards a Unified View of Parameter-Efficient Transfer
    Learning", ICLR 2022, section 4.6).

    Args:
        bottleneck: the adapter's width (the paper's r = 512).
        scaling: s, of the adapter's delta.
        learned_scaling: whether s is learned, from there.
        dropout: on the adapter's hidden values.

    Further arguments as in `PrefixMethodConfig` and `MethodConfig`.
    """

    num_virtual_tokens: int = 30
    bottleneck: int = 512
    scaling: float = 4.0
    learned_scaling: bool = False
    dropout: float = 0.0

    def declare(self) -> list[Component]:
        adapter = Component(
            "ffn_output",
            insertion="parallel",
            bottleneck=self.bottleneck,
            scaling=self.scaling,
            learned_scaling=self.learned_scaling,
            dropout=self.dropout,
            init="lora",
            stack=self.stacks[0] if len(self.stacks) == 1 else None,
        )
        return [*self.prefixes(), adapter]


@register_method("multi_head_parallel_adapter")
@dataclass
class MultiHeadParallelAdapterConfig(MethodConfig):
    """For each head relu(q P_k^T) P_v, added to what attention gives, before the output projection:
    a prefix without a softmax (He et al., ICLR 2022, section 4.4, "multi-head parallel adapter").

    q is the head's query as it meets the keys, after norms and rotations. P_k starts as N(0,
    init_std), P_v at zero, so that the model is unchanged at first. 2 P Hkv D parameters a layer.

    Args:
        bottleneck: P, the width in each head.
        scaling, learned_scaling: s, of what is added.
        stacks, cross_attention: as in `PrefixConfig`.

    Further arguments as in `MethodConfig`.
    """

    bottleneck: int = 30
    scaling: float = 1.0
    learned_scaling: bool = False
    dropout: float = 0.0
    init_std: float = 0.1
    stacks: list[str] = field(default_factory=lambda: list(STACKS))
    cross_attention: bool = True

    def __post_init__(self) -> None:
        self.stacks = _stacks(self.stacks)
        super().__post_init__()

    def declare(self) -> list[Component]:
        own = Component(
            "attention_heads",
            primitive="prefix",
            form="relu",
            virtual_tokens=self.bottleneck,
            scaling=self.scaling,
            learned_scaling=self.learned_scaling,
            dropout=self.dropout,
            shift_positions=False,
            init="zero",
            init_std=self.init_std,
            stack=self.stacks[0] if len(self.stacks) == 1 else None,
        )
        if not self.cross_attention or "decoder" not in self.stacks:
            return [own]
        return [own, replace(own, site="cross_attention_heads", optional=True, name=None)]


@register_method("unipelt")
@dataclass
class UniPELTConfig(PrefixMethodConfig):
    """Prefixes, LoRA on queries and values, and an adapter after the feed-forward sublayer, each
    with a gate: the mean over tokens of sigmoid(x w + b) (Mao et al., "UniPELT", ACL 2022, section
    3.2). The gates of prefixes (of keys and values) and LoRA read what attention reads, the
    adapter's its own input.

    With a KV cache a gate is of the tokens of a step.

    Args:
        reduction: the adapter's width as a fraction of the model's (the paper's 16).
        activation: the adapter's.
        r, lora_alpha: LoRA's rank, and its scale alpha / r, before the gate. Where q, k and v are
            one linear, LoRA is on that.

    Further arguments as in `PrefixMethodConfig` and `MethodConfig`.
    """

    num_virtual_tokens: int = 10
    reduction: float = 16.0
    activation: str = "relu"
    r: int = 8
    lora_alpha: float = 16.0

    def declare(self) -> list[Component]:
        stack = self.stacks[0] if len(self.stacks) == 1 else None
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; a rank of 1 or more is needed")
        lora = Component(
            "attention_q",
            form="identity",
            insertion="parallel",
            bottleneck=self.r,
            scaling=self.lora_alpha / self.r,
            gate=True,
            bias=False,
            init="lora",
            stack=stack,
            optional=True,
        )
        others = [replace(lora, site=site, name=None) for site in ("attention_v", "attention_qkv")]
        adapter = Component(
            "ffn_output",
            form=self.activation,
            reduction=self.reduction,
            gate=True,
            stack=stack,
        )
        return [*self.prefixes(gate=True), lora, *others, adapter]


def _stacks(given: object) -> list[str]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, (list, tuple, set)):
        raise TypeError(f"stacks is {type(given).__name__}; a list of names is needed")
    for one in given:
        if one not in STACKS:
            raise ValueError(f"stacks has {one!r}; allowed: {', '.join(map(repr, STACKS))}")
    if not given:
        raise ValueError('stacks is empty; name "encoder", "decoder" or both')
    return [one for one in STACKS if one in given]
