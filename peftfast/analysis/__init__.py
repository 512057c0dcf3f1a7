"""The experiments that the papers on adapters made: which layers' adapters matter, how robust they
are, how size tells, and what training parts of a model gives beside them.

    ablation = ablate(model, accuracy)  # without the adapters of layers i to j
    ablation.plot("ablation.png")
    ablation.to_csv("ablation.csv")

Drawing needs matplotlib (`pip install 'peftfast[plot]'`); files are written whole or not at all.
"""

from __future__ import annotations

from peftfast.analysis.ablation import Ablation, ablate
from peftfast.analysis.baselines import head_of, head_only, norms_only, top_layers
from peftfast.analysis.curves import Baseline, Curve
from peftfast.analysis.sweeps import noise, noisy, robustness, size_sweep

__all__ = [
    "Ablation",
    "Baseline",
    "Curve",
    "ablate",
    "head_of",
    "head_only",
    "noise",
    "noisy",
    "norms_only",
    "robustness",
    "size_sweep",
    "top_layers",
]
