"""Tables: Parquet, CSV, JSON Lines and Arrow files, one or a folder of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from kdpipe.data.sources.base import BLOCK_BYTES, BLOCK_ROWS, bounded, differences, files_below, reading, rows_within
from kdpipe.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How files are read: rows of a block, types, bytes parsed at a time, nulls, CSV's marks, the first schema."""

    batch_rows: int
    types: Mapping[str, Any]
    block_bytes: int
    null_values: Sequence[str]
    delimiter: str = ","
    decimal_point: str = "."
    first: pa.Schema | None = None


class Table:
    """A Parquet, CSV, JSON Lines or Arrow file, told by its name, or a folder of files of one of these kinds.

    `.parquet`; `.csv` with a header row; `.jsonl` and `.ndjson`, an object per line; `.arrow` and `.feather`, IPC files
    and streams. CSV and JSON Lines may be compressed (`.gz` behind the name); their types are those of the first
    `block_bytes` unless `types` names them by column (`string`, `int64`, `float64`, `date32`, …), and no row
    may be longer than `block_bytes`. Files of a folder come in the order of their names and have the same columns;
    those that match a pattern of `ignore` are left out.

    Of CSV, `delimiter` stands between the values of a row (`";"`, `"\\t"`) and `decimal_point` in a number (`","`).
    `null_values` are texts that stand for a missing value, such as `?`, in columns of text and, of CSV, in any column.
    `number_as` names a further column, of row numbers from 0 on over all files: ids where rows repeat and have no key.
    """

    def __init__(
        self,
        path: Path,
        batch_rows: int = BLOCK_ROWS,
        types: Mapping[str, str] | None = None,
        ignore: Sequence[str] = (),
        block_bytes: int = BLOCK_BYTES,
        null_values: Sequence[str] = (),
        number_as: str | None = None,
        delimiter: str = ",",
        decimal_point: str = ".",
    ) -> None:
        """Raises `ConfigError` for types that there are not, and for a delimiter that is no single character."""
        if not len(delimiter) == len(decimal_point) == 1 or delimiter == decimal_point:
            raise ConfigError(
                f"data.source: delimiter is {delimiter!r} and decimal_point {decimal_point!r}; expected one character "
                'each, not the same, such as delimiter: ";" and decimal_point: ","'
            )
        self.path = path
        self.batch_rows = batch_rows
        self._ignore, self._number_as = ignore, number_as
        arrow_types = {name: _type(name, alias) for name, alias in (types or {}).items()}
        self._options = _Options(
            batch_rows=batch_rows,
            types=arrow_types,
            block_bytes=block_bytes,
            null_values=null_values,
            delimiter=delimiter,
            decimal_point=decimal_point,
        )

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order. Raises `DataError` where a file is absent, damaged or of other columns than the first."""
        options, paths, first = self._options, self._files(), 0
        for path in paths:
            with reading(path):
                for block in _READERS[_kind(path)](path, options):
                    for batch in bounded(block):
                        batch.validate(full=True)  # text that is not UTF-8, wrong offsets
                        options = options if options.first is not None else replace(options, first=batch.schema)
                        if differing := differences(batch.schema, options.first):
                            raise DataError(
                                f"{path} has other columns than the first of {len(paths)} files: {differing}. All "
                                "files must have the same columns and types."
                            )
                        yield self._numbered(_without_marks(batch, options.null_values), first)
                        first += len(batch)

    def _numbered(self, batch: pa.RecordBatch, first: int) -> pa.RecordBatch:
        if self._number_as is None:
            return batch
        if self._number_as in batch.schema.names:
            raise ConfigError(
                f"data.source.number_as: {self.path} has a column {self._number_as!r} already; give another name"
            )
        return batch.add_column(0, self._number_as, pa.array(range(first, first + len(batch)), pa.int64()))

    def _files(self) -> list[Path]:
        if self.path.is_dir():
            paths = [self.path / name for name in files_below(self.path, _ENDINGS, self._ignore)]
        elif self.path.is_file():
            paths = [self.path]
            if not self.path.name.lower().endswith(_ENDINGS):
                raise DataError(f"{self.path}: expected a name ending in {', '.join(_ENDINGS)}")
        else:
            raise DataError(f"no file {self.path}: expected the rows there. Correct data.path in params.yaml.")
        kinds = {_kind(path): path.name for path in paths}
        if len(kinds) != 1:
            found = " and ".join(sorted(kinds.values())) or "none"
            raise DataError(f"{self.path}: expected files of one kind ({', '.join(_KINDS)}); found {found}")
        if self._options.types and not kinds.keys() & {".csv", ".jsonl", ".ndjson"}:
            raise ConfigError(f"data.source.types: {paths[0].name} has types of its own; leave them out")
        if (self._options.delimiter, self._options.decimal_point) != (",", ".") and ".csv" not in kinds:
            raise ConfigError(f"data.source: delimiter and decimal_point are about CSV; {paths[0].name} is none")
        return paths


def _without_marks(batch: pa.RecordBatch, marks: Sequence[str]) -> pa.RecordBatch:
    """With nulls where a column of text has one of `marks`."""
    columns = [
        pc.if_else(pc.is_in(each, pa.array(marks, each.type)), pa.scalar(None, each.type), each)
        if marks and (pa.types.is_string(each.type) or pa.types.is_large_string(each.type))
        else each
        for each in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _type(column: str, alias: str) -> Any:
    try:
        return pa.type_for_alias(alias)
    except ValueError:
        raise ConfigError(
            f"data.source.types.{column}: there is no type {alias!r}; expected one of Arrow's, such as string, int64, "
            "float64, bool, date32"
        ) from None


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(_PACKED)
    return next(kind for kind in _KINDS if name.endswith(kind))


def _read_parquet(path: Path, options: _Options) -> Iterator[pa.RecordBatch]:
    """Through small buffers: one column of one row group may be as large as the file."""
    with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            rows = rows_within(about.total_byte_size / max(1, about.num_rows), options.batch_rows)
            yield from file.iter_batches(batch_size=rows, row_groups=[group])


def _read_arrow(path: Path, options: _Options) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if is_file:
            with pa.ipc.open_file(mapped) as file:
                yield from (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            with pa.ipc.open_stream(mapped) as stream:
                yield from stream


def _read_csv(path: Path, options: _Options) -> Iterator[pa.RecordBatch]:
    types = options.types if options.first is None else {each.name: each.type for each in options.first}
    with (
        _parsing(path, options),
        pyarrow.csv.open_csv(
            path,
            pyarrow.csv.ReadOptions(block_size=options.block_bytes),
            pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=options.delimiter),
            pyarrow.csv.ConvertOptions(
                column_types=types,
                null_values=[*_NULLS_OF_CSV, *options.null_values],
                decimal_point=options.decimal_point,
            ),
        ) as reader,
    ):
        unknown = sorted(options.types.keys() - set(reader.schema.names))
        if unknown:
            columns = ", ".join(reader.schema.names)
            raise ConfigError(f"data.source.types.{unknown[0]}: {path} has no such column; it has {columns}")
        for each in reader.schema:
            if pa.types.is_binary(each.type) and each.name not in types:  # what text that is no UTF-8 becomes
                raise DataError(f"{path} cannot be read: column {each.name!r} is not UTF-8. Save the file as UTF-8.")
        yield from reader


def _read_json(path: Path, options: _Options) -> Iterator[pa.RecordBatch]:
    """With the types of the first block, as JSON says them; inferring makes dates of text, and loses nulls of lists."""
    block = pyarrow.json.ReadOptions(block_size=options.block_bytes)
    with _parsing(path, options):
        schema = options.first
        if schema is None:
            given = pyarrow.json.ParseOptions(explicit_schema=pa.schema(options.types) if options.types else None)
            with pyarrow.json.open_json(path, block, given) as reader:
                schema = pa.schema(
                    [(each.name, options.types.get(each.name, _plain(each.type))) for each in reader.schema]
                )
        known = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
        with pyarrow.json.open_json(path, block, known) as reader:
            yield from reader


def _plain(inferred: Any) -> Any:
    """The type without guesses: a string that looks like a date is a string."""
    if pa.types.is_timestamp(inferred):
        return pa.string()
    if pa.types.is_list(inferred):
        return pa.list_(_plain(inferred.value_type))
    if pa.types.is_struct(inferred):
        return pa.struct([(each.name, _plain(each.type)) for each in inferred])
    return inferred


@contextmanager
def _parsing(path: Path, options: _Options) -> Iterator[None]:
    """What to do about values that are not of the types that the first block has."""
    try:
        yield
    except pa.ArrowInvalid as error:
        reason, advice = " ".join(str(error).split()), ""
        if "straddling object" in reason:
            advice = f" A row is longer than {options.block_bytes} bytes: give data.source.block_bytes a larger number."
        elif "CSV parse error" in reason:
            advice = (
                f" The file is taken for UTF-8 text with values between {options.delimiter!r}; see "
                "data.source.delimiter."
            )
        elif "Column() changed from object" in reason:
            advice = ' A row is an object in a line of its own, such as {"text": "…", "label": 1}.'
        elif any(each in reason for each in ("conversion error", "convert JSON", "changed from", "unexpected field")):
            advice = (
                " Columns and types are those of the file's first rows: correct the value, or name the column's type in"
                " data.source.types, such as {label: string}."
            )
        raise DataError(f"{path} cannot be read: {reason}.{advice}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} cannot be read: names of its columns are not UTF-8. Save the file as UTF-8."
        ) from error


_NULLS_OF_CSV = pyarrow.csv.ConvertOptions().null_values
"""What Arrow takes for a missing number."""
_READERS = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
_KINDS = tuple(_READERS)
_PACKED = ".gz"
_ENDINGS = (*_KINDS, *(kind + _PACKED for kind in (".csv", ".jsonl", ".ndjson")))
