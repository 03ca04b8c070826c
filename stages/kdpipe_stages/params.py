"""params.yaml as frozen values, and the project's folder: what several stages share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kdpipe import durable
from kdpipe.config import Bound, Factory, FactoryField, bind, load_module, load_yaml, parse, resolve
from kdpipe.data.prepared import MISSING_LABEL, PreparedData
from kdpipe.data.preparing import SourceColumns, SplitPlan
from kdpipe.errors import ConfigError, DataError
from kdpipe.fingerprint import canonical_json, source_digests
from kdpipe.preprocess import Preprocess
from kdpipe.tasks.base import Task

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
Share = Field(ge=0, lt=1)
Positive = Field(gt=0)


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
    """data: where rows come from, and how they are split."""

    source: FactoryField
    path: str
    columns: ColumnsSection = field(default_factory=ColumnsSection)
    splits: SplitsSection = field(default_factory=SplitsSection)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainSection:
    """How a model is optimised; `epochs` counts passes over all of a student's rows, `threads` those of the CPU."""

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
    threads: int | None = Field(default=None, gt=0)
    checkpoint_every_s: float = Field(default=20.0, ge=0)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TeacherTrainSection(TrainSection):
    """teachers.<name>.train: label-only training on one split."""

    split: str = "train"
    seed: int = 0
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TeacherSection:
    """teachers.<name>: a module that is trained here (`train`), or one that is ready (`weights`)."""

    model: FactoryField
    preprocess: FactoryField | None = None
    train: TeacherTrainSection | None = None
    weights: str | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TargetsSection:
    """targets.<name>: what is stored of a teacher, and how."""

    encoding: Literal["dense"] = "dense"
    dtype: Literal["float16", "float32"] = "float16"
    temperatures: tuple[float, ...] = (1.0,)
    outputs: tuple[Literal["logits"], ...] = ("logits",)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_rows: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=256, gt=0)
    threads: int | None = Field(default=None, gt=0)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ViewsSection:
    """views: augmented versions of the rows; this version of kdpipe caches the clean row only (count 0)."""

    count: int = Field(default=0, ge=0)
    seed: int = 0
    transform: None = None
    splits: tuple[str, ...] = ("train",)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LossSection:
    """One entry of student.losses: a loss by import path, on one teacher's output, times a weight."""

    factory: str
    teacher: str
    output: str = "logits"
    weight: float = Field(default=1.0, ge=0)
    arguments: dict[str, Any] = field(default_factory=dict)


Baseline = Literal["labels_only", "label_smoothing"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StudentSection:
    """student: the model, the rows and labels it learns from, the losses, and what it is compared with."""

    model: FactoryField
    losses: tuple[LossSection, ...]
    train: TrainSection
    preprocess: FactoryField | None = None
    distil_on: tuple[str, ...] = ("train",)
    labelled_rows: int | None = Field(default=None, ge=0)
    labelled_fraction: float | None = Field(default=None, ge=0, le=1)
    labelled_seed: int = 0
    label_weight: float = Field(default=1.0, ge=0)
    seeds: int = Field(default=1, gt=0)
    baselines: tuple[Baseline, ...] = ("labels_only", "label_smoothing")
    label_smoothing: float = Field(default=0.1, gt=0, lt=1)


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


FREE_OF_TRAINING = ("num_workers", "threads", "checkpoint_every_s")
"""Keys of a `train` section that change no number, or last bits only."""


class Project:
    """A params.yaml and the folder it stands in: every path of the run, and the objects its factories name."""

    def __init__(self, params_file: Path) -> None:
        """Read and check params.yaml. Raises `ConfigError` naming each wrong key."""
        self.params_file = params_file.resolve()
        self.root = self.params_file.parent
        self.raw: Mapping[str, Any] = load_yaml(self.params_file) or {}
        if not isinstance(self.raw, Mapping):
            raise ConfigError(
                f"{self.params_file.name} holds a {type(self.raw).__name__}; expected sections by name: data, …"
            )
        self.params = parse(Params, _with_loss_arguments(self.raw), self.params_file.name)
        _check(self.params)

    @property
    def prepared(self) -> Path:
        """data/prepared."""
        return self.root / "data" / "prepared"

    @property
    def prepared_settings(self) -> Path:
        """The settings that data/prepared was made with; beside the labels, as both change together."""
        return self.prepared / "labels" / "settings.json"

    @property
    def student_models(self) -> Path:
        """data/models/student/<arm>/seed-<n>."""
        return self.root / "data" / "models" / "student"

    @property
    def plots(self) -> Path:
        """data/plots."""
        return self.root / "data" / "plots"

    def teacher_model(self, name: str) -> Path:
        """data/models/teachers/<name>."""
        return self.root / "data" / "models" / "teachers" / name

    def store(self, name: str) -> Path:
        """data/targets/<name>."""
        return self.root / "data" / "targets" / name

    def work(self, fingerprint: str) -> Path:
        """data/.work/<fingerprint>: work in progress, and what earlier runs finished."""
        return self.root / "data" / ".work" / fingerprint

    def publish(self, parts: Mapping[str, Path], destination: Path) -> None:
        """Make an output folder hold exactly `parts`, in one rename."""
        staging = self.root / "data" / ".work" / "staging" / destination.relative_to(self.root / "data")
        durable.publish(parts, destination, staging)

    @property
    def timings(self) -> Path:
        """Seconds of the stages on this machine; they are no output, so that outputs stay deterministic."""
        return self.root / "data" / ".work" / "timings"

    def write_timings(self, stage: str, name: str, seconds: Mapping[str, Any]) -> None:
        """Note what a stage took for one teacher or one arm."""
        path = self.timings / stage / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, canonical_json(seconds) + "\n")

    def only_writer(self, name: str, doing: str) -> AbstractContextManager[None]:
        """The lock of one thing that is written."""
        return durable.only_writer(self.root / "data" / ".work" / "locks" / name, doing)

    def teacher(self, name: str) -> TeacherSection:
        """One teacher's section. Raises `ConfigError` with the names that exist."""
        if name not in self.params.teachers:
            raise ConfigError(f"there is no teacher {name!r}; params.yaml has {', '.join(self.params.teachers)}")
        return self.params.teachers[name]

    def teacher_names(self, name: str | None) -> list[str]:
        """The named teacher, or all of them."""
        if name is None:
            return list(self.params.teachers)
        self.teacher(name)
        return [name]

    def targets(self, name: str) -> TargetsSection:
        """What is stored of a teacher."""
        return self.params.targets.get(name, TargetsSection())

    def bind(self, factory: Factory, where: str, **offered: Any) -> Bound:
        """Check a factory against its signature, without calling it."""
        return bind(factory, self.root, where, **offered)

    def sources(self, factory: Factory, where: str) -> dict[str, str]:
        """Digests of the code that a factory reaches."""
        module = load_module(factory.path, self.root, where)
        return source_digests(resolve(factory.path, self.root, where), module.__name__)

    def task(self) -> Task:
        """The task."""
        task = self.bind(self.params.task, "task").make()
        if not isinstance(task, Task):
            raise ConfigError(f"task: {self.params.task.path} is no Task (kdpipe.tasks.base.Task says what one has)")
        return task

    def preprocess(self, factory: Factory | None, task: Task, where: str) -> Preprocess:
        """A model's own preprocess, or the task's default."""
        if factory is None:
            return task.default_preprocess()
        preprocess = self.bind(factory, where).make()
        if not isinstance(preprocess, Preprocess):
            raise ConfigError(f"{where}: {factory.path} is no Preprocess (see kdpipe.preprocess.Preprocess)")
        return preprocess

    def prepared_data(self) -> PreparedData:
        """The prepared rows. Raises `DataError` when they are absent or of other settings, naming the command."""
        data = PreparedData(self.prepared)
        then = json.loads(self.prepared_settings.read_text()) if self.prepared_settings.is_file() else None
        difference = first_difference(then, prepared_sections(self.params))
        if difference:
            raise DataError(f"{self.prepared} was made with other settings: {difference}. Run `kdpipe prepare-data`.")
        return data


def has_labels(data: PreparedData, rows: Any) -> bool:
    """Whether any of the rows has a label."""
    return bool((data.labels[rows] != MISSING_LABEL).any())


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


def _with_loss_arguments(raw: Any) -> Any:
    """student.losses entries with the loss's own arguments (temperature, …) gathered under `arguments`."""
    student: Any = raw.get("student") if isinstance(raw, Mapping) else None
    losses = student.get("losses") if isinstance(student, Mapping) else None
    if not isinstance(losses, Sequence) or not all(isinstance(each, Mapping) for each in losses):
        return raw
    own = ("factory", "teacher", "output", "weight")
    gathered = [
        {key: each[key] for key in own if key in each}
        | {"arguments": {key: value for key, value in each.items() if key not in own}}
        for each in losses
    ]
    return {**raw, "student": {**student, "losses": gathered}}


def _check(params: Params) -> None:
    """What no single field can say."""
    for name, teacher in params.teachers.items():
        if (teacher.train is None) == (teacher.weights is None):
            raise ConfigError(f"teachers.{name}: give either train (it is trained here) or weights (it is ready)")
    for name in params.targets:
        if name not in params.teachers:
            raise ConfigError(
                f"targets.{name}: there is no such teacher; the teachers are {', '.join(params.teachers)}"
            )
    if params.views.count:
        raise ConfigError("views.count: this version caches the clean row only; expected 0")
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


def _check_student(params: Params) -> None:
    student = params.student
    if student.labelled_rows is not None and student.labelled_fraction is not None:
        raise ConfigError("student: give labelled_rows or labelled_fraction, not both")
    if not student.losses:
        raise ConfigError("student.losses: empty; expected at least one loss on a teacher's targets")
    for index, loss in enumerate(student.losses):
        if loss.teacher not in params.teachers:
            choices = ", ".join(params.teachers)
            raise ConfigError(
                f"student.losses.{index}.teacher: there is no teacher {loss.teacher!r}; there are {choices}"
            )
        outputs = params.targets.get(loss.teacher, TargetsSection()).outputs
        if loss.output not in outputs:
            raise ConfigError(
                f"student.losses.{index}.output: {loss.output!r} is not stored; stored are {', '.join(outputs)}"
            )


def store_sections(params: Params, teacher: str) -> dict[str, Any]:
    """The settings that a store was made from, with defaults filled in and without what changes no number.

    The student compares them with today's params.yaml: it can tell a store of other settings without any teacher.
    """
    section = to_json(params.teachers[teacher])
    for free in FREE_OF_TRAINING:
        (section["train"] or {}).pop(free, None)
    targets = to_json(params.targets.get(teacher, TargetsSection()))
    for free in ("batch_size", "temperatures", "threads"):
        targets.pop(free)
    return {"teacher": section, "targets": targets, "task": to_json(params.task)}


def prepared_sections(params: Params) -> dict[str, Any]:
    """The settings that data/prepared is made with."""
    return {"data": to_json(params.data), "task": to_json(params.task)}


def first_difference(then: Any, today: Any, where: str = "") -> str:
    """Where two settings differ, as a sentence; empty when they do not."""
    if then == today:
        return ""
    if isinstance(then, Mapping) and isinstance(today, Mapping):
        key = next(key for key in [*today, *then] if then.get(key) != today.get(key))
        return first_difference(then.get(key), today.get(key), f"{where}.{key}".lstrip("."))
    return f"{where} was {then}, params.yaml says {today}"


def to_json(value: Any) -> Any:
    """A section as JSON values."""
    return json.loads(canonical_json(asdict(value)))
