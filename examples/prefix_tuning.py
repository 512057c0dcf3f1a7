"""Prefixes on MiniLM and six intents of Banking77: P-Tuning v2, MAM, and what they cost.

P-Tuning v2 puts learned keys and values before those of the sequence in every layer; MAM puts them
there too, here made by a small network while it trains, and an adapter beside the feed-forward
network. Attention reads a prefix where it is; PEFT's own, whose memory is beside, is copied for
every row of the batch and joined to the keys and values in every layer. At last the network is
dropped, and what it made is saved and loaded again.

Exit status 1 where a test accuracy stays below 0.8, a step takes no less than PEFT's, or the loaded
copy answers differently.

    python examples/prefix_tuning.py [--steps N]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from peftfast.demo.classifier import bundled_model, quiet_transformers
from peftfast.demo.data import Example, banking77
from peftfast.memory import peak_bytes
from peftfast.methods import MAMConfig, PTuningV2Config, finalize

INTENTS = 6
VIRTUAL = 16
BATCH = 12
MAX_TOKENS = 24
TASK = "SEQ_CLS"  # so that the classifier trains too


def base() -> nn.Module:
    """MiniLM, its dropouts off, with a new classifier."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        bundled_model(), num_labels=INTENTS, dtype=torch.float32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


class Questions:
    """The intents' questions, to train on and to test with."""

    def __init__(self) -> None:
        corpus = banking77()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(bundled_model())
        self.train = [one for one in corpus.train if one.label < INTENTS]
        test = [one for one in corpus.test if one.label < INTENTS]
        test = sorted(test, key=lambda one: len(one.text))
        self.test = [self.batch(test[at : at + 60]) for at in range(0, len(test), 60)]

    def batch(self, examples: list[Example]) -> tuple[dict[str, Tensor], Tensor]:
        padded = self.tokenizer(
            [one.text for one in examples],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return dict(padded), torch.tensor([one.label for one in examples])

    def fit(self, model: nn.Module, steps: int, rate: float) -> None:
        """AdamW with a learning rate that falls to zero."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        draw = random.Random(0)
        model.train()
        for _ in range(steps):
            step(model, *self.batch(draw.sample(self.train, BATCH)))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        model.eval()
        return torch.cat([model(**inputs).logits for inputs, _ in self.test])

    def accuracy(self, model: nn.Module) -> float:
        labels = torch.cat([labels for _, labels in self.test])
        return (self.logits(model).argmax(-1) == labels).float().mean().item()

    def peak(self, model: nn.Module) -> float:
        """MiB of a step's gradients and activations at their peak."""
        model.train().zero_grad()
        return peak_bytes(lambda: step(model, *self.test[-1]), torch.device("cpu")) / 2**20


def step(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> None:
    nn.functional.cross_entropy(model(**inputs).logits, labels).backward()


def run(steps: int, folder: Path) -> bool:
    """Every method; whether all is as it should be."""
    questions = Questions()
    peft_peak = questions.peak(
        get_peft_model(base(), PrefixTuningConfig(num_virtual_tokens=VIRTUAL, task_type=TASK))
    )
    # A configuration and its learning rate.
    methods: dict[str, tuple[PeftConfig, float]] = {
        "P-Tuning v2": (PTuningV2Config(num_virtual_tokens=VIRTUAL, task_type=TASK), 2e-2),
        "MAM": (
            MAMConfig(
                num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=128,
                bottleneck=64, task_type=TASK,
            ),
            3e-3,
        ),
    }  # fmt: skip
    good = True
    print(f"{'method':22}{'accuracy':>9}{'trains':>10}{'MiB a step':>12}")
    for name, (config, rate) in methods.items():
        torch.manual_seed(0)
        model = get_peft_model(base(), config)
        questions.fit(model, steps, rate)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        accuracy, peak = questions.accuracy(model), questions.peak(model)
        print(f"{name:22}{accuracy:9.3f}{trained:10,}{peak:12.1f}", flush=True)
        good = good and accuracy >= 0.8 and (name == "MAM" or peak < peft_peak)
    print(f"{'PEFT, prefix tuning':41}{peft_peak:12.1f}")

    expected = questions.logits(model)
    model.save_pretrained(str(folder / "training"))
    finalize(model)
    model.save_pretrained(str(folder / "finished"))
    for name in ("training", "finished"):
        size = (folder / name / "adapter_model.safetensors").stat().st_size
        print(f"checkpoint {name}: {size / 2**10:.0f} KiB")
    loaded = PeftModel.from_pretrained(base(), str(folder / "finished"))
    same = torch.allclose(questions.logits(loaded), expected, atol=1e-4)
    print(f"loaded again, equal answers: {same}")
    return good and same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help=f"of training, {BATCH} questions")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # batches this small gain little from more
    with quiet_transformers(bundled=True), tempfile.TemporaryDirectory() as folder:
        return 0 if run(steps, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
