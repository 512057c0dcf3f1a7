"""Checkpoints of PEFT's own prefix and prompt methods, read into ours and written from them.

PEFT keeps one tensor, `prompt_embeddings`: of prefixes [P, 2 L Hkv D], layer after layer, keys
before values; of prompts [P, d].
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftfast.methods.config import MethodConfig
from peftfast.methods.connections import unchanged_on_failure
from peftfast.methods.layer import AdapterHost
from peftfast.methods.placement import Placement, place
from peftfast.methods.prefix_configs import PrefixConfig
from peftfast.methods.prompt_configs import PromptConfig
from peftfast.methods.registration import PREFIX
from peftfast.methods.sites import find_blocks

_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")
_KEY = "prompt_embeddings"
_THEIRS, _OURS = "base_model.", "base_model.model."  # before the names of a task's head


def load_from_peft(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Put a saved adapter of PEFT's Prefix-Tuning, CARTRIDGE, Prompt Tuning or P-Tuning on a model
    as a `PrefixConfig` or a `PromptConfig`; outputs are the same.

    What a network made of it, PEFT has saved finished: it is trained on as it is.

    Args:
        model: the base model.
        path: the directory that PEFT's save_pretrained wrote, with safetensors.
        adapter_name: what it is called here.
        is_trainable: whether it is trained on; without, the model is in evaluation mode.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is of another method or doesn't fit; the model is as it was then.
    """
    if isinstance(model, PeftModel):
        raise ValueError("model is a PeftModel; the base model is needed")
    values = _weights(path)
    theirs = PeftConfig.from_pretrained(str(path))
    kind = _kind(theirs)
    embeddings = values.pop(_KEY, None)
    if embeddings is None:
        raise ValueError(f"{path} has no {_KEY}, which every checkpoint of {kind} has")
    shared: dict[str, Any] = {
        "task_type": theirs.task_type,
        "num_virtual_tokens": theirs.num_virtual_tokens,
        "modules_to_save": list(dict.fromkeys(getattr(theirs, "modules_to_save", None) or []))
        or None,
        "inference_mode": not is_trainable,
        "base_model_name_or_path": theirs.base_model_name_or_path,
    }
    config: MethodConfig
    if kind in _PREFIXES:
        _refuse_seq2seq(model, theirs)
        config = PrefixConfig(cross_attention=False, **shared)
        placed = _ordered(model, place(model, config))
        given = _prefix_values(placed, theirs, embeddings)
    else:
        if (theirs.num_transformer_submodules or 1) != 1:
            raise ValueError(
                f"the {kind} at {path} has a second prompt, for the decoder: a PromptConfig has one"
            )
        config = PromptConfig(position="start", init="normal", **shared)
        (one,) = place(model, config)
        _require_shape(embeddings, (theirs.num_virtual_tokens, one.out_features))
        given = {f"{_at(one)}.weight": embeddings}
    state = {f"{_OURS}{name}": value.contiguous() for name, value in given.items()}
    state |= {f"{_OURS}{name.removeprefix(_THEIRS)}": value for name, value in values.items()}
    with unchanged_on_failure(model):
        made = peft.get_peft_model(model, config, adapter_name)
        try:
            loaded: Any = set_peft_model_state_dict(made, state, adapter_name=adapter_name)
        except (RuntimeError, KeyError) as error:  # shapes, or a head that it lacks
            raise ValueError(f"{path} doesn't fit the model: {error}") from error
        if unexpected := loaded.unexpected_keys:
            raise ValueError(f"{path} has {', '.join(sorted(unexpected))}, which the model has not")
    return made if is_trainable else made.eval()


def save_as_peft(model: PeftModel, path: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter of prefixes or prompts as PEFT's Prefix-Tuning or Prompt Tuning, for
    `peft.PeftModel.from_pretrained`; outputs are the same.

    What a network makes is written finished, as PEFT does too.

    Args:
        model: with an adapter of a `PrefixConfig`, a `PTuningV2Config`, a `PromptConfig`, or
            another whose only component is a prefix in self-attention or a prompt.
        path: a directory, made where there is none.
        adapter_name: which adapter.

    Raises:
        ValueError: PEFT has nothing that computes the same; the message says why.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, MethodConfig):
        known = ", ".join(map(repr, model.peft_config))
        raise ValueError(
            f"adapter_name is {adapter_name!r}, which is no adapter of a declared method; the"
            f" model has {known}"
        )
    base = model.get_base_model()
    found = [
        (placement, module.state_dict())
        for host in base.modules()
        if isinstance(host, AdapterHost)
        for placement, module in host.components(adapter_name)
    ]
    primitives = {placement.component.primitive for placement, _ in found}
    if primitives == {"prefix"}:
        theirs, embeddings = _as_prefix(base, config, found)
    elif primitives == {"prompt"}:
        theirs, embeddings = _as_prompt(base, found)
    else:
        raise ValueError(
            f"adapter {adapter_name!r} is made of {', '.join(sorted(primitives))}; PEFT's methods"
            " have prefixes alone, or prompts alone"
        )
    theirs.task_type = config.task_type
    theirs.base_model_name_or_path = config.base_model_name_or_path
    theirs.modules_to_save = config.modules_to_save
    theirs.inference_mode = True
    values = {_KEY: embeddings.detach().cpu().contiguous()}
    saved = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    for name, value in saved.items():
        if PREFIX not in name:  # a task's head
            values[f"{_THEIRS}{name.removeprefix(_OURS)}"] = value.detach().cpu().contiguous()
    _write(Path(path), theirs, values)


def _weights(path: str | Path) -> dict[str, Tensor]:
    file = Path(path) / SAFETENSORS_WEIGHTS_NAME
    for needed in (Path(path) / CONFIG_NAME, file):
        if not needed.is_file():
            raise FileNotFoundError(f"path is {str(path)!r}, where no {needed.name} is")
    return load_file(file)


def _kind(config: Any) -> str:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in (*_PREFIXES, *_PROMPTS):
        raise ValueError(
            f"the checkpoint is of {kind}; those of {', '.join((*_PREFIXES, *_PROMPTS))} can be"
            " loaded"
        )
    return kind


def _refuse_seq2seq(model: nn.Module, config: Any) -> None:
    blocks = find_blocks(model)
    if config.num_transformer_submodules == 2 or len({block.stack for block in blocks}) > 1:
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder, of which PEFT gives the"
            " decoder's self-attention a part of its prefix, and that in part twice: a PrefixConfig"
            " has one of its own for each attention"
        )


def _ordered(model: nn.Module, placements: Sequence[Placement]) -> list[Placement]:
    """By the index that the attention modules have in a cache."""

    def index(one: Placement) -> int:
        assert one.core is not None and one.block is not None
        found = getattr(model.get_submodule(one.core), "layer_idx", None)
        return found if isinstance(found, int) else one.block.position

    return sorted(placements, key=index)


def _prefix_values(
    placed: Sequence[Placement], config: Any, embeddings: Tensor
) -> dict[str, Tensor]:
    """Of each place k and v [Hkv, P, D]."""
    heads, tokens = config.num_attention_heads, config.num_virtual_tokens
    theirs = [(heads, config.token_dim // heads)] * config.num_layers
    ours = [one.heads for one in placed]
    if theirs != ours:
        raise ValueError(
            f"the checkpoint is for {_heads(theirs)}; the model has {_heads(ours)} (heads of keys x"
            " their size)"
        )
    _require_shape(embeddings, (tokens, 2 * config.num_layers * config.token_dim))
    parts = embeddings.view(tokens, 2 * config.num_layers, heads, -1).permute(1, 2, 0, 3)
    given = {}
    for layer, one in enumerate(placed):
        given[f"{_at(one)}.prefix_k"] = parts[2 * layer]
        given[f"{_at(one)}.prefix_v"] = parts[2 * layer + 1]
    return given


def _heads(shapes: Sequence[Any]) -> str:
    counted = [
        f"{shapes.count(one)} layers of {one[0]} x {one[1]}" for one in dict.fromkeys(shapes)
    ]
    return " and ".join(counted) or "no layers"


def _require_shape(embeddings: Tensor, shape: tuple[int, int]) -> None:
    if tuple(embeddings.shape) != shape:
        raise ValueError(
            f"{_KEY} of the checkpoint is {tuple(embeddings.shape)}; {shape} is needed for this"
            " model"
        )


def _at(one: Placement) -> str:
    return f"{one.host}.{PREFIX}{one.component.parameter_name}"


def _as_prefix(
    base: nn.Module, config: MethodConfig, found: Sequence[tuple[Placement, Any]]
) -> tuple[Any, Tensor]:
    blocks = find_blocks(base)
    component = found[0][0].component
    reasons = []
    if component.form != "softmax":
        reasons.append(f"its form is {component.form!r}, without a softmax")
    if component.gate or component.learned_scaling:
        reasons.append("it has a gate or a learned scaling")
    if not component.shift_positions:
        reasons.append("the sequence's positions begin at 0 (shift_positions=False)")
    if any(one.component.site != "attention_heads" for one, _ in found):
        reasons.append("it is in cross-attention too")
    if len({block.stack for block in blocks}) > 1:
        reasons.append("the model has an encoder and a decoder")
    elif len(found) != len(blocks):
        reasons.append(f"it is in {len(found)} of {len(blocks)} layers")
    shapes = [one.heads for one, _ in found]
    if len(set(shapes)) > 1:
        reasons.append(f"layers differ: {_heads(shapes)}")
    if reasons:
        raise ValueError(
            f"this {type(config).__name__} can't be PEFT's Prefix-Tuning: {'; '.join(reasons)}"
        )
    ordered = _ordered(base, [placement for placement, _ in found])
    held = {_at(placement): state for placement, state in found}
    rows = [held[_at(one)][name] for one in ordered for name in ("prefix_k", "prefix_v")]
    parts = torch.stack(rows)  # [2 L, Hkv, P, D]
    heads, tokens, size = parts.shape[1:]
    theirs = PrefixTuningConfig(
        num_virtual_tokens=tokens,
        token_dim=heads * size,
        num_attention_heads=heads,
        num_layers=len(ordered),
        num_transformer_submodules=1,
    )
    return theirs, parts.permute(2, 0, 1, 3).reshape(tokens, -1)


def _as_prompt(base: Any, found: Sequence[tuple[Placement, Any]]) -> tuple[Any, Tensor]:
    ((placement, state),) = found
    component = placement.component
    blocks = find_blocks(base)
    reasons = []
    if component.template is not None:
        reasons.append("it has a template")
    if component.tasks != 1:
        reasons.append(f"it has prompts for {component.tasks} tasks")
    causal = all(block.stack == "decoder" for block in blocks)
    position = component.position or ("start" if causal else "after_first")
    if position != "start":
        reasons.append(f"its position is {position!r}, and PEFT's is the start")
    if len({block.stack for block in blocks}) > 1:
        reasons.append("the model has an encoder and a decoder, for which PEFT has two prompts")
    if reasons:
        raise ValueError(f"this prompt can't be PEFT's Prompt Tuning: {'; '.join(reasons)}")
    rows = state["weight"]
    heads = next((n for n in _numbers(base.config) if n is not None), 1)
    theirs = PromptTuningConfig(
        num_virtual_tokens=rows.shape[0],
        token_dim=rows.shape[1],
        num_attention_heads=heads,
        num_layers=len(blocks),
        num_transformer_submodules=1,
    )
    return theirs, rows


def _numbers(config: Any) -> list[Any]:
    return [getattr(config, name, None) for name in ("num_attention_heads", "n_head", "num_heads")]


def _write(path: Path, config: Any, values: dict[str, Tensor]) -> None:
    """Both files, each in place at once."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        config.save_pretrained(made)
        save_file(values, Path(made) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(made) / name, path / name)
