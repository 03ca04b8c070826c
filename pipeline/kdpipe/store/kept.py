"""views.parquet: some rows as view 1 showed them to the teacher, so that a library that shows others is noticed.

Shapes: n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdpipe.data.columns import Array, Column, Columns, Ragged, concatenate, take
from kdpipe.errors import CorruptStoreError
from kdpipe.fingerprint import digest_file
from kdpipe.store.shard_file import REPAIR

VIEWS = "views.parquet"
KEPT_ROWS = 16
"""Rows that a store with augmented views keeps as they were shown."""
KEPT_VIEW = 1
"""The view that they were shown in."""


@dataclass(frozen=True, kw_only=True)
class KeptViews:
    """`n` rows by sample id: what view 1 showed of them, and whom it mixed them with (empty: nobody)."""

    sample_ids: NDArray[np.str_]
    partners: NDArray[np.str_]
    columns: Columns

    def __len__(self) -> int:
        return len(self.sample_ids)

    def take(self, places: NDArray[np.int64]) -> KeptViews:
        """Some of them, in the given order."""
        return KeptViews(
            sample_ids=self.sample_ids[places],
            partners=self.partners[places],
            columns={name: take(column, places) for name, column in self.columns.items()},
        )

    def with_more(self, more: KeptViews) -> KeptViews:
        """These rows, then those."""
        return KeptViews(
            sample_ids=np.concatenate([self.sample_ids, more.sample_ids]),
            partners=np.concatenate([self.partners, more.partners]),
            columns={name: concatenate([column, more.columns[name]]) for name, column in self.columns.items()},
        )

    def to_bytes(self) -> bytes:
        """Content of views.parquet: a line per row and column, byte-deterministic."""
        lines = [
            _line(str(sample_id), str(partner), name, self.columns[name], row)
            for row, (sample_id, partner) in enumerate(zip(self.sample_ids, self.partners, strict=True))
            for name in sorted(self.columns)
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(lines, schema=_SCHEMA), sink, compression="zstd", write_page_checksum=True)
        content: bytes = sink.getvalue().to_pybytes()
        return content

    @classmethod
    def load(cls, folder: Path, sha256: str) -> KeptViews:
        """Read views.parquet. Raises `CorruptStoreError` where it is not the one of this digest."""
        path = folder / VIEWS
        if not is_intact(folder, sha256):
            raise CorruptStoreError(f"{path} is absent or differs from its digest in extent.json. {REPAIR}")
        table = pq.read_table(path, use_threads=False, pre_buffer=False)
        by_column: dict[str, list[dict[str, Any]]] = {}
        for line in table.to_pylist():
            by_column.setdefault(line["column"], []).append(line)
        rows = next(iter(by_column.values()))
        return cls(
            sample_ids=np.array([line["sample_id"] for line in rows]),
            partners=np.array([line["partner"] for line in rows]),
            columns={name: _column(lines) for name, lines in by_column.items()},
        )


def is_intact(folder: Path, sha256: str | None) -> bool:
    """Whether views.parquet is the one of this digest; without a digest there is none to be."""
    path = folder / VIEWS
    return sha256 is None or (path.is_file() and digest_file(path) == sha256)


_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("partner", pa.string()),
        ("column", pa.string()),
        ("ragged", pa.bool_()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("values", pa.large_binary()),
    ]
)


def _line(sample_id: str, partner: str, name: str, column: Column, row: int) -> dict[str, Any]:
    ragged = isinstance(column, Ragged)
    values: Array = np.asarray(column.row(row) if isinstance(column, Ragged) else column[row])
    values = values.astype(values.dtype.newbyteorder("<"))
    return {
        "sample_id": sample_id,
        "partner": partner,
        "column": name,
        "ragged": ragged,
        "dtype": values.dtype.str,
        "shape": list(values.shape),
        "values": values.tobytes(),
    }


def _column(lines: Sequence[dict[str, Any]]) -> Column:
    rows: list[Array] = [np.frombuffer(line["values"], line["dtype"]).reshape(line["shape"]) for line in lines]
    if not lines[0]["ragged"]:
        return np.stack(rows)
    return Ragged(values=np.concatenate(rows), offsets=np.cumsum([0, *map(len, rows)]))
