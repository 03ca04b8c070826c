"""How targets are laid out in a store's arrays: a closed set, name -> class. What is written says what it is.

Shapes: B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.targets import DenseTargets, OutputSpec, Targets

_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a store: its dtype (NumPy name) and shape per row."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


class TargetEncoding(Protocol):
    """Values <-> stored arrays."""

    def to_json(self) -> dict[str, Any]:
        """Name and parameters, as they stand in a manifest."""

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """The arrays that one output needs, by name suffix ("" is the output's own name)."""

    def encode(self, logits: Tensor) -> dict[str, NDArray[Any]]:
        """Arrays of a batch's logits `[B, ..., C]`, same keys as `arrays`."""

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> Targets:
        """Targets of stored rows."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Every class: `z - max` as float16 or float32, and the row's maximum as float32.

    float16 keeps 11 bits: |error| <= |z - max| * 2^-11, plus 2^-25 below the normal range; a class more than 65504
    below the maximum counts as 65504 below. A masked class stays -inf.
    """

    dtype: str = "float16"

    def __post_init__(self) -> None:
        """Refuse an unknown dtype."""
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; the choices are {', '.join(_DTYPES)}")

    def to_json(self) -> dict[str, Any]:
        """Name and dtype."""
        return {"name": "dense", "dtype": self.dtype}

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """The values `[..., C]` and `.row_max [...]`."""
        return {
            "": ArraySpec(dtype=self.dtype, shape=output.shape),
            ".row_max": ArraySpec(dtype="float32", shape=output.shape[:-1]),
        }

    def encode(self, logits: Tensor) -> dict[str, NDArray[Any]]:
        """`z - max` and max of logits `[B, ..., C]`."""
        wide = logits.float()
        row_max = wide.amax(dim=-1)
        below = wide - row_max.unsqueeze(-1)
        dtype = _DTYPES[self.dtype]
        clamped = torch.where(torch.isneginf(below), below, below.clamp(min=torch.finfo(dtype).min))
        return {"": clamped.to(dtype).cpu().numpy(), ".row_max": row_max.cpu().numpy()}

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> DenseTargets:
        """Targets of stored rows; the arrays are not copied."""
        return DenseTargets(values=torch.from_numpy(arrays[""]), row_max=torch.from_numpy(arrays[".row_max"]))


ENCODINGS: Mapping[str, type[Dense]] = {"dense": Dense}


def encoding_from_json(value: Mapping[str, Any]) -> TargetEncoding:
    """The encoding that a manifest names. Raises `ConfigError` for an unknown name or parameter."""
    parameters = {key: parameter for key, parameter in value.items() if key != "name"}
    if value["name"] not in ENCODINGS:
        raise ConfigError(f"encoding {value['name']!r} is unknown; the choices are {', '.join(ENCODINGS)}")
    try:
        return ENCODINGS[value["name"]](**parameters)
    except TypeError as error:
        raise ConfigError(f"encoding {value['name']!r} has other parameters than {parameters}: {error}") from None
