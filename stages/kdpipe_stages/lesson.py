"""What the student learns from: its rows, the labels that it may know, stores that fit. No teacher is needed."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.config import Factory
from kdpipe.data.prepared import MISSING_LABEL, PreparedData
from kdpipe.distributed import world_size
from kdpipe.encodings import TargetEncoding
from kdpipe.errors import ConfigError, StaleStoreError, StoreNotFoundError
from kdpipe.fingerprint import digest, digest_file, uniform_by_id
from kdpipe.losses import DistillLoss, LossTerm, needs_labels, needs_whole_batch, values_of
from kdpipe.store import TargetStore
from kdpipe.targets import OutputSpec, SampledTargets
from kdpipe.tasks.base import Task
from kdpipe_stages.building import ModelSpec, label_loss, plan_json
from kdpipe_stages.params import (
    LOSS_KEYS,
    LossSection,
    StudentSection,
    TrainSection,
    first_difference,
    store_sections,
    to_json,
)
from kdpipe_stages.project import Project

STUDENT = "student"
ARMS = {STUDENT: "student", "labels_only": "baseline", "label_smoothing": "baseline_label_smoothing"}
"""Arm of `train-student` -> its key in metrics.json and timings.json."""


class Lesson:
    """Rows, known labels, stores and loss terms of `student`, checked against each other."""

    def __init__(self, project: Project) -> None:
        """Raises `ConfigError`, `DataError`, `StoreNotFoundError`, `StaleStoreError`."""
        self.section: StudentSection = project.params.student
        self.task: Task = project.task()
        self.data: PreparedData = project.prepared_data()
        self.rows = self.data.rows_of(self.section.distil_on)
        self.labels = known_labels(self.data, self.rows, self.section)
        self.spec = ModelSpec(
            where="student",
            model=self.section.model,
            preprocess=self.section.preprocess,
            logits=self.section.logits,
        )
        self.terms = [loss_term(project, index, each) for index, each in enumerate(self.section.losses)]
        self.stores = {name: open_checked_store(project, name) for name in teachers_of(self.section)}
        for index, term in enumerate(self.terms):
            store = self.stores[term.teacher]
            output = store.outputs[term.output]
            check_term(f"student.losses.{index}", term, store.encodings[term.output], output, store.outputs["logits"])
            check_batches(f"student.losses.{index}", term, self.section.train)
        self._project = project
        self._check_labels()
        self.label_loss = label_loss(self.task, self.section.train, self.labels[self.rows], "student.train")

    @property
    def labelled(self) -> NDArray[np.int64]:
        """Rows whose label the student may know."""
        known: NDArray[np.int64] = self.rows[self.labels[self.rows] != MISSING_LABEL]
        return known

    def outputs_of(self, teacher: str) -> list[str]:
        """Outputs of a teacher that a loss listens to."""
        return list(dict.fromkeys(term.output for term in self.terms if term.teacher == teacher))

    @cached_property
    def fingerprint(self) -> str:
        """Whatever changes a student's weights, but arm, seed and the number of ranks."""
        section = to_json(self.section)
        for free in ("seeds", "baselines"):
            section.pop(free)
        sources = self.spec.sources(self._project) | self._project.sources(self._project.params.task, "task")
        views = self._project.params.views
        if views.count and views.transform:
            sources |= self._project.sources(views.transform, "views.transform")
        for each in self.section.losses:
            sources |= self._project.sources(Factory(path=each.factory), "student.losses")
        ids = self.data.inputs.sample_ids[self.rows].tolist()
        content = self.data.inputs.digests[self.rows].tobytes().hex()
        return digest(
            {
                "kind": "student",
                "section": {**section, "train": plan_json(self.section.train)},
                "sources": sources,
                "task": self._project.params.task.to_json(),
                "views": to_json(views) if views.count else None,
                "stores": {name: store.state_digest() for name, store in self.stores.items()},
                "init_from": None if self.section.init_from is None else self._digest_of(self.section.init_from),
                "rows": digest([self.rows.tolist(), ids, content, self.labels[self.rows].tolist()]),
            }
        )

    def _digest_of(self, weights: str) -> str:
        path = self._project.root / weights
        if not path.is_file():
            raise ConfigError(f"student.init_from: there is no file {path}")
        return digest_file(path)

    def _check_labels(self) -> None:
        if len(self.labelled):
            return
        if self.section.label_weight > 0:
            raise ConfigError("student.label_weight is above 0 but no row has a label that it may know; set it to 0")
        for index, term in enumerate(self.terms):
            if needs_labels(term.loss):
                raise ConfigError(
                    f"student.losses.{index}: {type(term.loss).__name__} learns from labelled rows only, and the "
                    "student may know no label; use kdpipe.losses:ForwardKL"
                )
        if self.section.baselines:
            raise ConfigError("student.baselines learn from labels, and there are none; set baselines: []")


def teachers_of(section: StudentSection) -> list[str]:
    """Names of the teachers that the losses listen to, in their order."""
    return list(dict.fromkeys(each.teacher for each in section.losses))


def loss_term(project: Project, index: int, section: LossSection) -> LossTerm:
    """One entry of student.losses. Raises `ConfigError` when its factory makes no `DistillLoss`."""
    where = f"student.losses.{index}"
    bound = project.bind(Factory(path=section.factory, arguments=section.arguments), where, LOSS_KEYS)
    try:
        loss = bound.make()
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
    if not isinstance(loss, DistillLoss):
        raise ConfigError(f"{where}: {section.factory} is no DistillLoss (see kdpipe.losses.DistillLoss)")
    return LossTerm(teacher=section.teacher, output=section.output, loss=loss, weight=section.weight)


def check_term(where: str, term: LossTerm, encoding: TargetEncoding, output: OutputSpec, logits: OutputSpec) -> None:
    """Try a loss on one made-up row of such targets and of student logits shaped as the teacher's.

    Raises `ConfigError` when they do not fit each other.
    """
    stored = encoding.encode(torch.zeros(1, *output.shape), np.zeros(1, np.uint64))
    targets = encoding.decode(stored, output)
    try:
        if isinstance(targets, SampledTargets) and not getattr(term.loss, "linear_in_targets", False):
            raise ConfigError(
                f"{type(term.loss).__name__} is not linear in the teacher's probabilities, so sampled targets would "
                "bias it; use forward KL, or cache with encoding: topk or dense"
            )
        student = torch.zeros(1, *logits.shape)
        values_of(term.loss, student, targets, torch.zeros(student.shape[:-1], dtype=torch.int64))
    except ConfigError as error:
        raise ConfigError(f"{where}: on {output.name} of {term.teacher}: {error}") from error


def check_batches(where: str, term: LossTerm, train: TrainSection) -> None:
    """Raise `ConfigError` where a loss on whole batches would see parts of them."""
    if not needs_whole_batch(term.loss):
        return
    what = f"{where}: {type(term.loss).__name__} relates the rows of a batch to each other"
    if train.micro_batch_size is not None and train.micro_batch_size < train.batch_size:
        raise ConfigError(
            f"{what}, but student.train.micro_batch_size: {train.micro_batch_size} cuts batches of {train.batch_size} "
            "up; leave it out, or set a smaller batch_size"
        )
    if world_size() > 1:
        raise ConfigError(f"{what}, but each of {world_size()} ranks has a share of it; train in one process")


def known_labels(data: PreparedData, rows: NDArray[np.int64], section: StudentSection) -> NDArray[np.int64]:
    """Labels by row number, -1 where the student must not know them.

    `labelled_rows: n` keeps the first n labelled rows by hash of (labelled_seed, sample id): stable under growth.
    """
    labelled = rows[data.labels[rows] != MISSING_LABEL]
    wanted = len(labelled)
    if section.labelled_rows is not None:
        wanted = section.labelled_rows
    elif section.labelled_fraction is not None:
        wanted = round(section.labelled_fraction * len(labelled))
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
    """A published store, if it was made from today's settings, and from the weights or table that params.yaml names.

    No teacher is needed to tell: weights or a table that are absent are not missed.

    Raises `StoreNotFoundError`, `IncompleteStoreError` or `StaleStoreError` naming the command to run.
    """
    command = f"kdpipe cache-teacher {name}"
    try:
        store = TargetStore.open(project.store(name))
    except StoreNotFoundError:
        raise StoreNotFoundError(f"there is no target store at {project.store(name)}. Run `{command}`.") from None
    if not store.manifest.sections:
        raise StaleStoreError(
            f"{store.path} is a store of a table alone, which tells nothing of this project's rows. Name the table as "
            f"teachers.{name}.table, remove the store and run `{command}`."
        )
    difference = first_difference(store.manifest.sections, store_sections(project.params, name))
    if difference:
        raise StaleStoreError(
            f"{store.path} was made from other settings: {difference}. Restore them, or run "
            f"`kdpipe train-teacher {name}` and `{command}`."
        )
    _check_made_from(store, project, name, command)
    _check_transform(store, project, command)
    return store


def _check_transform(store: TargetStore, project: Project, command: str) -> None:
    """That the code which made the teacher's views is the code that makes the student's."""
    views = project.params.views
    if not views.count or views.transform is None:
        return
    then = store.manifest.ingredients["views"]["sources"]
    now = project.sources(views.transform, "views.transform")
    changed = sorted(each for each in {*then, *now} if then.get(each) != now.get(each))
    if changed:
        raise StaleStoreError(
            f"{store.path} holds views of another views.transform: {changed[0]} was "
            f"{then.get(changed[0], 'not used')}, it is {now.get(changed[0], 'not used')}. Restore it, or run "
            f"`{command}`."
        )


def _check_made_from(store: TargetStore, project: Project, name: str, command: str) -> None:
    section = project.teacher(name)
    for kind, given in (("weights", section.weights), ("table", section.table)):
        path = project.root / (given or "")
        if given and path.is_file() and digest_file(path) != store.manifest.ingredients["teacher"].get(kind):
            raise StaleStoreError(
                f"{store.path} was made from another file than {path}, teachers.{name}.{kind} of today. Put the "
                f"earlier one back, or run `{command}`."
            )
