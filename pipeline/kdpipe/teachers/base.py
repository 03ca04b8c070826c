"""The `Teacher` protocol.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.targets import OutputSpec

LOGITS = "logits"
"""Key of `predict`'s answer that every teacher gives."""
COVERED = "covered"
"""Key of `predict`'s answer where a teacher abstains: bool `[B]` or `[B, T]`, like the logits without their classes."""


@runtime_checkable
class Teacher(Protocol):
    """Any model that says something about rows.

    One that abstains from some of them has an attribute `abstains`, true, and `predict` gives `covered` as well.
    """

    @property
    def outputs(self) -> Sequence[OutputSpec]:
        """What it emits; `logits` are among it."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """JSON values of whatever changes its numbers: weights' digest, code, arguments, preprocess, numeric mode."""

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """Every output `[B, …]` for a batch of prepared rows; the same for the same batch."""


def abstains(teacher: Teacher) -> bool:
    """Whether a teacher speaks about some rows only."""
    return bool(getattr(teacher, "abstains", False))
