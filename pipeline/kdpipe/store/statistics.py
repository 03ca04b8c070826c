"""What a store notes of every row beside its targets, before they are encoded.

Shapes: B rows, C classes; `…` stands for further axes (tokens).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def kept_statistics(ids: Tensor, head: Tensor, tail: Tensor) -> NDArray[np.float32]:
    """The same of k classes `[B, …, k]` with their log-probs, and the log of all others' mass `[B, …]`.

    The entropy is that of k + 1 buckets, a lower bound: what the other classes add among themselves is not known.
    """
    best = head.max(dim=-1, keepdim=True)
    entropy = torch.special.entr(head.exp()).sum(dim=-1) + torch.special.entr(tail.exp())
    top1 = ids.gather(-1, best.indices).squeeze(-1)
    return torch.stack([top1.float(), best.values.squeeze(-1).exp().float(), entropy.float()], dim=-1).cpu().numpy()


def teacher_statistics(logits: Tensor) -> NDArray[np.float32]:
    """Class, confidence and entropy (nats) of logits `[B, …, C]` at T = 1: float32 `[B, …, 3]`.

    In a store all three are 0 where the teacher abstained; nobody else's confidence is.
    """
    if logits.dtype == torch.float64:  # what lies far from 0 would be rounded together
        logits = logits - logits.amax(dim=-1, keepdim=True)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    top = log_probs.max(dim=-1)
    entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
    return torch.stack([top.indices.float(), top.values.exp(), entropy], dim=-1).cpu().numpy()
