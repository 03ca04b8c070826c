"""Targets of made-up logits, without a store."""

from __future__ import annotations

import torch
from torch import Tensor

from kdpipe.targets import DenseTargets, SparseTargets


def dense_of(logits: Tensor, covered: Tensor | None = None, dtype: torch.dtype | None = None) -> DenseTargets:
    """Targets of logits `[B, ..., C]`: exact, or rounded to a dtype."""
    row_max = logits.amax(dim=-1)
    values = (logits - row_max.unsqueeze(-1)).to(dtype or logits.dtype)
    return DenseTargets(values=values, row_max=row_max, covered=covered)


def sparse_of(logits: Tensor, k: int, temperatures: tuple[float, ...]) -> SparseTargets:
    """Exact targets of the k largest logits of `[B, ..., C]`, for these temperatures."""
    log_probs = torch.log_softmax(logits, dim=-1)
    ids = log_probs.topk(k, dim=-1).indices.sort(dim=-1).values
    rest = log_probs.scatter(-1, ids, -torch.inf)
    return SparseTargets(
        ids=ids,
        head=log_probs.gather(-1, ids),
        tails=torch.stack([torch.logsumexp(rest / each, dim=-1) for each in temperatures], dim=-1),
        temperatures=temperatures,
        num_classes=logits.shape[-1],
    )
