"""A residual network that also says where it looks: all that attention transfer needs of its features."""

from __future__ import annotations

from torch import Tensor

from kdpipe.models.resnet import ResNet


class AttentiveResNet(ResNet):
    """A `ResNet` with the maps `attention.0` to `.2`, `[B, 1, H, W]`: sqrt(sum_D f^2) of each place after each stage.

    Attention transfer (p = 2) makes of them what it makes of the features, up to 128 times as many numbers.
    """

    def forward(self, inputs: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """`logits` `[B, C]` and `attention`, one map per stage."""
        features = self.stem(inputs)
        maps = []
        for index, block in enumerate(self.blocks, start=1):
            features = block(features)
            if index % (len(self.blocks) // 3) == 0:
                maps.append(features.float().square().sum(dim=1, keepdim=True).sqrt())
        return {"logits": self.head(features.mean(dim=(2, 3))), "attention": maps}
