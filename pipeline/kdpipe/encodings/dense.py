"""Every class as a float: exact at every temperature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.encodings.base import FLOATS, ArraySpec, as_json, check_choice, check_kind, narrowed
from kdpipe.targets import DenseTargets, OutputSpec, widened


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Every class: `z - max` as float16 or float32, and the row's maximum as float32. 2C + 4 or 4C + 4 bytes per row.

    float16 keeps 11 bits: |error| <= |z - max| * 2^-11, plus 2^-25 below the normal range; a class more than 65504
    below the maximum counts as 65504 below. A masked class stays -inf, which no other class can become.
    """

    name: ClassVar[str] = "dense"
    dtype: str = "float16"
    compact: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown dtype."""
        check_choice("dtype", self.dtype, FLOATS)

    def to_json(self) -> dict[str, Any]:
        """Name and parameters."""
        return as_json(self)

    def check(self, output: OutputSpec) -> None:
        """Refuse features."""
        check_kind(self.name, output, "logits")

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """The values `[..., C]` and `.row_max [...]`."""
        return {
            "": ArraySpec(dtype=self.dtype, shape=output.shape, compressed=self.compact),
            ".row_max": ArraySpec(dtype="float32", shape=output.shape[:-1], compressed=self.compact),
        }

    def encode(self, values: Tensor, keys: NDArray[np.uint64] | None = None) -> dict[str, NDArray[Any]]:
        """`z - max` and max of logits `[B, ..., C]`."""
        wide = widened(values)
        row_max = wide.amax(dim=-1)
        below = narrowed(self.dtype, wide - row_max.unsqueeze(-1), wide)
        return {"": below.cpu().numpy(), ".row_max": row_max.float().cpu().numpy()}

    def decode(self, arrays: Mapping[str, NDArray[Any]], output: OutputSpec) -> DenseTargets:
        """Targets of stored rows; the arrays are not copied."""
        return DenseTargets(values=torch.from_numpy(arrays[""]), row_max=torch.from_numpy(arrays[".row_max"]))
