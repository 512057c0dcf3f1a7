"""peftfast: parameter-efficient fine-tuning of Hugging Face models, fast and small.

`peftfast.patch(model)` rewires a live PEFT model onto fused operations, in place;
`peftfast.report(model)` says what was fused and what was not, and why; `peftfast.unpatch(model)`
gives the original back. `peftfast.ops` and `peftfast.nn` serve alone, without PEFT.

Importing this package imports neither triton, peft nor transformers.
"""

from __future__ import annotations

from peftfast._version import __version__
from peftfast.patching import PatchReport, patch, report, unpatch

__all__ = ["PatchReport", "__version__", "patch", "report", "unpatch"]
