"""Tables as a model takes them: missing numbers filled, columns scaled, categories as one-hot, by scikit-learn.

Rows have the column `features` (numbers, NaN: missing) and one column `category.NAME` per category (UTF-8 bytes, empty:
missing). Shapes: B batch, D columns.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor

from kdpipe.config import Factory, FactoryField, bind, load_module, package, resolve
from kdpipe.data.columns import Array, Columns, Ragged, texts_of
from kdpipe.errors import ConfigError, DataError
from kdpipe.fingerprint import source_digests
from kdpipe.preprocess.base import State
from kdpipe.skops_files import dumps, loads

FEATURES = "features"
CATEGORY = "category."
_NAME = "preprocess ColumnEncoder"
_WHERE = "preprocess.transformer"


def category_column(name: str) -> str:
    """The prepared column of a category; its files are named so, too."""
    return CATEGORY + quote(name, safe=" ")


def values_by_name(columns: Columns, numeric: Sequence[str]) -> dict[str, Array]:
    """Prepared rows by the source's column names, `[B]` each: numbers (NaN: missing), str objects (None: missing).

    `numeric` are the names of the columns in `features`. Raises `DataError` where they are not as many.
    """
    values: dict[str, Array] = {}
    if FEATURES in columns:
        features = np.asarray(columns[FEATURES])
        if features.shape[1] != len(numeric):
            raise DataError(f"rows have {features.shape[1]} numbers; expected {len(numeric)}: {', '.join(numeric)}")
        values = {name: features[:, index] for index, name in enumerate(numeric)}
    for name, column in columns.items():
        if name.startswith(CATEGORY) and isinstance(column, Ragged):
            texts = [text or None for text in texts_of(column)]
            values[unquote(name.removeprefix(CATEGORY))] = np.array(texts, dtype=object)
    return values


class ColumnEncoder:
    """Numbers and categories -> float32 `[B, D]`, by a scikit-learn `ColumnTransformer` fitted on the training rows.

    Missing numbers are filled with the column's `impute` (`none`: they stay NaN), then numbers are standardised
    (`scale: standard`). With `add_missing_indicators`, columns that say where a number was missing follow. A category
    becomes one column per value, one of them for missing; values of fewer rows than `min_frequency` (a count, or a
    share of the rows) have one together. A value that no training row had counts to these, or is 0 everywhere.

    `transformer` is another one, by factory: it takes a pandas DataFrame of all columns by name (float32, NaN: missing;
    objects of str, NaN: missing). `trusted` names types and functions in it that are not scikit-learn's, such as
    `features.Ratios`; they are imported when a stored one is loaded.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        impute: Literal["median", "mean", "most_frequent", "none"] = "median",
        scale: Literal["standard", "none"] = "standard",
        min_frequency: int | float | None = None,
        add_missing_indicators: bool = False,
        transformer: FactoryField | None = None,
        trusted: Sequence[str] = (),
        root: Path = Path(),
    ) -> None:
        """`columns`: names of the numeric ones, in order; `root`: where the factory is sought. Raises `ConfigError`."""
        is_share = isinstance(min_frequency, float)
        if min_frequency is not None and not (0 < min_frequency < 1 if is_share else min_frequency >= 1):
            raise ConfigError(
                f"preprocess.min_frequency is {min_frequency}; expected a whole number of rows, or a share below 1"
            )
        self._columns, self._trusted, self._impute, self._scale = columns, trusted, impute, scale
        self._min_frequency, self._indicators = min_frequency, add_missing_indicators
        self._given = None if transformer is None else _made(transformer, root)
        self._fitted: Any = None
        self._state: State | None = None

    @staticmethod
    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        """Digests of the code that `transformer` reaches."""
        path = dict(arguments.get("transformer") or {}).get("factory")
        if path is None:
            return {}
        return source_digests(resolve(path, root, _WHERE), load_module(path, root, _WHERE).__name__)

    def fit(self, blocks: Iterable[Columns]) -> None:
        """Fit on all rows at once. Raises `DataError` where the transformer refuses them."""
        parts = [self._values(block) for block in blocks]
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        categories = [name for name in values if name not in self._columns]
        transformer = self._of(categories) if self._given is None else self._given
        try:
            transformer.fit(table_of(values))
        except Exception as error:  # any transformer's own
            raise DataError(f"{_NAME}: fit failed: {type(error).__name__}: {error}") from error
        content = base64.b64encode(zlib.compress(dumps(transformer), 9)).decode()
        self.load_state({"scikit-learn": _version(), "skops": content})

    def state(self) -> State:
        """The fitted transformer as skops has it (compressed, base64), and scikit-learn's version."""
        if self._state is None:
            raise ConfigError(
                f"{_NAME} is not fitted: train the model here. A ready one takes a preprocess that learns nothing, "
                "such as Standardize with its mean and std"
            )
        return self._state

    def load_state(self, state: State) -> None:
        """Take back what `state` gave. Raises `ConfigError` for another scikit-learn, and for types not `trusted`."""
        if state["scikit-learn"] != _version():
            raise ConfigError(
                f"{_NAME} was fitted with scikit-learn {state['scikit-learn']}; here is {_version()}, which may "
                "give other numbers. Install the former, or train the model again."
            )
        self._fitted = loads(zlib.decompress(base64.b64decode(state["skops"])), _NAME, self._trusted)
        self._state = state

    def feature_names(self) -> list[str]:
        """Names `[D]`: a number's column, `missingindicator_COLUMN`, a category's `COLUMN_VALUE`."""
        self.state()
        return [str(name) for name in self._fitted.get_feature_names_out()]

    def __call__(self, columns: Columns) -> Tensor:
        """`[B, D]`. Raises `DataError` where the transformer fails or gives no table of numbers."""
        self.state()
        table = table_of(self._values(columns))
        try:
            encoded = self._fitted.transform(table)
            array = np.asarray(encoded.toarray() if hasattr(encoded, "toarray") else encoded, np.float32)
        except Exception as error:  # any transformer's own
            raise DataError(f"{_NAME}: transform failed: {type(error).__name__}: {error}") from error
        if array.ndim != 2 or len(array) != len(table):
            raise DataError(f"{_NAME}: transform gave shape {list(array.shape)} for {len(table)} rows; expected [B, D]")
        return torch.from_numpy(np.ascontiguousarray(array))

    def _values(self, columns: Columns) -> dict[str, Array]:
        values = values_by_name(columns, self._columns)
        if not values:
            raise ConfigError(f"{_NAME} is for tables; rows here have {', '.join(columns)}")
        return values

    def _of(self, categories: Sequence[str]) -> Any:
        """scikit-learn's parts for the task's columns."""
        from sklearn.compose import ColumnTransformer
        from sklearn.impute import MissingIndicator, SimpleImputer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        impute = [SimpleImputer(strategy=self._impute, keep_empty_features=True)] if self._impute != "none" else []
        steps = [*impute, *([StandardScaler()] if self._scale == "standard" else [])]
        numbers = make_pipeline(*steps) if steps else "passthrough"
        missing = MissingIndicator(error_on_new=False) if self._indicators else "drop"
        one_hot = OneHotEncoder(
            handle_unknown="infrequent_if_exist", min_frequency=self._min_frequency, sparse_output=False
        )
        parts = [("numbers", numbers, self._columns), ("missing", missing, self._columns)]
        return ColumnTransformer(
            [(name, part, list(of)) for name, part, of in [*parts, ("categories", one_hot, categories)]],
            sparse_threshold=0,
            verbose_feature_names_out=False,
        )


def _version() -> str:
    """scikit-learn's."""
    import sklearn

    return str(sklearn.__version__)


def _made(factory: Factory, root: Path) -> Any:
    """A transformer that is not fitted yet."""
    if factory.path.rpartition(":")[0].endswith(".py"):
        raise ConfigError(
            f"{_WHERE}: {factory.path} names a file; expected a module, `{factory.path.replace('.py:', ':')}`, as what "
            "it makes is stored by the names of its parts"
        )
    transformer = bind(factory, root, _WHERE).make()
    if not (hasattr(transformer, "fit") and hasattr(transformer, "transform")):
        raise ConfigError(
            f"{_WHERE}: {factory.path} gave {type(transformer).__name__}; expected a scikit-learn transformer, with "
            "fit and transform"
        )
    return transformer


def table_of(values: Mapping[str, Array]) -> Any:
    """A pandas DataFrame of columns by name; missing categories are NaN, as scikit-learn expects them."""
    pandas = package("pandas", "sklearn")
    with_nan = {name: np.where(pandas.isna(each), np.nan, each) for name, each in values.items()}
    return pandas.DataFrame({name: pandas.Series(each, dtype=values[name].dtype) for name, each in with_nan.items()})
