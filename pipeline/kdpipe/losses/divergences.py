"""Divergences of student and teacher: KL both ways, soft-target cross-entropy, Jensen-Shannon, total variation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses.buckets import log_probs_at
from kdpipe.losses.checking import check_arguments
from kdpipe.losses.distributions import check_shape, log_probs_of_both, softened, student_softened, teacher_log_probs
from kdpipe.targets import SampledTargets, SparseTargets, Targets, widened

_LOWEST = -1e30
"""Stands for the log of 0 where a difference of two of them must be a number."""

_SMALL_REST = 1e-2
"""Of a smaller one `log1p` would lose digits where it is all that is left."""

_LARGEST_EXPONENT = 80.0
"""e to it is a number in float32."""


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """`T^2 KL(p || q)` (Hinton et al. 2015, section 2).

    T^2 keeps the gradient's size when T changes. With `standardise` both logits are first brought to mean 0 and
    deviation 1 (Sun et al. 2024: T = 2, weight 9): scale and shift of the student's logits become free, so that its
    probabilities mean little afterwards; dense targets only. See `forward_kl` for sparse and sampled targets.
    """

    linear_in_targets: ClassVar[bool] = True

    temperature: float = 4.0
    allow_interpolation: bool = False
    standardise: bool = False

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        kl = forward_kl(logits, targets, self.temperature, self.allow_interpolation, self.standardise)
        return self.temperature**2 * kl

    def unscaled(self, values: Tensor) -> Tensor:
        """KL without T^2."""
        return values / self.temperature**2


@dataclass(frozen=True, kw_only=True)
class ReverseKL:
    """`T^2 KL(q || p)`, which seeks the teacher's modes (Gu et al. 2024, MiniLLM, equation 1, per position).

    `standardise` as in `ForwardKL`. See `reverse_kl` for masked classes and sparse targets.
    """

    temperature: float = 1.0
    allow_interpolation: bool = False
    standardise: bool = False

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        kl = reverse_kl(logits, targets, self.temperature, self.allow_interpolation, self.standardise)
        return self.temperature**2 * kl

    def unscaled(self, values: Tensor) -> Tensor:
        """KL without T^2."""
        return values / self.temperature**2


@dataclass(frozen=True, kw_only=True)
class SoftTargetCE:
    """`-T^2 sum p log q`: forward KL plus `T^2` times the teacher's entropy, with the same gradient.

    Hinton et al. 2015, section 2. Not 0 where student and teacher agree. Sparse targets: over K + 1 buckets; sampled
    ones at T = 1. `standardise` as in `ForwardKL`.
    """

    linear_in_targets: ClassVar[bool] = True

    temperature: float = 1.0
    allow_interpolation: bool = False
    standardise: bool = False

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        if isinstance(targets, SampledTargets):
            return _sampled_cross_entropy(logits, targets, self.temperature, self.standardise)
        log_p, log_q = log_probs_of_both(logits, targets, self.temperature, self.allow_interpolation, self.standardise)
        possible = torch.where(torch.isneginf(log_p), 0.0, log_q)
        return -(self.temperature**2) * (log_p.exp() * possible).sum(dim=-1)

    def unscaled(self, values: Tensor) -> Tensor:
        """Cross-entropy without T^2."""
        return values / self.temperature**2


@dataclass(frozen=True, kw_only=True)
class GeneralisedJSD:
    """`beta KL(p || m) + (1 - beta) KL(q || m)`, m = beta p + (1 - beta) q, without T^2 (Agarwal et al. 2023, GKD).

    Bounded by log 2 at beta = 0.5, and symmetric there. It goes to 0 as beta goes to 0 or 1, and its gradient with it;
    those ends are refused. With `normalise` it is divided by beta (1 - beta), and goes to KL(p || q) as beta goes to 0
    and to KL(q || p) as beta goes to 1: its values at these ends (`reverse_kl` leaves out masked classes). Sparse
    targets: over K + 1 buckets. `standardise` as in `ForwardKL`.
    """

    beta: float = 0.5
    temperature: float = 1.0
    normalise: bool = False
    allow_interpolation: bool = False
    standardise: bool = False

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)
        if self.beta > 1:
            raise ConfigError(f"beta is {self.beta}; expected a number from 0 to 1")
        if self.beta in (0, 1) and not self.normalise:
            raise ConfigError(
                f"beta is {self.beta:g}, where the divergence is 0 whatever the student says; set normalise: true, "
                "which gives forward KL at 0 and reverse KL at 1, or a beta between them"
            )

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        if self.beta in (0, 1):
            kl = reverse_kl if self.beta else forward_kl
            return kl(logits, targets, self.temperature, self.allow_interpolation, self.standardise)
        log_p, log_q = log_probs_of_both(logits, targets, self.temperature, self.allow_interpolation, self.standardise)
        weights = (1 / (1 - self.beta), 1 / self.beta) if self.normalise else (self.beta, 1 - self.beta)
        value: Tensor = _MixedEntropy.apply(log_p, log_q, self.beta, *weights)[0]  # type: ignore[no-untyped-call]
        return value

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values


@dataclass(frozen=True, kw_only=True)
class TotalVariation:
    """`1/2 sum |p - q|`, from 0 to 1, without T^2 (Wen et al. 2023, f-Distill).

    The gradient of a class is 0 where p = q. Sparse targets: over K + 1 buckets.
    """

    temperature: float = 1.0
    allow_interpolation: bool = False

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        log_p, log_q = log_probs_of_both(logits, targets, self.temperature, self.allow_interpolation)
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values


@dataclass(frozen=True, kw_only=True)
class TopKRenormKL:
    """`T^2 KL(p || q)` over the kept classes alone, both renormalised there; sparse targets only, at any T.

    What many trainers do with top-k logits. It tells the student nothing of how much mass its other classes should
    have, so it may keep any; `ForwardKL` has a bucket for that.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        if not isinstance(targets, SparseTargets):
            raise ConfigError(
                "TopKRenormKL is about the kept classes of sparse targets, and these are others; use ForwardKL, or "
                "cache with encoding: topk"
            )
        check_shape(logits, (*targets.ids.shape[:-1], targets.num_classes))
        unused = torch.isneginf(targets.head)
        kept = widened(logits.gather(-1, targets.ids)).masked_fill(unused, -torch.inf)
        log_q = torch.log_softmax(softened(kept, self.temperature), dim=-1)
        log_p = torch.log_softmax(targets.head.to(log_q.dtype) / self.temperature, dim=-1)
        return self.temperature**2 * kl_of(log_p, log_q)

    def unscaled(self, values: Tensor) -> Tensor:
        """KL without T^2."""
        return values / self.temperature**2


def forward_kl(
    logits: Tensor,
    targets: Targets,
    temperature: float = 1.0,
    allow_interpolation: bool = False,
    standardise: bool = False,
) -> Tensor:
    """KL(teacher || student) at T, without T^2: student logits `[B, ..., C]` -> `[B, ...]`.

    A class that the teacher masks (-inf) adds nothing. Sparse targets: over K + 1 buckets, the kept classes and all
    others together, a lower bound of the full KL. Sampled targets: an unbiased estimate, so it may be below 0. Raises
    `ConfigError` for other shapes, for sampled targets at another T than 1, for features.
    """
    if isinstance(targets, SampledTargets):
        cross_entropy = _sampled_cross_entropy(logits, targets, temperature, standardise)
        return cross_entropy - targets.entropy.to(cross_entropy.dtype)
    return kl_of(*log_probs_of_both(logits, targets, temperature, allow_interpolation, standardise))


def reverse_kl(
    logits: Tensor,
    targets: Targets,
    temperature: float = 1.0,
    allow_interpolation: bool = False,
    standardise: bool = False,
) -> Tensor:
    """KL(student || teacher) at T, without T^2: student logits `[B, ..., C]` -> `[B, ...]`.

    Where the teacher masks classes (-inf), the student is compared on the others alone, with its probabilities there
    renormalised; all of its mass on a masked class would cost infinitely much. Sparse targets: over K + 1 buckets.
    Raises `ConfigError` for other shapes, for sampled targets, for features.
    """
    log_p = teacher_log_probs(targets, temperature, allow_interpolation, standardise)
    masked = torch.isneginf(log_p)
    z = student_softened(logits, targets, temperature, standardise)
    log_q = torch.log_softmax(z.masked_fill(masked, -torch.inf), dim=-1)
    return kl_of(log_q, log_p.to(log_q.dtype))


def kl_of(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities over the last axis; 0 where p has no class at all.

    A class without p adds nothing, whatever its q. Each sums to 1 over the axis: see `_RelativeEntropy`.
    """
    value: Tensor = _RelativeEntropy.apply(log_p, log_q)[0]  # type: ignore[no-untyped-call]
    return value.masked_fill(torch.isneginf(log_p.amax(dim=-1)), 0.0)


class _RelativeEntropy(torch.autograd.Function):
    """`sum [q - p - p log(q / p)]`: KL(p || q) of p and q that sum to 1, in terms of which none is below 0.

    Those of `sum p log(p / q)` are much larger than their sum where p is near q, as at high temperatures: it is what
    their rounding leaves, and T^2 shows it. `q - p` is made of `expm1`, as exact as `log(q / p)`. The gradient by
    log q is `q - p`, that by log p `p log(p / q)`: those of the sum, up to what a log-softmax takes away.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, ..., C]` twice -> `[B, ...]`, and what the gradients are made of."""
        ratio = (log_q - log_p).nan_to_num_(nan=0.0, posinf=-_LOWEST, neginf=-torch.inf)
        change = ratio.abs().neg_().expm1_().abs_().copysign_(ratio)
        change *= torch.maximum(log_p, log_q).exp_()
        expected = log_p.exp().mul_(ratio)
        return (change - expected).sum(dim=-1), change, expected

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what `backward` needs."""
        log_p, log_q = inputs
        _, change, expected = output
        ctx.mark_non_differentiable(change, expected)
        ctx.save_for_backward(log_p, log_q, change, expected if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, of_value: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gradients by log p and log q; differentiable ones where a second derivative is wanted."""
        log_p, log_q, change, expected = ctx.saved_tensors
        of_value = of_value.unsqueeze(-1)
        if torch.is_grad_enabled():
            change = log_q.exp() - log_p.exp()
            if expected is not None:
                expected = log_p.exp() * torch.where(torch.isneginf(log_p), 0.0, log_q - log_p)
        return None if expected is None else -expected * of_value, change * of_value


class _MixedEntropy(torch.autograd.Function):
    """`sum [v p log(p / m) + w q log(q / m)]`, m = beta p + (1 - beta) q, with weights v to w as beta to 1 - beta.

    Then the gradients by log p and log q are the two terms themselves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_p: Tensor, log_q: Tensor, beta: float, of_p: float, of_q: float) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, ..., C]` twice -> `[B, ...]`, and the two terms."""
        teachers, students = _terms_of_mixture(log_p, log_q, beta, of_p, of_q)
        return (teachers + students).sum(dim=-1), teachers, students

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what `backward` needs."""
        log_p, log_q, *numbers = inputs
        _, teachers, students = output
        ctx.numbers = numbers
        ctx.mark_non_differentiable(teachers, students)
        ctx.save_for_backward(log_p, log_q, teachers if ctx.needs_input_grad[0] else None, students)

    @staticmethod
    def backward(ctx: Any, of_value: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        """Gradients by log p and log q; differentiable ones where a second derivative is wanted."""
        log_p, log_q, teachers, students = ctx.saved_tensors
        of_value = of_value.unsqueeze(-1)
        if torch.is_grad_enabled():
            teachers, students = _terms_of_mixture(log_p, log_q, *ctx.numbers)
        by_p = teachers * of_value if ctx.needs_input_grad[0] else None
        return by_p, students * of_value, None, None, None


def _terms_of_mixture(log_p: Tensor, log_q: Tensor, beta: float, of_p: float, of_q: float) -> tuple[Tensor, Tensor]:
    """`of_p p log(p / m)` and `of_q q log(q / m)`, m = beta p + (1 - beta) q: `[B, ..., C]` each."""
    gap = log_p.clamp(min=_LOWEST) - log_q.clamp(min=_LOWEST)
    teachers = -of_p * log_p.exp() * _log_mixed(1 - beta, beta, -gap)
    return teachers, -of_q * log_q.exp() * _log_mixed(beta, 1 - beta, gap)


def _log_mixed(share: float, rest: float, gap: Tensor) -> Tensor:
    """`log(rest + share e^gap)` for shares of 1: exact to the last digits for a small gap, a small share, a small rest.

    Where e^gap would overflow it is less than that; what it is weighted with is 0 there.
    """
    if rest >= _SMALL_REST:
        return torch.log1p(share * torch.expm1(gap.clamp(max=_LARGEST_EXPONENT)))
    near = torch.log1p(share * torch.expm1(gap.clamp(-1, _LARGEST_EXPONENT)))
    far = torch.logaddexp(gap + math.log(share), gap.new_tensor(math.log(rest)))
    return torch.where(gap < -1, far, near)


def _sampled_cross_entropy(logits: Tensor, targets: SampledTargets, temperature: float, standardise: bool) -> Tensor:
    """`-sum w log q` over the drawn classes `[B, ..., K]`."""
    if temperature != 1:
        raise ConfigError(
            f"temperature is {temperature:g}, but sampled targets are draws at temperature 1 and cannot be softened; "
            "set temperature: 1, or cache with encoding: topk or dense"
        )
    if standardise:
        raise ConfigError(
            "standardise: sampled targets are draws, not logits that could be standardised; cache with encoding: dense "
            "or int8, or leave it out"
        )
    check_shape(logits, (*targets.ids.shape[:-1], targets.num_classes))
    log_q = log_probs_at(logits, targets.ids)
    weights = targets.weights.to(log_q.dtype)
    return -torch.where(weights > 0, weights * log_q, 0.0).sum(dim=-1)
