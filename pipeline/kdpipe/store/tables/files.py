"""Table files, a batch of rows at a time: Parquet, Arrow IPC, npz and JSON Lines in; the first three out.

Shapes: B rows of a batch, K places.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.data.npy import ArrayRows
from kdpipe.errors import DataError
from kdpipe.targets import is_number

FORMATS = {"parquet": ".parquet", "arrow": ".arrow", "npz": ".npz"}
"""Format that can be written -> the usual end of its files' names."""
ABOUT = "kdpipe"
TEMPERATURES = "temperatures"
BATCH_BYTES = 8 * 2**20
MAX_BATCH_ROWS = 65536
_UNREADABLE = (
    pa.ArrowException,
    OSError,
    ValueError,
    KeyError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, kw_only=True)
class Field:
    """A column: NumPy dtype and shape per row. `used` names the mask of those places of the last axis that count."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    used: str | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, padded."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


Values: TypeAlias = Mapping[str, NDArray[Any]]
"""Columns `[B, …]` of a batch by name, padded, and the masks that fields name."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table file: its columns' names, what kdpipe noted in it (`about`, empty in others' files), and its rows."""

    path: Path
    names: tuple[str, ...]
    about: Mapping[str, Any]
    read: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The named columns, some MiB at a time, in the file's order. Raises `DataError` where it is damaged."""
        try:
            for batch in self.read(names):
                if batch.num_rows:
                    yield batch.select(list(names))
        except DataError:
            raise
        except _UNREADABLE as error:
            raise DataError(_damaged(self.path, error)) from None


def batch_rows(row_bytes: float) -> int:
    """Rows of a batch of about `BATCH_BYTES`."""
    return int(max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1))))


def open_table(path: Path) -> Table:
    """A table file, told by its first bytes; JSON Lines by its name. Raises `DataError`."""
    if not path.is_file():
        raise DataError(f"there is no table at {path}")
    with path.open("rb") as file:
        start = file.read(6)
    opener = next((each for magic, each in _OPENERS.items() if start.startswith(magic)), None)
    if opener is None and path.suffix in (".jsonl", ".ndjson"):
        opener = _open_json_lines
    if opener is None:
        raise DataError(
            f"{path} is no table that can be read; expected Parquet, Arrow IPC or npz, or JSON Lines in a file named "
            "*.jsonl"
        )
    try:
        return opener(path)
    except _UNREADABLE as error:
        raise DataError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged or no table: {' '.join(str(error).split()) or type(error).__name__}"


def _about(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    return _parsed((metadata or {}).get(ABOUT.encode(), b"{}"))


def _parsed(text: bytes | str) -> Mapping[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"its {ABOUT!r} metadata is no JSON object")
    _check_temperatures(value.get(TEMPERATURES, []))
    if not isinstance(value.get("encodings", {}), dict):
        raise ValueError(f"the encodings of its {ABOUT!r} metadata are {value['encodings']!r}; expected an object")
    return value


def _check_temperatures(value: object) -> None:
    if not isinstance(value, list) or not all(map(is_number, value)):
        raise ValueError(f"its temperatures are {value!r}; expected a list of numbers")


def _open_parquet(path: Path) -> Table:
    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True) as file:
            # Of all columns: asking for those of one ends the process where the footer is damaged (pyarrow 26).
            about = file.metadata
            num_bytes = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
            rows = batch_rows(num_bytes / max(1, about.num_rows))
            yield from file.iter_batches(batch_size=rows, columns=list(names), use_threads=False)

    schema = pq.read_schema(path)
    return Table(path=path, names=tuple(schema.names), about=_about(schema.metadata), read=read)


def _open_arrow(path: Path) -> Table:
    """Arrow IPC files."""

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            for number in range(reader.num_record_batches):
                yield from _sliced(reader.get_batch(number).select(list(names)))

    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        schema = reader.schema
    return Table(path=path, names=tuple(schema.names), about=_about(schema.metadata), read=read)


def _open_arrow_stream(path: Path) -> Table:
    """Arrow IPC streams, as HF datasets keeps them."""

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                yield from _sliced(batch.select(list(names)))

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        schema = reader.schema
    return Table(path=path, names=tuple(schema.names), about=_about(schema.metadata), read=read)


def _sliced(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    batch.validate(full=True)  # a memory map: wrong offsets would be read wherever they point to
    rows = batch_rows(batch.nbytes / max(1, batch.num_rows))
    yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _open_json_lines(path: Path) -> Table:
    """Keys that the first lines do not have are refused; a line without one of theirs has null there."""
    with path.open("rb") as file:
        keys = _parsed_lines(file.readlines(BATCH_BYTES)).schema.names

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with path.open("rb") as file:
            while lines := file.readlines(BATCH_BYTES):
                table = _parsed_lines(lines)
                if late := set(table.schema.names) - set(keys):
                    raise DataError(
                        f"{path}: lines further down have a key {min(late)!r} that the first ones do not have; give "
                        "every line the same keys"
                    )
                for name in set(names) - set(table.schema.names):
                    table = table.append_column(name, pa.nulls(table.num_rows))
                yield from table.to_batches()

    return Table(path=path, names=tuple(keys), about={}, read=read)


def _parsed_lines(lines: Sequence[bytes]) -> pa.Table:
    content = b"".join(lines)

    def parsed(types: pa.Schema | None) -> pa.Table:
        reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(content) + 1)
        parsing = pyarrow.json.ParseOptions(explicit_schema=types)
        table = pyarrow.json.read_json(pa.BufferReader(content), read_options=reading, parse_options=parsing)
        return table.combine_chunks()

    table = parsed(None)
    types = pa.schema((each.name, _plain(each.type)) for each in table.schema)
    if types != table.schema or not _is_valid(table):
        table = parsed(types)
        table.validate(full=True)
    return table


def _plain(type_: pa.DataType) -> pa.DataType:
    """What JSON said: a string that looks like a date is a string."""
    return pa.string() if pa.types.is_timestamp(type_) else type_


def _is_valid(table: pa.Table) -> bool:
    """While it infers types, pyarrow 26 loses the null that a list begins with (apache/arrow#51305)."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _open_npz(path: Path) -> Table:
    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with zipfile.ZipFile(path) as archive, ExitStack() as opened:
            columns = {name: ArrayRows(opened.enter_context(archive.open(f"{name}.npy")), name) for name in names}
            rows = batch_rows(sum(each.row_bytes for each in columns.values()))
            (num_rows,) = {each.num_rows for each in columns.values()} or {0}
            for start in range(0, num_rows, rows):
                taken = {name: each.take(min(rows, num_rows - start)) for name, each in columns.items()}
                yield pa.RecordBatch.from_pydict({name: _arrow_of(values) for name, values in taken.items()})

    with zipfile.ZipFile(path) as archive:
        names = [each.removesuffix(".npy") for each in archive.namelist() if each.endswith(".npy")]
        about = dict(_parsed(str(_whole(archive, ABOUT)))) if ABOUT in names else {}
        if TEMPERATURES in names:
            about[TEMPERATURES] = _whole(archive, TEMPERATURES).tolist()
            _check_temperatures(about[TEMPERATURES])
    columns = tuple(each for each in names if each not in (ABOUT, TEMPERATURES))
    return Table(path=path, names=columns, about=about, read=read)


def _whole(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


_OPENERS: dict[bytes, Callable[[Path], Table]] = {
    b"PAR1": _open_parquet,
    b"ARROW1": _open_arrow,
    b"\xff\xff\xff\xff": _open_arrow_stream,
    b"PK\x03\x04": _open_npz,
}


def write_table(
    path: Path, fields: Sequence[Field], about: Mapping[str, Any], rows: Rows, *, replace: bool = False
) -> None:
    """Write a file whole, in the format that its name's end says; `path` holds all of it or what it held before.

    Raises `DataError` when it exists, unless `replace`.
    """
    writer = {ending: _WRITERS[name] for name, ending in FORMATS.items()}[path.suffix]
    if path.exists() and not replace:
        raise DataError(f"{path} exists already; name another file, or overwrite it by --force")
    with durable.writing(path, durable.own_temporary(path)) as file:
        writer(file, fields, about, rows)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a table is to hold: `batches(names)` gives those columns of all rows, in the same batches each time."""

    num_rows: int
    batches: Callable[[Sequence[str]], Iterator[Values]]


def _write_parquet(file: IO[bytes], fields: Sequence[Field], about: Mapping[str, Any], rows: Rows) -> None:
    schema = _schema(fields, about)
    options = {"compression": "zstd", "use_dictionary": ["view"], "write_page_checksum": True}
    with pq.ParquetWriter(file, schema, **options) as writer:
        for values in rows.batches([each.name for each in fields]):
            writer.write_batch(_record_batch(values, fields, schema))


def _write_arrow(file: IO[bytes], fields: Sequence[Field], about: Mapping[str, Any], rows: Rows) -> None:
    schema = _schema(fields, about)
    with pa.ipc.new_file(file, schema) as writer:
        for values in rows.batches([each.name for each in fields]):
            writer.write_batch(_record_batch(values, fields, schema))


def _write_npz(file: IO[bytes], fields: Sequence[Field], about: Mapping[str, Any], rows: Rows) -> None:
    """A zip file's members are written one after the other, so each column takes a pass of its own."""
    with zipfile.ZipFile(file, "w") as archive:
        for field in fields:
            with archive.open(zipfile.ZipInfo(f"{field.name}.npy"), "w", force_zip64=True) as member:
                shape = (rows.num_rows, *field.shape)
                header = {"descr": np.dtype(field.dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for values in rows.batches([field.name]):
                    member.write(np.ascontiguousarray(values[field.name], field.dtype).data)
        notes = {ABOUT: np.array(json.dumps(about)), TEMPERATURES: np.array(about[TEMPERATURES], np.float64)}
        for name, value in notes.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, value, allow_pickle=False)


_WRITERS = {"parquet": _write_parquet, "arrow": _write_arrow, "npz": _write_npz}


def _schema(fields: Sequence[Field], about: Mapping[str, Any]) -> pa.Schema:
    return pa.schema([(each.name, _type(each)) for each in fields], metadata={ABOUT: json.dumps(about)})


def _type(field: Field) -> Any:
    dtype = np.dtype(field.dtype)
    result = pa.string() if dtype.kind == "U" else pa.from_numpy_dtype(dtype)
    shape = list(field.shape)
    if field.used:
        result = pa.list_(result)
        shape.pop()
    for size in reversed(shape):
        result = pa.list_(result, size)
    return result


def _record_batch(values: Values, fields: Sequence[Field], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [_arrow_of(values[each.name], values[each.used] if each.used else None) for each in fields]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _arrow_of(values: NDArray[Any], used: NDArray[np.bool_] | None = None) -> Any:
    """A column of values `[B, …]`: lists of fixed size; innermost lists of the `used [B, …, K]` places only."""
    shape = values.shape[1:]
    if used is not None:
        ends = used.reshape(-1, used.shape[-1]).sum(axis=1).cumsum()
        offsets = np.concatenate([np.zeros(1, np.int32), ends.astype(np.int32)])
        column = pa.ListArray.from_arrays(offsets, pa.array(values[used]))
        shape = shape[:-1]
    else:
        flat = values.reshape(-1).astype(values.dtype.newbyteorder("="), copy=False)
        column = pa.array(flat.tolist(), pa.string()) if values.dtype.kind == "U" else pa.array(flat)
    for size in reversed(shape):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column
