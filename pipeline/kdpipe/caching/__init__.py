"""The hot loop: missing shards -> rows -> teacher -> encoding -> store.

The caller's thread runs the teacher; a loader thread reads and checks the batches ahead of it, a writer thread encodes
and commits the shards behind it. Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from kdpipe.caching.batches import Cut, batches_of
from kdpipe.caching.loading import Loader, read_intact
from kdpipe.caching.writing import Writer, are_logits, kept_encoding, promised, refuse_nonfinite, zero_where_abstained
from kdpipe.data.prepared import PreparedInputs
from kdpipe.distributed import Shard
from kdpipe.errors import UsageError
from kdpipe.inputs import LOGITS
from kdpipe.store import TargetStore
from kdpipe.teachers.asking import Asking
from kdpipe.teachers.base import Teacher
from kdpipe.views import CLEAN, PROBE_ROWS, ViewSpec

__all__ = [
    "WHOLE",
    "CacheProgress",
    "Captured",
    "Cut",
    "Share",
    "are_logits",
    "capture",
    "kept_encoding",
    "promised",
    "read_intact",
    "refuse_nonfinite",
    "zero_where_abstained",
]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of `count` workers' part of a store: every shard whose index modulo `count` is `index`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """`i/n`, with 0 <= i < n. Raises `UsageError`."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UsageError(f"--shards is {text!r}; expected i/n with 0 <= i < n: 0/2 for one worker, 1/2 for another")
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

    On a GPU, a pass ends when its kernels are queued. `at_once`: rows at a time, where memory ran out for more.
    """

    num_rows: int
    num_shards: int
    teacher_seconds: float
    seconds: float
    at_once: int | None = None


def capture(
    store: TargetStore,
    teacher: Teacher,
    inputs: PreparedInputs,
    batch_size: int,
    on_progress: Callable[[CacheProgress], None] = lambda _: None,
    share: Share = WHOLE,
    views: ViewSpec = CLEAN,
    batch_tokens: int | None = None,
) -> Captured:
    """Compute and commit every missing shard of a store, or those of one share.

    In an augmented view the teacher sees the rows that the store wants there, as `views` shows them. With
    `batch_tokens`, a batch is of rows that are about as long, at most so many tokens in all. Where the teacher runs out
    of memory, fewer rows are tried; the record says how many.

    A batch never crosses a shard, so that a resumed capture gives the bytes of an uninterrupted one. Raises
    `ConfigError` when a row of an augmented view depends on its batch (`ViewSpec.probe`) or when a teacher that knows
    only some classes gives another number than the store keeps, `TeacherError` naming samples when the teacher says NaN
    or +inf, `DataError` when a row's content is not the one that its digest names; what was committed stays. At most
    two shards are in work: one that is computed, one that is committed.
    """
    if hasattr(teacher, "num_kept"):
        kept_encoding(store.encodings[LOGITS], teacher.num_kept)
    missing = [(view, shard) for view, shard in store.missing() if share.has(shard)]
    _probe_views(store, missing, inputs, views)
    cut = Cut(teacher, inputs, views, batch_size, batch_tokens)
    batches = batches_of(store, missing, cut)
    total = sum(int(store.wanted(view, shard).sum()) for view, shard in missing)
    started, teacher_seconds, done = time.perf_counter(), 0.0, 0
    with _torch_thread("loader") as loading, _torch_thread("writer") as writing, _giving_way():
        writer, ask = Writer(store, writing), Asking(teacher)
        for batch, columns in Loader(inputs, views, loading).read(batches):
            before = time.perf_counter()
            said = ask(columns, len(batch.rows)) if len(batch.rows) else {}
            teacher_seconds += time.perf_counter() - before
            if ask.at_once is not None:
                batch = replace(batch, at_once=min(batch.at_once, ask.at_once))  # noqa: PLW2901
            writer.put(batch, said)
            done += len(batch.rows)
            rate = done / (time.perf_counter() - started)
            on_progress(CacheProgress(rows_done=done, rows_total=total, rows_per_s=rate))
        writer.finish()
    seconds = time.perf_counter() - started
    return Captured(
        num_rows=done,
        num_shards=len(missing),
        teacher_seconds=teacher_seconds,
        seconds=seconds,
        at_once=ask.at_once,
    )


def _probe_views(
    store: TargetStore, missing: Sequence[tuple[int, Shard]], inputs: PreparedInputs, views: ViewSpec
) -> None:
    """Try the transform on the first rows that are to be shown augmented."""
    for view, shard in missing:
        rows = shard.start + np.flatnonzero(store.wanted(view, shard))
        if view and len(rows):
            rows = rows[:PROBE_ROWS]
            views.probe(inputs.read(rows), inputs.sample_ids[rows].tolist())
            return


@contextmanager
def _giving_way() -> Iterator[None]:
    """Let no thread keep the interpreter from the teacher's for long, as digests of rows do: a millisecond at once.

    The whole process's: captures that overlap in threads of one process would give each other's back.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


_SWITCH_S = 50e-6


def _torch_thread(name: str) -> ThreadPoolExecutor:
    """One thread whose tensor operations use as many CPU threads as the caller's: last bits may depend on it."""
    return ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
