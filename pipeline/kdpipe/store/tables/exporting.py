"""A store's targets as the rows of a table, in bounded memory.

Shapes: B rows of a batch, C classes, K places, N temperatures, D width; `...` stands for further axes (tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.encodings import Dense, Int8, Sampled, TargetEncoding, TopK
from kdpipe.errors import StoreError
from kdpipe.store.manifest import COVERED, STATISTICS
from kdpipe.store.tables.columns import spoken
from kdpipe.store.tables.files import Field, Rows, Values, batch_rows, write_table
from kdpipe.store.target_store import TargetStore
from kdpipe.targets import DenseTargets, FeatureTargets, MixedTargets, OutputSpec, SampledTargets, Targets

FORMAT_VERSION = 1
_FLOAT32_MAXIMUM = 2.0**13
"""Logits of rows with larger ones are float64 in a table: float32 would round them by 2^-11 or more."""
_MAXIMA = 2**20
"""Rows whose maxima are looked at together."""
_USED = "\0used"
"""End of a mask's name beside the columns; no column can be named so."""


def export_table(
    store: TargetStore,
    path: Path,
    *,
    views: Sequence[int] | None = None,
    outputs: Sequence[str] | None = None,
    replace: bool = False,
) -> int:
    """Write views (None: all) and outputs (None: all) of a complete store as a table; returns the number of rows.

    Raises `DataError` when the file exists, unless `replace`; `StoreError` for an output or view that is not there.
    """
    store.check_complete()
    names = list(outputs or store.outputs)
    store.array_names(names)  # refuses unknown ones
    views = range(store.num_views) if views is None else views
    for view in views:
        store.check_rows(np.empty(0, np.int64), view)
    columns = _columns(store, names, views)
    fields = [field for group in columns.values() for field in group]
    rows_of = {view: _rows_in(store, view) for view in views}
    num_rows = sum(len(each) for each in rows_of.values())
    rows = Rows(num_rows=num_rows, batches=partial(_batches, store, rows_of, columns))
    write_table(path, fields, _about(store, names), rows, replace=replace)
    return rows.num_rows


def prefix_of(output: str) -> str:
    """What the columns of an output's classes begin with."""
    return "" if output == "logits" else f"{output}."


def _about(store: TargetStore, outputs: Sequence[str]) -> dict[str, Any]:
    manifest, encodings = store.manifest, [store.encodings[name] for name in outputs]
    sparse = [each.temperatures for each in encodings if isinstance(each, TopK)]
    return {
        "format": "kdpipe-table",
        "format_version": FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        "encodings": {name: dict(manifest.encodings[name]) for name in outputs},
        "num_classes": manifest.num_classes,
        "temperatures": list(sparse[0] if sparse else manifest.temperatures),
        "class_names": None if manifest.class_names is None else list(manifest.class_names),
        "views": manifest.ingredients.get("views"),
    }


def _columns(store: TargetStore, outputs: Sequence[str], views: Sequence[int]) -> dict[str, list[Field]]:
    """Columns by where they come from: "" (every store has them), an output, or its statistics."""
    tokens = store.outputs["logits"].shape[:-1]
    general = [
        Field(name="sample_id", dtype=store.sample_ids.dtype.newbyteorder("<").str),
        Field(name="view", dtype="<i4"),
        *([Field(name=COVERED, dtype="|b1", shape=tokens)] if store.manifest.coverage else []),
    ]
    columns = {"": general} | {
        name: _fields_of(store.outputs[name], store.encodings[name], _dtype_of(store, name, views)) for name in outputs
    }
    if "logits" in outputs:
        types = {"top1": "<i4", "confidence": "<f4", "entropy": "<f4"}
        columns["statistics"] = [Field(name=name, dtype=types[name], shape=tokens) for name in STATISTICS]
    return columns


def _dtype_of(store: TargetStore, output: str, views: Sequence[int]) -> str:
    """Of a dense output's numbers: those of logits are `z - max` and the maximum together again."""
    row_max = f"{output}.row_max"
    if row_max not in store.layouts:
        return "<f4"
    for view in views:
        for rows in np.array_split(_rows_in(store, view), max(1, store.num_rows // _MAXIMA)):
            if (np.abs(store.read_arrays(rows, view, [row_max])[row_max]) > _FLOAT32_MAXIMUM).any():
                return "<f8"
    return "<f4"


def _fields_of(output: OutputSpec, encoding: TargetEncoding, dtype: str) -> list[Field]:
    if output.kind == "features" or isinstance(encoding, Dense | Int8):
        return [Field(name=output.name, dtype=dtype, shape=output.shape)]
    tokens, prefix = output.shape[:-1], prefix_of(output.name)
    if isinstance(encoding, TopK):
        places, numbers = encoding.k, "log_probs"
    elif isinstance(encoding, Sampled):
        places, numbers = encoding.head + encoding.draws, "weights"
    else:
        raise StoreError(f"the output {output.name!r} is stored as {type(encoding).__name__}, which no table holds")
    used = prefix + _USED
    fields = [
        Field(name=f"{prefix}class_ids", dtype="<i4", shape=(*tokens, places), used=used),
        Field(name=prefix + numbers, dtype="<f4", shape=(*tokens, places), used=used),
    ]
    if isinstance(encoding, TopK):
        shape = (*tokens, len(encoding.temperatures))
        fields.append(Field(name=f"{prefix}tail_log_mass", dtype="<f4", shape=shape))
    return fields


def _batches(
    store: TargetStore,
    rows_of: Mapping[int, NDArray[np.int64]],
    columns: Mapping[str, Sequence[Field]],
    names: Sequence[str],
) -> Iterator[Values]:
    every = [field for group in columns.values() for field in group]
    num_rows = batch_rows(sum(field.row_bytes for field in every))
    sources = [source for source, group in columns.items() if any(field.name in names for field in group)]
    for view, every_row in rows_of.items():
        for start in range(0, len(every_row), num_rows):
            rows = every_row[start : start + num_rows]
            read = (_read(store, each, columns[each], view, rows) for each in sources)
            yield {name: value for each in read for name, value in each.items()}


def _rows_in(store: TargetStore, view: int) -> NDArray[np.int64]:
    """Rows that a view is about, ascending."""
    if view == 0:
        return np.arange(store.num_rows)
    shown = [store.records[view, shard.index].rows_computed for shard in store.shards]
    return np.flatnonzero(np.concatenate([np.zeros(0, np.bool_), *shown]))


def _read(store: TargetStore, source: str, fields: Sequence[Field], view: int, rows: NDArray[np.int64]) -> Values:
    """The columns of one source; where the teacher did not speak, floats are NaN, integers -1, and no place is used."""
    covered = store.read_arrays(rows, view, [COVERED])[COVERED] if store.manifest.coverage else None
    values: dict[str, NDArray[Any]]
    if source == "":
        values = {"sample_id": store.sample_ids[rows], "view": np.full(len(rows), view, np.int32)}
        return values if covered is None else {**values, COVERED: covered}
    if source == "statistics":
        values = dict(store.statistics(rows, view))
        values["top1"] = values["top1"].astype(np.int32)
    else:
        values = _values(source, store.read(rows, view, [source])[source], fields[0].dtype)
    if covered is None:
        return values
    of_features = source in store.outputs and store.outputs[source].kind == "features"
    return {
        name: np.where(spoken(covered, each, of_features=of_features), each, _SILENT[each.dtype.kind])
        for name, each in values.items()
    }


_SILENT = {"b": np.False_, "f": np.float32("nan"), "i": np.int32(-1)}
"""What stands where the teacher did not speak, by kind of dtype."""


def _values(output: str, targets: Targets, dtype: str) -> dict[str, NDArray[Any]]:
    if isinstance(targets, DenseTargets):
        return {output: targets.double().logits().numpy() if dtype == "<f8" else _floats(targets.logits())}
    if isinstance(targets, FeatureTargets):
        return {output: _floats(targets.values)}
    assert not isinstance(targets, MixedTargets)  # which no store holds
    prefix = prefix_of(output)
    ids = {f"{prefix}class_ids": targets.ids.numpy().astype(np.int32)}
    if isinstance(targets, SampledTargets):
        return {**ids, f"{prefix}weights": _floats(targets.weights), prefix + _USED: (targets.weights > 0).numpy()}
    return {
        **ids,
        f"{prefix}log_probs": _floats(targets.head),
        f"{prefix}tail_log_mass": _floats(targets.tails),
        prefix + _USED: (targets.head > -torch.inf).numpy(),
    }


def _floats(values: Tensor) -> NDArray[np.float32]:
    return values.float().numpy()
