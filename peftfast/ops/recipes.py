"""Recipes: how a tensor is made again from others that are saved for the backward anyway.

An op whose output can be rebuilt from what it saves (a norm, an activation, a gated product,
dropout) tags that output with its recipe. A later op that would save the output saves the recipe's
leaves, which share their storage with what is saved already, and rebuilds the tensor, bit for bit,
in its backward. (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, recompute
whole segments; here nothing that costs a matrix product is ever computed again.)

A tag is an attribute of the tensor object. It is lost by `detach()` and by views, except by those
of a whole contiguous tensor. It is not believed where the tensor or an input of its recipe was
changed in place (a change through `.data` can't be seen), nor outside of the region of saved-tensor
hooks (a non-reentrant checkpoint, for example) in which it was made; after such a region its tags
let go of what they hold. Leaves are saved detached, so that a later change in place raises in the
backward.
"""

from __future__ import annotations

import ast
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.ops.operands import no_autocast

# A leaf's number, or (kind, settings, specs of the inputs).
Spec = Any
Settings = tuple[Any, ...]
Builder = Callable[[Sequence[Tensor], Settings], Tensor]

_ATTRIBUTE = "_peftfast_recipe"
_SAVED = "_peftfast_saved"
_BUILDERS: dict[str, Builder] = {}


class Kept(NamedTuple):
    """What to save of a tensor: the leaves, and how `rebuild` makes the tensor of them.

    `spec` is 0 where the only leaf is the tensor itself.
    """

    spec: Spec
    leaves: list[Tensor]


def builder(kind: str) -> Callable[[Builder], Builder]:
    """Declares the function below it as what rebuilds tensors of a kind.

    It takes the inputs and the settings given to `tag`, runs without grad mode and autocast, and
    must give the very bits that were tagged.
    """

    def register(build: Builder) -> Builder:
        _BUILDERS[kind] = build
        return build

    return register


def tag(y: Tensor, kind: str, settings: Settings, inputs: Sequence[Tensor]) -> None:
    """Note that `y` is `kind` of `inputs`; does nothing where grad mode is off.

    Args:
        y: as its op returns it.
        kind: of a `builder`.
        settings: strings, numbers, booleans and None, or tuples of them.
        inputs: which the op itself saves, or tensors that have recipes of their own.
    """
    if not torch.is_grad_enabled():
        return
    if torch.compiler.is_compiling():
        setattr(y, _ATTRIBUTE, _Tag(kind, settings, tuple(_nested(one) for one in inputs), 0, ()))
        return
    if y.is_inference() or any(one.is_inference() for one in inputs):
        return
    sources = tuple(_nested(one) for one in inputs)
    versions = tuple(one._version if isinstance(one, Tensor) else 0 for one in sources)
    made = _Tag(kind, settings, sources, y._version, versions)
    made.region = _here()
    if made.region is not None:
        made.region.tags.add(made)
    setattr(y, _ATTRIBUTE, made)


def keep(x: Tensor, dtype: torch.dtype | None = None) -> Kept:
    """What to save of `x` so that `rebuild` gives it back.

    Where that is a recipe, it ends with a cast to `dtype`, if one is given.
    """
    found, shape = _found(x)
    if found is None:
        return Kept(0, [x])
    leaves: list[Tensor] = []
    spec = _spec(found, leaves)
    if shape is not None:
        spec = ("reshape", shape, (spec,))
    if dtype is not None and dtype != x.dtype:
        spec = ("cast", (str(dtype).removeprefix("torch."),), (spec,))
    return Kept(spec, [leaf.detach() for leaf in leaves])


def rebuild(spec: Spec, leaves: Sequence[Tensor]) -> Tensor:
    """The tensor that `keep` was asked for."""
    if spec == 0:
        return leaves[0]
    with torch.no_grad(), no_autocast(leaves[0]):
        return _built(spec, leaves)


def source(x: Tensor, *kinds: str) -> tuple[str, Settings, tuple[Tensor, ...]] | None:
    """Kind, settings and inputs of the recipe of `x`, if it is of one of `kinds`.

    The inputs are those of the op that made `x`, with their graph; None as well where one of them
    is known by its own recipe only.
    """
    found, shape = _found(x)
    if found is None or found.kind not in kinds:
        return None
    tensors = tuple(one for one in found.inputs if isinstance(one, Tensor))
    if shape is not None or len(tensors) < len(found.inputs):
        return None
    return found.kind, found.settings, tensors


def encode(spec: Spec) -> str:
    """A spec as a library op takes it."""
    return repr(spec)


@functools.lru_cache(maxsize=4096)
def decode(text: str) -> Spec:
    """What `encode` encoded."""
    return ast.literal_eval(text)


def mark_saved(y: Tensor) -> None:
    """Note that the op that made `y` saves it anyway, so that compressing it would gain nothing."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        setattr(y if y._base is None else y._base, _SAVED, True)


def is_saved(x: Tensor) -> bool:
    """Whether `mark_saved` was told of `x`, or of the tensor that it is a view of."""
    if torch.compiler.is_compiling():
        return False
    return hasattr(x if x._base is None else x._base, _SAVED)


class _Tag:
    """A recipe: `inputs` are tensors, or the tags of inputs that have recipes themselves."""

    __slots__ = ("kind", "settings", "inputs", "version", "versions", "region", "__weakref__")

    def __init__(
        self,
        kind: str,
        settings: Settings,
        inputs: tuple[Any, ...],
        version: int,
        versions: tuple[int, ...],
    ) -> None:
        self.kind = kind
        self.settings = settings
        self.inputs = inputs
        self.version = version
        self.versions = versions
        self.region: _Region | None = None

    def holds(self) -> bool:
        """Whether the inputs are as they were."""
        return all(
            one.holds() if isinstance(one, _Tag) else one._version == version
            for one, version in zip(self.inputs, self.versions, strict=True)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_tag, ()  # a copy or a pickle of the tensor has none


def _no_tag() -> None:
    return None


class _Region:
    """The calls during which one pack hook is the innermost, in one thread.

    A checkpoint holds its region's output, and with it the output's tag: so the tags of a region
    are emptied at the first call outside of it.
    """

    def __init__(self) -> None:
        self.over = False
        self.tags: weakref.WeakSet[_Tag] = weakref.WeakSet()

    def end(self) -> None:
        self.over = True
        for one in self.tags:
            one.inputs, one.versions = (), ()


class _Latest(threading.local):
    region: _Region | None = None


_regions: weakref.WeakKeyDictionary[Any, _Region] = weakref.WeakKeyDictionary()
_latest = _Latest()


def _here() -> _Region | None:
    """The present region; None where no hooks are. Ends the one before it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    region = None if hooks is None else _regions.get(hooks[0])
    latest = _latest.region
    if latest is not None and latest is not region:
        latest.end()
    if hooks is not None and (region is None or region.over):
        region = _regions[hooks[0]] = _Region()
    _latest.region = region
    return region


def _nested(x: Tensor) -> Tensor | _Tag:
    found, shape = _found(x)
    return x if found is None or shape is not None else found


def _found(x: Tensor) -> tuple[_Tag | None, tuple[int, ...] | None]:
    """The recipe of `x`, if it may be believed, and the shape to view its result as, if another."""
    found: _Tag | None = getattr(x, _ATTRIBUTE, None)
    if torch.compiler.is_compiling():
        return found, None
    shape = None
    if found is None:
        base = x._base
        found = None if base is None else getattr(base, _ATTRIBUTE, None)
        if base is None or found is None or not _is_all_of(x, base):
            return None, None
        shape = None if x.shape == base.shape else tuple(x.shape)
    if x.is_inference() or x._version != found.version:
        return None, None
    if found.region is not _here() or not found.holds():
        return None, None
    return found, shape


def _is_all_of(x: Tensor, base: Tensor) -> bool:
    return (
        x.dtype == base.dtype
        and x.numel() == base.numel()
        and x.storage_offset() == base.storage_offset()
        and x.is_contiguous()
        and base.is_contiguous()
    )


def _spec(found: _Tag, leaves: list[Tensor]) -> Spec:
    inputs: list[Spec] = []
    for one in found.inputs:
        if isinstance(one, _Tag):
            inputs.append(_spec(one, leaves))
            continue
        at = [index for index, leaf in enumerate(leaves) if leaf is one]
        if not at:
            leaves.append(one)
        inputs.append(at[0] if at else len(leaves) - 1)
    return found.kind, found.settings, tuple(inputs)


def _built(spec: Spec, leaves: Sequence[Tensor]) -> Tensor:
    if isinstance(spec, int):
        return leaves[spec]
    kind, settings, inputs = spec
    return _BUILDERS[kind]([_built(one, leaves) for one in inputs], settings)


@builder("reshape")
def _reshape(inputs: Sequence[Tensor], shape: Settings) -> Tensor:
    return inputs[0].view(shape)


@builder("cast")
def _cast(inputs: Sequence[Tensor], settings: Settings) -> Tensor:
    dtype: torch.dtype = getattr(torch, settings[0])
    return inputs[0].to(dtype)
