"""What the papers compare adapters with: parts of a model trained as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from torch import nn

from peftfast.methods import find_blocks, find_norms


def head_only(model: nn.Module, *, head: Sequence[str] | None = None) -> nn.Module:
    """A copy of a model of which only the head trains.

    Args:
        model: stays as it is.
        head: names of the modules that are the head. None: what a model of transformers has beside
            its `base_model`, such as the classifier; a head that shares its weights with the
            embeddings trains both.

    Raises:
        ValueError: the model has no such head; no module is called so.
    """
    return _copy(model, head, ())


def norms_only(model: nn.Module, *, head: Sequence[str] | None = None) -> nn.Module:
    """A copy of a model of which every LayerNorm and RMSNorm, and the head, train (Houlsby et al.,
    ICML 2019, section 3.4).

    Arguments and errors as in `head_only`; ValueError too where there is no norm.
    """
    norms = find_norms(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no LayerNorm and no RMSNorm")
    return _copy(model, head, norms)


def top_layers(model: nn.Module, count: int, *, head: Sequence[str] | None = None) -> nn.Module:
    """A copy of a model of which the last `count` layers and the head train ("variable
    fine-tuning", Houlsby et al., ICML 2019, section 3.2).

    Layers count over the stacks in their order, encoder before decoder. What follows the last layer
    within the base model, such as a final norm or BERT's pooler, trains where `head` names it.

    Arguments and errors as in `head_only`; ValueError too where the model has fewer layers.
    """
    blocks = find_blocks(model)
    if not 1 <= count <= len(blocks):
        raise ValueError(
            f"count is {count}; {type(model).__name__} has {len(blocks)} layers, at least 1 is"
            " trained"
        )
    return _copy(model, head, [block.name for block in blocks[-count:]])


def head_of(model: nn.Module) -> list[str]:
    """The names of a model's parameters and modules beside its `base_model`.

    Raises:
        ValueError: there is none: a model without a head, or not one of transformers.
    """
    base = getattr(model, "base_model", model)
    names = [name for name, child in model.named_children() if child is not base]
    names += [name for name, _ in model.named_parameters(recurse=False)]
    if base is model or not names:
        raise ValueError(
            f"{type(model).__name__} has no head beside a base_model; name the modules that are its"
            " head: head=[...]"
        )
    return names


def _copy(model: nn.Module, head: Sequence[str] | None, further: Iterable[str]) -> nn.Module:
    if isinstance(head, str):
        raise TypeError("head is a string; a list of names is needed")
    wanted = [*(head_of(model) if head is None else head), *further]
    chosen = {id(p): name for name in wanted for p in _parameters(model, name)}
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen and not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype} and can't be trained")
    result = copy.deepcopy(model)
    result.requires_grad_(False)
    for name in wanted:
        for parameter in _parameters(result, name):
            parameter.requires_grad_(True)
    return result


def _parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    own = dict(model.named_parameters(recurse=False))
    if name in own:
        return [own[name]]
    try:
        return list(model.get_submodule(name).parameters())
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {name!r}") from error
