"""NumPy files: arrays whose first axis is the rows."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdpipe.data.npy import ArrayRows
from kdpipe.data.sources.base import reading, rows_within
from kdpipe.errors import DataError


class NumPy:
    """An `.npz` file, an `.npy` file or a folder of `.npy` files: each array `[N, …]` is a column.

    Columns are called like the arrays, or `columns` says which there are: `{image: x_train, label: y_train}`. Numbers,
    booleans and text (`<U`); an array of more axes becomes lists of all its values, row-major. Rows are read one block
    after the other, of compressed files too.
    """

    def __init__(self, path: Path, columns: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._columns = columns

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order. Raises `DataError` where an array is absent, damaged, of objects or of other length."""
        with self._arrays() as openers, ExitStack() as opened:
            names = self._columns or {name: name for name in openers}
            absent = [name for name in names.values() if name not in openers]
            if absent or not names:
                there = ", ".join(sorted(openers)) or "none"
                raise DataError(f"{self.path} has no array {', '.join(absent) or 'at all'}; there are {there}")
            arrays = {}
            for column, name in names.items():
                with reading(self.path):
                    arrays[column] = ArrayRows(opened.enter_context(openers[name]()), name)
            yield from self._blocks(arrays)

    def _blocks(self, arrays: Mapping[str, ArrayRows]) -> Iterator[pa.RecordBatch]:
        lengths = {name: each.num_rows for name, each in arrays.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{length} in {name}" for name, length in lengths.items())
            raise DataError(f"{self.path}: arrays have different numbers of rows: {found}")
        num_rows = next(iter(lengths.values()))
        size = rows_within(sum(each.row_bytes for each in arrays.values()))
        for start in range(0, num_rows, size):
            with reading(self.path):
                rows = min(size, num_rows - start)
                columns = {name: _column(each.take(rows)) for name, each in arrays.items()}
                yield pa.RecordBatch.from_pydict(columns)

    @contextmanager
    def _arrays(self) -> Iterator[Mapping[str, Callable[[], IO[bytes]]]]:
        """Name of each array -> what opens its .npy file."""
        if self.path.is_dir():
            yield {path.stem: _opener(path) for path in sorted(self.path.glob("*.npy"))}
        elif self.path.suffix == ".npy" and self.path.is_file():
            yield {self.path.stem: _opener(self.path)}
        elif self.path.is_file():
            with reading(self.path):
                archive = zipfile.ZipFile(self.path)
            with archive:
                members = [each for each in archive.namelist() if each.endswith(".npy")]
                yield {each.removesuffix(".npy"): _member_opener(archive, each) for each in members}
        else:
            raise DataError(f"no file {self.path}: expected arrays there. Correct data.path in params.yaml.")


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def _member_opener(archive: zipfile.ZipFile, name: str) -> Callable[[], IO[bytes]]:
    return lambda: archive.open(name)


def _column(values: NDArray[Any]) -> pa.Array:
    flat = values.reshape(-1).astype(values.dtype.newbyteorder("="), copy=False)
    column = pa.array(flat.tolist(), pa.string()) if values.dtype.kind == "U" else pa.array(flat)
    if values.ndim == 1:
        return column
    return pa.FixedSizeListArray.from_arrays(column, int(np.prod(values.shape[1:])))
