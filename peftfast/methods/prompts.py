"""Prompt embeddings in a model's input: rows at any positions, beside the real tokens.

A virtual token has an id: the embedding's size plus its row's place in the table of all prompts.
The model's forward puts these ids (and a template's own tokens) into input_ids and makes
attention_mask, token_type_ids, position_ids and labels as long; the embedding looks the rows up.
Thus what a model reads from input_ids, such as where padding begins, stays right. Inputs that are
embeddings get rows in the same places.

Both are class swaps on the instance. A forward that is set on the model's instance, before or
after, gets inputs with prompts in them too. `generate` puts prompts in before the first forward,
and later steps only lengthen masks and positions.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfast.methods import positions
from peftfast.methods.prompt_inputs import (
    SLOT,
    TASKS,
    VIRTUAL,
    Layout,
    Prompt,
    lengthened,
    mask_of_outputs,
    take_tasks,
    token_of,
)
from peftfast.methods.sites import base_of, find_blocks

_STATE = "_peftfast_prompts"
_LENGTH = "prompt_length"  # of the input of `generate`, without prompts
_READY = "prompts_are_in"
_WITHIN = threading.local()  # `numbers` of the models whose forward on the instance is running
_NUMBERS = itertools.count()
COMMON = 5000  # the tokens of a vocabulary that are sampled from (Lester et al., section 3.1)


class Prompts:
    """The prompts of a model, which a host has."""

    def __init__(self, host: Any, embedding: Any, encodes: bool, limit: int | None) -> None:
        # In tuples, so that they are no submodules.
        self._host, self._embedding = (host,), (embedding,)
        self.encodes = encodes
        self.limit = limit  # how many columns the model has positions for
        # A copy's too: a forward that was set on an instance and copied may call the first one's.
        self.number = next(_NUMBERS)

    @property
    def within(self) -> bool:
        """Whether a forward on the instance is running, which has put them in."""
        return self.number in getattr(_WITHIN, "numbers", ())

    @property
    def embedding(self) -> Any:
        return self._embedding[0]

    def modules(self) -> list[Any]:
        """Those that act now."""
        return [module for _, module in self._host[0].acting("prompt")]

    @property
    def added(self) -> int:
        """How many columns they add now."""
        return sum(one.added for one in self.acting())

    def acting(self) -> list[Prompt]:
        """Those that act now, in the order in which they are put in."""
        found, size = [], _rows_of(self.embedding)
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
        ValueError: the model embeds no tokens, its embedding's forward has been replaced on the
            instance, another model that shares the embedding has prompts, or an id in a template
            or of an initial token is beyond the embedding. The model stays as it was.
    """
    embeddings = _embeddings(model)
    for module in embeddings:
        if vars(module).get(_STATE) not in (None, vars(model).get(_STATE)):
            raise ValueError(
                f"the input embeddings of {type(model).__name__} are shared with another model that"
                " has prompts: unload those first, or give each model embeddings of its own"
            )
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise ValueError(
                f"prompts can't be put into the input of {type(module).__name__}: its forward is"
                " replaced on the instance; attach them before what replaces it"
            )
    _check_ids(host, embeddings[0])
    state = Prompts(host, embeddings[0], _encodes(model), _limit(model))
    _start(host, embeddings[0])
    detach(model)
    kind: Any = type(model)
    model.__dict__[_STATE] = state
    model.__class__ = _model_class(kind)
    if "forward" in vars(model):
        model.forward = vars(model)["forward"]
    for module in embeddings:
        kind = type(module)
        _swap_embedding(module, _embedding_class(kind), state)


def detach(model: Any) -> None:
    """Undo `attach`; nothing happens where there are no prompts."""
    state = vars(model).get(_STATE)
    if state is None:
        return
    for module in model.modules():
        if vars(module).get(_STATE) is not state:
            continue
        del module.__dict__[_STATE]
        module.__class__ = type(module)._peftfast_source
        if "_old_forward" in vars(module) and module is not model:
            module._old_forward = types.MethodType(type(module).forward, module)
    around = vars(model).get("forward")
    if isinstance(around, _Around):
        model.forward = around.__wrapped__


def embedded(model: Any, **inputs: Any) -> Embedded:
    """What a model with prompts embeds of its inputs.

    Args:
        model: one with active prompts, or a PeftModel of it.
        inputs: the keyword arguments of its forward.

    Raises:
        ValueError: no prompt acts on the model.
    """
    model = next((one for one in model.modules() if isinstance(one, _Prompted)), model)
    state: Prompts | None = vars(model).get(_STATE)
    if state is None or not state.modules():
        raise ValueError("no prompts act on the model")
    given = {**inputs}
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    first = ids if ids is not None else embeds
    if first is None:
        raise ValueError("neither input_ids nor inputs_embeds is given")
    rows, columns = first.shape[:2]
    # Where each column goes, and which are virtual or masks, by lengthening their numbers.
    places = torch.arange(columns, device=first.device).expand(rows, columns)
    tasks = take_tasks({**given})
    masks = torch.zeros_like(places, dtype=torch.bool)
    virtual = masks
    mask = given.get("attention_mask")
    for prompt in state.acting():
        layout = Layout(prompt, mask, rows, places.shape[1], first.device, None)
        places = layout.put(places, -1)
        masks = layout.put(masks, False) | layout.is_mask
        virtual = layout.put(virtual, False) | layout.is_virtual
        mask = layout.put_mask(mask)
    longer = _longer(model, given, tasks)
    if longer.get("inputs_embeds") is None:
        longer["inputs_embeds"] = state.embedding(longer.pop("input_ids"))
    return Embedded(
        longer,
        _columns(virtual, rows),
        _columns(places >= 0, rows),
        _columns(masks, rows),
    )


def _columns(chosen: Tensor, rows: int) -> Tensor:
    return chosen.nonzero()[:, 1].view(rows, -1)


# The swapped classes.


class _Around:
    """A forward that was set on a model's instance, which gets inputs with prompts in them."""

    def __init__(self, model: Any, forward: Any) -> None:
        self._model, self.__wrapped__ = model, forward

    @property
    def __func__(self) -> Any:  # accelerate takes it of a forward
        return self._called_on

    def _called_on(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = vars(self._model).get(_STATE)
        if state is None or state.within:
            return self.__wrapped__(*args, **kwargs)
        args, kwargs = self._model._with_prompts(args, kwargs)
        held = getattr(_WITHIN, "numbers", ())
        _WITHIN.numbers = (*held, state.number)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            _WITHIN.numbers = held


class _Prompted(nn.Module):
    """A Hugging Face model whose input gets prompts."""

    _peftfast_source: Any
    _peftfast_names: tuple[str, ...]
    config: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and not isinstance(value, _Around):
            value = _Around(self, value)
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        state: Prompts = vars(self)[_STATE]
        if "forward" not in vars(self) or not state.within:
            args, kwargs = self._with_prompts(args, kwargs)
        return kind._peftfast_source.forward(self, *args, **kwargs)

    def _with_prompts(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward's arguments with prompts in them."""
        if kwargs.pop(_READY, False):
            return args, kwargs
        inputs = {**dict(zip(type(self)._peftfast_names, args, strict=False)), **kwargs}
        tasks, real = take_tasks(inputs), inputs.pop(_LENGTH, None)
        state: Prompts = vars(self)[_STATE]
        if not state.modules():
            return (), inputs
        if inputs.get("encoder_outputs") is not None:
            inputs["attention_mask"] = mask_of_outputs(state.acting(), inputs)
        elif any(inputs.get(name) is not None for name in ("input_ids", "inputs_embeds")):
            ids = inputs.get("input_ids")
            held = _held(self, inputs.get("past_key_values"))
            if held and real is None:
                real = held - state.added
            inputs = _longer(self, inputs, tasks, real, inserted=held > 0)
            if not held:
                _check_length(state, inputs)
            if ids is not None and _makes_decoder_ids(self, inputs):
                inputs = _encoded(self, inputs, ids)
        return (), inputs

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, ("model", type(self)._peftfast_source), self.__dict__


class _PromptedGenerator(_Prompted):
    """One that generates."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        source = type(self)._peftfast_source.generate
        state: Prompts = vars(self)[_STATE]
        given = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
        first = next((one for one in (*args[:1], *given) if one is not None), None)
        if not state.modules():
            return source(self, *args, **kwargs)
        if not self.config.is_encoder_decoder:
            if any(one.tail for one in state.acting()):  # which what is generated comes after
                # Without an input there is the token that generation begins with.
                kwargs.setdefault(_LENGTH, first.shape[1] if isinstance(first, Tensor) else 1)
            return source(self, *args, **kwargs)
        if not isinstance(first, Tensor):
            return source(self, *args, **kwargs)
        tasks = take_tasks(kwargs)
        if kwargs.get("encoder_outputs") is None:
            name = "inputs_embeds" if first is given[2] else "input_ids"
            held = {name: first, "attention_mask": kwargs.pop("attention_mask", None)}
            for key in ("inputs", name):
                kwargs.pop(key, None)
            longer = _longer(self, held, tasks)
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
        tasks, real = take_tasks(kwargs), kwargs.pop(_LENGTH, None)
        held = _held(self, kwargs.get("past_key_values"))
        added = state.added
        taken = ("attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")
        inputs = {"input_ids": input_ids, **{name: kwargs.pop(name, None) for name in taken}}
        if kwargs.get("is_first_iteration"):
            if kwargs.get("next_sequence_length") is not None:
                kwargs["next_sequence_length"] += added
            if kwargs.get("inputs_embeds") is not None:
                del inputs["input_ids"]
                inputs["inputs_embeds"] = kwargs.pop("inputs_embeds")
        first = inputs.get("inputs_embeds", input_ids)
        if real is not None and not held and first.shape[1] < real:
            raise ValueError(
                "prefill_chunk_size is set, and the prompt's template goes on after the slot: the"
                " input has to be prefilled at once"
            )
        inputs = _longer(self, inputs, tasks, real, inserted=held > 0)
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
            bound.arguments["max_cache_length"] += state.added
        return source(*bound.args, **bound.kwargs)


class _PromptedEmbedding(nn.Module):
    """An embedding whose ids from its size on are rows of prompts."""

    _peftfast_source: Any

    def forward(self, input: Tensor) -> Tensor:
        if _STATE not in vars(self):  # called by what was set on the instance meanwhile
            gone: Tensor = type(self).forward(self, input)
            return gone
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
        for name in (*TASKS, _LENGTH, _READY)
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
    """A function with another's signature, which is the other once prompts are gone."""

    @functools.wraps(source)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _STATE not in vars(self):
            return source(self, *args, **kwargs)
        return function(self, *args, **kwargs)

    return call


@functools.cache
def _embedding_class(source: Any) -> Any:
    members = {"__module__": source.__module__, "_peftfast_source": source}
    return type(source.__name__, (_PromptedEmbedding, source), members)


def _unpickled(what: str, source: Any) -> Any:
    kind = _model_class(source) if what == "model" else _embedding_class(source)
    return kind.__new__(kind)


def _swap_embedding(module: Any, kind: Any, state: Prompts) -> None:
    module.__dict__[_STATE] = state
    module.__class__ = kind
    if "_old_forward" in vars(module):  # accelerate's hook calls it
        module._old_forward = types.MethodType(kind.forward, module)


# What a model is.


def _longer(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> dict[str, Any]:
    """The inputs with the prompts that act now in them."""
    state: Prompts = vars(model)[_STATE]
    return lengthened(model, state.embedding, state.acting(), inputs, *rest, **more)


def _makes_decoder_ids(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a model of two stacks makes the decoder's ids from its input."""
    names = type(model)._peftfast_names
    given = [inputs.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds")]
    return (
        "encoder_outputs" in names
        and "decoder_input_ids" in names
        and not any(one is not None for one in given)
    )


def _encoded(model: Any, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The inputs with what the encoder makes of them, and the ids as they were given: those of the
    decoder, and what is read at their places, are made from these.
    """
    taken = ("input_ids", "attention_mask", "output_attentions", "output_hidden_states")
    given = {name: inputs[name] for name in taken if inputs.get(name) is not None}
    outputs = model.get_encoder()(**given, return_dict=True)
    return {**inputs, "input_ids": ids, "encoder_outputs": outputs}


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


def _limit(model: Any) -> int | None:
    """How many columns a model has learned positions for; None: any number, or it depends on the
    padding.
    """
    root = model.get_encoder() if model.config.is_encoder_decoder else model
    found = [root.get_submodule(name) for name in positions.find(root, "")]
    counts = [
        one.num_embeddings - getattr(one, "offset", 0)
        for one in found
        if isinstance(one, nn.Embedding) and one.padding_idx is None
    ]
    return min(counts, default=None)


def _check_length(state: Prompts, inputs: dict[str, Any]) -> None:
    values = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
    columns = next(value.shape[1] for value in values if value is not None)
    if state.limit is None or inputs.get("position_ids") is not None or columns <= state.limit:
        return
    added = state.added
    raise ValueError(
        f"{columns - added} tokens and {added} of the prompt are more than the {state.limit}"
        f" positions that the model has: cut inputs off at {state.limit - added}"
    )


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


def _check_ids(host: Any, embedding: Any) -> None:
    """Refuse ids of templates and of initial tokens that the embedding has no row for."""
    size = _rows_of(embedding)
    for name in host.adapters():
        for placement, module in host.components(name):
            component = placement.component
            if component.primitive != "prompt":
                continue
            template = [one for one in component.template or [] if one not in (SLOT, VIRTUAL)]
            given = {"template": [token_of(one) for one in template], "init_tokens": []}
            if module.awaits_rows:
                for one in component.init_tokens or []:
                    given["init_tokens"] += [one] if isinstance(one, int) else one
            for argument, ids in given.items():
                wrong = sorted({one for one in ids if not 0 <= one < size})
                if wrong:
                    raise ValueError(
                        f"{argument} of the adapter {name!r} has the ids {wrong}; the model's"
                        f" embedding has ids 0 to {size - 1}. Is the tokenizer another model's?"
                    )


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
                sampled = torch.randint(min(COMMON, embedding.num_embeddings), (count,)).tolist()
                tokens = [*given, *([one] for one in sampled[len(given) :])][:count]
                prompts += [
                    embedding(torch.tensor(one, device=device)).float().mean(0) for one in tokens
                ]
            module.start(torch.stack(prompts))
