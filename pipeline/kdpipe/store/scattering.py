"""Rows that lie one after the other in a file, each read straight to its own place in memory.

`os.preadv` takes a Python object per place, which costs more than the copy that is saved; the one of C takes an array.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_preadv = ctypes.CDLL(None, use_errno=True).preadv
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_preadv.restype = ctypes.c_ssize_t
MOST_ROWS = os.sysconf("SC_IOV_MAX")
"""Rows that one call reads."""


class Scattered:
    """Where rows go: row i to `out[places[i]]`; of equal places the last row stays."""

    def __init__(self, out: NDArray[Any], places: NDArray[np.int64]) -> None:
        """`out [N, …]` contiguous and writeable, places from 0 to N - 1. Raises `ValueError` for others."""
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError("expected a contiguous, writeable array")
        if len(places) and not 0 <= places.min() <= places.max() < len(out):
            raise ValueError(f"places are {places.min()} to {places.max()}; expected 0 to {len(out) - 1}")
        self._row_bytes = out[:1].nbytes
        self._out = out  # which the addresses below are of
        self._vectors = np.empty((len(places), 2), np.uint64)  # struct iovec: address, length
        self._vectors[:, 0] = out.ctypes.data + places * self._row_bytes
        self._vectors[:, 1] = self._row_bytes

    def read(self, file: int, offset: int, start: int, stop: int) -> bool:
        """Rows `[start, stop)`, at most `MOST_ROWS`, which lie in a file from `offset` on; False where it ends before.

        Raises `OSError`.
        """
        num_rows = len(self._vectors[start:stop])
        num_bytes = int(_preadv(file, self._vectors.ctypes.data + 16 * start, num_rows, offset))
        if num_bytes < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return num_bytes == num_rows * self._row_bytes
