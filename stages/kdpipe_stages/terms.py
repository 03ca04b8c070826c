"""The entries of `student.losses` as loss terms, and whether each fits what it will be computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.config import Factory
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.distributed import world_size
from kdpipe.encodings import TargetEncoding
from kdpipe.errors import ConfigError
from kdpipe.losses import (
    DistillLoss,
    LossTerm,
    Mix,
    make_projector,
    needs_labels,
    needs_whole_batch,
    reuses_classifier,
    values_of,
)
from kdpipe.targets import OutputSpec, SampledTargets, Targets, check_temperature
from kdpipe.views import ViewSpec
from kdpipe_stages.params import LOSS_KEYS, LossSection, StudentSection, TrainSection, schedule_of
from kdpipe_stages.project import Project

Shape: TypeAlias = tuple[int, ...]
"""Of one row."""


def loss_term(
    project: Project, index: int, section: LossSection, class_counts: Sequence[int] | None = None
) -> LossTerm:
    """One entry of student.losses. Raises `ConfigError` when its factory makes no `DistillLoss`.

    `class_counts`, how many rows of each class have a label that the student knows, are offered to it; as long as
    labels are not known, equal ones are.
    """
    where = f"student.losses.{index}"
    offered = {"class_counts": class_counts or [1] * project.task().num_classes}
    bound = project.bind(Factory(path=section.factory, arguments=section.arguments), where, LOSS_KEYS, **offered)
    try:
        loss = bound.make()
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
    if not isinstance(loss, DistillLoss):
        raise ConfigError(f"{where}: {section.factory} is no DistillLoss (see kdpipe.losses.DistillLoss)")
    return LossTerm(
        teacher=section.teacher,
        output=section.output,
        loss=loss,
        weight=section.weight,
        mix=_mix_of(section),
        schedule=schedule_of(section.schedule, f"{where}.schedule"),
        student_output=section.student_output,
        projector=section.projector,
    )


def terms_of(project: Project, labels: NDArray[np.int64]) -> list[LossTerm]:
    """All entries of student.losses, where the student knows these labels (-1: not)."""
    counts = np.bincount(labels[labels != MISSING_LABEL], minlength=project.task().num_classes).tolist()
    return [loss_term(project, index, each, counts) for index, each in enumerate(project.params.student.losses)]


def check_known_labels(section: StudentSection, terms: Sequence[LossTerm], num_labelled: int) -> None:
    """Raise `ConfigError` where something learns from labels and the student may know none."""
    if num_labelled:
        return
    if section.learns_labels:
        raise ConfigError("student.label_weight is above 0 but no row has a label that it may know; set it to 0")
    for index, term in enumerate(terms):
        if term.mix == "confidence":
            raise ConfigError(
                f"student.losses.{index}.mix: confidence is in a row's label, and the student may know none; use "
                "mean, or a weight for each teacher"
            )
        if needs_labels(term.loss):
            raise ConfigError(
                f"student.losses.{index}: {type(term.loss).__name__} learns from labelled rows only, and the "
                "student may know no label; use kdpipe.losses:ForwardKL"
            )
    if section.baselines:
        raise ConfigError("student.baselines learn from labels, and there are none; set baselines: []")


def _mix_of(section: LossSection) -> Mix:
    """As the library takes it: weights in the order of the teachers."""
    if isinstance(section.mix, dict):
        return tuple(section.mix[name] for name in section.teachers)
    return section.mix or "mean"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How a teacher's output is stored; `covered` is the shape of coverage per row, where the teacher may abstain."""

    encoding: TargetEncoding
    output: OutputSpec
    covered: Shape | None = None

    def made_up(self) -> Targets:
        """Targets of one row."""
        arrays = self.encoding.encode(torch.zeros(1, *self.output.shape), np.zeros(1, np.uint64))
        targets = self.encoding.decode(arrays, self.output)
        covered = None if self.covered is None else torch.ones(1, *self.covered, dtype=torch.bool)
        return replace(targets, covered=covered)


def check_term(where: str, term: LossTerm, stored: Mapping[str, Stored], heard: Shape) -> None:
    """Try a loss on one made-up row of what its teachers say and of what it hears of the student, `[*heard]`.

    `stored` is by teacher. Raises `ConfigError` when they do not fit each other.
    """
    name = type(term.loss).__name__
    labels_shape = (1, *stored[term.teachers[0]].output.shape[:-1])
    try:
        said = {teacher: {term.output: each.made_up()} for teacher, each in stored.items()}
        targets = term.targets(said, torch.zeros(labels_shape, dtype=torch.int64))
        if isinstance(targets, SampledTargets) and not getattr(term.loss, "linear_in_targets", False):
            raise ConfigError(
                f"{name} is not linear in the teacher's probabilities, so sampled targets would "
                "bias it; use forward KL, or cache with encoding: topk or dense"
            )
        student = torch.zeros(1, *heard, requires_grad=True)
        if term.projector is not None:
            wanted = stored[term.teachers[0]].output.shape
            student = make_projector(term.projector, heard, wanted, seed=0)(student)
        with torch.enable_grad():
            values = values_of(term.loss, student, targets, torch.zeros(student.shape[:-1], dtype=torch.int64))
        if not values.requires_grad:
            raise ConfigError(f"{name} has no gradient in the student's numbers, so it teaches nothing")
        if not torch.isfinite(values).all():
            raise ConfigError(f"{name} gives {values.tolist()} for a made-up row; expected finite numbers")
        unscaled: object = term.loss.unscaled(values.detach())
        if not isinstance(unscaled, torch.Tensor) or unscaled.shape != values.shape:
            raise ConfigError(
                f"{name}.unscaled gives no tensor of shape {list(values.shape)}; expected the values without T^2"
            )
        check_temperature(term.loss.temperature)
    except ConfigError as error:
        raise ConfigError(f"{where}: on {term.output} of {', '.join(term.teachers)}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{where}: {name} fails on one made-up row of {term.output} of {', '.join(term.teachers)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_mixing(where: str, term: LossTerm, views: ViewSpec) -> None:
    """Raise `ConfigError` where a loss needs the one label that a row made of two does not have."""
    if not (views.count and views.mixes):
        return
    if needs_labels(term.loss):
        raise ConfigError(
            f"{where}: {type(term.loss).__name__} needs a row's label, and views.transform mixes rows, which then have "
            "two; use kdpipe.losses:ForwardKL, or another transform"
        )
    if term.mix == "confidence":
        raise ConfigError(
            f"{where}.mix: confidence is in a row's label, and views.transform mixes rows, which then have two; use "
            "mean, or a weight for each teacher"
        )


def no_classifier(index: int, term: LossTerm, teacher: str) -> str:
    """What to do about a store that does not keep what a loss reuses."""
    return (
        f"student.losses.{index}: {type(term.loss).__name__} takes over the last layer of {teacher}, which its store "
        f"does not keep; name it as targets.{teacher}.classifier, the path of an nn.Linear, and run "
        f"`kdpipe cache-teacher {teacher}`"
    )


def check_logits_learn(terms: Sequence[LossTerm], section: StudentSection) -> None:
    """Raise `ConfigError` where nothing trains the student's logits, or where a loss cannot replace what gives them."""
    reusing = [(index, term) for index, term in enumerate(terms) if reuses_classifier(term.loss)]
    for index, term in reusing:
        what = f"student.losses.{index}: {type(term.loss).__name__} replaces the student's last layer"
        if len(reusing) > 1:
            raise ConfigError(f"{what}, and so does another loss; leave one")
        if not term.student_output:
            raise ConfigError(f"{what}; name what goes into that layer as student_output")
        if world_size() > 1:
            raise ConfigError(
                f"{what}, which then gets no gradient on any of {world_size()} ranks; train in one process"
            )
    if not reusing and not section.learns_labels and all(term.student_output for term in terms):
        raise ConfigError(
            "student.losses: each is about a student_output and label_weight is 0, so that nothing trains the logits "
            "of the student; add a loss on them, or set label_weight above 0"
        )


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
