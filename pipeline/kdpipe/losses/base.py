"""What a loss is, what it may need besides logits and targets, and which rows of it count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from torch import Tensor

from kdpipe.targets import Targets


@runtime_checkable
class DistillLoss(Protocol):
    """One distance of a student's logits from targets.

    Attributes that are True say more of it; an absent one is False.
    `linear_in_targets`: an unbiased estimate of p gives an unbiased loss and gradient (at T = 1): sampled targets do.
    `needs_labels`: it is called with `labels` as well, and only labelled rows count.
    `needs_whole_batch`: a row's value depends on the other rows of its batch, which must not be cut.
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
    """`weight` times a loss on one output of one teacher."""

    teacher: str
    output: str
    loss: DistillLoss
    weight: float


def needs_labels(loss: DistillLoss) -> bool:
    """Whether a loss is to be called with labels."""
    return bool(getattr(loss, "needs_labels", False))


def needs_whole_batch(loss: DistillLoss) -> bool:
    """Whether a row's value depends on the other rows of its batch."""
    return bool(getattr(loss, "needs_whole_batch", False))


def values_of(loss: DistillLoss, logits: Tensor, targets: Targets, labels: Tensor | None) -> Tensor:
    """One value per row `[B, ...]`, of a loss that is given labels `[B, ...]` where it needs them."""
    if needs_labels(loss):
        return cast("LabelledLoss", loss)(logits, targets, labels=labels)
    return loss(logits, targets)


def valid_rows(loss: DistillLoss, targets: Targets, labels: Tensor | None) -> Tensor | None:
    """Which rows or tokens count, bool `[B, ...]`: those covered and, for a loss that needs it, labelled. None: all."""
    if not needs_labels(loss) or labels is None:
        return targets.covered
    labelled = labels >= 0
    return labelled if targets.covered is None else targets.covered & labelled
