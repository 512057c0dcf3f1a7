"""Models without values: from a configuration, for a method, patched."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.patching import patch, unpatch
from peftfast.patching.state import state_of

METHODS = ("full", "lora", "qlora")
DEFAULT_RANK = 16
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_LAYER_COUNTS = ("num_hidden_layers", "num_decoder_layers", "decoder_layers", "encoder_layers")


class ConfigError(ValueError):
    """A configuration from which no model can be built; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """What is to be built.

    Attributes:
        method: one of `METHODS`, a rank after a colon if wanted ("qlora:8"), a PEFT configuration,
            or None: the model as it is.
        dtype: of the weights.
        four_bit: whether the linears of the base are in 4 bits; "qlora" says so.
        patched: whether `peftfast.patch` is called, with `memory`.
        checkpointing: whether every layer is recomputed in the backward.
    """

    method: Any
    dtype: torch.dtype
    four_bit: bool
    patched: bool
    memory: str
    checkpointing: bool


def load_config(source: Any) -> Any:
    """A transformers configuration out of one, a dict, a JSON file or a folder that holds one.

    Raises:
        ConfigError: it can't be read, misses a field, or is of an unknown architecture.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(source, PretrainedConfig):
        return source
    if isinstance(source, dict):
        return _from_dict(source, "the configuration")
    if not str(source):
        raise ConfigError("the name of a configuration is empty")
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.exists():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}; an object is needed")
        return _from_dict(values, str(path))
    try:
        return AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{source!r} is neither a file, nor a folder with a config.json, nor a model that"
            f" transformers finds: {error}"
        ) from None


def _from_dict(values: dict[str, Any], name: str) -> Any:
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type")
    if kind is None:
        raise ConfigError(f"{name} has no field model_type, which names the architecture")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError(f"{name}: transformers knows no architecture {kind!r} (model_type)")
    cls = CONFIG_MAPPING[kind]
    missing = _missing(cls, values)
    if missing:
        raise ConfigError(f"{name} lacks {', '.join(missing)}")
    try:
        config = cls.from_dict(values)
    except Exception as error:
        raise ConfigError(f"{name}: {_reason(error)}") from error
    _check_sizes(config, name)
    return config


def _missing(cls: Any, values: dict[str, Any]) -> list[str]:
    """Sizes that a configuration must say, lest the defaults of the architecture be taken."""
    if isinstance(values.get("text_config"), dict):
        values = values["text_config"]
        cls = getattr(cls, "sub_configs", {}).get("text_config", cls)
    default = cls()
    names = {name: cls.attribute_map.get(name, name) for name in _SIZES}
    return [
        own
        for name, own in names.items()
        if hasattr(default, own) and name not in values and own not in values
    ]


def _check_sizes(config: Any, name: str) -> None:
    text = config.get_text_config()
    for size in (*_SIZES, "intermediate_size", "num_key_value_heads"):
        value = getattr(text, size, None)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}: {size} is {value!r}; a positive whole number is needed")


def model_class(config: Any) -> Any:
    """The class of the model that a configuration describes."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is None:
            raise ConfigError(f"transformers has no class {name!r} (architectures)")
        return found
    from transformers.models.auto import modeling_auto

    for table in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM"):
        mapping = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING")
        if type(config) in mapping:
            return mapping[type(config)]
    raise ConfigError(f"transformers has no language model for {type(config).__name__}")


def layer_plan(config: Any) -> tuple[int, int, int] | None:
    """Layers of two shorter models that show how a model grows, and the steps from the first to the
    whole; None where it is short, or its layers differ without a pattern.
    """
    text = config.get_text_config()
    names = text.attribute_map
    counts = {value for n in _LAYER_COUNTS if (value := getattr(text, names.get(n, n), None))}
    if len(counts) != 1:
        return None
    layers: int = counts.pop()
    kinds = [v for v in vars(text).values() if isinstance(v, list) and len(v) == layers]
    rows = list(zip(*kinds, strict=True)) if kinds else [()] * layers
    period = next(p for p in range(1, layers + 1) if rows[p:] == rows[:-p] or p == layers)
    first = layers % period + period
    first += period if first < 2 else 0
    if layers <= first + period:
        return None
    return first, first + period, (layers - first) // period


def most_tokens(config: Any) -> int | None:
    """The longest sequence of a model with a learned vector for each position; None: no such."""
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None) or not hasattr(text, "max_position_embeddings"):
        return None
    return text.max_position_embeddings


def with_layers(config: Any, layers: int) -> Any:
    """The same configuration with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    for name in _LAYER_COUNTS:
        own = text.attribute_map.get(name, name)
        if getattr(text, own, None) is not None:
            setattr(text, own, layers)
    return config


def build(config: Any, recipe: Recipe) -> nn.Module:
    """The model on the meta device, ready to be run by a simulation."""
    try:
        with torch.device("meta"), _random_state():
            model = model_class(config)._from_config(copy.deepcopy(config), dtype=recipe.dtype)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"no model can be built: {_reason(error)}") from error
    return prepare(model, recipe)


def prepare(model: Any, recipe: Recipe) -> nn.Module:
    """A model on the meta device with the method, checkpointing and the patch put on."""
    with torch.device("meta"), _random_state():
        model = _with_method(model, recipe)
    model.train()
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if recipe.checkpointing or checkpointed:
        # Not compared with what was kept: that is done where meta tensors don't pass for others.
        arguments = {"use_reentrant": False, "determinism_check": "none"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        if recipe.method != "full":
            model.enable_input_require_grads()
    if recipe.patched:
        _patch(model, recipe.memory)
    else:
        unpatch(model)
    return model


def _with_method(model: nn.Module, recipe: Recipe) -> nn.Module:
    method = recipe.method
    name, _, rank = method.partition(":") if isinstance(method, str) else ("", "", "")
    if name == "qlora" or recipe.four_bit:
        quantise(model, recipe.dtype)
    if method is None:
        return model
    if name == "full":
        return model.requires_grad_(True)
    import peft

    if name:
        method = peft.LoraConfig(
            r=int(rank or DEFAULT_RANK), lora_alpha=2 * int(rank or DEFAULT_RANK),
            lora_dropout=0.0, target_modules="all-linear",
        )  # fmt: skip
    return peft.get_peft_model(model, copy.deepcopy(method))


def check_method(method: Any) -> None:
    """Raise ValueError or TypeError where a method is none that can be predicted."""
    if method is None:
        return
    if not isinstance(method, str):
        from peft import PeftConfig

        if not isinstance(method, PeftConfig):
            raise TypeError(f"method is {type(method).__name__}; a name or a PEFT config is needed")
        return
    if not re.fullmatch(r"full|(lora|qlora)(:[1-9]\d*)?", method):
        raise ValueError(
            f"method is {method!r}; allowed: {', '.join(METHODS)}, the last two with a rank if"
            " wanted ('qlora:8'), or a PEFT config"
        )


def quantise(model: Any, dtype: torch.dtype) -> None:
    """Put 4-bit linears of bitsandbytes, nested statistics included, in the place of those linears
    of a meta model that transformers would load in 4 bits.
    """
    dense = to_quantise(model)
    put_four_bit_linears(model, dtype)
    for name, module in dense.items():
        fresh = model.get_submodule(name)
        weight = module.weight if type(module) is nn.Linear else module.weight.t()
        fresh.weight = _four_bit_weight(weight, fresh, dtype)
        if fresh.bias is not None:
            fresh.bias = nn.Parameter(fresh.bias.detach().to(dtype), requires_grad=False)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    model.is_quantized = True


def to_quantise(model: Any) -> dict[str, Any]:
    """The linears that transformers loads in 4 bits, by name: not the output head, and not what a
    model keeps in float32.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = _left_dense(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, left)
    }


def put_four_bit_linears(model: Any, dtype: torch.dtype) -> None:
    """Replace those linears by bitsandbytes' on the meta device, as transformers does."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    replace_with_bnb_linear(model, _left_dense(model), config)


def _left_dense(model: Any) -> list[str]:
    from transformers.quantizers.base import HfQuantizer

    return HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)


def _four_bit_weight(weight: Tensor, module: Any, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    count = weight.numel()
    blocks = -(-count // 64)
    second = QuantState(
        absmax=torch.empty(-(-blocks // 256), device="meta"),
        code=torch.empty(256, device="meta"),
        blocksize=256,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device="meta"),
        shape=weight.shape,
        code=torch.empty(16, device="meta"),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device="meta"),
        state2=second,
    )
    packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device="meta")
    found = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=True,
        module=module,
    )
    module.quant_state = state
    return found


def _patch(model: nn.Module, memory: str) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nothing was fused")
        patch(model, memory=memory)


def policy_of(model: nn.Module) -> str | None:
    """The memory policy of a patched model; None where it is not patched."""
    states = (state_of(module) for module in model.modules())
    return next((state.memory for state in states if state is not None), None)


def twin(model: nn.Module) -> nn.Module:
    """A copy of a live model on the meta device; nothing of the model is read or changed."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _meta_copy(tensor, memo)
    return copy.deepcopy(model, memo)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that most of a model's floating parameters have."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _meta_copy(tensor: Tensor, memo: dict[int, Any]) -> Any:
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        from bitsandbytes.nn import Params4bit

        fresh = memo.setdefault(id(state), _meta_state(state))
        data = torch.empty_like(tensor.data, device="meta").as_subclass(Tensor)
        return Params4bit(
            data,
            requires_grad=False,
            quant_state=fresh,
            blocksize=tensor.blocksize,  # type: ignore[attr-defined]
            compress_statistics=tensor.compress_statistics,  # type: ignore[attr-defined]
            quant_type=tensor.quant_type,  # type: ignore[attr-defined]
            bnb_quantized=True,
        )
    data = torch.empty_like(tensor.detach(), device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _meta_state(state: Any) -> Any:
    fresh = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(fresh, name, torch.empty_like(value, device="meta"))
    if state.nested:
        fresh.state2 = _meta_state(state.state2)
    return fresh


@contextmanager
def _random_state() -> Iterator[None]:
    """Whatever is drawn inside, torch's generator of the CPU is as before afterwards."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text
