"""Squared differences: of logits, or of probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdpipe.losses.checking import check_arguments
from kdpipe.losses.distributions import check_shape, log_probs_of_both, only_dense, root
from kdpipe.targets import Targets, widened


@dataclass(frozen=True, kw_only=True)
class LogitMSE:
    """`sum (z_s - z_t)^2` over classes (Ba and Caruana 2014; Kim et al. 2021), or their mean with `class_reduction`.

    The two differ by a factor C. `centred` takes each row's mean off first, so that a constant per row does not count:
    `1 / 2C` of that sum is the limit of T^2 KL as T goes to infinity. T^2 times the squared distance of `z / T` is the
    same at every T, so `temperature` changes nothing here. A class that the teacher masks is left out. Dense targets
    only.

    `of: probabilities` compares p and q at T instead, without T^2, dense or over K + 1 buckets; `squared: false` takes
    the square root: the Euclidean distance, whose gradient is 0 where p = q.
    """

    of: Literal["logits", "probabilities"] = "logits"
    class_reduction: Literal["sum", "mean"] = "sum"
    centred: bool = False
    squared: bool = True
    temperature: float = 1.0
    allow_interpolation: bool = False

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        if self.of == "probabilities":
            log_p, log_q = log_probs_of_both(logits, targets, self.temperature, self.allow_interpolation)
            difference = log_q.exp() - log_p.exp()
            num_classes: Tensor | int = logits.shape[-1]
        else:
            difference, num_classes = self._of_logits(logits, targets)
        value = difference.square().sum(dim=-1)
        if self.class_reduction == "mean":
            value = value / num_classes
        return value if self.squared else root(value)

    def _of_logits(self, logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Differences `[B, ..., C]`, 0 where the teacher masks, and how many classes it does not mask `[B, ...]`."""
        dense = only_dense(targets, "LogitMSE of logits")
        check_shape(logits, tuple(dense.values.shape))
        kept, wide = ~dense.masked, widened(logits)
        teacher = dense.values if self.centred else dense.logits()
        difference = torch.where(kept, wide - teacher.to(wide.dtype), 0.0)
        num_classes = kept.sum(dim=-1)
        if self.centred:
            mean = difference.sum(dim=-1, keepdim=True) / num_classes.unsqueeze(-1)
            difference = torch.where(kept, difference - mean, 0.0)
        return difference, num_classes

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values
