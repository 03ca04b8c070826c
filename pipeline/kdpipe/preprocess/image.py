"""Images as a model takes them.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdpipe.data.columns import Array, Columns, Ragged, layout_of
from kdpipe.errors import ConfigError, DataError, some
from kdpipe.preprocess.base import Moments, State

_CHANNELS_TO_MODE = {1: "L", 3: "RGB"}
_MIXED = "for grey and colour images together set its `channels` to 1 (all grey) or 3 (all colour)"


class ImageTensor:
    """uint8 images `[B, H, W, channels]` -> float32 `[B, channels, H, W]`: `(pixel / scale - mean) / std` per channel.

    `mean` and `std` (in units of scaled pixels) are learnt from the training rows where they are not given. `size`
    (height, width) resizes bilinearly; encoded rows need it unless all have one size. `channels` turns images grey (1)
    or coloured (3), as Pillow does; encoded rows need it where grey and colour images come together.
    """

    def __init__(
        self,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        size: tuple[int, int] | None = None,
        scale: float = 255.0,
        channels: Literal[1, 3] | None = None,
    ) -> None:
        if (mean is None) != (std is None):
            raise ConfigError("preprocess: give both mean and std, or neither to learn them from the training rows")
        if size is not None and min(size) < 1:
            raise ConfigError(f"preprocess: size is {list(size)}; expected height and width of at least 1 pixel")
        if channels not in (None, *_CHANNELS_TO_MODE):
            raise ConfigError(f"preprocess: channels is {channels}; expected 1 (grey) or 3 (colour)")
        self._mean, self._std, self._size, self._scale = mean, std, size, scale
        self._channels = channels

    def fit(self, blocks: Iterable[Columns]) -> None:
        """Learn mean and std per channel, unless they were given. Raises `DataError` for grey and colour images."""
        if self._mean is not None:
            return
        moments, channels = Moments(), None
        for block in blocks:
            pixels = self._pixels(block)
            channels = channels or pixels.shape[-1]
            if pixels.shape[-1] != channels:
                raise DataError(
                    f"preprocess ImageTensor meets images of {channels} and of {pixels.shape[-1]} channels; expected "
                    f"one number of them: {_MIXED}."
                )
            moments.add(pixels.reshape(-1, pixels.shape[-1]).astype(np.float64) / self._scale)
        self._mean, self._std = moments.mean_and_std()

    def state(self) -> State:
        """`mean` and `std` per channel."""
        if self._mean is None or self._std is None:
            raise ConfigError("preprocess ImageTensor knows no mean and std: give them, or train the model here")
        return {"mean": self._mean, "std": self._std}

    def load_state(self, state: State) -> None:
        """Take back what `state` gave."""
        self._mean, self._std = state["mean"], state["std"]

    def __call__(self, columns: Columns) -> Tensor:
        """`[B, channels, H, W]`. Raises `ConfigError` unless there is one mean and one std per channel."""
        state = self.state()
        pixels = torch.from_numpy(self._pixels(columns).astype(np.float32))
        channels_first = pixels.permute(0, 3, 1, 2) / self._scale
        mean, std = (torch.tensor(state[key], dtype=torch.float32).view(1, -1, 1, 1) for key in ("mean", "std"))
        channels = channels_first.shape[1]
        if not channels == mean.numel() == std.numel():
            raise ConfigError(
                f"preprocess ImageTensor has {mean.numel()} numbers as mean and {std.numel()} as std, and the images "
                f"have {channels} channels; expected one per channel; {_MIXED}"
            )
        return (channels_first - mean) / std

    def _pixels(self, columns: Columns) -> Array:
        images = columns.get("image")
        if images is None:
            raise ConfigError(f"preprocess ImageTensor takes a column `image`; rows here have {layout_of(columns)}")
        if isinstance(images, Ragged):
            opened = [self._open(Image.open(io.BytesIO(images.row(i).tobytes()))) for i in range(len(images))]
            shapes = sorted({each.shape for each in opened})
            if len(shapes) > 1:
                raise DataError(_several(shapes))
            return np.stack(opened)
        unsized = self._size is None or images.shape[1:3] == tuple(self._size)
        if unsized and self._channels in (None, images.shape[-1]):
            return images
        grey = images.shape[-1] == 1
        return np.stack([self._open(Image.fromarray(each[..., 0] if grey else each)) for each in images])

    def _open(self, image: Any) -> Array:
        channels = self._channels or (1 if image.mode in ("1", "L") else 3)
        image = image.convert(_CHANNELS_TO_MODE[channels])
        if self._size is not None:
            image = image.resize((self._size[1], self._size[0]), Image.Resampling.BILINEAR)
        return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def _several(shapes: Sequence[tuple[int, ...]]) -> str:
    """The message about encoded images of these different shapes, in order: (height, width, channels)."""
    ways = []
    if len({shape[:2] for shape in shapes}) > 1:
        ways.append("give it a size")
    if len({shape[2] for shape in shapes}) > 1:
        ways.append(_MIXED)
    return (
        f"encoded images become arrays of several shapes: {some(shapes)}; expected one from the preprocess "
        f"ImageTensor: {', and '.join(ways)}."
    )
