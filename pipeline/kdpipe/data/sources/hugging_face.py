"""Data sets of the Hugging Face library `datasets`: saved in a folder, or by their name on the hub."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kdpipe.config import package
from kdpipe.data.sources.base import bounded, differences, rows_within
from kdpipe.errors import ConfigError, DataError, is_out_of_memory

_IMAGES_AT_ONCE = 64
_UNLABELLED = -1


class HuggingFace:
    """A folder written by `save_to_disk`, or the hub's data set `name` (with `config` and `revision`).

    A data set of several splits gets a column `split`, of all of them or of those named in `splits`. Images become the
    bytes of their files, arrays of one shape (`Array3D`, …) lists of their numbers. A `ClassLabel` stays the class
    number (null for -1), or becomes the class's name with `label_names`. What comes from the hub is downloaded to the
    cache of `datasets` once; rows are read from disk. Needs `pip install 'kdpipe[datasets]'`.
    """

    def __init__(
        self,
        path: Path | None = None,
        name: str | None = None,
        config: str | None = None,
        splits: Sequence[str] | None = None,
        revision: str | None = None,
        label_names: bool = False,
    ) -> None:
        if (path is None) == (name is None):
            raise ConfigError(
                "data: give either data.path (a folder written by save_to_disk) or data.source.name (a data set of the "
                f"hub); found {'both' if name else 'neither'}"
            )
        if path is not None and (config or revision):
            raise ConfigError("data.source: config and revision are for a data set of the hub, which `name` names")
        self._path, self._name, self._config, self._revision = path, name, config, revision
        self._splits, self._label_names = splits, label_names

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order, split by split. Raises `DataError` for what is absent, damaged or out of reach."""
        first: pa.Schema | None = None
        for split, dataset in self._datasets().items():
            for batch in self._read(dataset, split):
                first = first or batch.schema
                if differing := differences(batch.schema, first):
                    raise DataError(f"split {split!r} of {self._where} has other columns than the first: {differing}")
                yield batch

    @property
    def _where(self) -> str:
        return str(self._path) if self._path is not None else f"{self._name} of the hub"

    def _datasets(self) -> Mapping[str | None, Any]:
        """Split -> data set; the split is None where there is only one, without a name."""
        loaded = self._load()
        if not isinstance(loaded, Mapping):
            if self._splits is not None:
                raise ConfigError(f"data.source.splits: {self._where} has no splits; leave `splits` out")
            return {None: loaded}
        absent = [each for each in self._splits or () if each not in loaded]
        if absent:
            raise ConfigError(f"data.source.splits: {self._where} has no {absent[0]!r}; it has {', '.join(loaded)}")
        chosen = {split: loaded[split] for split in self._splits or loaded}
        if len(chosen) > 1 and any("split" in each.column_names for each in chosen.values()):
            raise DataError(
                f"{self._where} has a column 'split' beside its splits {', '.join(chosen)}: name one of them in "
                "data.source.splits"
            )
        return chosen

    def _load(self) -> Any:
        datasets = _library()
        try:
            if self._path is not None:
                return datasets.load_from_disk(self._path)
            return datasets.load_dataset(self._name, self._config, revision=self._revision)
        except ConnectionError as error:
            raise DataError(
                f"{self._where} cannot be reached: {_text(error)}. Where there is a network save it by "
                "`datasets.load_dataset(…).save_to_disk(FOLDER)`, and give data.path: FOLDER in place of "
                "data.source.name."
            ) from error
        except Exception as error:  # datasets raises whatever its backends raise
            if is_out_of_memory(error):
                raise
            hint = _parquet_hint(self._path) if self._path is not None else ""
            if self._name is not None and not isinstance(error, _UNLOADABLE):  # a download that broke off
                hint = ". Run it again: what was fetched is kept"
            raise DataError(f"{self._where} cannot be loaded: {_text(error).removesuffix('.')}{hint}") from error

    def _read(self, dataset: Any, split: str | None) -> Iterator[pa.RecordBatch]:
        rows = rows_within(dataset.data.nbytes / max(1, dataset.data.num_rows))
        if any(isinstance(each, _library().Image) for each in dataset.features.values()):
            rows = min(rows, _IMAGES_AT_ONCE)  # they may lie in files of their own
        try:
            for table in dataset.with_format("arrow").iter(batch_size=rows):
                columns = {name: self._column(table[name], each) for name, each in dataset.features.items()}
                if split is not None and "split" not in columns:
                    columns["split"] = pa.array([split] * table.num_rows, pa.string())
                for batch in pa.table(columns).combine_chunks().to_batches():
                    yield from bounded(batch)
        except _UNLOADABLE as error:
            raise DataError(f"{self._where} cannot be read: {_text(error)}") from error

    def _column(self, values: pa.ChunkedArray, feature: Any) -> pa.Array:
        column = pa.concat_arrays(values.chunks)
        if isinstance(feature, _library().Image):
            return feature.embed_storage(column).field("bytes")
        if isinstance(column.type, pa.BaseExtensionType):
            return self._flat(column, feature)
        if not isinstance(feature, _library().ClassLabel):
            return column
        column = pc.if_else(pc.equal(column, _UNLABELLED), pa.scalar(None, column.type), column)
        return pa.array(feature.names, pa.string()).take(column) if self._label_names else column

    def _flat(self, column: Any, feature: Any) -> pa.Array:
        """An `Array2D`, …, as one list of numbers per row."""
        if None in feature.shape or column.null_count:
            wrong = f"shape {list(feature.shape)}" if None in feature.shape else "empty rows"
            raise DataError(
                f"{self._where} has a column of arrays with {wrong}; expected arrays of one shape in every row. Leave "
                "it out by `remove_columns`, or save its rows as images or lists"
            )
        values = column.storage
        for _ in feature.shape:
            values = values.flatten()
        return pa.FixedSizeListArray.from_arrays(values, math.prod(feature.shape))


_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException)
"""What `datasets` raises: its own errors are of these, too."""


def _library() -> ModuleType:
    return package("datasets", "datasets")


def _parquet_hint(path: Path) -> str:
    """The end of a message about what `save_to_disk` did not write, where it is Parquet."""
    if path.suffix != ".parquet" and next(path.rglob("*.parquet"), None) is None:
        return ""
    return ". These are Parquet files: read them by data.source: {factory: kdpipe.data.sources:Table}"


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
