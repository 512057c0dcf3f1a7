"""The methods that put learned rows into a model's input, and their templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from peftfast.methods.component import EMBEDDING, Component
from peftfast.methods.config import MethodConfig, register_method
from peftfast.methods.prompt_inputs import MASK, POSITIONS, SLOT, VIRTUAL
from peftfast.methods.prompts import COMMON
from peftfast.nn.prompt import ENCODERS

INITS = ("uniform", "normal", "vocabulary", "text", "labels")
_DEFAULT = 20  # virtual tokens
_SPECIAL = ("mask", "cls", "sep", "bos", "eos", "unk", "pad")
_REPEATED = re.compile(r"(\[\w+\])\*(\d+)")
_BRACKETS = re.compile(r"\[\w+\](?:\*\d*)?")


@dataclass
class PromptMethodConfig(MethodConfig):
    """What the methods with prompts have in common; not a method itself.

    The model's outputs are as long as its input with the prompt, as with PEFT; labels of tokens are
    moved to their tokens, and `peftfast.methods.embedded` says where these are. Of a model of two
    stacks the encoder alone has the prompt. Rows that are several sequences each are refused.

    Args:
        num_virtual_tokens: P; None: as many as the template has, or 20.
        template: what the model reads: "[P]" for a virtual token, "[P]*3" for three, "{x}" for the
            input, once, "[MASK]", "[SEP]" and other special tokens by these names or by their own,
            and words, as "[P]*3 {x} [P]*2 It was [MASK] .". Or the list that this becomes: "[P]",
            "{x}", ids, and {"mask": id}. None: the prompt at `position`.
        position: where the prompt is: "start", before the first real token; "after_first", after
            it; "end". With a template "start" has it around the whole input, "after_first" between
            the first token and the last, which an encoder's tokenizer adds. None: "after_first" in
            models of one stack that is not causal, whose first token's value is what poolers and
            classifiers read, "start" in others. Padding stays outside.
        tasks: how many prompts there are; more than one are chosen for each row by the argument
            task_ids [B] of forward and generate. (PEFT's models of a task_type don't pass task_ids
            on in forward: there call it prompt_tasks.)
        tokenizer_name_or_path: for words, special tokens and initial texts; only when the
            configuration is made, a saved one has ids.
        tokenizer: the tokenizer itself, instead; it is not saved.
    """

    num_virtual_tokens: int | None = None
    template: Any = None
    position: str | None = None
    tasks: int = 1
    tokenizer_name_or_path: str | None = None
    tokenizer: InitVar[Any] = None

    def __post_init__(self, tokenizer: Any = None) -> None:
        if self.position not in (None, *POSITIONS):
            raise ValueError(
                f"position is {self.position!r}; allowed: {', '.join(map(repr, POSITIONS))}"
            )
        if self.template is not None and self.position == "end":
            raise ValueError("position is 'end', and a template says what is where")
        if tokenizer is not None and self.tokenizer_name_or_path is None:
            self.tokenizer_name_or_path = getattr(tokenizer, "name_or_path", None) or None
        self._tokenizer = tokenizer
        if isinstance(self.template, str):
            self.template = parse_template(self.template, self._needed_tokenizer)
        if self.template is not None:
            self.template = _checked(self.template)
            count = self.template.count(VIRTUAL)
            if self.num_virtual_tokens not in (None, count):
                raise ValueError(
                    f"num_virtual_tokens is {self.num_virtual_tokens}, and the template has {count}"
                    " [P]; leave num_virtual_tokens out, or make them equal"
                )
            self.num_virtual_tokens = count
        if self.num_virtual_tokens is None:
            self.num_virtual_tokens = _DEFAULT
        self._resolve()
        del self._tokenizer
        super().__post_init__()

    def _resolve(self) -> None:
        """What else needs a tokenizer."""

    def _needed_tokenizer(self, what: str) -> Any:
        if self._tokenizer is not None:
            return self._tokenizer
        if self.tokenizer_name_or_path is None:
            raise ValueError(f"{what} needs a tokenizer: give tokenizer, or tokenizer_name_or_path")
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path)
        return self._tokenizer

    def _component(self, **options: Any) -> Component:
        return Component(
            EMBEDDING,
            primitive="prompt",
            virtual_tokens=self.num_virtual_tokens,
            template=self.template,
            position=self.position,
            tasks=self.tasks,
            **options,
        )


@register_method("prompt")
@dataclass
class PromptConfig(PromptMethodConfig):
    """Prompt Tuning: learned rows in the input, and nothing else (Lester et al., "The Power of
    Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021).

    Args:
        init: "uniform" on [-0.5, 0.5], "normal" with deviation 1 (PEFT's RANDOM), or embeddings of
            tokens (section 3.1): "vocabulary", sampled from the 5,000 first, which are the most
            common where a vocabulary is sorted (with a tokenizer without special tokens and
            placeholders), "text", those of init_text, repeated or cut off, or "labels", those of
            init_labels, at most P, each the mean over its tokens, and sampled ones for the rest.
        init_text, init_labels: as said.
        init_tokens: ids, or lists of ids whose mean is taken; made of these when the configuration
            is made.

    Further arguments as in `PromptMethodConfig` and `MethodConfig`.
    """

    init: str = "uniform"
    init_text: str | None = None
    init_labels: list[str] | None = None
    init_tokens: list[Any] | None = field(default=None, repr=False)

    def _resolve(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"init is {self.init!r}; allowed: {', '.join(map(repr, INITS))}")
        for name in ("text", "labels"):
            given = getattr(self, f"init_{name}")
            if (self.init == name) != (given is not None):
                raise ValueError(
                    f"init is {self.init!r} and init_{name} is {given!r}; init={name!r} and"
                    f" init_{name} go together"
                )
        if self.init in ("uniform", "normal") or self.init_tokens is not None:
            return
        count = self.num_virtual_tokens
        assert count is not None
        if self.init == "vocabulary":
            if self._tokenizer is not None or self.tokenizer_name_or_path is not None:
                tokenizer = self._needed_tokenizer("init='vocabulary'")
                self.init_tokens = _sampled(tokenizer, count)
            return
        tokenizer = self._needed_tokenizer(f"init={self.init!r}")
        if self.init == "text":
            ids = _ids(tokenizer, self.init_text or "")
            if not ids:
                raise ValueError(f"init_text is {self.init_text!r}, which has no tokens")
            self.init_tokens = (ids * -(-count // len(ids)))[:count]
            return
        labels: Any = self.init_labels
        if not isinstance(labels, (list, tuple)) or not labels:
            raise TypeError(f"init_labels is {labels!r}; a list of words is needed")
        if len(labels) > count:
            raise ValueError(
                f"init_labels has {len(labels)} words, for {count} virtual tokens: leave some out,"
                " or raise num_virtual_tokens"
            )
        words = [_ids(tokenizer, one) for one in labels]
        if not all(words):
            raise ValueError(f"init_labels is {labels!r}, of which some have no tokens")
        rest = _sampled(tokenizer, count - len(words)) if len(words) < count else []
        self.init_tokens = [*words, *rest]

    def declare(self) -> list[Component]:
        init = self.init if self.init in ("uniform", "normal") else "embeddings"
        return [self._component(init=init, init_tokens=self.init_tokens)]


@register_method("ptuning")
@dataclass
class PTuningConfig(PromptMethodConfig):
    """P-Tuning: virtual tokens at any positions, made by a network in training (Liu et al., "GPT
    Understands, Too", 2021, section 3).

    The paper's template for a cloze task on BERT is "[P]*3 {x} [P]*3 [MASK]" or the like, with
    anchor words where they help (section 3.3). Labels may be those of the template's [MASK]s alone:
    [B], or [B, M] of several, which they also are where the input has just M columns.
    `peftfast.methods.finalize` drops the network; checkpoints have what it makes beside it.

    Args:
        encoder: "lstm": a bidirectional LSTM of two layers and two linears (the paper's), or "mlp":
            three linears (PEFT's default).
        encoder_hidden_size: the encoder's width; None: d / 2 in each direction, or d.

    Further arguments as in `PromptMethodConfig` and `MethodConfig`.
    """

    encoder: str = "lstm"
    encoder_hidden_size: int | None = None

    def _resolve(self) -> None:
        if self.encoder not in ENCODERS:
            raise ValueError(
                f"encoder is {self.encoder!r}; allowed: {', '.join(map(repr, ENCODERS))}."
                " Without one: PromptConfig"
            )

    def declare(self) -> list[Component]:
        return [
            self._component(
                encoder=self.encoder, encoder_hidden=self.encoder_hidden_size, init="normal"
            )
        ]


def parse_template(template: str, tokenizer: Any) -> list[Any]:
    """A template as a list of "[P]", "{x}", ids of tokens, and {"mask": id}.

    Args:
        template: as in `PromptMethodConfig`.
        tokenizer: a tokenizer, or a function that gives one and is called where one is needed, with
            what needs it.

    Raises:
        ValueError: there is not one "{x}", no "[P]", a token that the tokenizer does not have, or a
            word with a brace.
    """
    pieces: list[str] = []
    spaced = _BRACKETS.sub(lambda found: f" {found[0]} ", template.replace(SLOT, f" {SLOT} "))
    for word in spaced.split():
        if word != SLOT and ("{" in word or "}" in word):
            raise ValueError(
                f"template has {word!r}; the input is written as {SLOT!r}, and words have no braces"
            )
        repeated = _REPEATED.fullmatch(word)
        if "*" in word and word.startswith("[") and repeated is None:
            raise ValueError(f"template has {word!r}; a repeated token is written as '[P]*3'")
        pieces += [repeated[1]] * int(repeated[2]) if repeated else [word]
    found: list[Any] = []
    words: list[str] = []
    for piece in [*pieces, ""]:
        special = piece in (VIRTUAL, SLOT) or bool(re.fullmatch(r"\[\w+\]|<[^\s<>]+>", piece))
        if piece and not special:
            words.append(piece)
            continue
        if words:
            held = _tokenizer(tokenizer, f"{' '.join(words)!r} in the template")
            found += _words(held, " ".join(words), first=not found)
            words = []
        if piece in (VIRTUAL, SLOT):
            found.append(piece)
        elif piece:
            found.append(_special(_tokenizer(tokenizer, f"{piece} in the template"), piece))
    return _checked(found, template)


def _tokenizer(given: Any, what: str) -> Any:
    return given if hasattr(given, "convert_tokens_to_ids") else given(what)


def _words(tokenizer: Any, text: str, first: bool) -> list[int]:
    """The tokens of words within a text: where a word after a space is another token, that one."""
    plain = _ids(tokenizer, text)
    spaced = _ids(tokenizer, f" {text}")
    return plain if first or len(spaced) > len(plain) else spaced


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _special(tokenizer: Any, piece: str) -> Any:
    name = piece[1:-1].lower()
    known = name in _SPECIAL and getattr(tokenizer, f"{name}_token", None) is not None
    if known:
        token = int(getattr(tokenizer, f"{name}_token_id"))
    else:
        vocabulary = tokenizer.get_vocab()
        if piece not in vocabulary:
            has = [one for one in _SPECIAL if getattr(tokenizer, f"{one}_token", None) is not None]
            raise ValueError(
                f"template has {piece}, which the tokenizer does not know; it has"
                f" {', '.join(f'[{one.upper()}]' for one in has) or 'no special tokens'}"
            )
        token = int(vocabulary[piece])
    is_mask = name == MASK or token == getattr(tokenizer, "mask_token_id", None)
    return {MASK: token} if is_mask else token


def _checked(template: Sequence[Any], written: str | None = None) -> list[Any]:
    """A template's entries, of which one is the slot and some are virtual tokens."""
    shown = repr(written) if written is not None else repr(template)
    if not isinstance(template, (list, tuple)):
        raise TypeError(f"template is {type(template).__name__}; a string or a list is needed")
    for one in template:
        is_mask = isinstance(one, dict) and list(one) == [MASK] and isinstance(one[MASK], int)
        is_id = isinstance(one, int) and not isinstance(one, bool) and one >= 0
        if one not in (VIRTUAL, SLOT) and not is_mask and not is_id:
            raise ValueError(
                f'template has {one!r}; entries are {VIRTUAL!r}, {SLOT!r}, ids and {{"mask": id}}'
            )
    slots = list(template).count(SLOT)
    if slots != 1:
        raise ValueError(
            f"template is {shown}, with {slots} slots; {SLOT!r}, where the input is, is needed once"
        )
    if VIRTUAL not in template:
        raise ValueError(
            f"template is {shown}, without a virtual token; {VIRTUAL!r} stands for one"
        )
    return list(template)


def _sampled(tokenizer: Any, count: int) -> list[int]:
    """Ids from the beginning of a vocabulary, neither special tokens nor placeholders."""
    special = set(tokenizer.all_special_ids)
    placeholder = re.compile(r"\[\w+\]|<[^<>]*>")
    ids = sorted(
        token
        for word, token in tokenizer.get_vocab().items()
        if token not in special and not placeholder.fullmatch(word)
    )
    common = ids[:COMMON]
    if not common:
        raise ValueError("the tokenizer has no tokens to sample from")
    return [common[one] for one in torch.randint(len(common), (count,)).tolist()]
