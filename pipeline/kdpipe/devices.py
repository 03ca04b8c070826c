"""Where tensors are computed."""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info


def compute_device() -> torch.device:
    """A GPU where there is one. In a worker process of a `DataLoader`, which cannot use one, the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and get_worker_info() is None else "cpu")
