"""What every `Teacher` owes, and every `Learner`.

Shapes: B rows, T tokens, k kept classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.caching import are_logits
from kdpipe.data.columns import Array, Column, Columns, Ragged, take
from kdpipe.errors import KdpipeError
from kdpipe.fingerprint import canonical_json
from kdpipe.inputs import LOGITS
from kdpipe.targets import are_of_places, zero_unless
from kdpipe.teachers.base import CLASS_IDS, COVERED, LOG_PROBS, TAIL_LOG_MASS, Learner, Teacher, abstains

_MASS_TOLERANCE = 1e-3
_MIN_ROWS = 4


class TeacherContract:
    """Tests of a teacher. In a test file of yours: `class TestMine(TeacherContract)`, with the three methods below.

    `tolerance` is how much a row's numbers may change with the other rows of its batch: last bits.
    """

    tolerance = 1e-4

    def teacher(self, folder: Path) -> Teacher:
        """A teacher that is ready to speak, the same every time; `folder` is empty."""
        raise NotImplementedError

    def another(self, folder: Path) -> Teacher:
        """One that says otherwise about the same rows: with other weights, rules or settings; `folder` is empty."""
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
        assert self._num_rows >= _MIN_ROWS, "columns() has too few rows"

    def test_its_fingerprint_is_json_and_that_of_its_like(self, tmp_path: Path) -> None:
        one, other = (canonical_json(dict(each.fingerprint)) for each in self._two(tmp_path))
        assert one == other

    def test_who_says_otherwise_has_another_fingerprint(self, tmp_path: Path) -> None:
        """Without it a store would hold what another teacher said."""
        (tmp_path / "one").mkdir()
        (tmp_path / "another").mkdir()
        one, another = self.teacher(tmp_path / "one"), self.another(tmp_path / "another")
        said, otherwise = (_heard(each.predict(self.columns())) for each in (one, another))
        assert not all(torch.equal(said[name], otherwise[name]) for name in said), "another() says the same"
        assert dict(one.fingerprint) != dict(another.fingerprint)

    def test_it_says_what_it_promises(self, tmp_path: Path) -> None:
        """Every output `[B, …]`, as numbers."""
        teacher = self.teacher(tmp_path)
        said, kept = teacher.predict(self.columns()), getattr(teacher, "num_kept", None)
        for output in teacher.outputs:
            shape = (self._num_rows, *output.shape)
            if output.name == LOGITS and kept is not None:
                assert said[CLASS_IDS].dtype == torch.int64
                assert said[CLASS_IDS].shape == said[LOG_PROBS].shape == (*shape[:-1], kept)
                assert said[TAIL_LOG_MASS].shape == shape[:-1]
            else:
                assert said[output.name].shape == shape
                assert said[output.name].is_floating_point()

    def test_it_tells_what_it_covers_if_and_only_if_it_abstains(self, tmp_path: Path) -> None:
        teacher = self.teacher(tmp_path)
        said = teacher.predict(self.columns())
        assert (COVERED in said) == abstains(teacher)
        if abstains(teacher):
            assert said[COVERED].dtype == torch.bool
            assert said[COVERED].shape == _places(said)
            assert said[COVERED].any(), "columns() has no row that it speaks about"

    def test_its_logits_are_finite_or_rule_a_class_out(self, tmp_path: Path) -> None:
        logits = _heard(self.teacher(tmp_path).predict(self.columns())).get(LOGITS, torch.zeros(1, 1))
        assert not torch.isnan(logits).any()
        assert not torch.isposinf(logits).any()
        assert torch.isfinite(logits.amax(dim=-1)).all(), "every class of a row is ruled out"

    def test_its_logits_are_no_probabilities(self, tmp_path: Path) -> None:
        said = self.teacher(tmp_path).predict(self.columns())
        if LOGITS in said:
            are_logits(said[LOGITS], said.get(COVERED))

    def test_what_it_keeps_are_classes_and_their_mass(self, tmp_path: Path) -> None:
        """Of a teacher that knows its most probable classes only: in ascending order; with the tail, a mass of 1."""
        teacher = self.teacher(tmp_path)
        said = teacher.predict(self.columns())
        if CLASS_IDS not in said:
            return
        (num_classes,) = (each.shape[-1] for each in teacher.outputs if each.name == LOGITS)
        spoken = said.get(COVERED, torch.ones(_places(said), dtype=torch.bool))
        ids, log_probs, tail = (said[name][spoken] for name in (CLASS_IDS, LOG_PROBS, TAIL_LOG_MASS))
        assert ((ids >= 0) & (ids < num_classes)).all()
        used = ~torch.isneginf(log_probs)
        assert ((ids.diff(dim=-1) > 0) | ~used[..., 1:]).all()
        mass = torch.logaddexp(log_probs.double().logsumexp(dim=-1), tail.double())
        assert (mass.abs() < _MASS_TOLERANCE).all()

    def test_it_says_the_same_again(self, tmp_path: Path) -> None:
        teacher, columns = self.teacher(tmp_path), self.columns()
        _assert_close(teacher.predict(columns), teacher.predict(columns), 0)

    def test_its_like_says_the_same(self, tmp_path: Path) -> None:
        one, other = self._two(tmp_path)
        _assert_close(one.predict(self.columns()), other.predict(self.columns()), 0)

    def test_a_row_is_spoken_about_by_itself(self, tmp_path: Path) -> None:
        """Whatever rows it comes with, and in whatever order: targets are stored by sample."""
        teacher, columns = self.teacher(tmp_path), self.columns()
        whole = teacher.predict(columns)
        for order in (np.arange(self._num_rows)[::-1].copy(), *np.arange(self._num_rows)[:, np.newaxis]):
            found = teacher.predict({name: take(column, order) for name, column in columns.items()})
            _assert_close(found, {name: each[torch.from_numpy(order)] for name, each in whole.items()}, self.tolerance)

    def test_it_tells_the_length_of_a_row_by_itself(self, tmp_path: Path) -> None:
        """Of a teacher that can tell how many tokens rows are."""
        teacher, columns = self.teacher(tmp_path), self.columns()
        lengths = getattr(teacher, "lengths", None)
        if lengths is None:
            return
        backward = np.arange(self._num_rows)[::-1].copy()
        found = np.asarray(lengths(columns))
        assert found.shape == (self._num_rows,)
        assert (found >= 1).all()
        again = lengths({name: take(column, backward) for name, column in columns.items()})
        assert np.array_equal(again, found[backward])

    def test_it_leaves_the_rows_as_they_are(self, tmp_path: Path) -> None:
        columns = self.columns()
        before = copy.deepcopy({name: _values(column) for name, column in columns.items()})
        self.teacher(tmp_path).predict(columns)
        for name, values in before.items():
            assert np.array_equal(_values(columns[name]), values, equal_nan=values.dtype.kind == "f")

    @property
    def _num_rows(self) -> int:
        return len(next(iter(self.columns().values())))

    def _two(self, folder: Path) -> tuple[Teacher, Teacher]:
        (folder / "one").mkdir()
        (folder / "other").mkdir()
        return self.teacher(folder / "one"), self.teacher(folder / "other")


class LearningTeacher(Teacher, Learner, Protocol):
    """A teacher that learns from rows before it speaks."""


class LearnerContract(TeacherContract):
    """Tests of a teacher that learns from rows, and those of every teacher; `untaught` takes the place of `teacher`."""

    def untaught(self, folder: Path) -> LearningTeacher:
        """One that has not learnt anything yet; `folder` is empty."""
        raise NotImplementedError

    def labels(self) -> NDArray[np.int64]:
        """A label for each row of `columns`; -1: none."""
        raise NotImplementedError

    def teacher(self, folder: Path) -> LearningTeacher:
        """One that took back what another one had learnt."""
        self._saved(folder)
        teacher = self.untaught(folder)
        teacher.load(folder / "learnt")
        return teacher

    def test_the_same_rows_leave_the_same_bytes(self, tmp_path: Path) -> None:
        written = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            self._saved(tmp_path / name)
            files = (tmp_path / name / "learnt").iterdir()
            written.append({each.name: each.read_bytes() for each in files})
        assert written[0]
        assert written[0] == written[1]

    def test_it_says_what_it_said_before_it_was_saved(self, tmp_path: Path) -> None:
        learnt, columns = self._saved(tmp_path), self.columns()
        again = self.untaught(tmp_path)
        again.load(tmp_path / "learnt")
        _assert_close(again.predict(columns), learnt.predict(columns), 0)

    def test_it_learns_from_blocks_as_from_all_rows_at_once(self, tmp_path: Path) -> None:
        one, other = self.untaught(tmp_path), self.untaught(tmp_path)
        halves = np.array_split(np.arange(self._num_rows), 2)
        one.fit(iter([(self.columns(), self.labels())]))
        other.fit(
            ({name: take(each, half) for name, each in self.columns().items()}, self.labels()[half]) for half in halves
        )
        _assert_close(one.predict(self.columns()), other.predict(self.columns()), self.tolerance)

    def test_who_has_learnt_nothing_says_so(self, tmp_path: Path) -> None:
        """At the latest when it is asked for its fingerprint: before it speaks."""
        teacher = self.untaught(tmp_path)
        with pytest.raises(KdpipeError):
            dict(teacher.fingerprint)

    def _saved(self, folder: Path) -> LearningTeacher:
        teacher = self.untaught(folder)
        teacher.fit(iter([(self.columns(), self.labels())]))
        (folder / "learnt").mkdir()
        teacher.save(folder / "learnt")
        return teacher


def _places(said: dict[str, Tensor]) -> torch.Size:
    """Shape of the logits without their classes: `[B]` or `[B, T]`."""
    return said[TAIL_LOG_MASS].shape if CLASS_IDS in said else said[LOGITS].shape[:-1]


def _heard(said: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was said; zero where the teacher abstained, as that is not looked at."""
    if COVERED not in said:
        return said
    covered = said[COVERED]
    of_rows = covered.flatten(1).any(dim=1) if covered.ndim > 1 else covered
    heard = {COVERED: covered}
    for name, values in said.items():
        if name != COVERED:
            of_tokens = name == TAIL_LOG_MASS or are_of_places(values.shape, covered.shape)
            spoken = covered if of_tokens else of_rows
            heard[name] = zero_unless(spoken, values)
    return heard


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    found, expected = _heard(found), _heard(expected)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        apart = tolerance if values.is_floating_point() else 0
        torch.testing.assert_close(values, expected[name], atol=apart, rtol=apart, equal_nan=True, msg=_of(name))


def _of(name: str) -> Callable[[str], str]:
    return lambda text: f"{name}: {text}"


def _values(column: Column) -> Array:
    return column.values if isinstance(column, Ragged) else column
