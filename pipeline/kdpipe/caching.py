"""The hot loop: missing shards -> rows -> teacher -> encoding -> store."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.data.prepared import ANEW, PreparedInputs
from kdpipe.data.segments import content_digests
from kdpipe.encodings import encoding_from_json
from kdpipe.errors import DataError, TeacherError
from kdpipe.store import TargetStore
from kdpipe.teachers.base import Teacher


@dataclass(frozen=True, kw_only=True)
class CacheProgress:
    """Where a capture stands; rows are counted once per view."""

    rows_done: int
    rows_total: int
    rows_per_s: float


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What a capture did: rows that the teacher saw, and the seconds of its passes and of everything."""

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
) -> Captured:
    """Compute and commit every missing shard of a store.

    A batch never crosses a shard, so that a resumed capture gives the bytes of an uninterrupted one. Raises
    `TeacherError` naming samples when the teacher says NaN or +inf, `DataError` when a row's content is not the one
    that its digest names; what was committed stays.
    """
    missing = store.missing()
    total = sum(shard.num_rows for _, shard in missing)
    started, teacher_seconds, done = time.perf_counter(), 0.0, 0
    for view, shard in missing:
        parts: list[dict[str, NDArray[Any]]] = []
        for start in range(shard.start, shard.stop, batch_size):
            rows = np.arange(start, min(start + batch_size, shard.stop))
            columns = inputs.read(rows)
            _refuse_damaged(columns, inputs, rows)
            before = time.perf_counter()
            said = teacher.predict(columns)
            teacher_seconds += time.perf_counter() - before
            parts.append(_encode(store, said, inputs, rows))
            done += len(rows)
            rate = done / (time.perf_counter() - started)
            on_progress(CacheProgress(rows_done=done, rows_total=total, rows_per_s=rate))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        store.write(view, shard, arrays, batch_size)
    seconds = time.perf_counter() - started
    return Captured(num_rows=done, num_shards=len(missing), teacher_seconds=teacher_seconds, seconds=seconds)


def _refuse_damaged(columns: Columns, inputs: PreparedInputs, rows: NDArray[np.int64]) -> None:
    """Targets are committed under the rows' digests, so the teacher must see exactly that content."""
    found = np.frombuffer(b"".join(content_digests(columns)), np.uint8).reshape(len(rows), -1)
    wrong = np.flatnonzero((found != inputs.digests[rows]).any(axis=1))
    if len(wrong):
        raise DataError(
            f"the prepared content of {inputs.sample_ids[rows[int(wrong[0])]]} differs from its digest "
            f"({len(wrong)} such rows in a batch). {ANEW}"
        )


def _encode(
    store: TargetStore, said: dict[str, Tensor], inputs: PreparedInputs, rows: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for output in store.manifest.outputs:
        if output.name not in said:
            raise TeacherError(f"the teacher gave no output {output.name!r}; it gave {', '.join(said)}")
        logits = said[output.name]
        _refuse_nonfinite(logits, output.name, inputs, rows)
        encoding = encoding_from_json(store.manifest.encodings[output.name])
        arrays |= {output.name + suffix: values for suffix, values in encoding.encode(logits).items()}
    return {**arrays, "statistics": teacher_statistics(said["logits"])}


def teacher_statistics(logits: Tensor) -> NDArray[np.float32]:
    """Class, confidence and entropy (nats) of logits `[B, …, C]` at T = 1: float32 `[B, …, 3]`."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    top = log_probs.max(dim=-1)
    entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
    return torch.stack([top.indices.float(), top.values.exp(), entropy], dim=-1).cpu().numpy()


def _refuse_nonfinite(logits: Tensor, name: str, inputs: PreparedInputs, rows: NDArray[np.int64]) -> None:
    bad = (torch.isnan(logits) | torch.isposinf(logits)).any(dim=-1) | torch.isneginf(logits).all(dim=-1)
    wrong = np.flatnonzero(bad.reshape(len(rows), -1).any(dim=1).cpu().numpy())
    if len(wrong):
        examples = ", ".join(inputs.sample_ids[rows[wrong[:5]]].tolist())
        raise TeacherError(
            f"the teacher's {name} are NaN or infinite for {len(wrong)} of {len(rows)} samples of a batch, such as "
            f"{examples}. Nothing of this shard was written; mend the teacher (precision: float32?) and run again."
        )
