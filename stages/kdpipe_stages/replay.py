"""That the student is shown what the teacher was: the same partners of mixed rows, and rows that a store keeps.

Shapes: n rows that a store keeps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdpipe.data.columns import Column, Columns, Ragged
from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import StaleStoreError
from kdpipe.fingerprint import uniform_by_id
from kdpipe.store import TargetStore
from kdpipe.store.kept import KEPT_ROWS, KEPT_VIEW, KeptViews, is_intact
from kdpipe.views import Read, ViewSpec, look_the_same, taken

_ALLOWED = "pixels by one step in 1 % of them, floats by 1e-5 of the largest at their place, other values not at all"


def check_partners(store: TargetStore, inputs: PreparedInputs, views: ViewSpec, name: str) -> None:
    """Raise `StaleStoreError` where views mix rows, and the teacher `name` saw them mixed with other ones."""
    if views.partners is None:
        return
    same_rows = np.array_equal(store.sample_ids, inputs.sample_ids)
    if not (same_rows and has_splits_of(store, views)):
        what = "splits" if same_rows else "rows, or another order of them,"
        raise StaleStoreError(
            f"{store.path} holds rows that views.transform mixed with others than it would now: it is about other "
            f"{what} than data/prepared. Run `kdpipe cache-teacher {name}`."
        )


def has_splits_of(store: TargetStore, views: ViewSpec) -> bool:
    """Whether a store was told of the splits that mix rows today; of none where they are not mixed."""
    then, now = store.rows.splits, None if views.partners is None else views.partners.splits
    if then is None or now is None:
        return then is now
    return np.array_equal(then, now)


def check_kept_views(store: TargetStore, inputs: PreparedInputs, views: ViewSpec, name: str) -> None:
    """Raise `StaleStoreError` where view 1 of the rows that a store of teacher `name` keeps looks otherwise today."""
    kept = store.kept_views() if views.count else None
    if kept is not None:
        _compared(store, kept, inputs, inputs.read, views, name)


def keep_views(
    store: TargetStore, inputs: PreparedInputs, read: Read, views: ViewSpec, name: str, *, repair: bool = False
) -> None:
    """Keep `KEPT_ROWS` rows as view 1 shows them, chosen by their ids among those that are wanted there.

    Those that are kept stay while they are wanted, and must look the same (`StaleStoreError`). `repair` chooses anew
    where views.parquet is damaged.
    """
    wanted = np.concatenate([np.zeros(0, np.bool_), *(store.wanted(KEPT_VIEW, shard) for shard in store.shards)])
    if not views.count or not wanted.any() or (repair and not is_intact(store.path, store.extent.views_sha256)):
        store.keep_views(None)
    if not views.count or not wanted.any():
        return
    kept, rows = store.kept_views(), np.zeros(0, np.int64)
    before = 0 if kept is None else len(kept)
    if kept is not None:
        kept, rows = _compared(store, kept, inputs, read, views, name)
        kept, rows = kept.take(np.flatnonzero(wanted[rows])), rows[wanted[rows]]
    wanted[rows] = False
    free = np.flatnonzero(wanted)
    if len(rows) == before and (len(rows) == KEPT_ROWS or not len(free)):
        return
    if not len(free):  # some left, and there are no others
        store.keep_views(kept)
        return
    draws = uniform_by_id(inputs.sample_ids[free].tolist(), 0, "kept")
    chosen = free[np.argsort(draws, kind="stable")[: KEPT_ROWS - len(rows)]]
    shown = _shown(inputs, read, views, chosen)
    store.keep_views(shown if kept is None else kept.with_more(shown))


def _shown(inputs: PreparedInputs, read: Read, views: ViewSpec, rows: NDArray[np.int64]) -> KeptViews:
    ids = inputs.sample_ids
    shown = views.read(read, ids, rows, KEPT_VIEW)
    partners = np.full(len(rows), "") if shown.partners is None else ids[shown.partners]
    return KeptViews(sample_ids=ids[rows], partners=partners, columns=shown.columns)


def _compared(
    store: TargetStore, kept: KeptViews, inputs: PreparedInputs, read: Read, views: ViewSpec, name: str
) -> tuple[KeptViews, NDArray[np.int64]]:
    """Kept rows that are prepared, and mixed with the same ones as then, and their row numbers; they look the same."""
    present = np.flatnonzero(np.isin(inputs.sample_ids, kept.sample_ids))
    row_of = dict(zip(inputs.sample_ids[present].tolist(), present.tolist(), strict=True))
    places = np.array([place for place, each in enumerate(kept.sample_ids.tolist()) if each in row_of], np.int64)
    rows = np.array([row_of[each] for each in kept.sample_ids[places].tolist()], np.int64)
    if not len(rows):
        return kept.take(places), rows
    kept, shown = kept.take(places), _shown(inputs, read, views, rows)
    same = np.flatnonzero(kept.partners == shown.partners)
    kept, found = kept.take(same), taken(shown.columns, same)
    for column, then in kept.columns.items():
        if column not in found or not _like(then, found[column]) or not look_the_same(then, found[column]):
            raise StaleStoreError(_difference(store, kept, column, found, name))
    return kept, rows[same]


def _like(column: Column, other: Column) -> bool:
    """Whether two columns have one dtype and, but for ragged rows, one shape."""
    if isinstance(column, Ragged) or isinstance(other, Ragged):
        return isinstance(column, Ragged) and isinstance(other, Ragged) and column.values.dtype == other.values.dtype
    return column.dtype == other.dtype and column.shape == other.shape


def _difference(store: TargetStore, kept: KeptViews, column: str, found: Columns, name: str) -> str:
    apart = [np.inf] * len(kept)
    if column in found and _like(kept.columns[column], found[column]):
        apart = [_apart(kept.columns[column], found[column], row) for row in range(len(kept))]
    worst = int(np.argmax(apart))
    how = f"differs by up to {apart[worst]:.3g}" if np.isfinite(apart[worst]) else "has another size or type"
    recorded = ", ".join(f"{key} {each}" for key, each in store.manifest.recorded.items())
    return (
        f"{store.path} keeps {len(kept)} rows as its teacher was shown them, and views.transform shows others today: "
        f"in view {KEPT_VIEW}, {column!r} of {kept.sample_ids[worst]} {how} (allowed: {_ALLOWED}). A library that "
        f"makes the views has changed. Install the one of then again (the store was begun with {recorded}), or remove "
        f"data/targets/{name} and data/.work/{store.fingerprint}, and run `kdpipe cache-teacher {name}`."
    )


def _apart(column: Column, other: Column, row: int) -> float:
    """The largest difference of two versions of a row; infinite where they cannot be compared."""
    one, two = (np.asarray(each.row(row) if isinstance(each, Ragged) else each[row]) for each in (column, other))
    if one.shape != two.shape:
        return float("inf")
    one, two = one.astype(np.float64), two.astype(np.float64)
    differs = (one != two) & ~(np.isnan(one) & np.isnan(two))
    return float(np.nan_to_num(np.abs(one - two)[differs], nan=np.inf, posinf=np.inf).max(initial=0))
