"""Simulated teachers, and students near them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

NEAR = "0.8 z + N(0, 1)"
BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Said:
    """Teacher logits `[B, C]`, and students' of the same rows by name."""

    logits: Tensor
    students: Callable[[], Mapping[str, Tensor]] = dict


def image_classes(num_rows: int, num_classes: int, own: float, sharpness: float) -> Iterator[Said]:
    """Random features near one of C random prototypes, whose products with all prototypes are the logits."""
    random = torch.Generator().manual_seed(0)
    prototypes = torch.randn(num_classes, 64, generator=random) / 8
    for start in range(0, num_rows, BATCH_ROWS):
        rows = min(BATCH_ROWS, num_rows - start)
        nearest = torch.randint(num_classes, (rows,), generator=random)
        features = own * prototypes[nearest] + torch.randn(rows, 64, generator=random) / 8
        yield Said(logits=sharpness * features @ prototypes.T)


def next_words(num_tokens: int, vocabulary: int) -> Iterator[Said]:
    """Logits that fall with the log of the rank, ids uniformly random (the worst case); about 3.3 nats at 131,072."""
    random = torch.Generator().manual_seed(0)
    falling = -1.3 * torch.log(torch.arange(vocabulary) + 3.0)
    for start in range(0, num_tokens, BATCH_ROWS):
        rows = min(BATCH_ROWS, num_tokens - start)
        slope = 0.9 + 1.3 * torch.rand(rows, 1, generator=random)
        ranked = slope * falling + 0.8 * torch.randn(rows, vocabulary, generator=random)
        logits = torch.stack([row[torch.randperm(vocabulary, generator=random)] for row in ranked])
        yield Said(logits=logits, students=partial(nearby, logits, seed=start))


def nearby(logits: Tensor, seed: int) -> dict[str, Tensor]:
    """A student whose logits are the teacher's, shrunk and disturbed."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(10_000 + seed))
    return {NEAR: 0.8 * logits + noise}
