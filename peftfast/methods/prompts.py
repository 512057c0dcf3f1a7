"""Prompt embeddings in a model's input: rows at any positions, beside the real tokens.

A virtual token has an id: the embedding's size plus its row's place in the table of all prompts.
The model's forward puts these ids (and a template's own tokens) into input_ids and makes
attention_mask, token_type_ids, position_ids and labels as long; the embedding looks the rows up.
Thus what a model reads from input_ids, such as where padding begins, stays right. Inputs that are
embeddings get rows in the same places.

Both are class swaps on the instance. `generate` puts prompts in before the first forward, and later
steps only lengthen masks and positions.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfast.methods.sites import base_of, find_blocks

VIRTUAL = "[P]"
SLOT = "{x}"
MASK = "mask"
POSITIONS = ("start", "after_first", "end")
IGNORED = -100
_STATE = "_peftfast_prompts"
# Of `forward`, beside the model's own. PEFT's models of a task_type keep task_ids for themselves.
_TASKS = ("task_ids", "prompt_tasks")
_LENGTH = "prompt_length"  # of the input of `generate`, without prompts
_READY = "prompts_are_in"
_COMMON = 5000  # the tokens of a vocabulary that are sampled from (Lester et al., section 3.1)


@dataclass(frozen=True)
class Prompt:
    """One prompt as it acts: what stands before and after the slot, as ids (of virtual tokens:
    places in the prompt), and how many real tokens stay outside at either end.
    """

    module: Any
    head: tuple[Any, ...]
    tail: tuple[Any, ...]
    leading: int
    trailing: int
    first: int  # the id of its first row

    @property
    def added(self) -> int:
        return len(self.head) + len(self.tail)

    @property
    def masks(self) -> int:
        return sum(isinstance(one, dict) for one in (*self.head, *self.tail))


class Prompts:
    """The prompts of a model, which a host has."""

    def __init__(self, host: Any, encodes: bool) -> None:
        self._host = (host,)  # in a tuple, so that it is no submodule
        self.encodes = encodes

    def modules(self) -> list[Any]:
        """Those that act now."""
        return [module for _, module in self._host[0].acting("prompt")]

    def acting(self, size: int) -> list[Prompt]:
        """Those that act now, for an embedding of that size."""
        found = []
        for placement, module in self._host[0].acting("prompt"):
            head, tail, position = self._parts(placement.component)
            inside = int(position == "after_first")
            found.append(Prompt(module, head, tail, inside, inside, size))
            size += module.tasks * module.num_virtual_tokens
        return found

    def _parts(self, component: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], str]:
        position = component.position or ("after_first" if self.encodes else "start")
        entries = component.template
        if entries is None:
            entries = [VIRTUAL] * component.virtual_tokens
            entries = [SLOT, *entries] if position == "end" else [*entries, SLOT]
        numbered: list[Any] = []
        count = 0
        for one in entries:
            numbered.append(("row", count) if one == VIRTUAL else one)
            count += one == VIRTUAL
        slot = numbered.index(SLOT)
        return tuple(numbered[:slot]), tuple(numbered[slot + 1 :]), position


@dataclass(frozen=True)
class Embedded:
    """A model's inputs with the prompts in them.

    `inputs` are the keyword arguments as the model without prompts gets them, with inputs_embeds
    [B, L, d]; the others are places in L: `prompts` [B, P] of the virtual tokens, `slot` [B, S] of
    the columns that were given, and `masks` [B, M] of a template's [MASK]s.
    """

    inputs: dict[str, Any]
    prompts: Tensor
    slot: Tensor
    masks: Tensor


def attach(model: Any, host: Any) -> None:
    """Have a Hugging Face model put the prompts of a host into its input.

    Rows that are to start as embeddings of tokens get their values here.

    Args:
        model: a `transformers.PreTrainedModel` with token embeddings.
        host: what has the prompts; its `acting("prompt")` gives those that act, as pairs of a
            placement and a `peftfast.nn.PromptEmbedding`.

    Raises:
        ValueError: the model embeds no tokens, or its forward has been replaced on the instance.
    """
    detach(model)
    embeddings = _embeddings(model)
    for module in (model, *embeddings):
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise ValueError(
                f"prompts can't be put into the input of {type(module).__name__}: its forward is"
                " replaced on the instance; attach them before what replaces it"
            )
    state = Prompts(host, _encodes(model))
    _start(host, embeddings[0])
    for module in embeddings:
        _swap(module, _embedding_class(type(module)), state)
    _swap(model, _model_class(type(model)), state)


def detach(model: Any) -> None:
    """Undo `attach`; nothing happens where there are no prompts."""
    for module in model.modules():
        if vars(module).pop(_STATE, None) is not None:
            module.__class__ = type(module)._peftfast_source
            if "_old_forward" in vars(module):
                module._old_forward = types.MethodType(type(module).forward, module)


def embedded(model: Any, **inputs: Any) -> Embedded:
    """What a model with prompts embeds of its inputs.

    Args:
        model: one with active prompts, or a PeftModel of it.
        inputs: the keyword arguments of its forward.

    Raises:
        ValueError: no prompt acts on the model.
    """
    model = next((one for one in model.modules() if isinstance(one, _Prompted)), None)
    state = None if model is None else vars(model)[_STATE]
    if model is None or not state.modules():
        raise ValueError("no prompts act on the model")
    given = {**inputs}
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    first = ids if ids is not None else embeds
    if first is None:
        raise ValueError("neither input_ids nor inputs_embeds is given")
    rows, columns = first.shape[:2]
    size = _size(model)
    # Where each column goes, and which are virtual or masks, by lengthening their numbers.
    places = torch.arange(columns, device=first.device).expand(rows, columns)
    tasks = _take_tasks({**given})
    masks = torch.zeros_like(places, dtype=torch.bool)
    virtual = masks
    mask = given.get("attention_mask")
    for prompt in state.acting(size):
        layout = _Layout(prompt, mask, rows, places.shape[1], first.device, None)
        places = layout.put(places, -1)
        masks = layout.put(masks, False) | layout.is_mask
        virtual = layout.put(virtual, False) | layout.is_virtual
        mask = layout.put_mask(mask)
    longer = _lengthened(model, state, given, tasks)
    if longer.get("inputs_embeds") is None:
        longer["inputs_embeds"] = _embeddings(model)[0](longer.pop("input_ids"))
    return Embedded(
        longer,
        _columns(virtual, rows),
        _columns(places >= 0, rows),
        _columns(masks, rows),
    )


def _columns(chosen: Tensor, rows: int) -> Tensor:
    return chosen.nonzero()[:, 1].view(rows, -1)


# Where the real tokens are, and what comes between.


class _Layout:
    """One prompt in rows of real tokens: head before the real column `begin`, tail before `end`.

    Padding at either end and holes keep their places; rows of padding alone take the prompt at
    their beginning.
    """

    def __init__(
        self,
        prompt: Prompt,
        mask: Tensor | None,
        rows: int,
        columns: int,
        device: torch.device,
        tasks: Tensor | None,
    ) -> None:
        self.prompt, self.columns = prompt, columns
        before, after = len(prompt.head), len(prompt.tail)
        if mask is None:
            start = torch.zeros(1, 1, dtype=torch.long, device=device)
            stop = start + columns
        else:
            real = mask != 0
            none = ~real.any(1, keepdim=True)
            start = real.int().argmax(1, keepdim=True)
            stop = columns - real.flip(1).int().argmax(1, keepdim=True)
            stop = torch.where(none, start, stop)
        begin = torch.minimum(start + prompt.leading, stop)
        end = torch.maximum(stop - prompt.trailing, begin)
        place = torch.arange(columns + before + after, device=device).unsqueeze(0)
        self.in_head = (place >= begin) & (place < begin + before)  # [B or 1, L]
        self.in_tail = (place >= end + before) & (place < end + before + after)
        self.is_added = (self.in_head | self.in_tail).expand(rows, -1)
        source = place - before * (place >= begin + before)
        source = source - after * (place >= end + before + after)
        # An added place takes what belongs to the real token before it, or else after it.
        near = torch.where(self.in_head, begin - 1, end - 1)
        near = torch.maximum(near, torch.minimum(start, stop - 1))
        self.source = torch.where(self.in_head | self.in_tail, near, source)
        self.source = self.source.clamp(0, columns - 1).expand(rows, -1)
        # Places in head, tail: [B or 1, L], of no meaning elsewhere.
        item = torch.where(self.in_head, place - begin, place - end - before + before)
        self.item = item.clamp(0, before + after - 1).expand(rows, -1)
        self.ahead = torch.where(self.in_head, place - begin + 1, place - end + 1)
        self.starts_row = (self.in_head & (begin == start)) | (self.in_tail & (end == start))
        self.moved = before * (place >= begin + before) + after * (place >= end + before + after)
        self.begin, self.end, self.before, self.after = begin, end, before, after
        self.tasks = tasks

    def put(self, value: Tensor, fill: Any) -> Tensor:
        """value [..., S] with `fill` at the added places: [..., L]."""
        return self.near(value).masked_fill(self.is_added, fill)

    def near(self, value: Tensor) -> Tensor:
        """value [..., S] with a neighbour's at the added places: [..., L]."""
        source = self.source
        if value.shape[-2] == 1 and source.shape[0] > 1:
            value = value.expand(*value.shape[:-2], source.shape[0], value.shape[-1])
        return value.gather(-1, source.expand(*value.shape[:-1], source.shape[-1]))

    def put_mask(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else self.put(mask, 1)

    def put_positions(self, positions: Tensor) -> Tensor:
        """Positions that go on through the added places; those after it move."""
        near = self.near(positions)
        added = near + torch.where(self.starts_row, self.ahead - 1, self.ahead)
        return torch.where(self.is_added, added, near + self.moved)

    def where(self, columns: Tensor) -> Tensor:
        """The new places of columns [B]; those beyond the row stay beyond it."""
        columns = columns.unsqueeze(1)
        moved = columns + self.before * (columns >= self.begin) + self.after * (columns >= self.end)
        inside = (columns >= 0) & (columns < self.columns)
        beyond = columns + (self.before + self.after) * (columns > 0)
        return torch.where(inside, moved, beyond).squeeze(1)

    def _of_entries(self, values: Sequence[int]) -> Tensor:
        """One number for each entry of head and tail, at their places: [B, L]."""
        return torch.tensor(values, device=self.item.device)[self.item]

    @property
    def _entries(self) -> tuple[Any, ...]:
        return (*self.prompt.head, *self.prompt.tail)

    @property
    def is_mask(self) -> Tensor:
        chosen = self._of_entries([isinstance(one, dict) for one in self._entries])
        return chosen & self.is_added

    @property
    def is_virtual(self) -> Tensor:
        chosen = self._of_entries([isinstance(one, tuple) for one in self._entries])
        return chosen & self.is_added

    def ids(self) -> Tensor:
        """The ids at the added places [B, L]."""
        first = self.prompt.first
        values = [
            first + one[1] if isinstance(one, tuple) else _token(one) for one in self._entries
        ]
        ids = self._of_entries(values)
        if self.tasks is None:
            return ids
        shift = self.tasks.to(ids).unsqueeze(1) * self.prompt.module.num_virtual_tokens
        return torch.where(self.is_virtual, ids + shift, ids)


def _token(entry: Any) -> int:
    return int(entry[MASK]) if isinstance(entry, dict) else int(entry)


# The inputs of a forward.


def _lengthened(
    model: Any,
    state: Prompts,
    inputs: dict[str, Any],
    tasks: Tensor | None,
    real: int | None = None,
    inserted: bool = False,
) -> dict[str, Any]:
    """The inputs with every prompt that acts in them.

    Args:
        real: how many columns were there when the prompts were put in; later ones come after all.
        inserted: whether the ids are after prompts that are in the cache.
    """
    inputs = {name: value for name, value in inputs.items() if name not in _TASKS}
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    first = ids if ids is not None else embeds
    mask = inputs.get("attention_mask")
    size = _size(model)
    for prompt in state.acting(size):
        chosen = _tasks_of(prompt, tasks, first)
        if first is not None and ids is not None and ids.dim() != 2:
            raise ValueError(
                f"input_ids has the shape {tuple(ids.shape)}; prompts are put into [B, S]"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask has the shape {shape}; prompts are put into one of [B, S], or None"
            )
        if inserted:
            inputs = _later(prompt, inputs, real)
        else:
            inputs = _first(model, prompt, inputs, chosen, real)
        mask = inputs.get("attention_mask")
        first = inputs.get("input_ids")
        first = inputs.get("inputs_embeds") if first is None else first
    return inputs


def _first(
    model: Any, prompt: Prompt, inputs: dict[str, Any], tasks: Tensor | None, real: int | None
) -> dict[str, Any]:
    """One prompt in inputs that hold the beginning."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    first: Any = ids if ids is not None else embeds
    rows, columns = first.shape[:2]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1] != columns:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns; the input has {columns}, and no cache"
            " holds others"
        )
    if real is not None and real < columns:
        # What was generated comes after the prompt: it counts as no part of the rows.
        own = torch.zeros(rows, columns, dtype=torch.bool, device=first.device)
        own[:, :real] = True if mask is None else mask[:, :real] != 0
        layout = _Layout(prompt, own, rows, columns, first.device, tasks)
    else:
        layout = _Layout(prompt, mask, rows, columns, first.device, tasks)
    found = dict(inputs)
    if ids is not None:
        found["input_ids"] = torch.where(layout.is_added, layout.ids().to(ids), layout.near(ids))
    if embeds is not None:
        added = _embeddings(model)[0](layout.ids().masked_fill(~layout.is_added, 0))
        source = layout.source.unsqueeze(-1).expand(-1, -1, embeds.shape[-1])
        kept = embeds.gather(1, source)
        chosen = layout.is_added.unsqueeze(-1)
        found["inputs_embeds"] = torch.where(chosen, added.to(embeds.dtype), kept)
    if mask is not None:
        found["attention_mask"] = layout.put_mask(mask)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if inputs.get(name) is not None:
            found[name] = layout.near(inputs[name])
    if inputs.get("position_ids") is not None:
        found["position_ids"] = layout.put_positions(inputs["position_ids"])
    if inputs.get("cache_position") is not None:
        start = inputs["cache_position"][:1]
        found["cache_position"] = start + torch.arange(columns + prompt.added, device=first.device)
    if not model.config.is_encoder_decoder:
        if inputs.get("labels") is not None:
            found["labels"] = _labels(model, layout, inputs["labels"], (rows, columns))
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                found[name] = layout.where(inputs[name])
    return found


def _later(prompt: Prompt, inputs: dict[str, Any], real: int | None) -> dict[str, Any]:
    """Inputs that come after a prompt in the cache: masks and positions alone are longer."""
    found = dict(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None:
        begun = mask.shape[1] if real is None else min(real, mask.shape[1])
        layout = _Layout(prompt, mask[:, :begun], mask.shape[0], begun, mask.device, None)
        found["attention_mask"] = torch.cat([layout.put(mask[:, :begun], 1), mask[:, begun:]], 1)
    for name in ("position_ids", "cache_position"):
        if inputs.get(name) is not None:
            found[name] = inputs[name] + prompt.added
    return found


def _labels(model: Any, layout: _Layout, labels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Labels of tokens at their tokens' places; those of a template's [MASK]s there."""
    if tuple(labels.shape) == shape and not labels.is_floating_point():
        return layout.put(labels, IGNORED)
    masks = layout.prompt.masks
    if not masks or model.get_output_embeddings() is None:
        return labels  # of the whole sequence
    given = labels.unsqueeze(1) if labels.dim() == 1 else labels
    if tuple(given.shape) != (shape[0], masks):
        raise ValueError(
            f"labels has the shape {tuple(labels.shape)}; {shape} is needed, or ({shape[0]},"
            f" {masks}) for the template's {masks} [MASK]"
        )
    chosen = layout.is_mask
    order = (chosen.long().cumsum(1) - 1).clamp(min=0)
    return given.gather(1, order).masked_fill(~chosen, IGNORED)


def _take_tasks(inputs: dict[str, Any]) -> Tensor | None:
    """Take the tasks out of a forward's arguments."""
    given = [inputs.pop(name, None) for name in _TASKS]
    return next((one for one in given if one is not None), None)


def _tasks_of(prompt: Prompt, tasks: Tensor | None, first: Any) -> Tensor | None:
    """The tasks [B] for a prompt; None: it has one."""
    count = prompt.module.tasks
    if tasks is None:
        if count > 1:
            raise ValueError(
                f"task_ids is missing: the prompt has {count} tasks, and each row needs one. PEFT's"
                " models of a task_type don't pass task_ids on in forward: call it prompt_tasks"
            )
        return None
    rows = first.shape[0] if first is not None else tasks.shape[0]
    if tasks.shape != (rows,) or tasks.is_floating_point():
        raise ValueError(
            f"task_ids has the shape {tuple(tasks.shape)} and dtype {tasks.dtype}; integers"
            f" [{rows}] are needed"
        )
    if tasks.device.type == "cpu" and not bool(((tasks >= 0) & (tasks < count)).all()):
        raise ValueError(f"task_ids has {tasks.tolist()}; the prompt has tasks 0 to {count - 1}")
    return tasks if count > 1 else None


# The swapped classes.


class _Prompted(nn.Module):
    """A Hugging Face model whose input gets prompts."""

    _peftfast_source: Any
    _peftfast_names: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        source = kind._peftfast_source.forward
        if kwargs.pop(_READY, False):
            return source(self, *args, **kwargs)
        inputs = {**dict(zip(kind._peftfast_names, args, strict=False)), **kwargs}
        tasks, real = _take_tasks(inputs), inputs.pop(_LENGTH, None)
        state: Prompts = vars(self)[_STATE]
        has_input = any(inputs.get(name) is not None for name in ("input_ids", "inputs_embeds"))
        if has_input and inputs.get("encoder_outputs") is None and state.modules():
            held = _held(self, inputs.get("past_key_values"))
            if held and real is None:
                real = held - sum(one.added for one in state.acting(0))
            inputs = _lengthened(self, state, inputs, tasks, real, inserted=held > 0)
        return source(self, **inputs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, ("model", type(self)._peftfast_source), self.__dict__


class _PromptedGenerator(_Prompted):
    """One that generates."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        source = type(self)._peftfast_source.generate
        state: Prompts = vars(self)[_STATE]
        given = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
        first = next((one for one in (*args[:1], *given) if one is not None), None)
        if not state.modules() or not isinstance(first, Tensor):
            return source(self, *args, **kwargs)
        if not self.config.is_encoder_decoder:
            kwargs.setdefault(_LENGTH, first.shape[1])
            return source(self, *args, **kwargs)
        tasks = _take_tasks(kwargs)
        if kwargs.get("encoder_outputs") is None:
            name = "inputs_embeds" if first is given[2] else "input_ids"
            held = {name: first, "attention_mask": kwargs.pop("attention_mask", None)}
            for key in ("inputs", name):
                kwargs.pop(key, None)
            longer = _lengthened(self, state, held, tasks)
            kwargs.update((key, value) for key, value in longer.items() if value is not None)
            args = args[1:] and (None, *args[1:])
        return source(self, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        source = kind._peftfast_source.prepare_inputs_for_generation
        state: Prompts = vars(self)[_STATE]
        if self.config.is_encoder_decoder or not state.modules():
            return source(self, input_ids, *args, **kwargs)
        names = tuple(inspect.signature(source).parameters)[2:]
        kwargs.update(zip(names, args, strict=False))
        tasks, real = _take_tasks(kwargs), kwargs.pop(_LENGTH, None)
        held = _held(self, kwargs.get("past_key_values"))
        added = sum(one.added for one in state.acting(0))
        taken = ("attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")
        inputs = {"input_ids": input_ids, **{name: kwargs.pop(name, None) for name in taken}}
        if kwargs.get("is_first_iteration"):
            inputs["inputs_embeds"] = kwargs.pop("inputs_embeds", None)
            if kwargs.get("next_sequence_length") is not None:
                kwargs["next_sequence_length"] += added
            if inputs["inputs_embeds"] is not None:
                del inputs["input_ids"]
        inputs = _lengthened(self, state, inputs, tasks, real, inserted=held > 0)
        inputs.setdefault("input_ids", input_ids)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        prepared = source(self, **inputs, **kwargs)
        return {**prepared, _READY: True}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Of a generation whose cache has room for the prompts too."""
        source = type(self)._peftfast_source._prepare_cache_for_generation
        bound = inspect.signature(source).bind(self, *args, **kwargs)
        state: Prompts = vars(self)[_STATE]
        if not self.config.is_encoder_decoder:
            bound.arguments["max_cache_length"] += sum(one.added for one in state.acting(0))
        return source(*bound.args, **bound.kwargs)


class _PromptedEmbedding(nn.Module):
    """An embedding whose ids from its size on are rows of prompts."""

    _peftfast_source: Any

    def forward(self, input: Tensor) -> Tensor:
        source = type(self)._peftfast_source.forward
        modules = vars(self)[_STATE].modules()
        # Whole prompts only are put in: fewer columns have none.
        if not modules or input.shape[-1] < min(one.num_virtual_tokens for one in modules):
            plain: Tensor = source(self, input)
            return plain
        size = _rows_of(self)
        virtual = input >= size
        out: Tensor = source(self, input.masked_fill(virtual, 0))
        tables = [one.rows().to(device=out.device, dtype=out.dtype) for one in modules]
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        rows = F.embedding((input - size).clamp(min=0), table)
        return torch.where(virtual.unsqueeze(-1), rows, out)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, ("embedding", type(self)._peftfast_source), self.__dict__


@functools.cache
def _model_class(source: Any) -> Any:
    generates = hasattr(source, "generate")
    base: type[_Prompted] = _PromptedGenerator if generates else _Prompted
    signature = inspect.signature(source.forward)
    # transformers reads there what `generate` and Trainer may pass.
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in (*_TASKS, _LENGTH, _READY)
    ]
    given = list(signature.parameters.values())
    rest = [given.pop()] if given[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    forward = _named_as(source.forward, base.forward)
    forward.__signature__ = signature.replace(parameters=[*given, *own, *rest])
    members = {
        "__module__": source.__module__,
        "__doc__": source.__doc__,
        "_peftfast_source": source,
        "_peftfast_names": tuple(one.name for one in given[1:]),
        "forward": forward,
    }
    if generates:
        for name in ("generate", "prepare_inputs_for_generation"):
            members[name] = _named_as(getattr(source, name), getattr(base, name))
    return type(source.__name__, (base, source), members)


def _named_as(source: Any, function: Any) -> Any:
    """A function with another's signature."""

    @functools.wraps(source)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return call


@functools.cache
def _embedding_class(source: Any) -> Any:
    members = {"__module__": source.__module__, "_peftfast_source": source}
    return type(source.__name__, (_PromptedEmbedding, source), members)


def _unpickled(what: str, source: Any) -> Any:
    kind = _model_class(source) if what == "model" else _embedding_class(source)
    return kind.__new__(kind)


def _swap(module: Any, kind: Any, state: Prompts) -> None:
    module.__dict__[_STATE] = state
    module.__class__ = kind
    if "_old_forward" in vars(module):  # accelerate's hook calls it
        module._old_forward = types.MethodType(kind.forward, module)


# What a model is.


def _embeddings(model: Any) -> list[Any]:
    """The modules that embed the tokens of the input: the first is the one whose values count,
    the others have the same weight.
    """
    root = model.get_encoder() if model.config.is_encoder_decoder else model
    held = base_of(root.get_input_embeddings())
    weight = getattr(held, "weight", None)
    if not isinstance(held, nn.Embedding) or weight is None:
        raise ValueError(
            f"the input embeddings of {type(model).__name__} are a {type(held).__name__}, not an"
            " embedding of tokens: there is no place for prompts"
        )
    others = [
        one
        for one in model.modules()
        if isinstance(one, nn.Embedding) and one is not held and one.weight is weight
    ]
    return [held, *others]


def _size(model: Any) -> int:
    return _rows_of(_embeddings(model)[0])


def _rows_of(embedding: Any) -> int:
    return int(embedding.num_embeddings)


def _encodes(model: Any) -> bool:
    """Whether the first token's value is what a sequence is classified by: in models of one stack
    that is not causal.
    """
    if model.config.is_encoder_decoder:
        return False
    stacks = {block.stack for block in find_blocks(model)}
    return stacks == {"encoder"}


def _held(model: Any, cache: Any) -> int:
    """How many tokens a cache holds."""
    if cache is None or model.config.is_encoder_decoder:
        return 0
    if not hasattr(cache, "get_seq_length"):
        return int(cache[0][0].shape[-2])
    return int(cache.get_seq_length())


@torch.no_grad()
def _start(host: Any, embedding: Any) -> None:
    """Give those prompts their values that start as embeddings of tokens."""
    for name in host.adapters():
        for placement, module in host.components(name):
            component = placement.component
            if component.primitive != "prompt" or not module.awaits_rows:
                continue
            device = embedding.weight.device
            count = module.num_virtual_tokens
            given = [[one] if isinstance(one, int) else one for one in component.init_tokens or []]
            prompts = []
            for _ in range(module.tasks):
                sampled = torch.randint(min(_COMMON, embedding.num_embeddings), (count,)).tolist()
                tokens = [*given, *([one] for one in sampled[len(given) :])][:count]
                prompts += [
                    embedding(torch.tensor(one, device=device)).float().mean(0) for one in tokens
                ]
            module.start(torch.stack(prompts))
