"""New rows on their way to disk: content digests, and a segment folder written in one stream."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe import durable
from kdpipe.data.columns import Array, Column, Columns, Ragged, bytes_of
from kdpipe.data.prepared import DIGEST_BYTES, ColumnLayout
from kdpipe.errors import DataError
from kdpipe.fingerprint import canonical_json

ROW_GROUP = 2**16
_ROWS = pa.schema({"sample_id": pa.string(), "digest": pa.binary(DIGEST_BYTES)})


class SegmentWriter:
    """Streams rows into a new segment folder: fixed memory, one file per array."""

    def __init__(self, inputs: Path, layouts: tuple[ColumnLayout, ...]) -> None:
        self.layouts = layouts
        self.num_rows = 0
        self._inputs = inputs
        self._folder = inputs / f"segment{durable.TEMPORARY_SUFFIX}"
        self._folder.mkdir()
        self._files = {each.name: _NpyWriter(self._folder / self._file_name(each), each) for each in layouts}
        self._offsets = {each.name: _OffsetWriter(self._folder, each.name) for each in layouts if each.kind == "ragged"}
        self._rows = _RowWriter(self._folder / "rows.parquet")

    def append(self, columns: Columns, ids: Sequence[str], digests: Sequence[bytes]) -> None:
        """Add rows. Raises `DataError` when their layout differs from the first rows'."""
        for layout in self.layouts:
            column = columns[layout.name]
            if ColumnLayout.of(layout.name, column) != layout:
                raise DataError(
                    f"column {layout.name!r} changes its layout within the source; expected {layout.to_json()}"
                )
            self._files[layout.name].append(column.values if isinstance(column, Ragged) else column)
            if isinstance(column, Ragged):
                self._offsets[layout.name].append(column.offsets)
        self._rows.append(ids, digests)
        self.num_rows += len(ids)

    def close(self) -> str:
        """Finish the files and give the segment its final name, which is returned."""
        for file in self._writers():
            file.close()
        self._make_durable()
        name = f"segment-{self._rows.digest()[:16]}"
        shutil.rmtree(self._inputs / name, ignore_errors=True)
        self._folder.rename(self._inputs / name)
        durable.fsync_folder(self._inputs)
        return name

    def discard(self) -> None:
        """Remove the unfinished segment. Does nothing once it is closed."""
        for file in self._writers():
            with suppress(OSError):  # what is buffered may not fit on a full disk
                file.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _writers(self) -> list[_NpyWriter | _OffsetWriter | _RowWriter]:
        return [*self._files.values(), *self._offsets.values(), self._rows]

    def _make_durable(self) -> None:
        for path in self._folder.iterdir():
            with path.open("rb") as file:
                durable.fsync_file(file)
        durable.fsync_folder(self._folder)

    @staticmethod
    def _file_name(layout: ColumnLayout) -> str:
        return f"{layout.name}.npy" if layout.kind == "fixed" else f"{layout.name}.values.npy"


class _NpyWriter:
    """An .npy file that grows along its first axis; NumPy leaves room in the header for the final length."""

    def __init__(self, path: Path, layout: ColumnLayout) -> None:
        self._layout, self._length = layout, 0
        self._file: IO[bytes] = path.open("wb")
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, values: Array) -> None:
        self._file.write(np.ascontiguousarray(values).data)
        self._length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._data_start
        self._file.close()

    def abandon(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._layout.dtype, "fortran_order": False, "shape": (self._length, *self._layout.shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _OffsetWriter:
    """The offsets of a ragged column, from those of its blocks."""

    def __init__(self, folder: Path, name: str) -> None:
        layout = ColumnLayout(name=name, kind="fixed", dtype="<i8", shape=())
        self._file = _NpyWriter(folder / f"{name}.offsets.npy", layout)
        self._file.append(np.zeros(1, np.int64))
        self._end = 0

    def append(self, offsets: Array) -> None:
        self._file.append(offsets[1:] + self._end)
        self._end += int(offsets[-1])

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        self._file.abandon()


class _RowWriter:
    """rows.parquet, in row groups that do not depend on the blocks; the digest is of all ids, then all digests."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = pq.ParquetWriter(path, _ROWS, compression="zstd")
        self._hashed = hashlib.sha256()
        self._ids: list[str] = []
        self._digests: list[bytes] = []
        self._num_written = 0

    def append(self, ids: Sequence[str], digests: Sequence[bytes]) -> None:
        self._ids += ids
        self._digests += digests
        while len(self._ids) >= ROW_GROUP:
            self._write()

    def close(self) -> None:
        if self._ids:
            self._write()
        self._writer.close()

    def abandon(self) -> None:
        self._writer.close()

    def digest(self) -> str:
        """SHA-256 (hex), once the file is closed."""
        with pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(ROW_GROUP, columns=["digest"]):
                self._hashed.update(bytes_of(pa.chunked_array([batch["digest"]])).tobytes())
        return self._hashed.hexdigest()

    def _write(self) -> None:
        ids, self._ids = self._ids[:ROW_GROUP], self._ids[ROW_GROUP:]
        digests, self._digests = self._digests[:ROW_GROUP], self._digests[ROW_GROUP:]
        self._hashed.update((("\n" if self._num_written else "") + "\n".join(ids)).encode())
        self._num_written += len(ids)
        self._writer.write_table(pa.table({"sample_id": ids, "digest": digests}, _ROWS))


def content_digests(columns: Columns) -> list[bytes]:
    """BLAKE2b-16 of each row's content: names, layouts and bytes of its columns."""
    layouts = canonical_json([ColumnLayout.of(*each).to_json() for each in columns.items()]).encode()
    prefix = hashlib.blake2b(layouts, digest_size=DIGEST_BYTES)
    digests = []
    for parts in zip(*(_row_bytes(column) for column in columns.values()), strict=True):
        hashed = prefix.copy()
        for part in parts:
            hashed.update(len(part).to_bytes(8, "little"))
            hashed.update(part)
        digests.append(hashed.digest())
    return digests


def _row_bytes(column: Column) -> Iterator[bytes]:
    if isinstance(column, Ragged):
        return (column.row(index).tobytes() for index in range(len(column)))
    return (row.tobytes() for row in column)
