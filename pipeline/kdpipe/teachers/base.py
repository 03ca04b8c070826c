"""The `Teacher` protocol.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.inputs import LOGITS
from kdpipe.targets import OutputSpec

__all__ = [
    "CLASS_IDS",
    "COVERED",
    "LOGITS",
    "LOG_PROBS",
    "TAIL_LOG_MASS",
    "Learner",
    "Teacher",
    "abstains",
]

CLASS_IDS, LOG_PROBS, TAIL_LOG_MASS = "class_ids", "log_probs", "tail_log_mass"
"""Keys of `predict`'s answer of a teacher that knows k classes only: int64 `[B, …, k]`, ascending; log-probs at T = 1,
-inf in a place without class; and the log of all other classes' mass `[B, …]`."""
COVERED = "covered"
"""Key of `predict`'s answer where a teacher abstains: bool `[B]` or `[B, T]`, like the logits without their classes."""


@runtime_checkable
class Teacher(Protocol):
    """Any model that says something about rows.

    One that abstains from some of them has an attribute `abstains`, true, and `predict` gives `covered` as well. One
    that knows its most probable classes only has an attribute `num_kept`, k, and gives `class_ids`, `log_probs` and
    `tail_log_mass` in place of the logits. One that can tell how many tokens rows are has `lengths(columns)`, int64
    `[B]`. Let errors of memory that ran out (`kdpipe.errors.is_out_of_memory`) pass: fewer rows are tried then.
    """

    @property
    def outputs(self) -> Sequence[OutputSpec]:
        """What it emits; `logits` are among it."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """JSON values of whatever changes its numbers: weights' digest, code, arguments, preprocess, numeric mode."""

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """Every output `[B, …]` for a batch of prepared rows; the same for the same batch."""


@runtime_checkable
class Learner(Protocol):
    """A teacher that learns from rows before it speaks (`teachers.<name>.fit_on`)."""

    def fit(self, blocks: Iterable[tuple[Columns, NDArray[np.int64]]]) -> None:
        """Learn from blocks of prepared rows and their labels `[B]` (-1: none)."""

    def save(self, folder: Path) -> None:
        """Write what was learnt into an empty folder, the same bytes for the same rows."""

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote. Nothing is unpickled."""


def abstains(teacher: Teacher) -> bool:
    """Whether a teacher speaks about some rows only."""
    return bool(getattr(teacher, "abstains", False))
