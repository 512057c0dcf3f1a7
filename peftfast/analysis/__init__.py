"""The experiments that the papers on adapters made: which layers' adapters matter, how robust they
are, how size tells, and what training parts of a model gives beside them.
"""

from __future__ import annotations

from peftfast.analysis.baselines import head_of, head_only, norms_only, top_layers

__all__ = ["head_of", "head_only", "norms_only", "top_layers"]
