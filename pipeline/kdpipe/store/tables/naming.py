"""Which columns of a table are read, which were meant to be, and which are its maker's own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from kdpipe.errors import DataError
from kdpipe.store.manifest import COVERED, STATISTICS
from kdpipe.store.tables.files import Table

_SPELLINGS = {
    "view": "view",
    "covered": "covered",
    "coverage": "covered",
    "tail_log_mass": "tail_log_mass",
    "tail_mass": "tail_log_mass",
    "tail": "tail_log_mass",
}
"""How a column that may be absent is likely to be called -> its name."""
_NEAR = 0.85
"""How alike two names are that are taken for one: `views` is `view`, a `review` is something else."""


def columns_of(table: Table, features: Sequence[str]) -> list[str]:
    """Columns that hold targets, the one that says most about shapes first. Raises `DataError` where one is absent."""
    is_sparse = "logits" not in table.names
    if is_sparse and "weights" in table.names:
        raise DataError(
            f"{table.path} holds draws from a distribution (weights), which cannot be imported: how often each class "
            "was drawn is not in it. Copy the store's folder instead, or export a store of another encoding"
        )
    names = ["class_ids", "log_probs"] if is_sparse else ["logits"]
    if is_sparse and "tail_log_mass" in table.names:
        names.append("tail_log_mass")
    names += [*features, *([COVERED] if COVERED in table.names else [])]
    absent = [each for each in ("sample_id", *names) if each not in table.names]
    if absent:
        raise DataError(
            f"{table.path} has no column {absent[0]!r}; expected sample_id, and logits or class_ids and log_probs. "
            f"It has {', '.join(table.names)}{_hint(table, absent)}"
        )
    return names


def columns_not_read(table: Table, read: Sequence[str]) -> tuple[str, ...]:
    """A table's other columns. Raises `DataError` for one whose name is nearly that of a column that would be read."""
    others = [each for each in table.names if each not in (*read, "sample_id", "view", *STATISTICS)]
    for name in others:
        for spelling in difflib.get_close_matches(name.lower(), _SPELLINGS, n=1, cutoff=_NEAR):
            meant = _SPELLINGS[spelling]
            if meant not in table.names and not (meant == "tail_log_mass" and "logits" in table.names):
                raise DataError(
                    f"{table.path} has a column {name!r}, which is not read; did you mean {meant!r}? Give it that "
                    "name, or one that is less like it"
                )
    return tuple(others)


def _hint(table: Table, absent: Sequence[str]) -> str:
    """What to add where a column's name is nearly one that is needed."""
    names = {name.lower(): name for name in table.names}
    for needed in (each for each in (*absent, "logits") if each not in table.names):
        for found in difflib.get_close_matches(needed, names, n=1, cutoff=_NEAR):
            return f"; did you mean {needed!r} by {names[found]!r}?"
    return ""
