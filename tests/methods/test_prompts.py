from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

import peftfast
from peftfast.methods import Component, UnifiedConfig, finalize
from peftfast.methods.prompt_configs import PromptConfig, PTuningConfig, parse_template
from peftfast.methods.prompt_inputs import Layout, Prompt
from peftfast.methods.prompts import embedded
from tests.methods.models import MODELS, inputs_of, made
from tests.patching.tiny import VOCAB

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cloze.py"
WORDS = "the capital of is it was . great bad".split()
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
MASK_ID = 4
ENCODERS = (
    "bert", "roberta", "distilbert", "electra", "deberta", "albert", "mpnet", "modernbert"
)  # fmt: skip
NOT_TEXT = {
    "whisper": "a Conv1d, not an embedding of tokens",
    "vit": "ViTForImageClassification",
    "dinov2": "Dinov2Model",
    "clip": "CLIPModel",
}
TASKS = {"t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}


def tokenizer() -> Any:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL.values(), *WORDS])}
    held = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    held.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {f"{name}_token": token for name, token in SPECIAL.items()}
    return hf.PreTrainedTokenizerFast(tokenizer_object=held, **tokens)


def prompted(name: str | Any, config: Any = None, **options: Any) -> tuple[Any, Any]:
    """A model with prompts of random rows, and the same without; both frozen."""
    base = made(name) if isinstance(name, str) else name
    plain = copy.deepcopy(base).requires_grad_(False)
    options = {"num_virtual_tokens": 3, **options} if "template" not in options else options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config or PromptConfig(init="normal", **options)).eval()
    return model, plain


def rows_of(model: Any) -> Tensor:
    """The finished rows of a model's only prompt."""
    found = [one for one in model.modules() if type(one).__name__ == "PromptEmbedding"]
    with torch.no_grad():
        return found[0].rows().clone()


def ids(rows: int = 2, columns: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (rows, columns), generator=generator)


def padded(given: Tensor, lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """Rows cut to lengths, with padding on a side, and their mask."""
    out, mask = torch.zeros_like(given), torch.zeros_like(given)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(given.shape[1] - length, None)
        out[row, at] = given[row, :length]
        mask[row, at] = 1
    return out, mask


# Templates


def test_a_template_becomes_entries() -> None:
    held = tokenizer()
    found = parse_template("[P]*2 {x}[P] it was [MASK] . [SEP]", held)
    it, was, dot = (held.convert_tokens_to_ids(one) for one in ("it", "was", "."))
    assert found == ["[P]", "[P]", "{x}", "[P]", it, was, {"mask": MASK_ID}, dot, 3]
    assert parse_template("[P]*2 {x}", None) == ["[P]", "[P]", "{x}"]
    # Brackets need no spaces around them.
    assert parse_template("[P][P]*2{x}", None) == ["[P]", "[P]", "[P]", "{x}"]
    mask = {"mask": MASK_ID}
    assert parse_template("it[P].{x}[MASK]*2[P]", held) == [
        it,
        "[P]",
        dot,
        "{x}",
        mask,
        mask,
        "[P]",
    ]


def test_a_mask_is_one_without_being_the_tokenizers() -> None:
    held = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, unk_token="[UNK]")
    assert parse_template("[P] {x} [MASK]", held)[-1] == {"mask": MASK_ID}


def test_words_within_a_text_are_those_after_a_space() -> None:
    vocabulary = {"a": 0, "Ġa": 1, "Ġ": 2}
    held = Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    held.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of = hf.PreTrainedTokenizerFast(tokenizer_object=held)
    assert parse_template("a {x} [P] a", bytes_of) == [0, "{x}", "[P]", 1]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"template": "[P]*3 [MASK]"}, ValueError, r"with 0 slots; '\{x\}'.* is needed once"),
        ({"template": "{x} [P] {x}"}, ValueError, "with 2 slots"),
        ({"template": "{x} [MASK]"}, ValueError, r"without a virtual token; '\[P\]'"),
        (
            {"template": "{x} [P] [WHAT]"},
            ValueError,
            r"\[WHAT\], which the tokenizer does not know",
        ),
        ({"template": "{x} [P]*"}, ValueError, r"written as '\[P\]\*3'"),
        ({"template": "{x} [P] {y}"}, ValueError, r"template has '\{y\}'; the input is written"),
        (
            {"init": "labels", "init_labels": ["great", "bad"], "num_virtual_tokens": 1},
            ValueError,
            "init_labels has 2 words, for 1 virtual tokens",
        ),
        (
            {"template": "{x} [P]*2", "num_virtual_tokens": 3},
            ValueError,
            "3, and the template has 2",
        ),
        ({"template": ["{x}", "[P]", "word"]}, ValueError, "template has 'word'"),
        ({"template": 3}, TypeError, "template is int"),
        ({"template": "{x} [P]", "position": "end"}, ValueError, "position is 'end'"),
        ({"position": "middle"}, ValueError, "position is 'middle'; allowed: 'start'"),
        ({"init": "random"}, ValueError, "init is 'random'; allowed: 'uniform'"),
        ({"init": "text"}, ValueError, "init='text' and init_text go together"),
        ({"init_labels": ["great"]}, ValueError, "init='labels' and init_labels go together"),
        ({"num_virtual_tokens": 0}, ValueError, "virtual_tokens is 0"),
        ({"tasks": 0}, ValueError, "tasks is 0"),
    ],
)
def test_wrong_configurations_are_named(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        PromptConfig(tokenizer=tokenizer(), **options)


def test_words_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="'it' in the template needs a tokenizer"):
        PromptConfig(template="{x} [P] it")
    with pytest.raises(ValueError, match="encoder is None; allowed: 'mlp', 'lstm'"):
        PTuningConfig(encoder=None)


def test_a_saved_configuration_has_ids(tmp_path: Path) -> None:
    config = PTuningConfig(template="[P]*2 {x} it [MASK]", tokenizer=tokenizer())
    config.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, PTuningConfig) and again.num_virtual_tokens == 2
    assert again.template == config.template and again.template[-1] == {"mask": MASK_ID}


# Initial rows


def test_rows_start_as_embeddings_of_tokens() -> None:
    held = tokenizer()
    great, bad, the = (held.convert_tokens_to_ids(one) for one in ("great", "bad", "the"))
    weight = made("llama").get_input_embeddings().weight

    def start(**options: Any) -> Tensor:
        torch.manual_seed(0)
        config = PromptConfig(num_virtual_tokens=5, tokenizer=held, **options)
        return rows_of(get_peft_model(made("llama"), config))

    assert torch.equal(
        start(init="text", init_text="the great"), weight[[the, great, the, great, the]]
    )
    labels = start(init="labels", init_labels=["great bad", "the"])
    torch.testing.assert_close(labels[0], weight[[great, bad]].mean(0))
    assert torch.equal(labels[1], weight[the])
    for rows in (labels[2:], start(init="vocabulary")):
        assert tokens(rows, weight).min() >= len(SPECIAL)
    # Without a tokenizer, from the embedding's beginning; each task its own.
    config = PromptConfig(num_virtual_tokens=5, init="vocabulary", tasks=2)
    found = tokens(rows_of(get_peft_model(made("llama"), config)), weight)
    assert found.shape == (10,) and not torch.equal(found[:5], found[5:])


def tokens(rows: Tensor, weight: Tensor) -> Tensor:
    """Whose embeddings the rows are."""
    same = (rows.unsqueeze(1) == weight).all(-1)
    assert same.any(1).all()
    return same.int().argmax(1)


# Where prompts are


def places(model: Any, **inputs: Any) -> tuple[list[Any], list[Any], list[Any]]:
    found = embedded(model, **inputs)
    return found.prompts.tolist(), found.slot.tolist(), found.masks.tolist()


def test_prompts_are_beside_the_real_tokens() -> None:
    given = ids(3, 6)
    right = padded(given, [6, 4, 1], "right")
    left = padded(given, [6, 4, 1], "left")
    first = [[0, 1, 2]] * 3
    whole = list(range(3, 9))
    decoder, _ = prompted("llama")
    assert places(decoder, input_ids=given) == (first, [whole] * 3, [[]] * 3)
    assert places(decoder, input_ids=right[0], attention_mask=right[1]) == (
        first, [whole] * 3, [[]] * 3
    )  # fmt: skip
    assert places(decoder, input_ids=left[0], attention_mask=left[1])[0] == [
        [0, 1, 2], [2, 3, 4], [5, 6, 7]
    ]  # fmt: skip
    encoder, _ = prompted("bert")
    assert places(encoder, input_ids=right[0], attention_mask=right[1])[:2] == (
        [[1, 2, 3]] * 3, [[0, 4, 5, 6, 7, 8]] * 3
    )  # fmt: skip
    behind, _ = prompted("llama", position="end")
    assert places(behind, input_ids=right[0], attention_mask=right[1])[0] == [
        [6, 7, 8], [4, 5, 6], [1, 2, 3]
    ]  # fmt: skip


def test_a_template_is_around_the_input_and_within_an_encoders_ends() -> None:
    given = ids(2, 5)
    right = padded(given, [5, 3], "right")
    options = {"template": "[P]*2 {x} [P] it [MASK]", "tokenizer": tokenizer()}
    decoder, _ = prompted("llama", **options)
    assert places(decoder, input_ids=given) == (
        [[0, 1, 7]] * 2, [[2, 3, 4, 5, 6]] * 2, [[9]] * 2
    )  # fmt: skip
    assert places(decoder, input_ids=right[0], attention_mask=right[1]) == (
        [[0, 1, 7], [0, 1, 5]], [[2, 3, 4, 5, 6], [2, 3, 4, 8, 9]], [[9], [7]]
    )  # fmt: skip
    encoder, plain = prompted("bert", **options)
    found = embedded(encoder, input_ids=right[0], attention_mask=right[1])
    assert found.prompts.tolist() == [[1, 2, 6], [1, 2, 4]]
    assert found.slot.tolist() == [[0, 3, 4, 5, 9], [0, 3, 7, 8, 9]]
    assert found.masks.tolist() == [[8], [6]]
    assert found.inputs["attention_mask"].sum(1).tolist() == [10, 8]
    # The rows, the anchors and the real tokens are where the places say.
    weight = plain.get_input_embeddings().weight
    embeds = found.inputs["inputs_embeds"]
    table = torch.arange(2).unsqueeze(1)
    assert torch.equal(embeds[table, found.prompts], rows_of(encoder).expand(2, -1, -1))
    assert torch.equal(embeds[table, found.slot], weight[right[0]])
    assert torch.equal(embeds[table, found.masks], weight[MASK_ID].expand(2, 1, -1))


def test_holes_and_rows_of_padding_alone_keep_their_places() -> None:
    model, _ = prompted("llama", template="[P] {x} [P]")
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    found = embedded(model, input_ids=ids(), attention_mask=mask)
    assert found.inputs["attention_mask"].tolist() == [[0, 1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0]]
    assert found.prompts.tolist() == [[1, 5], [0, 1]]


def test_positions_go_on_through_a_prompt() -> None:
    model, _ = prompted("llama", template="[P]*2 {x} [P]")
    given, mask = padded(ids(), [5, 3], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = embedded(model, input_ids=given, attention_mask=mask, position_ids=positions)
    assert found.inputs["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 2, 3, 4, 5]
    ]  # fmt: skip


# What models make of them


@pytest.mark.parametrize("name", MODELS)
def test_the_model_reads_the_rows_where_they_are(name: str) -> None:
    if name in NOT_TEXT:
        with pytest.raises((ValueError, NotImplementedError), match=NOT_TEXT[name]):
            prompted(name)
        return
    model, plain = prompted(name)
    given = inputs_of(name)
    tokens = given.pop("input_ids").clamp(min=5)
    rows = rows_of(model).expand(2, -1, -1)
    source = plain.get_encoder() if name in TASKS else plain
    real = source.get_input_embeddings()(tokens)
    at = int(name in ENCODERS)
    want = plain(inputs_embeds=torch.cat([real[:, :at], rows, real[:, at:]], 1), **given)[0]
    got = model(input_ids=tokens, **given)[0]
    torch.testing.assert_close(got, want)
    # As embeddings too.
    torch.testing.assert_close(model(inputs_embeds=real, **given)[0], want)
    with model.disable_adapter():
        want = plain(input_ids=tokens, **given)[0]
        assert torch.equal(model(input_ids=tokens, **given)[0], want)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "t5"])
def test_a_padded_row_is_that_row_alone(name: str, side: str) -> None:
    template = "[P]*2 {x} [P]" if name != "t5" else "[P]*3 {x}"
    base = made(name)
    if name in ("bert", "roberta"):  # a classifier on the first token would read padding
        base = base.get_submodule(name)
    model, _ = prompted(base, template=template)
    length, given = 3, ids()
    out, mask = padded(given, [5, length], side)
    pad = getattr(model.config, "pad_token_id", 0) or 0
    out = out.masked_fill(mask == 0, pad)
    inputs: dict[str, Any] = {"input_ids": out, "attention_mask": mask}
    alone: dict[str, Any] = {"input_ids": given[1:, :length]}
    if name == "t5":
        inputs["decoder_input_ids"] = given
        alone["decoder_input_ids"] = given[1:]
    elif name in ("gpt2", "bert") and side == "left":  # which count positions by columns
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    got, want = model(**inputs)[0][1], model(**alone)[0][0]
    if got.dim() == 2 and name != "t5":
        slot = embedded(model, **inputs).slot[1][mask[1].bool()]
        got, want = got[slot], want[embedded(model, **alone).slot[0]]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_decoders_classifier_reads_the_last_real_token() -> None:
    for source in ("Llama", "GPT2"):
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4} if source == "GPT2" else {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4,
        }  # fmt: skip
        config = getattr(hf, f"{source}Config")(vocab_size=VOCAB, pad_token_id=0, **sizes)
        torch.manual_seed(0)
        base = getattr(hf, f"{source}ForSequenceClassification")(config).eval()
        model, _ = prompted(base)
        out, mask = padded(ids(), [5, 3], "right")
        got = model(input_ids=out, attention_mask=mask).logits[1]
        want = model(input_ids=out[1:, :3]).logits[0]
        torch.testing.assert_close(got, want)
        loss = model(input_ids=out, attention_mask=mask, labels=torch.tensor([1, 0])).loss
        assert loss.isfinite()


def test_labels_are_at_their_tokens() -> None:
    given, mask = padded(ids(), [5, 3], "right")
    labels = given.masked_fill(mask == 0, -100)
    model, _ = prompted("llama", template="[P]*2 {x} [P]")
    out = model(input_ids=given, attention_mask=mask, labels=labels)
    slot = embedded(model, input_ids=given, attention_mask=mask).slot
    # A causal model predicts each token from the place before it, which may be virtual.
    before = out.logits.gather(1, (slot - 1).unsqueeze(-1).expand(-1, -1, VOCAB))
    want = F.cross_entropy(before.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, want)

    torch.manual_seed(0)
    config = made("bert").config
    tagger, _ = prompted(hf.BertForTokenClassification(config).eval())
    tags = torch.where(mask.bool(), torch.tensor([[0, 1, 1, 0, 1]]), -100)
    out = tagger(input_ids=given, attention_mask=mask, labels=tags)
    slot = embedded(tagger, input_ids=given, attention_mask=mask).slot
    at = out.logits.gather(1, slot.unsqueeze(-1).expand(-1, -1, out.logits.shape[-1]))
    torch.testing.assert_close(out.loss, F.cross_entropy(at.flatten(0, 1), tags.flatten()))

    answerer, _ = prompted(hf.BertForQuestionAnswering(config).eval())
    spans = {"start_positions": torch.tensor([0, 2]), "end_positions": torch.tensor([4, 2])}
    inputs = embedded(answerer, input_ids=given, attention_mask=mask, **spans).inputs
    assert inputs["start_positions"].tolist() == [0, 5]
    assert inputs["end_positions"].tolist() == [7, 5]


def test_labels_of_masks_go_to_the_templates_masks() -> None:
    torch.manual_seed(0)
    base = hf.BertForMaskedLM(made("bert").config).eval()
    model, _ = prompted(base, template="[P] {x} [MASK] [P] [MASK]", tokenizer=tokenizer())
    given, mask = padded(ids(), [5, 3], "right")
    labels = torch.tensor([[7, 8], [9, 10]])
    out = model(input_ids=given, attention_mask=mask, labels=labels)
    masks = embedded(model, input_ids=given, attention_mask=mask).masks
    at = out.logits.gather(1, masks.unsqueeze(-1).expand(-1, -1, VOCAB))
    torch.testing.assert_close(out.loss, F.cross_entropy(at.flatten(0, 1), labels.flatten()))
    with pytest.raises(ValueError, match=r"labels has the shape \(2,\); \(2, 5\) .*2 \[MASK\]"):
        model(input_ids=given, labels=labels[:, 0])


def test_labels_of_masks_are_not_those_of_as_many_tokens() -> None:
    torch.manual_seed(0)
    base = hf.BertForMaskedLM(made("bert").config).eval()
    model, _ = prompted(base, template=["[P]", "{x}", {"mask": MASK_ID}, {"mask": MASK_ID}])
    given, labels = ids(2, 2), torch.tensor([[7, 8], [9, 10]])
    out = model(input_ids=given, labels=labels)
    at = out.logits[:, -3:-1]  # before the last token, which is outside
    torch.testing.assert_close(out.loss, F.cross_entropy(at.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("template", ["[P]*2 {x}", "{x} [P]", "[P] {x} [P]*2"])
def test_labels_that_are_shifted_are_predicted_from_before_their_tokens(template: str) -> None:
    for position in (None, "after_first"):
        model, _ = prompted("llama", template=template, position=position)
        given, mask = padded(ids(), [5, 3], "right")
        inputs = {"input_ids": given, "attention_mask": mask}
        labels = given.masked_fill(mask == 0, -100)
        labels[:, 0] = -100
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        want = model(**inputs, labels=labels).loss
        torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted).loss, want)


def test_logits_are_kept_where_columns_have_moved_to() -> None:
    model, _ = prompted("llama", template="[P]*2 {x} [P]", position="after_first")
    whole, keep = model(input_ids=ids()).logits, torch.tensor([0, 1, -1])
    got = model(input_ids=ids(), logits_to_keep=keep).logits
    torch.testing.assert_close(got, whole[:, [0, 3, 7]])
    left, mask = padded(ids(), [5, 3], "left")
    with pytest.raises(ValueError, match="logits_to_keep has columns whose places differ"):
        model(input_ids=left, attention_mask=mask, logits_to_keep=keep)


def test_packed_rows_are_refused() -> None:
    model, _ = prompted("llama")
    for packed in (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5])},
    ):
        with pytest.raises(ValueError, match=f"rows are packed .{list(packed)[0]}.*Give one"):
            model(input_ids=ids(1), **packed)


@pytest.mark.parametrize("kind", ["SequenceClassification", "QuestionAnswering"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_of_the_input_reads_it_without_the_prompt(name: str, kind: str) -> None:
    torch.manual_seed(0)
    config = made(name).config
    config.num_labels = 2
    base = getattr(hf, f"{'T5' if name == 't5' else 'Bart'}For{kind}")(config).eval()
    model, plain = prompted(base)
    given = ids()
    given[:, -1] = config.eos_token_id
    rows = rows_of(model).expand(2, -1, -1)
    source = plain.get_encoder()
    embeds = torch.cat([rows, source.get_input_embeddings()(given)], 1)
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])}
    targets = spans if kind == "QuestionAnswering" else {"labels": torch.tensor([0, 1])}
    want = plain(input_ids=given, encoder_outputs=source(inputs_embeds=embeds), **targets)
    got = model(input_ids=given, **targets)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got[1], want[1])
    assert got.encoder_last_hidden_state.shape[1] == 8


def test_a_mask_is_as_long_as_the_encoders_outputs() -> None:
    model, _ = prompted("t5")
    given, mask = padded(ids(), [5, 3], "right")
    inputs = {"attention_mask": mask, "decoder_input_ids": torch.zeros_like(given[:, :1])}
    want = model(input_ids=given, **inputs)
    held = hf.modeling_outputs.BaseModelOutput(want.encoder_last_hidden_state)
    got = model(encoder_outputs=held, **inputs)
    torch.testing.assert_close(got.logits, want.logits)


def test_tasks_are_mixed_in_a_batch() -> None:
    for task_type in (None, "CAUSAL_LM"):
        model, plain = prompted("llama", tasks=3, task_type=task_type)
        name = "task_ids" if task_type is None else "prompt_tasks"
        given, chosen = ids(4), torch.tensor([2, 0, 1, 2])
        rows = rows_of(model).view(3, 3, -1)[chosen]
        want = plain(inputs_embeds=torch.cat([rows, plain.get_input_embeddings()(given)], 1))
        got = model(input_ids=given, **{name: chosen})
        torch.testing.assert_close(got.logits, want.logits)
        options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
        whole = model.generate(input_ids=given, task_ids=chosen, **options)
        for row in range(4):
            one = slice(row, row + 1)
            alone = model.generate(input_ids=given[one], task_ids=chosen[one], **options)
            assert torch.equal(alone[0], whole[row, : alone.shape[1]])
        with pytest.raises(ValueError, match="task_ids is missing: the prompt has 3 tasks"):
            model(input_ids=given)
        with pytest.raises(ValueError, match=rf"{name} has \[0, 1, 2, 3\]; .* 0 to 2"):
            model(input_ids=given, **{name: torch.arange(4)})
        with pytest.raises(ValueError, match=rf"{name} has the shape \(2,\)"):
            model(input_ids=given, **{name: chosen[:2]})
        with pytest.raises(TypeError, match=f"{name} is list; a tensor of integers"):
            model(input_ids=given, **{name: [0, 1, 2, 0]})
        with pytest.raises(ValueError, match="dtype torch.bool; integers"):
            model(input_ids=given, **{name: chosen > 1})


def test_one_prompt_with_tasks_is_beside_one_without() -> None:
    model, _ = prompted("llama", tasks=2)
    model.add_adapter("other", PromptConfig(num_virtual_tokens=2))
    model.base_model.set_adapter(["default", "other"])
    assert model(input_ids=ids(), task_ids=torch.tensor([0, 1])).logits.shape[1] == 10


def test_no_id_or_task_beyond_the_tables_is_read_as_a_row() -> None:
    model, plain = prompted("llama", tasks=2)
    wrong = ids().index_fill(1, torch.tensor([1]), VOCAB)
    for one, tasks in ((plain, {}), (model, {"task_ids": torch.tensor([0, 1])})):
        with pytest.raises(IndexError, match="out of range"):
            one(input_ids=wrong, **tasks)
    # As on a device, where values are not looked at.
    module = next(one for one in model.modules() if type(one).__name__ == "PromptEmbedding")
    held = Prompt(module, (("row", 0), ("row", 1), ("row", 2)), (), 0, 0, VOCAB)
    layout = Layout(held, None, 4, 1, torch.device("cpu"), torch.tensor([0, -1, 1, 2]))
    assert layout.ids()[:, :3].tolist() == [
        [VOCAB, VOCAB + 1, VOCAB + 2], [-1] * 3, [VOCAB + 3, VOCAB + 4, VOCAB + 5], [-1] * 3
    ]  # fmt: skip


# Generation


def peft_twin(name: str, model: Any, encoder: bool = False) -> Any:
    """PEFT's model with the same rows."""
    config = peft.PromptTuningConfig(
        num_virtual_tokens=3, task_type=TASKS.get(name, "CAUSAL_LM"), num_layers=2, token_dim=32,
        num_attention_heads=4,
    )  # fmt: skip
    base = made(name)
    scale(base)
    twin = get_peft_model(base, config).eval()
    with torch.no_grad():
        twin.prompt_encoder.default.embedding.weight[:3] = rows_of(model)
    return twin


def scale(base: Any) -> None:
    """Weights large enough for greedy decoding not to repeat one token."""
    base.generation_config.eos_token_id = None
    with torch.no_grad():
        for value in base.parameters():
            if value.dim() == 2 and value.shape[0] != VOCAB:
                value.mul_(8.0)


def generated(model: Any, given: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(given) if mask is None else mask
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(input_ids=given, attention_mask=mask, **options)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3", "t5", "bart"])
def test_generation_is_that_of_peft_and_padding_changes_nothing(name: str) -> None:
    base = made(name)
    scale(base)
    model, _ = prompted(base, task_type=TASKS.get(name, "CAUSAL_LM"))
    twin = peft_twin(name, model)
    given = ids(3)
    left, mask = padded(torch.nn.functional.pad(given, (0, 2)), [5] * 3, "left")
    if name == "bart":
        left = left.masked_fill(mask == 0, 1)
    new = slice(5, None) if name not in TASKS else slice(None)
    for beams in (1, 3):
        got = generated(model, given, num_beams=beams)[:, new]
        assert torch.equal(got, generated(twin, given, num_beams=beams)[:, new])
        if name not in TASKS:  # relative and absolute positions of an encoder count padding
            assert torch.equal(got, generated(model, left, mask, num_beams=beams)[:, 7:])
        assert got.unique().numel() > 4
    if name in ("llama", "gemma3"):
        for options in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(generated(model, given, **options), generated(model, given))
            out = generated(model, left, mask, **options)
            assert torch.equal(out[:, 7:], generated(model, given)[:, 5:])


def test_a_template_in_generation_stays_before_what_is_generated() -> None:
    base = made("llama")
    scale(base)
    model, plain = prompted(base, template="[P]*2 {x} [P] it", tokenizer=tokenizer())
    given = ids(3)
    step = given
    for _ in range(4):
        found = embedded(model, input_ids=given).inputs["inputs_embeds"]
        embeds = torch.cat([found, plain.get_input_embeddings()(step[:, 5:])], 1)
        step = torch.cat([step, plain(inputs_embeds=embeds).logits[:, -1:].argmax(-1)], 1)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generated(model, given, max_new_tokens=4, **options), step)
    with pytest.raises(ValueError, match="prefill_chunk_size is set"):
        generated(model, given, prefill_chunk_size=2)
    embeds = plain.get_input_embeddings()(given)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out, step[:, 5:])
    # Without an input there is the token that generation begins with.
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(input_ids=torch.tensor([[base.config.bos_token_id]]), **options)
    for cached in (True, False):
        assert torch.equal(model.generate(**options, use_cache=cached), want)
    # A cache that goes on.
    cache = model(input_ids=given, use_cache=True).past_key_values
    assert cache.get_seq_length() == 9
    out = model(input_ids=step[:, 5:6], past_key_values=cache, attention_mask=torch.ones(3, 6))
    assert torch.equal(out.logits[:, -1].argmax(-1), step[:, 6])


# Training, saving, copying


def test_gradient_checkpointing_and_the_encoder_change_nothing() -> None:
    results = []
    for checkpointing in (None, False, True):
        base = made("llama")
        torch.manual_seed(3)
        model = get_peft_model(base, PTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        if checkpointing is not None:
            base.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        grads = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
        results.append((loss.detach(), grads))
    (plain, wanted), *others = results
    assert len(wanted) == 21 and all(value.any() for value in wanted.values())
    for again, got in others:
        assert torch.equal(plain, again)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_gradients_reach_rows_alone_and_exactly() -> None:
    model, plain = prompted("llama", template="[P]*2 {x} [P]")
    given, mask = padded(ids(), [5, 3], "right")
    model(input_ids=given, attention_mask=mask, labels=given).loss.backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    assert len(trained) == 1
    rows = rows_of(model).requires_grad_()
    real = plain.get_input_embeddings()(given)
    embeds = torch.stack([
        torch.cat([rows[:2], real[row, :length], rows[2:], real[row, length:]])
        for row, length in enumerate((5, 3))
    ])  # fmt: skip
    inputs = embedded(model, input_ids=given, attention_mask=mask, labels=given).inputs
    plain(**{**inputs, "inputs_embeds": embeds}).loss.backward()
    torch.testing.assert_close(trained[0].grad, rows.grad)


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_a_checkpoint_has_the_rows_and_the_encoder(encoder: str, tmp_path: Path) -> None:
    config = PTuningConfig(
        template="[P]*2 {x} [MASK] [P]", tokenizer=tokenizer(), encoder=encoder,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model, _ = prompted("llama", config)
    want = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(made("llama"), tmp_path / "trained")
    torch.testing.assert_close(again(input_ids=ids()).logits, want)
    assert not any("linear" in name for name, _ in again.named_parameters() if "prompt" in name)
    resumed = PeftModel.from_pretrained(made("llama"), tmp_path / "trained", is_trainable=True)
    assert any("linear" in name for name, _ in resumed.named_parameters() if "prompt" in name)
    torch.testing.assert_close(resumed.eval()(input_ids=ids()).logits, want, rtol=0, atol=0)
    finalize(model)
    torch.testing.assert_close(model(input_ids=ids()).logits, want)
    model.save_pretrained(tmp_path / "finished")
    sizes = [
        (tmp_path / kind / "adapter_model.safetensors").stat().st_size
        for kind in ("trained", "finished")
    ]
    assert sizes[1] < sizes[0] / 4
    last = PeftModel.from_pretrained(made("llama"), tmp_path / "finished").eval()
    torch.testing.assert_close(last(input_ids=ids()).logits, want)


def test_adapters_are_switched_and_deleted() -> None:
    model, plain = prompted("llama")
    model.add_adapter("other", PromptConfig(template="{x} [P]*2"))
    first = model(input_ids=ids()).logits
    model.set_adapter("other")
    second = model(input_ids=ids()).logits
    assert second.shape[1] == 7 and first.shape[1] == 8
    model.delete_adapter("default")
    torch.testing.assert_close(model(input_ids=ids()).logits, second)
    base = model.unload()
    assert type(base) is type(plain)
    assert type(base.get_input_embeddings()) is nn.Embedding
    assert torch.equal(base(input_ids=ids()).logits, plain(input_ids=ids()).logits)


def test_several_active_adapters_are_one_around_the_other() -> None:
    base = made("llama")
    scale(base)
    model, _ = prompted(base, template="[P] {x} [P]")
    model.add_adapter("other", PromptConfig(template="[P] {x} [P]*2", init="normal"))
    model.base_model.set_adapter(["default", "other"])
    given = ids()
    assert places(model, input_ids=given)[:2] == ([[0, 1, 7, 8, 9]] * 2, [[2, 3, 4, 5, 6]] * 2)
    found = embedded(model, input_ids=given).inputs["inputs_embeds"]
    rows = [one.rows() for one in model.modules() if type(one).__name__ == "PromptEmbedding"]
    first, second = rows
    assert torch.equal(found[0, [0, 1, 7, 8, 9]], torch.stack([second[0], *first, *second[1:]]))
    assert torch.equal(generated(model, given, use_cache=False), generated(model, given))


def test_copies_have_prompts_of_their_own() -> None:
    model, _ = prompted("llama")
    want = model(input_ids=ids()).logits
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    for twin in twins:
        assert torch.equal(twin(input_ids=ids()).logits, want)


def test_the_model_keeps_its_name_and_signature() -> None:
    model, plain = prompted("llama")
    base = model.get_base_model()
    assert isinstance(base, type(plain)) and type(base).__name__ == type(plain).__name__
    names = list(inspect.signature(base.forward).parameters)
    assert set(inspect.signature(plain.forward).parameters) < set(names)
    assert {"task_ids", "prompt_tasks"} < set(names)


def test_accelerates_hooks_are_kept() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    base = made("llama")
    for module in (base, base.get_input_embeddings()):
        add_hook_to_module(module, ModelHook())
    model, plain = prompted("llama")
    twin = get_peft_model(base, PromptConfig(num_virtual_tokens=3)).eval()
    twin.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(twin(input_ids=ids()).logits, model(input_ids=ids()).logits)
    assert torch.equal(twin.unload()(input_ids=ids()).logits, plain(input_ids=ids()).logits)


def test_accelerate_prepares_a_model_with_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator, dispatch_model
    from accelerate.hooks import remove_hook_from_module
    from accelerate.state import AcceleratorState

    # One for the process, in another precision where a Trainer has run before.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    model, plain = prompted("llama")
    want = model(input_ids=ids()).logits
    base = model.get_base_model()
    for _ in range(2):
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(base)
        assert prepared(input_ids=ids()).logits.shape == want.shape
    hooked, _ = prompted("llama")
    dispatch_model(hooked.get_base_model(), device_map={"": "cpu"}, force_hooks=True)
    remove_hook_from_module(hooked.get_base_model(), recurse=True)
    assert hooked(input_ids=ids()).logits.shape == want.shape
    out = hooked.unload()(input_ids=ids()).logits
    torch.testing.assert_close(out, plain(input_ids=ids()).logits)


def test_what_prompts_can_not_be_put_into_is_named() -> None:
    model, _ = prompted("llama")
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(2, 1, 5, 5\)"):
        model(input_ids=ids(), attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="attention_mask has 4 columns; the input has 5"):
        model(input_ids=ids(), attention_mask=torch.ones(2, 4))
    for name, room in (("bert", 32), ("gpt2", 32)):
        short, _ = prompted(name)
        assert short(input_ids=ids(1, room - 3))[0].isfinite().all()
        with pytest.raises(ValueError, match=f"{room - 2} tokens and 3 .* off at {room - 3}$"):
            short(input_ids=ids(1, room - 2))
    with pytest.raises(ValueError, match="no prompts act on the model"):
        embedded(made("llama"), input_ids=ids())
    with pytest.raises(ValueError, match="ViTForImageClassification"):
        prompted("vit")
    replaced = made("llama")
    table = replaced.get_input_embeddings()
    table.forward = table.forward
    with pytest.raises(ValueError, match="its forward is replaced on the instance"):
        prompted(replaced)


def wrapped(forward: Any) -> Any:
    """A forward around another, as trainers set one on an instance."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


def test_a_forward_set_on_the_instance_gets_the_prompts() -> None:
    want = prompted("llama")[0](input_ids=ids()).logits
    model, plain = prompted("llama")
    base = model.get_base_model()
    twin, _ = prompted(copy.deepcopy(plain))
    twin.load_state_dict(model.state_dict())
    # One that goes around the model's own forward, and one that calls it; set after and before.
    base.forward = lambda **inputs: plain.__class__.forward(base, **inputs)
    want = twin(input_ids=ids()).logits
    assert torch.equal(model(input_ids=ids()).logits, want)
    assert torch.equal(base(input_ids=ids()).logits, want)
    before = made("llama")
    before.forward = wrapped(before.forward)
    other, _ = prompted(before)
    other.load_state_dict(model.state_dict())
    for one in (twin.get_base_model(), before):
        one.forward = wrapped(one.forward)
        assert torch.equal(one(input_ids=ids()).logits, want)
        assert generated(one, ids()).shape == (2, 10)
    assert torch.equal(copy.deepcopy(model)(input_ids=ids()).logits, want)
    assert torch.equal(copy.deepcopy(twin)(input_ids=ids()).logits, want)
    other.add_adapter("other", PromptConfig(num_virtual_tokens=2))
    assert torch.equal(other(input_ids=ids()).logits, want)
    for one in (model, twin, other):
        assert torch.equal(one.unload()(input_ids=ids()).logits, plain(input_ids=ids()).logits)


def test_trls_trainer_trains_the_rows(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model, _ = prompted("llama", task_type="CAUSAL_LM")
    given, before = ids()[:1], rows_of(model)
    want = model(input_ids=given, labels=given).loss.item()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, save_strategy="no",
        learning_rate=0.1,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"input_ids": given[0].tolist()}] * 4)
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=rows, processing_class=tokenizer()
    )
    trainer.train()
    # The trainer divides by the tokens after a row's first, which is predicted here too.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want * 5 / 4, rel=1e-4)
    assert (rows_of(trainer.model) - before).abs().max() > 0.01


def test_a_failed_adapter_leaves_the_prompts() -> None:
    held = made("llama")
    for config, words in (
        (
            PromptConfig(num_virtual_tokens=2, init="vocabulary", init_tokens=[VOCAB, 1]),
            rf"init_tokens of the adapter 'other' has the ids \[{VOCAB}\]; .* 0 to {VOCAB - 1}",
        ),
        (
            PromptConfig(template=["[P]", "{x}", VOCAB + 3, {"mask": VOCAB}]),
            rf"template of the adapter 'other' has the ids \[{VOCAB}, {VOCAB + 3}\]",
        ),
    ):
        model, _ = prompted(copy.deepcopy(held))
        want = model(input_ids=ids()).logits
        with pytest.raises(ValueError, match=words):
            model.add_adapter("other", config)
        assert torch.equal(model(input_ids=ids()).logits, want)


def test_models_that_share_an_embedding_do_not_share_prompts() -> None:
    torch.manual_seed(0)
    first, second = (
        getattr(hf, f"BertFor{kind}Classification")(made("bert").config).eval()
        for kind in ("Sequence", "Token")
    )
    second.bert = first.bert
    model, _ = prompted(first)
    want = model(input_ids=ids()).logits
    with pytest.raises(ValueError, match="are shared with another model that has prompts"):
        prompted(second)
    assert torch.equal(model(input_ids=ids()).logits, want)


def test_a_training_step_compiles_whole() -> None:
    model, _ = prompted("llama", template="[P]*2 {x} [P]")
    given, mask = padded(ids(), [5, 3], "right")
    inputs = {"input_ids": given, "attention_mask": mask, "labels": given}
    want = model(**inputs).loss
    want.backward()
    trained = next(one for one in model.parameters() if one.requires_grad)
    wanted, trained.grad = trained.grad, None
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    got = compiled(**inputs).loss
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(trained.grad, wanted)


def test_generation_goes_on_from_a_cache() -> None:
    base = made("llama")
    scale(base)
    model, _ = prompted(base)
    left, mask = padded(ids(), [5, 3], "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    first = model.generate(
        input_ids=left, attention_mask=mask, return_dict_in_generate=True, **options
    )
    longer = torch.cat([first.sequences, ids(2, 3, seed=1)], 1)
    mask = F.pad(mask, (0, 7), value=1)
    given = {"input_ids": longer, "attention_mask": mask, **options}
    want = model.generate(**given)
    assert torch.equal(model.generate(**given, past_key_values=first.past_key_values), want)


def test_tokens_are_guessed_ahead_and_prefilled_in_chunks() -> None:
    base = made("llama")
    scale(base)
    model, _ = prompted(base)
    given = ids(1, 8)
    want = generated(model, given, max_new_tokens=8)
    ways = ({"prompt_lookup_num_tokens": 2}, {"assistant_model": made("llama")})
    for way in (*ways, {"prefill_chunk_size": 3}):
        assert torch.equal(generated(model, given, max_new_tokens=8, **way), want)


def test_the_patched_model_has_the_same_prompts() -> None:
    components = [
        Component("embedding", primitive="prompt", virtual_tokens=3, encoder="lstm", init="normal"),
        Component("ffn_output", bottleneck=4, init="near_identity"),
    ]
    model = get_peft_model(made("llama"), UnifiedConfig(components=components)).train()
    given, mask = padded(ids(), [5, 3], "right")
    inputs = {"input_ids": given, "attention_mask": mask, "labels": given}

    def step() -> list[Tensor]:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(one.grad for one in model.parameters() if one.requires_grad)]

    want = step()
    peftfast.patch(model)
    assert {one.op for one in peftfast.report(model).fused} >= {"bottleneck", "sdpa"}
    torch.testing.assert_close(step(), want)
    model.add_adapter("other", PromptConfig(num_virtual_tokens=2))
    model.set_adapter("other")
    assert model(input_ids=given).logits.shape[1] == 7
    model.set_adapter("default")
    peftfast.unpatch(model)
    torch.testing.assert_close(step(), want, rtol=0, atol=0)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Questions, and the label of a template's [MASK]."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = ids(1, 4, seed=index)[0]
        return {"input_ids": row, "prompt_tasks": index % 2, "labels": int(row[1])}


def test_trainer_resumes_where_it_was(tmp_path: Path) -> None:
    def train(resume: str | None) -> Any:
        hf.set_seed(0)
        base = hf.BertForMaskedLM(made("bert").config)
        config = PTuningConfig(template="[P]*2 {x} [P] [MASK]", tokenizer=tokenizer(), tasks=2)
        model = get_peft_model(base, config)
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4,
            learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
            label_names=["labels"],
        )  # fmt: skip
        trainer = hf.Trainer(model, arguments, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(None)
    want = {name: one.detach() for name, one in whole.named_parameters() if one.requires_grad}
    again = train(str(tmp_path / "checkpoint-2"))
    assert len(want) == 21
    for name, one in again.named_parameters():
        if one.requires_grad:
            assert torch.equal(one, want[name]), name


@pytest.fixture(scope="module")
def cloze() -> ModuleType:
    specification = importlib.util.spec_from_file_location("cloze", EXAMPLE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_cloze_task_is_learned_from_a_handful_of_examples(cloze: ModuleType) -> None:
    torch.manual_seed(0)
    base, held = cloze.pretrained(240)
    model, before, after = cloze.learn(base, held, "capital", steps=100)
    assert before < 0.2 and after >= 0.9
    given, _ = cloze.questions(held, "capital")
    want = cloze.answers_of(model, given)
    finalize(model)
    assert torch.equal(cloze.answers_of(model, given), want)
