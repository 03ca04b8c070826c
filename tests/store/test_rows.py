from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data.columns import text_pieces
from kdpipe.errors import ConfigError
from kdpipe.store import TargetStore, WithTargets
from kdpipe.store.rows import SampleIndex, grouped
from store.test_stream import store_of

KEYS = st.lists(st.integers(0, 9) | st.integers(0, 2**40), max_size=40)
IDS = st.text("abé-01", min_size=1, max_size=6)


@given(keys=KEYS, start=st.sampled_from([-3, 0, 2**50]))
def test_groups_are_every_key_with_its_positions_in_order(keys, start):
    keys = np.array(keys, np.int64) + start
    found = [(key, here.tolist()) for key, here in grouped(keys)]
    assert found == [(key, np.flatnonzero(keys == key).tolist()) for key in np.unique(keys).tolist()]


@given(known=st.lists(IDS, unique=True, max_size=20), wanted=st.lists(IDS, max_size=20))
def test_rows_are_found_by_id(known, wanted):
    row_of = {sample_id: row for row, sample_id in enumerate(known)}
    found = SampleIndex(np.array(known, np.str_)).find(wanted + known)
    assert found.tolist() == [row_of.get(sample_id, -1) for sample_id in wanted + known]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("store"), num_rows=40, num_views=1)


@pytest.mark.parametrize("rows", [[], [7], [39, 3, 3, 20]])
def test_ids_of_rows_are_in_their_order(store, rows):
    assert store.rows.ids_of(np.array(rows, np.int64)).tolist() == [f"row-{row}" for row in rows]


def test_a_store_started_with_a_column_of_ids_has_the_same_bytes(store, tmp_path):
    ids = pa.chunked_array([store.sample_ids[:13].tolist(), store.sample_ids[13:].tolist()])
    again = TargetStore.create(tmp_path / "again", store.manifest, text_pieces(ids.chunks), store.digests)
    assert (again.path / "rows.parquet").read_bytes() == (store.path / "rows.parquet").read_bytes()


@pytest.mark.parametrize(("single", "found"), [("row-1", "a single id, 'row-1'"), (7, "a single id, 7")])
def test_a_single_id_is_no_sequence(store, single, found):
    for ask in (store.targets, store.rows_of):
        with pytest.raises(ConfigError, match=f"found {found}; expected a sequence of sample ids"):
            ask(single)


def test_ids_are_text_and_a_view_is_a_number(store):
    assert store.rows_of([b"row-1"]).tolist() == [1]
    with pytest.raises(ConfigError, match=r"sample ids are text; found bytes, such as b'row \\xc3\\xbc'"):
        store.targets([b"row-1", "row ü".encode()])
    for view in ("0", None, 0.0, True):
        with pytest.raises(ConfigError, match=rf"view is {view!r}; expected the number of a view"):
            store.targets(["row-1"], view=view)
    assert len(store.targets(["row-1"], view=np.int64(0)).values) == 1


def test_ids_of_several_axes_are_refused(store):
    with pytest.raises(ConfigError, match=r"found ids of shape \[2, 1\]; expected a sequence"):
        store.targets([["row-1"], ["row-2"]])
    with pytest.raises(ConfigError, match=r"found ids of shape \[1, 5\]; expected a sequence"):
        WithTargets([0], store, [list("row-1")])
