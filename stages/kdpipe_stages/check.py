"""`kdpipe check`: what can be wrong in params.yaml, found before any work starts: no training, a few rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from kdpipe.caching import are_logits, kept_encoding, promised
from kdpipe.checkpoint import check_fit, load_weights, read_weights
from kdpipe.data.columns import Columns, take
from kdpipe.data.prepared import MISSING_LABEL, PreparedData
from kdpipe.data.preparing import column_of, row_names, strings_of
from kdpipe.encodings import TargetEncoding
from kdpipe.errors import ConfigError, DataError, KdpipeError, TeacherError, at
from kdpipe.inputs import LOGITS, Head, Inputs, call, described, look_like_probabilities, num_rows, tensors_of
from kdpipe.losses import reuses_classifier
from kdpipe.preprocess import ImageTensor, Preprocess, Standardize
from kdpipe.store.manifest import Manifest
from kdpipe.targets import OutputSpec
from kdpipe.tasks.base import Task, TokenTask, rows_of
from kdpipe.teachers.asking import Asking
from kdpipe.teachers.base import COVERED, Teacher, abstains
from kdpipe.teachers.torch import TorchTeacher
from kdpipe.views import ViewSpec
from kdpipe_stages.building import (
    ModelSpec,
    check_class_weights,
    check_vocabulary,
    encodings_of,
    label_loss,
    model_offers,
)
from kdpipe_stages.lesson import known_labels, teachers_of
from kdpipe_stages.params import LossSection, absent_splits, source_columns, teacher_and_members
from kdpipe_stages.prepare_data import source_of
from kdpipe_stages.project import Project
from kdpipe_stages.pupil import shapes_heard
from kdpipe_stages.tables import TableTeacher
from kdpipe_stages.teachers import (
    Asked,
    bind_teacher,
    checked_teacher,
    classifier_of,
    of_what_counts,
    parts_made_by,
    section_with_model,
)
from kdpipe_stages.terms import (
    Stored,
    check_batches,
    check_known_labels,
    check_logits_learn,
    check_mixing,
    check_term,
    loss_term,
    no_classifier,
    terms_of,
)
from kdpipe_stages.workplace import check_url

SAMPLE_ROWS = 64
_KEEPS_WIDTHS = (ImageTensor, Standardize)
"""Preprocesses whose outputs have the same widths, whatever rows they learn from."""


def run(project: Project) -> Sequence[str]:
    """What was checked, a line each. Raises `ConfigError` with every problem that was found."""
    problems: list[str] = []
    checked: list[str] = []
    task, sample, met = None, None, _Met()
    try:
        task = project.task()
        checked.append(f"task: {project.params.task.path}, {task.num_classes} classes")
        sample = _first_rows(project, task)
        checked.append(f"data: {_data(project)}")
    except KdpipeError as error:
        problems.append(str(error))
    checks: dict[str, Callable[[Project], str]] = {
        "label": _check_label,
        "splits": _check_splits,
        "views": partial(_check_views, sample=sample),
    }
    if task is not None:
        checks["losses"] = partial(_check_losses, task=task)
        checks["teachers"] = partial(_check_teachers, task=task, sample=sample, met=met)
        checks["student"] = partial(_check_student, task=task, sample=sample, met=met)
        if any(_is_about_features(each) for each in project.params.student.losses):
            checks["features"] = partial(_check_features, task=task, met=met)
    for name, check in checks.items():
        try:
            checked.append(f"{name}: {check(project)}")
        except KdpipeError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return checked


@dataclass
class _Met:
    """What teachers say, by name and output, and a student with one row for it: as far as they could be made."""

    said: dict[str, dict[str, Stored]] = field(default_factory=dict)
    student: tuple[torch.nn.Module, Inputs] | None = None


def _data(project: Project) -> str:
    section = project.params.data
    return section.source.path if section.path is None else f"{section.path} by {section.source.path}"


def _check_label(project: Project) -> str:
    """That it is no column that models see."""
    label = project.params.data.columns.label
    for key in ("columns", "categorical"):
        names = project.params.task.arguments.get(key)
        if label is not None and isinstance(names, list) and label in names:
            raise ConfigError(
                f"task.{key} names {label!r}, which is the label (data.columns.label), so models would see what they "
                "are to learn; leave it out"
            )
    return "none" if label is None else f"column {label}"


def _first_rows(project: Project, task: Task) -> Columns | None:
    """The source's first rows as the task prepares them: columns, types and labels are right, in those at least.

    None where a vocabulary is to be learnt from all of them first.
    """
    section = project.params.data
    source = source_of(project)
    if section.path is not None and not (project.root / section.path).exists():
        raise ConfigError(f"data.path: there is no {project.root / section.path}")
    if isinstance(task, TokenTask) and not task.knows_its_tokens:
        return None
    rows, columns = rows_of(task, source, source_columns(section.columns))
    batch = next(iter(rows.batches()), None)
    if batch is None or batch.num_rows == 0:
        raise DataError(f"{_data(project)} has no rows")
    batch = batch.slice(0, SAMPLE_ROWS)
    if columns.split is not None:
        strings_of(batch, columns.split)
    name_of = row_names(batch, None if columns.id is None else strings_of(batch, columns.id))
    if columns.label is not None:
        task.to_labels(column_of(batch, columns.label), name_of)
    return task.to_inputs(batch, name_of)


def _check_teachers(project: Project, task: Task, sample: Columns | None, met: _Met) -> str:
    for name, section in project.params.teachers.items():
        check_url(project, name)
        if section.table is not None:
            met.said[name] = _check_layout(project, name, TableTeacher(project, name), task)
            continue
        teacher = _teacher(project, name, task, sample)
        if teacher is not None:
            met.said[name] = _check_layout(project, name, of_what_counts(teacher, task), task)
            if sample is not None and _is_ready(project, name):
                _check_answer(project, name, teacher, task, sample)
    return ", ".join(project.params.teachers)


def _teacher(
    project: Project, name: str, task: Task, sample: Columns | None, above: Sequence[str] = ()
) -> Teacher | None:
    """A teacher that takes its weights and has the outputs that are to be stored; what it learns here is not learnt.

    None where there are no rows to try it on. `above` are the teachers that are made of it.
    """
    section = section_with_model(project, name)
    if section.model is not None:
        return _module(project, name, task, sample)
    preprocess = project.preprocess(section.preprocess, task, f"teachers.{name}.preprocess")
    here = [*above, name]

    def part(other: str) -> Teacher:
        made = _teacher(project, other, task, sample, here)
        assert made is not None
        return made

    bound = bind_teacher(project, name, task, preprocess, _first(sample), parts_made_by(part, here))
    if sample is None:
        return None
    if section.fit_on is not None:
        preprocess.fit([sample])
    return checked_teacher(project, name, bound.make())


def _is_ready(project: Project, name: str) -> bool:
    """Whether a teacher by factory can speak here: neither it nor a part of it has to learn first."""
    sections = [project.teacher(each) for each in teacher_and_members(project.params, name)]
    return sections[0].teacher is not None and all(each.fit_on is None and each.train is None for each in sections)


def _check_answer(project: Project, name: str, teacher: Teacher, task: Task, sample: Columns) -> None:
    """That what a teacher says about two rows is what it promises, and that its logits are no probabilities."""
    where, rows = f"teachers.{name}", _start(sample, 2)
    asked = of_what_counts(Asked(where, teacher, project.targets(name).outputs, {}), task)
    encodings, size = _encodings(project, name, asked.outputs), len(next(iter(rows.values())))
    with at(where, ConfigError, TeacherError):
        said = promised(Asking(asked)(rows, size), size, asked.outputs, encodings, abstains(asked))
        if LOGITS in said:
            are_logits(said[LOGITS], said.get(COVERED))


def _module(project: Project, name: str, task: Task, sample: Columns | None) -> TorchTeacher | None:
    section, targets = project.teacher(name), project.targets(name)
    assert section.model is not None
    if section.train is not None:
        check_class_weights(task, section.train, f"teachers.{name}.train")
        views = project.views_of_training(name)
        if sample is not None:
            _probe(views, sample)
    spec = ModelSpec(
        where=f"teachers.{name}", model=section.model, preprocess=section.preprocess, logits=section.logits
    )
    checked = _check_model(project, task, spec, sample, is_fitted_here=section.weights is None)
    if checked is None:
        return None
    model, preprocess = checked
    if section.weights is not None:
        load_weights(model, project.root / section.weights)
    classifier_of(project, name, model)
    probe = _first(sample)
    assert probe is not None
    with at(f"targets.{name}.outputs"):
        return TorchTeacher(
            model, preprocess, task.num_classes, {}, probe, targets.outputs, targets.precision, spec.logits
        )


def _first(sample: Columns | None) -> Columns | None:
    return None if sample is None else _start(sample, 1)


def _start(sample: Columns, num_rows: int) -> Columns:
    return {name: take(column, np.arange(min(num_rows, len(column)))) for name, column in sample.items()}


def _check_layout(project: Project, name: str, teacher: Teacher | TableTeacher, task: Task) -> dict[str, Stored]:
    """That its encoding holds what a teacher says, and that shards of it divide into chunks.

    Returns how it is going to be stored, by output.
    """
    section, encodings = project.targets(name), _encodings(project, name, teacher.outputs)
    coverage = isinstance(teacher, TableTeacher) or abstains(teacher)
    covered = teacher.outputs[0].shape[:-1] if coverage else None
    stored = {
        each.name: Stored(encoding=encodings[each.name], output=each, covered=covered) for each in teacher.outputs
    }
    if hasattr(teacher, "num_kept"):
        with at(f"targets.{name}"):
            kept_encoding(encodings[LOGITS], teacher.num_kept)
    if section.shard_rows is None:
        return stored
    manifest = Manifest(
        ingredients={},
        outputs=teacher.outputs,
        encodings={output: encoding.to_json() for output, encoding in encodings.items()},
        temperatures=section.temperatures,
        num_classes=task.num_classes,
        class_names=None,
        shard_rows=section.shard_rows,
        coverage=coverage,
    )
    with at(f"targets.{name}"):
        manifest.layouts()
    return stored


def _encodings(project: Project, name: str, outputs: Sequence[OutputSpec]) -> dict[str, TargetEncoding]:
    with at(f"targets.{name}"):
        return encodings_of(project.targets(name), outputs)


def _check_student(project: Project, task: Task, sample: Columns | None, met: _Met) -> str:
    section = project.params.student
    spec = ModelSpec(where="student", model=section.model, preprocess=section.preprocess, logits=section.logits)
    checked, row = _check_model(project, task, spec, sample, True), _first(sample)
    left_out: Sequence[str] = ()
    if checked is not None and sample is not None and row is not None:
        model, preprocess = checked
        met.student = model, preprocess(row)
        _check_axes(project, task, met)
        left_out = _left_out(preprocess, sample)
    check_class_weights(task, section.train, "student.train")
    if section.init_from is not None:
        path = project.root / section.init_from
        weights = read_weights(path)
        if checked is not None:
            model, preprocess = checked
            check_fit(model, weights, path, shapes=not preprocess.state() or isinstance(preprocess, _KEEPS_WIDTHS))
    without = f"; columns that its preprocess leaves out: {len(left_out)} ({', '.join(left_out)})" if left_out else ""
    return f"{section.model.path}, {section.seeds} seeds{without}"


def _check_axes(project: Project, task: Task, met: _Met) -> None:
    """That the teachers' logits, as far as they are known, have as many axes as the student's."""
    section = project.params.student
    assert met.student is not None
    with torch.inference_mode():
        own = list(Head(section.logits, task.num_classes)(call(met.student[0], met.student[1])).shape[1:])
    for name in teachers_of(section):
        found = list(met.said[name][LOGITS].output.shape) if name in met.said else own
        if len(found) != len(own):
            raise ConfigError(
                f"the teacher {name!r} gives logits of shape {found} for a row, the student {own}; expected both alike"
            )


def _left_out(preprocess: Preprocess, sample: Columns) -> list[str]:
    """Columns of rows without which a preprocess makes the same of them."""
    whole, left_out = tensors_of(preprocess(sample)), []
    for name in sample if len(sample) > 1 else ():
        try:
            found = tensors_of(preprocess({other: each for other, each in sample.items() if other != name}))
        except KdpipeError:  # it asks for the column
            continue
        if len(found) == len(whole) and all(map(torch.equal, found, whole)):
            left_out.append(name)
    return left_out


def _check_model(
    project: Project, task: Task, spec: ModelSpec, sample: Columns | None, is_fitted_here: bool
) -> tuple[torch.nn.Module, Preprocess] | None:
    """That a model's factories bind, make a module, and that it gives logits for the first rows; both are returned."""
    where, model = spec.where, spec.model
    to_input = project.preprocess(spec.preprocess, task, f"{where}.preprocess")
    if sample is None:
        return None
    if is_fitted_here:
        to_input.fit([sample])
    inputs = to_input(sample)
    offered = model_offers(to_input, inputs, task)
    check_vocabulary(spec, offered)
    module = project.bind(model, f"{where}.model", **offered).make()
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"{where}.model: {model.path} gave {type(module).__name__}; expected a torch.nn.Module")
    try:
        with torch.inference_mode():
            returned = call(module.eval(), inputs)
    except Exception as error:
        raise ConfigError(
            f"{where}.model: forward fails on an input of shape {described(inputs)}: {type(error).__name__}: {error}"
        ) from error
    with at(where):
        logits = spec.head(task)(returned)
    expected = (num_rows(inputs), task.num_classes)
    if logits.shape[:1] + logits.shape[-1:] != expected:
        raise ConfigError(
            f"{where}.model: forward gives {list(logits.shape)}; expected logits of shape {list(expected)}"
        )
    if look_like_probabilities(logits):
        raise ConfigError(
            f"{where}.model: forward gives numbers from 0 to 1 with a sum of 1: probabilities, of a softmax at its "
            "end; expected logits. Leave the softmax out"
        )
    return module, to_input


def _check_losses(project: Project, task: Task) -> str:
    """That every loss on logits alone can be computed from what is going to be stored."""
    terms = [loss_term(project, index, each) for index, each in enumerate(project.params.student.losses)]
    logits = OutputSpec(name="logits", shape=(task.num_classes,))
    check_logits_learn(terms, project.params.student)
    for index, term in enumerate(terms):
        check_batches(f"student.losses.{index}", term, project.params.student.train)
        for name in term.teachers if reuses_classifier(term.loss) else ():
            if project.targets(name).classifier is None:
                raise ConfigError(no_classifier(index, term, name))
        check_mixing(f"student.losses.{index}", term, project.views())
        if not _is_about_features(project.params.student.losses[index]):
            stored = {
                name: Stored(encoding=_encodings(project, name, [logits])[logits.name], output=logits)
                for name in term.teachers
            }
            check_term(f"student.losses.{index}", term, stored, logits.shape)
    return ", ".join(f"{type(each.loss).__name__} of {' and '.join(each.teachers)}" for each in terms)


def _is_about_features(loss: LossSection) -> bool:
    return bool(loss.output != LOGITS or loss.student_output)


def _check_features(project: Project, task: Task, met: _Met) -> str:
    """That losses on features get what they can compare, where teachers and student could be made."""
    section = project.params.student
    terms = [loss_term(project, index, each) for index, each in enumerate(section.losses)]
    if met.student is None or not all(name in met.said for term in terms for name in term.teachers):
        return "not known before there are models"
    heard = shapes_heard(terms, met.student[0], Head(section.logits, task.num_classes), met.student[1])
    compared = []
    for index, term in enumerate(terms):
        if not _is_about_features(section.losses[index]):
            continue
        logits = met.said[term.teachers[0]][LOGITS].output.shape
        stored = {name: met.said[name][term.output] for name in term.teachers}
        check_term(f"student.losses.{index}", term, stored, heard[term.student_output] if heard else logits)
        compared.append(f"{type(term.loss).__name__} of {term.output} by {term.student_output or LOGITS}")
    return ", ".join(compared)


def _check_views(project: Project, sample: Columns | None) -> str:
    """That the transform binds, and shows the same row for the same key."""
    section, views = project.params.views, project.views()
    if section.transform is None:
        return "the clean rows"
    if sample is not None:
        _probe(views, sample)
    of = "all rows" if section.splits is None else ", ".join(section.splits)
    return f"{section.count} of {of} by {section.transform.path}"


def _probe(views: ViewSpec, sample: Columns) -> None:
    views.probe(sample, [f"row {row}" for row in range(len(next(iter(sample.values()))))])


def _check_splits(project: Project) -> str:
    """The splits and labels that the stages will ask for, where data/prepared can tell."""
    try:
        data: PreparedData = project.prepared_data()
    except DataError:
        return "not known before `kdpipe prepare-data`"
    if absent := absent_splits(project.params, data.split_names):
        raise ConfigError("\n".join(absent))
    section = project.params.student
    rows = data.rows_of(section.distil_on)
    known = known_labels(data, rows, section)
    num_known = int(np.sum(known[rows] != MISSING_LABEL))
    check_known_labels(section, terms_of(project, known), num_known)
    label_loss(project.task(), section.train, known[rows], "student.train")
    return f"{', '.join(data.split_names)}; the student may know {num_known:,} labels"
