"""Fine-tune a small decoder with LoRA twice, plain and after `peftfast.patch`, and compare.

The model is a Llama made from a configuration and its tokenizer is trained on the text itself, so
that nothing is downloaded. Its weights are random: the embedding and the head are trained besides
the adapters. It trains with TRL's SFTTrainer where TRL is installed, else with transformers'
Trainer; exit status 1 where the losses of the two runs differ by over 1e-3 at any step.

    python examples/finetune_causal_lm.py [--trainer trl|hf] [--text FILE] [--steps N]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import peftfast

TEXT = Path(__file__).parent / "data" / "text" / "tinyshakespeare.txt"
VOCABULARY = 2048
LENGTH = 128
BATCH = 8
LOSS_LIMIT = 1e-3


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<end>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", model_max_length=LENGTH
    )


def build_model(vocabulary: int, seed: int) -> PeftModel:
    """A Llama of 3.5M parameters with LoRA on every linear, drawn from the seed."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    adapters = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(LlamaForCausalLM(config), adapters)


def recording(trainer: type[Trainer]) -> type[Trainer]:
    """The trainer, keeping each step's loss unrounded in `losses`."""

    class Recording(trainer):  # type: ignore[valid-type, misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self.__dict__.setdefault("losses", []).append(loss.detach())
            return result

    return Recording


def make_trainer(
    kind: str,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    blocks: list[list[int]],
    **options: Any,
) -> Trainer:
    """A trainer of blocks of token ids, in float32: TRL's for "trl", transformers' for "hf"."""
    if kind == "hf":
        return recording(Trainer)(
            model=model,
            args=TrainingArguments(**options),
            train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
            data_collator=default_data_collator,
        )
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return recording(SFTTrainer)(
        model=model,
        args=SFTConfig(bf16=False, gradient_checkpointing=False, max_length=LENGTH, **options),
        train_dataset=Dataset.from_dict({"input_ids": blocks}),
        processing_class=tokenizer,
    )


def train(trainer: Trainer) -> tuple[list[float], float]:
    """Every step's loss, and tokens per second of the whole training."""
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    losses = torch.stack(trainer.losses).tolist()
    return losses, len(losses) * BATCH * LENGTH / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", choices=("trl", "hf"), help="default: trl where installed")
    parser.add_argument("--text", type=Path, default=TEXT, help="default: the shipped Shakespeare")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kind = args.trainer or ("trl" if importlib.util.find_spec("trl") else "hf")

    text = args.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    ids = tokenizer(text, verbose=False)["input_ids"]
    blocks = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    if not blocks:
        parser.error(f"{args.text} is too short: {len(ids)} tokens, {LENGTH} are needed")
    print(f"{args.text.name}: {len(ids):,} tokens in {len(blocks)} blocks; trainer: {kind}")

    losses, speed = {}, {}
    for name in ("plain", "patched"):
        model = build_model(len(tokenizer), args.seed)
        if name == "patched":
            peftfast.patch(model)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = make_trainer(
                kind,
                model,
                tokenizer,
                blocks,
                output_dir=scratch,
                max_steps=args.steps,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-3,
                seed=args.seed,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            )
            losses[name], speed[name] = train(trainer)
        print(
            f"{name:8} loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f}, "
            f"{speed[name]:,.0f} tokens/s"
        )

    print(peftfast.report(model))
    apart = torch.tensor(losses["plain"]).sub(torch.tensor(losses["patched"])).abs()
    print(f"largest difference of the losses: {apart.max():.1e} (allowed: {LOSS_LIMIT:g})")
    return 0 if bool((apart <= LOSS_LIMIT).all()) else 1


if __name__ == "__main__":
    sys.exit(main())
