"""The demo from its arguments to its last line."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import peftfast
from peftfast.demo import classifier, data, training
from peftfast.demo.figure import draw
from peftfast.demo.outcome import LOSS_LIMIT, Pair, table
from peftfast.demo.progress import training_progress

FOOTNOTE = """\
Tokens/s: forward and backward, padding not counted, the two models taking turns on the batches.
Bytes: forward and backward of the batch of the longest texts, over what was there before it.
Saved: what the forward keeps for the backward, parameters left out."""


def run(args: argparse.Namespace) -> int:
    """Train both pairs, compare them, print and write what came of it.

    Returns:
        The exit status: 1 where a comparison failed or nothing was fused, else 0.

    Raises:
        InputError: the data, the model or the device cannot be used.
        ImplUnavailable: `--impl` cannot serve here.
    """
    began = time.perf_counter()
    # Folders and labels may hold brackets, which are markup to rich unless it is told otherwise.
    console = Console(soft_wrap=True, markup=False, highlight=False)
    settings = _settings(args)
    folder = _created(args.output)
    if args.json and not args.json.parent.is_dir():
        raise data.InputError(f"--json: cannot write {args.json}: no such folder")
    with classifier.quiet_transformers(bundled=args.model is None):
        corpus, texts = _texts(args, settings)
        subject = f"{args.model or 'MiniLM-L6'} on {corpus.about}"
        console.print(f"{subject}\n{_amounts(corpus, texts, settings)}")
        pairs = []
        for dropout in (0.0, args.dropout) if args.dropout else (0.0,):
            progress = functools.partial(_progress, console, dropout)
            runs, model = training.train_pair(
                _shortened(settings) if dropout else settings, texts, dropout, progress
            )
            pairs.append(Pair(dropout, len(texts.test), **runs))
    report = peftfast.report(model)
    failures = [failure for pair in pairs if (failure := pair.failure())]
    if not report.fused:
        failures.append("peftfast fused nothing in this model: both runs are the same")

    fused, left = len(report.fused), len(report.not_fused)
    console.print(f"\npeftfast.report: {fused} modules fused, {left} not")
    console.print(f"{report}\n")
    console.print(table(pairs), FOOTNOTE, sep="\n")
    picture = folder / "demo.png"
    draw(pairs, f"{subject}, LoRA rank {args.rank}", picture)
    console.print(f"picture: {picture}")
    if args.json:
        summary = _summary(settings, corpus, texts, pairs, failures)
        args.json.write_text(json.dumps({**summary, "report": report.to_dict()}, indent=2) + "\n")
    for failure in failures:
        console.print("FAILED:", failure, style="bold red")
    if not failures:
        console.print("OK:", _verdict(pairs), style="bold green")
    console.print(f"{time.perf_counter() - began:.0f} s in all")
    return 1 if failures else 0


def _settings(args: argparse.Namespace) -> classifier.Settings:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise data.InputError("--device cuda: torch finds no GPU; see `peftfast doctor`")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return classifier.Settings(
        model=args.model or str(classifier.bundled_model()),
        offline=args.model is None,
        rank=args.rank,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        device=automatic if args.device == "auto" else args.device,
        impl=args.impl,
    )


def _shortened(settings: classifier.Settings) -> classifier.Settings:
    return dataclasses.replace(settings, steps=max(1, settings.steps // 2))


def _created(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise data.InputError(f"--output: cannot make {folder}: {error.strerror}") from error
    return folder


def _texts(
    args: argparse.Namespace, settings: classifier.Settings
) -> tuple[data.Corpus, classifier.Encoded]:
    if args.data is None:
        if args.text_column or args.label_column:
            raise data.InputError("--text-column and --label-column are for a file of --data")
        corpus = data.banking77()
    else:
        corpus = data.read_csv(args.data, args.text_column, args.label_column, args.seed)
    wanted = args.train_size or settings.steps * settings.batch_size
    train = data.subset(corpus.train, wanted, args.seed)
    test = data.subset(corpus.test, args.test_size, args.seed)
    return corpus, classifier.encode(corpus, train, test, settings)


def _amounts(corpus: data.Corpus, texts: classifier.Encoded, settings: classifier.Settings) -> str:
    full = sum(len(text["input_ids"]) == texts.limit for text in texts.train + texts.test)
    cut = f"; {full:,} texts of {texts.limit} tokens or more, cut there" if full else ""
    passes = settings.steps * settings.batch_size / len(texts.train)
    return (
        f"{len(texts.train):,} of {len(corpus.train):,} training texts, "
        f"{len(texts.test):,} of {len(corpus.test):,} test texts, {len(corpus.labels)} labels; "
        f"{settings.steps} steps of {settings.batch_size} (passes: {passes:.2g}), "
        f"seed {settings.seed}, {settings.device}, float32{cut}"
    )


def _progress(
    console: Console, dropout: float, name: str, steps: int
) -> AbstractContextManager[training.Progress]:
    return training_progress(console, f"{name}, dropout {dropout:g}", steps)


def _verdict(pairs: list[Pair]) -> str:
    parts = [f"every step's losses agree within {LOSS_LIMIT:g}"]
    for pair in pairs:
        if pair.dropout:
            apart = abs(pair.plain.accuracy - pair.patched.accuracy)
            parts.append(
                f"with dropout {pair.dropout:g} the accuracies differ by {apart:.1%}, "
                f"with a standard error of {pair.accuracy_error:.1%}"
            )
    return "; ".join(parts)


def _summary(
    settings: classifier.Settings,
    corpus: data.Corpus,
    texts: classifier.Encoded,
    pairs: list[Pair],
    failures: list[str],
) -> dict[str, Any]:
    return {
        "peftfast": peftfast.__version__,
        "torch": torch.__version__,
        "settings": dataclasses.asdict(settings),
        "data": {
            "about": corpus.about,
            "labels": len(corpus.labels),
            "train": len(texts.train),
            "train_available": len(corpus.train),
            "test": len(texts.test),
            "test_available": len(corpus.test),
        },
        "pairs": [pair.to_dict() for pair in pairs],
        "failures": failures,
    }
