"""What a store notes of every row beside its targets, before they are encoded.

Shapes: B rows, C classes; `…` stands for further axes (tokens).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def teacher_statistics(logits: Tensor) -> NDArray[np.float32]:
    """Class, confidence and entropy (nats) of logits `[B, …, C]` at T = 1: float32 `[B, …, 3]`.

    In a store all three are 0 where the teacher abstained; nobody else's confidence is.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    top = log_probs.max(dim=-1)
    entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
    return torch.stack([top.indices.float(), top.values.exp(), entropy], dim=-1).cpu().numpy()
