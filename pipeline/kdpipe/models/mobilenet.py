"""MobileNetV2 (Sandler et al. 2018) in any width, with strides for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdpipe.errors import ConfigError

_STEM, _LAST = 32, 1280
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks and first stride: the paper's table 2, but for the second stage's stride of 2."""


class MobileNetV2(nn.Module):
    """Seven stages of inverted residuals; images `[B, channels, H, W]` -> logits `[B, C]`.

    `width` multiplies the paper's channels, in multiples of 8; the last layer has 1280 or more. The stages halve the
    resolution three times, as is usual for 32x32 pixels; `stem_stride` 2 halves it at once (4x cheaper).
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, width: float = 1.0, stem_stride: int = 1
    ) -> None:
        super().__init__()
        if not width > 0:
            raise ConfigError(f"width is {width}; expected a factor above 0, such as 0.25, 0.5 or 1")
        width_in = _multiple_of_8(_STEM * width)
        self.stem = _convolution(input_shape[0], width_in, 3, stem_stride)
        stages: list[nn.Module] = []
        for expansion, channels, num_blocks, first_stride in _STAGES:
            width_out = _multiple_of_8(channels * width)
            blocks: list[nn.Module] = []
            for index in range(num_blocks):
                blocks.append(_InvertedResidual(width_in, width_out, 1 if index else first_stride, expansion))
                width_in = width_out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        width_last = _multiple_of_8(_LAST * max(1.0, width))
        self.last = _convolution(width_in, width_last, 1)
        self.head = nn.Linear(width_last, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `[B, C]`."""
        # Where channels come last, a CPU trains depthwise convolutions in half the time.
        channels_last = inputs.to(memory_format=torch.channels_last)
        features = self.last(self.stages(self.stem(channels_last)))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _InvertedResidual(nn.Module):
    """1x1 to `expansion` times the width, 3x3 of each channel, 1x1 back; beside an identity where shapes agree."""

    def __init__(self, width_in: int, width_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = width_in * expansion
        expanding = [_convolution(width_in, wide, 1)] if expansion > 1 else []
        projecting = nn.Sequential(nn.Conv2d(wide, width_out, kernel_size=1, bias=False), nn.BatchNorm2d(width_out))
        self.residual = nn.Sequential(*expanding, _convolution(wide, wide, 3, stride, groups=wide), projecting)
        self.is_residual = stride == 1 and width_in == width_out

    def forward(self, inputs: Tensor) -> Tensor:
        """Features `[B, width_out, H / stride, W / stride]`."""
        outputs: Tensor = self.residual(inputs)
        return inputs + outputs if self.is_residual else outputs


def _convolution(width_in: int, width_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width_out, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width_out), nn.ReLU6())


def _multiple_of_8(channels: float) -> int:
    """The nearest one, but never less than 90 % of `channels` (as the authors' code rounds)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
