"""A classifier and texts so small that the whole demo takes a second or two."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = {
    "card": "card arrive lost track post delivery".split(),
    "rate": "exchange rate currency euro dollar convert".split(),
    "cash": "cash machine withdraw atm note money".split(),
}


def sentences(count: int) -> list[tuple[str, str]]:
    """Texts of three to eight words, with the label that their words belong to."""
    draw = random.Random(7)
    drawn = []
    for number in range(count):
        label = list(WORDS)[number % len(WORDS)]
        drawn.append((" ".join(draw.choices(WORDS[label], k=draw.randint(3, 8))), label))
    return drawn


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer BERT of random weights and a tokenizer of the words above."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        [" ".join(words) for words in WORDS.values()],
        trainers.WordLevelTrainer(special_tokens=special),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A CSV file of ninety texts with three labels."""
    file = tmp_path / "texts.csv"
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in sentences(90)))
    return file
