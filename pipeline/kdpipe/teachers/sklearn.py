"""A scikit-learn classifier as a teacher: `predict_proba`, or `decision_function` where there is none.

Shapes: B rows, D inputs, C classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from kdpipe import durable
from kdpipe.config import FactoryField, bind, load_module, package, resolve
from kdpipe.data.columns import Columns
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.errors import ConfigError, TeacherError, is_out_of_memory
from kdpipe.fingerprint import digest, digest_file, source_digests
from kdpipe.inputs import LOGITS
from kdpipe.preprocess import Preprocess, Standardize
from kdpipe.preprocess.columns import table_of
from kdpipe.skops_files import dumps, loads
from kdpipe.targets import OutputSpec

_FILE = "estimator.skops"
_WHOSE_SCORES = ("best_estimator_", "final_estimator_", "estimator_")
"""Where scikit-learn's searches, stacks and selections keep it."""


class SklearnTeacher:
    """An estimator that is fitted here (`estimator:` and `fit_on:`) or was stored by skops (`path:`).

    Its `random_state` is 0 unless it is given, so that the same rows give the same estimator.

    Its logits are `log p` of `predict_proba`, -inf never: probabilities are floored at `smallest`, so that a class
    which no tree or neighbour voted for is improbable, not impossible. Of `decision_function`, the scores themselves
    (`[0, z]` for two classes); a class that no row was of is as improbable. Nearest neighbours make a teacher of
    examples. The preprocess gives `[B, D]`; missing numbers (NaN) are the estimator's affair.
    """

    def __init__(
        self,
        root: Path,
        num_classes: int,
        preprocess: Preprocess,
        *,
        estimator: FactoryField | None = None,
        path: str | None = None,
        trusted: Sequence[str] = (),
        smallest: float = 1e-6,
        frame: bool = False,
        probe: Columns | None = None,
        task: Any = None,
    ) -> None:
        """`trusted`: types of other packages that the file may hold. `task`: tells class names, and columns' order.

        `frame`: the estimator is given a pandas DataFrame of the task's columns by name, and not what the preprocess
        makes of them: float32 (NaN: missing), and objects of str (NaN: missing) for categories. A ready estimator is
        tried on `probe`, a prepared row, at once. Its classes are class numbers, or names of the task's. Raises
        `ConfigError`, `TeacherError`.
        """
        if (estimator is None) == (path is None):
            raise ConfigError("SklearnTeacher: give estimator (it is fitted here, on `fit_on`) or path (it is ready)")
        if not 0 < smallest < 1 / num_classes:
            raise ConfigError(f"SklearnTeacher: smallest is {smallest}; expected a probability below 1 / {num_classes}")
        self._num_classes, self._preprocess, self._trusted = num_classes, preprocess, trusted
        self._smallest, self._class_names = smallest, list(getattr(task, "class_names", None) or ())
        self._values = _values_by_name(task) if frame else None
        self.outputs = (OutputSpec(name=LOGITS, shape=(num_classes,)),)
        self._estimator: Any = None
        self._is_ready, self._learnt = path is not None, ""
        if estimator is not None:
            self._estimator = self._checked(bind(estimator, root, "estimator", random_state=0).make(), estimator.path)
        if path is not None:
            self._open(root / path)
            if probe is not None:
                self._check_order(dict(getattr(task, "offers", {})).get("columns", ()))
                self.predict(probe)

    @staticmethod
    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        """Digests of the code that `estimator` reaches, or its package's version."""
        path = dict(arguments.get("estimator") or {}).get("factory")
        if path is None:
            return {}
        return source_digests(resolve(path, root, "estimator"), load_module(path, root, "estimator").__name__)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Digest of the stored estimator, scikit-learn's version, and the preprocess.

        Raises `TeacherError` where it has learnt nothing yet.
        """
        import sklearn

        if not self._learnt:
            raise TeacherError(
                "the estimator has not seen any rows: give the teacher `fit_on: SPLIT` and run `kdpipe train-teacher`, "
                "or name a file that holds a fitted one (path)"
            )
        return {
            "estimator": self._learnt,
            "scikit-learn": sklearn.__version__,
            "preprocess_state": digest(dict(self._preprocess.state())) if self._values is None else None,
            "smallest": self._smallest,
        }

    def fit(self, blocks: Iterable[tuple[Columns, NDArray[np.int64]]]) -> None:
        """Fit it on the labelled rows. Raises `TeacherError` where that fails, `ConfigError` of a ready one."""
        if self._is_ready:
            raise ConfigError("SklearnTeacher: the estimator of `path` is ready; leave fit_on out")
        parts = [(self._inputs(columns)[labels != MISSING_LABEL], labels) for columns, labels in blocks]
        inputs = self._joined([each for each, _ in parts])
        labels = np.concatenate([each[each != MISSING_LABEL] for _, each in parts])
        if not len(labels):
            raise TeacherError("the teacher's split has no row with a label; expected some to fit it on")
        try:
            self._estimator.fit(inputs, labels)
        except Exception as error:  # any estimator's own
            raise TeacherError(
                f"{type(self._estimator).__name__}.fit failed: {type(error).__name__}: {error}"
            ) from error
        self._checked(self._estimator, type(self._estimator).__name__)

    def save(self, folder: Path) -> None:
        """Write estimator.skops."""
        durable.write_bytes(folder / _FILE, dumps(self._estimator))

    def load(self, folder: Path) -> None:
        """Read estimator.skops."""
        self._open(folder / _FILE)

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """Logits `[B, C]`. Raises `TeacherError` where the estimator fails or knows a class that the task has not."""
        inputs = self._inputs(columns)
        try:
            if hasattr(self._estimator, "predict_proba"):
                probabilities = np.asarray(self._estimator.predict_proba(inputs), np.float64)
                logits = np.log(self._spread(probabilities, 0.0).clip(min=self._smallest))
            else:
                scores = np.asarray(self._estimator.decision_function(inputs), np.float64)
                two = np.stack([np.zeros_like(scores), scores], axis=1) if scores.ndim == 1 else scores
                logits = self._spread(two, logsumexp(two, axis=1) + math.log(self._smallest))
        except Exception as error:  # any estimator's own
            if isinstance(error, TeacherError) or is_out_of_memory(error):
                raise
            raise TeacherError(
                f"{type(self._estimator).__name__} failed on inputs of shape {list(inputs.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return {LOGITS: torch.from_numpy(logits).float()}

    def _spread(self, values: NDArray[np.float64], absent: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of the classes that the estimator knows as `[B, C]`, and that of an absent class (`[B]`, or all)."""
        classes = np.asarray(self._estimator.classes_)
        if classes.dtype.kind in "OU" and classes.ndim == 1 and {*classes.tolist()} <= {*self._class_names}:
            classes = np.array([self._class_names.index(name) for name in classes.tolist()])
        if values.shape[1:] != classes.shape:
            raise TeacherError(
                f"the estimator gives {list(values.shape)} for classes of shape {list(classes.shape)}; expected a "
                "number per row and class, of one label per row"
            )
        if classes.dtype.kind not in "iu" or classes.min() < 0 or classes.max() >= self._num_classes:
            raise TeacherError(
                f"the estimator's classes are {classes.tolist()}; expected class numbers from 0 to "
                f"{self._num_classes - 1}, as the task numbers them, or names of task.class_names"
            )
        spread = np.empty((len(values), self._num_classes))
        spread.T[:] = absent
        spread[:, classes] = values
        return spread

    def _inputs(self, columns: Columns) -> Any:
        """`[B, D]`, or a DataFrame of the columns that the estimator knows, in its order."""
        if self._values is not None:
            table = table_of(self._values(columns))
            known = [str(name) for name in getattr(self._estimator, "feature_names_in_", table.columns)]
            absent = [name for name in known if name not in table.columns]
            if absent:
                raise ConfigError(
                    f"SklearnTeacher: the estimator was fitted on a column {absent[0]!r}; the task has "
                    f"{', '.join(table.columns)}"
                )
            return table[known]
        inputs = self._preprocess(columns)
        if not isinstance(inputs, Tensor):
            raise ConfigError("SklearnTeacher: the preprocess gives several inputs; expected one tensor [B, D]")
        return inputs.flatten(1).numpy()

    def _joined(self, parts: Sequence[Any]) -> Any:
        return np.concatenate(parts) if self._values is None else package("pandas", "sklearn").concat(parts)

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"SklearnTeacher: there is no file {path}")
        self._estimator = self._checked(loads(path.read_bytes(), str(path), self._trusted), str(path))
        self._learnt = digest_file(path)

    def _checked(self, estimator: Any, name: str) -> Any:
        from sklearn.base import is_classifier

        if hasattr(estimator, "predict_proba"):
            return estimator
        if not hasattr(estimator, "decision_function"):
            if is_classifier(estimator) and not hasattr(estimator, "classes_"):
                return estimator  # until it is fitted, a stack, say, does not know what it will have
            raise ConfigError(
                f"SklearnTeacher: {name} is no classifier: it has neither predict_proba nor decision_function"
            )
        scoring = _scoring(estimator)
        if getattr(scoring, "decision_function_shape", None) == "ovo" and self._num_classes > 2:
            raise ConfigError(
                f"SklearnTeacher: {name} scores pairs of classes (decision_function_shape of {type(scoring).__name__} "
                "is ovo), and scores of classes are needed; fit it with decision_function_shape: ovr"
            )
        return estimator

    def _check_order(self, columns: Sequence[str]) -> None:
        """Raise `ConfigError` where the estimator was fitted on the same columns in another order."""
        fitted_on = [str(name) for name in getattr(self._estimator, "feature_names_in_", ())]
        if fitted_on == list(columns):
            warnings.filterwarnings("ignore", "X does not have valid feature names")
        elif (
            self._values is None and isinstance(self._preprocess, Standardize) and sorted(fitted_on) == sorted(columns)
        ):
            raise ConfigError(
                f"SklearnTeacher: the estimator was fitted on the columns {', '.join(fitted_on)} and is given "
                f"{', '.join(columns)}: the same in another order. Write task.columns in the estimator's order"
            )


def _values_by_name(task: Any) -> Callable[[Columns], Mapping[str, Any]]:
    found: Callable[[Columns], Mapping[str, Any]] | None = getattr(task, "column_values", None)
    if found is None:
        raise ConfigError(f"SklearnTeacher: frame is for tables; {type(task).__name__} has no columns by name")
    return found


def _scoring(estimator: Any) -> Any:
    """The part of a composed estimator whose scores its `decision_function` gives."""
    while True:
        if hasattr(estimator, "steps"):
            estimator = estimator.steps[-1][1]
        elif part := next((name for name in _WHOSE_SCORES if hasattr(estimator, name)), None):
            estimator = getattr(estimator, part)
        else:
            return estimator
