"""Which rows a store is about: rows.parquet (ids, content digests), extent.json (how many), and Zarr's metadata."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.data.columns import fixed_bytes, text_column
from kdpipe.errors import CorruptStoreError
from kdpipe.fingerprint import canonical_json, digest, digest_file
from kdpipe.store.manifest import Manifest
from kdpipe.store.shard_file import REPAIR

ROWS = "rows.parquet"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How many rows and views, and the SHA-256 of rows.parquet."""

    num_rows: int
    num_views: int
    rows_sha256: str

    @classmethod
    def load(cls, folder: Path) -> Extent:
        """Read extent.json. Raises `CorruptStoreError`."""
        path = folder / "extent.json"
        try:
            value = json.loads(path.read_text())
            stated = value.pop("digest")
            extent = cls(**value)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptStoreError(f"{path} is damaged or absent: {error}. {REPAIR}") from None
        if stated != digest(value):
            raise CorruptStoreError(f"{path} differs from its own digest. {REPAIR}")
        return extent

    def to_text(self) -> str:
        """Content of extent.json. Its digest is there because fewer rows would be read without a word."""
        return canonical_json({**asdict(self), "digest": digest(asdict(self))}) + "\n"

    def rows_intact(self, folder: Path) -> bool:
        """Whether rows.parquet is the one that belongs to this extent."""
        path = folder / ROWS
        return path.is_file() and digest_file(path) == self.rows_sha256

    def read_rows(self, folder: Path) -> pa.Table:
        """rows.parquet. Raises `CorruptStoreError`."""
        if not self.rows_intact(folder):
            raise CorruptStoreError(f"{folder / ROWS} is absent or differs from its digest in extent.json. {REPAIR}")
        table = pq.read_table(folder / ROWS, use_threads=False, pre_buffer=False)
        if table.num_rows != self.num_rows:
            found = f"{folder / ROWS} has {table.num_rows} rows, extent.json says {self.num_rows}"
            raise CorruptStoreError(f"{found}. {REPAIR}")
        return table


def write_extent(
    folder: Path, manifest: Manifest, sample_ids: NDArray[np.str_], digests: NDArray[np.uint8], num_views: int
) -> None:
    """Write rows.parquet, extent.json and the Zarr metadata, where they differ from what is there."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"sample_id": text_column(sample_ids), "digest": fixed_bytes(digests)}), sink, compression="zstd"
    )
    content = sink.getvalue().to_pybytes()
    extent = Extent(num_rows=len(sample_ids), num_views=num_views, rows_sha256=hashlib.sha256(content).hexdigest())
    files = {ROWS: content, "extent.json": extent.to_text().encode()}
    files |= zarr_files(manifest, num_views, len(sample_ids))
    for name, wanted in files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if not target.is_file() or target.read_bytes() != wanted:
            durable.write_bytes(target, wanted)


def zarr_files(manifest: Manifest, num_views: int, num_rows: int) -> dict[str, bytes]:
    """Path -> content of the group's and of every array's zarr.json."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"kdpipe": "see manifest.json"}}
    arrays = {
        f"{name}/zarr.json": layout.zarr_metadata(num_views, num_rows) for name, layout in manifest.layouts().items()
    }
    return {name: (canonical_json(value) + "\n").encode() for name, value in {"zarr.json": group, **arrays}.items()}
