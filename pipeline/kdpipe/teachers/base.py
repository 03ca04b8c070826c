"""The `Teacher` protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.targets import OutputSpec


@runtime_checkable
class Teacher(Protocol):
    """Any model that says something about rows."""

    @property
    def outputs(self) -> Sequence[OutputSpec]:
        """What it emits."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """JSON values of whatever changes its numbers: weights' digest, code, arguments, preprocess, numeric mode."""

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """Every output `[B, …]` for a batch of prepared rows; the same for the same batch."""
