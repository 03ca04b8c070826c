"""Logistic regression."""

from __future__ import annotations

import math

from torch import Tensor, nn


class Linear(nn.Module):
    """One affine map from the flattened input `[B, …]` to logits `[B, C]`."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `[B, C]`."""
        logits: Tensor = self.head(inputs.flatten(1))
        return logits
