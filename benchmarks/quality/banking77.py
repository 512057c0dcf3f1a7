"""MiniLM on Banking77: full fine-tuning, its cheap baselines, adapters, prefixes and their unions.

Every method trains on the whole training set (10,003 texts, 77 intents) and is tested once on the
whole test set (3,080). Its learning rate is the best of three on a tenth of the training set, after
one epoch on half of the rest; the test set has no part in that. The classifier reads the mean of
the tokens, as in the model's own training; the model's dropouts are off. The papers count trained
parameters without the classifier: both counts are given.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from benchmarks import records
from benchmarks.quality.training import (
    Classifier,
    Example,
    Recipe,
    accuracy,
    is_classifier,
    memory,
    train,
)
from benchmarks.records import Row
from peftfast.analysis.baselines import head_only, norms_only
from peftfast.demo.classifier import bundled_model
from peftfast.demo.data import banking77
from peftfast.demo.progress import training_progress
from peftfast.methods import (
    HoulsbyConfig,
    MAMConfig,
    ParallelAdapterConfig,
    PfeifferConfig,
    PrefixConfig,
    PTuningV2Config,
    ScaledParallelAdapterConfig,
    UniPELTConfig,
)

NAME, SEARCH = "banking77", "banking77_search"
BATCH, SPLIT_SEED = 32, 0
MAX_TOKENS = 128
SEARCH_EPOCHS = 1
HELD_OUT = 10  # one in so many
SEARCHED = 2  # one in so many of the rest

Progress = Callable[[str, int], AbstractContextManager[Callable[[float], None]]]


@dataclass(frozen=True)
class Method:
    """One way to train the classifier.

    Attributes:
        name: the row's variant.
        rates: the learning rates that are tried.
        apply: what is done to the base model; gives the model to train.
    """

    name: str
    rates: tuple[float, ...]
    apply: Callable[[Classifier], nn.Module]


def _full(model: Classifier) -> nn.Module:
    return model.requires_grad_(True)


def _head_only(model: Classifier) -> nn.Module:
    return head_only(model, head=["classifier"])


def _norms_only(model: Classifier) -> nn.Module:
    return norms_only(model, head=["classifier"])


def _adapted(config: PeftConfig) -> Callable[[Classifier], nn.Module]:
    def apply(model: Classifier) -> nn.Module:
        model.encoder = get_peft_model(model.encoder, copy.deepcopy(config))
        return model

    return apply


METHODS = {
    method.name: method
    for method in (
        Method("full fine-tuning", (1e-4, 2e-4, 4e-4), _full),
        Method("head only", (3e-3, 1e-2, 3e-2), _head_only),
        Method("norms only", (1e-3, 3e-3, 1e-2), _norms_only),
        Method(
            "Houlsby, m = 64",
            (1e-3, 2e-3, 4e-3),
            _adapted(HoulsbyConfig(bottleneck=64)),
        ),
        Method(
            "Pfeiffer, m = 64",
            (1e-3, 2e-3, 4e-3),
            _adapted(PfeifferConfig(bottleneck=64)),
        ),
        Method(
            "parallel, m = 128",
            (1e-3, 2e-3, 4e-3),
            _adapted(ParallelAdapterConfig(bottleneck=128)),
        ),
        Method(
            "scaled parallel, m = 128",
            (5e-4, 1e-3, 2e-3),
            _adapted(ScaledParallelAdapterConfig(bottleneck=128)),
        ),
        Method(
            "P-Tuning v2, l = 20",
            (1e-2, 2e-2, 4e-2),
            _adapted(PTuningV2Config(num_virtual_tokens=20)),
        ),
        Method(
            "MAM, l = 30, m = 128",
            (1e-3, 2e-3, 4e-3),
            _adapted(MAMConfig(num_virtual_tokens=30, bottleneck=128)),
        ),
        Method(
            "UniPELT",
            (2e-3, 5e-3, 1e-2),
            _adapted(UniPELTConfig()),
        ),
        Method(
            "prefix with an encoder, l = 20",
            (5e-4, 1e-3, 2e-3),
            _adapted(PrefixConfig(num_virtual_tokens=20, prefix_projection=True)),
        ),
    )
}


@dataclass(frozen=True)
class Data:
    """Banking77 as token ids."""

    train: list[Example]
    test: list[Example]
    labels: list[str]
    pad: int

    def split(self) -> tuple[list[Example], list[Example]]:
        """What a search trains on, and the tenth of the training set that it is judged by."""
        order = random.Random(SPLIT_SEED).sample(self.train, len(self.train))
        cut = len(order) // HELD_OUT
        return order[cut::SEARCHED], order[:cut]


def load_data() -> Data:
    """The texts, tokenised by the model's own tokenizer."""
    corpus = banking77()
    tokenizer = AutoTokenizer.from_pretrained(bundled_model(), local_files_only=True)

    def encoded(texts: Sequence[str], labels: Sequence[int]) -> list[Example]:
        ids = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [Example(row, label) for row, label in zip(ids, labels, strict=True)]

    train, test = (
        encoded([example.text for example in part], [example.label for example in part])
        for part in (corpus.train, corpus.test)
    )
    return Data(train, test, corpus.labels, tokenizer.pad_token_id)


def base_model(labels: Sequence[str], device: torch.device) -> Classifier:
    """MiniLM with a fresh classifier, in float32, its dropouts off."""
    config = AutoConfig.from_pretrained(bundled_model(), local_files_only=True)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    encoder = AutoModel.from_pretrained(
        bundled_model(),
        config=config,
        dtype=torch.float32,
        add_pooling_layer=False,
        local_files_only=True,
    )
    return Classifier(encoder, config.hidden_size, len(labels)).to(device)


def build(method: Method, data: Data, seed: int, device: torch.device) -> nn.Module:
    """The model of a method before its training, drawn from the seed."""
    torch.manual_seed(seed)
    return method.apply(base_model(data.labels, device)).to(device)


def config_of(seed: int, epochs: int) -> Row:
    """The fields that tell rows apart."""
    return {
        "model": "MiniLM-L6-H384",
        "data": "Banking77",
        "epochs": epochs,
        "batch": BATCH,
        "dtype": "float32",
        "seed": seed,
    }


def run(
    methods: Sequence[Method],
    device: torch.device,
    *,
    seed: int,
    epochs: int,
    known: Sequence[Row],
    progress: Progress,
) -> Iterator[Row]:
    """Each method's search and training; yields rows as they come, leaving out what is in `known`.

    A row has "benchmark", "variant", "config" and figures; the caller adds its provenance.
    """
    data = load_data()
    for method in methods:
        config = config_of(seed, epochs)
        if _found(known, NAME, method, config) is not None:
            continue
        tried = {}
        for rate in method.rates:
            trial = {**config_of(seed, SEARCH_EPOCHS), "learning_rate": rate}
            row = _found(known, SEARCH, method, trial)
            if row is None:
                row = _search(method, data, device, seed, rate, trial, progress)
                yield row
            tried[rate] = row["validation_accuracy"]
        best = max(tried, key=lambda rate: tried[rate])
        yield _train(method, data, device, Recipe(epochs, BATCH, best, seed), config, progress)


def console_progress(console: Console) -> Progress:
    """A bar on a terminal, a line now and then elsewhere."""
    return lambda name, steps: training_progress(console, name, steps)


def recorded(device_slug: str, results: Path) -> list[Row]:
    """What was recorded on this device."""
    return [row for row in records.load(results) if row["provenance"]["device_slug"] == device_slug]


def _found(known: Sequence[Row], benchmark: str, method: Method, config: Row) -> Row | None:
    wanted = (benchmark, method.name, config)
    return next((r for r in known if (r["benchmark"], r["variant"], r["config"]) == wanted), None)


def _search(
    method: Method,
    data: Data,
    device: torch.device,
    seed: int,
    rate: float,
    config: Row,
    progress: Progress,
) -> Row:
    fitted, held_out = data.split()
    recipe = Recipe(SEARCH_EPOCHS, BATCH, rate, seed)
    model = build(method, data, seed, device)
    with progress(f"{method.name}, rate {rate:g}", recipe.steps(len(fitted))) as advance:
        trained = train(model, fitted, data.pad, recipe, advance)
    return {
        "benchmark": SEARCH,
        "variant": method.name,
        "config": config,
        "validation_accuracy": accuracy(model, held_out, data.pad),
        "losses": trained.losses,
    }


def _train(
    method: Method,
    data: Data,
    device: torch.device,
    recipe: Recipe,
    config: Row,
    progress: Progress,
) -> Row:
    base = pretrained(base_model(data.labels, device))
    model = build(method, data, recipe.seed, device)
    with progress(method.name, recipe.steps(len(data.train))) as advance:
        trained = train(model, data.train, data.pad, recipe, advance)
        tested = accuracy(model, data.test, data.pad)
    peak, static = memory(model, data.train, data.pad, recipe.batch)
    return {
        "benchmark": NAME,
        "variant": method.name,
        "config": config,
        "learning_rate": recipe.learning_rate,
        "accuracy": tested,
        "losses": trained.losses,
        **counts(model, base),
        "time": trained.steps.as_dict(),
        "seconds": trained.seconds,
        "tokens_per_second": trained.tokens_per_second,
        "peak_bytes": peak + static,
        "static_bytes": static,
    }


def counts(model: nn.Module, base: int) -> Row:
    """Trained parameters, with the classifier and, as the papers count, without; and the shares
    that they are of the `base` parameters that the pretrained model has, no classifier among them.
    """
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total = sum(trained.values())
    body = sum(size for name, size in trained.items() if not is_classifier(name))
    return {
        "base_parameters": base,
        "trained": total,
        "trained_without_classifier": body,
        "share": total / base,
        "share_without_classifier": body / base,
    }


def pretrained(model: nn.Module) -> int:
    """Parameters of a base model without its classifier."""
    return sum(p.numel() for name, p in model.named_parameters() if not is_classifier(name))
