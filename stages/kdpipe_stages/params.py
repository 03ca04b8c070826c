"""params.yaml as frozen values: its sections, what no single key can say, and what of it outputs remember."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field, fields
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from kdpipe.config import FactoryField
from kdpipe.data.preparing import SourceColumns, SplitPlan
from kdpipe.encodings import ENCODINGS, TargetEncoding
from kdpipe.errors import ConfigError
from kdpipe.fingerprint import canonical_json
from kdpipe.losses import CONSTANT, Schedule

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
    """teachers.<name>.train: label-only training on one split, in each epoch on another view of it by `transform`."""

    split: str = "train"
    seed: int = Field(default=0, ge=0, lt=2**64)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    transform: FactoryField | None = None


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

    kind: Literal["constant", "warmup", "linear", "cosine"]
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
    teachers = {each: _section(params, each) for each in teacher_and_members(params, teacher)}
    for member in teachers.keys() - {teacher}:
        precision = params.targets.get(member, TargetsSection()).precision
        if precision != TargetsSection().precision:
            teachers[member]["precision"] = precision
    chosen = params.targets.get(teacher, TargetsSection())
    parameters = {key for keys in PARAMETERS.values() for key in keys}
    left_out = {"url", "batch_size", "batch_tokens", "threads", "temperatures", "profile", *parameters}
    targets = {key: value for key, value in to_json(chosen).items() if key not in left_out}
    if chosen.classifier is None:  # as an earlier kdpipe wrote it
        targets.pop("classifier")
    targets["encoding"] = logits_encoding(chosen).to_json()
    sections = {"teacher": teachers.pop(teacher), "targets": targets, "task": to_json(params.task)}
    if teachers:
        sections["members"] = teachers
    return {**sections, "views": views_identity(params.views)}


def teacher_and_members(params: Params, name: str) -> list[str]:
    """A teacher, the teachers that its arguments name, as an ensemble's do, and theirs."""
    names = [name]
    for each in names:
        factory = params.teachers[each].teacher
        named = _texts_in(factory.arguments if factory else {})
        names += dict.fromkeys(other for other in named if other in params.teachers and other not in names)
    return names


def _section(params: Params, teacher: str) -> dict[str, Any]:
    """A teacher's own section without what changes no number."""
    section: dict[str, Any] = to_json(params.teachers[teacher])
    section.pop("runtime")
    for free in FREE_OF_TRAINING:
        (section["train"] or {}).pop(free, None)
    return section


def _texts_in(value: Any) -> Iterator[str]:
    """All texts of a value that params.yaml may hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(each)


def views_identity(section: ViewsSection) -> dict[str, Any] | None:
    """What changes the augmented views: not their number, so that there may be more of them tomorrow."""
    return None if section.transform is None else {"seed": section.seed, "transform": to_json(section.transform)}


def prepared_sections(params: Params) -> dict[str, Any]:
    """The settings that data/prepared is made with."""
    return {"data": to_json(params.data), "task": to_json(params.task)}


def differing(then: Mapping[str, Any], today: Mapping[str, Any]) -> list[str]:
    """Keys, sorted, whose values are not the same."""
    return sorted(key for key in {*then, *today} if then.get(key) != today.get(key))


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


def splits_asked_for(params: Params) -> dict[str, list[str]]:
    """By key of params.yaml: the splits that it names."""
    wanted = {
        f"teachers.{name}.train.split": [each.train.split] for name, each in params.teachers.items() if each.train
    }
    wanted |= {f"teachers.{name}.fit_on": [each.fit_on] for name, each in params.teachers.items() if each.fit_on}
    wanted |= {
        "student.distil_on": list(params.student.distil_on),
        "evaluate.split": [params.evaluate.split],
    }
    if params.views.count:
        wanted["views.splits"] = list(params.views.splits or ())
    return wanted


def absent_splits(params: Params, prepared: Sequence[str]) -> list[str]:
    """A message for each split that a key of params.yaml names, and that is not among those prepared."""
    return [
        f"{where}: there is no split {name!r}; prepared are {', '.join(prepared)}"
        for where, names in splits_asked_for(params).items()
        for name in names
        if name not in prepared
    ]
