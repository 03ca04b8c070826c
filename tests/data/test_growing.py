from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data.growing import KEY_BYTES, Growing, KeyTable, text_keys

TEXTS = st.lists(st.lists(st.text(max_size=2), max_size=20), max_size=6)


@given(st.lists(st.lists(st.integers(-5, 5), max_size=9), max_size=5))
def test_what_is_appended_is_there_in_order(blocks):
    grown = Growing(np.int32)
    for block in blocks:
        grown.append(np.array(block))
    expected = [value for block in blocks for value in block]
    assert (grown.values.tolist(), grown.values.dtype, len(grown)) == (expected, np.int32, len(expected))


def test_values_can_be_changed_in_place():
    grown = Growing(np.float32)
    grown.append(np.zeros(3))
    grown.values[[0, 2]] = [1, 2]
    grown.append(np.ones(1))
    assert grown.values.tolist() == [1, 0, 2, 1]


def test_nothing_grows_under_somebodys_hands():
    grown = Growing(np.int8)
    grown.append(np.zeros(3))
    held = grown.values
    with pytest.raises(BufferError):
        grown.append(np.zeros(3))
    assert held.tolist() == [0, 0, 0]


@given(TEXTS, st.lists(st.text(max_size=2), max_size=9))
def test_a_key_table_is_a_dict(blocks, asked):
    """Blocks without repeats within them, against a dict."""
    table, known = KeyTable(), {}
    for block in blocks:
        new = [each for each in dict.fromkeys(block) if each not in known]
        assert table.add(text_keys(new)).tolist() == [-1] * len(new)
        known |= {each: len(known) + place for place, each in enumerate(new)}
    assert len(table) == len(known)
    assert table.find(text_keys(asked)).tolist() == [known.get(each, -1) for each in asked]


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12), st.integers(1, 4))
def test_repeats_are_found_wherever_they_stand(values, block):
    table = KeyTable()
    earlier = np.concatenate(
        [table.add(text_keys(map(str, values[i : i + block]))) for i in range(0, len(values), block)]
    )
    for place, other in enumerate(earlier.tolist()):
        assert other == -1 or (other != place and values[other] == values[place])
    of_value = {value: [place for place, each in enumerate(values) if each == value] for value in values}
    assert [(earlier[places] >= 0).sum() for places in of_value.values()] == [
        len(places) - 1 for places in of_value.values()
    ]


def test_many_keys_in_one_row_of_slots():
    """Keys whose first words are equal, or differ in their upper bits only, as if a hash were bad."""
    keys = np.zeros((5000, KEY_BYTES), np.uint8)
    keys[:, 8:10] = np.arange(5000, dtype="<u2").view(np.uint8).reshape(-1, 2)
    keys[2500:, 7] = 1
    table = KeyTable()
    for start in range(0, 5000, 700):
        assert (table.add(keys[start : start + 700]) == -1).all()
    assert table.find(keys[::-1]).tolist() == list(range(5000))[::-1]
    assert table.add(keys[1234:1235]).tolist() == [1234]


def test_a_table_finds_all_of_many_after_growing():
    keys = np.random.default_rng(0).integers(0, 256, (200_000, KEY_BYTES), np.uint8)
    table = KeyTable()
    for start in range(0, len(keys), 30_000):
        table.add(keys[start : start + 30_000])
    chosen = np.random.default_rng(1).permutation(len(keys))
    assert table.find(keys[chosen]).tolist() == chosen.tolist()
    assert (table.find(keys ^ 1) == -1).all()
