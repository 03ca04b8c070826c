"""Which row of a store each line of a table is about.

Shapes: M lines of the table, N rows of the store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdpipe.errors import DataError, some
from kdpipe.store.rows import SampleIndex
from kdpipe.store.tables.importing import TableTargets

_KEYED = re.compile(r"(.+)-[0-9a-f]{16}", re.DOTALL)
_UNKNOWN, _AMBIGUOUS = -1, -2


@dataclass(frozen=True, kw_only=True)
class OwnRows:
    """A store of the table alone: ids `[N]`, which of them have augmented views `[N]`, the row of each line `[M]`."""

    sample_ids: NDArray[np.str_]
    num_views: int
    in_views: NDArray[np.bool_]
    rows: NDArray[np.int64]


def own_rows(said: TableTargets) -> OwnRows:
    """Rows in the table's order of view 0, which has every sample; each further view has the same ones of them.

    Raises `DataError` for other tables.
    """
    ids, views = said.index
    present = np.unique(views)
    num_views = len(present)
    if present[-1] != num_views - 1:
        raise DataError(
            f"{said.table.path} has {num_views} views, of numbers up to {present[-1]}; expected 0..{num_views - 1}"
        )
    sample_ids = ids[views == 0]
    rows = SampleIndex(sample_ids).find(ids)
    _check_once(said, rows, views)
    shown = np.zeros((num_views, len(sample_ids)), np.bool_)
    shown[views[rows >= 0], rows[rows >= 0]] = True
    for view in range(1, num_views):
        odd = (shown[view] != shown[1]).any() or (rows[views == view] < 0).any()
        if odd:
            raise DataError(
                f"{said.table.path}: view {view} is about other samples than view {0 if view == 1 else 1}; expected "
                f"view 0 of every sample, and of some of them, always the same, views 1..{num_views - 1}"
            )
    return OwnRows(sample_ids=sample_ids, num_views=num_views, in_views=shown[-1], rows=rows)


def prepared_rows(said: TableTargets, sample_ids: NDArray[np.str_]) -> NDArray[np.int64]:
    """The prepared row `[M]` of each line, by its id, or by its key alone where no two rows have that key.

    Raises `DataError` for lines that belong to no row or to several, and for two lines about one row and view.
    """
    ids, views = said.index
    rows = SampleIndex(sample_ids).find(ids)
    if (rows == _UNKNOWN).any():
        row_of: dict[str, int] = {}
        for row, sample_id in enumerate(sample_ids.tolist()):
            if keyed := _KEYED.fullmatch(sample_id):
                row_of[keyed[1]] = _AMBIGUOUS if keyed[1] in row_of else row
        for line in np.flatnonzero(rows == _UNKNOWN).tolist():
            rows[line] = row_of.get(str(ids[line]), _UNKNOWN)
    for wrong, what in ((_UNKNOWN, "are none of"), (_AMBIGUOUS, "are keys of several of")):
        lines = np.flatnonzero(rows == wrong)
        if len(lines):
            several = wrong == _AMBIGUOUS
            raise DataError(
                f"{said.table.path}: {len(lines)} of {len(ids)} sample ids {what} the {len(sample_ids)} prepared rows, "
                f"such as {', '.join(map(repr, ids[lines[:3]].tolist()))}; expected ids such as "
                f"{str(sample_ids[0])!r}, or their keys where only one row has it"
                + (_several(str(ids[lines[0]]), sample_ids) if several else "")
            )
    _check_once(said, rows, views)
    return rows


def _several(key: str, sample_ids: NDArray[np.str_]) -> str:
    """What to do about a key of several rows, for the end of a message."""
    rows = [each for each in sample_ids.tolist() if (keyed := _KEYED.fullmatch(each)) and keyed[1] == key]
    return (
        f". {key!r} is the key of {some(rows)}: a row that was edited is two, as what it was before stays prepared. "
        "Name the one that is meant, or have today's rows prepared only: remove data/prepared and run `kdpipe "
        "prepare-data`"
    )


def _check_once(said: TableTargets, rows: NDArray[np.int64], views: NDArray[np.int64]) -> None:
    """Refuse two lines about the same row and view."""
    order = np.lexsort((rows, views))
    same = (np.diff(rows[order]) == 0) & (np.diff(views[order]) == 0) & (rows[order[1:]] >= 0)
    if same.any():
        ids = said.index[0][order[1:][same]]
        raise DataError(
            f"{said.table.path}: {len(ids)} lines are about a sample and view that an earlier line is about, such as "
            f"{str(ids[0])!r}"
        )
