"""How an array lies in files: Zarr v3, sharded over rows, inner chunks of little-endian bytes with a CRC32C.

Uncompressed chunks are the default: any row can be read on its own. Compressed ones are Blosc frames (shuffle, zstd).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdpipe.encodings import ArraySpec
from kdpipe.errors import ConfigError
from kdpipe.fingerprint import digest

SHARD_BYTES = 32 * 2**20
CHUNK_BYTES = 2 * 2**20
MAX_CHUNK_ROWS = 8192
MIN_SHARDS = 16
MIN_CHUNK_ROWS = 64
CRC_BYTES = 4
COMPRESSION = {"cname": "zstd", "clevel": 7, "shuffle": "shuffle", "blocksize": 512 * 2**10}
"""Blosc's configuration but the type size; the block size is explicit, as Blosc's own choice depends on its version."""


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """Where the rows of one array lie; `shard_rows` is a multiple of `chunk_rows`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard_rows: int
    chunk_rows: int
    compressed: bool = False

    @classmethod
    def of(cls, name: str, spec: ArraySpec, shard_rows: int) -> ArrayLayout:
        """The layout of an array: inner chunks of at most 2 MiB that divide the shard."""
        wanted = max(1, min(MAX_CHUNK_ROWS, CHUNK_BYTES // max(spec.row_bytes, 1)))
        num_chunks = -(-shard_rows // wanted)
        while shard_rows % num_chunks:
            num_chunks += 1
        chunk_rows = shard_rows // num_chunks
        if num_chunks > 1 and 2 * chunk_rows < min(wanted, MIN_CHUNK_ROWS):
            raise ConfigError(
                f"shard_rows is {shard_rows}, which cannot be divided into even chunks of about {wanted} rows; "
                f"expected a multiple of a power of two, such as {max(1, round(shard_rows / wanted)) * wanted}"
            )
        return cls(
            name=name,
            dtype=spec.dtype,
            shape=spec.shape,
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
            compressed=spec.compressed,
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ArrayLayout:
        """Inverse of `to_json`."""
        return cls(**{**value, "shape": tuple(value["shape"])})

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "shard_rows": self.shard_rows,
            "chunk_rows": self.chunk_rows,
            "compressed": self.compressed,
        }

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian, whatever the machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, uncompressed."""
        return int(self.numpy_dtype.itemsize) * math.prod(self.shape)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk, uncompressed and without its checksum."""
        return self.row_bytes * self.chunk_rows

    @property
    def num_chunks(self) -> int:
        """Inner chunks per shard."""
        return self.shard_rows // self.chunk_rows

    def digest(self) -> str:
        """Digest of the array's metadata without its growing axes."""
        return digest(self.zarr_metadata(num_views=0, num_rows=0))

    def shard_path(self, view: int, shard: int) -> str:
        """Path of a shard's file inside the store."""
        return f"{self.name}/c.{view}.{shard}" + ".0" * len(self.shape)

    def zarr_metadata(self, num_views: int, num_rows: int) -> dict[str, Any]:
        """The array's zarr.json (Zarr v3 core specification; sharding_indexed codec)."""
        index: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        blosc = {"name": "blosc", "configuration": {**COMPRESSION, "typesize": self.numpy_dtype.itemsize}}
        one_byte = self.numpy_dtype.itemsize == 1
        codecs = [{"name": "bytes"} if one_byte else index[0], *([blosc] if self.compressed else []), index[1]]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [num_views, num_rows, *self.shape],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, self.shard_rows, *self.shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [1, self.chunk_rows, *self.shape],
                        "codecs": codecs,
                        "index_codecs": index,
                        "index_location": "end",
                    },
                }
            ],
            "attributes": {},
        }


def choose_shard_rows(specs: Iterable[ArraySpec], num_rows: int) -> int:
    """Rows per shard, a power of two: about 32 MB of the widest array, and at least 16 shards where rows allow it."""
    widest = max(spec.row_bytes for spec in specs)
    rows = max(1, min(SHARD_BYTES // max(widest, 1), num_rows // MIN_SHARDS))
    return int(2 ** (rows.bit_length() - 1))
