"""What a teacher computes inside: any named output, as floats or one byte per number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.encodings.base import FLOATS, ArraySpec, as_json, check_choice, check_kind
from kdpipe.encodings.int8 import quantised
from kdpipe.errors import ConfigError
from kdpipe.targets import FeatureTargets, OutputSpec, spread, widened


@dataclass(frozen=True, kw_only=True)
class Features:
    """Numbers as float16 or float32, 2D or 4D bytes per row. float16: |error| <= |x| * 2^-11 + 2^-25."""

    name: ClassVar[str] = "features"
    dtype: str = "float16"
    compact: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown dtype."""
        check_choice("dtype", self.dtype, FLOATS)

    def to_json(self) -> dict[str, Any]:
        """Name and parameters."""
        return as_json(self)

    def check(self, output: OutputSpec) -> None:
        """Refuse logits."""
        check_kind(self.name, output, "features")

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """The values `[..., D]`."""
        return {"": ArraySpec(dtype=self.dtype, shape=output.shape, compressed=self.compact)}

    def encode(self, values: Tensor, keys: NDArray[np.uint64] | None = None) -> dict[str, NDArray[Any]]:
        """Values `[B, ..., D]`. Raises `ConfigError` for a number that the dtype cannot hold."""
        largest = torch.finfo(FLOATS[self.dtype]).max
        if bool((values.abs() > largest).any()):
            raise ConfigError(
                f"a feature is {float(values.abs().max()):.3g}; {self.dtype} holds up to {largest:g}. "
                "Set features: float32 (in your own code dtype) or normalise the teacher's output"
            )
        return {"": values.to(FLOATS[self.dtype]).cpu().numpy()}

    def decode(self, arrays: Mapping[str, NDArray[Any]], output: OutputSpec) -> FeatureTargets:
        """Targets of stored rows; the array is not copied."""
        return FeatureTargets(values=torch.from_numpy(arrays[""]))


@dataclass(frozen=True, kw_only=True)
class FeaturesInt8:
    """Numbers in one byte: `x ~ zero + code * scale`, `scale = (max - min) / 255` of each D numbers. D + 8 bytes.

    Those are the last axis, or with `whole_row` all numbers of a row: of maps `[D, H, W]` a line of W would be few.
    |error| <= scale / 2, plus float32 rounding of 2^-22 times their largest magnitude.
    """

    name: ClassVar[str] = "features_int8"
    whole_row: bool = False
    compact: bool = False

    def to_json(self) -> dict[str, Any]:
        """Name and parameters; `whole_row` stands only where it is set, as in stores that were written before it."""
        return {key: value for key, value in as_json(self).items() if key != "whole_row" or value}

    def check(self, output: OutputSpec) -> None:
        """Refuse logits."""
        check_kind(self.name, output, "features")

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """The codes `[..., D]`, `.scale` and `.zero [...]`, or one number with `whole_row`."""
        shape = () if self.whole_row else output.shape[:-1]
        ranges = ArraySpec(dtype="float32", shape=shape, compressed=self.compact)
        codes = ArraySpec(dtype="uint8", shape=output.shape, compressed=self.compact)
        return {"": codes, ".scale": ranges, ".zero": ranges}

    def encode(self, values: Tensor, keys: NDArray[np.uint64] | None = None) -> dict[str, NDArray[Any]]:
        """Codes, scales and minima of values `[B, ..., D]`."""
        wide = widened(values)
        wide = wide.flatten(1) if self.whole_row else wide
        zero = wide.amin(dim=-1)
        codes, scale = quantised(wide - zero.unsqueeze(-1))
        arrays = {"": codes.reshape(values.shape), ".scale": scale, ".zero": zero.float()}
        return {suffix: each.cpu().numpy() for suffix, each in arrays.items()}

    def decode(self, arrays: Mapping[str, NDArray[Any]], output: OutputSpec) -> FeatureTargets:
        """Targets of stored rows, values in float32."""
        codes = torch.from_numpy(arrays[""])
        scale, zero = (spread(torch.from_numpy(arrays[suffix]), codes.ndim) for suffix in (".scale", ".zero"))
        return FeatureTargets(values=zero + codes * scale)
