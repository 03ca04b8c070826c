"""Losses on how the rows of a batch relate to each other in features of any two widths: SP and RKD.

A row's features are taken as one vector, whatever their shape; tokens are rows where the targets' `covered` is
`[B, T]`. Shapes: N rows, D numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kdpipe.errors import ConfigError
from kdpipe.losses.checking import check_arguments
from kdpipe.losses.features import found, of_features, unit
from kdpipe.targets import Targets, widened

_SMALLEST_DISTANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class SimilarityPreserving:
    """`||G_s - G_t||_F^2 / B^2`, G the rows' products `F F^T`, each of its rows divided by its length.

    Tung and Mori 2019, Similarity-Preserving Knowledge Distillation; their weight is 3000. A row's value is the mean of
    its own B squared differences.
    """

    needs_whole_batch: ClassVar[bool] = True
    temperature: ClassVar[float] = 1.0

    def __call__(self, features: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B]` (or token) for student features `[B, ...]`; not covered rows are left out."""
        student, teacher, used, shape = _rows_of_both(features, targets, type(self).__name__)
        with _without_autocast(features):
            both = [unit((each @ each.T).masked_fill(~used, 0.0)) for each in (student, teacher)]
        return _mean_over((both[0] - both[1]).square(), used).view(shape)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values


@dataclass(frozen=True, kw_only=True)
class RKD:
    """`distance_weight` times RKD-D plus `angle_weight` times RKD-A.

    Park et al. 2019, Relational Knowledge Distillation.
    RKD-D: the mean over pairs of rows of `h(d_s - d_t)`, d their distance divided by the mean of all that are not 0.
    RKD-A: the mean over triples of `h(c_s - c_t)`, c the cosine of the angle at one row between two others. h is
    Huber's loss (delta 1). As in their code, means run over all B^2 pairs and B^3 triples, a row with itself among
    them, and a row that is there twice is 1e-6 apart. A weight of 0 leaves its part out.

    RKD-A takes B^3 numbers of memory, several times, and B^2 D for differences of rows: use features that are pooled.
    """

    needs_whole_batch: ClassVar[bool] = True
    temperature: ClassVar[float] = 1.0

    distance_weight: float = 25.0
    angle_weight: float = 50.0

    def __post_init__(self) -> None:
        """Refuse weights of which nothing is left."""
        check_arguments(self)
        if min(self.distance_weight, self.angle_weight) < 0 or self.distance_weight + self.angle_weight == 0:
            raise ConfigError(
                f"distance_weight is {self.distance_weight:g} and angle_weight {self.angle_weight:g}; expected numbers "
                "from 0, and one above"
            )

    def __call__(self, features: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B]` (or token) for student features `[B, ...]`; not covered rows are left out."""
        student, teacher, used, shape = _rows_of_both(features, targets, type(self).__name__)
        value = student.new_zeros(len(student))
        with _without_autocast(features):
            if self.distance_weight:
                apart = smooth_l1_loss(_distances(student, used), _distances(teacher, used), reduction="none")
                value = value + self.distance_weight * _mean_over(apart, used)
            if self.angle_weight:
                apart = smooth_l1_loss(_angles(student), _angles(teacher), reduction="none")
                value = value + self.angle_weight * _mean_over(_mean_over(apart, used), used)
        return value.view(shape)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values


def _rows_of_both(features: Tensor, targets: Targets, what: str) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """Vectors `[N, D_s]` and `[N, D_t]`, which are used `[N]`, and the shape of values. Raises `ConfigError`."""
    teacher, shape = of_features(targets, what)
    if features.shape[: len(shape)] != shape:
        raise ConfigError(f"{found(features, teacher)}; expected the same {'rows' if len(shape) == 1 else 'tokens'}")
    used = torch.ones(shape, dtype=torch.bool, device=features.device) if targets.covered is None else targets.covered
    both = (features, teacher)
    student, said = (widened(each).reshape(len(used.flatten()), each.shape[len(shape) :].numel()) for each in both)
    return student, said.to(student.dtype), used.flatten(), shape


def _mean_over(values: Tensor, used: Tensor) -> Tensor:
    """The mean over the used places of the last axis."""
    return torch.where(used, values, 0.0).sum(dim=-1) / used.sum().clamp(min=1)


def _distances(rows: Tensor, used: Tensor) -> Tensor:
    """`[N, N]`, divided by the mean of those between used rows that are not 0."""
    # Without the matrix product, which would cancel: rows may be near to each other and far from 0.
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=_SMALLEST_DISTANCE)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    counted = used & used.unsqueeze(-1) & ~itself
    total = torch.where(counted, apart, 0.0).sum()
    mean = torch.where(counted.any(), total / counted.sum().clamp(min=1), 1.0)
    return torch.where(itself, 0.0, apart) / mean


def _angles(rows: Tensor) -> Tensor:
    """`[N, N, N]`: at [i, j, k] the cosine of the angle at i between j and k; 0 where j or k is i."""
    directions = unit(rows.unsqueeze(0) - rows.unsqueeze(1))
    return directions @ directions.transpose(1, 2)


def _without_autocast(features: Tensor) -> torch.autocast:
    return torch.autocast(features.device.type, enabled=False)
