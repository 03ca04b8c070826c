"""`kdpipe check`: what can be wrong in params.yaml, found before any work starts: no training, a few rows, no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from kdpipe.checkpoint import load_weights
from kdpipe.config import Factory
from kdpipe.data.columns import Columns
from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import column_of
from kdpipe.data.sources import Source
from kdpipe.errors import ConfigError, DataError, KdpipeError
from kdpipe.targets import OutputSpec
from kdpipe.tasks.base import Task
from kdpipe_stages.building import encodings_of
from kdpipe_stages.lesson import check_term, known_labels, loss_term
from kdpipe_stages.project import Project
from kdpipe_stages.tables import TableTeacher

SAMPLE_ROWS = 64


def run(project: Project) -> Sequence[str]:
    """What was checked, a line each. Raises `ConfigError` with every problem that was found."""
    problems: list[str] = []
    checked: list[str] = []
    task, sample = None, None
    try:
        task = project.task()
        checked.append(f"task: {project.params.task.path}, {task.num_classes} classes")
        sample = _first_rows(project, task)
        checked.append(f"data: {project.params.data.path} by {project.params.data.source.path}")
    except KdpipeError as error:
        problems.append(str(error))
    checks: dict[str, Callable[[Project], str]] = {"splits": _check_splits}
    if task is not None:
        checks["losses"] = partial(_check_losses, task=task)
        checks["teachers"] = partial(_check_teachers, task=task, sample=sample)
        checks["student"] = partial(_check_student, task=task, sample=sample)
    for name, check in checks.items():
        try:
            checked.append(f"{name}: {check(project)}")
        except KdpipeError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return checked


def _first_rows(project: Project, task: Task) -> Columns:
    """The source's first rows as the task prepares them: columns, types and labels are right, in those at least."""
    section = project.params.data
    path = project.root / section.path
    source = project.bind(section.source, "data.source", path=path).make()
    if not isinstance(source, Source):
        raise ConfigError(f"data.source: {section.source.path} is no Source (see kdpipe.data.sources.Source)")
    if not path.exists():
        raise ConfigError(f"data.path: there is no {path}")
    batch = next(iter(source.batches()), None)
    if batch is None or batch.num_rows == 0:
        raise DataError(f"{path} has no rows")
    batch = batch.slice(0, SAMPLE_ROWS)
    for name in (section.columns.id, section.columns.split):
        if name is not None:
            column_of(batch, name)
    if section.columns.label is not None:
        task.to_labels(column_of(batch, section.columns.label), lambda row: f"row {row}")
    return task.to_inputs(batch, lambda row: f"row {row}")


def _check_teachers(project: Project, task: Task, sample: Columns | None) -> str:
    for name, section in project.params.teachers.items():
        where = f"teachers.{name}"
        if section.model is None:
            TableTeacher(project, name)
            continue
        model = _check_model(project, task, section.model, section.preprocess, where, sample, section.weights is None)
        if section.weights is not None and model is not None:
            load_weights(model, project.root / section.weights)
    return ", ".join(project.params.teachers)


def _check_student(project: Project, task: Task, sample: Columns | None) -> str:
    section = project.params.student
    _check_model(project, task, section.model, section.preprocess, "student", sample, True)
    return f"{section.model.path}, {section.seeds} seeds"


def _check_model(
    project: Project,
    task: Task,
    model: Factory,
    preprocess: Factory | None,
    where: str,
    sample: Columns | None,
    is_fitted_here: bool,
) -> torch.nn.Module | None:
    """That a model's factories bind, make a module, and that it gives logits for the first rows."""
    to_input = project.preprocess(preprocess, task, f"{where}.preprocess")
    if sample is None:
        project.bind(model, f"{where}.model", input_shape=(), num_classes=task.num_classes)
        return None
    if is_fitted_here:
        to_input.fit([sample])
    inputs = to_input(sample)
    offered = {"input_shape": tuple(inputs.shape[1:]), "num_classes": task.num_classes}
    module = project.bind(model, f"{where}.model", **offered).make()
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"{where}.model: {model.path} gave {type(module).__name__}; expected a torch.nn.Module")
    try:
        with torch.inference_mode():
            logits = module.eval()(inputs)
        if where != "student" and isinstance(logits, Mapping):  # a teacher may name its outputs
            logits = logits.get("logits")
    except Exception as error:
        raise ConfigError(
            f"{where}.model: forward fails on an input of shape {list(inputs.shape)}: {type(error).__name__}: {error}"
        ) from error
    expected = (len(inputs), task.num_classes)
    if not isinstance(logits, torch.Tensor) or logits.shape[:1] + logits.shape[-1:] != expected:
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(f"{where}.model: forward gives {found}; expected logits of shape {list(expected)}")
    return module


def _check_losses(project: Project, task: Task) -> str:
    """That every loss can be computed from what is going to be stored; of features only a store knows the shape."""
    terms = [loss_term(project, index, each) for index, each in enumerate(project.params.student.losses)]
    logits = OutputSpec(name="logits", shape=(task.num_classes,))
    for index, term in enumerate(terms):
        if term.output == logits.name:
            encoding = encodings_of(project.targets(term.teacher), [logits])[logits.name]
            check_term(f"student.losses.{index}", term, encoding, logits, logits)
    return ", ".join(f"{type(each.loss).__name__} of {each.teacher}" for each in terms)


def _check_splits(project: Project) -> str:
    """The splits and labels that the stages will ask for, where data/prepared can tell."""
    try:
        data: PreparedData = project.prepared_data()
    except DataError:
        return "not known before `kdpipe prepare-data`"
    wanted = {
        f"teachers.{name}.train.split": [each.train.split]
        for name, each in project.params.teachers.items()
        if each.train
    }
    wanted |= {
        "student.distil_on": list(project.params.student.distil_on),
        "evaluate.split": [project.params.evaluate.split],
    }
    for where, names in wanted.items():
        for name in names:
            if name not in data.split_names:
                raise ConfigError(f"{where}: there is no split {name!r}; prepared are {', '.join(data.split_names)}")
    rows = data.rows_of(project.params.student.distil_on)
    known = known_labels(data, rows, project.params.student)
    return f"{', '.join(data.split_names)}; the student may know {int(np.sum(known[rows] >= 0)):,} labels"
