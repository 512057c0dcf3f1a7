"""What training takes in memory: measured, and predicted before the first step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftfast.memory.counters import peak_bytes, saved_bytes

if TYPE_CHECKING:
    from peftfast.memory.build import ConfigError
    from peftfast.memory.estimating import estimate
    from peftfast.memory.fitting import fit
    from peftfast.memory.measuring import measure
    from peftfast.memory.pretend import NeedsValues
    from peftfast.memory.profiles import PROFILES, DeviceProfile
    from peftfast.memory.report import MemoryReport, compare

# Imported when they are asked for: they need transformers and PEFT, and what patches.
_LAZY = {
    "ConfigError": "build",
    "DeviceProfile": "profiles",
    "MemoryReport": "report",
    "NeedsValues": "pretend",
    "PROFILES": "profiles",
    "compare": "report",
    "estimate": "estimating",
    "fit": "fitting",
    "measure": "measuring",
}

__all__ = [
    "PROFILES",
    "ConfigError",
    "DeviceProfile",
    "MemoryReport",
    "NeedsValues",
    "compare",
    "estimate",
    "fit",
    "measure",
    "peak_bytes",
    "saved_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
