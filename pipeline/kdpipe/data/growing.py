"""What is kept of every row while a source is read: some bytes each, no Python object.

Shapes: N rows so far, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16
_FIRST_SLOTS = 2**12
_MOST_FULL = 2 / 3


class Growing:
    """A vector `[N]` that grows in place: no second copy of it is ever made."""

    def __init__(self, dtype: Any) -> None:
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes) // int(self._dtype.itemsize)

    def append(self, values: NDArray[Any]) -> None:
        """Add values `[B]` at the end. Raises `BufferError` while somebody holds `values`."""
        self._bytes += np.asarray(values, self._dtype).tobytes()

    @property
    def values(self) -> NDArray[Any]:
        """All values, to read and to change."""
        return np.frombuffer(self._bytes, self._dtype)


def text_keys(texts: Iterable[str]) -> NDArray[np.uint8]:
    """A 16-byte key (BLAKE2b) for each text: `[B, 16]`."""
    keys = b"".join(blake2b(text.encode(), digest_size=KEY_BYTES).digest() for text in texts)
    return np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)


class KeyTable:
    """Numbers keys of 16 random bytes by their first occurrence: a hash table without Python objects.

    Open addressing with linear probing, vectorised over a block; 28 to 40 bytes per key.
    """

    def __init__(self) -> None:
        self._words = Growing(np.uint64)
        self._holders: NDArray[np.int64] = np.full(_FIRST_SLOTS, -1, np.int64)  # of each slot: a key's number

    def __len__(self) -> int:
        return len(self._words) // 2

    def add(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Number the keys `[B, 16]` by their place; gives the number of an equal key that is there, or -1.

        Of equal keys within the block all but one get that one's number.
        """
        first = len(self)
        self._words.append(np.ascontiguousarray(keys).view(np.uint64).reshape(-1))
        if len(self) > _MOST_FULL * len(self._holders):
            self._grow(first)
        return self._insert(np.arange(first, len(self)))

    def find(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The numbers of keys `[B, 16]`; -1 where there is none."""
        wanted = np.ascontiguousarray(keys).view(np.uint64)
        words, slots = self._words.values.reshape(-1, 2), self._slots(wanted)
        found = np.full(len(wanted), -1, np.int64)
        pending = np.arange(len(wanted))
        while len(pending):
            holders = self._holders[slots[pending]]
            pending, holders = pending[holders >= 0], holders[holders >= 0]
            same = (words[holders] == wanted[pending]).all(axis=1)
            found[pending[same]] = holders[same]
            pending = pending[~same]
            slots[pending] = self._next(slots[pending])
        return found

    def _insert(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        words = self._words.values.reshape(-1, 2)
        wanted = words[numbers]
        slots = self._slots(wanted)
        earlier = np.full(len(numbers), -1, np.int64)
        pending = np.arange(len(numbers))
        while len(pending):
            at = slots[pending]
            free = self._holders[at] < 0
            self._holders[at[free]] = numbers[pending[free]]  # of several that want one slot, one gets it
            holders = self._holders[at]
            is_mine = holders == numbers[pending]
            same = ~is_mine & (words[holders] == wanted[pending]).all(axis=1)
            earlier[pending[same]] = holders[same]
            pending = pending[~(is_mine | same)]
            slots[pending] = self._next(slots[pending])
        return earlier

    def _slots(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (words[:, 0] & np.uint64(len(self._holders) - 1)).astype(np.int64)

    def _next(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        return (slots + 1) & (len(self._holders) - 1)

    def _grow(self, num_keys: int) -> None:
        """Twice the slots, or more, with the first `num_keys` keys in them."""
        size = len(self._holders)
        while len(self) > _MOST_FULL * size:
            size *= 2
        self._holders = np.empty(0, np.int64)  # the old ones go before the new ones come
        self._holders = np.full(size, -1, np.int64)
        for start in range(0, num_keys, 2**16):
            self._insert(np.arange(start, min(num_keys, start + 2**16)))
