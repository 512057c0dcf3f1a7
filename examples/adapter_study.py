"""The experiments of the papers on adapters, on MiniLM and Banking77, in minutes.

Houlsby adapters are trained once, and then scored without those of each span of layers and with
noise on them; and trained anew over deviations of their initialisation and over sizes, beside the
last layer, the norms and the head alone. Each experiment leaves a CSV file and, with matplotlib
(extra `plot`), a picture. By default on a few intents, so that it takes under a minute; `--full`
takes more intents, steps, deviations and sizes. Exit status 1 where dropping every adapter does not
lower the accuracy.

    python examples/adapter_study.py [--full] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from peftfast import HoulsbyConfig, analysis
from peftfast.demo.classifier import bundled_model, quiet_transformers
from peftfast.demo.data import Example, banking77, subset

BATCH = 12
MAX_TOKENS = 24


@dataclass(frozen=True)
class Study:
    """How much is done."""

    intents: int
    questions: int  # of the test set
    steps: int  # of the training whose adapters are dropped and disturbed
    sweep_steps: int  # of each training of a sweep
    initial_stds: tuple[float, ...]
    noise_stds: tuple[float, ...]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]


SMALL = Study(8, 60, 36, 14, (1e-7, 1e-2, 1.0), (1e-2, 1e-1), (4, 64), (0,))
FULL = Study(
    77, 500, 400, 150, analysis.sweeps.INITIAL_STDS, analysis.sweeps.NOISE_STDS, (2, 8, 32), (0, 1)
)


class Questions:
    """The chosen intents' questions, to train on and to test with."""

    def __init__(self, study: Study) -> None:
        corpus = banking77()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(bundled_model())
        self.train = [one for one in corpus.train if one.label < study.intents]
        test = [one for one in corpus.test if one.label < study.intents]
        test = sorted(subset(test, study.questions, seed=0), key=lambda one: len(one.text))
        self.test = [self.batch(test[at : at + 60]) for at in range(0, len(test), 60)]

    def batch(self, examples: list[Example]) -> tuple[dict[str, Tensor], Tensor]:
        texts = [one.text for one in examples]
        padded = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return dict(padded), torch.tensor([one.label for one in examples])

    def fit(self, model: nn.Module, steps: int) -> None:
        """AdamW with a learning rate that falls to zero: a high one, but for whole layers."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate = 3e-3 if sum(parameter.numel() for parameter in trained) < 1_000_000 else 3e-4
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        draw = random.Random(0)
        model.train()
        for _ in range(steps):
            inputs, labels = self.batch(draw.sample(self.train, BATCH))
            nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        model.eval()
        right = sum(
            int((model(**inputs).logits.argmax(-1) == labels).sum()) for inputs, labels in self.test
        )
        return right / sum(len(labels) for _, labels in self.test)

    def trained_accuracy(self, model: nn.Module, steps: int) -> float:
        self.fit(model, steps)
        return self.accuracy(model)


def base(study: Study) -> nn.Module:
    """MiniLM, its dropouts off, with a new classifier."""
    return AutoModelForSequenceClassification.from_pretrained(
        bundled_model(), num_labels=study.intents, dtype=torch.float32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def adapted(study: Study, bottleneck: int = 64, init_std: float = 1e-2) -> nn.Module:
    """The same with Houlsby adapters, which train with the norms and the classifier."""
    config = HoulsbyConfig(bottleneck=bottleneck, init_std=init_std, task_type="SEQ_CLS")
    return get_peft_model(base(study), config)


def run(study: Study, folder: Path) -> float:
    """Every experiment; gives what dropping all adapters changes."""
    questions = Questions(study)
    torch.manual_seed(0)
    model = adapted(study)
    questions.fit(model, study.steps)

    ablation = analysis.ablate(model, questions.accuracy)
    change = ablation.change[0, -1].item()
    print(f"accuracy {ablation.full:.3f}; without any adapter {ablation.full + change:.3f}")
    save(ablation, folder / "ablation")
    save(
        analysis.noise(model, questions.accuracy, stds=study.noise_stds, seeds=(0, 1)),
        folder / "noise",
    )

    score: Callable[[nn.Module], float] = partial(
        questions.trained_accuracy, steps=study.sweep_steps
    )
    started = analysis.robustness(
        lambda std: adapted(study, init_std=std),
        score,
        stds=study.initial_stds,
        seeds=study.seeds,
    )
    save(started, folder / "initialisation")
    sizes = analysis.size_sweep(
        lambda size: adapted(study, bottleneck=size),
        score,
        sizes=study.sizes,
        seeds=study.seeds,
        baselines={
            "last layer": lambda: analysis.top_layers(base(study), 1),
            "norms only": lambda: analysis.norms_only(base(study)),
            "head only": lambda: analysis.head_only(base(study)),
        },
    )
    save(sizes, folder / "sizes")
    return change


def save(result: analysis.Ablation | analysis.Curve, path: Path) -> None:
    """The table, and the picture where matplotlib is installed."""
    result.to_csv(path.with_suffix(".csv"))
    print(path.with_suffix(".csv"))
    try:
        result.plot(path.with_suffix(".png"))
    except ImportError as error:
        print(f"no picture: {error}")
    else:
        print(path.with_suffix(".png"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more of everything")
    parser.add_argument("--output", type=Path, help="default: a new folder for temporary files")
    arguments = parser.parse_args()
    folder = arguments.output or Path(mkdtemp(prefix="adapter_study-"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # batches this small gain little from more
    # Adapters that begin too large saturate softmaxes with denormal numbers, slow on a CPU.
    torch.set_flush_denormal(True)
    with quiet_transformers(bundled=True):
        change = run(FULL if arguments.full else SMALL, folder)
    return 0 if change < 0 else 1


if __name__ == "__main__":
    sys.exit(main())
