"""Several teachers as one: the mixture of what they say. K is the number of teachers here.

Hinton et al. 2015 mean the probabilities of an ensemble; CA-MKD (Zhang et al. 2022) trusts, row by row, the teachers
that give the label more probability.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses.checking import check_labels, check_targets, described
from kdpipe.targets import DenseTargets, FeatureTargets, MixedTargets, SampledTargets, Targets, is_number, only_where

Mix = Literal["mean", "confidence"] | tuple[float, ...]
"""What each teacher's probabilities are weighted with: the same, by its confidence in the row's label, or a number."""

_HOPELESS = 1e30
"""Stands for the cross-entropy of a teacher that rules the label out."""


def mixed(targets: Sequence[Targets], mix: Mix = "mean", labels: Tensor | None = None) -> MixedTargets:
    """The mixture `p = sum_k w_k softmax(z_k / T)` of K teachers' targets of the same rows, exact at every T.

    `mix` is `mean` (w = 1 / K), one number above 0 per teacher, or `confidence`: `w_k = (1 - exp(CE_k) / sum_j
    exp(CE_j)) / (K - 1)`, CE_k the cross-entropy of teacher k with the row's label at T = 1 (CA-MKD, equation 5); a row
    without a label (below 0 in `labels [B, ...]`) has the mean. Weights are of the teachers that cover the row alone,
    and sum to 1 over them; a row that nobody covers is not covered.

    Raises `ConfigError` for targets other than dense ones: what top-k targets keep are classes of their own, and draws
    have no logarithm.
    """
    if not isinstance(targets, Sequence):
        raise ConfigError(f"targets to mix are {described(targets)}; expected a list of those of one teacher or more")
    if not targets:
        raise ConfigError("there are no targets to mix; expected those of one teacher or more")
    parts = [_checked(index, each, targets) for index, each in enumerate(targets)]
    covered = torch.stack([_covered(each) for each in parts], dim=-1)
    if mix == "confidence":
        weights = _confidence(parts, covered, labels)
    else:
        wide = functools.reduce(torch.promote_types, (each.values.dtype for each in parts), torch.float32)
        weights = torch.tensor(_numbers(mix, len(parts)), dtype=wide, device=covered.device)
    weights = torch.where(covered, weights, 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    shares = torch.where(total > 0, weights / total, 1 / len(parts))
    return MixedTargets(parts=tuple(parts), log_weights=shares.log(), covered=covered_by_any(parts))


def covered_by_any(targets: Sequence[Targets]) -> Tensor | None:
    """Which rows some teacher speaks about, bool `[B, ...]`; None: all."""
    masks = [each.covered for each in targets if each.covered is not None]
    return functools.reduce(torch.logical_or, masks) if len(masks) == len(targets) else None


def _checked(index: int, targets: Targets, beside: Sequence[Targets]) -> DenseTargets:
    which = f"target {index + 1} of {len(beside)}"
    check_targets(targets, which)
    if not isinstance(targets, DenseTargets):
        raise ConfigError(
            f"{which} cannot be mixed exactly: it holds {_kind(targets)}. Cache with encoding: dense or int8, or give "
            "each teacher a loss of its own (of forward KL and cross-entropy these sum to the same gradient)"
        )
    first = beside[0]
    if isinstance(first, DenseTargets) and targets.values.shape != first.values.shape:
        raise ConfigError(
            f"{which} has shape {list(targets.values.shape)}, the first {list(first.values.shape)}; expected the same "
            "rows and classes"
        )
    return targets if targets.covered is None else only_where(targets.covered, targets)


def _kind(targets: Targets) -> str:
    if isinstance(targets, FeatureTargets):
        return "features"
    if isinstance(targets, MixedTargets):
        return "a mixture"
    return "draws" if isinstance(targets, SampledTargets) else "the top k classes and their tail"


def _covered(targets: DenseTargets) -> Tensor:
    """Bool `[B, ...]`."""
    return torch.ones_like(targets.row_max, dtype=torch.bool) if targets.covered is None else targets.covered


def _numbers(mix: Literal["mean"] | tuple[float, ...], num_parts: int) -> tuple[float, ...]:
    """One weight per teacher."""
    weights = (1.0,) * num_parts if mix == "mean" else mix
    is_numbers = isinstance(weights, Sequence) and all(map(is_number, weights))
    if not is_numbers or len(weights) != num_parts or not all(0 < each < math.inf for each in weights):
        raise ConfigError(
            f"mix is {mix!r}; expected mean, confidence, or one number above 0 for each of {num_parts} teachers"
        )
    return weights


def _confidence(parts: Sequence[DenseTargets], covered: Tensor, labels: Tensor | None) -> Tensor:
    """Weights `[B, ..., K]`, of the covering teachers alone where `covered [B, ..., K]`; equal ones without a label."""
    first = parts[0].values
    labels = check_labels("mix: confidence", labels, tuple(first.shape[:-1]), first.shape[-1])
    place = labels.clamp(min=0).unsqueeze(-1)
    cross_entropy = torch.cat([-each.log_probs().gather(-1, place) for each in parts], dim=-1).clamp(max=_HOPELESS)
    share = torch.softmax(cross_entropy.masked_fill(~covered, -torch.inf), dim=-1)
    num_others = covered.sum(dim=-1, keepdim=True) - 1
    return torch.where((labels >= 0).unsqueeze(-1) & (num_others > 0), (1 - share) / num_others.clamp(min=1), 1.0)
