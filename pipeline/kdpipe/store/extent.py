"""Which rows a store is about: rows.parquet (ids, content digests), extent.json (how many), and Zarr's metadata."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe import durable
from kdpipe.errors import CorruptStoreError
from kdpipe.fingerprint import canonical_json, digest, digest_file
from kdpipe.store.manifest import Manifest
from kdpipe.store.shard_file import REPAIR

ROWS = "rows.parquet"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How many rows and views, and the SHA-256 of rows.parquet, and of views.parquet where there is one."""

    num_rows: int
    num_views: int
    rows_sha256: str
    views_sha256: str | None = None

    @classmethod
    def of(cls, folder: Path, rows: memoryview, num_rows: int, num_views: int) -> Extent:
        """Of rows whose `rows_file` this is; views that the folder keeps stay."""
        rows_sha256 = hashlib.sha256(rows).hexdigest()
        return cls(num_rows=num_rows, num_views=num_views, rows_sha256=rows_sha256, views_sha256=_kept_in(folder))

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
        value = {key: each for key, each in asdict(self).items() if each is not None}
        return canonical_json({**value, "digest": digest(value)}) + "\n"

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


def rows_file(rows: pa.Table) -> memoryview:
    """Content of rows.parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    return memoryview(sink.getvalue())


def write_extent(folder: Path, manifest: Manifest, extent: Extent, rows: memoryview) -> None:
    """Write rows.parquet (see `rows_file`), extent.json and the Zarr metadata, where they differ from what is there."""
    if not extent.rows_intact(folder):
        durable.write_bytes(folder / ROWS, rows)
    described = zarr_files(manifest, extent.num_views, extent.num_rows)
    files = {"extent.json": extent.to_text().encode()} | described
    for name, wanted in files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if not target.is_file() or target.read_bytes() != wanted:
            durable.write_bytes(target, wanted)


def _kept_in(folder: Path) -> str | None:
    """Digest of a store's kept views; None where there are none, or where nothing vouches for them."""
    try:
        return Extent.load(folder).views_sha256
    except CorruptStoreError:
        return None


def zarr_files(manifest: Manifest, num_views: int, num_rows: int) -> dict[str, bytes]:
    """Path -> content of the group's and of every array's zarr.json."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"kdpipe": "see manifest.json"}}
    arrays = {
        f"{name}/zarr.json": layout.zarr_metadata(num_views, num_rows) for name, layout in manifest.layouts().items()
    }
    return {name: (canonical_json(value) + "\n").encode() for name, value in {"zarr.json": group, **arrays}.items()}
