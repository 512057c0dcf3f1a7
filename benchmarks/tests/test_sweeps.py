# mypy: disable-error-code="no-untyped-def, call-arg"
"""The sweeps change what they say they change, and put it back."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest
import torch

from benchmarks.plans import PLANS, VARIABLE, plan_forced
from benchmarks.timed.lora_tiles import CANDIDATES, label, tile_changed
from peftfast_kernels import tiles


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("before", [None, "fused"])
def test_a_forced_plan_holds_inside_only(plan, before, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    if before:
        monkeypatch.setenv(VARIABLE, before)
    with plan_forced(plan):
        assert tiles.gemm_plan(90, torch.bfloat16, True) == plan
        assert tiles.gemm_plan(80, torch.bfloat16, False) == plan
    assert os.environ.get(VARIABLE) == before


def test_a_changed_tile_holds_inside_only(monkeypatch):
    def pinned(arch, dropout):
        return tiles.Tile(arch, 64 if dropout else 128, 32)

    monkeypatch.setattr(tiles, "matmul_tile", pinned)
    with tile_changed("matmul_tile", {"block_n": 16, "num_warps": 2}):
        changed = tiles.matmul_tile(90, dropout=True)
    assert (changed.block_m, changed.block_n, changed.num_warps) == (90, 16, 2)
    assert tiles.matmul_tile is pinned


def test_candidates_name_what_exists():
    known = {field.name for field in fields(tiles.Tile)}
    for function, changes in CANDIDATES.items():
        assert callable(getattr(tiles, function))
        assert changes[0] == {} and len({label(change) for change in changes}) == len(changes)
        assert all(set(change) <= known for change in changes)
