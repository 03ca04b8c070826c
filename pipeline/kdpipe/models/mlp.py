"""A multi-layer perceptron."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn


class MLP(nn.Module):
    """Hidden layers with ReLU and dropout, from the flattened input `[B, …]` to logits `[B, C]`."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, hidden: list[int], dropout: float = 0.0) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `[B, C]`."""
        logits: Tensor = self.layers(inputs.flatten(1))
        return logits
