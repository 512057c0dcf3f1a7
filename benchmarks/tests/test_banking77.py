"""What methods reach on Banking77: the training loop, and which rows are made."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.quality import banking77
from benchmarks.quality.banking77 import METHODS, Data
from benchmarks.quality.training import (
    Classifier,
    Example,
    Recipe,
    accuracy,
    groups,
    shuffled_batches,
)
from benchmarks.records import Row


@pytest.fixture(scope="module")
def data() -> Data:
    whole = banking77.load_data()
    assert (len(whole.train), len(whole.test), len(whole.labels)) == (10003, 3080, 77)
    return Data(whole.train[::100], whole.test[::100], whole.labels, whole.pad)


@contextlib.contextmanager
def silent(name: str, steps: int) -> Iterator[Callable[[float], None]]:
    yield lambda loss: None


def test_an_epoch_has_every_text_once_in_batches_of_like_length() -> None:
    draw = random.Random(0)
    examples = [Example([1] * draw.randint(1, 60), index) for index in range(1000)]
    batches = shuffled_batches(examples, 16, random.Random(1))
    assert sorted(e.label for batch in batches for e in batch) == list(range(1000))
    assert [len(batch) for batch in batches].count(16) == 1000 // 16
    spread = [max(len(e.ids) for e in b) - min(len(e.ids) for e in b) for b in batches]
    assert sum(spread) / len(spread) < 5
    assert batches != shuffled_batches(examples, 16, random.Random(2))


def test_the_rate_rises_and_falls_and_the_classifier_has_its_own() -> None:
    recipe = Recipe(epochs=2, batch=32, learning_rate=1e-4, seed=0)
    steps = recipe.steps(3200)
    assert steps == 200
    scales = [recipe.scale(step, steps) for step in range(steps)]
    assert scales[11] == max(scales) == 1.0
    assert 0 < scales[-1] < 0.01
    assert all(low < high for low, high in zip(scales[:11], scales[1:12], strict=True))
    model = Classifier(torch.nn.Linear(4, 4), 4, 3)
    assert [group["lr"] for group in groups(model, recipe)] == [3e-3, 1e-4]
    higher = Recipe(epochs=2, batch=32, learning_rate=1e-2, seed=0)
    assert [group["lr"] for group in groups(model, higher)] == [1e-2, 1e-2]


def test_the_search_sees_no_text_that_it_is_judged_by() -> None:
    texts = [Example([index], 0) for index in range(1000)]
    fitted, held_out = Data(texts, [], ["label"], 0).split()
    assert len(held_out) == 100
    assert len(fitted) == 450
    assert not {e.ids[0] for e in fitted} & {e.ids[0] for e in held_out}


def test_what_is_recorded_is_not_trained_again(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banking77, "load_data", lambda: data)
    device = torch.device("cpu")

    def run(known: list[Row]) -> list[Row]:
        chosen = [METHODS["head only"]]
        return list(banking77.run(chosen, device, seed=0, epochs=1, known=known, progress=silent))

    known = run([])
    assert [row["benchmark"] for row in known] == 3 * ["banking77_search"] + ["banking77"]
    rates = {r["config"]["learning_rate"]: r["validation_accuracy"] for r in known[:3]}
    assert known[3]["learning_rate"] == max(rates, key=lambda rate: rates[rate])
    assert known[3]["trained"] == 384 * 77 + 77
    assert known[3]["trained_without_classifier"] == 0

    assert run(known) == []
    (again,) = run(known[:3])
    for figure in ("accuracy", "losses", "learning_rate"):
        assert again[figure] == known[3][figure]


def test_adapters_are_counted_as_in_the_paper(data: Data) -> None:
    device = torch.device("cpu")
    base = banking77.pretrained(banking77.base_model(data.labels, device))
    model = banking77.build(METHODS["Houlsby, m = 64"], data, 0, device)
    counted = banking77.counts(model, base)
    norms = 13 * 2 * 384
    assert counted["trained_without_classifier"] == 12 * (2 * 384 * 64 + 384 + 64) + norms
    assert counted["share"] < 0.04


def test_prefixes_are_counted_as_in_the_papers(data: Data) -> None:
    device = torch.device("cpu")
    base = banking77.pretrained(banking77.base_model(data.labels, device))
    prefixes = 6 * 2 * 384  # a row of k and v in each layer
    adapters = 6 * (2 * 384 * 128 + 384 + 128)
    for name, expected in (
        ("P-Tuning v2, l = 20", 20 * prefixes),
        ("MAM, l = 30, m = 128", 30 * prefixes + adapters),
    ):
        model = banking77.build(METHODS[name], data, 0, device)
        assert banking77.counts(model, base)["trained_without_classifier"] == expected


def test_accuracy_is_of_the_most_likely_label() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            # The text's first token is the answer, wherever padding is.
            return torch.nn.functional.one_hot(input_ids[:, 0], 10).float()

    examples = [Example([1, 2, 3], 1), Example([4], 4), Example([7, 7], 0), Example([9], 9)]
    assert accuracy(Fixed(), examples, pad=0) == 0.75
