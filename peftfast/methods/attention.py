"""Prefixes in attention: modules that ask transformers' AttentionInterface for an implementation.

Such a module learns of its implementation by `self.config._attn_implementation`. One with a prefix
gets a config that shares everything with its own, and answers with this file's name while there is
a prefix; the function of that name finds the prefix by the module. Masks are made by the model
from its own config, thus as for the implementation that the user chose, and neither they nor the
cache know of the prefix.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    find_packed_sequence_indices,
)

from peftfast.ops import prefix_attention

NAME = "peftfast_prefix"
_SOURCE = "_peftfast_prefix"
_WITHOUT = ("cache", "block_mask", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass
class Prefix:
    """What `peftfast.ops.prefix_attention` takes of a prefix.

    Attributes:
        k, v: [Hkv, P, D], or [N, Hkv, P, D] with `index`.
        index: [B], which of the N a row has; -1: none.
        lengths: [N], how many rows of each count.
        gate: a number for each row, by which k and v are multiplied.
        form: "softmax" or "relu".
        impl: as the op takes it.
    """

    k: Tensor
    v: Tensor
    index: Tensor | None = None
    lengths: Tensor | None = None
    gate: Tensor | None = None
    form: str = "softmax"
    impl: str = "auto"


class Source(Protocol):
    """Where an attention module's prefix comes from."""

    def take(self) -> Prefix | None:
        """The prefix of a forward; asked once in each, or not at all where length() is 0."""

    def length(self) -> int:
        """How many rows it has now; 0: there is none."""

    def shift(self) -> int:
        """At which position the sequence begins."""


class SharedConfig:
    """A mixin of a config's class; an object of it has the `__dict__` of another config.

    Copies and pickles share with the copy of that config.
    """

    __slots__ = ()
    _peftfast_original: Any
    _peftfast_answer: Callable[[Any], Any]

    @property
    def _attn_implementation(self) -> Any:
        return self._peftfast_answer(self._peftfast_original._attn_implementation)

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._peftfast_original._attn_implementation = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return shared_config, (self._peftfast_original, self._peftfast_answer)


def shared_config(original: Any, answer: Callable[[Any], Any]) -> Any:
    """A config that shares all of `original`, which is none of these itself, but whose
    implementation of attention is what `answer` makes of the original's.
    """
    own: Any = type(original)
    kind = _shared_class(own)
    made = kind.__new__(kind)
    object.__setattr__(made, "__dict__", original.__dict__)
    kind._peftfast_original.__set__(made, original)
    kind._peftfast_answer.__set__(made, answer)
    return made


@functools.cache
def _shared_class(kind: Any) -> Any:
    slots = ("_peftfast_original", "_peftfast_answer")
    members = {"__slots__": slots, "__module__": kind.__module__}
    return type(kind.__name__, (SharedConfig, kind), members)


def original_config(config: Any) -> Any:
    """The config that a shared one stands for; any other as it is."""
    return config._peftfast_original if isinstance(config, SharedConfig) else config


@dataclass(frozen=True)
class WithPrefix:
    """The answer of a module with a source."""

    source: Source

    def __call__(self, asked: Any) -> Any:
        return NAME if self.source.length() else asked


@functools.cache
def asks_interface(kind: Any) -> bool:
    """Whether a class's forward asks the interface, by the names in its code."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names = () if code is None else code.co_names
    return "ALL_ATTENTION_FUNCTIONS" in names and "_attn_implementation" in names


@functools.cache
def _calls(kind: Any) -> int:
    """How often a class's forward calls what the interface gives it, by the name that transformers
    has for that.
    """
    code = inspect.unwrap(kind.forward).__code__
    loaded = [one.argval for one in dis.get_instructions(code) if one.opname.startswith("LOAD_")]
    names = [name for one in loaded for name in (one if isinstance(one, tuple) else (one,))]
    return names.count("attention_interface")


def obstacle(core: nn.Module) -> str | None:
    """Why a prefix can't reach an attention module; None where it can."""
    kind: Any = type(core)
    if source_of(core) is not None:  # it was reached
        return _unserved(original_config(core.config)._attn_implementation)
    if not asks_interface(kind):
        return (
            f"{kind.__module__}.{kind.__qualname__} computes attention in its own forward: it does"
            " not ask transformers' AttentionInterface (ALL_ATTENTION_FUNCTIONS, by"
            " config._attn_implementation), through which a prefix gets in"
        )
    if _calls(kind) > 1:
        return (
            f"{kind.__module__}.{kind.__qualname__} attends more than once in a forward, and a"
            " prefix is of one attention"
        )
    config: Any = getattr(core, "config", None)
    layers, index = getattr(config, "layer_types", None), getattr(core, "layer_idx", None)
    if layers and isinstance(index, int) and layers[index] == "chunked_attention":
        return (
            f"{kind.__module__}.{kind.__qualname__} attends within chunks of the sequence, in which"
            " a prefix has no place"
        )
    asked = getattr(original_config(config), "_attn_implementation", None)
    if asked is None:
        return f"{kind.__module__}.{kind.__qualname__} has no config that names its attention"
    return _unserved(asked)


def _unserved(asked: str) -> str | None:
    if asked in ("sdpa", "eager", "peftfast_sdpa") or asked.startswith("flash_attention"):
        return None
    return (
        f"its attention is {asked!r}, whose masks prefixes don't read; load the model with"
        ' attn_implementation="sdpa", "eager" or a flash attention'
    )


def attach(core: Any, source: Source) -> None:
    """Have an attention module attend to the prefix of a source.

    Raises:
        ValueError: it can't be reached (`obstacle`), or has another source.
    """
    if (reason := obstacle(core)) is not None:
        raise ValueError(reason)
    held = source_of(core)
    if held is source:
        return
    if held is not None:
        raise ValueError(f"{type(core).__name__} has a prefix of another source")
    core.__dict__[_SOURCE] = (source,)  # in a tuple, so that it is no submodule
    core.config = shared_config(original_config(core.config), WithPrefix(source))


def detach(core: Any) -> None:
    """Undo `attach`."""
    if core.__dict__.pop(_SOURCE, None) is not None:
        core.config = original_config(core.config)


def source_of(core: nn.Module) -> Source | None:
    """What `attach` gave an attention module."""
    held: tuple[Source] | None = core.__dict__.get(_SOURCE)
    return None if held is None else held[0]


def joined(prefixes: Sequence[Prefix]) -> Prefix | None:
    """Several prefixes as one, one after another.

    Raises:
        ValueError: they have gates, indices or differing forms.
    """
    if len(prefixes) < 2:
        return prefixes[0] if prefixes else None
    first = prefixes[0]
    for one in prefixes:
        if one.gate is not None or one.index is not None or one.form != first.form:
            raise ValueError(
                "several prefixes are active in one attention, and one of them has a gate, an"
                f" index or another form ({', '.join(sorted({p.form for p in prefixes}))}): they"
                " can't be joined"
            )
    k = torch.cat([one.k for one in prefixes], dim=1)
    v = torch.cat([one.v for one in prefixes], dim=1)
    return Prefix(k, v, form=first.form, impl=first.impl)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a module's prefix and the sequence, as transformers' attention functions.

    query [B, Hq, S, D]; key, value [B, Hkv, T, D]; gives [B, S, Hq, D].

    Raises:
        ValueError: attention probabilities are wanted, or a mask is of an unknown kind.
    """
    source = source_of(module)
    prefix = None if source is None else source.take()
    if prefix is None:
        raise RuntimeError(
            f"{type(module).__name__} was asked for the attention {NAME!r} and has no prefix:"
            " it is chosen by adapters, not by attn_implementation"
        )
    asked = module.config._peftfast_original._attn_implementation
    if (reason := _unserved(asked)) is not None:
        raise ValueError(f"{type(module).__name__} can't use a prefix: {reason}")
    for name in _WITHOUT:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} hands {name} to attention with a prefix")
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions is not available with a prefix: probabilities are never made"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    queries, keys = query.shape[2], key.shape[2]
    mask = attention_mask
    causal = bool(is_causal) and queries > 1
    if mask is not None and mask.ndim == 2:  # of flash attention: which keys are there
        mask = mask[:, None, None, -keys:].bool()
    elif mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise ValueError(
                f"attention_mask of {type(module).__name__} is {type(mask).__name__}; with a prefix"
                " a tensor of 2 or 4 dimensions is needed"
            )
        mask, causal = mask[..., :keys], False
    elif causal and keys > queries:  # an empty static cache: the rest isn't filled yet
        key, value = key[:, :, :queries], value[:, :, :queries]
    if attention_mask is None and asked.startswith("flash_attention"):
        mask = _documents(kwargs.get("position_ids"), queries, keys)
    if position_bias is not None:
        mask, causal = _biased(module, position_bias, mask, causal, query), False
    window = sliding_window if is_causal else None
    seen = None
    if window is not None and mask is not None and mask.ndim == 4 and keys != queries:
        seen, window = _within(window, mask, prefix.k.shape[-2]), None  # the mask has its part
    y = prefix_attention(
        query,
        key,
        value,
        prefix.k,
        prefix.v,
        attn_mask=mask,
        prefix_mask=seen,
        is_causal=causal,
        scale=scaling,
        window=window,
        softcap=softcap,
        sinks=s_aux,
        prefix_index=prefix.index,
        prefix_lengths=prefix.lengths,
        gate=prefix.gate,
        form=prefix.form,
        dropout_p=dropout,
        impl=prefix.impl,
    )
    return y.transpose(1, 2).contiguous(), None


def _documents(position_ids: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """Which keys are of a query's own document, [B, 1, S, S], where positions start again within a
    row (packed sequences, which a flash attention finds by itself); None where they don't.
    """
    if position_ids is None or position_ids.ndim != 2 or queries != keys or queries == 1:
        return None
    document = find_packed_sequence_indices(position_ids)
    if document is None:
        return None
    return (document[:, :, None] == document[:, None, :]).unsqueeze(1)


def _within(window: int, mask: Tensor, rows: int) -> Tensor:
    """Which rows of a prefix a sliding window shows, [B, H, S, P]: a query is where the last key is
    that its mask shows. (The last of all keys may be a place that a static cache keeps free.)
    """
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    last = shown.shape[-1] - 1 - shown.flip(-1).int().argmax(-1, keepdim=True)
    return last + rows - torch.arange(rows, device=mask.device) < window


def _biased(module: Any, bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor) -> Tensor:
    """A mask with a bias for each pair of positions; a prefix has none."""
    if bias.requires_grad and bias.grad_fn is not None and torch.is_grad_enabled():
        raise ValueError(
            f"the relative position bias of {type(module).__name__} is being trained, which"
            " attention with a prefix doesn't support: freeze it"
        )
    bias = bias.detach().to(query.dtype)
    if mask is None:
        if not causal:
            return bias
        queries, keys = bias.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device)
        mask = mask.tril(keys - queries)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return bias + mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
