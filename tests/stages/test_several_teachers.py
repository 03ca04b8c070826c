"""Students of several teachers: stores of other encodings, dtypes and coverage, mixed by one loss."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kdpipe.errors import ConfigError, StaleStoreError
from kdpipe.losses import CONSTANT, Schedule, mixed
from kdpipe_stages import cache_teacher, check, evaluate, prepare_data, train_student
from kdpipe_stages.cli import run
from kdpipe_stages.lesson import Lesson
from projects import digits, fails, make_project, params, project_in, write_params

TARGETS = {
    "dense16": {"dtype": "float16"},
    "whole": {"encoding": "int8"},
    "dense32": {"dtype": "float32"},
    "sparse": {"encoding": "topk", "k": 4, "temperatures": [1, 4]},
}
"""Names of the teachers, and how they are stored."""
ROWS_TOLD = {"dense16": slice(0, 1200), "whole": slice(0, None), "dense32": slice(600, None), "sparse": slice(0, None)}
THREE = ["dense16", "whole", "dense32"]


def kl(teacher, **options):
    return {"factory": "kdpipe.losses:ForwardKL", "teacher": teacher, "temperature": 4, **options}


def settings(*losses, train=None, **student):
    """Losses of a student of tables: what their teachers say is a noisy label, and not of all rows."""
    value = params(teachers={name: {"table": f"{name}.parquet"} for name in TARGETS}, targets=TARGETS)
    value["student"] |= {"losses": list(losses), "seeds": 1, "baselines": []} | student
    value["student"]["train"] |= train or {}
    return value


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A project with four stores."""
    folder = tmp_path_factory.mktemp("several")
    make_project(folder)
    table = digits(folder)
    labels = np.array(table["label"].to_pylist(), np.float64)  # NaN where there is none
    ids = [str(each) for each in table["id"].to_pylist()]
    for seed, (name, told) in enumerate(ROWS_TOLD.items()):
        noise = np.random.default_rng(seed).normal(size=(len(labels), 10)).astype(np.float32)
        logits = noise + (1 + seed) * (np.arange(10) == labels[:, np.newaxis])
        columns = {"sample_id": ids[told], "logits": list(logits.astype(np.float32)[told])}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    write_params(folder, settings(kl("whole")))
    project = project_in(folder)
    prepare_data.run(project)
    for name in TARGETS:
        cache_teacher.run(project, name)
    return folder


@pytest.fixture
def folder(cached, tmp_path, monkeypatch):
    shutil.copytree(cached, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def history_of(project):
    return json.loads((project.student_models / "student" / "seed-0" / "history.json").read_text())


@pytest.mark.parametrize("mix", [None, "mean", "confidence", {"dense32": 1, "dense16": 2, "whole": 0.5}])
def test_three_teachers_teach_one_student(folder, capsys, mix):
    loss = kl(THREE, weight=0.9) | ({} if mix is None else {"mix": mix})
    write_params(folder, settings(loss, kl("sparse", weight=0.1)))
    for command in ("check", "train-student", "evaluate"):
        assert run([command]) == 0
    assert "ForwardKL of dense16 and whole and dense32, ForwardKL of sparse" in capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"student", "teacher", "teacher_whole", "teacher_dense32", "teacher_sparse"} <= set(metrics)
    told = {"agreement", "kl_to_teacher", "reverse_kl_to_teacher"}
    others = {f"{key}_{name}" for key in told for name in ("whole", "dense32", "sparse")}
    assert told | others <= set(metrics["student"])
    history = history_of(project_in(folder))
    assert history[0]["dense16+whole+dense32.ForwardKL T=4"] > history[-1]["dense16+whole+dense32.ForwardKL T=4"]
    assert history[0]["sparse.ForwardKL T=4 gradient ratio"] > 0


@pytest.mark.parametrize("mix", ["mean", "confidence", {"dense32": 1, "dense16": 2, "whole": 0.5}])
def test_the_student_is_shown_the_mixture_of_what_the_stores_hold(folder, mix):
    write_params(folder, settings(kl(THREE, mix=mix)))
    lesson = Lesson(project_in(folder))
    inputs, rows = lesson.data.inputs, lesson.rows[::7]
    said = {name: {"logits": store.targets(inputs.sample_ids[rows].tolist())} for name, store in lesson.stores.items()}
    assert list(said) == THREE
    labels = torch.from_numpy(lesson.labels[rows])
    (term,) = lesson.terms
    in_order = (2.0, 0.5, 1.0) if isinstance(mix, dict) else mix
    expected = mixed([said[name]["logits"] for name in THREE], in_order, labels)
    found = term.targets(said, labels)
    assert torch.equal(found.log_probs(4.0), expected.log_probs(4.0))
    shares = found.log_weights.exp()
    covered = torch.stack([said[name]["logits"].covered for name in THREE], dim=-1)
    assert set(covered.sum(dim=-1).tolist()) == {2, 3}
    assert (shares[~covered] == 0).all()
    assert (shares[covered] > 0).all()


def test_a_teacher_in_a_list_of_its_own_is_that_teacher(folder):
    write_params(folder, settings(kl("sparse")))
    alone = Lesson(project_in(folder))
    write_params(folder, settings(kl(["sparse"])))
    listed = Lesson(project_in(folder))
    assert listed.fingerprint == alone.fingerprint


# What is refused, by `kdpipe check` already


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            kl(["whole", "sparse"]),
            r"losses\.0: on logits of whole, sparse: target 2 of 2 cannot be mixed exactly",
        ),
        (kl(["whole", "nobody"]), r"losses\.0\.teacher: there is no teacher 'nobody'"),
        (kl(["whole", "whole"]), r"losses\.0\.teacher: expected each teacher once"),
        (kl([]), r"losses\.0\.teacher: expected the name of a teacher, or a list of several"),
        (kl(3), r"losses\.0\.teacher: expected the name of a teacher, or a list of several \(found 3\)"),
        (kl("whole", mix="mean"), r"losses\.0\.mix: there is one teacher only, whole"),
        (kl(THREE, mix="median"), r"losses\.0\.mix: expected mean, confidence, or a mapping"),
        (kl(THREE, mix={"whole": 0, "dense16": 1, "dense32": 1}), r"losses\.0\.mix: expected mean, confidence, or a"),
        (kl(THREE, mix={"whole": 1, "dense16": 1}), r"losses\.0\.mix: it weighs whole, dense16, the teachers are"),
        (kl(THREE, output="hidden"), r"losses\.0\.output: 'hidden' of dense16 is not stored; stored are logits"),
        (kl(THREE, standardise=True), r"losses\.0: .*a mixture of teachers has probabilities and no logits"),
        ({"factory": "kdpipe.losses:LogitMSE", "teacher": THREE}, r"LogitMSE of logits: a mixture of teachers has"),
        (kl("whole", schedule={"kind": "warmup"}), r"losses\.0\.schedule\.fraction is missing; warmup needs it"),
        (kl("whole", schedule="cosine"), r"losses\.0\.schedule: expected a mapping"),
        (kl("whole", schedule={"kind": "steps"}), r"losses\.0\.schedule\.kind: .*'warmup', 'linear' or 'cosine'"),
        (kl("whole", schedule={"kind": "linear", "to": 0, "end": 1}), r"losses\.0\.schedule\.end: unknown key"),
        (kl("whole", weight=math.inf), r"losses\.0\.weight: .*finite"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, capsys, loss, message):
    write_params(folder, settings(loss))
    with pytest.raises(ConfigError, match=message):
        check.run(project_in(folder))
    fails(capsys, "check")


def test_confidence_needs_a_label_that_the_student_may_know(folder):
    write_params(folder, settings(kl(THREE, mix="confidence"), labelled_rows=0, label_weight=0))
    with pytest.raises(ConfigError, match=r"losses\.0\.mix: confidence is in a row's label, and"):
        Lesson(project_in(folder))


def test_every_teacher_of_a_list_must_have_its_store(folder):
    write_params(folder, settings(kl(THREE)))
    assert train_student.run(project_in(folder)).trained
    value = settings(kl(THREE))
    value["targets"] = value["targets"] | {"whole": {"encoding": "dense"}}
    write_params(folder, value)
    with pytest.raises(StaleStoreError, match=r"whole was made from other settings: targets\.encoding"):
        evaluate.run(project_in(folder))


# Fingerprints


def fingerprint(folder, *losses, **options):
    write_params(folder, settings(*losses, **options))
    return Lesson(project_in(folder)).fingerprint


def test_what_changes_a_student_is_in_its_fingerprint(folder):
    warmup = {"kind": "warmup", "fraction": 0.5}
    different = [
        fingerprint(folder, kl("whole")),
        fingerprint(folder, kl(["whole", "dense32"])),
        fingerprint(folder, kl(["whole", "dense32"], mix="confidence")),
        fingerprint(folder, kl(["whole", "dense32"], mix={"whole": 1, "dense32": 2})),
        fingerprint(folder, kl("whole", schedule=warmup)),
        fingerprint(folder, kl("whole", schedule=warmup | {"fraction": 0.25})),
        fingerprint(folder, kl("whole"), label_schedule=warmup),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint(folder, kl("whole", schedule="constant"), label_schedule="constant") == different[0]
    assert fingerprint(folder, kl("whole"), train={"log_gradients": False}) == different[0]


# Schedules


def test_schedules_of_params_are_those_of_the_terms(folder):
    losses = [
        kl("whole"),
        kl("whole", schedule={"kind": "warmup", "fraction": 0.25}),
        kl("whole", schedule={"kind": "linear", "to": 2}),
        kl("whole", schedule={"kind": "cosine", "to": 0}),
    ]
    write_params(folder, settings(*losses, label_weight=0, label_schedule={"kind": "linear", "to": 0.5}))
    project = project_in(folder)
    schedules = [term.schedule for term in Lesson(project).terms]
    assert schedules == [
        CONSTANT,
        Schedule(kind="warmup", fraction=0.25),
        Schedule(kind="linear", to=2.0),
        Schedule(kind="cosine", to=0.0),
    ]
    train_student.run(project)
    history = history_of(project)
    labels = [each["label weight"] for each in history]
    assert labels == pytest.approx([0.5 * step / (len(history) - 1) for step in range(len(history))])
    last = {name: history[-1][f"whole.ForwardKL T=4{name} weight"] for name in ("", " #2", " #3", " #4")}
    assert last == pytest.approx({"": 1, " #2": 1, " #3": 2, " #4": 0})


def test_labels_that_come_later_must_exist(folder):
    write_params(
        folder, settings(kl("whole"), labelled_rows=0, label_weight=0, label_schedule={"kind": "linear", "to": 1})
    )
    with pytest.raises(ConfigError, match=r"student\.label_weight is above 0 but no row has a label"):
        Lesson(project_in(folder))
