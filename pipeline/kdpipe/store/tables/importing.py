"""What the rows of a table say, checked and encoded as a store's arrays.

Shapes: B rows of a batch, C classes, K places, N temperatures; `...` stands for further axes (tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from kdpipe.encodings import Dense, Int8, TargetEncoding, TopK, encoding_from_json
from kdpipe.errors import ConfigError, DataError
from kdpipe.store.manifest import COVERED
from kdpipe.store.statistics import kept_statistics, teacher_statistics
from kdpipe.store.tables.checking import CheckedRows, Meaning, read_lengths
from kdpipe.store.tables.columns import depth_of
from kdpipe.store.tables.files import TEMPERATURES, Table, batch_rows
from kdpipe.store.tables.naming import columns_not_read, columns_of
from kdpipe.targets import OutputSpec

_PLACE_BYTES = 4
"""Of a number in a padded batch, at least."""


class TableTargets:
    """A table as one teacher's targets: either logits of every class, or the classes that each row names.

    Rows of fewer tokens than the longest, or than `num_tokens`, are padded by tokens that are not covered.
    `num_classes` is needed where the table does not say it; `temperatures` are those of `tail_log_mass` where the table
    does not name them. `features` are further columns. Raises `DataError` for columns that are absent, misspelt or no
    numbers, and for rows of more tokens than `num_tokens`.
    """

    def __init__(
        self,
        table: Table,
        *,
        num_classes: int | None = None,
        temperatures: Sequence[float] | None = None,
        features: Sequence[str] = (),
        num_tokens: int | None = None,
    ) -> None:
        self.table, self._features = table, features
        self.is_sparse = "logits" not in table.names
        self._columns = columns_of(table, features)
        self.columns_not_read = columns_not_read(table, self._columns)
        self._shapes, is_ragged = self._look()
        if num_tokens is not None and len(self._shapes[self._columns[0]]) > 1:
            is_ragged |= self._widen(num_tokens)
        self.has_coverage = COVERED in table.names or is_ragged
        self.num_classes = self._checked_classes(num_classes)
        self.temperatures = self._checked_temperatures(temperatures)
        self._meaning = Meaning(
            path=table.path,
            tokens=self._shapes[self._columns[0]][:-1],
            num_classes=self.num_classes,
            temperatures=self.temperatures,
            stored=stored_encodings(table).get("logits"),
        )
        self.outputs = [
            OutputSpec(name="logits", shape=(*self._meaning.tokens, self.num_classes)),
            *(OutputSpec(name=name, shape=self._shapes[name], kind="features") for name in features),
        ]

    def check(self, encodings: Mapping[str, TargetEncoding]) -> None:
        """Raise `ConfigError` for encodings that the table cannot fill."""
        for output in self.outputs:
            encodings[output.name].check(output)
        encoding, path = encodings["logits"], self.table.path
        if not isinstance(encoding, TopK if self.is_sparse else Dense | Int8 | TopK):
            raise ConfigError(
                f"{path} holds {self._columns[0]}, which cannot be stored as {encoding.to_json()['name']}; "
                f"expected encoding: {'topk' if self.is_sparse else 'dense, int8 or topk'}"
            )
        if not self.is_sparse or not isinstance(encoding, TopK):
            return
        lacking = [each for each in encoding.temperatures if each != 1 and each not in self.temperatures]
        if lacking:
            raise ConfigError(
                f"{path} has no tail_log_mass at temperature {lacking[0]:g}, so that its targets cannot be softened by "
                f"it; it serves {', '.join(f'{each:g}' for each in sorted({1.0, *self.temperatures}))}"
            )

    @cached_property
    def index(self) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
        """Sample id and view of every row, in the table's order."""
        has_views = "view" in self.table.names
        ids, views = [np.empty(0, "<U1")], [np.empty(0, np.int64)]
        for batch in self.table.batches(["sample_id", *(["view"] if has_views else [])]):
            ids.append(self._sample_ids(batch["sample_id"]))
            view = batch["view"].to_numpy(zero_copy_only=False) if has_views else np.zeros(batch.num_rows, np.int64)
            if view.dtype.kind not in "iu" or view.min() < 0:
                raise DataError(f"{self.table.path}: view holds other things than numbers from 0 up")
            views.append(view.astype(np.int64))
        if len(ids) == 1:
            raise DataError(f"{self.table.path} has no rows")
        return np.concatenate(ids), np.concatenate(views)

    def widest(self) -> int:
        """The most classes that a row names."""
        return self._shapes["class_ids"][-1]

    def encoded(
        self, encodings: Mapping[str, TargetEncoding], wanted: NDArray[np.bool_]
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Batch by batch in the table's order: how many rows it has, and a store's arrays of the `wanted` ones.

        Raises `DataError` naming samples whose numbers mean nothing.
        """
        start, (sample_ids, _) = 0, self.index
        for batch in self._batches():
            if start + batch.num_rows > len(sample_ids):
                break
            here = np.flatnonzero(wanted[start : start + batch.num_rows])
            if len(here):
                rows = batch if len(here) == batch.num_rows else batch.take(here)
                yield (
                    batch.num_rows,
                    self._encode(CheckedRows(self._meaning, rows, sample_ids[start + here]), encodings),
                )
            else:
                yield batch.num_rows, {}
            start += batch.num_rows
        if start != len(sample_ids):
            raise DataError(f"{self.table.path} has {len(sample_ids)} sample ids, and columns of another length")

    def _encode(self, rows: CheckedRows, encodings: Mapping[str, TargetEncoding]) -> dict[str, NDArray[Any]]:
        encoding = encodings["logits"]
        if self.is_sparse:
            assert isinstance(encoding, TopK)
            head = rows.head(encoding)
            ids, log_probs, tails = map(torch.from_numpy, (head.ids, head.log_probs, head.tails))
            arrays = encoding.encode_kept(ids, log_probs, tails, self.num_classes)
            statistics = kept_statistics(ids, log_probs, tails[..., list(head.temperatures).index(1.0)])
        else:
            logits = rows.logits()
            arrays, statistics = encoding.encode(logits), teacher_statistics(logits)
        result = {f"logits{suffix}": each for suffix, each in arrays.items()}
        for output in self.outputs[1:]:
            features = encodings[output.name].encode(rows.features(output))
            result |= {output.name + suffix: each for suffix, each in features.items()}
        statistics[~rows.covered] = 0
        return {**result, "statistics": statistics, COVERED: rows.covered}

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """Batches that stay small when they are padded."""
        num_rows = batch_rows(_PLACE_BYTES * sum(math.prod(shape) for shape in self._shapes.values()))
        for batch in self.table.batches(self._columns):
            yield from (batch.slice(start, num_rows) for start in range(0, batch.num_rows, num_rows))

    def _look(self) -> tuple[dict[str, tuple[int, ...]], bool]:
        """Shape per row of each column, and whether some row has fewer tokens than others, or one without an entry."""
        names = [each for each in self._columns if each != COVERED]
        first, shapes = names[0], self._first_shapes(names)
        if len(shapes[first]) > 2:
            raise DataError(f"{self.table.path}: {first} is nested {len(shapes[first])} lists deep; expected 1 or 2")
        for name in {"log_probs", "tail_log_mass"} & set(names):
            if len(shapes[name]) != len(shapes[first]):
                raise DataError(f"{self.table.path}: {name} and {first} are lists of different depth")
        is_per_token = len(shapes[first]) == 2
        if not is_per_token and not self.is_sparse:
            return shapes, False  # what the first rows have is expected of all
        counted = [first, *(each for each in self._features if is_per_token and len(shapes[each]) > 1)]
        shortest = shapes[first]
        for batch in self.table.batches(counted):
            lengths = {name: read_lengths(self.table.path, batch, name, len(shapes[name])) for name in counted}
            shapes |= {name: _extremes(np.max, lengths[name], shapes[name]) for name in counted}
            shortest = _extremes(np.min, lengths[first], shortest)
        return shapes, is_per_token and (shortest[0] < shapes[first][0] or not shortest[1])

    def _widen(self, num_tokens: int) -> bool:
        """Give rows as many tokens as are wanted; returns whether these are more than any has."""
        most = self._shapes[self._columns[0]][0]
        if most > num_tokens:
            raise DataError(f"{self.table.path} has rows of up to {most} tokens; expected at most {num_tokens}")
        per_token = [name for name, shape in self._shapes.items() if len(shape) == 2 and shape[0] == most]
        self._shapes |= {name: (num_tokens, *self._shapes[name][1:]) for name in per_token}
        return most < num_tokens

    def _first_shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The longest lists of each column, in the first rows where none is without."""
        for batch in self.table.batches(names):
            shapes = {}
            for name in names:
                lengths = read_lengths(self.table.path, batch, name, max(1, depth_of(batch[name].type)))
                shapes[name] = _extremes(np.max, lengths, (0,) * len(lengths))
            if all(all(shape) for shape in shapes.values()):
                return shapes
        raise DataError(f"{self.table.path} has no row with {' and '.join(names)}")

    def _checked_classes(self, wanted: int | None) -> int:
        told = self.table.about.get("num_classes") if self.is_sparse else self._shapes["logits"][-1]
        if wanted is None and told is None:
            raise ConfigError(f"{self.table.path} does not say how many classes there are; give --num-classes")
        if wanted is not None and told is not None and wanted != told:
            raise ConfigError(f"{self.table.path} is about {told} classes; {wanted} are expected")
        return wanted if wanted is not None else int(told or 0)

    def _checked_temperatures(self, wanted: Sequence[float] | None) -> tuple[float, ...]:
        """Those of `tail_log_mass`; none without it."""
        if "tail_log_mass" not in self._columns:
            return ()
        width, told = self._shapes["tail_log_mass"][-1], self.table.about.get(TEMPERATURES) or wanted or (1.0,)
        if len(told) != width:
            raise ConfigError(
                f"{self.table.path}: tail_log_mass has {width} values per row, but there are {len(told)} temperatures, "
                f"{list(told)}; name one for each, in their order"
            )
        if len(set(told)) < len(told):
            raise ConfigError(f"{self.table.path}: tail_log_mass has the temperatures {list(told)}; expected each once")
        return tuple(map(float, told))

    def _sample_ids(self, column: Any) -> NDArray[np.str_]:
        try:
            named = pc.cast(column, pa.string())
        except pa.ArrowException:
            named = None
        if named is None or named.null_count or pa.types.is_floating(column.type):
            raise DataError(f"{self.table.path}: sample_id holds {column.type} or null; expected strings or integers")
        ids: NDArray[np.str_] = named.to_numpy(zero_copy_only=False).astype(np.str_)
        return ids


def stored_encodings(table: Table) -> dict[str, TargetEncoding]:
    """How those outputs of an exported table were stored that it still holds."""
    stored = {name: encoding_from_json(each) for name, each in table.about.get("encodings", {}).items()}
    return {name: each for name, each in stored.items() if name == "logits" or name in table.names}


def _extremes(
    choose: Callable[..., Any], lengths: Sequence[NDArray[np.int64]], others: tuple[int, ...]
) -> tuple[int, ...]:
    """The longest, or shortest, list of each level, among `others` too."""
    return tuple(int(choose(each, initial=other)) for each, other in zip(lengths, others, strict=True))
