"""What every `Task` owes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from kdpipe.data.columns import Columns, take
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.data.segments import content_digests
from kdpipe.fingerprint import canonical_json
from kdpipe.inputs import num_rows, tensors_of
from kdpipe.preprocess import Preprocess
from kdpipe.tasks.base import Task, TokenTask, metrics_of


class TaskContract:
    """Tests of a task. In a test file of yours: `class TestMine(TaskContract)`, with `task` and `batch`.

    `label_column` holds the labels, None where rows carry them.
    """

    label_column: str | None = "label"

    def task(self, folder: Path) -> Task:
        """The task, the same every time; `folder` is empty."""
        raise NotImplementedError

    def batch(self) -> pa.RecordBatch:
        """Source rows of different content, 4 or more, of which some but not all have no label."""
        raise NotImplementedError

    def test_it_is_a_task(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        assert isinstance(task, Task)
        assert task.num_classes >= 2
        assert task.class_names is None or len(task.class_names) == task.num_classes
        assert all(isinstance(each, str) for each in metrics_of(task))

    def test_there_is_a_prepared_row_for_each(self, tmp_path: Path) -> None:
        columns = self._columns(self.task(tmp_path))
        assert columns
        assert all(len(column) == self.batch().num_rows for column in columns.values())

    def test_rows_do_not_depend_on_their_order_or_on_others(self, tmp_path: Path) -> None:
        task, batch = self.task(tmp_path), self.batch()
        digests = content_digests(self._columns(task))
        assert len(set(map(bytes, digests))) == batch.num_rows, "rows of different content"
        backward = batch.take(pa.array(range(batch.num_rows)[::-1]))
        assert [*map(bytes, content_digests(task.to_inputs(backward, str)))] == [*map(bytes, digests)][::-1]
        for row in range(batch.num_rows):
            assert bytes(content_digests(task.to_inputs(batch.slice(row, 1), str))[0]) == bytes(digests[row])

    def test_labels_are_class_numbers_or_missing(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        labels = self._labels(task)
        assert labels.dtype == np.int64
        assert ((labels == MISSING_LABEL) | ((labels >= 0) & (labels < task.num_classes))).all()
        assert (labels == MISSING_LABEL).any()
        assert (labels != MISSING_LABEL).any()

    def test_its_own_preprocess_makes_inputs_and_keeps_what_it_learnt(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        columns, (one, other) = self._columns(task), (task.default_preprocess() for _ in range(2))
        assert isinstance(one, Preprocess)
        one.fit([columns])
        other.load_state(one.state())
        canonical_json(dict(one.state()))
        found, again = one(columns), other(columns)
        assert num_rows(found) == self.batch().num_rows
        assert all(torch.equal(*pair) for pair in zip(tensors_of(found), tensors_of(again), strict=True))
        last = {name: take(column, np.array([self.batch().num_rows - 1])) for name, column in columns.items()}
        for single, whole in zip(tensors_of(one(last)), tensors_of(found), strict=True):
            assert torch.equal(single[0], whole[-1]), "a row's input does not depend on its batch"

    def test_the_label_loss_is_per_row_and_leaves_missing_labels_out(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        labels = torch.from_numpy(self._labels(task))
        logits = torch.randn(*labels.shape, task.num_classes, generator=torch.Generator().manual_seed(0))
        logits.requires_grad_()
        loss = task.label_loss(logits, labels)
        assert loss.shape == labels.shape
        assert torch.isfinite(loss).all()
        assert (loss[labels == MISSING_LABEL] == 0).all()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert (gradient[labels == MISSING_LABEL] == 0).all()
        assert (gradient[labels != MISSING_LABEL] != 0).any()

    def test_the_label_loss_is_least_at_the_label(self, tmp_path: Path) -> None:
        task = self.task(tmp_path)
        labels = torch.from_numpy(self._labels(task))
        known = labels != MISSING_LABEL
        right = torch.nn.functional.one_hot(labels.clamp(min=0), task.num_classes).float() * 20
        wrong = right.roll(1, dims=-1)
        assert (task.label_loss(right, labels)[known] < task.label_loss(wrong, labels)[known]).all()
        assert (task.label_loss(right, labels, 0.1)[known] > task.label_loss(right, labels)[known]).all()

    def _columns(self, task: Task) -> Columns:
        return task.to_inputs(self.batch(), str)

    def _labels(self, task: Task) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        if isinstance(task, TokenTask):
            return task.token_labels(self._columns(task))
        assert self.label_column is not None
        return task.to_labels(self.batch().column(self.label_column), str)
