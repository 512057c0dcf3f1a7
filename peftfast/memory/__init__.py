"""What training takes in memory, measured."""

from __future__ import annotations

from peftfast.memory.measure import peak_bytes, saved_bytes

__all__ = ["peak_bytes", "saved_bytes"]
