"""What the rows of a table say, checked and encoded as a store's arrays.

Shapes: B rows of a batch, C classes, K places, N temperatures; `...` stands for further axes (tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from kdpipe.encodings import Dense, Int8, TargetEncoding, TopK
from kdpipe.errors import ConfigError, DataError
from kdpipe.store.manifest import COVERED
from kdpipe.store.statistics import teacher_statistics
from kdpipe.store.tables.checking import CheckedRows, Meaning, read_lists
from kdpipe.store.tables.columns import depth_of, numbers
from kdpipe.store.tables.files import TEMPERATURES, Table
from kdpipe.targets import OutputSpec


class TableTargets:
    """A table as one teacher's targets: either logits of every class, or the classes that each row names.

    `num_classes` is needed where the table does not say it; `temperatures` are those of `tail_log_mass` where the table
    does not name them. `features` are further columns. Raises `DataError` for columns that are absent or no numbers.
    """

    def __init__(
        self,
        table: Table,
        *,
        num_classes: int | None = None,
        temperatures: Sequence[float] | None = None,
        features: Sequence[str] = (),
    ) -> None:
        self.table = table
        self.is_sparse = "logits" not in table.names
        self.has_coverage = COVERED in table.names
        self._columns = self._columns_of(features)
        self._shapes = self._look()
        self.num_classes = self._checked_classes(num_classes)
        self.temperatures = self._checked_temperatures(temperatures)
        self._meaning = Meaning(
            path=table.path,
            tokens=self._shapes[self._columns[0]][:-1],
            num_classes=self.num_classes,
            temperatures=self.temperatures,
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
            view = numbers(batch["view"]) if has_views else np.zeros(batch.num_rows, np.int64)
            if view.dtype.kind not in "iu" or view.min() < 0:
                raise DataError(f"{self.table.path}: view holds other things than numbers from 0 up")
            views.append(view.astype(np.int64))
        if len(ids) == 1:
            raise DataError(f"{self.table.path} has no rows")
        return np.concatenate(ids), np.concatenate(views)

    def widest(self) -> int:
        """The most classes that a row names."""
        shape = (*self._meaning.tokens, None)
        batches = self.table.batches(["class_ids"])
        return max(int(read_lists(self.table.path, each, "class_ids", shape)[1].max()) for each in batches)

    def encoded(
        self, encodings: Mapping[str, TargetEncoding], wanted: NDArray[np.bool_]
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Batch by batch in the table's order: how many rows it has, and a store's arrays of the `wanted` ones.

        Raises `DataError` naming samples whose numbers mean nothing.
        """
        start, (sample_ids, _) = 0, self.index
        for batch in self.table.batches(self._columns):
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
            arrays, statistics = encoding.encode_kept(ids, log_probs, tails, self.num_classes), head.statistics()
        else:
            logits = rows.logits()
            if not torch.isfinite(logits.amax(dim=-1)).all():
                raise DataError(f"{self.table.path}: logits hold numbers that float32 cannot; expected smaller ones")
            arrays, statistics = encoding.encode(logits), teacher_statistics(logits)
        result = {f"logits{suffix}": each for suffix, each in arrays.items()}
        for output in self.outputs[1:]:
            features = encodings[output.name].encode(rows.features(output))
            result |= {output.name + suffix: each for suffix, each in features.items()}
        statistics[~rows.covered] = 0
        return {**result, "statistics": statistics, COVERED: rows.covered}

    def _columns_of(self, features: Sequence[str]) -> list[str]:
        """Columns that are read, the one that says most about shapes first."""
        table = self.table
        if self.is_sparse and "weights" in table.names:
            raise DataError(f"{table.path} holds draws from a distribution (weights), which cannot be imported")
        names = ["class_ids", "log_probs"] if self.is_sparse else ["logits"]
        if self.is_sparse and "tail_log_mass" in table.names:
            names.append("tail_log_mass")
        names += [*features, *([COVERED] if self.has_coverage else [])]
        absent = [each for each in ("sample_id", *names) if each not in table.names]
        if absent:
            raise DataError(
                f"{table.path} has no column {absent[0]!r}; expected sample_id, and logits or class_ids and log_probs. "
                f"It has {', '.join(table.names)}"
            )
        return names

    def _look(self) -> dict[str, tuple[int, ...]]:
        """Shape per row of each column, by the first rows that have one; that of `class_ids` may grow further down."""
        shapes: dict[str, tuple[int, ...]] = {}
        names = [each for each in self._columns if each != COVERED]
        for batch in self.table.batches(names):
            for name in names:
                values, _ = read_lists(self.table.path, batch, name, [None] * max(1, depth_of(batch[name].type)))
                shapes[name] = values.shape[1:]
            if all(all(shape) for shape in shapes.values()):
                break
        else:
            raise DataError(f"{self.table.path} has no row with {' and '.join(names)}")
        first, *others = self._columns[: len(self._columns) - self.has_coverage]
        if len(shapes[first]) > 2:
            raise DataError(f"{self.table.path}: {first} is nested {len(shapes[first])} lists deep; expected 1 or 2")
        for name in {"log_probs", "tail_log_mass"} & set(others):
            if len(shapes[name]) != len(shapes[first]):
                raise DataError(f"{self.table.path}: {name} and {first} are lists of different depth")
        return shapes

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
