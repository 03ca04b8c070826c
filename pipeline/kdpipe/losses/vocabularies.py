"""Teacher and student of different classes or vocabularies, compared rank by rank: ULD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdpipe.errors import ConfigError
from kdpipe.losses.buckets import bucket_log_probs
from kdpipe.losses.checking import check_arguments
from kdpipe.losses.distributions import softened, teacher_log_probs
from kdpipe.targets import SparseTargets, Targets, widened


@dataclass(frozen=True, kw_only=True)
class ULD:
    """`sum_r |sort(p)_r - sort(q)_r|`, both sorted downwards, the shorter filled up with 0 (Boizard et al. 2024, ULD).

    The r-th most probable class of one is compared with the r-th of the other, so the classes may be other ones and of
    another number; rows (tokens) must be aligned. Without T^2; added to cross-entropy with weight 1.5 in the paper.
    Sparse targets (their largest classes): ranks up to K, then the rest of both as one, which is a lower bound.
    """

    temperature: float = 1.0
    allow_interpolation: bool = False

    def __post_init__(self) -> None:
        """Refuse arguments that mean nothing."""
        check_arguments(self)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        """One value per row `[B, ...]` for student logits `[B, ..., C]` of any C."""
        log_p = teacher_log_probs(targets, self.temperature, self.allow_interpolation)
        if log_p.shape[:-1] != logits.shape[:-1]:
            raise ConfigError(
                f"student logits have shape {list(logits.shape)}, the targets {list(log_p.shape[:-1])} rows; "
                "expected the same rows"
            )
        if isinstance(targets, SparseTargets):
            return self._of_the_kept(logits, log_p)
        log_q = torch.log_softmax(softened(widened(logits), self.temperature), dim=-1)
        p, q = (each.exp().sort(dim=-1, descending=True).values for each in (log_p.to(log_q.dtype), log_q))
        return _distance(p, q)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values

    def _of_the_kept(self, logits: Tensor, log_p: Tensor) -> Tensor:
        """Of K ranks and the rest: `log p [B, ..., K + 1]`."""
        head = log_p[..., :-1].sort(dim=-1, descending=True).values
        num_ranks = min(head.shape[-1], logits.shape[-1])
        ids = logits.detach().topk(num_ranks, dim=-1).indices
        used = ~torch.isneginf(head[..., :num_ranks])
        q = bucket_log_probs(logits, ids, used, self.temperature).exp()
        return _distance(head.to(q.dtype).exp(), q[..., :-1]) + (log_p[..., -1].to(q.dtype).exp() - q[..., -1]).abs()


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """`sum |p - q|` over the last axis, the shorter one filled up with 0."""
    size = max(p.shape[-1], q.shape[-1])
    p, q = (pad(each, (0, size - each.shape[-1])) for each in (p, q))
    return (p - q).abs().sum(dim=-1)
