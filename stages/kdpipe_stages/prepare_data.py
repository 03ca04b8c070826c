"""`kdpipe prepare-data`: source -> data/prepared/ (inputs, labels, splits)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from kdpipe import durable
from kdpipe.config import resolve
from kdpipe.data.preparing import Prepared, RowSchema, prepare
from kdpipe.data.sources import Source
from kdpipe.errors import ConfigError, DataError, naming, some
from kdpipe.fingerprint import canonical_json
from kdpipe.tasks.base import TokenTask, rows_of
from kdpipe_stages.params import absent_splits, source_columns, split_plan, splits_asked_for
from kdpipe_stages.project import Project


def run(project: Project) -> Prepared:
    """Bring the prepared rows up to date with the source; rows that are known already are not written again."""
    section = project.params.data
    source, task = source_of(project), project.task()
    with project.only_writer("prepared", f"preparing {project.prepared}"):
        rows, columns = rows_of(task, source, source_columns(section.columns))
        prepared = prepare(
            rows,
            RowSchema(to_inputs=task.to_inputs, to_labels=task.to_labels),
            columns,
            split_plan(section.splits),
            project.prepared,
        )
        durable.write_text(project.prepared_settings, canonical_json(project.prepared_with()) + "\n")
    return prepared


def warnings(project: Project) -> list[str]:
    """What the prepared rows lack of that the other stages ask for: splits, and classes to learn or to measure."""
    counts = json.loads((project.prepared / "labels" / "classes.json").read_text())
    found, task = absent_splits(project.params, list(counts)), project.task()
    if isinstance(task, TokenTask):  # of a vocabulary, most splits lack some
        return found
    names = task.class_names or range(task.num_classes)
    asked = {split: where for where, splits in splits_asked_for(project.params).items() for split in splits}
    for split, where in asked.items():
        of_split = counts.get(split)
        lacking = [name for number, name in enumerate(names) if of_split and str(number) not in of_split]
        if lacking:
            found.append(f"{where}: no row of split {split!r} has the label {some(lacking)}")
    return found


def source_of(project: Project) -> Source:
    """The source; `data.path`, where it is given, is offered to its factory as `path`. Raises `ConfigError`."""
    section = project.params.data
    offered = {} if section.path is None else {"path": project.root / section.path}
    parameters = inspect.signature(resolve(section.source.path, project.root, "data.source")).parameters
    if section.path is None and "path" in parameters and parameters["path"].default is inspect.Parameter.empty:
        raise ConfigError(f"data.path: missing; {section.source.path} needs it")
    source = project.bind(section.source, "data.source", **offered).make()
    if not isinstance(source, Source):
        raise ConfigError(f"data.source: {section.source.path} is no Source (see kdpipe.data.sources.Source)")
    return _Named(section.source.path, source)


class _Named:
    """A source whose own errors name it."""

    def __init__(self, name: str, source: Source) -> None:
        self._name, self._source = name, source

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The source's. Raises `DataError` for what are no record batches.

        And for whatever its code raises but kdpipe's errors and the system's.
        """
        with naming(DataError, f"data.source: {self._name} fails", OSError):
            given: Any = self._source.batches()
            if isinstance(given, Mapping) or not isinstance(given, Iterable):
                raise self._no_batches(given)
            for batch in given:
                if not isinstance(batch, pa.RecordBatch):
                    raise self._no_batches(batch)
                yield batch

    def _no_batches(self, given: Any) -> DataError:
        kind = "nothing" if given is None else type(given).__name__
        return DataError(
            f"data.source: {self._name}: batches() gave {kind}; expected pyarrow RecordBatches, one after the other, "
            "such as pa.RecordBatch.from_pydict({'id': ['a', 'b'], 'x': [1.5, 2.5]}) or those of table.to_batches()"
        )
