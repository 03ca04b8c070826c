"""Prepared rows, written: a source's rows become inputs (appended once, never changed), labels and splits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.data.columns import Columns, Ragged, take
from kdpipe.data.growing import Growing, KeyTable, text_keys
from kdpipe.data.labels import Labels, write_labels
from kdpipe.data.prepared import DIGEST_BYTES, FORMAT_VERSION, MISSING_LABEL, ColumnLayout, PreparedInputs
from kdpipe.data.segments import SegmentWriter, content_digests
from kdpipe.data.sources.base import Source, rows_within
from kdpipe.errors import DataError, some
from kdpipe.fingerprint import canonical_json, uniform_by_id

_FIRST_ROWS = 64
"""Of a source, before it is known how large a row is: images may be a hundred times their encoded bytes."""
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

    `shares` maps split name -> share of the rows, where the source has no split column; their order counts: it says
    which hashes are of which split. Nothing is carved when rows of a split called `validation` exist already or
    `validation_fraction` is 0. All draws hash (seed, sample id), so that they do not move when rows are added.
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
    labels, num_new = _read(source, schema, columns, plan, folder)
    summary = write_labels(folder, PreparedInputs(folder / "inputs"), labels)
    return Prepared(num_rows=len(labels.labels), num_new=num_new, splits=summary)


def _read(
    source: Source, schema: RowSchema, columns: SourceColumns, plan: SplitPlan, folder: Path
) -> tuple[Labels, int]:
    """Append the source's new rows to the inputs: the labels of all rows, and how many are new."""
    reading = _Reading(folder / "inputs", schema, columns, plan)
    try:
        for batch in source.batches():
            reading.add(batch)
        labels = reading.labels()
        if reading.starts_anew:  # a crash before the labels are written must not leave another source's labels
            (folder / "labels" / "labels.parquet").unlink(missing_ok=True)
        return labels, reading.commit()
    finally:
        reading.discard()


class _Reading:
    """One pass over a source: appends unknown rows to a new segment, remembers label and split of every row.

    Nothing of a row is kept as a Python object: it takes a key and 13 bytes, and another key where rows are known.
    """

    def __init__(self, folder: Path, schema: RowSchema, columns: SourceColumns, plan: SplitPlan) -> None:
        self._folder, self._schema, self._columns, self._plan = folder, schema, columns, plan
        if columns.split is None:
            _check_shares(plan)
        has_rows = (folder / "manifest.json").is_file()
        self._manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text()) if has_rows else {}
        self._known = KeyTable()
        for block in PreparedInputs(folder).identities() if has_rows else ():
            self._known.add(text_keys(block["sample_id"].to_pylist()))
        self._seen = KeyTable()  # of the source's rows: their ids, or their content where there are none
        self._split_codes = {"": 0}
        self._labels, self._splits, self._is_drawn = Growing(np.int64), Growing(np.int32), Growing(np.bool_)
        self._labels.append(np.full(len(self._known), MISSING_LABEL))
        for kept in (self._splits, self._is_drawn):
            kept.append(np.zeros(len(self._known)))
        self._segment: SegmentWriter | None = None
        self._block_rows = _FIRST_ROWS
        self.starts_anew = True
        """Whether the source has none of the known rows."""

    def add(self, batch: pa.RecordBatch) -> None:
        """Take in source rows, in blocks as small as the rows before were large, once they were prepared."""
        start = 0
        while start < batch.num_rows:
            block = batch.slice(start, self._block_rows)
            start += block.num_rows
            self._block_rows = rows_within(max(block.nbytes, self._add(block)) / block.num_rows)

    def _add(self, batch: pa.RecordBatch) -> int:
        """Take in one block; returns the bytes of its rows once they are prepared."""
        first = len(self._seen)
        keys = self._keys(batch, first)
        name_of = row_names(batch, keys, first)
        inputs = self._schema.to_inputs(batch, name_of)
        digests = content_digests(inputs)
        self._refuse_duplicates(keys, digests, name_of, first)
        hexes = [each.hex() for each in digests]
        ids = hexes if keys is None else [f"{key}-{text[:16]}" for key, text in zip(keys, hexes, strict=True)]
        labels, splits = self._label_values(batch, name_of), self._split_names(batch, ids)
        rows = self._known.find(text_keys(ids)) if len(self._known) else np.full(len(ids), -1, np.int64)
        new = np.flatnonzero(rows < 0)
        rows[new] = len(self._labels) + np.arange(len(new))
        self.starts_anew &= len(new) == len(rows)
        codes = [self._split_codes.setdefault(name, len(self._split_codes)) for name in splits]
        for kept, values in (
            (self._labels, labels),
            (self._splits, codes),
            (self._is_drawn, self._draws(ids, splits)),
        ):
            kept.append(np.zeros(len(new)))
            kept.values[rows] = values
        if len(new) == len(rows):
            self._append(inputs, ids, digests)
        elif len(new):
            chosen = {name: take(column, new) for name, column in inputs.items()}
            self._append(chosen, [ids[i] for i in new], [digests[i] for i in new])
        return sum((each.values if isinstance(each, Ragged) else each).nbytes for each in inputs.values())

    def labels(self) -> Labels:
        """Label and split of every row that there will be. Raises `DataError`."""
        if not len(self._seen):
            raise DataError("the source has no rows; expected at least one")
        dropped = len(self._known) if self.starts_anew else 0
        names = list(self._split_codes)
        labels = Labels(labels=self._labels.values[dropped:], splits=self._splits.values[dropped:], names=names)
        labels = _carve_validation(labels, self._is_drawn.values[dropped:], self._plan)
        _check_names(labels.names)
        return labels

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
        keys = strings_of(batch, self._columns.id)
        empty = [f"row {first + position}" for position, key in enumerate(keys) if not key]
        if empty:
            raise DataError(f"column {self._columns.id!r} must hold an id for each row; it is empty in {some(empty)}")
        return [key for key in keys if key]

    def _append(self, inputs: Columns, ids: Sequence[str], digests: Sequence[bytes]) -> None:
        if self._segment is None:
            self._segment = SegmentWriter(self._folder, tuple(ColumnLayout.of(*each) for each in inputs.items()))
        self._segment.append(inputs, ids, digests)

    def _label_values(self, batch: pa.RecordBatch, name_of: NameOf) -> NDArray[np.int64]:
        if self._columns.label is None:
            return np.full(batch.num_rows, MISSING_LABEL, np.int64)
        return self._schema.to_labels(column_of(batch, self._columns.label), name_of)

    def _refuse_duplicates(
        self, keys: Sequence[str] | None, digests: Sequence[bytes], name_of: NameOf, first: int
    ) -> None:
        content = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
        earlier = self._seen.add(content if keys is None else text_keys(keys))
        pairs = [sorted((first + int(position), int(earlier[position]))) for position in np.flatnonzero(earlier >= 0)]
        if pairs:
            row, again = min(pairs, key=lambda pair: pair[1])
            what = "the same content" if keys is None else "the same id"
            fix = "Name a column of unique ids in data.columns.id" if keys is None else "Make the ids unique"
            raise DataError(f"row {row} and {name_of(again - first)} have {what}. {fix}, or remove one of them.")

    def _split_names(self, batch: pa.RecordBatch, ids: Sequence[str]) -> Sequence[str]:
        """The split of each row; "" where it has none."""
        if self._columns.split is not None:
            return [value or "" for value in strings_of(batch, self._columns.split)]
        names, shares = list(self._plan.shares), list(self._plan.shares.values())
        drawn = np.searchsorted(np.cumsum(shares), uniform_by_id(ids, self._plan.seed, "split"), side="right")
        return [names[each] for each in np.minimum(drawn, len(names) - 1)]

    def _draws(self, ids: Sequence[str], splits: Sequence[str]) -> NDArray[np.bool_]:
        """Which rows become validation rows, if any do."""
        drawn = np.zeros(len(ids), np.bool_)
        if self._plan.validation_fraction:
            candidates = [position for position, name in enumerate(splits) if name == self._plan.carve_from]
            draws = uniform_by_id([ids[position] for position in candidates], self._plan.seed, "validation")
            drawn[candidates] = draws < self._plan.validation_fraction
        return drawn


def column_of(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column of a record batch. Raises `DataError` naming the columns that exist."""
    found = batch.schema.get_all_field_indices(name)
    if len(found) != 1:
        problem = f"there are {len(found)} columns" if found else "there is no column"
        raise DataError(f"{problem} {name!r}; the source has {', '.join(batch.schema.names)}")
    return batch.column(found[0])


def row_names(batch: pa.RecordBatch, keys: Sequence[str | None] | None, first: int = 0) -> NameOf:
    """What messages call the rows of a batch: by number, the first being `first`, and by key or what a source says."""
    known_as = _own_ids(batch) if keys is None else keys
    return lambda position: f"row {first + position}" + (f" (id {known_as[position]})" if known_as else "")


def strings_of(batch: pa.RecordBatch, name: str) -> list[str | None]:
    column = column_of(batch, name)
    try:
        values: list[str | None] = pc.cast(column, pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"column {name!r} has type {column.type}; expected text or numbers") from None
    if pa.types.is_floating(column.type):
        exact = 2.0 ** (np.finfo(column.type.to_pandas_dtype()).nmant + 1)
        numbers = column.drop_null().to_numpy(zero_copy_only=False)
        if not (np.abs(numbers) < exact).all():
            raise DataError(
                f"column {name!r} has type {column.type} and numbers that are not finite, or so large that neighbours "
                f"look alike (from {exact:.0f} on). Write them as text"
            )
    return values


def _own_ids(batch: pa.RecordBatch) -> list[str | None] | None:
    """What a source itself calls its rows, such as a file's name: its column `id` of text, where it has one."""
    named = batch.schema.get_all_field_indices("id")
    return strings_of(batch, "id") if len(named) == 1 and pa.types.is_string(batch.schema.field("id").type) else None


def _check_shares(plan: SplitPlan) -> None:
    shares = list(plan.shares.values())
    if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise DataError(
            "the source has no split column, so data.splits.shares must be shares from 0 to 1 whose sum is 1, such as "
            f"{{train: 0.8, test: 0.2}}; found {dict(plan.shares)}"
        )


def _carve_validation(labels: Labels, is_drawn: NDArray[np.bool_], plan: SplitPlan) -> Labels:
    """With the drawn rows of `plan.carve_from` in `validation`, unless there are rows of that split."""
    if plan.validation_fraction == 0 or "validation" in labels.names:
        return labels
    num_carved = int(is_drawn.sum())
    num_rows = (
        int((labels.splits == labels.names.index(plan.carve_from)).sum()) if plan.carve_from in labels.names else 0
    )
    if num_carved in (0, num_rows):
        there = ", ".join(filter(None, labels.names))
        raise DataError(
            f"taking {plan.validation_fraction:g} of the {num_rows} rows of split {plan.carve_from!r} as "
            f"validation takes {num_carved}: one of the two splits is empty. Change "
            + ("data.splits.validation_fraction." if num_rows else f"data.splits.carve_from; there are {there}.")
        )
    labels.splits[is_drawn] = len(labels.names)
    return replace(labels, names=[*labels.names, "validation"])


def _check_names(splits: Sequence[str]) -> None:
    """Each split has a file of its name: splits/<name>.json."""
    names = {name for name in splits if name}
    if not names:
        raise DataError("no row has a split: the split column is empty in every row")
    wrong = sorted(name for name in names if Path(name).name != name)
    if wrong:
        raise DataError(f"the split {wrong[0]!r} cannot be a file's name (splits/<name>.json); rename it")
