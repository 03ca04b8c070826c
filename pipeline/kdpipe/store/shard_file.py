"""One shard's file: inner chunks, each followed by its CRC32C, then an index (offset, bytes) with a CRC32C."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from kdpipe.errors import CorruptStoreError, IncompleteStoreError
from kdpipe.store.folder import HeldFolder
from kdpipe.store.layout import COMPRESSION, CRC_BYTES, ArrayLayout
from kdpipe.store.rows import grouped
from kdpipe.store.scattering import MOST_ROWS, Scattered

REPAIR = "Run `kdpipe cache-teacher NAME --repair` to compute it again, or fetch the store again."
_ABSENT = np.uint64(2**64 - 1)
blosc.use_threads = False


class StoredFile(NamedTuple):
    """What was committed of a shard's file, as it stands in its record.

    `checksums` are the CRC32C of its chunks and of its index, as they stand in the file, as hex: a chunk of another
    version of the file has another one. Empty in records that were made before there were any.
    """

    num_bytes: int
    sha256: str
    checksums: str = ""


def encode_shard(rows: NDArray[Any], layout: ArrayLayout) -> Iterator[list[NDArray[np.uint8]]]:
    """The bytes of a shard that holds `rows [N, …]`, N at most `shard_rows`: its chunks, then its index.

    Each is a list of pieces that follow each other, the last of which is its CRC32C. A last partial chunk is padded
    with 0. Pieces may be views of `rows`.
    """
    sizes: list[int] = []
    for start in range(0, len(rows), layout.chunk_rows):
        part = rows[start : start + layout.chunk_rows]
        pieces = _compressed(part, layout) if layout.compressed else _plain(part, layout)
        yield [*pieces, crc32c(*pieces)]
        sizes.append(sum(map(len, pieces)) + CRC_BYTES)
    yield _encode_index(np.array(sizes, np.uint64), layout)


def write_shard(file: IO[bytes], rows: NDArray[Any], layout: ArrayLayout) -> StoredFile:
    """Write a shard's file, see `encode_shard`, and say what was written."""
    num_bytes, hashed, checksums = 0, hashlib.sha256(), bytearray()
    for pieces in encode_shard(rows, layout):
        for piece in pieces:
            num_bytes += file.write(piece.data)
            hashed.update(piece.data)
        checksums += pieces[-1].tobytes()
    return StoredFile(num_bytes, hashed.hexdigest(), checksums.hex())


def _plain(rows: NDArray[Any], layout: ArrayLayout) -> list[NDArray[np.uint8]]:
    content = np.ascontiguousarray(rows, layout.numpy_dtype).reshape(-1).view(np.uint8)
    return [content, np.zeros(layout.chunk_bytes - len(content), np.uint8)]


def _compressed(rows: NDArray[Any], layout: ArrayLayout) -> list[NDArray[np.uint8]]:
    padded = np.zeros((layout.chunk_rows, *layout.shape), layout.numpy_dtype)
    padded[: len(rows)] = rows
    shuffle = blosc.SHUFFLE if COMPRESSION["shuffle"] == "shuffle" else blosc.BITSHUFFLE
    frame = blosc.compress(
        padded, str(COMPRESSION["cname"]).encode(), COMPRESSION["clevel"], shuffle, COMPRESSION["blocksize"]
    )
    return [np.frombuffer(frame, np.uint8)]


def _encode_index(sizes: NDArray[np.uint64], layout: ArrayLayout) -> list[NDArray[np.uint8]]:
    """(offset, bytes) of chunks that lie one after the other, unused ones marked, then the CRC32C of it all."""
    index = np.full((layout.num_chunks, 2), _ABSENT, "<u8")
    index[: len(sizes), 0] = np.cumsum(sizes) - sizes
    index[: len(sizes), 1] = sizes
    encoded = index.reshape(-1).view(np.uint8)
    return [encoded, crc32c(encoded)]


def index_bytes(layout: ArrayLayout) -> int:
    """Of a shard's index, which has a place for every chunk, and its checksum."""
    return 16 * layout.num_chunks + CRC_BYTES


def crc32c(*parts: NDArray[Any]) -> NDArray[np.uint8]:
    """CRC32C (RFC 3720) of `parts` one after the other, 4 bytes little-endian, as Zarr's crc32c codec writes it."""
    checksum = 0
    for part in parts:
        checksum = google_crc32c.extend(checksum, part)
    return np.frombuffer(checksum.to_bytes(CRC_BYTES, "little"), np.uint8)


class ShardFile:
    """A committed shard, open for reading. Each inner chunk's checksum is verified on first touch, however it is read:
    against its content, and against what was committed.

    `within`: the folder below which `path` lies, where it may be replaced. Raises `IncompleteStoreError` for an absent
    file, `CorruptStoreError` for another size, a damaged index or chunk, or one of another version of the store.
    """

    def __init__(
        self, path: Path, layout: ArrayLayout, num_rows: int, stored: StoredFile, within: HeldFolder | None = None
    ) -> None:
        self._path, self._layout, self._num_rows, self._within = path, layout, num_rows, within
        self._num_used = -(-num_rows // layout.chunk_rows)
        self._committed = np.frombuffer(bytes.fromhex(stored.checksums), np.uint8).reshape(-1, CRC_BYTES)
        self._verified = np.zeros(self._num_used, np.bool_)
        self._file: tuple[int, ...] = ()  # which one the chunks were verified of
        try:
            with self._open() as file:
                self._bytes = os.fstat(file.fileno()).st_size
                if self._bytes != stored.num_bytes:
                    raise CorruptStoreError(
                        f"{path} has {self._bytes} bytes; {stored.num_bytes} were committed. {REPAIR}"
                    )
                index = os.pread(file.fileno(), index_bytes(layout), self._bytes - index_bytes(layout))
        except (FileNotFoundError, NotADirectoryError):
            raise IncompleteStoreError(f"{path} is committed but absent. {REPAIR}") from None
        self._offsets, self._sizes = self._read_index(np.frombuffer(index, np.uint8))

    def _open(self) -> FileIO:
        """The file of today: where another one took its place (it was fetched again, say), nothing is verified yet."""
        file = self._open_by_name()
        found = os.fstat(file.fileno())
        this = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if this != self._file:
            self._file = this
            self._verified[:] = False
            self.unmap()
        return file

    def _open_by_name(self) -> FileIO:
        if self._within is None:
            return self._path.open("rb", buffering=0)
        return open(self._name, "rb", buffering=0, opener=self._within.opener)

    @cached_property
    def _name(self) -> str:
        assert self._within is not None
        return str(self._path.relative_to(self._within.path))

    def rows_of(self, chunk: int) -> int:
        """Rows that a chunk holds; the last one of a shard may hold fewer than `chunk_rows`."""
        return min(self._layout.chunk_rows, self._num_rows - chunk * self._layout.chunk_rows)

    def read_chunk(self, chunk: int, scratch: NDArray[np.uint8], verify: bool = False) -> NDArray[Any]:
        """A chunk's rows `[rows_of(chunk), …]` by one `preadv`, in `scratch` (chunk and checksum) if uncompressed."""
        if self._layout.compressed:
            return self._decode(chunk)[: self.rows_of(chunk)]
        content = scratch[: int(self._sizes[chunk])]
        with self._open() as file:
            num_bytes = os.preadv(file.fileno(), [content.data], int(self._offsets[chunk]))
        if num_bytes != len(content):
            raise CorruptStoreError(f"{self._path} ends within chunk {chunk}. {REPAIR}")
        if verify or not self._verified[chunk]:
            self._compare(chunk, crc32c(content[:-CRC_BYTES]), content[-CRC_BYTES:])
        rows = content[:-CRC_BYTES].view(self._layout.numpy_dtype).reshape(-1, *self._layout.shape)
        return rows[: self.rows_of(chunk)]

    def scatter_chunk(self, chunk: int, out: Scattered, first: int) -> bool:
        """An uncompressed chunk's rows, each straight to its place in memory: those of `out` from `first` on.

        False, and nothing is read, where the chunk has not been verified.
        """
        width, offset, num_rows = self._layout.row_bytes, int(self._offsets[chunk]), self.rows_of(chunk)
        with self._open() as file:
            if not self._verified[chunk]:
                return False
            for start in range(0, num_rows, MOST_ROWS):
                stop = min(start + MOST_ROWS, num_rows)
                if not out.read(file.fileno(), offset + start * width, first + start, first + stop):
                    raise CorruptStoreError(f"{self._path} ends within chunk {chunk}. {REPAIR}")
        return True

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows by their position in the shard, `[N, …]`, in the given order."""
        chunks, positions = np.divmod(rows, self._layout.chunk_rows)
        if self._layout.compressed:
            return self._read_compressed(chunks, positions)
        mapped = self._mapped_chunks  # before a look at what is verified: the file may be another one by now
        if not self._verified.all():
            for chunk in np.unique(chunks[~self._verified[chunks]]):
                self._verify_mapped(int(chunk))
        taken: NDArray[Any] = mapped[chunks, positions]
        return taken

    def release(self) -> None:
        """Let go of pages that single rows were read from, or compared; they are still in the system's cache."""
        mapped = self.__dict__.get("_mapped")
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)

    def unmap(self) -> None:
        """Let go of the file that single rows were read from; it is mapped again when the next ones are."""
        for name in ("_mapped", "_mapped_chunks"):
            self.__dict__.pop(name, None)

    def _read_compressed(self, chunks: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[Any]:
        out = np.empty((len(chunks), *self._layout.shape), self._layout.numpy_dtype)
        for chunk, here in grouped(chunks):
            out[here] = self._decode(chunk)[positions[here]]
        return out

    def _decode(self, chunk: int) -> NDArray[Any]:
        """A compressed chunk `[chunk_rows, …]`; its checksum and Blosc's own header are always checked."""
        size = int(self._sizes[chunk])
        with self._open() as file:
            content = np.frombuffer(os.pread(file.fileno(), size, int(self._offsets[chunk])), np.uint8)
        self._compare(chunk, crc32c(content[:-CRC_BYTES]), content[-CRC_BYTES:])
        out = np.empty((self._layout.chunk_rows, *self._layout.shape), self._layout.numpy_dtype)
        blosc.decompress(content[:-CRC_BYTES], out)
        return out

    def _verify_mapped(self, chunk: int) -> None:
        start, stop = int(self._offsets[chunk]), int(self._offsets[chunk] + self._sizes[chunk])
        content = np.frombuffer(self._mapped, np.uint8)[start:stop]
        self._compare(chunk, crc32c(content[:-CRC_BYTES]), content[-CRC_BYTES:])

    def _compare(self, chunk: int, found: NDArray[np.uint8], stored: NDArray[np.uint8]) -> None:
        if not np.array_equal(found, stored):
            self.unmap()  # the next reading is of the file that is there by then
            raise CorruptStoreError(f"{self._path}: chunk {chunk} differs from its checksum. {REPAIR}")
        self._check_committed(chunk, f"chunk {chunk}", found)
        self._verified[chunk] = True

    def _check_committed(self, part: int, name: str, checksum: NDArray[np.uint8]) -> None:
        """Raise `CorruptStoreError` for a chunk, or the index (`part` -1), that is whole but not the committed one."""
        if len(self._committed) and not np.array_equal(self._committed[part], checksum):
            self.unmap()
            raise CorruptStoreError(
                f"{self._path}: {name} is whole, but not the one that was committed. The file is of another version of "
                f"this store, such as a copy over an older one leaves that broke off. {REPAIR}"
            )

    @cached_property
    def _mapped(self) -> mmap.mmap:
        with self._open() as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) != self._bytes:
            raise CorruptStoreError(f"{self._path} has {len(mapped)} bytes; {self._bytes} were committed. {REPAIR}")
        return mapped

    @cached_property
    def _mapped_chunks(self) -> NDArray[Any]:
        """Uncompressed chunks as one array `[num_used, chunk_rows, …]`, each followed by its checksum."""
        layout = self._layout
        contiguous = np.empty((1, *layout.shape), layout.numpy_dtype).strides
        return np.ndarray(
            (self._num_used, layout.chunk_rows, *layout.shape),
            layout.numpy_dtype,
            buffer=self._mapped,
            strides=(layout.chunk_bytes + CRC_BYTES, contiguous[0], *contiguous[1:]),
        )

    def _read_index(self, content: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        sizes = content[:-CRC_BYTES].view("<u8").reshape(-1, 2)[: self._num_used, 1]
        intact = (
            len(content) == index_bytes(self._layout)
            and np.array_equal(np.concatenate(_encode_index(sizes, self._layout)), content)
            and int(sizes.sum()) + len(content) == self._bytes
            and (self._layout.compressed or bool((sizes == self._layout.chunk_bytes + CRC_BYTES).all()))
        )
        if not intact:
            raise CorruptStoreError(f"{self._path}: the shard index is damaged. {REPAIR}")
        self._check_committed(-1, "the shard index", content[-CRC_BYTES:])
        return (np.cumsum(sizes) - sizes).astype(np.int64), sizes.astype(np.int64)
