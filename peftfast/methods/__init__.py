"""Methods of parameter-efficient fine-tuning that PEFT lacks, declared as lists of components and
registered with PEFT.

    model = peft.get_peft_model(model, peftfast.methods.HoulsbyConfig(bottleneck=64))

gives a real `peft.PeftModel`. Importing this module makes the type PEFTFAST known to PEFT
(`registration.py`); import it before a saved adapter is loaded.
"""

from __future__ import annotations

from peftfast.methods.component import Component
from peftfast.methods.config import MethodConfig, method_names, register_method
from peftfast.methods.configs import (
    AdapterConfig,
    CompacterConfig,
    HoulsbyConfig,
    ParallelAdapterConfig,
    PfeifferConfig,
    ScaledParallelAdapterConfig,
    UnifiedConfig,
)
from peftfast.methods.layer import AdapterHost
from peftfast.methods.peft_checkpoints import load_from_peft, save_as_peft
from peftfast.methods.placement import BlockRef, Placement, place
from peftfast.methods.prefix_configs import (
    MAMConfig,
    MultiHeadParallelAdapterConfig,
    PrefixConfig,
    PTuningV2Config,
    UniPELTConfig,
)
from peftfast.methods.prompt_configs import PromptConfig, PTuningConfig
from peftfast.methods.prompts import embedded
from peftfast.methods.registration import register, registrations
from peftfast.methods.sites import SITES, Block, Point, find_blocks, find_norms
from peftfast.methods.tuner import AdapterModel, finalize, hosts, muted

register(MethodConfig, AdapterModel)

__all__ = [
    "AdapterConfig",
    "AdapterHost",
    "AdapterModel",
    "Block",
    "BlockRef",
    "CompacterConfig",
    "Component",
    "HoulsbyConfig",
    "MAMConfig",
    "MethodConfig",
    "MultiHeadParallelAdapterConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "ParallelAdapterConfig",
    "PfeifferConfig",
    "Placement",
    "Point",
    "PrefixConfig",
    "PromptConfig",
    "SITES",
    "ScaledParallelAdapterConfig",
    "UniPELTConfig",
    "UnifiedConfig",
    "embedded",
    "finalize",
    "find_blocks",
    "find_norms",
    "hosts",
    "load_from_peft",
    "method_names",
    "muted",
    "place",
    "register_method",
    "registrations",
    "save_as_peft",
]
