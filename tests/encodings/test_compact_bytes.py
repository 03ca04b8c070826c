"""Bytes per row of the `compact` profile, compressed as a store compresses its chunks; ids uniformly random (worst)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numcodecs import blosc

from kdpipe.encodings import Sampled, TopK
from kdpipe.encodings.class_ids import stored_ids
from kdpipe.store.layout import CHUNK_BYTES, COMPRESSION, CRC_BYTES, MAX_CHUNK_ROWS


def chunk_bytes_per_row(array: np.ndarray) -> float:
    """Compressed bytes of an array's chunks, each with its checksum."""
    rows = max(1, min(MAX_CHUNK_ROWS, CHUNK_BYTES * len(array) // array.nbytes))
    settings = (COMPRESSION["cname"].encode(), COMPRESSION["clevel"], blosc.SHUFFLE, COMPRESSION["blocksize"])
    chunks = [np.ascontiguousarray(array[start : start + rows]) for start in range(0, len(array), rows)]
    return sum(len(blosc.compress(chunk, *settings)) + CRC_BYTES for chunk in chunks) / len(array)


def language_model(num_tokens: int, vocabulary: int, seed: int) -> torch.Tensor:
    """A teacher whose log-probs fall with the log of the rank, about 3.2 nats at 131,072 tokens."""
    random = torch.Generator().manual_seed(seed)
    slope = 0.9 + 1.3 * torch.rand(num_tokens, 1, generator=random)
    logits = -1.3 * slope * torch.log(torch.arange(vocabulary) + 3.0)
    logits = logits + 0.8 * torch.randn(num_tokens, vocabulary, generator=random)
    return torch.stack([row[torch.randperm(vocabulary, generator=random)] for row in logits])


@pytest.mark.parametrize(
    ("k", "num_classes", "budget"), [(64, 50304, 170), (64, 151936, 186), (128, 151936, 340), (100, 21841, 238)]
)
def test_topk(k, num_classes, budget):
    num_tokens = 4096
    encoding = TopK(k=k, values="int8", temperatures=(1, 2, 4), compact=True)
    parts = [encoding.encode(language_model(512, 4000, seed)) for seed in range(num_tokens // 512)]
    arrays = {suffix: np.concatenate([part[suffix] for part in parts]) for suffix in parts[0]}
    random = np.random.default_rng(0)
    ids = np.stack([np.sort(random.choice(num_classes, k, replace=False)) for _ in range(num_tokens)])
    arrays |= stored_ids(torch.from_numpy(ids), num_classes, compact=True)
    assert sum(chunk_bytes_per_row(array) for array in arrays.values()) <= budget


@pytest.mark.parametrize(
    ("encoding", "budget"),
    [(Sampled(draws=50, compact=True), 54), (Sampled(draws=8, head=12, compact=True), 64)],
    ids=["50 draws", "head 12, 8 draws"],
)
def test_sampled(encoding, budget):
    """A few hundred tokens: a chunk of thousands takes 2 to 3 bytes less."""
    keys = np.arange(256, dtype=np.uint64)
    parts = [encoding.encode(language_model(64, 131072, seed), keys[64 * seed :][:64]) for seed in range(4)]
    arrays = {suffix: np.concatenate([part[suffix] for part in parts]) for suffix in parts[0]}
    assert sum(chunk_bytes_per_row(array) for array in arrays.values()) <= budget
