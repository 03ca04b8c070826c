"""What a loss is, what it may need besides logits and targets, and which rows of it count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses.checking import described
from kdpipe.losses.mixtures import Mix, covered_by_any, mixed
from kdpipe.losses.projectors import Projector
from kdpipe.losses.schedules import CONSTANT, Schedule
from kdpipe.targets import FeatureTargets, Targets


@runtime_checkable
class DistillLoss(Protocol):
    """One distance of a student's logits, or of its features, from targets.

    Attributes that are True say more of it; an absent one is False.
    `linear_in_targets`: an unbiased estimate of p gives an unbiased loss and gradient (at T = 1): sampled targets do.
    `needs_labels`: it is called with `labels` as well, and only labelled rows count.
    `needs_whole_batch`: a row's value depends on the other rows of its batch, which must not be cut.
    `reuses_classifier`: the student predicts by the teacher's own last layer, on the features that the loss compares.
    """

    @property
    def temperature(self) -> float:
        """T."""

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]` for student logits `[B, ..., C]`."""

    def unscaled(self, values: Tensor) -> Tensor:
        """The same values without the loss's own factor (T^2), for logs."""


class LabelledLoss(Protocol):
    """A `DistillLoss` with `needs_labels`."""

    def __call__(self, logits: Tensor, targets: Targets, labels: Tensor | None = None) -> Tensor:
        """The same, with labels `[B, ...]`; one below 0 is none."""


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """`weight`, by `schedule`, times a loss on one output of a teacher, or of several that `mix` mixes.

    It is about the student's logits, or its output `student_output`, through a projector where one is named.
    """

    teacher: str | tuple[str, ...]
    output: str
    loss: DistillLoss
    weight: float
    mix: Mix = "mean"
    schedule: Schedule = CONSTANT
    student_output: str = ""
    projector: Projector | None = None

    @property
    def teachers(self) -> tuple[str, ...]:
        """Whom it listens to."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    def targets(self, said: Mapping[str, Mapping[str, Targets]], labels: Tensor | None) -> Targets:
        """What its loss sees of what teachers said, by teacher and output. Raises `ConfigError`, see `mixed`."""
        parts = [said[teacher][self.output] for teacher in self.teachers]
        return parts[0] if len(parts) == 1 else mixed(parts, self.mix, labels)

    def valid(self, said: Mapping[str, Mapping[str, Targets]], labels: Tensor | None) -> Tensor | None:
        """Which rows count, as `valid_rows` has it, without mixing anything."""
        covered = covered_by_any([said[teacher][self.output] for teacher in self.teachers])
        return _valid(self.loss, covered, labels)


def needs_labels(loss: DistillLoss) -> bool:
    """Whether a loss is to be called with labels."""
    return bool(getattr(loss, "needs_labels", False))


def reuses_classifier(loss: DistillLoss) -> bool:
    """Whether the student predicts by the teacher's own last layer."""
    return bool(getattr(loss, "reuses_classifier", False))


def needs_whole_batch(loss: DistillLoss) -> bool:
    """Whether a row's value depends on the other rows of its batch."""
    return bool(getattr(loss, "needs_whole_batch", False))


def values_of(loss: DistillLoss, logits: Tensor, targets: Targets, labels: Tensor | None) -> Tensor:
    """One value per row `[B, ...]`, of a loss that is given labels `[B, ...]` where it needs them.

    Raises `ConfigError` where the loss gives something else.
    """
    with_labels = {"labels": labels} if needs_labels(loss) else {}
    values = cast("LabelledLoss", loss)(logits, targets, **with_labels)
    of_features = isinstance(targets, FeatureTargets)  # `[B, D]`, `[B, T, D]` or maps `[B, C, H, W]`
    rows = logits.shape[:1] if of_features else logits.shape[:-1]
    if not isinstance(values, Tensor) or not values.is_floating_point():
        expected = "a tensor of floats, one per row"
    elif (values.shape[:1] if of_features else values.shape) != rows:
        expected = f"one number per row, {list(rows)}"
    else:
        return values
    raise ConfigError(f"{type(loss).__name__} gives {described(values)}; expected {expected}")


def valid_rows(loss: DistillLoss, targets: Targets, labels: Tensor | None) -> Tensor | None:
    """Which rows or tokens count, bool `[B, ...]`: those covered and, for a loss that needs it, labelled. None: all."""
    return _valid(loss, targets.covered, labels)


def _valid(loss: DistillLoss, covered: Tensor | None, labels: Tensor | None) -> Tensor | None:
    if not needs_labels(loss) or labels is None:
        return covered
    labelled = labels >= 0
    return labelled if covered is None else covered & labelled
