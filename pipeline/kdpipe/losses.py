"""Distances between a student and cached targets. Unreduced first; the mean over valid rows is the caller's.

Shapes: B batch, C classes; `...` stands for further axes (tokens). T is the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.targets import Targets


@runtime_checkable
class DistillLoss(Protocol):
    """One distance of a student's logits from targets."""

    @property
    def temperature(self) -> float:
        """T."""

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]` for student logits `[B, ..., C]`."""

    def unscaled(self, values: Tensor) -> Tensor:
        """The same values without the loss's own factor (T^2), for logs."""


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """`weight` times a loss on one output of one teacher."""

    teacher: str
    output: str
    loss: DistillLoss
    weight: float


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """`T^2 KL(p || q)`, p = softmax(teacher / T), q = softmax(student / T) (Hinton et al. 2015, section 2).

    Sum over classes, in float32 log-space whatever the autocast. T^2 keeps the gradient's size when T changes.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Refuse a temperature that means nothing."""
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; expected a number above 0")

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        return self.temperature**2 * forward_kl(logits, targets, self.temperature)

    def unscaled(self, values: Tensor) -> Tensor:
        """KL without T^2."""
        return values / self.temperature**2


def forward_kl(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at T, without T^2: student logits `[B, ..., C]` -> `[B, ...]`.

    A class that the teacher masks (-inf) adds nothing. Raises `ConfigError` for other shapes.
    """
    if logits.shape != targets.values.shape:
        raise ConfigError(
            f"student logits have shape {list(logits.shape)}, the targets {list(targets.values.shape)}; "
            "expected the same rows and classes"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_q = torch.log_softmax(wide / temperature, dim=-1)
    log_p = targets.log_probs(temperature).to(log_q.dtype)
    difference = torch.where(torch.isneginf(log_p), 0.0, log_p - log_q)
    return (log_p.exp() * difference).sum(dim=-1)


def kd_loss(logits: Tensor, targets: Targets, *, temperature: float = 4.0) -> Tensor:
    """Hinton's distillation loss for your own loop: the mean over rows of `T^2 KL(p || q)`, a scalar.

    Student logits `[B, ..., C]`; targets from `store.targets(sample_ids)`.
    """
    return ForwardKL(temperature=temperature)(logits, targets).mean()
