"""Bytes and FLOPs of PyTorch operators and of Triton kernels in the interpreter, counted."""

from benchmarks.counting.counter import TrafficCounter
from benchmarks.counting.sectors import SECTOR_BYTES, SectorSet
from benchmarks.counting.tally import Tally

__all__ = ["SECTOR_BYTES", "SectorSet", "Tally", "TrafficCounter"]
