"""peftfast: parameter-efficient fine-tuning of Hugging Face models, fast and small.

`peftfast.patch(model)` rewires a live PEFT model onto fused operations, in place;
`peftfast.report(model)` says what was fused and what was not, and why; `peftfast.unpatch(model)`
gives the original back. `peftfast.ops` and `peftfast.nn` serve alone, without PEFT.

`peftfast.HoulsbyConfig` and the other configurations of `peftfast.methods` go to
`peft.get_peft_model`.

Importing this package imports neither triton, peft nor transformers; the first use of a
configuration imports `peftfast.methods`, which registers with PEFT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftfast._version import __version__
from peftfast.patching import PatchReport, patch, report, unpatch

if TYPE_CHECKING:
    from peftfast import analysis, methods
    from peftfast.methods import (
        CompacterConfig,
        Component,
        HoulsbyConfig,
        MAMConfig,
        MultiHeadParallelAdapterConfig,
        ParallelAdapterConfig,
        PfeifferConfig,
        PrefixConfig,
        PromptConfig,
        PTuningConfig,
        PTuningV2Config,
        ScaledParallelAdapterConfig,
        UnifiedConfig,
        UniPELTConfig,
    )

__all__ = [
    "CompacterConfig",
    "Component",
    "HoulsbyConfig",
    "MAMConfig",
    "MultiHeadParallelAdapterConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "ParallelAdapterConfig",
    "PatchReport",
    "PfeifferConfig",
    "PrefixConfig",
    "PromptConfig",
    "ScaledParallelAdapterConfig",
    "UniPELTConfig",
    "UnifiedConfig",
    "__version__",
    "analysis",
    "methods",
    "patch",
    "report",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """The configurations and the packages behind them, imported when they are first used."""
    if name in ("analysis", "methods"):
        return importlib.import_module(f"peftfast.{name}")
    if name in __all__:
        return getattr(importlib.import_module("peftfast.methods"), name)
    raise AttributeError(f"module 'peftfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
