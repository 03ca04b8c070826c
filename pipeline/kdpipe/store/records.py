"""Commit records: one per (view, shard), written after the shard's files. Readers trust only what has one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe import durable
from kdpipe.errors import CorruptStoreError
from kdpipe.fingerprint import canonical_json

Key = tuple[int, int]
"""(view, shard index)."""


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """That a shard of one view is complete: its rows, what it was computed from, and its files.

    `inputs`, `manifest` and `layouts` are digests: of the rows' ids and content, of the manifest, of the arrays'
    metadata. `files` maps array name -> [bytes, SHA-256 hex] (a CRC32C would be the same for every file: chunks and
    index end in their own).
    """

    view: int
    shard: int
    start: int
    stop: int
    batch_size: int
    inputs: str
    manifest: str
    layouts: str
    files: Mapping[str, tuple[int, str]]

    @property
    def key(self) -> Key:
        """(view, shard index)."""
        return self.view, self.shard


class CommitLog:
    """The records of a store: `commits.parquet` with a digest beside it, overlaid by single records in `commits/`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "commits.parquet"
        self._single = folder / "commits"
        self.records: dict[Key, CommitRecord] = {record.key: record for record in self._read_log()}
        for path in sorted(self._single.glob("*.json")):
            record = _from_json(json.loads(path.read_text()))
            self.records[record.key] = record

    def add(self, record: CommitRecord) -> None:
        """Make a shard exist, durably."""
        if not self._single.is_dir():
            self._single.mkdir()
            durable.fsync_folder(self._folder)
        durable.write_text(self._single / f"{record.view}-{record.shard}.json", canonical_json(asdict(record)) + "\n")
        self.records[record.key] = record

    def forget(self, key: Key) -> None:
        """Make a shard not exist, durably."""
        del self.records[key]
        self.compact()

    def compact(self) -> None:
        """Rewrite all records, sorted, as one Parquet file with its SHA-256 beside it; byte-deterministic."""
        ordered = [self.records[key] for key in sorted(self.records)]
        rows = [{**asdict(record), "files": canonical_json(record.files)} for record in ordered]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd", write_page_checksum=True)
        content = sink.getvalue().to_pybytes()
        new = hashlib.sha256(content).hexdigest() + "\n"
        # Both digests are legal while the log is replaced, so that a kill in between loses no record.
        old = self._digest_path.read_text() if self._digest_path.is_file() else ""
        durable.write_text(self._digest_path, new + old)
        durable.write_bytes(self._log, content)
        durable.write_text(self._digest_path, new)
        shutil.rmtree(self._single, ignore_errors=True)
        durable.fsync_folder(self._folder)

    @property
    def _digest_path(self) -> Path:
        return self._log.with_name(self._log.name + ".sha256")

    def _read_log(self) -> list[CommitRecord]:
        if not self._log.is_file():
            return []
        content = self._log.read_bytes()
        expected = self._digest_path.read_bytes().split() if self._digest_path.is_file() else []
        if hashlib.sha256(content).hexdigest().encode() not in expected:
            raise CorruptStoreError(
                f"{self._log} differs from {self._digest_path.name}. Fetch or compute the store again."
            )
        # From the file, not from `content`: Arrow's threads may let go of a Python buffer after Python has ended.
        rows = pq.read_table(self._log, use_threads=False, pre_buffer=False).to_pylist()
        return [_from_json({**row, "files": json.loads(row["files"])}) for row in rows]


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
    ]
)


def _from_json(value: dict[str, Any]) -> CommitRecord:
    files = {name: (int(size), str(checksum)) for name, (size, checksum) in value["files"].items()}
    return CommitRecord(**{**value, "files": files})
