"""Batches of rows for training: inputs, labels and targets in step, in an order that depends on (seed, epoch) only.

Shapes: N rows, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdpipe.data.prepared import PreparedInputs
from kdpipe.preprocess import Preprocess
from kdpipe.targets import Targets
from kdpipe.views import ViewSpec

BLOCK_ROWS = 1024
BUFFER_BLOCKS = 16
RAM_BUDGET_BYTES = 512 * 2**20

TargetsByOutput = Mapping[str, Targets]


class TargetReader(Protocol):
    """Targets by prepared row number."""

    def read(self, rows: NDArray[np.int64], view: int = 0) -> TargetsByOutput:
        """Targets of each output for row numbers `[B]`."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows: their numbers, model input `[B, …]`, labels `[B]` (-1: none) and targets by teacher and output."""

    rows: NDArray[np.int64]
    inputs: Tensor
    labels: Tensor
    targets: Mapping[str, TargetsByOutput] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, rows: slice) -> Batch:
        """Some of the batch's rows."""
        targets = {
            teacher: {name: each[rows] for name, each in outputs.items()} for teacher, outputs in self.targets.items()
        }
        return Batch(rows=self.rows[rows], inputs=self.inputs[rows], labels=self.labels[rows], targets=targets)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        targets = {
            teacher: {name: each.to(device) for name, each in outputs.items()}
            for teacher, outputs in self.targets.items()
        }
        inputs, labels = self.inputs.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return Batch(rows=self.rows, inputs=inputs, labels=labels, targets=targets)


def shuffled(rows: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of `rows` that reads files in blocks: blocks shuffled, then rows inside a buffer of blocks."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    num_blocks = -(-len(rows) // BLOCK_ROWS)
    blocks = generator.permutation(num_blocks)
    parts = []
    for start in range(0, num_blocks, BUFFER_BLOCKS):
        buffer = [
            rows[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS] for block in blocks[start : start + BUFFER_BLOCKS]
        ]
        parts.append(generator.permutation(np.concatenate(buffer)))
    return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a model learns from: which rows, as what input, with which labels and targets.

    `labels [len(inputs)]` by row number, -1 where the model must not know it.
    """

    inputs: PreparedInputs
    rows: NDArray[np.int64]
    preprocess: Preprocess
    labels: NDArray[np.int64]
    targets: Mapping[str, TargetReader] = field(default_factory=dict)
    views: ViewSpec = field(default_factory=ViewSpec)

    def batch(self, rows: NDArray[np.int64], view: int = 0) -> Batch:
        """The given rows as a batch."""
        return Batch(
            rows=rows,
            inputs=self.preprocess(self.inputs.read(rows)),
            labels=torch.from_numpy(self.labels[rows]),
            targets={teacher: reader.read(rows, view) for teacher, reader in self.targets.items()},
        )


class BatchStream:
    """An endless, resumable sequence of batches over `rows`; the last batch of an epoch may be smaller.

    Step s is the same whatever the number of loader workers. Under torchrun every rank gets its share of each batch.
    Rows without augmented views are kept ready in memory when they fit `RAM_BUDGET_BYTES`.
    """

    def __init__(
        self, rows: Rows, *, batch_size: int, seed: int, num_workers: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.steps_per_epoch = -(-len(rows.rows) // batch_size)
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._num_workers, self._rank, self._world_size = num_workers, rank, world_size

    def from_step(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of steps `[first, last)`."""
        loader: DataLoader[Batch] = DataLoader(
            _ReadyRows(self._rows),
            sampler=_Steps(self, first, last),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
            generator=torch.Generator().manual_seed(0),
        )
        return iter(loader)

    def plan(self, first: int, last: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(view, row numbers) of steps `[first, last)`, for this rank."""
        epoch, order = -1, self._rows.rows
        for step in range(first, last):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = shuffled(self._rows.rows, self._seed, epoch)
            start = (step % self.steps_per_epoch) * self._batch_size
            batch = order[start : start + self._batch_size]
            yield self._rows.views.view_of_epoch(epoch), batch[self._rank :: self._world_size]


class _Steps:
    """A DataLoader sampler whose items are (view, row numbers)."""

    def __init__(self, stream: BatchStream, first: int, last: int) -> None:
        self._stream, self._first, self._last = stream, first, last

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        return self._stream.plan(self._first, self._last)

    def __len__(self) -> int:
        return self._last - self._first


class _ReadyRows(Dataset[Batch]):
    """Batches by (view, row numbers), from memory when all rows fit it and have no augmented views."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._ready: Batch | None = None
        self._position = np.empty(0, np.int64)
        if rows.views.count == 0 and len(rows.rows):
            probe = rows.batch(rows.rows[:1])
            if _num_bytes(probe) * len(rows.rows) <= RAM_BUDGET_BYTES:
                self._ready = rows.batch(rows.rows)
                self._position = np.full(len(rows.inputs), -1, np.int64)
                self._position[rows.rows] = np.arange(len(rows.rows))

    def __getitem__(self, item: Any) -> Batch:
        view, rows = item
        if self._ready is None:
            return self._rows.batch(rows, view)
        position = torch.from_numpy(self._position[rows])
        ready = self._ready
        return Batch(
            rows=rows,
            inputs=ready.inputs[position],
            labels=ready.labels[position],
            targets={
                teacher: {name: each[position] for name, each in outputs.items()}
                for teacher, outputs in ready.targets.items()
            },
        )


def _num_bytes(batch: Batch) -> int:
    tensors = [batch.inputs, batch.labels]
    tensors += [part for outputs in batch.targets.values() for each in outputs.values() for part in vars(each).values()]
    return sum(each.nbytes for each in tensors)


def _as_it_is(batch: Any) -> Any:
    return batch
