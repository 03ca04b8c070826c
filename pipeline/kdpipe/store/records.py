"""Commit records: one per (view, shard), written after the shard's files. Readers trust only what has one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.errors import CorruptStoreError
from kdpipe.fingerprint import canonical_json, digest
from kdpipe.store.shard_file import REPAIR, StoredFile

Key = tuple[int, int]
"""(view, shard index)."""


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """That a shard of one view is complete: its rows, what it was computed from, and its files.

    `inputs`, `manifest` and `layouts` are digests: of the rows' ids and content, of the manifest, of the arrays'
    metadata. `files` are by array name. `computed` says which of the rows the teacher saw: a bit per row, the first one
    highest, as hex; empty: all of them.
    """

    view: int
    shard: int
    start: int
    stop: int
    batch_size: int
    inputs: str
    manifest: str
    layouts: str
    files: Mapping[str, StoredFile]
    computed: str = ""

    @property
    def rows_computed(self) -> NDArray[np.bool_]:
        """Which rows of the shard the teacher saw, `[stop - start]`."""
        num_rows = self.stop - self.start
        if not self.computed:
            return np.ones(num_rows, np.bool_)
        packed = np.frombuffer(bytes.fromhex(self.computed), np.uint8)
        return np.unpackbits(packed, count=num_rows).astype(np.bool_)

    @property
    def key(self) -> Key:
        """(view, shard index)."""
        return self.view, self.shard

    @property
    def file_name(self) -> str:
        """Name of the file that holds this record alone."""
        return f"{self.view}-{self.shard}.json"

    def to_text(self) -> str:
        """Content of that file. Its digest is there because a flipped bit in `computed` would go unnoticed."""
        value = asdict(self)
        return canonical_json({**value, "digest": digest(value)}) + "\n"

    @classmethod
    def from_text(cls, content: str | bytes, where: Path | str) -> CommitRecord:
        """Inverse of `to_text`. Raises `CorruptStoreError`."""
        try:
            value = json.loads(content)
            stated = value.pop("digest")
            record = _from_json(value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptStoreError(f"{where} is damaged: {error}. {REPAIR}") from None
        if stated != digest(value):
            raise CorruptStoreError(f"{where} differs from its own digest. {REPAIR}")
        return record


class CommitLog(Mapping[Key, CommitRecord]):
    """The records of a store by (view, shard): `commits.parquet` with a digest beside it, overlaid by `commits/`.

    Records are made from the log's columns when they are asked for: a store of 10,000 shards opens at once.
    `log_sha256` is that of commits.parquet, empty where there is none. `rows_sha256` is that of the rows.parquet which
    the log of a finished store is about; empty where work goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "commits.parquet"
        self._single = folder / "commits"
        self.log_sha256 = ""
        self._table = self._read_log()
        self.rows_sha256 = (self._table.schema.metadata or {}).get(_ROWS, b"").decode()
        keys = zip(self._table["view"].to_pylist(), self._table["shard"].to_pylist(), strict=True)
        self._line: dict[Key, int] = {key: line for line, key in enumerate(keys)}
        self._added: dict[Key, CommitRecord] = {}
        for path in self._single.glob("*.json"):
            record = CommitRecord.from_text(path.read_bytes(), path)
            self._added[record.key] = record

    def __getitem__(self, key: Key) -> CommitRecord:
        if key in self._added:
            return self._added[key]
        row = self._table.slice(self._line[key], 1).to_pylist()[0]
        return _from_json({**row, "files": json.loads(row["files"])})

    def __iter__(self) -> Iterator[Key]:
        return iter(sorted({**self._line, **self._added}))

    def __len__(self) -> int:
        return len({**self._line, **self._added})

    def __contains__(self, key: object) -> bool:
        return key in self._added or key in self._line

    def add(self, record: CommitRecord) -> None:
        """Make a shard exist, durably."""
        if not self._single.is_dir():
            self._single.mkdir(exist_ok=True)
            durable.fsync_folder(self._folder)
        durable.write_text(self._single / record.file_name, record.to_text())
        self._added[record.key] = record

    def keep(self, wanted: set[Key], rows_sha256: str = "") -> None:
        """Rewrite the log with those records only, sorted, as one Parquet file; byte-deterministic and durable."""
        self.hold([self[key] for key in self if key in wanted], rows_sha256)

    def hold(self, kept: Sequence[CommitRecord], rows_sha256: str = "") -> None:
        """Rewrite the log with exactly these records, which are sorted by their keys."""
        rows = [{**asdict(record), "files": canonical_json(record.files)} for record in kept]
        schema = _SCHEMA.with_metadata({_ROWS: rows_sha256}) if rows_sha256 else _SCHEMA
        table = pa.Table.from_pylist(rows, schema=schema)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        content = sink.getvalue().to_pybytes()
        self.log_sha256 = hashlib.sha256(content).hexdigest()
        new = self.log_sha256 + "\n"
        # Both digests are legal while the log is replaced, so that a kill in between loses no record.
        old = self._digest_path.read_text() if self._digest_path.is_file() else ""
        durable.write_text(self._digest_path, new + old)
        durable.write_bytes(self._log, content)
        durable.write_text(self._digest_path, new)
        shutil.rmtree(self._single, ignore_errors=True)
        durable.fsync_folder(self._folder)
        self._table, self._added, self.rows_sha256 = table, {}, rows_sha256
        self._line = {record.key: line for line, record in enumerate(kept)}

    @property
    def _digest_path(self) -> Path:
        return self._log.with_name(self._log.name + ".sha256")

    def _read_log(self) -> pa.Table:
        if not self._log.is_file():
            return _SCHEMA.empty_table()
        content = self._log.read_bytes()
        expected = self._digest_path.read_bytes() if self._digest_path.is_file() else b""
        self.log_sha256 = hashlib.sha256(content).hexdigest()
        if (self.log_sha256 + "\n").encode() not in expected.splitlines(keepends=True):
            raise CorruptStoreError(f"{self._log} differs from {self._digest_path.name}. {REPAIR}")
        # From the file, not from `content`: Arrow's threads may let go of a Python buffer after Python has ended.
        return pq.read_table(self._log, use_threads=False, pre_buffer=False)


def remove_damaged_records(folder: Path) -> None:
    """Remove what cannot be read of a store's `commits/`, so that those shards are missing. For the one writer."""
    for path in (folder / "commits").glob("*.json"):
        try:
            CommitRecord.from_text(path.read_bytes(), path)
        except CorruptStoreError:
            path.unlink()


_ROWS = b"rows_sha256"
_SCHEMA = pa.schema(
    [
        ("view", pa.int32()),
        ("shard", pa.int64()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("batch_size", pa.int64()),
        ("inputs", pa.string()),
        ("manifest", pa.string()),
        ("layouts", pa.string()),
        ("files", pa.string()),
        ("computed", pa.string()),
    ]
)


def bits_of(rows: NDArray[np.bool_]) -> str:
    """`CommitRecord.computed` of a shard's rows."""
    return "" if rows.all() else np.packbits(rows).tobytes().hex()


def _from_json(value: dict[str, Any]) -> CommitRecord:
    return CommitRecord(**{**value, "files": {name: StoredFile(*file) for name, file in value["files"].items()}})
