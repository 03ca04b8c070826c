"""CIFAR-style residual networks (He et al. 2015, section 4.2), in any depth 6n + 2 and width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdpipe.errors import ConfigError


class ResNet(nn.Module):
    """Three stages of n basic blocks; images `[B, channels, H, W]` -> logits `[B, C]`.

    The stages are `width`, 2 `width` and 4 `width` wide. `depth` is 6n + 2: 8, 14, 20, 32, 44, 56, …
    `stem_stride` 2 halves the resolution at once (4x cheaper).
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        depth: int = 20,
        width: int = 16,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ConfigError(f"depth is {depth}; expected 6n + 2: 8, 14, 20, 32, 44, 56, 110")
        self.stem = nn.Sequential(_conv3x3(input_shape[0], width, stem_stride), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        width_in = width
        for stage in range(3):
            for index in range((depth - 2) // 6):
                width_out = width * 2**stage
                blocks.append(_BasicBlock(width_in, width_out, stride=2 if stage and not index else 1))
                width_in = width_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width_in, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `[B, C]`."""
        features = self.blocks(self.stem(inputs))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity, or beside a 1x1 convolution where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv3x3(width_in, width_out, stride), nn.BatchNorm2d(width_out), nn.ReLU(),
            _conv3x3(width_out, width_out, 1), nn.BatchNorm2d(width_out),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            projection = nn.Conv2d(width_in, width_out, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width_out))

    def forward(self, inputs: Tensor) -> Tensor:
        """Features `[B, width_out, H / stride, W / stride]`."""
        return torch.relu(self.residual(inputs) + self.shortcut(inputs))


def _conv3x3(width_in: int, width_out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, kernel_size=3, stride=stride, padding=1, bias=False)
