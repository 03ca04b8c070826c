"""Losses whose value depends on the whole batch: DIST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses.checking import check_arguments
from kdpipe.losses.distributions import check_shape, root, softened, with_every_class
from kdpipe.targets import Targets, widened


@dataclass(frozen=True, kw_only=True)
class DIST:
    """`T^2 [beta (1 - mean_i r_i) + gamma (1 - mean_c r_c)]` (Huang et al. 2022, DIST).

    r_i is Pearson's correlation of row i of q with row i of p, over classes; r_c that of class c, over the covered rows
    of the batch: `cov / (norm norm + eps)`. A row's value has its own r_i and the batch's r_c: the mean over rows is
    the loss. `eps` decides where one side is nearly constant, as over the rows of a class that is never probable.
    Batches must be whole, and large enough to tell classes apart: of a single row the second term is the constant
    gamma T^2. Their T is 1 on ImageNet, 4 on CIFAR-100. Dense targets only. Computed in float64:
    1 - r, and a class less its mean, have few digits left in float32.
    """

    needs_whole_batch: ClassVar[bool] = True

    temperature: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse a temperature or an eps that means nothing."""
        check_arguments(self)
        if not self.eps > 0:
            raise ConfigError(f"eps is {self.eps}; expected a number above 0")

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`; all rows and tokens of the batch are one set."""
        teacher = with_every_class(targets, "DIST")
        check_shape(logits, teacher.shape)
        of_teacher = teacher.double().softened(self.temperature)
        both = (of_teacher, softened(logits.double(), self.temperature))
        p, q = (torch.softmax(each, dim=-1).flatten(0, -2) for each in both)
        used = torch.ones(len(q), dtype=torch.bool, device=q.device)
        if teacher.covered is not None:
            used = teacher.covered.flatten()
        within_rows = self._correlation(_centred(q, -1), _centred(p, -1), -1)
        within_classes = self._correlation(_centred_over(q, used), _centred_over(p, used), 0).mean()
        value = self.beta * (1 - within_rows) + self.gamma * (1 - within_classes)
        return self.temperature**2 * value.view(logits.shape[:-1]).to(widened(logits).dtype)

    def unscaled(self, values: Tensor) -> Tensor:
        """Without T^2."""
        return values / self.temperature**2

    def _correlation(self, first: Tensor, second: Tensor, axis: int) -> Tensor:
        norms = root(first.square().sum(dim=axis)) * root(second.square().sum(dim=axis))
        return (first * second).sum(dim=axis) / (norms + self.eps)


def _centred(values: Tensor, axis: int) -> Tensor:
    return values - values.mean(dim=axis, keepdim=True)


def _centred_over(values: Tensor, used: Tensor) -> Tensor:
    """`[B, C]` less the mean of its used rows `[B]`; 0 in the others."""
    used = used.unsqueeze(-1)
    mean = torch.where(used, values, 0.0).sum(dim=0) / used.sum().clamp(min=1)
    return torch.where(used, values - mean, 0.0)
