"""Every test of this folder needs the CPU library; those that ask for `isa` run once for each
instruction set of this machine.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from peftfast.native import library


@pytest.fixture(autouse=True)
def built() -> Iterator[None]:
    """Skip without a compiler, or where PEFTFAST_BUILD=none says that none is to be built;
    otherwise a missing library is a failure. Settings are put back.
    """
    if reason := library.missing("cpu"):
        if shutil.which("c++") and os.environ.get("PEFTFAST_BUILD") != "none":
            pytest.fail(reason)
        pytest.skip(reason)
    before = library.isa()
    yield
    library.use_isa(before)


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """An instruction set, in use."""
    try:
        library.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param
