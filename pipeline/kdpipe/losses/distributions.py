"""What teacher and student say of the classes at a temperature, ready to be compared."""

from __future__ import annotations

import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses.buckets import bucket_log_probs
from kdpipe.targets import DenseTargets, FeatureTargets, MixedTargets, SampledTargets, SparseTargets, Targets, widened

_STANDARD_EPS = 1e-7
_NO_FEATURES = (
    "a loss on logits got features; expected an output of kind logits. Name the teacher's logits in `output:` of the "
    "loss, or use a loss on features"
)


def log_probs_of_both(
    logits: Tensor,
    targets: Targets,
    temperature: float,
    allow_interpolation: bool = False,
    standardise: bool = False,
) -> tuple[Tensor, Tensor]:
    """`log p` of the teacher and `log q` of the student at T: `[B, ..., C]`, over K + 1 buckets for sparse targets.

    A class that the teacher masks is -inf in `log p`. Raises `ConfigError` for other shapes, and for targets that have
    no log-probabilities at T.
    """
    log_p = teacher_log_probs(targets, temperature, allow_interpolation, standardise)
    z = student_softened(logits, targets, temperature, standardise)
    log_q = z if isinstance(targets, SparseTargets) else torch.log_softmax(z, dim=-1)
    return log_p.to(log_q.dtype), log_q


def teacher_log_probs(
    targets: Targets, temperature: float, allow_interpolation: bool = False, standardise: bool = False
) -> Tensor:
    """`log p [B, ..., C]`, or `[B, ..., K + 1]`. Raises `ConfigError` for targets that have none."""
    if isinstance(targets, FeatureTargets):
        raise ConfigError(_NO_FEATURES)
    if standardise:
        standard = standardised(only_dense(targets, "standardised logits").softened(1.0))
        return torch.log_softmax(standard / temperature, dim=-1)
    return targets.log_probs(temperature, allow_interpolation)


def student_softened(logits: Tensor, targets: Targets, temperature: float, standardise: bool = False) -> Tensor:
    """`z / T [B, ..., C]` of the student, up to a constant per row; of sparse targets, K + 1 buckets' log-probs."""
    if isinstance(targets, SparseTargets):
        check_shape(logits, (*targets.ids.shape[:-1], targets.num_classes))
        return bucket_log_probs(logits, targets.ids, ~torch.isneginf(targets.head), temperature)
    if isinstance(targets, DenseTargets | MixedTargets):
        check_shape(logits, targets.shape)
    wide = widened(logits)
    return standardised(wide) / temperature if standardise else softened(wide, temperature)


def softened(logits: Tensor, temperature: float) -> Tensor:
    """`(z - max) / T [B, ..., C]`: large logits keep their digits, which a division of their own would round."""
    if temperature == 1:
        return logits
    largest = logits.detach().amax(dim=-1, keepdim=True)
    return (logits - largest.masked_fill(torch.isneginf(largest), 0.0)) / temperature


def standardised(logits: Tensor) -> Tensor:
    """`(z - mean) / (1e-7 + std)` over the classes of each row, with the unbiased std (C - 1): `[B, ..., C]`.

    Sun et al. 2024, Logit Standardization in Knowledge Distillation, as their code has it. Of the classes that are not
    -inf; those stay so. A row of equal logits has the gradient `1 / eps`, as the formula says.
    """
    kept = ~torch.isneginf(logits)
    count = kept.sum(dim=-1, keepdim=True)
    mean = torch.where(kept, logits, 0.0).sum(dim=-1, keepdim=True) / count
    centred = torch.where(kept, logits - mean, 0.0)
    variance = centred.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    return torch.where(kept, centred / (_STANDARD_EPS + root(variance)), logits)


def root(squares: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def only_dense(targets: Targets, what: str) -> DenseTargets:
    """The targets, if they are one teacher's logits of every class. Raises `ConfigError` saying what needs that."""
    every_class = with_every_class(targets, what)
    if isinstance(every_class, MixedTargets):
        raise ConfigError(
            f"{what}: a mixture of teachers has probabilities and no logits; give each teacher a loss of its own, or "
            "use a loss on probabilities"
        )
    return every_class


def with_every_class(targets: Targets, what: str) -> DenseTargets | MixedTargets:
    """The targets, if they tell the probability of every class. Raises `ConfigError` saying what needs that."""
    if isinstance(targets, FeatureTargets):
        raise ConfigError(_NO_FEATURES)
    if not isinstance(targets, DenseTargets | MixedTargets):
        kind = "draws" if isinstance(targets, SampledTargets) else "the top k classes and their tail"
        raise ConfigError(
            f"{what}: these targets hold {kind}, and every class is needed; cache with encoding: dense or int8"
        )
    return targets


def check_shape(logits: Tensor, expected: tuple[int, ...]) -> None:
    """Raise `ConfigError` unless the student's logits are shaped as the targets."""
    if tuple(logits.shape) != expected:
        raise ConfigError(
            f"student logits have shape {list(logits.shape)}, the targets {list(expected)}; "
            "expected the same rows and classes"
        )
