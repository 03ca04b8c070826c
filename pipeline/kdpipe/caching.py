"""The hot loop: missing shards -> rows -> teacher -> encoding -> store.

The caller's thread runs the teacher; a loader thread reads and checks the batches ahead of it, a writer thread encodes
and commits the shards behind it. Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns, Ragged, take
from kdpipe.data.prepared import ANEW, PreparedInputs
from kdpipe.data.segments import content_digests
from kdpipe.distributed import Shard
from kdpipe.encodings import Sampled, encoding_from_json
from kdpipe.errors import ConfigError, DataError, TeacherError
from kdpipe.store import TargetStore
from kdpipe.store.statistics import teacher_statistics
from kdpipe.targets import OutputSpec
from kdpipe.teachers.base import COVERED, LOGITS, Teacher
from kdpipe.views import CLEAN, ViewSpec, row_keys

LOAD_AHEAD = 2
"""Blocks of batches that are read before the teacher wants them."""
LOAD_BYTES = 2**18
"""A block: as many batches of one shard as have so many bytes, or one. To wake a thread for less costs more."""
ENCODE_BYTES = 2**20
"""What the teacher said is encoded when it is so much, or when its shard ends: many small steps cost more."""
MAX_WAITING_BYTES = 64 * 2**20
"""What may wait to be encoded; one batch is always taken."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of `count` workers' part of a store: every shard whose index modulo `count` is `index`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """`i/n`, with 0 <= i < n. Raises `ConfigError`."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ConfigError(
                f"--shards is {text!r}; expected i/n with 0 <= i < n: 0/2 for one worker, 1/2 for another"
            )
        return cls(index=int(index), count=int(count))

    def has(self, shard: Shard) -> bool:
        """Whether a shard is this worker's."""
        return shard.index % self.count == self.index


WHOLE = Share()
"""Every shard: the part of somebody who works alone."""


@dataclass(frozen=True, kw_only=True)
class CacheProgress:
    """Where a capture stands; rows are counted once per view."""

    rows_done: int
    rows_total: int
    rows_per_s: float


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What a capture did: rows that the teacher saw, and the seconds of its passes and of everything.

    On a GPU, a pass ends when its kernels are queued.
    """

    num_rows: int
    num_shards: int
    teacher_seconds: float
    seconds: float


def capture(
    store: TargetStore,
    teacher: Teacher,
    inputs: PreparedInputs,
    batch_size: int,
    on_progress: Callable[[CacheProgress], None] = lambda _: None,
    share: Share = WHOLE,
    views: ViewSpec = CLEAN,
) -> Captured:
    """Compute and commit every missing shard of a store, or those of one share.

    In an augmented view the teacher sees the rows that the store wants there, as `views` shows them.

    A batch never crosses a shard, so that a resumed capture gives the bytes of an uninterrupted one. Raises
    `TeacherError` naming samples when the teacher says NaN or +inf, `DataError` when a row's content is not the one
    that its digest names; what was committed stays. At most two shards are in work: one that is computed, one that is
    committed.
    """
    missing = [(view, shard) for view, shard in store.missing() if share.has(shard)]
    batches = _batches(store, missing, batch_size)
    total = sum(int(store.wanted(view, shard).sum()) for view, shard in missing)
    started, teacher_seconds, done = time.perf_counter(), 0.0, 0
    with _torch_thread("loader") as loading, _torch_thread("writer") as writing:
        writer = _Writer(store, inputs.sample_ids, batch_size, writing)
        for batch, columns in _Loader(inputs, views, loading).read(batches):
            before = time.perf_counter()
            said = teacher.predict(columns) if len(batch.rows) else {}
            teacher_seconds += time.perf_counter() - before
            writer.put(batch, said)
            done += len(batch.rows)
            rate = done / (time.perf_counter() - started)
            on_progress(CacheProgress(rows_done=done, rows_total=total, rows_per_s=rate))
        writer.finish()
    seconds = time.perf_counter() - started
    return Captured(num_rows=done, num_shards=len(missing), teacher_seconds=teacher_seconds, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows of one shard, ascending, for one view; none at all where a view wants none of the shard."""

    view: int
    shard: Shard
    rows: NDArray[np.int64]
    is_first: bool
    is_last: bool

    @property
    def place(self) -> NDArray[np.int64]:
        """Where its rows lie in the shard."""
        return self.rows - self.shard.start

    def is_beside(self, other: _Batch) -> bool:
        """Whether both are of the same shard and view."""
        return (self.view, self.shard.index) == (other.view, other.shard.index)

    @staticmethod
    def joined(batches: Sequence[_Batch]) -> _Batch:
        """Batches that follow each other in one shard, as one."""
        rows = np.concatenate([each.rows for each in batches])
        return replace(batches[0], rows=rows, is_last=batches[-1].is_last)


def _batches(store: TargetStore, missing: Sequence[tuple[int, Shard]], batch_size: int) -> Iterator[_Batch]:
    for view, shard in missing:
        wanted = shard.start + np.flatnonzero(store.wanted(view, shard))
        for start in range(0, max(1, len(wanted)), batch_size):
            stop = start + batch_size
            yield _Batch(
                view=view,
                shard=shard,
                rows=wanted[start:stop],
                is_first=start == 0,
                is_last=stop >= len(wanted),
            )


class _Loader:
    """Reads batches; its thread reads the next ones while the caller works."""

    def __init__(self, inputs: PreparedInputs, views: ViewSpec, thread: Executor) -> None:
        self._inputs, self._views, self._thread = inputs, views, thread
        self._batches_per_block = 1

    def read(self, batches: Iterable[_Batch]) -> Iterator[tuple[_Batch, Columns]]:
        """Batches with their rows, in order."""
        loading: deque[Future[list[tuple[_Batch, Columns]]]] = deque()
        for block in self._blocks(batches):
            loading.append(self._thread.submit(self._load, block))
            if len(loading) > LOAD_AHEAD:
                yield from loading.popleft().result()
        while loading:
            yield from loading.popleft().result()

    def _blocks(self, batches: Iterable[_Batch]) -> Iterator[list[_Batch]]:
        block: list[_Batch] = []
        for batch in batches:
            block.append(batch)
            if batch.is_last or len(block) >= self._batches_per_block:
                yield block
                block = []

    def _load(self, block: list[_Batch]) -> list[tuple[_Batch, Columns]]:
        whole = _Batch.joined(block)
        if not len(whole.rows):
            return [(batch, {}) for batch in block]
        columns = self._inputs.read(whole.rows)
        self._refuse_damaged(columns, whole.rows)
        num_bytes = sum((each.values if isinstance(each, Ragged) else each).nbytes for each in columns.values())
        self._batches_per_block = max(1, LOAD_BYTES * len(block) // max(1, num_bytes))
        shown = self._views.of(columns, self._inputs.sample_ids[whole.rows].tolist(), whole.view)
        starts = np.cumsum([0, *(len(batch.rows) for batch in block)]).tolist()
        places = [np.arange(start, stop) for start, stop in pairwise(starts)]
        return [
            (batch, {name: take(column, place) for name, column in shown.items()})
            for batch, place in zip(block, places, strict=True)
        ]

    def _refuse_damaged(self, columns: Columns, rows: NDArray[np.int64]) -> None:
        """Targets are committed under the rows' digests, so the teacher must see exactly that content."""
        found = np.frombuffer(b"".join(content_digests(columns)), np.uint8).reshape(len(rows), -1)
        wrong = np.flatnonzero((found != self._inputs.digests[rows]).any(axis=1))
        if len(wrong):
            raise DataError(
                f"the prepared content of {self._inputs.sample_ids[rows[int(wrong[0])]]} differs from its digest "
                f"({len(wrong)} such rows in a batch). {ANEW}"
            )


def _torch_thread(name: str) -> ThreadPoolExecutor:
    """One thread whose tensor operations use as many CPU threads as the caller's: last bits may depend on it."""
    return ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))


class _Said:
    """What the teacher said about batches that follow each other in one shard."""

    def __init__(self) -> None:
        self._batches: list[_Batch] = []
        self._parts: list[dict[str, Tensor]] = []
        self.num_bytes = 0

    def add(self, batch: _Batch, said: dict[str, Tensor]) -> None:
        """Append a batch."""
        self._batches.append(batch)
        self._parts.append(said)
        self.num_bytes += sum(each.nbytes for each in said.values())

    @property
    def last(self) -> _Batch:
        """The latest batch."""
        return self._batches[-1]

    def joined(self) -> tuple[_Batch, dict[str, Tensor]]:
        """All of it as one batch."""
        if len(self._batches) == 1:
            return self._batches[0], self._parts[0]
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        return _Batch.joined(self._batches), tensors


class _Writer:
    """Takes what the teacher says; its thread encodes that into the shard in work, and commits the shard when full."""

    def __init__(self, store: TargetStore, sample_ids: NDArray[np.str_], batch_size: int, thread: Executor) -> None:
        manifest = store.manifest
        self._store, self._sample_ids, self._batch_size, self._thread = store, sample_ids, batch_size, thread
        self._encodings = {each.name: encoding_from_json(manifest.encodings[each.name]) for each in manifest.outputs}
        self._said = _Said()
        self._waiting: deque[tuple[_Said, Future[None]]] = deque()
        # One shard's arrays, used for one shard after the other.
        self._arrays = {
            name: np.empty((manifest.shard_rows, *spec.shape), spec.dtype) for name, spec in manifest.arrays().items()
        }
        self._failed = False

    def put(self, batch: _Batch, said: dict[str, Tensor]) -> None:
        """Hand over what the teacher said. Waits for the writer thread when it is behind; raises what it raised."""
        self._said.add(batch, self._promised(said, len(batch.rows)) if len(batch.rows) else {})
        if batch.is_last or self._said.num_bytes >= ENCODE_BYTES:
            self._waiting.append((self._said, self._thread.submit(self._write, self._said)))
            self._said = _Said()
        while self._waiting and (self._waiting[0][1].done() or self._is_behind()):
            self._waiting.popleft()[1].result()

    def finish(self) -> None:
        """Wait for the last commit."""
        while self._waiting:
            self._waiting.popleft()[1].result()

    def _is_behind(self) -> bool:
        (oldest, _), (newest, _) = self._waiting[0], self._waiting[-1]
        too_much = oldest is not newest and sum(said.num_bytes for said, _ in self._waiting) > MAX_WAITING_BYTES
        return too_much or (newest.last.is_last and not oldest.last.is_beside(newest.last))

    def _promised(self, said: dict[str, Tensor], num_rows: int) -> dict[str, Tensor]:
        """The outputs that the store keeps, in the promised shapes, and `covered` where the teacher abstains."""
        promised = {}
        for output in self._store.manifest.outputs:
            if output.name not in said:
                raise TeacherError(f"the teacher gave no output {output.name!r}; it gave {', '.join(said)}")
            values, expected = said[output.name], (num_rows, *output.shape)
            if values.shape != expected:
                found = f"the teacher's {output.name} have shape {list(values.shape)}"
                raise TeacherError(f"{found}; expected {list(expected)}")
            promised[output.name] = values
        if self._store.manifest.coverage:
            covered, expected = said.get(COVERED), said[LOGITS].shape[:-1]
            if covered is None or covered.dtype != torch.bool or covered.shape != expected:
                found = "none" if covered is None else f"{covered.dtype} of shape {list(covered.shape)}"
                raise TeacherError(
                    f"the teacher abstains, so it must give `covered`, bool {list(expected)}; found {found}"
                )
            promised[COVERED] = covered
        return promised

    def _write(self, said: _Said) -> None:
        if self._failed:
            return
        self._failed = True  # unless all of this succeeds: after an error nothing is committed
        batch, tensors = said.joined()
        if batch.is_first and not self._store.wanted(batch.view, batch.shard).all():
            for array in self._arrays.values():
                array[:] = 0
        if len(batch.rows):
            for name, values in self._encode(batch, tensors).items():
                self._arrays[name][batch.place] = values
        if batch.is_last:
            arrays = {name: values[: batch.shard.num_rows] for name, values in self._arrays.items()}
            self._store.write(batch.view, batch.shard, arrays, self._batch_size)
        self._failed = False

    def _encode(self, batch: _Batch, said: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
        ids, covered = self._sample_ids[batch.rows], said.get(COVERED)
        arrays: dict[str, NDArray[Any]] = {}
        for output in self._store.manifest.outputs:
            values = _where_covered(said[output.name], covered)
            _refuse_nonfinite(values, output, ids)
            encoding = self._encodings[output.name]
            keys = row_keys(ids.tolist(), batch.view) if isinstance(encoding, Sampled) else None
            encoded = encoding.encode(values, keys)
            arrays |= {output.name + suffix: each for suffix, each in encoded.items()}
            if output.name == LOGITS:
                arrays["statistics"] = teacher_statistics(values)
        if covered is not None:
            arrays[COVERED] = covered.cpu().numpy()
            arrays["statistics"][~arrays[COVERED]] = 0
        return arrays


def _where_covered(values: Tensor, covered: Tensor | None) -> Tensor:
    """`values [B, …]` with zeros where the teacher abstained: those rows and tokens are not looked at.

    Values that are not per token are zero where the teacher abstained from every token of the row.
    """
    if covered is None:
        return values
    if values.shape[: covered.ndim] != covered.shape:
        covered = covered.flatten(1).any(dim=1)
    return torch.where(covered.reshape(*covered.shape, *[1] * (values.ndim - covered.ndim)), values, 0)


def _refuse_nonfinite(values: Tensor, output: OutputSpec, sample_ids: NDArray[np.str_]) -> None:
    """-inf is a masked class: legal in logits unless every class is masked."""
    worst = values.amax(dim=-1) if output.kind == "logits" else values  # of NaN and others, the maximum is NaN
    bad = ~torch.isfinite(worst)
    wrong = np.flatnonzero(bad.reshape(len(sample_ids), -1).any(dim=1).cpu().numpy())
    if len(wrong):
        examples = ", ".join(sample_ids[wrong[:5]].tolist())
        raise TeacherError(
            f"the teacher's {output.name} are NaN or infinite for {len(wrong)} of {len(sample_ids)} samples of a "
            f"batch, such as {examples}. Nothing of this shard was written; mend the teacher (precision: float32?) "
            "and run again."
        )
