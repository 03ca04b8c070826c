"""Image classification: rows are uint8 images of one size, or encoded images of any size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kdpipe.data.columns import Array, Columns, ragged_bytes
from kdpipe.data.preparing import NameOf, column_of
from kdpipe.errors import ConfigError, DataError
from kdpipe.losses import cross_entropy
from kdpipe.preprocess import ImageTensor, Preprocess
from kdpipe.tasks.base import check_class_names, class_labels

_CHANNELS_TO_MODE = {1: "L", 3: "RGB"}
_GREY = ("1", "L")
_UNDECODABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)


class ImageClassification:
    """One label per image.

    `column` holds encoded images (PNG, JPEG, …) or lists of uint8 pixels, row-major. Rows are kept as uint8 arrays of
    `shape` (height, width, channels): required for pixel lists, read off the first image otherwise; where it is given,
    encoded images are turned grey or coloured to fit it. With `keep_encoded`, which takes no `shape`, rows stay encoded
    bytes, of any size, grey and coloured; each preprocess brings them to one shape by its `size` and `channels`.
    """

    def __init__(
        self,
        num_classes: int,
        column: str = "image",
        shape: tuple[int, int, int] | None = None,
        keep_encoded: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_class_names(num_classes, class_names)
        if shape is not None and shape[2] not in _CHANNELS_TO_MODE:
            raise ConfigError(f"task.shape is {list(shape)}; expected height, width and 1 or 3 channels")
        if shape is not None and keep_encoded:
            raise ConfigError(
                f"task.shape is {list(shape)} beside task.keep_encoded: true, which leaves images as they are; leave "
                "one of them out: encoded images get their shape by `size` and `channels` of each preprocess"
            )
        self.num_classes = num_classes
        self.class_names = class_names
        self._column, self._shape, self._keep_encoded = column, shape, keep_encoded
        self._channels = shape[2] if shape is not None else None

    def to_inputs(self, batch: pa.RecordBatch, name_of: NameOf) -> Columns:
        """Column `image`: uint8 `[B, H, W, channels]`, or `Ragged` bytes. Raises `DataError` naming bad rows."""
        values = column_of(batch, self._column)
        if values.null_count:
            rows = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
            raise DataError(f"column {self._column!r} has no image in {name_of(int(rows[0]))} ({len(rows)} such rows)")
        if pa.types.is_struct(values.type) and "bytes" in values.type.names:
            values = self._files(values, name_of)
        if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
            images = [self._decode(value, name_of(i)) for i, value in enumerate(values.to_pylist())]
            return {"image": ragged_bytes(values) if self._keep_encoded else np.stack(images)}
        return {"image": self._pixels(values, name_of)}

    def to_labels(self, values: pa.Array, name_of: NameOf) -> NDArray[np.int64]:
        """Class ids `[B]`, -1 where there is none."""
        return class_labels(values, self.num_classes, self.class_names, name_of)

    def default_preprocess(self) -> Preprocess:
        """Pixels scaled and normalised per channel."""
        return ImageTensor()

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, one value per row `[B]`."""
        return cross_entropy(logits, labels, smoothing)

    def _files(self, values: Any, name_of: NameOf) -> pa.Array:
        """The bytes `[B]` in structs of `bytes` and `path`. Raises `DataError` for a row that has none."""
        files = values.field("bytes")
        if files.null_count:
            row = int(np.flatnonzero(files.is_null().to_numpy(zero_copy_only=False))[0])
            path = values[row].as_py().get("path")
            found = f"a path ({path!r}) and no bytes" if path else "no bytes"
            raise DataError(
                f"the image of {name_of(row)} has {found} ({files.null_count} rows without); expected the file's bytes "
                f"in column {self._column!r}. Write them there, or save the data set by `save_to_disk` and read it by "
                "kdpipe.data.sources:HuggingFace, which does so."
            )
        return files

    def _decode(self, encoded: bytes, name: str) -> Array:
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                mode = image.mode
                channels = self._channels or (1 if mode in _GREY else 3)
                pixels = np.asarray(image.convert(_CHANNELS_TO_MODE[channels]), np.uint8)
        except _UNDECODABLE as error:
            wrong = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            raise DataError(f"the image of {name} cannot be decoded: {wrong}. Repair or remove that row.") from None
        if mode.startswith(("I", "F")):
            raise DataError(
                f"the image of {name} has more than 8 bits per channel (mode {mode}); rows are uint8 pixels. Convert "
                "it to 8 bits per channel first."
            )
        array: Array = pixels.reshape(*pixels.shape[:2], channels)
        if self._keep_encoded:
            return array
        self._shape = self._shape or array.shape
        if array.shape != self._shape:
            raise DataError(self._other_shape(name, array.shape, mode))
        return array

    def _other_shape(self, name: str, found: tuple[int, ...], mode: str) -> str:
        """The message about an image of another shape than `task.shape`, or than the first one, where none is given."""
        expected = list(self._shape or ())
        several = "several sizes set task.keep_encoded: true and give each preprocess a size"
        if self._channels is None:
            return (
                f"the image of {name} has shape {list(found)}, expected {expected}. For images of {several}; "
                "to make all grey or all colour give task.shape."
            )
        height, width = found[:2]
        grey = f"task.shape: [{height}, {width}, 1]"
        fitting = grey if mode in _GREY else f"{grey} (made grey) or [{height}, {width}, 3] (colour)"
        return (
            f"the image of {name} has height {height}, width {width} and mode {mode}; task.shape is {expected}. Set "
            f"{fitting}; for images of {several}, and leave task.shape out."
        )

    def _pixels(self, values: pa.Array, name_of: NameOf) -> Array:
        kind: Any = values.type
        if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind)) or kind.value_type != pa.uint8():
            raise DataError(
                f"column {self._column!r} has type {kind}; expected encoded images or lists of uint8 pixels"
            )
        if self._shape is None:
            raise DataError(
                "task.shape is missing: pixel lists do not tell height, width and channels, say [28, 28, 1]"
            )
        expected = int(np.prod(self._shape))
        lengths = values.value_lengths().to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != expected)
        if len(wrong):
            raise DataError(
                f"{name_of(int(wrong[0]))} has {lengths[wrong[0]]} pixels; "
                f"task.shape {list(self._shape)} asks {expected}"
            )
        flat = values.flatten()
        if flat.null_count:
            row = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // expected
            raise DataError(f"the image of {name_of(row)} has empty pixels")
        pixels: Array = flat.to_numpy().reshape(-1, *self._shape)
        return pixels
