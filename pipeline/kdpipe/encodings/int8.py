"""Every class in one byte: a scale per row, nothing clipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.encodings.base import ArraySpec, as_json, check_kind
from kdpipe.errors import ConfigError
from kdpipe.targets import DenseTargets, OutputSpec, widened

NUM_STEPS = 255
_MEANT_AS_MASK = 1e8


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Every class as one byte: `z - max ~ -code * scale`, `scale = (max - min) / 255`. C + 8 bytes per row.

    |error| <= scale / 2, so T^2 KL <= scale^2 / 8 in both directions and at every T (Hoeffding's lemma), plus float32
    rounding of 2^-22 times the row's range. The range is that of the whole row: nothing is clipped. `masked_classes`
    adds one bit per class for teachers that say -inf; the range is then that of the other classes.
    """

    name: ClassVar[str] = "int8"
    compact: bool = False
    masked_classes: bool = False

    def to_json(self) -> dict[str, Any]:
        """Name and parameters."""
        return as_json(self)

    def check(self, output: OutputSpec) -> None:
        """Refuse features."""
        check_kind(self.name, output, "logits")

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """The codes `[..., C]`, `.scale` and `.row_max [...]`, and `.masked [..., ceil(C / 8)]`."""
        tokens, packed = output.shape[:-1], -(-output.shape[-1] // 8)
        arrays = {
            "": ArraySpec(dtype="uint8", shape=output.shape, compressed=self.compact),
            ".scale": ArraySpec(dtype="float32", shape=tokens, compressed=self.compact),
            ".row_max": ArraySpec(dtype="float32", shape=tokens, compressed=self.compact),
        }
        if self.masked_classes:
            arrays[".masked"] = ArraySpec(dtype="uint8", shape=(*tokens, packed), compressed=self.compact)
        return arrays

    def encode(self, values: Tensor, keys: NDArray[np.uint64] | None = None) -> dict[str, NDArray[Any]]:
        """Codes, scales and maxima of logits `[B, ..., C]`. Raises `ConfigError` for -inf without `masked_classes`."""
        wide = widened(values)
        row_max = wide.amax(dim=-1, keepdim=True)
        below = row_max - wide
        masked = torch.isposinf(below)
        if not self.masked_classes and bool(masked.any()):
            raise ConfigError(
                "the teacher masks classes (-inf), which encoding int8 cannot quantise; set masked_classes: true "
                "(--masked-classes of import-targets; one bit per class) or use encoding: dense"
            )
        below = below.masked_fill(masked, 0.0)
        codes, scale = quantised(below)
        row_max = row_max.squeeze(-1).float()
        arrays = {"": codes.cpu().numpy(), ".scale": scale.cpu().numpy(), ".row_max": row_max.cpu().numpy()}
        if self.masked_classes:
            arrays[".masked"] = np.packbits(masked.cpu().numpy(), axis=-1)
        return arrays

    def decode(self, arrays: Mapping[str, NDArray[Any]], output: OutputSpec) -> DenseTargets:
        """Targets of stored rows, values in float32."""
        values = torch.from_numpy(arrays[""]) * -torch.from_numpy(arrays[".scale"]).unsqueeze(-1)
        if self.masked_classes:
            masked = np.unpackbits(arrays[".masked"], axis=-1, count=output.shape[-1]).view(np.bool_)
            values = values.masked_fill(torch.from_numpy(masked), -torch.inf)
        return DenseTargets(values=values, row_max=torch.from_numpy(arrays[".row_max"]))


def quantised(above: Tensor, num_steps: int = NUM_STEPS) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[..., C]` and scales float32 `[...]` of numbers from 0 up: `above ~ code * scale`, to the nearest.

    Raises `ConfigError` where a row's range is that of a mask in disguise (such as -1e9 or the dtype's lowest number).
    """
    largest = above.amax(dim=-1, keepdim=True)
    if bool((largest > _MEANT_AS_MASK).any()):
        raise ConfigError(
            f"a row spans {float(largest.max()):.3g}, which one byte per number cannot hold. Take float16 or float32; "
            "if the teacher masks classes by a large negative number, let it say -inf (and, of encoding int8, set "
            "masked_classes: true)"
        )
    scale = (largest / num_steps).float()
    codes = torch.where(scale > 0, above / scale, 0.0).round().clamp(max=num_steps)
    return codes.to(torch.uint8), scale.squeeze(-1)
