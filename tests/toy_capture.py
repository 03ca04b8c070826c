"""Rows in memory, and teachers that cost nothing, for captures without prepared data and without stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns, Ragged, take
from kdpipe.data.segments import content_digests
from kdpipe.encodings import Dense, Features
from kdpipe.store import TargetStore
from kdpipe.store.manifest import Manifest
from kdpipe.targets import OutputSpec

NUM_CLASSES = 5
NUM_FEATURES = 4
LOGITS = OutputSpec(name="logits", shape=(NUM_CLASSES,))


class MemoryRows:
    """What `capture` needs of prepared inputs; row k has the id `k`, k as its first feature, and k mod 3 words k."""

    def __init__(self, num_rows: int) -> None:
        features = np.random.default_rng(0).normal(size=(num_rows, NUM_FEATURES)).astype(np.float32)
        features[:, 0] = np.arange(num_rows)
        numbers, counts = np.arange(num_rows), np.arange(num_rows) % 3
        words = Ragged(values=np.repeat(numbers, counts), offsets=np.concatenate([[0], np.cumsum(counts)]))
        self.columns = {"features": features, "words": words}
        self.sample_ids = np.array([f"{index:06d}" for index in range(num_rows)])
        digests = content_digests(self.columns)
        self.digests = np.frombuffer(b"".join(digests), np.uint8).reshape(num_rows, -1)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def read(self, rows: NDArray[np.int64]) -> Columns:
        return {name: take(column, rows) for name, column in self.columns.items()}


class ToyTeacher:
    """Logits from a fixed matrix; `change` may replace what it says, given the batch's row numbers `[B]`."""

    def __init__(
        self,
        change: Callable[[dict[str, Tensor], Tensor], Mapping[str, Tensor]] = lambda said, _: said,
        outputs: tuple[OutputSpec, ...] = (LOGITS,),
        abstains: bool = False,
    ) -> None:
        self.outputs, self.abstains, self._change = outputs, abstains, change
        self.fingerprint: dict[str, Any] = {"teacher": "toy"}
        self._weights = torch.randn(NUM_FEATURES, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
        self.shown: list[int] = []

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        features = torch.from_numpy(np.asarray(columns["features"]))
        rows = features[:, 0].long()
        assert [set(columns["words"].row(index)) for index in range(len(rows))] == [
            {k} if k % 3 else set() for k in rows.tolist()
        ]
        self.shown += rows.tolist()
        return dict(self._change({"logits": features[:, 1:] @ self._weights[1:]}, rows))


def manifest_for(teacher: ToyTeacher, shard_rows: int) -> Manifest:
    """float16 for every output."""
    encodings = {each.name: (Dense() if each.kind == "logits" else Features()).to_json() for each in teacher.outputs}
    return Manifest(
        ingredients={"teacher": "toy"},
        outputs=teacher.outputs,
        encodings=encodings,
        temperatures=[1.0],
        num_classes=NUM_CLASSES,
        class_names=None,
        shard_rows=shard_rows,
        coverage=teacher.abstains,
    )


def store_for(
    folder: Path, teacher: ToyTeacher, rows: MemoryRows, shard_rows: int = 16, num_views: int = 1
) -> TargetStore:
    """A new store, or one to go on with."""
    return TargetStore.create(folder, manifest_for(teacher, shard_rows), rows.sample_ids, rows.digests, num_views)
