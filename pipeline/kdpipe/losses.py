"""Distances between a student and cached targets. Unreduced first; the mean over valid rows is the caller's.

Shapes: B batch, C classes, K kept classes; `...` stands for further axes (tokens). T is the temperature.

A row whose targets are not `covered` gets some finite number, which means nothing; `kd_loss` leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdpipe.errors import ConfigError
from kdpipe.targets import DenseTargets, FeatureTargets, SampledTargets, SparseTargets, Targets, check_temperature


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

    Sum over classes, in float32 log-space whatever the autocast. T^2 keeps the gradient's size when T changes. See
    `forward_kl` for sparse and sampled targets.
    """

    linear_in_targets: ClassVar[bool] = True
    """Whether an unbiased estimate of p gives an unbiased loss and gradient (at T = 1)."""

    temperature: float = 4.0
    allow_interpolation: bool = False

    def __post_init__(self) -> None:
        """Refuse a temperature that means nothing."""
        check_temperature(self.temperature)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        return self.temperature**2 * forward_kl(logits, targets, self.temperature, self.allow_interpolation)

    def unscaled(self, values: Tensor) -> Tensor:
        """KL without T^2."""
        return values / self.temperature**2


@dataclass(frozen=True, kw_only=True)
class ReverseKL:
    """`T^2 KL(q || p)`, which seeks the teacher's modes (Gu et al. 2024, MiniLLM, equation 1, per position).

    In float32 log-space whatever the autocast. See `reverse_kl` for masked classes and sparse targets.
    """

    linear_in_targets: ClassVar[bool] = False

    temperature: float = 1.0
    allow_interpolation: bool = False

    def __post_init__(self) -> None:
        """Refuse a temperature that means nothing."""
        check_temperature(self.temperature)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        return self.temperature**2 * reverse_kl(logits, targets, self.temperature, self.allow_interpolation)

    def unscaled(self, values: Tensor) -> Tensor:
        """KL without T^2."""
        return values / self.temperature**2


def forward_kl(logits: Tensor, targets: Targets, temperature: float = 1.0, allow_interpolation: bool = False) -> Tensor:
    """KL(teacher || student) at T, without T^2: student logits `[B, ..., C]` -> `[B, ...]`.

    A class that the teacher masks (-inf) adds nothing. Sparse targets: over K + 1 buckets, the kept classes and all
    others together, a lower bound of the full KL. Sampled targets: an unbiased estimate, so it may be below 0. Raises
    `ConfigError` for other shapes, for sampled targets at another T than 1, for features.
    """
    if isinstance(targets, SampledTargets):
        return _sampled_kl(logits, targets, temperature)
    log_p = _teacher_log_probs(targets, temperature, allow_interpolation)
    softened = _student_softened(logits, targets, temperature)
    log_q = softened if isinstance(targets, SparseTargets) else torch.log_softmax(softened, dim=-1)
    log_p = log_p.to(log_q.dtype)
    difference = torch.where(torch.isneginf(log_p), 0.0, log_p - log_q)
    return (log_p.exp() * difference).sum(dim=-1)


def reverse_kl(logits: Tensor, targets: Targets, temperature: float = 1.0, allow_interpolation: bool = False) -> Tensor:
    """KL(student || teacher) at T, without T^2: student logits `[B, ..., C]` -> `[B, ...]`.

    Where the teacher masks classes (-inf), the student is compared on the others alone, with its probabilities there
    renormalised; all of its mass on a masked class would cost infinitely much. Sparse targets: over K + 1 buckets.
    Raises `ConfigError` for other shapes, for sampled targets, for features.
    """
    log_p = _teacher_log_probs(targets, temperature, allow_interpolation)
    masked = torch.isneginf(log_p)
    softened = _student_softened(logits, targets, temperature)
    log_q = torch.log_softmax(softened.masked_fill(masked, -torch.inf), dim=-1)
    difference = torch.where(masked | torch.isneginf(log_q), 0.0, log_q - log_p.to(log_q.dtype))
    return (log_q.exp() * difference).sum(dim=-1)


def kd_loss(
    logits: Tensor,
    targets: Targets,
    *,
    temperature: float = 4.0,
    loss: str = "forward_kl",
    allow_interpolation: bool = False,
) -> Tensor:
    """Distillation loss for your own loop: the mean over covered rows (or tokens) of `T^2 KL`, a scalar; 0 if none is.

    Student logits `[B, ..., C]`; targets from `store.targets(sample_ids)`; `loss` is "forward_kl" (Hinton's) or
    "reverse_kl"; `allow_interpolation` between the temperatures of sparse targets, see `SparseTargets.tail_bounds`.
    """
    if loss not in _LOSSES:
        raise ConfigError(f"loss {loss!r} is unknown; the choices are {', '.join(_LOSSES)}")
    values = _LOSSES[loss](temperature=temperature, allow_interpolation=allow_interpolation)(logits, targets)
    if targets.covered is None:
        return values.sum() / max(1, values.numel())
    return torch.where(targets.covered, values, 0.0).sum() / targets.covered.sum().clamp(min=1)


_LOSSES: Mapping[str, type[ForwardKL] | type[ReverseKL]] = {"forward_kl": ForwardKL, "reverse_kl": ReverseKL}


def _student_softened(logits: Tensor, targets: Targets, temperature: float) -> Tensor:
    """`z / T [B, ..., C]` of the student, or log-probabilities of K + 1 buckets where the targets are sparse."""
    wide = _widened(logits)
    if isinstance(targets, SparseTargets):
        _check_shape(logits, (*targets.ids.shape[:-1], targets.num_classes))
        return bucket_log_probs(wide, targets.ids, ~torch.isneginf(targets.head), temperature)
    if isinstance(targets, DenseTargets):
        _check_shape(logits, tuple(targets.values.shape))
    return wide / temperature


def _teacher_log_probs(targets: Targets, temperature: float, allow_interpolation: bool) -> Tensor:
    if isinstance(targets, FeatureTargets):
        raise ConfigError(
            "a loss on logits got features; expected an output of kind logits. Name the teacher's logits in `output:` "
            "of the loss, or use a loss on features"
        )
    return targets.log_probs(temperature, allow_interpolation)


def _sampled_kl(logits: Tensor, targets: SampledTargets, temperature: float) -> Tensor:
    """`-sum w log q - entropy` over the drawn classes `[B, ..., K]`."""
    if temperature != 1:
        raise ConfigError(
            f"temperature is {temperature:g}, but sampled targets are draws at temperature 1 and cannot be softened; "
            "set temperature: 1, or cache with encoding: topk or dense"
        )
    _check_shape(logits, (*targets.ids.shape[:-1], targets.num_classes))
    log_q = torch.log_softmax(_widened(logits), dim=-1).gather(-1, targets.ids)
    weights = targets.weights.to(log_q.dtype)
    return -torch.where(weights > 0, weights * log_q, 0.0).sum(dim=-1) - targets.entropy.to(log_q.dtype)


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_shape(logits: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(logits.shape) != expected:
        raise ConfigError(
            f"student logits have shape {list(logits.shape)}, the targets {list(expected)}; "
            "expected the same rows and classes"
        )


def bucket_log_probs(logits: Tensor, ids: Tensor, used: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at T of the classes `ids [B, ..., K]` where `used`, then of all others together.

    Logits `[B, ..., C]` -> `[B, ..., K + 1]`; an unused place is -inf, and so is the last where no class is left.
    Used ids are unique. Keeps one buffer of C numbers per row, and makes one more in backward: the gradient.
    """
    # An unused place may hold any id; here it holds a used one, so that it takes no class out of the rest.
    first_used = used.to(torch.uint8).argmax(dim=-1, keepdim=True)
    ids = torch.where(used, ids, ids.gather(-1, first_used))
    buckets: Tensor = _Buckets.apply(logits, ids, used, temperature)  # type: ignore[no-untyped-call]
    return buckets


class _Buckets(torch.autograd.Function):
    """The rest is a logsumexp over the complement, never log(1 - Q): finite however small or large Q is."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, used: Tensor, temperature: float) -> Tensor:
        rest = logits.scatter(-1, ids, -torch.inf)
        largest = rest.amax(dim=-1, keepdim=True)
        largest = torch.where(torch.isneginf(largest), 0.0, largest)
        rest = rest.sub_(largest).div_(temperature).exp_()
        mass = rest.sum(dim=-1, keepdim=True)
        head = (logits.gather(-1, ids) / temperature).masked_fill(~used, -torch.inf)
        log_q = torch.log_softmax(torch.cat([head, mass.log() + largest / temperature], dim=-1), dim=-1)
        ctx.temperature = temperature
        ctx.save_for_backward(rest, mass, log_q, ids)
        return log_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Times 1 / T: `g_j - q_j sum(g)` at a kept class, `(g_tail / (1 - Q) - sum(g)) q_j` at any other."""
        rest, mass, log_q, ids = ctx.saved_tensors
        gradient = gradient.masked_fill(torch.isneginf(log_q), 0.0)
        of_bucket = gradient - log_q.exp() * gradient.sum(dim=-1, keepdim=True)
        result = rest * torch.where(mass > 0, of_bucket[..., -1:] / mass, 0.0)
        result.scatter_add_(-1, ids, of_bucket[..., :-1])
        return result.div_(ctx.temperature), None, None, None
