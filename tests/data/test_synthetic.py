from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdpipe.data.sources import Synthetic
from kdpipe.errors import ConfigError

COLUMNS = {
    "even": {"kind": "uniform", "low": -2, "high": 3},
    "normal": {"kind": "normal", "mean": 5, "std": 2},
    "colour": {"kind": "categorical", "values": ["red", "green"], "weights": [3, 1]},
    "image": {"kind": "image", "shape": [3, 5, 1]},
    "tokens": {"kind": "tokens", "vocabulary": 50, "length": [0, 4]},
    "text": {"kind": "text", "length": 3, "words": ["one", "two", "drei"]},
}


def read(num_rows, columns=COLUMNS, **options):
    return pa.Table.from_batches(list(Synthetic(num_rows=num_rows, columns=columns, **options).batches()))


def test_columns_have_the_types_that_tasks_take():
    types = {field.name: field.type for field in read(3).schema}
    assert types == {
        "id": pa.int64(),
        "even": pa.float64(),
        "normal": pa.float64(),
        "colour": pa.string(),
        "image": pa.list_(pa.uint8(), 15),
        "tokens": pa.list_(pa.int32()),
        "text": pa.string(),
    }


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**63))
def test_more_rows_leave_the_rows_before_what_they_are(few, more, seed):
    assert read(few + more, seed=seed).slice(0, few).equals(read(few, seed=seed))


def test_a_row_does_not_depend_on_the_other_columns():
    alone = read(50, {"normal": COLUMNS["normal"]})
    assert read(50)["normal"].equals(alone["normal"])


def test_rows_do_not_depend_on_blocks():
    """A wide column makes blocks of few rows."""
    wide = {**COLUMNS, "wide": {"kind": "image", "shape": [1000, 1000, 3]}}
    assert len(list(Synthetic(num_rows=5, columns=wide).batches())) > 1
    assert read(5, wide).drop_columns(["wide"]).equals(read(5))


@pytest.mark.parametrize("name", COLUMNS)
def test_seed_and_name_choose_the_numbers(name):
    kind = {name: COLUMNS[name]}
    assert read(20, kind)[name].equals(read(20, kind)[name])
    assert not read(20, kind)[name].equals(read(20, kind, seed=1)[name])
    assert not read(20, kind)[name].equals(read(20, {"other": COLUMNS[name]})["other"])


def test_numbers_are_distributed_as_they_say():
    """Kolmogorov-Smirnov and chi-square tests of fixed draws; each p would be below 0.001 once in 1000 seeds."""
    table = read(20_000)
    assert stats.kstest(table["even"].to_numpy(), stats.uniform(-2, 5).cdf).pvalue > 0.001
    assert stats.kstest(table["normal"].to_numpy(), stats.norm(5, 2).cdf).pvalue > 0.001
    reds = table["colour"].to_pylist().count("red")
    assert stats.binomtest(reds, 20_000, 0.75).pvalue > 0.001
    pixels = table["image"].combine_chunks().flatten().to_numpy()
    assert stats.chisquare(np.bincount(pixels, minlength=256)).pvalue > 0.001
    tokens = np.concatenate([np.array(row, np.int64) for row in table["tokens"].to_pylist()])
    assert stats.chisquare(np.bincount(tokens, minlength=50)).pvalue > 0.001
    lengths = [len(row) for row in table["tokens"].to_pylist()]
    assert stats.chisquare(np.bincount(lengths, minlength=5)).pvalue > 0.001
    words = np.array([row.split(" ") for row in table["text"].to_pylist()])
    assert words.shape == (20_000, 3)
    assert stats.chisquare(np.unique(words, return_counts=True)[1]).pvalue > 0.001


def test_words_may_be_those_of_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("eins\nzwei drei\n", encoding="utf-8")
    column = {"text": {"kind": "text", "length": [1, 3]}}
    found = {word for row in read(50, column, path=tmp_path / "words.txt")["text"].to_pylist() for word in row.split()}
    assert found == {"eins", "zwei", "drei"}


BAD = {
    "no rows": ({"num_rows": 0}, r"num_rows is 0"),
    "no columns": ({"columns": {}}, r"0 columns"),
    "id": ({"columns": {"id": {"kind": "normal"}}}, r"columns\.id: `id` is the row's number"),
    "kind": (
        {"columns": {"x": {"kind": "gauss"}}},
        r"columns\.x\.kind: there is no kind 'gauss'; the kinds are uniform",
    ),
    "no kind": ({"columns": {"x": {}}}, r"columns\.x\.kind: there is no kind"),
    "key": ({"columns": {"x": {"kind": "normal", "sigma": 1}}}, r"columns\.x: sigma: unknown key .*mean, std"),
    "type": ({"columns": {"x": {"kind": "normal", "std": "wide"}}}, r"columns\.x: std: .*found .wide."),
    "missing": ({"columns": {"x": {"kind": "tokens", "length": 3}}}, r"columns\.x: vocabulary: missing"),
    "range": ({"columns": {"x": {"kind": "tokens", "vocabulary": 9, "length": [5, 2]}}}, r"a range such as \[8, 128\]"),
    "length": ({"columns": {"x": {"kind": "tokens", "vocabulary": 9, "length": 0}}}, "length above 0"),
    "shape": ({"columns": {"x": {"kind": "image", "shape": [3, 0, 1]}}}, r"columns\.x: shape\.1"),
    "weights": (
        {"columns": {"x": {"kind": "categorical", "values": [1, 2], "weights": [1]}}},
        "a weight above 0 for each",
    ),
    "values": ({"columns": {"x": {"kind": "categorical", "values": [1, "a"]}}}, r"columns\.x"),
    "words": ({"columns": {"x": {"kind": "text", "length": 3}}}, r"columns\.x: words: missing"),
}


@pytest.mark.parametrize("what", BAD)
def test_settings_that_cannot_be_are_named(what):
    changed, message = BAD[what]
    with pytest.raises(ConfigError, match=message):
        Synthetic(**{"num_rows": 3, "columns": COLUMNS, **changed})
