"""Prepared rows, read: inputs (immutable, append-only), labels and splits. No per-row Python in any read.

inputs/manifest.json                     columns, and the segments in row order
inputs/segment-<digest>/rows.parquet     sample_id, digest (16 bytes of BLAKE2b over the row's content)
inputs/segment-<digest>/<column>.npy     fixed-width column `[N, …]`
inputs/segment-<digest>/<column>.values.npy, <column>.offsets.npy    ragged column
labels/labels.parquet                    sample_id, label (null: missing), split (null: unused), one line per row
labels/classes.json                      rows per split and class
splits/<name>.json                       digest of one split's ids, content and labels
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdpipe.data.columns import (
    Array,
    Column,
    Columns,
    Ragged,
    bytes_of,
    concatenate,
    frozen,
    take,
    text_array,
    text_pieces,
)
from kdpipe.data.growing import Growing
from kdpipe.errors import DataError

FORMAT_VERSION = 1
DIGEST_BYTES = 16
ANEW = "Remove data/prepared and run `kdpipe prepare-data`, or fetch it again."
MISSING_LABEL = -1
_BLOCK_ROWS = 2**16
_BUFFER_BYTES = 2**16
"""Read of a file of ids and digests at a time; all of a column of a row group without it."""
_RESIDENT_BYTES = 2**28
"""Mapped pages that stay with a process, at most about so many; reading on takes the others from the system's cache."""
_FAULT_BYTES = 2**16
"""What Linux maps around a page that is touched."""


@dataclass(frozen=True, kw_only=True)
class ColumnLayout:
    """How one column is laid out: `kind` fixed or ragged, dtype, shape per row (fixed) or per value (ragged)."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, column: Column) -> ColumnLayout:
        """The layout of a column in memory."""
        values = column.values if isinstance(column, Ragged) else column
        kind = "ragged" if isinstance(column, Ragged) else "fixed"
        return cls(name=name, kind=kind, dtype=values.dtype.str, shape=values.shape[1:])

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ColumnLayout:
        """Inverse of `to_json`."""
        return cls(**{**value, "shape": tuple(value["shape"])})

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {"name": self.name, "kind": self.kind, "dtype": self.dtype, "shape": list(self.shape)}


class PreparedInputs:
    """The rows' content: `read` any of them, by row number, straight from memory-mapped files."""

    def __init__(self, folder: Path) -> None:
        manifest = _load_manifest(folder)
        self.layouts = tuple(ColumnLayout.from_json(each) for each in manifest["columns"])
        self._segments = [folder / each["name"] for each in manifest["segments"]]
        self._starts = np.cumsum([0, *(each["rows"] for each in manifest["segments"])])
        self._mapped: list[mmap.mmap] = []
        self._resident = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _columns(self) -> list[dict[str, Column]]:
        return [{each.name: self._open(segment, each) for each in self.layouts} for segment in self._segments]

    @cached_property
    def sample_ids(self) -> NDArray[np.str_]:
        """Sample ids `[N]`, in row order."""
        return frozen(text_array(lambda: (block["sample_id"] for block in self.identities("sample_id"))))

    def id_column(self) -> pa.ChunkedArray:
        """Sample ids `[N]` as Arrow holds them, in a quarter of the memory of `sample_ids` or less; read anew."""
        return text_pieces(block["sample_id"] for block in self.identities("sample_id"))

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """Content digests `[N, 16]`, in row order."""
        digests, start = np.empty((len(self), DIGEST_BYTES), np.uint8), 0
        for block in self.identities("digest"):
            digests[start : start + block.num_rows] = bytes_of(pa.chunked_array([block["digest"]]))
            start += block.num_rows
        return frozen(digests)

    def identities(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """Sample ids and digests (`sample_id`, `digest`; or one) in row order, block by block; nothing is kept."""
        wanted = list(columns) or ["sample_id", "digest"]
        for segment in self._segments:
            path = segment / "rows.parquet"
            with _reading(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
                yield from file.iter_batches(_BLOCK_ROWS, columns=wanted, use_threads=False)

    def read(self, rows: NDArray[np.int64]) -> Columns:
        """The columns of the given rows, in the given order; any rows, repeated ones too."""
        columns = self._read(rows)
        self._release(len(rows), sum(_num_bytes(column) for column in columns.values()))
        return columns

    def _read(self, rows: NDArray[np.int64]) -> Columns:
        segment_of = np.searchsorted(self._starts, rows, side="right") - 1
        present = np.unique(segment_of)
        if len(present) <= 1:
            index = int(present[0]) if len(present) else 0
            return {name: take(column, rows - self._starts[index]) for name, column in self._columns[index].items()}
        order = np.argsort(segment_of, kind="stable")
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        parts = [
            {
                name: take(column, rows[segment_of == index] - self._starts[index])
                for name, column in self._columns[index].items()
            }
            for index in present
        ]
        return {each.name: take(concatenate([part[each.name] for part in parts]), position) for each in self.layouts}

    def _release(self, num_rows: int, num_bytes: int) -> None:
        """Let go of mapped pages once many may be resident: otherwise a long pass counts the whole data as its own."""
        self._resident += num_bytes + num_rows * len(self.layouts) * _FAULT_BYTES
        if self._resident > _RESIDENT_BYTES:
            self._resident = 0
            for mapped in self._mapped if sum(map(len, self._mapped)) > _RESIDENT_BYTES else ():
                mapped.madvise(mmap.MADV_DONTNEED)

    def _open(self, segment: Path, layout: ColumnLayout) -> Column:
        if layout.kind == "fixed":
            return self._map(segment / f"{layout.name}.npy")
        values = self._map(segment / f"{layout.name}.values.npy")
        path = segment / f"{layout.name}.offsets.npy"
        with _reading(path):
            return Ragged(values=values, offsets=np.load(path))

    def _map(self, path: Path) -> Array:
        with _reading(path):
            array = np.load(path, mmap_mode="r")
        self._mapped.append(array._mmap)  # NumPy names it nowhere else
        mapped: Array = array.view(np.ndarray)
        return mapped


def _num_bytes(column: Column) -> int:
    return (column.values if isinstance(column, Ragged) else column).nbytes


def _load_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"no prepared inputs in {folder}. Run `kdpipe prepare-data`.")
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest["format_version"] != FORMAT_VERSION:
        raise DataError(f"{path} has format version {manifest['format_version']}; this kdpipe reads {FORMAT_VERSION}.")
    return manifest


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is absent or damaged ({error}). {ANEW}") from None


class PreparedData:
    """A folder written by `kdpipe prepare-data`: inputs, labels and splits of the same rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = PreparedInputs(folder / "inputs")
        path = folder / "labels" / "labels.parquet"
        if not path.is_file():
            raise DataError(f"no labels in {path.parent}. Run `kdpipe prepare-data`.")
        table = pq.read_table(path, use_threads=False, pre_buffer=False)
        if table.num_rows != len(self.inputs):
            raise DataError(
                f"{path} has {table.num_rows} rows, the inputs {len(self.inputs)}. Run `kdpipe prepare-data` again."
            )
        self.labels: NDArray[np.int64] = table["label"].fill_null(MISSING_LABEL).to_numpy().astype(np.int64)
        self._splits = table["split"].fill_null("").to_numpy(zero_copy_only=False).astype(np.str_)

    @property
    def split_names(self) -> list[str]:
        """Names of the splits that have rows, sorted."""
        return sorted({str(name) for name in np.unique(self._splits)} - {""})

    def rows_of(self, splits: Iterable[str]) -> NDArray[np.int64]:
        """Row numbers `[N]` of the named splits, ascending. Raises `DataError` for a split without rows."""
        names = list(splits)
        for name in names:
            if name not in self.split_names:
                raise DataError(f"split {name!r} has no rows; the splits here are {', '.join(self.split_names)}")
        return np.flatnonzero(np.isin(self._splits, names))

    def split_digest(self, name: str) -> str:
        """Digest of a split's ids, content and labels, independent of row order."""
        digest, _ = digest_split(self.inputs, self.labels, self.rows_of([name]))
        return digest


def digest_split(
    inputs: PreparedInputs, labels: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[str, dict[str, int]]:
    """Digest of the given rows' ids, content and labels, whatever their order; and their count and labelled count."""
    wanted = np.zeros(len(inputs), np.bool_)
    wanted[rows] = True
    ids, digests = _identities_where(inputs, wanted)
    labels_of_ids, order, hashed = labels[wanted], pc.sort_indices(ids).to_numpy(), hashlib.sha256()
    for start in range(0, len(order), _BLOCK_ROWS):
        block = order[start : start + _BLOCK_ROWS]
        keys, labels_of_block = ids.take(pa.array(block)).to_pylist(), labels_of_ids[block].tolist()
        texts = (bytes(each).hex() for each in digests[block])
        lines = [f"{key}\0{text}\0{label}" for key, text, label in zip(keys, texts, labels_of_block, strict=True)]
        hashed.update((("\n" if start else "") + "\n".join(lines)).encode())
    return hashed.hexdigest(), {"rows": len(rows), "labelled": int((labels[rows] != MISSING_LABEL).sum())}


def _identities_where(
    inputs: PreparedInputs, wanted: NDArray[np.bool_]
) -> tuple[pa.LargeStringArray, NDArray[np.uint8]]:
    """Ids and digests `[n, 16]` of the rows that are wanted `[N]`, in row order; in memory once."""
    ends, characters, digests = Growing(np.int64), Growing(np.uint8), Growing(np.uint8)
    ends.append(np.zeros(1))
    start = 0
    for block in inputs.identities():
        chosen = block.filter(pa.array(wanted[start : start + block.num_rows]))
        ids = [key.encode() for key in chosen["sample_id"].to_pylist()]
        ends.append(np.cumsum([len(characters), *map(len, ids)])[1:])
        characters.append(np.frombuffer(b"".join(ids), np.uint8))
        digests.append(bytes_of(pa.chunked_array([chosen["digest"]])))
        start += block.num_rows
    buffers = [None, pa.py_buffer(ends.values), pa.py_buffer(characters.values)]
    texts = pa.Array.from_buffers(pa.large_string(), len(ends) - 1, buffers)
    return texts, digests.values.reshape(-1, DIGEST_BYTES)
