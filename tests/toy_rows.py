"""Small prepared rows on disk, and a teacher whose words are a function of the row's content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.batches import BatchStream, Rows
from kdpipe.data.columns import Columns
from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.distributed import rank, world_size
from kdpipe.encodings import Dense
from kdpipe.losses import ForwardKL, LossTerm
from kdpipe.order import BatchOrder, Group, Shuffle
from kdpipe.store import TargetStore
from kdpipe.store.manifest import Manifest
from kdpipe.targets import DenseTargets, OutputSpec
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.terms import DistillTerm, LabelTerm, TrainingTerm

NUM_CLASSES = 5
NUM_FEATURES = 4
LOGITS = OutputSpec(name="logits", shape=(NUM_CLASSES,))
TASK = TabularClassification(num_classes=NUM_CLASSES, columns=[f"x{column}" for column in range(NUM_FEATURES)])


class Blocks:
    """A source of one Arrow table."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def batches(self) -> Iterator[pa.RecordBatch]:
        return iter(self._table.to_batches(max_chunksize=64))


class Features:
    """A preprocess that changes nothing, and counts its calls."""

    def __init__(self, dtype: type = np.float32) -> None:
        self.calls = 0
        self._dtype = dtype

    def fit(self, blocks: Iterable[Columns]) -> None:
        pass

    def state(self) -> dict[str, list[float]]:
        return {}

    def load_state(self, state: object) -> None:
        pass

    def __call__(self, columns: Columns) -> Tensor:
        self.calls += 1
        return torch.from_numpy(np.array(columns["features"], self._dtype))


def prepared(folder: Path, num_rows: int, segments: Sequence[int] = ()) -> PreparedData:
    """Rows with id `k` and features `k`, then noise; label `k mod C`, none where k is a multiple of 4.

    The folder grows through `segments` (row counts) to `num_rows`.
    """
    noise = np.random.default_rng(0).normal(size=(num_rows, NUM_FEATURES)).astype(np.float32)
    noise[:, 0] = np.arange(num_rows)
    table = pa.table(
        {
            "id": pa.array(range(num_rows)),
            "label": pa.array([None if key % 4 == 0 else key % NUM_CLASSES for key in range(num_rows)], pa.int64()),
            "split": pa.array(["train"] * num_rows),
            **{f"x{column}": pa.array(noise[:, column]) for column in range(NUM_FEATURES)},
        }
    )
    schema = RowSchema(to_inputs=TASK.to_inputs, to_labels=TASK.to_labels)
    columns = SourceColumns(id="id", label="label", split="split")
    for stop in (*segments, num_rows):
        prepare(Blocks(table.slice(0, stop)), schema, columns, SplitPlan(), folder)
    return PreparedData(folder)


def key_of(sample_id: str) -> int:
    """The number that a row's id and first feature hold."""
    return int(sample_id.partition("-")[0])


def said(keys: NDArray[np.int64], view: int = 0) -> Tensor:
    """The teacher's logits `[B, C]`: argmax `(3k + 1) mod C`, row maximum `k / 4 + 4096 view`; exact in float16."""
    key = torch.from_numpy(np.asarray(keys, np.int64))
    places_behind = (torch.arange(NUM_CLASSES) - (3 * key + 1).unsqueeze(-1)) % NUM_CLASSES
    return (key / 4 + 4096 * view - places_behind.T * (1 + key % 7 / 8)).T


def store_of(folder: Path, data: PreparedData, seed: int, num_views: int = 1) -> TargetStore:
    """A complete store of what `said` says about all rows, with its rows in an order of its own."""
    manifest = Manifest(
        ingredients={"teacher": "toy"},
        outputs=[LOGITS],
        encodings={"logits": Dense().to_json()},
        temperatures=[1.0],
        num_classes=NUM_CLASSES,
        class_names=None,
        shard_rows=16,
    )
    order = np.random.default_rng(seed).permutation(len(data.inputs))
    ids = data.inputs.sample_ids[order]
    store = TargetStore.create(folder, manifest, ids, data.inputs.digests[order], num_views)
    keys = np.array([key_of(each) for each in ids])
    for view, shard in store.missing():
        arrays = Dense().encode(said(keys[shard.start : shard.stop], view))
        named = {f"logits{suffix}": values for suffix, values in arrays.items()}
        store.write(view, shard, {**named, "statistics": np.zeros((shard.num_rows, 3), np.float32)}, batch_size=16)
    store.finish()
    return TargetStore.open(folder)


class RandomTeacher:
    """A `TargetReader` of random float64 logits by row number."""

    def __init__(self, num_rows: int) -> None:
        logits = torch.randn(num_rows, NUM_CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        row_max = (3 * logits).amax(dim=-1)
        self.targets = DenseTargets(values=3 * logits - row_max.unsqueeze(-1), row_max=row_max)

    row_bytes = 8 * (NUM_CLASSES + 1)

    def read(self, rows: NDArray[np.int64], view: int = 0) -> dict[str, DenseTargets]:
        return {"logits": self.targets[torch.from_numpy(rows)]}

    def read_ahead(self, groups: Iterable[tuple[int, Group]]) -> Iterator[dict[str, DenseTargets]]:
        return (self.read(rows, view) for view, group in groups for rows in group.batches)


def lesson(data: PreparedData, num_labelled: int | None = None, dtype: type = np.float64) -> Rows:
    """Rows to learn from, with a random teacher; labels of the first `num_labelled` labelled rows (null: of all)."""
    labels = np.full_like(data.labels, -1)
    known = np.flatnonzero(data.labels >= 0)[:num_labelled]
    labels[known] = data.labels[known]
    teacher = RandomTeacher(len(data.inputs))
    rows = data.rows_of(["train"])
    return Rows(inputs=data.inputs, rows=rows, preprocess=Features(dtype), labels=labels, targets={"teacher": teacher})


def stream_of(
    rows: Rows,
    batch_size: int,
    seed: int = 0,
    *,
    ranks: tuple[int, int] | None = None,
    shuffle: Shuffle | None = None,
    **held: Any,
) -> BatchStream:
    """This process's share of the batches, or that of `ranks` (rank, world size)."""
    which, of = ranks or (rank(), world_size())
    order = BatchOrder(
        rows=rows.rows, batch_size=batch_size, seed=seed, shuffle=shuffle or Shuffle(), rank=which, world_size=of
    )
    return BatchStream(rows, order, **held)


def label_term(weight: float = 1.0) -> TrainingTerm:
    """Cross-entropy on labels."""
    return LabelTerm(loss=TASK.label_loss, weight=weight)


def distill_term(weight: float = 1.0, temperature: float = 2.0) -> TrainingTerm:
    """Forward KL from the random teacher."""
    loss = ForwardKL(temperature=temperature)
    return DistillTerm(term=LossTerm(teacher="teacher", output="logits", loss=loss, weight=weight))
