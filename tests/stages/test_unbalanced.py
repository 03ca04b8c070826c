"""Missing and unbalanced labels through the stages: balanced epochs and balanced distillation by params.yaml."""

from __future__ import annotations

import numpy as np
import pytest

from kdpipe.errors import ConfigError
from kdpipe.losses import BalancedKL
from kdpipe.tasks.language import LanguageModelling
from kdpipe_stages import train_student, train_teacher
from kdpipe_stages.building import balance_of, plan_json
from kdpipe_stages.lesson import Lesson
from kdpipe_stages.params import TrainSection
from projects import cache, make_project, params, project_in, write_params

BALANCED = {"factory": "kdpipe.losses:BalancedKL", "teacher": "big", "temperature": 2, "weight": 0.9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbalanced")
    make_project(path)
    cache(path)
    return path


def with_student(folder, **changes):
    settings = params()
    settings["student"] |= {"seeds": 1, "baselines": ["labels_only"], **changes}
    write_params(folder, settings)
    return project_in(folder)


def test_balanced_kl_counts_the_labels_that_the_student_knows(folder):
    lesson = Lesson(with_student(folder, losses=[BALANCED]))
    known = lesson.labels[lesson.labels >= 0]
    assert len(known) == 150
    assert lesson.terms[0].loss == BalancedKL(class_counts=np.bincount(known).tolist(), temperature=2)
    train_student.run(project_in(folder))


def test_balanced_kl_refuses_classes_without_a_label(folder):
    with pytest.raises(ConfigError, match=r"student\.losses\.0: BalancedKL: no labelled row of class \d"):
        Lesson(with_student(folder, losses=[BALANCED], labelled_rows=5))


def test_balanced_epochs_show_as_many_rows_of_each_class(folder, monkeypatch):
    shown = {}

    class Seen(train_student.BatchOrder):
        def __post_init__(self):
            super().__post_init__()
            arm = "student" if len(self.rows) > 150 else "labels_only"
            shown[arm] = np.concatenate(
                [rows for group in self.groups(0, self.steps_per_epoch) for rows in group.batches]
            )

    monkeypatch.setattr(train_student, "BatchOrder", Seen)
    train = params()["student"]["train"] | {"sampling": "balanced"}
    project = with_student(folder, train=train)
    lesson = Lesson(project)
    train_student.run(project)
    assert list(shown) == ["student", "labels_only"]
    for rows in shown.values():
        assert np.bincount(lesson.labels[rows][lesson.labels[rows] >= 0]).tolist() == [15] * 10
    assert len(shown["student"]) == len(lesson.rows)


def test_a_teacher_may_learn_from_balanced_epochs(tmp_path):
    make_project(tmp_path)
    cache(tmp_path)
    weights = next(project_in(tmp_path).teacher_model("big").rglob("*.safetensors")).read_bytes()
    settings = params()
    settings["teachers"]["big"]["train"]["sampling"] = "balanced"
    write_params(tmp_path, settings)
    project = project_in(tmp_path)
    train_teacher.run(project, "big")
    assert next(project.teacher_model("big").rglob("*.safetensors")).read_bytes() != weights


def test_sampling_that_is_not_asked_is_in_no_fingerprint():
    assert "sampling" not in plan_json(TrainSection(epochs=1))
    assert plan_json(TrainSection(epochs=1, sampling="balanced"))["sampling"] == "balanced"


def test_tokens_have_no_balanced_epochs(tmp_path):
    task = LanguageModelling(tmp_path, block_tokens=4)
    with pytest.raises(ConfigError, match=r"student\.train\.sampling: it is about rows of a class"):
        balance_of(task, TrainSection(epochs=1, sampling="balanced"), np.zeros(3, np.int64), "student.train")
    assert balance_of(task, TrainSection(epochs=1), np.zeros(3, np.int64), "student.train") is None
