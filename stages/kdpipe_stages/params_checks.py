"""What no single key of params.yaml can say: how its sections fit each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from kdpipe.config import did_you_mean
from kdpipe.errors import ConfigError
from kdpipe.store.manifest import check_output_names
from kdpipe.store.objects import access, is_url
from kdpipe.targets import check_temperatures
from kdpipe_stages.params import (
    PARAMETERS,
    LossSection,
    Params,
    TargetsSection,
    TeacherSection,
    logits_encoding,
    schedule_of,
)


def check_params(params: Params) -> None:
    """Raise `ConfigError` where one section contradicts another, or lacks what it needs."""
    if not params.teachers:
        raise ConfigError("teachers: empty; expected at least one, by its name")
    for name, teacher in params.teachers.items():
        _check_teacher(name, teacher)
    for name, section in params.targets.items():
        if name not in params.teachers:
            raise ConfigError(
                f"targets.{name}: there is no such teacher; the teachers are {', '.join(params.teachers)}"
                f"{did_you_mean(name, params.teachers)}"
            )
        _check_targets(name, section)
        if section.classifier is not None and params.teachers[name].model is None:
            raise ConfigError(
                f"targets.{name}.classifier: it is a layer of teachers.{name}.model, and there is none; leave it out"
            )
    _check_urls(params)
    _check_views(params)
    splits = params.data.splits
    if params.data.columns.split is None and abs(sum(splits.shares.values()) - 1) > 1e-6:
        raise ConfigError(
            "data.splits.shares: the source has no split column (data.columns.split), so the shares must sum to 1, "
            f"such as {{train: 0.8, test: 0.2}}; found {splits.shares}"
        )
    if any(share <= 0 for share in splits.shares.values()):
        raise ConfigError(
            f"data.splits.shares: each must be above 0, or the split would be empty; found {splits.shares}"
        )
    _check_student(params)


_TEACHERS = ("train", "weights", "teacher", "table")
_NOT_WITH = {
    "train": ("fit_on", "runtime"),
    "weights": ("fit_on", "runtime"),
    "teacher": ("model", "logits"),
    "table": ("model", "preprocess", "logits", "fit_on", "runtime"),
}


def _check_teacher(name: str, teacher: TeacherSection) -> None:
    given = [key for key in _TEACHERS if getattr(teacher, key) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"teachers.{name}: give one of train (its model is trained here), weights (they are ready), teacher (any "
            f"other, by its factory) and table (what it said is in a file); found {' and '.join(given) or 'none'}"
        )
    if (teacher.train or teacher.weights) and teacher.model is None:
        raise ConfigError(f"teachers.{name}.model: missing")
    for key in _NOT_WITH[given[0]]:
        if getattr(teacher, key) is not None:
            raise ConfigError(f"teachers.{name}.{key}: it does not go with {given[0]}; leave it out")
    for key in teacher.runtime or ():
        if teacher.teacher is not None and key in teacher.teacher.arguments:
            raise ConfigError(f"teachers.{name}.runtime.{key}: it is given in teachers.{name}.teacher, too")


def _check_views(params: Params) -> None:
    views = params.views
    if views.count and views.transform is None:
        raise ConfigError(f"views.count is {views.count}, but there is no views.transform to make views with")
    beyond = set() if views.splits is None else set(params.student.distil_on) - set(views.splits)
    if views.count and beyond:
        raise ConfigError(
            f"student.distil_on: {', '.join(sorted(beyond))} is not among views.splits "
            f"({', '.join(views.splits or ()) or 'none'}), so it has no augmented views. Add it there, or set "
            "views.count: 0"
        )
    shown = {f"teachers.{name}.train": each.train for name, each in params.teachers.items() if each.train}
    kept = [f"{where}.keep_on_device" for where, each in shown.items() if each.transform and each.keep_on_device]
    if views.count and params.student.train.keep_on_device:
        kept.append("student.train.keep_on_device")
    for where in kept:
        raise ConfigError(f"{where}: rows that a transform changes in every epoch are not kept; leave it out")


def _check_targets(name: str, section: TargetsSection) -> None:
    own = PARAMETERS[section.encoding]
    for key in (key for keys in PARAMETERS.values() for key in keys):
        if getattr(section, key) is not None and key not in own:
            raise ConfigError(
                f"targets.{name}.{key}: encoding {section.encoding!r} has no such parameter; "
                f"it has {', '.join(own) or 'none'}"
            )
    for key, default in own.items():
        if default is MISSING and getattr(section, key) is None:
            raise ConfigError(f"targets.{name}.{key}: absent; encoding {section.encoding!r} needs it")
    if section.min_k is not None and section.top_p is None:
        raise ConfigError(f"targets.{name}.min_k: it means nothing without top_p; give both or leave it out")
    if "logits" not in section.outputs:
        raise ConfigError(f"targets.{name}.outputs: {list(section.outputs)} has no 'logits', which is always stored")
    if len(set(section.outputs)) < len(section.outputs):
        raise ConfigError(f"targets.{name}.outputs: {list(section.outputs)}; expected each name once")
    try:
        check_output_names(section.outputs)
    except ConfigError as error:
        raise ConfigError(f"targets.{name}.outputs: {error}") from None
    try:
        check_temperatures(section.temperatures)
        logits_encoding(section)
    except ConfigError as error:
        raise ConfigError(f"targets.{name}: {error}") from None


def _check_urls(params: Params) -> None:
    """No message repeats a url that may hold a secret."""
    named: dict[str, str] = {}
    for name, section in params.targets.items():
        url = section.url
        if url is None:
            continue
        where = f"targets.{name}.url"
        if any(each in url for each in "@?#"):
            raise ConfigError(
                f"{where}: it holds a user, a password or a query, or such a character ('@', '?', '#'). A url names a "
                f"bucket and a folder only: s3://bucket/folder. {access(url)}"
            )
        scheme, _, path = url.partition("://")
        is_folder = all(path.removesuffix("/").split("/"))
        if not is_url(url) or scheme in ("file", "local", "memory") or not is_folder:
            raise ConfigError(f"{where}: {url!r} is none; expected s3://bucket/folder, or null for this disk")
        same = named.setdefault(url.rstrip("/"), name)
        if same != name:
            raise ConfigError(f"{where}: it is that of targets.{same}, too; a url holds one store")


def _check_student(params: Params) -> None:
    student = params.student
    if student.labelled_rows is not None and student.labelled_fraction is not None:
        raise ConfigError("student: give labelled_rows or labelled_fraction, not both")
    if not student.losses:
        raise ConfigError("student.losses: empty; expected at least one loss on a teacher's targets")
    schedule_of(student.label_schedule, "student.label_schedule")
    for index, loss in enumerate(student.losses):
        where = f"student.losses.{index}"
        schedule_of(loss.schedule, f"{where}.schedule")
        _check_mix(where, loss)
        if loss.projector is not None and not loss.student_output:
            raise ConfigError(
                f"{where}.projector: it would stand between the student's logits and the loss, and is not kept, so the "
                "logits themselves would learn nothing; name the output that it projects as student_output, or leave "
                "it out"
            )
        for name in loss.teachers:
            if name not in params.teachers:
                choices = ", ".join(params.teachers)
                raise ConfigError(f"{where}.teacher: there is no teacher {name!r}; there are {choices}")
            outputs = params.targets.get(name, TargetsSection()).outputs
            if loss.output not in outputs:
                of = "" if len(loss.teachers) == 1 else f" of {name}"
                raise ConfigError(f"{where}.output: {loss.output!r}{of} is not stored; stored are {', '.join(outputs)}")


def _check_mix(where: str, loss: LossSection) -> None:
    if loss.mix is not None and len(loss.teachers) == 1:
        raise ConfigError(f"{where}.mix: there is one teacher only, {loss.teacher}; list several, or leave mix out")
    if isinstance(loss.mix, dict) and set(loss.mix) != set(loss.teachers):
        raise ConfigError(
            f"{where}.mix: it weighs {', '.join(loss.mix)}, the teachers are {', '.join(loss.teachers)}; expected a "
            "weight for each of them"
        )


def check_finite(value: Any, where: str = "") -> None:
    """Raise `ConfigError` for a number of params.yaml, at any depth, that is none or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value}; expected a finite number")
    if isinstance(value, Mapping):
        for key, each in value.items():
            check_finite(each, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            check_finite(each, f"{where}.{index}")
