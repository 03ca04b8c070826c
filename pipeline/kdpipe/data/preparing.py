"""Prepared rows, written: a source's rows become inputs (appended once, never changed), labels and splits."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.data.columns import Columns, take
from kdpipe.data.prepared import (
    FORMAT_VERSION,
    MISSING_LABEL,
    ColumnLayout,
    PreparedInputs,
    digest_split,
)
from kdpipe.data.segments import SegmentWriter, content_digests
from kdpipe.data.sources import Source
from kdpipe.errors import DataError
from kdpipe.fingerprint import canonical_json, uniform_by_id

NameOf = Callable[[int], str]
"""Position in a batch -> how a message names that row."""


@dataclass(frozen=True, kw_only=True)
class SourceColumns:
    """Which source columns hold the key, the label and the split; None where there is none."""

    id: str | None = None
    label: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """How rows get their split: from the source's column, or by shares; then `validation` is taken from `carve_from`.

    `shares` maps split name -> share of the rows (used where the source has no split column). Nothing is carved when
    rows of a split called `validation` exist already or `validation_fraction` is 0. All draws hash (seed, sample id),
    so that they do not move when rows are added.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    validation_fraction: float = 0.0
    carve_from: str = "train"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` did."""

    num_rows: int
    num_new: int
    splits: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class RowSchema:
    """How a task turns source columns into rows."""

    to_inputs: Callable[[pa.RecordBatch, NameOf], Columns]
    to_labels: Callable[[pa.Array, NameOf], NDArray[np.int64]]


def prepare(source: Source, schema: RowSchema, columns: SourceColumns, plan: SplitPlan, folder: Path) -> Prepared:
    """Bring `folder` (inputs/, labels/, splits/) up to date with a source.

    Known rows keep their row number, new ones are appended, rows that the source no longer has lose their split. When
    no row of the source is known (another data set, another row schema) the inputs start anew. Raises `DataError`
    naming rows; what was there stays readable. One writer at a time: the caller holds the lock.
    """
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    durable.sweep_temporaries(folder / "inputs")
    reading = _Reading(folder / "inputs", schema, columns)
    try:
        for batch in source.batches():
            reading.add(batch)
        labels, splits = reading.labels_and_splits(plan)
        if reading.starts_anew:  # a crash before the labels are written must not leave another source's labels
            (folder / "labels" / "labels.parquet").unlink(missing_ok=True)
        num_new = reading.commit()
    finally:
        reading.discard()
    summary = _write_labels(folder, PreparedInputs(folder / "inputs"), labels, splits)
    return Prepared(num_rows=len(labels), num_new=num_new, splits=summary)


class _Reading:
    """One pass over a source: appends unknown rows to a new segment, remembers label and split of every row."""

    def __init__(self, folder: Path, schema: RowSchema, columns: SourceColumns) -> None:
        self._folder, self._schema, self._columns = folder, schema, columns
        has_rows = (folder / "manifest.json").is_file()
        self._manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text()) if has_rows else {}
        known: list[str] = PreparedInputs(folder).sample_ids.tolist() if has_rows else []
        self._row_of: dict[str, int] = {key: row for row, key in enumerate(known)}
        self._num_known = len(self._row_of)
        self._seen_at: dict[str, int] = {}
        self._rows: list[int] = []
        self._labels: list[NDArray[np.int64]] = []
        self._splits: list[str] = []
        self._segment: SegmentWriter | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Take in one block of source rows."""
        if batch.num_rows == 0:
            return
        first, columns = len(self._rows), self._columns
        keys = self._keys(batch, first)

        def name_of(position: int) -> str:
            return f"row {first + position}" + (f" (id {keys[position]})" if keys else "")

        inputs = self._schema.to_inputs(batch, name_of)
        digests = content_digests(inputs)
        hexes = [each.hex() for each in digests]
        ids = hexes if keys is None else [f"{key}-{text[:16]}" for key, text in zip(keys, hexes, strict=True)]
        self._refuse_duplicates(keys or ids, name_of, first)
        self._labels.append(self._label_values(batch, name_of))
        self._splits += [value or "" for value in _strings(batch, columns.split)] if columns.split else [""] * len(ids)
        new = [position for position, key in enumerate(ids) if key not in self._row_of]
        for position in new:
            self._row_of[ids[position]] = len(self._row_of)
        self._rows += [self._row_of[key] for key in ids]
        if new:
            self._append(inputs, np.asarray(new, np.int64), [ids[i] for i in new], [digests[i] for i in new])

    @property
    def starts_anew(self) -> bool:
        """Whether the source has none of the known rows."""
        return min(self._rows) >= self._num_known

    def labels_and_splits(self, plan: SplitPlan) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
        """Label (-1: missing) and split ("": none) of every row `[N]` that there will be. Raises `DataError`."""
        if not self._rows:
            raise DataError("the source has no rows; expected at least one")
        dropped = self._num_known if self.starts_anew else 0
        ids = list(self._row_of)[dropped:]
        rows = np.asarray(self._rows) - dropped
        labels = np.full(len(ids), MISSING_LABEL, np.int64)
        labels[rows] = np.concatenate(self._labels)
        splits = np.full(len(ids), "", dtype=object)
        splits[rows] = self._splits if self._columns.split else _by_shares([ids[row] for row in rows], plan)
        _carve_validation(ids, splits, plan)
        _check_names(splits)
        return labels, splits.astype(np.str_)

    def commit(self) -> int:
        """Make the new rows part of the inputs; returns how many there are."""
        if self._segment is None:
            return 0
        previous: list[dict[str, Any]] = [] if self.starts_anew else self._manifest["segments"]
        layouts = [each.to_json() for each in self._segment.layouts]
        if previous and layouts != self._manifest["columns"]:
            raise DataError(f"new rows have the columns {layouts}, the known rows {self._manifest['columns']}")
        name = self._segment.close()
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "columns": layouts,
            "segments": [*previous, {"name": name, "rows": self._segment.num_rows}],
        }
        durable.write_text(self._folder / "manifest.json", canonical_json(manifest) + "\n")
        kept = {each["name"] for each in manifest["segments"]}
        for folder in self._folder.glob("segment-*"):
            if folder.name not in kept:
                shutil.rmtree(folder)
        return self._segment.num_rows

    def discard(self) -> None:
        """Remove new rows that were not committed."""
        if self._segment is not None:
            self._segment.discard()

    def _keys(self, batch: pa.RecordBatch, first: int) -> list[str] | None:
        """The key column as text, where there is one."""
        if self._columns.id is None:
            return None
        keys = _strings(batch, self._columns.id)
        empty = [f"row {first + position}" for position, key in enumerate(keys) if not key]
        if empty:
            raise DataError(f"column {self._columns.id!r} must hold an id for each row; it is empty in {_some(empty)}")
        return [key for key in keys if key]

    def _append(self, inputs: Columns, new: NDArray[np.int64], ids: Sequence[str], digests: Sequence[bytes]) -> None:
        if self._segment is None:
            self._segment = SegmentWriter(self._folder, tuple(ColumnLayout.of(*each) for each in inputs.items()))
        self._segment.append({name: take(column, new) for name, column in inputs.items()}, ids, digests)

    def _label_values(self, batch: pa.RecordBatch, name_of: NameOf) -> NDArray[np.int64]:
        if self._columns.label is None:
            return np.full(batch.num_rows, MISSING_LABEL, np.int64)
        return self._schema.to_labels(column_of(batch, self._columns.label), name_of)

    def _refuse_duplicates(self, keys: Sequence[str], name_of: NameOf, first: int) -> None:
        for position, key in enumerate(keys):
            earlier = self._seen_at.setdefault(key, first + position)
            if earlier != first + position:
                what = "the same id" if self._columns.id else "the same content"
                fix = "Make the ids unique" if self._columns.id else "Name a column of unique ids in data.columns.id"
                raise DataError(f"row {earlier} and {name_of(position)} have {what}. {fix}, or remove one of them.")


def column_of(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column of a record batch. Raises `DataError` naming the columns that exist."""
    found = batch.schema.get_all_field_indices(name)
    if len(found) != 1:
        problem = f"there are {len(found)} columns" if found else "there is no column"
        raise DataError(f"{problem} {name!r}; the source has {', '.join(batch.schema.names)}")
    return batch.column(found[0])


def _strings(batch: pa.RecordBatch, name: str) -> list[str | None]:
    column = column_of(batch, name)
    try:
        values: list[str | None] = pc.cast(column, pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"column {name!r} has type {column.type}; expected text or numbers") from None
    return values


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _by_shares(ids: Sequence[str], plan: SplitPlan) -> NDArray[np.object_]:
    """The split of each of the given rows `[N]`, drawn by shares."""
    shares = list(plan.shares.values())
    if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise DataError(
            "the source has no split column, so data.splits.shares must be shares from 0 to 1 whose sum is 1, such as "
            f"{{train: 0.8, test: 0.2}}; found {dict(plan.shares)}"
        )
    drawn = np.searchsorted(np.cumsum(shares), uniform_by_id(ids, plan.seed, "split"), side="right")
    return np.array(list(plan.shares), dtype=object)[np.minimum(drawn, len(shares) - 1)]


def _carve_validation(ids: Sequence[str], splits: NDArray[np.object_], plan: SplitPlan) -> None:
    """Move a share of the rows of `plan.carve_from` to `validation`, in place, unless there are such rows."""
    if plan.validation_fraction == 0 or np.any(splits == "validation"):
        return
    candidates = np.flatnonzero(splits == plan.carve_from)
    draws = uniform_by_id([ids[int(row)] for row in candidates], plan.seed, "validation")
    carved = candidates[draws < plan.validation_fraction]
    if len(carved) in (0, len(candidates)):
        raise DataError(
            f"taking {plan.validation_fraction:g} of the {len(candidates)} rows of split {plan.carve_from!r} as "
            f"validation takes {len(carved)}: one of the two splits is empty. Change data.splits.validation_fraction."
        )
    splits[carved] = "validation"


def _check_names(splits: NDArray[np.object_]) -> None:
    """Each split has a file of its name: splits/<name>.json."""
    names = {str(name) for name in splits} - {""}
    if not names:
        raise DataError("no row has a split: the split column is empty in every row")
    wrong = sorted(name for name in names if Path(name).name != name)
    if wrong:
        raise DataError(f"the split {wrong[0]!r} cannot be a file's name (splits/<name>.json); rename it")


def _write_labels(
    folder: Path, inputs: PreparedInputs, labels: NDArray[np.int64], splits: NDArray[np.str_]
) -> dict[str, dict[str, int]]:
    table = pa.table(
        {
            "sample_id": pa.array(inputs.sample_ids.tolist(), pa.string()),
            "label": pa.array(labels, pa.int64(), mask=labels == MISSING_LABEL),
            "split": pa.array(splits.tolist(), pa.string(), mask=splits == ""),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    names = sorted({str(name) for name in np.unique(splits)} - {""})
    counts = {name: Counter(labels[splits == name].tolist()) for name in names}
    for part in ("labels", "splits"):
        (folder / part).mkdir(exist_ok=True)
    durable.write_bytes(folder / "labels" / "labels.parquet", sink.getvalue())
    durable.write_text(
        folder / "labels" / "classes.json",
        canonical_json(
            {
                name: {str(label): count[label] for label in sorted(count) if label != MISSING_LABEL}
                for name, count in counts.items()
            }
        )
        + "\n",
    )
    summary = {}
    for name in names:
        hashed, summary[name] = digest_split(inputs, labels, np.flatnonzero(splits == name))
        content = {"split": name, **summary[name], "digest": hashed}
        durable.write_text(folder / "splits" / f"{name}.json", canonical_json(content) + "\n")
    for path in (folder / "splits").glob("*.json"):
        if path.stem not in names:
            path.unlink()
    return summary
