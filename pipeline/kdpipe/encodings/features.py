"""What a teacher computes inside: any named output, as floats or one byte per number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.encodings.base import FLOATS, ArraySpec, as_json, check_choice, check_kind, widened
from kdpipe.encodings.int8 import quantised
from kdpipe.errors import ConfigError
from kdpipe.targets import FeatureTargets, OutputSpec


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
    """Numbers in one byte: `x ~ zero + code * scale`, `scale = (max - min) / 255` of the row. D + 8 bytes per row.

    |error| <= scale / 2, plus float32 rounding of 2^-22 times the row's largest magnitude.
    """

    name: ClassVar[str] = "features_int8"
    compact: bool = False

    def to_json(self) -> dict[str, Any]:
        """Name and parameters."""
        return as_json(self)

    def check(self, output: OutputSpec) -> None:
        """Refuse logits."""
        check_kind(self.name, output, "features")

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """The codes `[..., D]`, `.scale` and `.zero [...]`."""
        return {
            "": ArraySpec(dtype="uint8", shape=output.shape, compressed=self.compact),
            ".scale": ArraySpec(dtype="float32", shape=output.shape[:-1], compressed=self.compact),
            ".zero": ArraySpec(dtype="float32", shape=output.shape[:-1], compressed=self.compact),
        }

    def encode(self, values: Tensor, keys: NDArray[np.uint64] | None = None) -> dict[str, NDArray[Any]]:
        """Codes, scales and minima of values `[B, ..., D]`."""
        wide = widened(values)
        zero = wide.amin(dim=-1)
        codes, scale = quantised(wide - zero.unsqueeze(-1))
        return {"": codes.cpu().numpy(), ".scale": scale.cpu().numpy(), ".zero": zero.float().cpu().numpy()}

    def decode(self, arrays: Mapping[str, NDArray[Any]], output: OutputSpec) -> FeatureTargets:
        """Targets of stored rows, values in float32."""
        scale, zero = (torch.from_numpy(arrays[suffix]).unsqueeze(-1) for suffix in (".scale", ".zero"))
        return FeatureTargets(values=zero + torch.from_numpy(arrays[""]) * scale)
