"""Labels and splits of prepared rows, written. They change while inputs stay: relabelling, moving between splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.data.prepared import MISSING_LABEL, PreparedInputs, digest_split
from kdpipe.fingerprint import canonical_json

_SCHEMA = pa.schema({"sample_id": pa.string(), "label": pa.int64(), "split": pa.string()})


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What is known of rows beside their content: label (-1: missing) and split `[N]`.

    A split is its place in `names`; the first of them is "", for rows of no split.
    """

    labels: NDArray[np.int64]
    splits: NDArray[np.int32]
    names: Sequence[str]


def write_labels(folder: Path, inputs: PreparedInputs, labels: Labels) -> dict[str, dict[str, int]]:
    """Write labels/ and splits/ below `folder`; rows and labelled rows of every split."""
    for part in ("labels", "splits"):
        (folder / part).mkdir(exist_ok=True)
    _write_table(folder / "labels" / "labels.parquet", inputs, labels)
    rows_of = {name: np.flatnonzero(labels.splits == code) for code, name in enumerate(labels.names)}
    rows_of = {name: rows_of[name] for name in sorted(rows_of) if name and len(rows_of[name])}
    classes = {name: _class_counts(labels.labels[rows]) for name, rows in rows_of.items()}
    durable.write_text(folder / "labels" / "classes.json", canonical_json(classes) + "\n")
    summary = {}
    for name, rows in rows_of.items():
        hashed, summary[name] = digest_split(inputs, labels.labels, rows)
        content = {"split": name, **summary[name], "digest": hashed}
        durable.write_text(folder / "splits" / f"{name}.json", canonical_json(content) + "\n")
    for path in (folder / "splits").glob("*.json"):
        if path.stem not in rows_of:
            path.unlink()
    return summary


def _write_table(path: Path, inputs: PreparedInputs, labels: Labels) -> None:
    names = pa.array([None, *labels.names[1:]], pa.string())
    start = 0
    with durable.writing(path) as file, pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
        for block in inputs.identities():
            rows = slice(start, start + block.num_rows)
            numbers = pa.array(labels.labels[rows], mask=labels.labels[rows] == MISSING_LABEL)
            splits = names.take(pa.array(labels.splits[rows]))
            writer.write_table(pa.table([block["sample_id"], numbers, splits], schema=_SCHEMA))
            start += block.num_rows


def _class_counts(labels: NDArray[np.int64]) -> dict[str, int]:
    values, counts = np.unique(labels[labels != MISSING_LABEL], return_counts=True)
    return {str(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}
