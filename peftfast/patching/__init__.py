"""Rewiring live PEFT models onto the fused ops, in place, with a report and a way back.

Importing this package imports neither peft nor transformers; its functions do, when they are
called.
"""

from __future__ import annotations

from peftfast.patching.report import FusedModule, NotFusedModule, PatchReport, report
from peftfast.patching.rewire import patch, unpatch

__all__ = ["FusedModule", "NotFusedModule", "PatchReport", "patch", "report", "unpatch"]
