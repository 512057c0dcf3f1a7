"""The worker pool outlives its workers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the pool belongs to the Triton kernels' package")
from peftfast_kernels.workers import run_all


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_task_that_ends_its_process_spoils_no_other(
    jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from crashing_kernels import answer

    tasks = ["first", "abort", "second", "raise", "third"]
    outcomes = dict(run_all(answer, tasks, jobs))

    assert sorted(outcomes) == [0, 1, 2, 3, 4]
    for index in (0, 2, 4):
        assert outcomes[index].died is None
        assert outcomes[index].result == f"{tasks[index]} in a child: True"
        assert outcomes[index].output == f"output of {tasks[index]}\n"
    assert (outcomes[1].died, outcomes[1].result) == (-6, None)
    assert (outcomes[3].died, outcomes[3].result) == (1, None)
    assert "KeyError: 'the reason'" in outcomes[3].output
