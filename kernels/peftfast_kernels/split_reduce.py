"""Sum the partial results of split reductions: out_i = sum over s of workspace_i[s].

Each workspace is read once, each output written once. The order is fixed and there are no
atomics: the result is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.launch import launch

_BLOCK = 256


@triton.jit
def _split_reduce_kernel(workspace_ptrs, out_ptrs, sizes, splits, strides, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(out_ptrs)):
        if which == i:
            mask = offsets < sizes[i]
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            position = offsets
            for _ in range(splits[i]):
                total += tl.load(workspace_ptrs[i] + position, mask=mask, other=0.0)
                position += strides[i]
            tl.store(out_ptrs[i] + offsets, total.to(out_ptrs[i].dtype.element_ty), mask=mask)


def split_reduce(workspaces: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Sum each float32 workspace [splits, n], unit inner stride, into a contiguous output."""
    sizes = tuple(out.numel() for out in outs)
    grid = (triton.cdiv(max(sizes), _BLOCK), len(outs))
    launch(
        _split_reduce_kernel,
        grid,
        tuple(workspaces),
        tuple(outs),
        sizes,
        tuple(w.shape[0] for w in workspaces),
        tuple(w.stride(0) for w in workspaces),
        mma="none",
        BLOCK=_BLOCK,
        num_warps=2,
        num_stages=1,
    )
