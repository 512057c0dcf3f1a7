"""P-Tuning on a cloze task: "The capital of <country> is [MASK]", from a handful of examples.

A small masked language model first reads what it is to know: sentences on countries, their
capitals, languages and currencies. It is then frozen, and asked by a template whose words are
learned, "[P]*3 {x} [P]*3 [MASK]" (Liu et al., "GPT Understands, Too", 2021): virtual tokens before
and after the country, made by an LSTM in training. Eight countries show what is asked; the answers
for the others, which the prompts never saw, are in the model. Where the virtual tokens went is
checked in the embedded input; afterwards the LSTM is dropped, and the adapter saved and loaded.

Exit status 1 where fewer than 80% of the other countries' answers are right, or a loaded copy
answers differently.

    python examples/cloze.py [--steps N]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, set_seed

from peftfast.methods import PTuningConfig, embedded, finalize

RELATIONS = ("capital", "language", "currency")
COUNTRIES = """
    france paris french euro; japan tokyo japanese yen; poland warsaw polish zloty;
    sweden stockholm swedish krona; turkey ankara turkish lira; india delhi hindi rupee;
    china beijing chinese yuan; russia moscow russian ruble; greece athens greek drachma;
    hungary budapest hungarian forint; thailand bangkok thai baht; vietnam hanoi vietnamese dong;
    korea seoul korean won; iceland reykjavik icelandic kronur; czechia prague czech koruna;
    israel jerusalem hebrew shekel; brazil brasilia portuguese real; mexico mexico_city spanish peso;
    romania bucharest romanian leu; bulgaria sofia bulgarian lev; georgia tbilisi georgian lari;
    armenia yerevan armenian dram; mongolia ulaanbaatar mongolian tugrik; ukraine kyiv ukrainian hryvnia
"""  # noqa: E501
PHRASES = (
    "the {relation} of {country} is {answer}",
    "{answer} is the {relation} of {country}",
    "{country} has the {relation} {answer}",
    "in {country} the {relation} is {answer}",
)
TEMPLATE = "[P]*3 {x} [P]*3 [MASK]"
SHOTS = 8


def facts() -> list[tuple[str, str, str]]:
    """Relation, country, answer."""
    rows = [row.split() for row in COUNTRIES.split(";")]
    return [
        (relation, country, answer)
        for country, *answers in rows
        for relation, answer in zip(RELATIONS, answers, strict=True)
    ]


def tokenizer_of(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Words as tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for sentence in sentences for word in sentence.split()})
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    held = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    held.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    held.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{one[1:-1].lower()}_token": one for one in special}
    return PreTrainedTokenizerFast(tokenizer_object=held, **names)


def pretrained(steps: int) -> tuple[BertForMaskedLM, PreTrainedTokenizerFast]:
    """A masked language model that knows the facts."""
    sentences = [
        phrase.format(relation=relation, country=country, answer=answer)
        for relation, country, answer in facts()
        for phrase in PHRASES
    ]
    tokenizer = tokenizer_of(sentences)
    ids = tokenizer(sentences, padding=True, return_tensors="pt")["input_ids"]
    named = {word for fact in facts() for word in fact}
    content = torch.zeros(len(tokenizer)).index_fill(
        0, torch.tensor(tokenizer.convert_tokens_to_ids(sorted(named))), 1.0
    )
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=24, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.05,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    warm = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1.0 - step / steps)
    )
    for step in range(steps):
        batch = ids[torch.randint(len(ids), (64,))]
        hidden = torch.multinomial(content[batch], 1)  # one name in each sentence
        labels = torch.full_like(batch, -100).scatter(1, hidden, batch.gather(1, hidden))
        given = batch.scatter(1, hidden, tokenizer.mask_token_id)
        mask = (batch != tokenizer.pad_token_id).long()
        loss = model(input_ids=given, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warm.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"pretraining step {step:4d} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval(), tokenizer


def questions(tokenizer: Any, relation: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The countries alone, as a tokenizer gives them, and the answers' ids [B]."""
    asked = [(country, answer) for kind, country, answer in facts() if kind == relation]
    inputs = tokenizer([country for country, _ in asked], padding=True, return_tensors="pt")
    answers = tokenizer.convert_tokens_to_ids([answer for _, answer in asked])
    taken = ("input_ids", "attention_mask")
    return {name: inputs[name] for name in taken}, torch.tensor(answers)


def answers_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model puts at the template's [MASK] [B]."""
    with torch.no_grad():
        logits = model(**inputs).logits
    masks = embedded(model, **inputs).masks
    return logits.argmax(-1).gather(1, masks).squeeze(1)


def check_positions(model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor]) -> None:
    """[CLS] P P P country P P P [MASK] [SEP]."""
    found = embedded(model, **inputs)
    assert found.prompts[0].tolist() == [1, 2, 3, 5, 6, 7]
    assert found.slot[0].tolist() == [0, 4, 9] and found.masks[0].tolist() == [8]
    table = model.get_base_model().get_input_embeddings().base_layer.weight
    assert torch.equal(found.inputs["inputs_embeds"][0, 8], table[tokenizer.mask_token_id])


def learn(base: Any, tokenizer: Any, relation: str, steps: int) -> tuple[Any, float, float]:
    """A model that is asked for a relation, with its accuracy on unseen countries before and
    after.
    """
    config = PTuningConfig(template=TEMPLATE, tokenizer=tokenizer)
    model = get_peft_model(copy.deepcopy(base), config)
    inputs, answers = questions(tokenizer, relation)
    check_positions(model, tokenizer, inputs)
    order = torch.randperm(len(answers))
    shown, unseen = order[:SHOTS], order[SHOTS:]

    def accuracy() -> float:
        given = {name: value[unseen] for name, value in inputs.items()}
        return float((answers_of(model, given) == answers[unseen]).float().mean())

    before = accuracy()
    given = {name: value[shown] for name, value in inputs.items()}
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(steps):
        model(**given, labels=answers[shown]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before, accuracy()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of pretraining")
    args = parser.parse_args(arguments)
    set_seed(0)
    base, tokenizer = pretrained(args.steps)
    good = True
    for relation in RELATIONS[:2]:
        model, before, after = learn(base, tokenizer, relation, steps=150)
        inputs, _ = questions(tokenizer, relation)
        given = answers_of(model, inputs)
        finalize(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        same = torch.equal(answers_of(again, inputs), given)
        print(
            f"{relation}: {before:.0%} of {len(given) - SHOTS} unseen countries before,"
            f" {after:.0%} after {SHOTS} examples; loaded: {'same' if same else 'DIFFERENT'}"
        )
        good = good and after >= 0.8 and same
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
