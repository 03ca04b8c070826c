"""Batches of rows for training: inputs, labels and targets in step, in an order that depends on (seed, epoch) only.

Shapes: N rows, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdpipe.data.columns import Columns
from kdpipe.data.prepared import MISSING_LABEL, PreparedInputs
from kdpipe.errors import ConfigError
from kdpipe.inputs import Inputs, changed, tensors_of
from kdpipe.order import BatchOrder, Group, Shuffle
from kdpipe.preprocess import Preprocess
from kdpipe.targets import Targets
from kdpipe.views import Shown, ViewSpec

RAM_BUDGET_BYTES = 512 * 2**20

TargetsByOutput = Mapping[str, Targets]


class TargetReader(Protocol):
    """Targets by prepared row number."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as stored."""

    def read(self, rows: NDArray[np.int64], view: int = 0) -> TargetsByOutput:
        """Targets of each output for row numbers `[B]`."""

    def read_ahead(self, groups: Iterable[tuple[int, Group]]) -> Iterator[TargetsByOutput]:
        """Targets of every batch of groups of (view, row numbers), in their order."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows: their numbers, model inputs `[B, …]`, labels and targets by teacher and output.

    Labels are `[B]`, or `[B, T]` of tokens; -1: there is none. Where a view mixes rows, `other_labels [B]` are those of
    the partners, and `share [B]` is what of each row is its own.
    """

    rows: NDArray[np.int64]
    inputs: Inputs
    labels: Tensor
    targets: Mapping[str, TargetsByOutput] = field(default_factory=dict)
    other_labels: Tensor | None = None
    share: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, rows: slice) -> Batch:
        """Some of the batch's rows."""
        targets = {
            teacher: {name: each[rows] for name, each in outputs.items()} for teacher, outputs in self.targets.items()
        }
        inputs = changed(self.inputs, lambda each: each[rows])
        other_labels = None if self.other_labels is None else self.other_labels[rows]
        share = None if self.share is None else self.share[rows]
        return Batch(
            rows=self.rows[rows],
            inputs=inputs,
            labels=self.labels[rows],
            targets=targets,
            other_labels=other_labels,
            share=share,
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        targets = {
            teacher: {name: each.to(device) for name, each in outputs.items()}
            for teacher, outputs in self.targets.items()
        }
        inputs = changed(self.inputs, lambda each: each.to(device, non_blocking=True))
        labels = self.labels.to(device, non_blocking=True)
        other_labels = None if self.other_labels is None else self.other_labels.to(device, non_blocking=True)
        share = None if self.share is None else self.share.to(device, non_blocking=True)
        return Batch(
            rows=self.rows, inputs=inputs, labels=labels, targets=targets, other_labels=other_labels, share=share
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a model learns from: which rows, as what input, with which labels and targets.

    `labels [len(inputs)]` by row number, -1 where the model must not know it. Where `token_labels` is given, it makes
    the labels `[B, T]` of rows that the model may know; `views` that mix rows do not go with it (`ConfigError`).
    """

    inputs: PreparedInputs
    rows: NDArray[np.int64]
    preprocess: Preprocess
    labels: NDArray[np.int64]
    targets: Mapping[str, TargetReader] = field(default_factory=dict)
    views: ViewSpec = field(default_factory=ViewSpec)
    token_labels: Callable[[Columns], NDArray[np.int64]] | None = None

    def __post_init__(self) -> None:
        if self.views.count and self.views.mixes and self.token_labels is not None:
            raise ConfigError(f"{self.views.where} mixes rows, and labels of tokens cannot be mixed; leave it out")

    def batch(self, rows: NDArray[np.int64], view: int = 0) -> Batch:
        """The given rows as a batch."""
        shown = self._shown(rows, view)
        partners, share = shown.partners, shown.share
        return Batch(
            rows=rows,
            inputs=self.preprocess(shown.columns),
            labels=torch.from_numpy(self.labels_of(rows, shown.columns)),
            targets={teacher: reader.read(rows, view) for teacher, reader in self.targets.items()},
            other_labels=None if partners is None else torch.from_numpy(self.labels[partners]),
            share=None if share is None else torch.from_numpy(share).float(),
        )

    def _shown(self, rows: NDArray[np.int64], view: int) -> Shown:
        if view == 0:  # nothing is drawn, so ids are not read
            return Shown(columns=self.inputs.read(rows))
        return self.views.read(self.inputs.read, self.inputs.sample_ids, rows, view)

    def labels_of(self, rows: NDArray[np.int64], columns: Columns) -> NDArray[np.int64]:
        """Labels of the given rows `[B]`, or of their tokens `[B, T]`; `columns` is what the rows hold."""
        labels = self.labels[rows]
        if self.token_labels is None:
            return labels
        return np.where(labels[:, np.newaxis] == MISSING_LABEL, MISSING_LABEL, self.token_labels(columns))


class BatchStream:
    """An endless, resumable sequence of batches over `rows`; the last batch of an epoch may be smaller.

    Step s is the same whatever the number of loader workers. Under torchrun every rank gets its share of each batch.
    Rows without augmented views that come more than once and fit `ram_budget_bytes` are kept ready in memory, or on
    `device` when one is given; of others the inputs are loaded by workers, and targets are read ahead in pools.
    """

    def __init__(
        self,
        rows: Rows,
        order: BatchOrder,
        *,
        num_workers: int = 0,
        ram_budget_bytes: int = RAM_BUDGET_BYTES,
        device: torch.device | None = None,
    ) -> None:
        """`order` says which of `rows` come when; a budget of 0 keeps nothing but what is read ahead.

        Raises `ConfigError` when `device` is asked and rows do not fit, or the budget is too small to read ahead.
        """
        self.steps_per_epoch = order.steps_per_epoch
        self._rows, self._order, self._num_workers = rows, order, num_workers
        self._ram_budget_bytes, self._device = ram_budget_bytes, device
        self._ready: _ReadyRows | None = None

    def from_step(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of steps `[first, last)`."""
        ready = self._ready or self._keep_ready(last - first)
        if ready is not None:
            return (ready.batch(rows) for _, rows in self.plan(first, last))
        return self._stream(first, last)

    def plan(self, first: int, last: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(view, row numbers) of steps `[first, last)`, for this rank."""
        for view, group in self._groups(first, last):
            for rows in group.batches:
                yield view, rows

    def _groups(self, first: int, last: int) -> Iterator[tuple[int, Group]]:
        for group in self._order.groups(first, last):
            yield self._rows.views.view_of_epoch(group.epoch), group

    def _keep_ready(self, num_steps: int) -> _ReadyRows | None:
        rows = self._rows
        once = self._device is None and num_steps <= self.steps_per_epoch and self._reads_ahead()
        if rows.views.count == 0 and len(rows.rows) and not once:
            needed = _num_bytes(rows.batch(rows.rows[:1])) * len(rows.rows)
            if needed <= self._ram_budget_bytes:
                self._ready = _ReadyRows(rows, self._device)
        if self._device is not None and self._ready is None:
            raise ConfigError(
                f"keeping {len(rows.rows):,} rows on the device was asked, but they have views or do not fit the "
                f"budget of {self._ram_budget_bytes:,} bytes. Raise ram_budget_mb, or leave keep_on_device out."
            )
        return self._ready

    @property
    def _row_bytes(self) -> int:
        return sum(reader.row_bytes for reader in self._rows.targets.values())

    def _reads_ahead(self) -> bool:
        return self._order.bytes_ahead(self._row_bytes) <= self._ram_budget_bytes

    def _stream(self, first: int, last: int) -> Iterator[Batch]:
        if self._ram_budget_bytes:
            self._order.check_budget(self._row_bytes, self._ram_budget_bytes)
        without_targets = replace(self._rows, targets={})
        loader: DataLoader[Batch] = DataLoader(
            _BatchesOf(without_targets),
            sampler=_Steps(self, first, last),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
            generator=torch.Generator().manual_seed(0),
        )
        names = list(self._rows.targets)
        readers = [reader.read_ahead(self._groups(first, last)) for reader in self._rows.targets.values()]
        for batch, *said in zip(loader, *readers, strict=True):
            yield replace(batch, targets=dict(zip(names, said, strict=True)))


class _Steps:
    """A DataLoader sampler whose items are (view, row numbers)."""

    def __init__(self, stream: BatchStream, first: int, last: int) -> None:
        self._stream, self._first, self._last = stream, first, last

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        return self._stream.plan(self._first, self._last)

    def __len__(self) -> int:
        return self._last - self._first


class _BatchesOf(Dataset[Batch]):
    """Batches by (view, row numbers)."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __getitem__(self, item: Any) -> Batch:
        view, rows = item
        return self._rows.batch(rows, view)


class _ReadyRows:
    """Every row as one batch, in memory or on a device."""

    def __init__(self, rows: Rows, device: torch.device | None) -> None:
        ready = rows.batch(rows.rows)
        self._ready = ready if device is None else ready.to(device)
        self._position = np.full(len(rows.inputs), -1, np.int64)
        self._position[rows.rows] = np.arange(len(rows.rows))

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """Some of the rows."""
        ready = self._ready
        position = torch.from_numpy(self._position[rows]).to(ready.labels.device)
        targets = {
            teacher: {name: each[position] for name, each in outputs.items()}
            for teacher, outputs in ready.targets.items()
        }
        inputs = changed(ready.inputs, lambda each: each[position])
        return Batch(rows=rows, inputs=inputs, labels=ready.labels[position], targets=targets)


def shuffle_of(readers: Iterable[TargetReader]) -> Shuffle:
    """How far rows are moved, so that pools of these targets fit in memory; the same for every arm of a comparison."""
    return Shuffle.for_row_bytes(sum(reader.row_bytes for reader in readers))


def _num_bytes(batch: Batch) -> int:
    tensors = [*tensors_of(batch.inputs), batch.labels]
    parts = [part for outputs in batch.targets.values() for each in outputs.values() for part in vars(each).values()]
    return sum(each.nbytes for each in [*tensors, *parts] if isinstance(each, Tensor))


def _as_it_is(batch: Any) -> Any:
    return batch
