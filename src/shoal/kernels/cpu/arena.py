"""Memory for weights: a few large blocks instead of one for each matrix, so that the system can back them with huge pages.

Reading weights is what a step of few tokens waits for, and with pages of 4 KiB every 64th cache line needs another address
translation. Linux gives huge pages to memory that asks for them; elsewhere this is ordinary memory.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 64 << 20  # bytes asked for at once; what is never written costs nothing
_HUGE = 2 << 20
_LINE = 64


class Arena:
    """Hands out parts of its blocks. A block is given back when the last array in it is gone."""

    def __init__(self) -> None:
        self._left: NDArray[np.uint8] = np.zeros(0, np.uint8)

    def array(self, rows: int, width: int) -> NDArray[Any]:
        """uint8 [rows, width], aligned to a cache line, not initialised."""
        size = -(-rows * width // _LINE) * _LINE
        if size > len(self._left):
            self._left = _block(max(size, _BLOCK))
        part, self._left = self._left[: rows * width], self._left[size:]
        return part.reshape(rows, width)


def _block(size: int) -> NDArray[np.uint8]:
    """``size`` bytes that begin on a huge page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    skip = -whole.ctypes.data % _HUGE
    return whole[skip : skip + size]
