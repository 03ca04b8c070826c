"""`kdpipe train-student`: prepared rows + target stores -> data/models/student/<arm>/seed-<n>. No teacher anywhere.

Arms: `student` learns from cached targets and the labels that it may know; the baselines train the same model for the
same number of optimiser steps on those labels alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.batches import BatchStream, Rows
from kdpipe.config import Factory
from kdpipe.data.prepared import MISSING_LABEL, PreparedData
from kdpipe.distributed import rank, world_size
from kdpipe.errors import ConfigError, StaleStoreError, StoreNotFoundError
from kdpipe.fingerprint import canonical_json, digest, uniform_by_id
from kdpipe.losses import DistillLoss, LossTerm
from kdpipe.preprocess import Preprocess
from kdpipe.store import TargetStore
from kdpipe.store.aligned import AlignedTargets
from kdpipe.tasks.base import Task
from kdpipe.training import DistillTerm, LabelTerm, Progress, TrainingTerm, fit
from kdpipe_stages.building import (
    DESCRIPTION,
    ModelSpec,
    fit_preprocess,
    plan_json,
    save_model,
    train_plan,
)
from kdpipe_stages.params import LossSection, Project, StudentSection, store_sections, to_json

STUDENT = "student"
HISTORY = "history.json"


@dataclass(frozen=True, kw_only=True)
class RunOf:
    """One training: which arm, which seed."""

    arm: str
    seed: int

    @property
    def folder(self) -> str:
        """Below data/models/student and below the work area."""
        return f"{self.arm}/seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class TrainedStudents:
    """What a run did."""

    trained: Sequence[RunOf]
    skipped: Sequence[RunOf]


OnProgress = Callable[[RunOf, Progress], None]


def run(project: Project, on_progress: OnProgress = lambda _run, _progress: None) -> TrainedStudents:
    """Train every arm and seed that is not trained yet, and publish all of them."""
    state = PartialState()
    if not state.is_main_process:
        return _run(project, on_progress, state)
    with project.only_writer("student", "training the student"):
        return _run(project, on_progress, state)


def _run(project: Project, on_progress: OnProgress, state: PartialState) -> TrainedStudents:
    section = project.params.student
    lesson = _Lesson(project)
    work = project.work(lesson.fingerprint())
    runs = [RunOf(arm=arm, seed=seed) for arm in (STUDENT, *section.baselines) for seed in range(section.seeds)]
    todo = [each for each in runs if not (work / each.folder / DESCRIPTION).is_file()]
    state.wait_for_everyone()
    for each in todo:
        seconds_per_epoch = lesson.train(each, work / each.folder, state.is_main_process, on_progress)
        if state.is_main_process:
            project.write_timings(f"train_student-{each.arm}", {"seconds_per_epoch": seconds_per_epoch})
        state.wait_for_everyone()
    if state.is_main_process:
        _publish(project, work, runs)
    return TrainedStudents(trained=todo, skipped=[each for each in runs if each not in todo])


class _Lesson:
    """What the student learns from: rows, the labels that it may know, targets, terms."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._section: StudentSection = project.params.student
        self._task: Task = project.task()
        self._data: PreparedData = project.prepared_data()
        self._rows = self._data.rows_of(self._section.distil_on)
        self._labels = known_labels(self._data, self._rows, self._section)
        self._check_labels()
        self._stores = {
            name: open_checked_store(project, name) for name in {each.teacher for each in self._section.losses}
        }
        self._losses = [self._term(index, each) for index, each in enumerate(self._section.losses)]
        self._targets = {
            name: AlignedTargets(store, self._data.inputs, self._rows) for name, store in sorted(self._stores.items())
        }
        self._spec = ModelSpec(where="student", model=self._section.model, preprocess=self._section.preprocess)
        self._preprocess: Preprocess = project.preprocess(self._section.preprocess, self._task, "student.preprocess")
        fit_preprocess(self._preprocess, self._data.inputs, self._rows)

    def fingerprint(self) -> str:
        """Whatever changes a student's weights, but arm and seed."""
        section = to_json(self._section)
        for free in ("seeds", "baselines"):
            section.pop(free)
        ids = self._data.inputs.sample_ids[self._rows].tolist()
        content = self._data.inputs.digests[self._rows].tobytes().hex()
        return digest(
            {
                "kind": "student",
                "section": {**section, "train": plan_json(self._section.train)},
                "sources": self._spec.sources(self._project, self._task),
                "task": self._project.params.task.to_json(),
                "stores": {name: store.state_digest() for name, store in self._stores.items()},
                "rows": digest([self._rows.tolist(), ids, content, self._labels[self._rows].tolist()]),
                "world_size": world_size(),
            }
        )

    def train(self, each: RunOf, work: Path, is_main: bool, on_progress: OnProgress) -> float:
        """Train one arm with one seed; returns seconds per pass over the student's rows."""
        plan = self._section.train
        distils = each.arm == STUDENT
        rows = self._rows if distils else self._rows[self._labels[self._rows] != MISSING_LABEL]
        learnt = Rows(
            inputs=self._data.inputs,
            rows=rows,
            preprocess=self._preprocess,
            labels=self._labels,
            targets=self._targets if distils else {},
        )
        stream = BatchStream(
            learnt,
            batch_size=plan.batch_size,
            seed=each.seed,
            num_workers=plan.num_workers,
            rank=rank(),
            world_size=world_size(),
        )
        steps_per_epoch = -(-len(self._rows) // plan.batch_size)
        model = self._spec.build(self._project, self._task, self._preprocess, self._data.inputs, each.seed)
        checkpoint = work / f"checkpoint{durable.TEMPORARY_SUFFIX}"
        work.mkdir(parents=True, exist_ok=True)
        optimise = train_plan(plan, plan.epochs * steps_per_epoch, each.seed)
        fitted = fit(model, stream, self._terms(each.arm), optimise, checkpoint, lambda now: on_progress(each, now))
        if is_main:
            durable.write_text(work / HISTORY, canonical_json(list(fitted.history)) + "\n")
            save_model(work, model, self._preprocess, {"arm": each.arm, "seed": each.seed, "steps": optimise.steps})
            checkpoint.unlink(missing_ok=True)
        return fitted.seconds / max(1, fitted.steps_done) * steps_per_epoch

    def _terms(self, arm: str) -> list[TrainingTerm]:
        smoothing = self._section.label_smoothing if arm == "label_smoothing" else 0.0
        if arm != STUDENT:
            return [LabelTerm(loss=self._task.label_loss, weight=1.0, smoothing=smoothing)]
        terms: list[TrainingTerm] = [DistillTerm(term=term) for term in self._losses]
        if self._section.label_weight > 0:
            terms.append(LabelTerm(loss=self._task.label_loss, weight=self._section.label_weight))
        return terms

    def _term(self, index: int, section: LossSection) -> LossTerm:
        where = f"student.losses.{index}"
        loss = self._project.bind(Factory(path=section.factory, arguments=section.arguments), where).make()
        if not isinstance(loss, DistillLoss):
            raise ConfigError(f"{where}: {section.factory} is no DistillLoss (see kdpipe.losses.DistillLoss)")
        return LossTerm(teacher=section.teacher, output=section.output, loss=loss, weight=section.weight)

    def _check_labels(self) -> None:
        if (self._labels[self._rows] != MISSING_LABEL).any():
            return
        if self._section.label_weight > 0:
            raise ConfigError("student.label_weight is above 0 but no row has a label that it may know; set it to 0")
        if self._section.baselines:
            raise ConfigError("student.baselines learn from labels, and there are none; set baselines: []")


def known_labels(data: PreparedData, rows: NDArray[np.int64], section: StudentSection) -> NDArray[np.int64]:
    """Labels by row number, -1 where the student must not know them.

    `labelled_rows: n` keeps the first n labelled rows by hash of (labelled_seed, sample id): stable under growth.
    """
    labelled = rows[data.labels[rows] != MISSING_LABEL]
    wanted = len(labelled)
    if section.labelled_rows is not None:
        wanted = section.labelled_rows
    elif section.labelled_fraction is not None:
        wanted = round(section.labelled_fraction * len(rows))
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
    """A published store, if it was made from today's settings; no teacher is needed to tell.

    Raises `StoreNotFoundError`, `IncompleteStoreError` or `StaleStoreError` naming the command to run.
    """
    command = f"kdpipe cache-teacher {name}"
    try:
        store = TargetStore.open(project.store(name))
    except StoreNotFoundError:
        raise StoreNotFoundError(f"there is no target store at {project.store(name)}. Run `{command}`.") from None
    today, then = store_sections(project.params, name), store.manifest.sections
    differing = [key for key in today if today[key] != then.get(key)]
    if differing:
        found = _first_difference(then.get(differing[0]), today[differing[0]], differing[0])
        raise StaleStoreError(f"{store.path} was made from other settings: {found}. Restore them, or run `{command}`.")
    return store


def _first_difference(then: Any, today: Any, where: str) -> str:
    if isinstance(then, Mapping) and isinstance(today, Mapping):
        for key in [*today, *then]:
            if then.get(key) != today.get(key):
                return _first_difference(then.get(key), today.get(key), f"{where}.{key}")
    return f"{where} was {then}, params.yaml says {today}"


def _publish(project: Project, work: Path, runs: Sequence[RunOf]) -> None:
    destination = project.student_models
    destination.parent.mkdir(parents=True, exist_ok=True)
    durable.publish({each.folder: work / each.folder for each in runs}, destination)
    project.plots.mkdir(parents=True, exist_ok=True)
    durable.write_text(project.plots / "training.csv", training_curves(work, runs))


def training_curves(work: Path, runs: Sequence[RunOf]) -> str:
    """CSV: per logged step the training loss of each arm, as the mean over its seeds."""
    arms = list(dict.fromkeys(each.arm for each in runs))
    losses: dict[int, dict[str, list[float]]] = {}
    for each in runs:
        for entry in json.loads((work / each.folder / HISTORY).read_text()):
            losses.setdefault(int(entry["step"]), {}).setdefault(each.arm, []).append(entry["loss"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *arms])
    for step in sorted(losses):
        writer.writerow([step, *(f"{np.mean(losses[step][arm]):.6g}" for arm in arms)])
    return text.getvalue()
