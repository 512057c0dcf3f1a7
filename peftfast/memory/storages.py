"""The storages under tensors of every layout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages under a tensor: one for a strided tensor, more for a sparse one or a wrapper.

    Raises:
        TypeError: the tensor's layout has no storage that Python can reach.
    """
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
    elif tensor.layout == torch.strided:
        yield tensor.untyped_storage()
        return
    elif tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        raise TypeError(f"a tensor of layout {tensor.layout} has no storage to measure")
    for part in parts:
        yield from storages(part)
