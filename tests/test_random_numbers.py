from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdpipe.random_numbers import philox, uniform

KEYS = np.random.default_rng(0).integers(0, 2**64, 5, dtype=np.uint64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, expected):
    words = philox(np.array([key[0] | key[1] << 32], np.uint64), tuple(np.uint64(word) for word in counter))
    assert [int(word[0]) for word in words] == expected


@given(
    tokens=st.integers(1, 4),
    draws=st.integers(1, 7),
    more=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
    row=st.integers(0, 4),
)
def test_a_number_depends_on_key_seed_and_place_only(tokens, draws, more, seed, row):
    every = uniform(KEYS, (tokens + more, draws + more), seed)
    assert every.shape == (5, tokens + more, draws + more)
    assert np.array_equal(uniform(KEYS[[row]], (tokens, draws), seed)[0], every[row, :tokens, :draws])
    assert len(np.unique(every)) == every.size
    assert not np.isin(uniform(KEYS, (tokens, draws), (seed + 1) % 2**64), every).any()


def test_rows_without_tokens_are_rows_with_one():
    assert np.array_equal(uniform(KEYS, (9,), 3), uniform(KEYS, (1, 9), 3)[:, 0])


def test_numbers_are_uniform_and_uncorrelated():
    numbers = uniform(np.arange(4000, dtype=np.uint64), (3, 4), 7)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    correlations = np.corrcoef(numbers.reshape(4000, 12).T) - np.eye(12)
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)
    assert abs(np.corrcoef(numbers[:-1, 0, 0], numbers[1:, 0, 0])[0, 1]) < 5 / np.sqrt(4000)


def test_no_rows_and_no_draws_have_no_numbers():
    assert uniform(KEYS[:0], (2, 3), 0).shape == (0, 2, 3)
    assert uniform(KEYS, (0,), 0).shape == (5, 0)
