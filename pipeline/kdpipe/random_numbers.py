"""Random numbers without state: the same for the same key and counter, whatever the batch, order or process.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), vectorised over rows.

Shapes: B rows; `...` stands for further axes (tokens, draws).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)


def uniform(keys: NDArray[np.uint64], shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 bits, `[B, *shape]`, one stream per key `[B]` and seed (0 to 2^64 - 1).

    A number depends on its key, the seed, its place in the last axis (a draw) and its place in the axes before
    (a token), but not on their sizes.
    """
    tokens, draws = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
    blocks = -(-draws // 2)
    counter = (
        np.arange(blocks, dtype=np.uint64),
        np.arange(tokens, dtype=np.uint64)[:, None],
        np.uint64(seed) & _LOW,
        np.uint64(seed) >> _WORD,
    )
    w0, w1, w2, w3 = philox(keys[:, None, None], counter)
    high, low = np.stack([w0, w2], axis=-1), np.stack([w1, w3], axis=-1)
    mantissa = (high << np.uint64(21)) | (low >> np.uint64(11))
    return (mantissa.reshape(len(keys), tokens, 2 * blocks)[..., :draws] * 2.0**-53).reshape(len(keys), *shape)


def derived_seed(seed: int, name: int | str) -> int:
    """Another seed for each name, from 0 to 2^64 - 1: streams of one seed that have nothing to do with each other."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def philox(keys: NDArray[np.uint64], counter: tuple[NDArray[np.uint64] | np.uint64, ...]) -> list[NDArray[np.uint64]]:
    """Four 32-bit words (each in a uint64) of 64-bit keys and a counter of four 32-bit words; all broadcast."""
    shape = np.broadcast_shapes(keys.shape, *(np.shape(word) for word in counter))
    c0, c1, c2, c3 = (np.broadcast_to(word, shape) for word in counter)
    k0, k1 = keys & _LOW, keys >> _WORD
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1 & _LOW, (p0 >> _WORD) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]
