"""Sets of 32-byte sectors of memory: the unit in which a GPU reads and writes its memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

SECTOR_BYTES = 32
_SECTOR_SHIFT = 5
_PAGE_SHIFT = 15
_PAGE_SECTORS = 1 << _PAGE_SHIFT


class SectorSet:
    """A set of sectors, kept as one bitmap for each megabyte that is touched."""

    def __init__(self) -> None:
        self._pages: dict[int, npt.NDArray[np.bool_]] = {}

    def touch(self, addresses: npt.NDArray[np.uint64], itemsize: int) -> None:
        """Adds the sectors of the elements of `itemsize` bytes at `addresses`, of any shape."""
        if addresses.size == 0:
            return
        first = addresses.reshape(-1)
        self._add(first >> np.uint64(_SECTOR_SHIFT))
        if np.any(first & np.uint64(itemsize - 1)):  # an element may lie in two sectors
            self._add((first + np.uint64(itemsize - 1)) >> np.uint64(_SECTOR_SHIFT))

    def _add(self, sectors: npt.NDArray[np.uint64]) -> None:
        low = int(sectors.min()) >> _PAGE_SHIFT
        high = int(sectors.max()) >> _PAGE_SHIFT
        offsets = sectors & np.uint64(_PAGE_SECTORS - 1)
        if low == high:
            self._page(low)[offsets] = True
            return
        pages = sectors >> np.uint64(_PAGE_SHIFT)
        for page in np.unique(pages):
            self._page(int(page))[offsets[pages == page]] = True

    def _page(self, page: int) -> npt.NDArray[np.bool_]:
        if page not in self._pages:
            self._pages[page] = np.zeros(_PAGE_SECTORS, dtype=np.bool_)
        return self._pages[page]

    def nbytes(self) -> int:
        """The size of all sectors of the set."""
        return SECTOR_BYTES * sum(int(np.count_nonzero(bits)) for bits in self._pages.values())

    def nbytes_within(self, ranges: Iterable[tuple[int, int]]) -> int:
        """The size of the sectors that overlap one of `ranges`, each (first address, bytes)."""
        bounds = [
            (start >> _SECTOR_SHIFT, (start + size - 1) >> _SECTOR_SHIFT)
            for start, size in ranges
            if size > 0
        ]
        if not bounds:
            return 0
        within = 0
        for page, bits in self._pages.items():
            sectors = np.flatnonzero(bits) + (page << _PAGE_SHIFT)
            inside = np.zeros(sectors.shape, dtype=np.bool_)
            for first, last in bounds:
                inside |= (sectors >= first) & (sectors <= last)
            within += int(np.count_nonzero(inside))
        return SECTOR_BYTES * within
