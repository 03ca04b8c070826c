"""One shard's file: inner chunks, each followed by its CRC32C, then an index (offset, bytes) with a CRC32C."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from kdpipe.errors import CorruptStoreError, IncompleteStoreError
from kdpipe.store.layout import ArrayLayout

CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)


def encode_shard(rows: NDArray[Any], layout: ArrayLayout) -> bytearray:
    """The bytes of a shard that holds `rows [N, …]`, N at most `shard_rows`; a last partial chunk is padded with 0."""
    num_used = -(-len(rows) // layout.chunk_rows)
    padded = np.zeros((num_used * layout.chunk_rows, *layout.shape), layout.numpy_dtype)
    padded[: len(rows)] = rows
    content = bytearray()
    index = np.full((layout.num_chunks, 2), _ABSENT, "<u8")
    for chunk in range(num_used):
        encoded = padded[chunk * layout.chunk_rows : (chunk + 1) * layout.chunk_rows].tobytes()
        index[chunk] = len(content), len(encoded) + CRC_BYTES
        content += encoded + crc32c(encoded)
    encoded_index = index.tobytes()
    return content + encoded_index + crc32c(encoded_index)


def crc32c(content: bytes) -> bytes:
    """CRC32C (RFC 3720) of `content`, little-endian, as Zarr's crc32c codec writes it."""
    checksum: int = google_crc32c.value(content)
    return checksum.to_bytes(CRC_BYTES, "little")


class ShardFile:
    """A committed shard, memory-mapped; each inner chunk's checksum is verified on first touch."""

    def __init__(self, path: Path, layout: ArrayLayout, num_rows: int, expected_bytes: int) -> None:
        self._path, self._layout = path, layout
        self._num_used = -(-num_rows // layout.chunk_rows)
        try:
            with path.open("rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise IncompleteStoreError(f"{path} is committed but absent. {REPAIR}") from None
        except ValueError:
            raise CorruptStoreError(f"{path} is empty; {expected_bytes} bytes were committed. {REPAIR}") from None
        if len(self._mapped) != expected_bytes:
            raise CorruptStoreError(f"{path} has {len(self._mapped)} bytes; {expected_bytes} were committed. {REPAIR}")
        self._check_index()
        self._chunks: NDArray[Any] = np.ndarray(
            (self._num_used, layout.chunk_rows, *layout.shape),
            layout.numpy_dtype,
            buffer=self._mapped,
            strides=self._strides(),
        )
        self._verified = np.zeros(self._num_used, np.bool_)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows by their position in the shard, `[N, …]`, in the given order. Raises `CorruptStoreError`."""
        chunks, positions = np.divmod(rows, self._layout.chunk_rows)
        if not self._verified.all():
            for chunk in np.unique(chunks[~self._verified[chunks]]):
                self._verify(int(chunk))
        taken: NDArray[Any] = self._chunks[chunks, positions]
        return taken

    def verify(self) -> None:
        """Check every chunk. Raises `CorruptStoreError`."""
        for chunk in range(self._num_used):
            self._verify(chunk)

    def _strides(self) -> tuple[int, ...]:
        contiguous = np.empty((1, *self._layout.shape), self._layout.numpy_dtype).strides
        return (self._layout.chunk_bytes + CRC_BYTES, contiguous[0], *contiguous[1:])

    def _verify(self, chunk: int) -> None:
        start = chunk * (self._layout.chunk_bytes + CRC_BYTES)
        stop = start + self._layout.chunk_bytes
        if crc32c(self._mapped[start:stop]) != self._mapped[stop : stop + CRC_BYTES]:
            raise CorruptStoreError(f"{self._path}: chunk {chunk} differs from its checksum. {REPAIR}")
        self._verified[chunk] = True

    def _check_index(self) -> None:
        stop = len(self._mapped) - CRC_BYTES
        start = stop - 16 * self._layout.num_chunks
        size = self._layout.chunk_bytes + CRC_BYTES
        expected = np.full((self._layout.num_chunks, 2), _ABSENT, "<u8")
        expected[: self._num_used] = [(chunk * size, size) for chunk in range(self._num_used)]
        content = self._mapped[max(start, 0) : stop]
        if content != expected.tobytes() or crc32c(content) != self._mapped[stop:]:
            raise CorruptStoreError(f"{self._path}: the shard index is damaged. {REPAIR}")


REPAIR = "Run `kdpipe cache-teacher NAME --repair` to compute it again, or fetch the store again."
