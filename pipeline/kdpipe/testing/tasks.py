"""What every `Task` owes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Array, Columns, take
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.data.preparing import SourceColumns
from kdpipe.data.segments import content_digests
from kdpipe.evaluation import METRICS
from kdpipe.fingerprint import canonical_json
from kdpipe.inputs import num_rows, tensors_of
from kdpipe.preprocess import Preprocess
from kdpipe.tasks.base import Task, TokenTask, metrics_of, rows_of


class TaskContract:
    """Tests of a task. In a test file of yours: `class TestMine(TaskContract)`, with `task` and `batch`.

    `label_column` holds the labels; None where rows carry them (a `TokenTask`). Such a task predicts the next token,
    unless `predicts_next_token` is False.
    """

    label_column: str | None = "label"
    predicts_next_token = True

    def task(self, folder: Path) -> Task:
        """The task, the same every time; `folder` is empty."""
        raise NotImplementedError

    def batch(self) -> pa.RecordBatch:
        """Source rows of different content, 4 or more, of which some but not all have no label.

        Of a `TokenTask`: documents that make such rows.
        """
        raise NotImplementedError

    def preprocess(self, task: Task) -> Preprocess:
        """The way from rows to inputs; another than the task's own where that one cannot take these rows."""
        return task.default_preprocess()

    def test_it_is_a_task(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        assert isinstance(task, Task)
        assert task.num_classes >= 2
        assert task.class_names is None or len(task.class_names) == task.num_classes
        assert set(metrics_of(task)) <= set(METRICS)

    def test_every_pass_gives_the_same_rows(self, tmp_path: Path) -> None:
        """Of a task that makes rows of documents; others take the source's."""
        task = self.task(tmp_path)
        source, _ = rows_of(task, _OneBatch(self.batch()), self._source_columns())
        assert [*source.batches()] == [*source.batches()]

    def test_there_is_a_prepared_row_for_each(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        rows = self._rows(task)
        columns = task.to_inputs(rows, str)
        assert columns
        assert all(len(column) == rows.num_rows for column in columns.values())

    def test_rows_of_different_content_stay_different(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        rows = self._rows(task)
        assert len(set(_digests(task, rows))) == rows.num_rows

    def test_rows_do_not_depend_on_their_order(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        rows = self._rows(task)
        assert _digests(task, _backward(rows)) == _digests(task, rows)[::-1]

    def test_rows_do_not_depend_on_others(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        rows = self._rows(task)
        alone = [digest for row in range(rows.num_rows) for digest in _digests(task, rows.slice(row, 1))]
        assert alone == _digests(task, rows)

    def test_labels_are_class_numbers_or_missing(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        rows = self._rows(task)
        labels = self._labels(task, rows)
        assert labels.dtype == np.int64
        assert len(labels) == rows.num_rows
        assert ((labels == MISSING_LABEL) | ((labels >= 0) & (labels < task.num_classes))).all()
        assert (labels == MISSING_LABEL).any()
        assert (labels != MISSING_LABEL).any()

    def test_labels_stay_with_their_rows(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        rows = self._rows(task)
        labels = self._labels(task, rows)
        assert np.array_equal(self._labels(task, _backward(rows)), labels[::-1])
        assert np.array_equal(self._labels(task, rows.slice(1, 2)), labels[1:3])

    def test_a_preprocess_makes_inputs_and_keeps_what_it_learnt(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        columns, (one, other) = self._columns(task), (self.preprocess(task) for _ in range(2))
        assert isinstance(one, Preprocess)
        one.fit(iter([columns]))
        canonical_json(dict(one.state()))
        other.load_state(one.state())
        assert num_rows(one(columns)) == len(next(iter(columns.values())))
        assert _equal(tensors_of(one(columns)), tensors_of(other(columns)))

    def test_a_rows_input_does_not_depend_on_others(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        columns, preprocess = self._columns(task), self.preprocess(task)
        preprocess.fit(iter([columns]))
        whole = tensors_of(preprocess(columns))
        for row in range(len(whole[0])):
            alone = tensors_of(preprocess({name: take(each, np.array([row])) for name, each in columns.items()}))
            assert _equal(alone, [each[row : row + 1] for each in whole])

    def test_columns_by_name_have_a_value_per_row(self, tmp_path: Path) -> None:
        """Of a task that tells its rows by the source's column names."""
        task = self.task(tmp_path)
        by_name: Callable[[Columns], dict[str, Array]] | None = getattr(task, "column_values", None)
        if by_name is None:
            return
        rows = self._rows(task)
        values = by_name(task.to_inputs(rows, str))
        assert values
        assert set(values) <= set(rows.schema.names)
        assert all(each.shape == (rows.num_rows,) for each in values.values())

    def test_the_label_loss_is_per_row_and_leaves_missing_labels_out(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        labels = torch.tensor(self._labels(task, self._rows(task)))
        logits = torch.randn(*labels.shape, task.num_classes, generator=torch.Generator().manual_seed(0))
        logits.requires_grad_()
        loss = task.label_loss(logits, labels)
        assert loss.shape == labels.shape
        assert torch.isfinite(loss).all()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        missing = labels == MISSING_LABEL
        assert (loss[missing] == 0).all()
        assert (gradient[missing] == 0).all()
        assert (gradient[~missing] != 0).any(dim=-1).all()

    def test_each_label_is_the_token_after_its_own(self, tmp_path: Path) -> None:
        """Of a language model's rows: as `input_ids` (or the only input) have it, wherever a position counts."""
        task = self.task(tmp_path)
        if not (isinstance(task, TokenTask) and self.predicts_next_token):
            return
        columns, preprocess = self._columns(task), self.preprocess(task)
        preprocess.fit(iter([columns]))
        inputs = preprocess(columns)
        tokens = inputs["input_ids"] if isinstance(inputs, Mapping) and "input_ids" in inputs else None
        if tokens is None:
            (tokens,) = tensors_of(inputs)  # more than one: name the tokens input_ids
        labels, following = torch.tensor(task.token_labels(columns))[:, :-1], tokens[:, 1:].long()
        counted = labels != MISSING_LABEL
        assert counted.any(), "batch() has no document of two tokens that count"
        assert torch.equal(labels[counted], following[counted])

    def test_the_label_loss_of_a_row_is_its_own(self, tmp_path: Path) -> None:
        """Whatever rows it comes with."""
        task = self.task(tmp_path)
        labels = torch.tensor(self._labels(task, self._rows(task)))
        logits = torch.randn(*labels.shape, task.num_classes, generator=torch.Generator().manual_seed(0))
        alone = [task.label_loss(logits[row : row + 1], labels[row : row + 1]) for row in range(len(labels))]
        torch.testing.assert_close(torch.cat(alone), task.label_loss(logits, labels))

    def test_the_label_loss_is_least_at_the_label(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        labels = torch.tensor(self._labels(task, self._rows(task)))
        known = labels != MISSING_LABEL
        right = torch.nn.functional.one_hot(labels.clamp(min=0), task.num_classes).float() * 20
        wrong = right.roll(1, dims=-1)
        assert (task.label_loss(right, labels)[known] < task.label_loss(wrong, labels)[known]).all()
        assert (task.label_loss(right, labels, 0.1)[known] > task.label_loss(right, labels)[known]).all()

    def _source_columns(self) -> SourceColumns:
        return SourceColumns(label=self.label_column)

    def _rows(self, task: Task) -> pa.RecordBatch:
        """What is prepared: the source's rows, or those that the task makes of documents."""
        source, _ = rows_of(task, _OneBatch(self.batch()), self._source_columns())
        (rows,) = pa.Table.from_batches([*source.batches()]).combine_chunks().to_batches()
        return rows

    def _columns(self, task: Task) -> Columns:
        return task.to_inputs(self._rows(task), str)

    def _labels(self, task: Task, rows: pa.RecordBatch) -> NDArray[np.int64]:
        if isinstance(task, TokenTask):
            return task.token_labels(task.to_inputs(rows, str))
        assert self.label_column is not None
        return task.to_labels(rows.column(self.label_column), str)


class _OneBatch:
    """A source."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    def batches(self) -> Iterator[pa.RecordBatch]:
        return iter([self._batch])


def _digests(task: Task, rows: pa.RecordBatch) -> list[bytes]:
    return [bytes(each) for each in content_digests(task.to_inputs(rows, str))]


def _backward(rows: pa.RecordBatch) -> pa.RecordBatch:
    return rows.take(pa.array(range(rows.num_rows)[::-1]))


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
