"""`kdpipe train-student`: prepared rows + target stores -> data/models/student/<arm>/seed-<n>. No teacher anywhere.

Arms: `student` learns from cached targets and the labels that it may know; the baselines train the same model for the
same number of optimiser steps on those labels alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState

from kdpipe import durable
from kdpipe.batches import Rows, shuffle_of
from kdpipe.checkpoint import load_weights
from kdpipe.distributed import join_peers, rank, world_size
from kdpipe.fingerprint import canonical_json, digest
from kdpipe.order import BatchOrder
from kdpipe.store.aligned import AlignedTargets
from kdpipe.tasks.base import token_labels
from kdpipe.terms import LabelTerm, TrainingTerm
from kdpipe.training import Progress, fit
from kdpipe_stages.building import (
    DESCRIPTION,
    adopt_model,
    balance_of,
    fit_preprocess,
    save_model,
    stream_of,
    train_plan,
)
from kdpipe_stages.lesson import ARMS, STUDENT, Lesson
from kdpipe_stages.params import schedule_of
from kdpipe_stages.project import Project
from kdpipe_stages.pupil import Pupil, pupil_of

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


@dataclass(frozen=True, kw_only=True)
class StudentProgress:
    """Where the stage stands: in run `number` (from 1) of `of`."""

    run: RunOf
    number: int
    of: int
    now: Progress


OnProgress = Callable[[StudentProgress], None]


def run(project: Project, on_progress: OnProgress = lambda _: None) -> TrainedStudents:
    """Train every arm and seed that is not trained yet, and publish all of them."""
    state = join_peers()
    if not state.is_main_process:
        return _run(project, on_progress, state)
    with project.only_writer("student", "training the student"):
        return _run(project, on_progress, state)


def _run(project: Project, on_progress: OnProgress, state: PartialState) -> TrainedStudents:
    lesson = Lesson(project)
    fingerprint, section = lesson.fingerprint, lesson.section
    work = project.work(digest([fingerprint, world_size()]))
    runs = [RunOf(arm=arm, seed=seed) for arm in (STUDENT, *section.baselines) for seed in range(section.seeds)]
    if state.is_main_process:
        for each in runs:
            adopt_model(project, project.student_models / each.folder, work / each.folder, fingerprint)
    state.wait_for_everyone()
    todo = [each for each in runs if not (work / each.folder / DESCRIPTION).is_file()]
    state.wait_for_everyone()
    if todo:
        classroom = _Classroom(project, lesson)
        seconds: dict[str, list[float]] = {}
        for number, each in enumerate(todo, start=1):

            def report(now: Progress, each: RunOf = each, number: int = number) -> None:
                on_progress(StudentProgress(run=each, number=number, of=len(todo), now=now))

            per_seed = seconds.setdefault(each.arm, [])
            per_seed.append(classroom.train(each, work / each.folder, fingerprint, report))
            if state.is_main_process:
                timings = {"seconds_per_epoch": float(np.mean(per_seed)), "seeds": len(per_seed)}
                project.write_timings("train_student", ARMS[each.arm], timings)
            state.wait_for_everyone()
    if state.is_main_process:
        _publish(project, work, runs)
    return TrainedStudents(trained=todo, skipped=[each for each in runs if each not in todo])


class _Classroom:
    """Trains one arm with one seed after the other, all from the same lesson."""

    def __init__(self, project: Project, lesson: Lesson) -> None:
        self._project, self._lesson = project, lesson
        inputs = lesson.data.inputs
        self._views = lesson.views
        seen = {self._views.view_of_epoch(epoch) for epoch in range(max(1, self._views.count))}
        self._targets = {
            name: AlignedTargets(store, inputs, lesson.rows, seen, lesson.outputs_of(name))
            for name, store in lesson.stores.items()
        }
        self._preprocess = project.preprocess(lesson.section.preprocess, lesson.task, "student.preprocess")
        fit_preprocess(self._preprocess, inputs, lesson.rows)

    def train(self, each: RunOf, work: Path, fingerprint: str, report: Callable[[Progress], None]) -> float:
        """Train one arm with one seed; returns seconds per pass over the student's rows."""
        lesson, plan = self._lesson, self._lesson.section.train
        distils = each.arm == STUDENT
        learnt = Rows(
            inputs=lesson.data.inputs,
            rows=lesson.rows if distils else lesson.labelled,
            preprocess=self._preprocess,
            labels=lesson.labels,
            targets=self._targets if distils else {},
            views=self._views if distils else lesson.views_of_labelled,
            token_labels=token_labels(lesson.task),
        )
        order = BatchOrder(
            rows=learnt.rows,
            batch_size=plan.batch_size,
            seed=each.seed,
            shuffle=shuffle_of(self._targets.values()),
            rank=rank(),
            world_size=world_size(),
            balance=balance_of(lesson.task, plan, lesson.labels[learnt.rows], "student.train"),
        )
        stream = stream_of(plan, learnt, order)
        steps_per_epoch = -(-len(lesson.rows) // plan.batch_size)
        model = lesson.spec.build(self._project, lesson.task, self._preprocess, lesson.data.inputs, each.seed)
        checkpoint = work / f"checkpoint{durable.TEMPORARY_SUFFIX}"
        work.mkdir(parents=True, exist_ok=True)
        optimise = train_plan(plan, plan.epochs * steps_per_epoch, each.seed)
        if lesson.section.init_from is not None:
            load_weights(model, self._project.root / lesson.section.init_from)
        row = self._preprocess(lesson.data.inputs.read(lesson.rows[:1]))
        pupil = pupil_of(lesson, each.arm, model, row, each.seed)
        fitted = fit(pupil.model, stream, self._terms(each.arm, pupil), optimise, checkpoint, report, pupil.head)
        if rank() == 0:
            durable.write_text(work / HISTORY, canonical_json(list(fitted.history)) + "\n")
            about = {"arm": each.arm, "seed": each.seed, "steps": optimise.steps, "fingerprint": fingerprint}
            save_model(work, pupil.model, self._preprocess, about)
            checkpoint.unlink(missing_ok=True)
        return fitted.seconds / max(1, fitted.steps_done) * steps_per_epoch

    def _terms(self, arm: str, pupil: Pupil) -> list[TrainingTerm]:
        lesson = self._lesson
        smoothing = lesson.section.label_smoothing if arm == "label_smoothing" else 0.0
        if arm != STUDENT:
            return [LabelTerm(loss=lesson.label_loss, weight=1.0, smoothing=smoothing)]
        terms: list[TrainingTerm] = [*pupil.terms]
        if lesson.section.learns_labels:
            schedule = schedule_of(lesson.section.label_schedule, "student.label_schedule")
            terms.append(LabelTerm(loss=lesson.label_loss, weight=lesson.section.label_weight, schedule=schedule))
        return terms


def _publish(project: Project, work: Path, runs: Sequence[RunOf]) -> None:
    project.publish({each.folder: work / each.folder for each in runs}, project.student_models)
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
