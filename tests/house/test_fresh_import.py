"""`import peftfast` in a process of its own: light, and not in need of triton or bitsandbytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

ABSENT = """
import sys

class Without:
    '''A finder that does not find triton, bitsandbytes and our kernels.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "bitsandbytes", "peftfast_kernels"}:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
HEAVY = ("peft", "transformers", "accelerate", "triton", "bitsandbytes", "peftfast_kernels")


def run(code: str) -> str:
    """What a fresh interpreter prints for the code, without the settings that change dispatch."""
    drop = ("PEFTFAST_IMPL", "TRITON_INTERPRET")
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    loaded = run(
        f"""
        import json, sys
        import torch
        before = set(sys.modules)
        import peftfast, peftfast.ops, peftfast.nn
        heavy = [name for name in {HEAVY!r} if name in sys.modules and name not in before]
        print(json.dumps(heavy))
        """
    )
    assert json.loads(loaded) == []


def test_import_asks_no_device() -> None:
    out = run(
        """
        import torch
        import peftfast.ops
        print(torch.cuda.is_initialized())
        """
    )
    assert out.split() == ["False"]


def test_works_without_triton_and_bitsandbytes() -> None:
    out = run(
        ABSENT
        + textwrap.dedent(
            """
            import torch
            import peftfast

            assert {"patch", "unpatch", "report", "PatchReport"} <= set(dir(peftfast))
            x, w = torch.randn(5, 8), torch.randn(6, 8)
            a, b = torch.randn(2, 8), torch.randn(6, 2)
            y = peftfast.ops.lora_linear(x, w, None, a, b, 0.5)
            torch.testing.assert_close(y, x @ w.T + 0.5 * (x @ a.T) @ b.T)
            try:
                peftfast.ops.lora_linear(x, w, None, a, b, 0.5, impl="triton")
            except peftfast.ops.ImplUnavailable as error:
                print(error.reasons)
            """
        )
    )
    assert "not installed" in out
