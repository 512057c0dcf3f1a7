"""What every test starts from: the interpreter where there is no GPU, fixed seeds, no network."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

CUDA = torch.cuda.is_available()

# Triton reads this when it is imported, and pytest imports this file before any test.
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The same examples on every run, and no deadline: the interpreter is slow, CI's cores are shared.
settings.register_profile("peftfast", derandomize=True, deadline=None, database=None)
settings.load_profile("peftfast")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Each test draws the same numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
