"""params.yaml as frozen values: its sections, what no single key can say, and what of it outputs remember."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, field, fields
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from kdpipe.config import FactoryField, did_you_mean
from kdpipe.data.preparing import SourceColumns, SplitPlan
from kdpipe.encodings import ENCODINGS, TargetEncoding
from kdpipe.errors import ConfigError
from kdpipe.fingerprint import canonical_json
from kdpipe.losses import CONSTANT, Schedule
from kdpipe.store.objects import access, is_url

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SplitsSection:
    """data.splits: shares where the source has no split column, and the validation split taken from train."""

    shares: dict[str, float] = field(default_factory=dict)
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    carve_from: str = "train"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ColumnsSection:
    """data.columns: names in the source; null where there is none."""

    id: str | None = None
    label: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataSection:
    """data: where rows come from, and how they are split; `path` for sources that read a file or a folder."""

    source: FactoryField
    path: str | None = None
    columns: ColumnsSection = field(default_factory=ColumnsSection)
    splits: SplitsSection = field(default_factory=SplitsSection)


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainSection:
    """How a model is optimised; `epochs` counts passes over all of a student's rows, `threads` those of the CPU.

    `class_weights` (of the label's class, or `balanced`) and `logit_adjustment` (tau) are about the loss on labels;
    `sampling: balanced` shows as many rows of each class in an epoch (see `kdpipe.order.balanced`).
    """

    epochs: int = Field(gt=0)
    batch_size: int = Field(default=128, gt=0)
    micro_batch_size: int | None = Field(default=None, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    num_workers: int = Field(default=0, ge=0)
    ram_budget_mb: int = Field(default=512, ge=0)
    keep_on_device: bool = False
    threads: int | None = Field(default=None, gt=0)
    checkpoint_every_s: float = Field(default=20.0, ge=0)
    log_gradients: bool = True
    class_weights: Literal["balanced"] | tuple[Weight, ...] | None = None
    logit_adjustment: float | None = Field(default=None, gt=0)
    sampling: Literal["balanced"] | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TeacherTrainSection(TrainSection):
    """teachers.<name>.train: label-only training on one split."""

    split: str = "train"
    seed: int = Field(default=0, ge=0, lt=2**64)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


OutputName = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""A part of what a module gives: a key, or a position."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TeacherSection:
    """teachers.<name>: a module that is trained here (`train`) or is ready (`weights`), or what one said (`table`).

    Or any other `teacher`, which learns from the rows of `fit_on` where it has something to learn; `runtime` holds
    those keyword arguments of its factory that change nothing of what it says (a server's address). `logits` says which
    part of what the module gives they are.
    """

    model: FactoryField | None = None
    teacher: FactoryField | None = None
    runtime: dict[str, Any] | None = None
    preprocess: FactoryField | None = None
    train: TeacherTrainSection | None = None
    fit_on: str | None = None
    weights: str | None = None
    table: str | None = None
    logits: OutputName | None = None


LogitsEncoding = Literal["dense", "int8", "topk", "sampled"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TargetsSection:
    """targets.<name>: what is stored of a teacher, how, and where (`url`: in an object store, null: on this disk).

    Keys below `outputs` belong to one encoding or two.
    """

    encoding: LogitsEncoding = "dense"
    url: str | None = None
    temperatures: tuple[float, ...] = (1.0,)
    outputs: tuple[str, ...] = ("logits",)
    classifier: str | None = None
    profile: Literal["fast", "compact"] = "fast"
    features: Literal["float16", "float32", "int8"] = "float16"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_rows: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=256, gt=0)
    batch_tokens: int | None = Field(default=None, gt=0)
    threads: int | None = Field(default=None, gt=0)
    dtype: Literal["float16", "float32"] | None = None
    masked_classes: bool | None = None
    k: int | None = Field(default=None, gt=0)
    values: Literal["float16", "int8"] | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_k: int | None = Field(default=None, gt=0)
    draws: int | None = Field(default=None, gt=0)
    head: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0)
    stratified: bool | None = None


def _parameters(encoding: str) -> dict[str, Any]:
    own = (each for each in fields(cast("Any", ENCODINGS[encoding])) if each.name not in ("compact", "temperatures"))
    return {each.name: each.default for each in own}


PARAMETERS: Mapping[str, Mapping[str, Any]] = {name: _parameters(name) for name in get_args(LogitsEncoding)}
"""Encoding -> the keys of a `targets` section that are its own, with their defaults; `MISSING` where it needs one."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ViewsSection:
    """views: `count` augmented versions of the rows of `splits` (null: of all rows), by `transform`, beside view 0."""

    count: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**64)
    transform: FactoryField | None = None
    splits: tuple[str, ...] | None = ("train",)


def _parse_teachers(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
        raise ValueError("expected the name of a teacher, or a list of several")
    if len(set(names)) < len(names):
        raise ValueError("expected each teacher once")
    return names[0] if len(names) == 1 else tuple(names)


def _parse_mix(value: Any) -> Any:
    numbers = list(value.values()) if isinstance(value, Mapping) else []
    if value in (None, "mean", "confidence") or (
        numbers and all(type(each) in (int, float) and 0 < each < math.inf for each in numbers)
    ):
        return value
    raise ValueError("expected mean, confidence, or a mapping of each teacher's name to a number above 0")


TeacherNames = Annotated[str | tuple[str, ...], BeforeValidator(_parse_teachers)]
MixField = Annotated[Literal["mean", "confidence"] | dict[str, float] | None, BeforeValidator(_parse_mix)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScheduleSection:
    """`schedule` of a term: how its weight changes over the training, see `kdpipe.losses.Schedule`."""

    kind: Literal["warmup", "linear", "cosine"]
    fraction: float | None = None
    to: float | None = None


ScheduleField = Annotated[ScheduleSection | None, BeforeValidator(lambda value: None if value == "constant" else value)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LossSection:
    """One entry of student.losses: a loss by import path, on an output of a teacher, times a weight by a schedule.

    Of several teachers `mix` makes one (mean, if null). It is about the student's logits, or its output
    `student_output`, which goes through a `projector` where one is given.
    """

    factory: str
    teacher: TeacherNames
    output: str = "logits"
    weight: Weight = 1.0
    mix: MixField = None
    schedule: ScheduleField = None
    student_output: OutputName = ""
    projector: Literal["linear", "conv1x1", "mlp"] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Their names."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher


LOSS_KEYS = ("factory", "teacher", "output", "weight", "mix", "schedule", "student_output", "projector")
"""Keys of an entry of student.losses that are not the loss's own."""


Baseline = Literal["labels_only", "label_smoothing"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StudentSection:
    """student: the model, the rows and labels it learns from, the losses, and what it is compared with."""

    model: FactoryField
    losses: tuple[LossSection, ...]
    train: TrainSection
    preprocess: FactoryField | None = None
    logits: OutputName | None = None
    init_from: str | None = None
    distil_on: tuple[str, ...] = ("train",)
    labelled_rows: int | None = Field(default=None, ge=0)
    labelled_fraction: float | None = Field(default=None, ge=0, le=1)
    labelled_seed: int = 0
    label_weight: Weight = 1.0
    label_schedule: ScheduleField = None
    seeds: int = Field(default=1, gt=0)
    baselines: tuple[Baseline, ...] = ("labels_only", "label_smoothing")
    label_smoothing: float = Field(default=0.1, gt=0, lt=1)

    @property
    def learns_labels(self) -> bool:
        """Whether the loss on labels has a weight at some time."""
        return self.label_weight > 0 or (self.label_schedule is not None and bool(self.label_schedule.to))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluateSection:
    """evaluate: which split the metrics are about."""

    split: str = "test"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Params:
    """All of params.yaml."""

    data: DataSection
    task: FactoryField
    teachers: dict[str, TeacherSection]
    student: StudentSection
    targets: dict[str, TargetsSection] = field(default_factory=dict)
    views: ViewsSection = field(default_factory=ViewsSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)


FREE_OF_TRAINING = ("num_workers", "ram_budget_mb", "keep_on_device", "threads", "checkpoint_every_s", "log_gradients")
"""Keys of a `train` section that change no number, or last bits only."""


def source_columns(section: ColumnsSection) -> SourceColumns:
    """As the library takes it."""
    return SourceColumns(id=section.id, label=section.label, split=section.split)


def split_plan(section: SplitsSection) -> SplitPlan:
    """As the library takes it."""
    return SplitPlan(
        shares=section.shares,
        validation_fraction=section.validation_fraction,
        carve_from=section.carve_from,
        seed=section.seed,
    )


def with_loss_arguments(raw: Any) -> Any:
    """student.losses entries with the loss's own arguments (temperature, …) gathered under `arguments`."""
    student: Any = raw.get("student") if isinstance(raw, Mapping) else None
    losses = student.get("losses") if isinstance(student, Mapping) else None
    if not isinstance(losses, Sequence) or not all(isinstance(each, Mapping) for each in losses):
        return raw
    return {**raw, "student": {**student, "losses": [_gathered(each) for each in losses]}}


def _gathered(loss: Mapping[str, Any]) -> dict[str, Any]:
    own = set(LOSS_KEYS)
    for lacking in {"factory", "teacher"} - set(loss):  # stays an unknown key, and so a clear error
        own |= set(difflib.get_close_matches(lacking, [str(key) for key in loss], n=1))
    arguments = {key: value for key, value in loss.items() if key not in own}
    return {key: value for key, value in loss.items() if key in own} | {"arguments": arguments}


def logits_encoding(section: TargetsSection) -> TargetEncoding:
    """How a `targets` section stores logits."""
    given = {key: getattr(section, key) for key in PARAMETERS[section.encoding]}
    parameters = {key: value for key, value in given.items() if value is not None}
    if section.encoding == "topk":
        parameters["temperatures"] = section.temperatures
    return ENCODINGS[section.encoding](compact=section.profile == "compact", **parameters)


def check_params(params: Params) -> None:
    """What no single field can say."""
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
    beyond = set(params.student.distil_on) - set(views.splits or params.student.distil_on)
    if views.count and beyond:
        raise ConfigError(
            f"student.distil_on: {', '.join(sorted(beyond))} is not among views.splits "
            f"({', '.join(views.splits or ())}), so it has no augmented views. Add it there, or set views.count: 0"
        )


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
    if not section.temperatures or not all(0 < each < math.inf for each in section.temperatures):
        raise ConfigError(f"targets.{name}.temperatures: {list(section.temperatures)}; expected numbers above 0")
    try:
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


def schedule_of(section: ScheduleSection | None, where: str) -> Schedule:
    """As the library takes it. Raises `ConfigError`."""
    try:
        return CONSTANT if section is None else Schedule(**asdict(section))
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None


def store_sections(params: Params, teacher: str) -> dict[str, Any]:
    """The settings that a store was made from, with defaults filled in and without what changes no number.

    The student compares them with today's params.yaml: it can tell a store of other settings without any teacher.
    """
    section = to_json(params.teachers[teacher])
    section.pop("runtime")
    for free in FREE_OF_TRAINING:
        (section["train"] or {}).pop(free, None)
    chosen = params.targets.get(teacher, TargetsSection())
    parameters = {key for keys in PARAMETERS.values() for key in keys}
    left_out = {"url", "batch_size", "batch_tokens", "threads", "temperatures", "profile", *parameters}
    targets = {key: value for key, value in to_json(chosen).items() if key not in left_out}
    if chosen.classifier is None:  # as an earlier kdpipe wrote it
        targets.pop("classifier")
    targets["encoding"] = logits_encoding(chosen).to_json()
    sections = {"teacher": section, "targets": targets, "task": to_json(params.task)}
    return {**sections, "views": views_identity(params.views)}


def views_identity(section: ViewsSection) -> dict[str, Any] | None:
    """What changes the augmented views: not their number, so that there may be more of them tomorrow."""
    return None if section.transform is None else {"seed": section.seed, "transform": to_json(section.transform)}


def prepared_sections(params: Params) -> dict[str, Any]:
    """The settings that data/prepared is made with."""
    return {"data": to_json(params.data), "task": to_json(params.task)}


def first_difference(then: Any, today: Any, where: str = "") -> str:
    """Where two settings differ, as a sentence; empty when they do not."""
    if then == today:
        return ""
    if isinstance(then, Mapping) and isinstance(today, Mapping):
        # A key that an older kdpipe did not know is as good as one that is null.
        differing = (key for key in [*today, *then] if then.get(key) != today.get(key))
        key = next(differing, None)
        return "" if key is None else first_difference(then.get(key), today.get(key), f"{where}.{key}".lstrip("."))
    was, says = (json.dumps(each, ensure_ascii=False, default=str) for each in (then, today))
    return f"{where} was {was}, params.yaml says {says}"


def to_json(value: Any) -> Any:
    """A section as JSON values."""
    return json.loads(canonical_json(asdict(value)))
