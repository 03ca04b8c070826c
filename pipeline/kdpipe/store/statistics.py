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
    logits = logits.float()
    probs = torch.softmax(logits, dim=-1)
    top = _argmax(logits).unsqueeze(-1)
    confidence = probs.gather(-1, top).squeeze(-1)
    # -log p of a class is that of the best one and how far it lies below; where p is 0, it is to add 0, not 0 * inf.
    below = (logits.gather(-1, top) - logits).clamp_(max=_BELOW)
    entropy = torch.linalg.vecdot(probs, below) - confidence.log()
    return torch.stack([top.squeeze(-1).float(), confidence, entropy], dim=-1).cpu().numpy()


_BELOW = 200.0
"""How far below the best class every class has probability 0 in float32."""


def _argmax(logits: Tensor) -> Tensor:
    """The first of the largest `[...]`. On a CPU by NumPy, in a tenth of the time."""
    return torch.from_numpy(np.asarray(logits.numpy().argmax(axis=-1))) if logits.is_cpu else logits.argmax(dim=-1)
