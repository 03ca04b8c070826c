"""New rows on their way to disk: content digests, and a segment folder written in one stream."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe import durable
from kdpipe.data.columns import Array, Column, Columns, Ragged
from kdpipe.data.prepared import DIGEST_BYTES, ColumnLayout
from kdpipe.errors import DataError
from kdpipe.fingerprint import canonical_json


class SegmentWriter:
    """Streams rows into a new segment folder: fixed memory, one file per array."""

    def __init__(self, inputs: Path, layouts: tuple[ColumnLayout, ...]) -> None:
        self.layouts = layouts
        self.num_rows = 0
        self._inputs = inputs
        self._folder = inputs / f"segment{durable.TEMPORARY_SUFFIX}"
        self._folder.mkdir()
        self._files = {each.name: _NpyWriter(self._folder / self._file_name(each), each) for each in layouts}
        self._lengths: dict[str, list[Array]] = {each.name: [] for each in layouts if each.kind == "ragged"}
        self._ids: list[str] = []
        self._digests: list[bytes] = []

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
                self._lengths[layout.name].append(np.diff(column.offsets))
        self._ids += ids
        self._digests += digests
        self.num_rows += len(ids)

    def close(self) -> str:
        """Finish the files and give the segment its final name, which is returned."""
        for file in self._files.values():
            file.close()
        for name, lengths in self._lengths.items():
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
            np.save(self._folder / f"{name}.offsets.npy", offsets)
        digest_array = pa.array(self._digests, pa.binary(DIGEST_BYTES))
        pq.write_table(
            pa.table({"sample_id": pa.array(self._ids, pa.string()), "digest": digest_array}),
            self._folder / "rows.parquet",
            compression="zstd",
        )
        self._make_durable()
        rows = "\n".join(self._ids).encode() + b"".join(self._digests)
        name = f"segment-{hashlib.sha256(rows).hexdigest()[:16]}"
        shutil.rmtree(self._inputs / name, ignore_errors=True)
        self._folder.rename(self._inputs / name)
        durable.fsync_folder(self._inputs)
        return name

    def discard(self) -> None:
        """Remove the unfinished segment. Does nothing once it is closed."""
        for file in self._files.values():
            file.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)

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
        with suppress(OSError):  # what is buffered may not fit on a full disk
            self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._layout.dtype, "fortran_order": False, "shape": (self._length, *self._layout.shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


def content_digests(columns: Columns) -> list[bytes]:
    """BLAKE2b-16 of each row's content: names, layouts and bytes of its columns."""
    layouts = canonical_json([ColumnLayout.of(*each).to_json() for each in columns.items()]).encode()
    prefix = hashlib.blake2b(layouts, digest_size=DIGEST_BYTES)
    rows = [_row_bytes(column) for column in columns.values()]
    digests = []
    for parts in zip(*rows, strict=True):
        hashed = prefix.copy()
        for part in parts:
            hashed.update(len(part).to_bytes(8, "little"))
            hashed.update(part)
        digests.append(hashed.digest())
    return digests


def _row_bytes(column: Column) -> list[bytes]:
    if isinstance(column, Ragged):
        return [column.row(index).tobytes() for index in range(len(column))]
    return [row.tobytes() for row in column]
