"""What the student learns from: its rows, the labels that it may know, stores that fit. No teacher is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.config import Factory
from kdpipe.data.prepared import MISSING_LABEL, PreparedData
from kdpipe.errors import ConfigError, StaleStoreError, StoreNotFoundError
from kdpipe.fingerprint import digest, digest_file, joined, uniform_by_id
from kdpipe.losses import (
    reuses_classifier,
)
from kdpipe.store import TargetStore
from kdpipe.tasks.base import Task
from kdpipe.views import PartnerPlan, ViewSpec
from kdpipe_stages.building import DESCRIPTION, ModelSpec, label_loss, plan_json
from kdpipe_stages.made_of import first_changed
from kdpipe_stages.params import (
    StudentSection,
    differing,
    first_difference,
    store_sections,
    teacher_and_members,
    to_json,
)
from kdpipe_stages.project import Project
from kdpipe_stages.replay import check_kept_views, check_partners
from kdpipe_stages.terms import (
    Shape,
    Stored,
    check_batches,
    check_known_labels,
    check_logits_learn,
    check_mixing,
    check_term,
    no_classifier,
    terms_of,
)

STUDENT = "student"
ARMS = {STUDENT: "student", "labels_only": "baseline", "label_smoothing": "baseline_label_smoothing"}
"""Arm of `train-student` -> its key in metrics.json and timings.json."""


class Lesson:
    """Rows, known labels, stores and loss terms of `student`, checked against each other."""

    def __init__(self, project: Project) -> None:
        """Raises `ConfigError`, `DataError`, `StoreNotFoundError`, `StaleStoreError`."""
        self.section: StudentSection = project.params.student
        self.task: Task = project.task()
        self.data: PreparedData = project.prepared_data()
        self.rows = self.data.rows_of(self.section.distil_on)
        self.labels = known_labels(self.data, self.rows, self.section)
        self.spec = ModelSpec(
            where="student",
            model=self.section.model,
            preprocess=self.section.preprocess,
            logits=self.section.logits,
        )
        self.terms = terms_of(project, self.labels)
        self.stores = {name: open_checked_store(project, name) for name in teachers_of(self.section)}
        self.views = project.views_of(self.data.inputs)
        for name, store in self.stores.items():
            check_partners(store, self.data.inputs, self.views, name)
            check_kept_views(store, self.data.inputs, self.views, name)
        for index, term in enumerate(self.terms):
            if not term.student_output:
                self.check_heard(index, self.stores[term.teachers[0]].outputs["logits"].shape)
            check_batches(f"student.losses.{index}", term, self.section.train)
            check_mixing(f"student.losses.{index}", term, self.views)
        check_logits_learn(self.terms, self.section)
        self._project = project
        self._check_classifiers()
        check_known_labels(self.section, self.terms, len(self.labelled))
        self.label_loss = label_loss(self.task, self.section.train, self.labels[self.rows], "student.train")

    @property
    def labelled(self) -> NDArray[np.int64]:
        """Rows whose label the student may know."""
        known: NDArray[np.int64] = self.rows[self.labels[self.rows] != MISSING_LABEL]
        return known

    @property
    def views_of_labelled(self) -> ViewSpec:
        """The views of arms that know labelled rows alone: where rows are mixed, these are with each other."""
        if self.views.partners is None:
            return self.views
        known = np.where(self.labels == MISSING_LABEL, "", "labelled")
        return replace(self.views, partners=PartnerPlan(self.data.inputs.sample_ids, known))

    def outputs_of(self, teacher: str) -> list[str]:
        """Outputs of a teacher that a loss listens to."""
        return list(dict.fromkeys(term.output for term in self.terms if teacher in term.teachers))

    def check_heard(self, index: int, heard: Shape) -> None:
        """Raise `ConfigError` unless a term can compare what it hears of the student, of this shape per row."""
        term, stored = self.terms[index], {}
        for name in term.teachers:
            store = self.stores[name]
            covered = store.outputs["logits"].shape[:-1] if store.manifest.coverage else None
            output, encoding = store.outputs[term.output], store.encodings[term.output]
            stored[name] = Stored(encoding=encoding, output=output, covered=covered)
        check_term(f"student.losses.{index}", term, stored, heard)

    @cached_property
    def fingerprint(self) -> str:
        """Whatever changes a student's weights, but arm, seed and the number of ranks."""
        section = to_json(self.section)
        for free in ("seeds", "baselines"):
            section.pop(free)
        sources = [self.spec.sources(self._project), self._project.sources(self._project.params.task, "task")]
        views = self._project.params.views
        if views.count and views.transform:
            sources.append(self._project.sources(views.transform, "views.transform"))
        section["losses"] = [_as_asked(each) for each in section["losses"]]
        if self.section.label_schedule is None:  # as an earlier kdpipe took it
            section.pop("label_schedule")
        for each in self.section.losses:
            sources.append(self._project.sources(Factory(path=each.factory), "student.losses"))
        ids = self.data.inputs.sample_ids[self.rows].tolist()
        content = self.data.inputs.digests[self.rows].tobytes().hex()
        return digest(
            {
                "kind": "student",
                "section": {**section, "train": plan_json(self.section.train)},
                "sources": joined(*sources),
                "task": self._project.params.task.to_json(),
                "views": to_json(views) if views.count else None,
                "stores": {name: self._state_of(name) for name in self.stores},
                "init_from": None if self.section.init_from is None else self._digest_of(self.section.init_from),
                "rows": digest([self.rows.tolist(), ids, content, self.labels[self.rows].tolist()]),
            }
        )

    def _state_of(self, teacher: str) -> str:
        store = self.stores[teacher]
        if any(reuses_classifier(term.loss) for term in self.terms if teacher in term.teachers):
            return digest([store.state_digest(), store.manifest.classifier])
        return store.state_digest()

    def _digest_of(self, weights: str) -> str:
        path = self._project.root / weights
        if not path.is_file():
            raise ConfigError(f"student.init_from: there is no file {path}")
        return digest_file(path)

    def _check_classifiers(self) -> None:
        for index, term in enumerate(self.terms):
            for name in term.teachers if reuses_classifier(term.loss) else ():
                if self.stores[name].manifest.classifier is None:
                    raise ConfigError(no_classifier(index, term, name))


def teachers_of(section: StudentSection) -> list[str]:
    """Names of the teachers that the losses listen to, in their order."""
    return list(dict.fromkeys(name for each in section.losses for name in each.teachers))


_NOT_ASKED = {"student_output": "", "projector": None, "mix": None, "schedule": None}


def _as_asked(loss: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of student.losses without what it does not ask for, as an earlier kdpipe took it."""
    return {key: value for key, value in loss.items() if key not in _NOT_ASKED or value != _NOT_ASKED[key]}


def known_labels(data: PreparedData, rows: NDArray[np.int64], section: StudentSection) -> NDArray[np.int64]:
    """Labels by row number, -1 where the student must not know them.

    `labelled_rows: n` keeps the first n labelled rows by hash of (labelled_seed, sample id): stable under growth.
    """
    labelled = rows[data.labels[rows] != MISSING_LABEL]
    wanted = len(labelled)
    if section.labelled_rows is not None:
        wanted = section.labelled_rows
    elif section.labelled_fraction is not None:
        wanted = round(section.labelled_fraction * len(labelled))
    if wanted > len(labelled):
        raise ConfigError(
            f"student: labels for {wanted} rows were asked, but only {len(labelled)} of the {len(rows)} rows of "
            f"{', '.join(section.distil_on)} have one"
        )
    draws = uniform_by_id(data.inputs.sample_ids[labelled].tolist(), section.labelled_seed, "labelled")
    kept = labelled[np.argsort(draws, kind="stable")[:wanted]]
    labels = np.full(len(data.inputs), MISSING_LABEL, np.int64)
    labels[kept] = data.labels[kept]
    return labels


def open_checked_store(project: Project, name: str) -> TargetStore:
    """A published store, if it was made from today's settings, and from the files that its teacher is made of today.

    No teacher is needed to tell: files that are absent are not missed.

    Raises `StoreNotFoundError`, `IncompleteStoreError` or `StaleStoreError` naming the command to run.
    """
    command = f"kdpipe cache-teacher {name}"
    try:
        store = TargetStore.open(project.store(name))
    except StoreNotFoundError:
        raise StoreNotFoundError(f"there is no target store at {project.store(name)}. Run `{command}`.") from None
    if not store.manifest.sections:
        raise StaleStoreError(
            f"{store.path} is a store of a table alone, which tells nothing of this project's rows. Name the table as "
            f"teachers.{name}.table, remove the store and run `{command}`."
        )
    today = store_sections(project.params, name)
    if "members" not in store.manifest.sections:  # as an earlier kdpipe wrote it
        today.pop("members", None)
    difference = first_difference(store.manifest.sections, today)
    if difference:
        raise StaleStoreError(
            f"{store.path} was made from other settings: {difference}. Restore them, or run "
            f"`kdpipe train-teacher` and `{command}`."
        )
    files = store.manifest.teacher.get("files", {})
    changed = first_changed(project, name, store.manifest.ingredients["teacher"], files)
    if changed and changed not in files:
        raise StaleStoreError(
            f"{store.path} was made without {project.root / changed}, which is among the files that teachers.{name} is "
            f"made of today. Remove it, or run `{command}`."
        )
    if changed:
        raise StaleStoreError(
            f"{store.path} was made from another {project.root / changed} than today's, of which teachers.{name} is "
            f"made. Put the earlier one back, or run `kdpipe train-teacher` and `{command}`."
        )
    for each in teacher_and_members(project.params, name):
        _check_learnt_from(store, project, each)
    _check_transform(store, project, command)
    return store


def _check_learnt_from(store: TargetStore, project: Project, teacher: str) -> None:
    """That a model which was trained here learnt from today's rows and labels; where it is absent nothing is missed."""
    path = project.teacher_model(teacher) / DESCRIPTION
    note = json.loads(path.read_text()) if path.is_file() else {}
    learnt_from = note.get("learnt_from")
    split_file = project.split_file(str(note.get("split")))
    if learnt_from and split_file.is_file() and digest_file(split_file) != learnt_from:
        raise StaleStoreError(
            f"{store.path}: teachers.{teacher} learnt from other rows, or other labels, of the split {note['split']!r} "
            f"than today's; rows that the student is tested on may be among them. Run `kdpipe train-teacher {teacher}` "
            "and `kdpipe cache-teacher`, or restore rows and labels and run `kdpipe prepare-data`."
        )


def _check_transform(store: TargetStore, project: Project, command: str) -> None:
    """That the code which made the teacher's views is the code that makes the student's."""
    views = project.params.views
    if not views.count or views.transform is None:
        return
    then = store.manifest.ingredients["views"]["sources"]
    now = project.sources_and_files(views.transform, "views.transform")
    changed = differing(then, now)
    if changed:
        raise StaleStoreError(
            f"{store.path} holds views of another views.transform: {changed[0]} was "
            f"{then.get(changed[0], 'not used')}, it is {now.get(changed[0], 'not used')}. Restore it, or run "
            f"`{command}`."
        )
