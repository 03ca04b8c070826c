"""Rows of an .npy file, block by block."""

from __future__ import annotations

from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_KINDS = "biufSUMm"
"""Booleans, numbers, bytes, text, times; no objects, records or complex numbers."""


class ArrayRows:
    """One array of an opened .npy file, read row by row."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"{name} is of .npy version {version}; expected plain numbers or text")
        shape, is_fortran, self._dtype = read_header[version](file)
        if self._dtype.kind not in _KINDS or not shape or (is_fortran and len(shape) > 1):
            order = "Fortran" if is_fortran else "C"
            raise ValueError(
                f"{name} is an array of {self._dtype}, shape {list(shape)}, in {order} order; expected rows of numbers "
                "or text in C order" + (" (of text, astype(str))" if self._dtype.hasobject else "")
            )
        self._file, self._name, self._shape = file, name, shape[1:]
        self.num_rows: int = shape[0]
        self.row_bytes = int(self._dtype.itemsize * np.prod(self._shape, dtype=np.int64))

    def take(self, num_rows: int) -> NDArray[Any]:
        """The next rows `[B, …]`. Raises `ValueError` where the file ends before them."""
        content = self._file.read(num_rows * self.row_bytes)
        if len(content) < num_rows * self.row_bytes:
            raise ValueError(f"{self._name} ends before its last row")
        return np.frombuffer(content, self._dtype).reshape(num_rows, *self._shape)
