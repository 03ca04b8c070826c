from __future__ import annotations

import json
import subprocess
import sys
import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.config import Factory
from kdpipe.errors import ConfigError, DataError
from kdpipe.preprocess import Preprocess
from kdpipe.preprocess.columns import ColumnEncoder
from kdpipe.tasks.tabular import TabularClassification

NUMBERS = ["age", "fare"]
TASK = TabularClassification(num_classes=2, columns=NUMBERS, categorical=["deck", "home town"], missing="allow")


def columns_of(age, fare, deck, town):
    batch = pa.RecordBatch.from_pydict(
        {
            "age": pa.array(age, pa.float64()),
            "fare": pa.array(fare, pa.float64()),
            "deck": pa.array(deck, pa.string()),
            "home town": pa.array(town, pa.string()),
        }
    )
    return TASK.to_inputs(batch, lambda position: f"row {position}")


ROWS = columns_of(
    age=[20, None, 40, 90, 30], fare=[1, 2, 3, 4, 5], deck=["B", None, "A", "B", "C"], town=["Rome"] * 4 + ["Oslo"]
)
NEW = columns_of(age=[None, 50], fare=[None, 3], deck=["Z", ""], town=["Oslo", "Rome"])


def fitted(*blocks, **arguments):
    encoder = ColumnEncoder(NUMBERS, **arguments)
    encoder.fit(blocks or [ROWS])
    return encoder


def encoded(encoder, columns):
    """Output by feature name."""
    found = encoder(columns)
    assert found.dtype.is_floating_point
    return dict(zip(encoder.feature_names(), found.numpy().T.tolist(), strict=True))


def test_it_is_a_preprocess():
    assert isinstance(ColumnEncoder(NUMBERS), Preprocess)


def test_numbers_are_filled_then_scaled_and_categories_are_one_hot():
    found = encoded(fitted(), ROWS)
    age = np.array([20, 35, 40, 90, 30])  # the median of the four is 35
    assert list(found) == [
        *NUMBERS,
        *("deck_A", "deck_B", "deck_C", "deck_nan"),
        *("home town_Oslo", "home town_Rome"),
    ]
    np.testing.assert_allclose(found["age"], (age - age.mean()) / age.std(), rtol=1e-6)
    np.testing.assert_allclose(found["fare"], [-(2**0.5), -(0.5**0.5), 0, 0.5**0.5, 2**0.5], rtol=1e-6, atol=1e-6)
    assert found["deck_B"] == [1, 0, 0, 1, 0]
    assert found["deck_nan"] == [0, 1, 0, 0, 0]
    assert found["home town_Oslo"] == [0, 0, 0, 0, 1]


def test_rows_that_were_not_there_when_it_was_fitted():
    found = encoded(fitted(scale="none"), NEW)
    assert found["age"] == [35, 50]
    assert found["fare"] == [3, 3]
    assert [found[f"deck_{each}"] for each in ("A", "B", "C")] == [[0, 0]] * 3  # Z is unknown, an empty text missing
    assert found["deck_nan"] == [0, 1]


@pytest.mark.parametrize(("impute", "value"), [("mean", 45), ("median", 35), ("most_frequent", 20)])
def test_ways_to_fill(impute, value):
    assert encoded(fitted(impute=impute, scale="none"), ROWS)["age"] == [20, value, 40, 90, 30]


def test_numbers_may_stay_missing():
    for scale in ("none", "standard"):
        found = encoded(fitted(impute="none", scale=scale), ROWS)
        assert np.isnan(found["age"]).tolist() == [False, True, False, False, False]
        assert not np.isnan(found["fare"]).any()


def test_rare_categories_and_unknown_ones_share_a_column():
    found = encoded(fitted(min_frequency=2), NEW)
    assert [name for name in found if name.startswith("deck")] == ["deck_B", "deck_infrequent_sklearn"]
    assert found["deck_infrequent_sklearn"] == [1, 1]
    assert encoded(fitted(min_frequency=0.3), NEW) == found


def test_where_a_number_was_missing_can_be_told():
    found = encoded(fitted(add_missing_indicators=True), NEW)
    assert [name for name in found if name.startswith("missing")] == ["missingindicator_age"]
    assert found["missingindicator_age"] == [1, 0]


def test_a_column_without_any_number():
    nothing = columns_of([None, None], [1, 2], ["A", "B"], ["x", "y"])
    for impute in ("median", "mean", "most_frequent"):
        assert encoded(fitted(nothing, impute=impute), nothing)["age"] == [0, 0]


def test_numbers_alone_and_categories_alone():
    numbers = {"features": ROWS["features"]}
    assert list(encoded(fitted(numbers), numbers)) == NUMBERS
    categories = {name: column for name, column in ROWS.items() if name != "features"}
    encoder = ColumnEncoder([])
    encoder.fit([categories])
    assert encoder(categories).shape == (5, 6)


@given(
    st.lists(
        st.tuples(
            st.none() | st.floats(-1e3, 1e3, width=32),
            st.none() | st.floats(-1e3, 1e3, width=32),
            st.none() | st.sampled_from("ABZ"),
            st.none() | st.text(max_size=3),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_row_is_encoded_alike_alone_and_among_others(rows):
    encoder = ENCODER
    together = encoder(columns_of(*zip(*rows, strict=True))).numpy()
    alone = np.concatenate([encoder(columns_of(*zip(row, strict=True))).numpy() for row in rows])
    np.testing.assert_array_equal(together, alone)
    assert np.isfinite(together).all()


ENCODER = fitted(min_frequency=2, add_missing_indicators=True)


def test_state_is_json_and_all_that_is_needed():
    encoder = fitted()
    state = json.loads(json.dumps(encoder.state()))
    again = ColumnEncoder(NUMBERS)
    again.load_state(state)
    for columns in (ROWS, NEW):
        assert again(columns).numpy().tolist() == encoder(columns).numpy().tolist()
    assert again.feature_names() == encoder.feature_names()
    assert again.state() == state


SAME = """
import json, sys
sys.path.insert(0, sys.argv[1])
from preprocess import test_columns
print(json.dumps(dict(test_columns.fitted().state())))
"""


def test_the_same_rows_give_the_same_state_in_any_blocks_and_process(request):
    state = fitted().state()
    assert fitted().state() == state
    halves = [columns_of([20, None], [1, 2], ["B", None], ["Rome"] * 2)]
    halves.append(columns_of([40, 90, 30], [3, 4, 5], ["A", "B", "C"], ["Rome", "Rome", "Oslo"]))
    assert fitted(*halves).state() == state
    assert fitted(ROWS, NEW).state() != state
    command = [sys.executable, "-c", SAME, str(request.path.parents[1])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == state


def test_another_scikit_learn_is_refused():
    state = {**fitted().state(), "scikit-learn": "0.1"}
    with pytest.raises(ConfigError, match=r"was fitted with scikit-learn 0\.1; here is .* train the model again"):
        ColumnEncoder(NUMBERS).load_state(state)


def test_before_it_is_fitted():
    for use in (
        lambda encoder: encoder.state(),
        lambda encoder: encoder(ROWS),
        lambda encoder: encoder.feature_names(),
    ):
        with pytest.raises(ConfigError, match="ColumnEncoder is not fitted: train the model here"):
            use(ColumnEncoder(NUMBERS))


@pytest.mark.parametrize("min_frequency", [0, -1, 0.0, 1.0, 1.5])
def test_frequencies_that_mean_nothing(min_frequency):
    with pytest.raises(ConfigError, match="expected a whole number of rows, or a share below 1"):
        ColumnEncoder(NUMBERS, min_frequency=min_frequency)


def test_other_rows_are_refused():
    with pytest.raises(ConfigError, match="is for tables; rows here have image"):
        fitted({"image": np.zeros((2, 8, 8, 1), np.uint8)})
    with pytest.raises(DataError, match="rows have 2 numbers; expected 1: age"):
        ColumnEncoder(["age"]).fit([ROWS])
    with pytest.raises(DataError, match="transform failed"):
        fitted()({"features": ROWS["features"]})


MODULE = """
import numpy as np
from sklearn.preprocessing import FunctionTransformer


def make(power=1):
    return FunctionTransformer(ratios, kw_args={"power": power})


def ratios(table, power):
    assert list(table.columns) == ["age", "fare", "deck", "home town"]
    town = table["home town"].fillna("nowhere").str.len()
    return np.stack([table["age"].fillna(0) / table["fare"] ** power, town], axis=1)


def other():
    return 3


class Wrong:
    def fit(self, table):
        pass

    def transform(self, table):
        return [1.0, 2.0]
"""


@pytest.fixture
def module(tmp_path):
    """A module of the user's beside params.yaml; its name."""
    name = f"features_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def test_a_transformer_of_ones_own(tmp_path, module):
    factory = Factory(path=f"{module}:make", arguments={"power": 2})
    encoder = fitted(transformer=factory, trusted=[f"{module}.ratios"], root=tmp_path)
    again = ColumnEncoder(NUMBERS, transformer=factory, trusted=[f"{module}.ratios"], root=tmp_path)
    again.load_state(encoder.state())
    expected = [[20, 4], [0, 4], [40 / 9, 4], [90 / 16, 4], [30 / 25, 4]]
    for each in (encoder, again):
        np.testing.assert_allclose(each(ROWS), expected, rtol=1e-6)


def test_scikit_learns_own_need_no_trust(tmp_path):
    factory = Factory(path="sklearn.preprocessing:OneHotEncoder", arguments={"handle_unknown": "ignore"})
    found = fitted(transformer=factory, root=tmp_path)(ROWS)  # sparse
    assert found.shape == (5, 5 + 5 + 4 + 2)
    assert found.sum(dim=1).tolist() == [4] * 5


def test_a_transformer_that_is_not_trusted_is_told_when_it_is_fitted(tmp_path, module):
    with pytest.raises(ConfigError, match=rf"not known to be safe: {module}\.ratios.* name them in `trusted:`"):
        fitted(transformer=Factory(path=f"{module}:make"), root=tmp_path)


def test_wrong_transformers(tmp_path, module):
    with pytest.raises(ConfigError, match=f"names a file; expected a module, `{module}:make`"):
        ColumnEncoder(NUMBERS, transformer=Factory(path=f"{module}.py:make"), root=tmp_path)
    with pytest.raises(ConfigError, match="gave int; expected a scikit-learn transformer, with fit and transform"):
        ColumnEncoder(NUMBERS, transformer=Factory(path=f"{module}:other"), root=tmp_path)
    with pytest.raises(ConfigError, match=r"preprocess\.transformer\.powers: .* it takes power"):
        ColumnEncoder(NUMBERS, transformer=Factory(path=f"{module}:make", arguments={"powers": 2}), root=tmp_path)
    encoder = fitted(transformer=Factory(path=f"{module}:Wrong"), trusted=[f"{module}.Wrong"], root=tmp_path)
    with pytest.raises(DataError, match=r"transform gave shape \[2\] for 5 rows; expected \[B, D\]"):
        encoder(ROWS)


def test_the_code_of_a_transformer_counts(tmp_path, module):
    arguments = {"transformer": {"factory": f"{module}:make"}}
    before = ColumnEncoder.reads(arguments, tmp_path)
    assert before
    assert ColumnEncoder.reads({}, tmp_path) == {}
    (tmp_path / f"{module}.py").write_text(MODULE + "\n")
    assert ColumnEncoder.reads(arguments, tmp_path) != before
