"""Losses on what teacher and student compute inside: each row for itself.

Features are `[B, D]`, `[B, T, D]` of tokens, or maps `[B, D, H, W]`; a vector is the D numbers of a row, of a token or
of a place in a map. A loss gives one value per row `[B]`, or per token where the targets' `covered` is `[B, T]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses.checking import check_arguments
from kdpipe.losses.distributions import root
from kdpipe.targets import FeatureTargets, Targets, are_of_places, widened


@dataclass(frozen=True, kw_only=True)
class HintMSE:
    """`mean (f_s - f_t)^2` over all numbers of a row (Romero et al. 2015, FitNets: half of their sum).

    Both must have the same shape: a student of another width needs a projector. Their weight is 100 in CRD's benchmark.
    """

    temperature: ClassVar[float] = 1.0

    def __call__(self, features: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B]` (or token) for student features `[B, ...]`."""
        student, teacher, shape = _same_shape(features, targets, type(self).__name__)
        return _by_row((student - teacher).square(), shape).mean(dim=-1)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values


@dataclass(frozen=True, kw_only=True)
class SimKD:
    """`HintMSE` on what goes into the teacher's last layer, which the student then takes over (Chen et al. 2022).

    In `kdpipe train-student` the student predicts by its projected features and the teacher's own last layer, which
    stays as it is (`kdpipe.models.reusing`); in your own loop that is yours to do. The paper has no other loss.
    """

    reuses_classifier: ClassVar[bool] = True
    temperature: ClassVar[float] = 1.0

    def __call__(self, features: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B]` (or token) for student features `[B, ...]`."""
        return HintMSE()(features, targets)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values


@dataclass(frozen=True, kw_only=True)
class CosineFeature:
    """`1 - cos(f_s, f_t)` of each vector, and the mean over a row's: 0 to 2, whatever the lengths of the vectors.

    A vector of zeros has the cosine 0 and the gradient 0. Both must have the same shape, as for `HintMSE`. Sanh et al.
    2019 (DistilBERT) add it to the loss on logits, with weight 1.
    """

    temperature: ClassVar[float] = 1.0

    def __call__(self, features: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B]` (or token) for student features `[B, ...]`."""
        student, teacher, shape = _same_shape(features, targets, type(self).__name__)
        cosine = (unit(vectors(student)) * unit(vectors(teacher))).sum(dim=-1)
        return _by_row(1 - cosine, shape).mean(dim=-1)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer:
    """`||a_s - a_t||`, a the row's map of `sum_D |f|^p` over its places, divided by its length.

    Zagoruyko and Komodakis 2017, equation 2, without their factor beta / 2. `form: code` is what their code computes:
    the mean over places of `(a_s - a_t)^2`. Maps or tokens of any two widths, and of the same places.
    """

    temperature: ClassVar[float] = 1.0

    form: Literal["paper", "code"] = "paper"
    p: float = 2.0

    def __post_init__(self) -> None:
        """Refuse a power without a gradient at 0."""
        check_arguments(self)
        if not self.p >= 1:
            raise ConfigError(f"p is {self.p}; expected a number from 1")

    def __call__(self, features: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B]` for student features `[B, D, H, W]` or `[B, T, D]`."""
        teacher, shape = of_features(targets, type(self).__name__)
        places = [vectors(each).shape[:-1] for each in (features, teacher)]
        if features.ndim < 3 or places[0] != places[1] or len(shape) > 1:
            raise ConfigError(
                f"{found(features, teacher)}{', and tokens count each for itself' if len(shape) > 1 else ''}; expected "
                "[B, D, H, W] or [B, T, D], of any D and the same places, in rows that count as a whole"
            )
        student = self._attention(widened(features))
        squares = (student - self._attention(widened(teacher).to(student.dtype))).square()
        return squares.mean(dim=-1) if self.form == "code" else root(squares.sum(dim=-1))

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values

    def _attention(self, features: Tensor) -> Tensor:
        """`[B, places]`, of length 1."""
        return unit(vectors(features).abs().pow(self.p).sum(dim=-1).flatten(1))


def of_features(targets: Targets, what: str) -> tuple[Tensor, torch.Size]:
    """The teacher's features, and the shape of one value per row `[B]`, or per token `[B, T]` where tokens are covered.

    Raises `ConfigError` saying what needs features.
    """
    if not isinstance(targets, FeatureTargets):
        raise ConfigError(
            f"{what} is a loss on features, and got logits; name a stored feature of the teacher in `output:`, and one "
            "of the student in `student_output:`"
        )
    shape = targets.values.shape[:1] if targets.covered is None else targets.covered.shape
    if not are_of_places(targets.values.shape, shape):
        raise ConfigError(
            f"{what} got features of shape {list(targets.values.shape)}, of which {list(shape)} are covered; expected "
            "a vector per token, as the teacher says for each token whether it counts"
        )
    return targets.values, shape


def _by_row(values: Tensor, shape: torch.Size) -> Tensor:
    """`[*shape, n]`: the numbers of each row (or token) as its last axis, of no row at all too."""
    return values.reshape(*shape, values.shape[len(shape) :].numel())


def found(features: Tensor, teacher: Tensor) -> str:
    """Both shapes, for a message."""
    return f"student features have shape {list(features.shape)}, the teacher's {list(teacher.shape)}"


def vectors(features: Tensor) -> Tensor:
    """With D as the last axis: maps `[B, D, H, W]` become `[B, H, W, D]`."""
    return features.movedim(1, -1) if features.ndim == 4 else features


def unit(values: Tensor) -> Tensor:
    """Divided by their length over the last axis; zeros stay zeros, with the gradient 0."""
    length = root(values.square().sum(dim=-1, keepdim=True))
    return torch.where(length > 0, values / torch.where(length > 0, length, 1.0), 0.0)


def _same_shape(features: Tensor, targets: Targets, what: str) -> tuple[Tensor, Tensor, torch.Size]:
    """Student's and teacher's features in one dtype, and the shape of values. Raises `ConfigError`."""
    teacher, shape = of_features(targets, what)
    if features.shape != teacher.shape:
        raise ConfigError(
            f"{found(features, teacher)}; expected the same. A projector changes the student's width D: `projector: "
            "linear` or `mlp` that of [B, D] and [B, T, D], `projector: conv1x1` that of maps [B, D, H, W]"
        )
    student = widened(features)
    return student, widened(teacher).to(student.dtype), shape
