"""What every `Teacher` owes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Array, Column, Columns, Ragged, take
from kdpipe.fingerprint import canonical_json
from kdpipe.inputs import LOGITS
from kdpipe.teachers.base import CLASS_IDS, COVERED, LOG_PROBS, TAIL_LOG_MASS, Teacher, abstains


class TeacherContract:
    """Tests of a teacher. In a test file of yours: `class TestMine(TeacherContract)`, with `teacher` and `columns`.

    `tolerance` is how much a row's logits may change with the other rows of its batch: last bits.
    """

    tolerance = 1e-4

    def teacher(self, folder: Path) -> Teacher:
        """A teacher that is ready to speak, the same every time; `folder` is empty."""
        raise NotImplementedError

    def columns(self) -> Columns:
        """Prepared rows of different content, 4 or more."""
        raise NotImplementedError

    def test_it_is_a_teacher(self, tmp_path: Path) -> None:
        teacher = self.teacher(tmp_path)
        assert isinstance(teacher, Teacher)
        names = [each.name for each in teacher.outputs]
        assert LOGITS in names
        assert len(set(names)) == len(names)

    def test_its_fingerprint_is_json_and_that_of_its_like(self, tmp_path: Path) -> None:
        texts = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            texts.append(canonical_json(dict(self.teacher(tmp_path / name).fingerprint)))
        assert texts[0] == texts[1]

    def test_it_says_what_it_promises(self, tmp_path: Path) -> None:
        """Every output, `[B, …]`, as numbers."""
        teacher, columns = self.teacher(tmp_path), self.columns()
        said, rows = teacher.predict(columns), _num_rows(columns)
        for output in teacher.outputs:
            if output.name == LOGITS and CLASS_IDS in said:
                places = (rows, *output.shape[:-1])
                assert said[LOG_PROBS].shape == said[CLASS_IDS].shape
                assert said[CLASS_IDS].shape[:-1] == said[TAIL_LOG_MASS].shape == places
                continue
            assert said[output.name].shape == (rows, *output.shape)
            assert said[output.name].is_floating_point()
        assert (COVERED in said) or not abstains(teacher)
        if COVERED in said:
            assert said[COVERED].dtype == torch.bool

    def test_its_logits_are_finite_or_rule_a_class_out(self, tmp_path: Path) -> None:
        said = self.teacher(tmp_path).predict(self.columns())
        logits = _spoken(said)
        assert not torch.isnan(logits).any()
        assert not torch.isposinf(logits).any()
        assert torch.isfinite(logits.amax(dim=-1)).all(), "every class of a row is ruled out"

    def test_it_says_the_same_again(self, tmp_path: Path) -> None:
        teacher, columns = self.teacher(tmp_path), self.columns()
        first, second = teacher.predict(columns), teacher.predict(columns)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_its_like_says_the_same(self, tmp_path: Path) -> None:
        said = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            said.append(self.teacher(tmp_path / name).predict(self.columns()))
        assert all(torch.equal(said[0][name], said[1][name]) for name in said[0])

    def test_a_row_is_spoken_about_by_itself(self, tmp_path: Path) -> None:
        """Whatever rows it comes with, and in whatever order: targets are stored by sample."""
        teacher, columns = self.teacher(tmp_path), self.columns()
        rows = _num_rows(columns)
        whole = teacher.predict(columns)
        for order in (np.arange(rows)[::-1].copy(), *np.arange(rows)[:, np.newaxis]):
            part = teacher.predict(_taken(columns, order))
            for name, values in whole.items():
                _assert_close(part[name], values[torch.from_numpy(order)], self.tolerance, name)

    def test_it_leaves_the_rows_as_they_are(self, tmp_path: Path) -> None:
        columns = self.columns()
        before = {name: copy.deepcopy(column) for name, column in columns.items()}
        self.teacher(tmp_path).predict(columns)
        assert all(
            np.array_equal(_values(columns[name]), _values(before[name]), equal_nan=_floats(before[name]))
            for name in before
        )


def _spoken(said: dict[str, Tensor]) -> Tensor:
    """Logits, or log-probs of what is kept, where the teacher spoke."""
    logits = said[LOGITS] if LOGITS in said else torch.cat([said[LOG_PROBS], said[TAIL_LOG_MASS].unsqueeze(-1)], dim=-1)
    return logits[said[COVERED]] if COVERED in said else logits


def _assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    if found.is_floating_point():
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, msg=lambda text: f"{name}: {text}")
    else:
        assert torch.equal(found, expected), name


def _taken(columns: Columns, rows: NDArray[np.int64]) -> Columns:
    return {name: take(column, rows) for name, column in columns.items()}


def _num_rows(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _values(column: Column) -> Array:
    return column.values if isinstance(column, Ragged) else column


def _floats(column: Column) -> bool:
    return _values(column).dtype.kind == "f"
