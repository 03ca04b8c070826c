"""Which row of a store each line of a table is about.

Shapes: M lines of the table, N rows of the store.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from kdpipe.errors import DataError
from kdpipe.store.tables.importing import TableTargets

_KEYED = re.compile(r"(.+)-[0-9a-f]{16}", re.DOTALL)
_UNKNOWN, _AMBIGUOUS = -1, -2


def own_rows(said: TableTargets) -> tuple[NDArray[np.str_], int, NDArray[np.int64]]:
    """A store of the table alone: sample ids `[N]` in its order of view 0, number of views, row of each line `[M]`.

    Raises `DataError` unless every sample has every view once.
    """
    ids, views = said.index
    sample_ids, num_views = ids[views == 0], int(views.max()) + 1
    rows = _found(ids, sample_ids)
    _check_once(said, rows, views)
    if (rows < 0).any() or len(ids) != len(sample_ids) * num_views:
        counts = dict(zip(*np.unique(ids, return_counts=True), strict=True))
        example = min(counts, key=lambda each: (counts[each], each))
        raise DataError(
            f"{said.table.path} has views 0..{num_views - 1}, but not all of them for every sample: {counts[example]} "
            f"of {example}. Export every view, or view 0 alone"
        )
    return sample_ids, num_views, rows


def prepared_rows(said: TableTargets, sample_ids: NDArray[np.str_]) -> NDArray[np.int64]:
    """The prepared row `[M]` of each line, by its id, or by its key alone where no two rows have that key.

    Raises `DataError` for lines that belong to no row or to several, and for two lines about one row and view.
    """
    ids, views = said.index
    rows = _found(ids, sample_ids)
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
            raise DataError(
                f"{said.table.path}: {len(lines)} of {len(ids)} sample ids {what} the {len(sample_ids)} prepared rows, "
                f"such as {', '.join(map(repr, ids[lines[:3]].tolist()))}; expected ids such as "
                f"{str(sample_ids[0])!r}, or their keys where only one row has it"
            )
    _check_once(said, rows, views)
    return rows


def _found(ids: NDArray[np.str_], among: NDArray[np.str_]) -> NDArray[np.int64]:
    """Positions of ids in `among`; -1: not there."""
    if not len(among):
        return np.full(len(ids), _UNKNOWN)
    order = np.argsort(among, kind="stable")
    place = np.minimum(np.searchsorted(among[order], ids), len(among) - 1)
    return np.where(among[order[place]] == ids, order[place], _UNKNOWN)


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
