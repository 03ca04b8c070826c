"""Losses that take the label's class apart from all others: DKD and NKD. A row without label has value 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdpipe.losses.checking import check_arguments, check_labels
from kdpipe.losses.distributions import check_shape, softened, with_every_class
from kdpipe.losses.divergences import kl_of
from kdpipe.targets import DenseTargets, MixedTargets, Targets, widened


@dataclass(frozen=True, kw_only=True)
class DKD:
    """`T^2 [alpha KL(b_t || b_s) + beta KL(p' || q')]` (Zhao et al. 2022, Decoupled Knowledge Distillation).

    b = (p_y, 1 - p_y) for the label y; p', q' are p, q over the other classes, renormalised. KL(p || q) itself is the
    sum with alpha = 1 and beta = 1 - p_y. With two classes the second term is 0. Their beta is 2 to 8 on CIFAR-100, 0.5
    with T = 1 on ImageNet; they raise the loss's weight over 20 epochs. Dense targets only.
    """

    needs_labels: ClassVar[bool] = True

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)

    def __call__(self, logits: Tensor, targets: Targets, labels: Tensor | None = None) -> Tensor:
        """One value per row `[B, ...]`, 0 where the label `[B, ...]` is below 0."""
        student, teacher, labels = _checked("DKD", logits, targets, labels)
        binary_p, others_p = _split(teacher.softened(self.temperature).to(student.dtype), labels)
        binary_q, others_q = _split(softened(student, self.temperature), labels)
        value = self.alpha * kl_of(binary_p, binary_q) + self.beta * kl_of(others_p, others_q)
        return torch.where(labels >= 0, self.temperature**2 * value, 0.0)

    def unscaled(self, values: Tensor) -> Tensor:
        """Without T^2."""
        return values / self.temperature**2


@dataclass(frozen=True, kw_only=True)
class NKD:
    """`-p_y log q_y` at T = 1, plus `-gamma T^2 sum p' log q'` at T (Yang et al. 2023, NKD).

    y is the label; p', q' are p, q over the other classes, renormalised. A cross-entropy, so not 0 where student and
    teacher agree; the plain cross-entropy on labels is not part of it. Their gamma is 1.5 at T = 1 on ImageNet, 3.5 at
    T = 3 on CIFAR-100. Dense targets only.
    """

    needs_labels: ClassVar[bool] = True

    temperature: float = 1.0
    gamma: float = 1.5

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)

    def __call__(self, logits: Tensor, targets: Targets, labels: Tensor | None = None) -> Tensor:
        """One value per row `[B, ...]`, 0 where the label `[B, ...]` is below 0."""
        student, teacher, labels = _checked("NKD", logits, targets, labels)
        at_1, at_t = (teacher.softened(each).to(student.dtype) for each in (1.0, self.temperature))
        place = labels.clamp(min=0).unsqueeze(-1)
        p_y, log_q_y = (torch.log_softmax(each, dim=-1).gather(-1, place).squeeze(-1) for each in (at_1, student))
        _, others_p = _split(at_t, labels)
        _, others_q = _split(softened(student, self.temperature), labels)
        others = (others_p.exp() * torch.where(torch.isneginf(others_p), 0.0, others_q)).sum(dim=-1)
        of_label = p_y.exp() * torch.where(torch.isneginf(p_y), 0.0, log_q_y)
        value = -of_label - self.gamma * self.temperature**2 * others
        return torch.where(labels >= 0, value, 0.0)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are: only one of the two terms has a factor."""
        return values


def _checked(
    name: str, logits: Tensor, targets: Targets, labels: Tensor | None
) -> tuple[Tensor, DenseTargets | MixedTargets, Tensor]:
    """Student logits `[B, ..., C]`, what the teacher says of every class, and labels `[B, ...]`."""
    teacher = with_every_class(targets, name)
    check_shape(logits, teacher.shape)
    return widened(logits), teacher, check_labels(name, labels, tuple(logits.shape[:-1]), logits.shape[-1])


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the label's class and of all others together, `[B, ..., 2]`; and of each other alone.

    The latter `[B, ..., C]`, renormalised; -inf at the label. `log(1 - p_y)` is a logsumexp over the others: finite
    however close to 1 p_y is.
    """
    place = labels.clamp(min=0).unsqueeze(-1)
    others = logits.scatter(-1, place, -torch.inf)
    # No other class at all, where every one is masked.
    none = torch.isneginf(others).all(dim=-1, keepdim=True)
    others = others.masked_fill(none, 0.0)
    mass = torch.logsumexp(others, dim=-1, keepdim=True).masked_fill(none, -torch.inf)
    log_others = torch.log_softmax(others, dim=-1).masked_fill(none, -torch.inf)
    return torch.log_softmax(torch.cat([logits.gather(-1, place), mass], dim=-1), dim=-1), log_others
