"""`python -m peftfast`: the command `peftfast`."""

from __future__ import annotations

from peftfast.cli import main

raise SystemExit(main())
