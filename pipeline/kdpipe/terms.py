"""The summands of a training's loss: the loss on labels, and losses on cached targets.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from kdpipe.batches import Batch
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.inputs import LOGITS
from kdpipe.losses import CONSTANT, LabelLoss, LossTerm, Schedule, values_of
from kdpipe.targets import FeatureTargets


class TrainingTerm(Protocol):
    """One summand of the training loss."""

    @property
    def name(self) -> str:
        """How logs call it."""

    def weight_at(self, step: int, steps: int) -> float:
        """What its mean is multiplied with, in step 0 to `steps - 1`."""

    @property
    def student_output(self) -> str:
        """What it hears of the student: a named output (see `kdpipe.inputs.Outputs`); empty: the logits."""

    @property
    def projector(self) -> nn.Module | None:
        """What that output goes through first; it is trained beside the student."""

    def valid(self, batch: Batch) -> Tensor:
        """Which rows count, bool `[B]`; or which tokens, `[B, T]`."""

    def values(self, heard: Tensor, batch: Batch) -> Tensor:
        """One value per row `[B]` or token `[B, T]`; those that do not count may hold anything finite.

        `heard` is the student's output, in float32 or wider.
        """

    def unscaled(self, values: Tensor) -> Tensor:
        """The values without the term's own factor, for the log."""


@dataclass(frozen=True, kw_only=True)
class LabelTerm:
    """The task's loss on labels, on labelled rows only."""

    student_output: ClassVar[str] = ""
    projector: ClassVar[None] = None

    loss: LabelLoss
    weight: float
    smoothing: float = 0.0
    schedule: Schedule = CONSTANT
    name: str = "label"

    def weight_at(self, step: int, steps: int) -> float:
        """The weight by the schedule."""
        return self.schedule.weight_at(self.weight, step, steps)

    def valid(self, batch: Batch) -> Tensor:
        """Rows that have a label; where rows are mixed, both of them."""
        valid = batch.labels != MISSING_LABEL
        return valid if batch.other_labels is None else valid & (batch.other_labels != MISSING_LABEL)

    def values(self, heard: Tensor, batch: Batch) -> Tensor:
        """The task's label loss, shaped as the labels; where rows are mixed, of both labels in the rows' shares."""
        values = self.loss(heard, batch.labels, self.smoothing)
        if batch.other_labels is None or batch.share is None:
            return values
        return batch.share * values + (1 - batch.share) * self.loss(heard, batch.other_labels, self.smoothing)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values


@dataclass(frozen=True, kw_only=True)
class DistillTerm:
    """A distillation loss on the cached targets of a teacher, or of several, on every row that they speak about.

    A loss that needs labels is left out of rows without one. `projector` is the module of a term that names one.
    """

    term: LossTerm
    projector: nn.Module | None = None

    @property
    def name(self) -> str:
        """Teachers, loss and temperature; of features, what is compared with what."""
        term, loss = self.term, f"{'+'.join(self.term.teachers)}.{type(self.term.loss).__name__}"
        if term.output == LOGITS and not term.student_output:
            return f"{loss} T={term.loss.temperature:g}"
        return f"{loss} {term.student_output or LOGITS} to {term.output}"

    def weight_at(self, step: int, steps: int) -> float:
        """The term's weight by its schedule."""
        return self.term.schedule.weight_at(self.term.weight, step, steps)

    @property
    def student_output(self) -> str:
        """The term's."""
        return self.term.student_output

    def valid(self, batch: Batch) -> Tensor:
        """Rows that a teacher speaks about, and that have a label where the loss needs one."""
        valid = self.term.valid(batch.targets, batch.labels)
        if valid is not None:
            return valid
        # Of features there is a value per token only where the teacher says which tokens count.
        targets = batch.targets[self.term.teachers[0]][self.term.output]
        of = batch.labels[:, 0] if isinstance(targets, FeatureTargets) and batch.labels.ndim > 1 else batch.labels
        return torch.ones_like(of, dtype=torch.bool)

    def values(self, heard: Tensor, batch: Batch) -> Tensor:
        """The loss, one value per row or token."""
        targets = self.term.targets(batch.targets, batch.labels)
        return values_of(self.term.loss, heard, targets, batch.labels)

    def unscaled(self, values: Tensor) -> Tensor:
        """Without T^2."""
        return self.term.loss.unscaled(values)
