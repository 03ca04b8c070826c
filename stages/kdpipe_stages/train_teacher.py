"""`kdpipe train-teacher NAME`: label-only training by the student's `fit` -> data/models/teachers/NAME."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdpipe import durable
from kdpipe.batches import Rows
from kdpipe.checkpoint import read_weights
from kdpipe.config import Factory
from kdpipe.data.prepared import MISSING_LABEL, PreparedInputs
from kdpipe.errors import ConfigError
from kdpipe.fingerprint import canonical_json, digest_file
from kdpipe.order import BatchOrder
from kdpipe.tasks.base import token_labels
from kdpipe.terms import LabelTerm, TrainingTerm
from kdpipe.training import Progress, fit
from kdpipe.views import PROBE_ROWS, PartnerPlan, ViewSpec
from kdpipe_stages.building import (
    DESCRIPTION,
    ModelSpec,
    adopt_model,
    balance_of,
    fit_preprocess,
    label_loss,
    save_model,
    stream_of,
    teacher_fingerprint,
    train_plan,
)
from kdpipe_stages.params import TeacherSection
from kdpipe_stages.project import Project
from kdpipe_stages.teachers import fit_teacher


@dataclass(frozen=True, kw_only=True)
class TrainedTeacher:
    """What a run did: `skipped` says why nothing was trained, or is empty."""

    skipped: str
    seconds: float | None = None


def run(project: Project, name: str, on_progress: Callable[[Progress], None] = lambda _: None) -> TrainedTeacher:
    """Train one teacher on its own split, or take note of ready weights."""
    section = project.teacher(name)
    destination = project.teacher_model(name)
    with project.only_writer(f"teacher-{name}", f"training teacher {name}"):
        if section.table is not None:
            _note_ready("table", project.root / section.table, section.table, destination)
            return TrainedTeacher(skipped=f"what it said is in {section.table}")
        if section.weights is not None:
            read_weights(project.root / section.weights)
            _note_ready("weights", project.root / section.weights, section.weights, destination)
            return TrainedTeacher(skipped=f"its weights are ready in {section.weights}")
        if section.teacher is not None and section.fit_on is None:
            _note_factory(section.teacher, destination)
            return TrainedTeacher(skipped=f"it is ready: {section.teacher.path}")
        fingerprint = teacher_fingerprint(project, name)
        work = project.work(fingerprint)
        adopt_model(project, destination, work, fingerprint)
        trained = _train(project, name, section, work, fingerprint, on_progress)
        project.publish({"": work}, destination)
        return trained


def _train(
    project: Project,
    name: str,
    section: TeacherSection,
    work: Path,
    fingerprint: str,
    on_progress: Callable[[Progress], None],
) -> TrainedTeacher:
    if (work / DESCRIPTION).is_file():
        return TrainedTeacher(skipped="it was trained with these settings and rows before")
    if section.fit_on is not None:
        return _fit(project, name, section.fit_on, work, fingerprint)
    assert section.train is not None
    assert section.model is not None
    plan, where = section.train, f"teachers.{name}"
    task, data = project.task(), project.prepared_data()
    rows = data.rows_of([plan.split])
    rows = rows[data.labels[rows] != MISSING_LABEL]
    if not len(rows):
        raise ConfigError(f"{where}.train.split: no row of {plan.split!r} has a label")
    spec = ModelSpec(where=where, model=section.model, preprocess=section.preprocess, logits=section.logits)
    preprocess = project.preprocess(section.preprocess, task, f"{where}.preprocess")
    fit_preprocess(preprocess, data.inputs, rows)
    model = spec.build(project, task, preprocess, data.inputs, plan.seed)
    learnt = Rows(
        inputs=data.inputs,
        rows=rows,
        preprocess=preprocess,
        labels=data.labels,
        views=_views(project, name, data.inputs, rows),
        token_labels=token_labels(task),
    )
    balance = balance_of(task, plan, data.labels[rows], f"{where}.train")
    order = BatchOrder(rows=rows, batch_size=plan.batch_size, seed=plan.seed, balance=balance)
    stream = stream_of(plan, learnt, order)
    loss = label_loss(task, plan, data.labels[rows], f"{where}.train")
    terms: list[TrainingTerm] = [LabelTerm(loss=loss, weight=1.0, smoothing=plan.label_smoothing)]
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / f"checkpoint{durable.TEMPORARY_SUFFIX}"
    steps = plan.epochs * stream.steps_per_epoch
    optimise = train_plan(plan, steps, plan.seed)
    fitted = fit(model, stream, terms, optimise, checkpoint, on_progress, spec.head(task))
    save_model(work, model, preprocess, _about(project, fingerprint, plan.split))
    checkpoint.unlink(missing_ok=True)
    timings = {"seconds": fitted.seconds, "steps": fitted.steps_done}
    project.write_timings("train_teacher", name, timings)
    return TrainedTeacher(skipped="", seconds=fitted.seconds)


def _about(project: Project, fingerprint: str, split: str) -> dict[str, str]:
    """What model.json says of a teacher that learnt here; `learnt_from` digests the split's rows and labels."""
    return {"fingerprint": fingerprint, "split": split, "learnt_from": digest_file(project.split_file(split))}


def _views(project: Project, name: str, inputs: PreparedInputs, rows: NDArray[np.int64]) -> ViewSpec:
    """`Project.views_of_training`, tried on the rows learnt from, which are mixed with each other."""
    views = project.views_of_training(name)
    views.probe(inputs.read(rows[:PROBE_ROWS]), inputs.sample_ids[rows[:PROBE_ROWS]].tolist())
    if not views.mixes:
        return views
    learnt = np.full(len(inputs), "", "<U6")
    learnt[rows] = "learnt"
    return replace(views, partners=PartnerPlan(inputs.sample_ids, learnt))


def _fit(project: Project, name: str, split: str, work: Path, fingerprint: str) -> TrainedTeacher:
    """Let a teacher by factory learn from the rows of a split."""
    data, started = project.prepared_data(), time.perf_counter()
    rows = data.rows_of([split])
    fitted = fit_teacher(project, name, rows, data.labels[rows])
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    fitted.save(work)
    digests = {path.name: digest_file(path) for path in sorted(work.iterdir())}
    note = {
        **_about(project, fingerprint, split),
        "files": digests,
        "size_bytes": sum(path.stat().st_size for path in work.iterdir()),
        "preprocess_state": dict(fitted.preprocess.state()),
    }
    durable.write_text(work / DESCRIPTION, canonical_json(note) + "\n")
    seconds = time.perf_counter() - started
    project.write_timings("train_teacher", name, {"seconds": seconds})
    return TrainedTeacher(skipped="", seconds=seconds)


def _note_factory(factory: Factory, destination: Path) -> None:
    """Write model.json about a teacher that needs no training here: its factory."""
    _write_note({"teacher": factory.to_json()}, destination)


def _note_ready(kind: str, path: Path, given: str, destination: Path) -> None:
    """Write model.json about a teacher's weights or table."""
    if not path.is_file():
        raise ConfigError(f"there is no {kind} at {path}, which params.yaml names")
    _write_note({kind: given, "sha256": digest_file(path), "size_bytes": path.stat().st_size}, destination)


def _write_note(note: Mapping[str, object], destination: Path) -> None:
    if destination.exists() and not (destination / DESCRIPTION).is_file():
        shutil.rmtree(destination)
    destination.mkdir(parents=True, exist_ok=True)
    durable.write_text(destination / DESCRIPTION, canonical_json(note) + "\n")
