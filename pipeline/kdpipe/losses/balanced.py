"""BalancedKL: a teacher of unbalanced classes, whose words about rare ones weigh more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.losses.checking import check_arguments
from kdpipe.losses.distributions import student_softened, with_every_class
from kdpipe.losses.divergences import kl_of
from kdpipe.targets import Targets


@dataclass(frozen=True, kw_only=True)
class BalancedKL:
    """`T^2 sum w p (log p' - log q)`, with p' = w p / sum w p (Zhang et al. 2021, Balanced Knowledge Distillation).

    The paper's `-T^2 sum w p log q` with what makes it 0 at q = p'; the gradient is the same. A class's weight is one
    over its effective number of rows, `w_c = (1 - beta) / (1 - beta^n_c)`, 1 on average (Cui et al. 2019, equation 4).
    `class_counts [C]`: labelled rows of each class; in params.yaml they are those that the student knows. Dense
    targets only.
    """

    class_counts: Sequence[int]
    temperature: float = 2.0
    beta: float = 0.9999
    weights: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing, and classes without a row."""
        check_arguments(self)
        if not 0 <= self.beta < 1:
            raise ConfigError(f"beta is {self.beta}; expected 0 <= beta < 1")
        counts = torch.as_tensor(self.class_counts, dtype=torch.float64)
        absent = (~(counts > 0)).nonzero().flatten().tolist()
        if not len(counts) or absent:
            named = ", ".join(map(str, absent[:5])) or "none at all"
            raise ConfigError(f"BalancedKL: no labelled row of class {named}, so its weight is unknown; label one")
        weights = (1 - self.beta) / (1 - self.beta**counts)
        object.__setattr__(self, "weights", weights / weights.mean())

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]`."""
        every_class = with_every_class(targets, "BalancedKL")
        log_q = torch.log_softmax(student_softened(logits, every_class, self.temperature), dim=-1)
        if len(self.weights) != log_q.shape[-1]:
            found = f"class_counts has {len(self.weights)} numbers, the logits {log_q.shape[-1]} classes"
            raise ConfigError(f"BalancedKL: {found}; expected one per class")
        log_wp = every_class.log_probs(self.temperature).to(log_q.dtype) + self.weights.to(log_q).log()
        log_total = log_wp.logsumexp(dim=-1, keepdim=True)
        return self.temperature**2 * log_total.squeeze(-1).exp() * kl_of(log_wp - log_total, log_q)

    def unscaled(self, values: Tensor) -> Tensor:
        """Without T^2."""
        return values / self.temperature**2
