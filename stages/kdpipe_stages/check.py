"""`kdpipe check`: everything that can be wrong in params.yaml, found before any work starts; no training, no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdpipe.config import Factory
from kdpipe.data.sources import Source
from kdpipe.errors import ConfigError, KdpipeError
from kdpipe.tasks.base import Task
from kdpipe_stages.lesson import loss_term
from kdpipe_stages.params import Project


def run(project: Project) -> Sequence[str]:
    """What was checked, a line each. Raises `ConfigError` with every problem that was found."""
    problems: list[str] = []
    checked: list[str] = []
    for name, check in _CHECKS.items():
        try:
            checked.append(f"{name}: {check(project)}")
        except KdpipeError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return checked


def _check_data(project: Project) -> str:
    section = project.params.data
    path = project.root / section.path
    source: Source = project.bind(section.source, "data.source", path=path).make()
    if not callable(getattr(source, "batches", None)):
        raise ConfigError(f"data.source: {section.source.path} is no Source (see kdpipe.data.sources.Source)")
    if not path.exists():
        raise ConfigError(f"data.path: there is no {path}")
    return f"{section.path} by {section.source.path}"


def _check_task(project: Project) -> str:
    return f"{project.params.task.path}, {project.task().num_classes} classes"


def _check_teachers(project: Project) -> str:
    task = project.task()
    for name, section in project.params.teachers.items():
        _check_model(project, task, section.model, section.preprocess, f"teachers.{name}")
        if section.weights is not None and not (project.root / section.weights).is_file():
            raise ConfigError(f"teachers.{name}.weights: there is no {project.root / section.weights}")
    return ", ".join(project.params.teachers)


def _check_student(project: Project) -> str:
    section, task = project.params.student, project.task()
    _check_model(project, task, section.model, section.preprocess, "student")
    for index, each in enumerate(section.losses):
        loss_term(project, index, each)
    return f"{section.model.path}, {len(section.losses)} losses, {section.seeds} seeds"


def _check_model(project: Project, task: Task, model: Factory, preprocess: Factory | None, where: str) -> None:
    """That the module's factory binds, and that it makes a module where no prepared row is needed to know its input."""
    project.preprocess(preprocess, task, f"{where}.preprocess")
    bound = project.bind(model, f"{where}.model", input_shape=(), num_classes=task.num_classes)
    if isinstance(bound.target, type) and not issubclass(bound.target, torch.nn.Module):
        raise ConfigError(f"{where}.model: {model.path} is no torch.nn.Module")


_CHECKS = {"data": _check_data, "task": _check_task, "teachers": _check_teachers, "student": _check_student}
