"""Fixtures of the patching tests."""

from __future__ import annotations

import pytest

from tests.patching.attention import Counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)
