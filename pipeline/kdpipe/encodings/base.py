"""What every encoding is, and the little that all of them share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.errors import ConfigError
from kdpipe.targets import OutputSpec, Targets

FLOATS = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a store: its dtype (NumPy name), its shape per row, and whether its chunks are compressed."""

    dtype: str
    shape: tuple[int, ...]
    compressed: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes per row, uncompressed."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


class TargetEncoding(Protocol):
    """Values <-> stored arrays."""

    def to_json(self) -> dict[str, Any]:
        """Name and parameters, as they stand in a manifest."""

    def check(self, output: OutputSpec) -> None:
        """Raise `ConfigError` for an output that the encoding cannot hold."""

    def arrays(self, output: OutputSpec) -> dict[str, ArraySpec]:
        """The arrays that one output needs, by name suffix ("" is the output's own name)."""

    def encode(self, values: Tensor, keys: NDArray[np.uint64] | None = None) -> dict[str, NDArray[Any]]:
        """Arrays of a batch's values `[B, ..., C]`, same suffixes as `arrays`; no row is NaN, +inf or all -inf.

        `keys [B]` is one number per row, a hash of its sample id and view; only `sampled` needs it.
        """

    def decode(self, arrays: Mapping[str, NDArray[Any]], output: OutputSpec) -> Targets:
        """Targets of stored rows."""


class _Named(Protocol):
    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


def as_json(encoding: _Named) -> dict[str, Any]:
    """Name and parameters; `compact` stands only where it is set, so that old fingerprints stay what they were."""
    parameters = {key: list(each) if isinstance(each, tuple) else each for key, each in asdict(encoding).items()}
    if not parameters["compact"]:
        del parameters["compact"]
    return {"name": encoding.name, **parameters}


def check_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Refuse a parameter that is none of its choices."""
    if value not in choices:
        raise ConfigError(f"{key} {value!r} is unknown; the choices are {', '.join(choices)}")


def check_kind(name: str, output: OutputSpec, kind: Literal["logits", "features"]) -> None:
    """Refuse features where logits are expected, and the other way round."""
    if output.kind != kind:
        choices = {"logits": "dense, int8, topk, sampled", "features": "features, features_int8"}[output.kind]
        raise ConfigError(
            f"encoding {name!r} holds {kind}, but the output {output.name!r} is {output.kind}; the choices for it are "
            f"{choices}"
        )


def narrowed(dtype: str, values: Tensor, source: Tensor) -> Tensor:
    """Values `[..., C]` in a float dtype: what is below its range is its lowest number; -inf is -inf in `source` only.

    `source [..., C]`: what the values were made of.
    """
    narrow = FLOATS[dtype]
    lowest = torch.finfo(narrow).min
    if bool((values.amin(dim=-1) >= lowest).all()):  # as nearly always; `where` costs ten times as much
        return values.to(narrow)
    return torch.where(torch.isneginf(source), values, values.clamp(min=lowest)).to(narrow)
