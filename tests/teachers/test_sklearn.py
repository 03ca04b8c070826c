from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from kdpipe.config import Factory
from kdpipe.data.columns import take
from kdpipe.errors import ConfigError, TeacherError
from kdpipe.preprocess import Standardize
from kdpipe.skops_files import dumps
from kdpipe.targets import OutputSpec
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.teachers.asking import Asking
from kdpipe.teachers.base import Learner, Teacher
from kdpipe.teachers.sklearn import SklearnTeacher

FEATURES = np.random.default_rng(0).normal(3, 2, (60, 4)).astype(np.float32)
LABELS = (FEATURES[:, 0] > 3).astype(np.int64) + 2 * (FEATURES[:, 1] > 6)
COLUMNS = {"features": FEATURES}


def teacher_of(tmp_path, num_classes=4, **arguments):
    preprocess = Standardize()
    preprocess.fit([COLUMNS])
    return SklearnTeacher(tmp_path, num_classes, preprocess, **arguments)


def blocks():
    return [({"features": FEATURES[:40]}, LABELS[:40]), ({"features": FEATURES[40:]}, LABELS[40:])]


BOOSTING = Factory(path="sklearn.ensemble:HistGradientBoostingClassifier", arguments={"max_iter": 5})


def test_a_fitted_teacher_says_what_the_estimator_says(tmp_path):
    teacher = teacher_of(tmp_path, estimator=BOOSTING)
    assert isinstance(teacher, Learner)
    assert teacher.outputs == (OutputSpec(name="logits", shape=(4,)),)
    teacher.fit(blocks())
    (tmp_path / "model").mkdir()
    teacher.save(tmp_path / "model")
    other = teacher_of(tmp_path, estimator=BOOSTING)
    other.load(tmp_path / "model")
    assert isinstance(other, Teacher)
    logits = other.predict(COLUMNS)["logits"]
    inputs = (FEATURES - FEATURES.mean(axis=0)) / FEATURES.std(axis=0)
    reference = HistGradientBoostingClassifier(max_iter=5, random_state=0).fit(inputs, LABELS)
    expected = np.zeros((60, 4))
    expected[:, reference.classes_] = reference.predict_proba(inputs)
    assert np.allclose(logits.softmax(dim=1), expected, atol=1e-5)
    assert torch.isfinite(logits).all()


def test_the_same_rows_give_the_same_bytes(tmp_path):
    written = []
    for name in ("one", "two"):
        teacher = teacher_of(tmp_path, estimator=BOOSTING)
        teacher.fit(blocks())
        (tmp_path / name).mkdir()
        teacher.save(tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]


def test_rows_without_label_are_not_learnt_from(tmp_path):
    teacher, reference = (teacher_of(tmp_path, estimator=BOOSTING) for _ in range(2))
    some = np.where(np.arange(60) % 3, LABELS, -1)
    teacher.fit([(COLUMNS, some)])
    reference.fit([({"features": FEATURES[some != -1]}, LABELS[some != -1])])
    assert torch.equal(teacher.predict(COLUMNS)["logits"], reference.predict(COLUMNS)["logits"])
    with pytest.raises(TeacherError, match="no row with a label"):
        teacher_of(tmp_path, estimator=BOOSTING).fit([(COLUMNS, np.full(60, -1))])


def test_a_ready_estimator_and_its_digest(tmp_path):
    (tmp_path / "a.skops").write_bytes(dumps(KNeighborsClassifier(3).fit(FEATURES, LABELS)))
    (tmp_path / "b.skops").write_bytes(dumps(KNeighborsClassifier(5).fit(FEATURES, LABELS)))
    neighbours, others = (teacher_of(tmp_path, path=f"{name}.skops") for name in "ab")
    probabilities = neighbours.predict(COLUMNS)["logits"].exp()
    assert set((3 * probabilities).round().int().unique().tolist()) <= {0, 1, 2, 3}
    assert neighbours.fingerprint != others.fingerprint


def test_scores_without_probabilities(tmp_path):
    from sklearn.svm import LinearSVC

    two = LinearSVC().fit(FEATURES, LABELS > 0)
    two.classes_ = np.array([0, 1])
    (tmp_path / "two.skops").write_bytes(dumps(two))
    logits = teacher_of(tmp_path, 2, path="two.skops").predict(COLUMNS)["logits"]
    inputs = (FEATURES - FEATURES.mean(axis=0)) / FEATURES.std(axis=0)
    assert (logits[:, 0] == 0).all()
    assert np.allclose(logits[:, 1], two.decision_function(inputs), atol=1e-4)


def test_scores_of_pairs_of_classes_are_refused(tmp_path):
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    three = np.minimum(LABELS, 2)
    estimator = make_pipeline(StandardScaler(), SVC(decision_function_shape="ovo")).fit(FEATURES, three)
    (tmp_path / "a.skops").write_bytes(dumps(estimator))
    message = (
        r"scores pairs of classes \(decision_function_shape of SVC is ovo\).* fit it with decision_function_shape: ovr"
    )
    with pytest.raises(ConfigError, match=message):
        teacher_of(tmp_path, 3, path="a.skops")
    pairs = Factory(path="sklearn.svm:SVC", arguments={"decision_function_shape": "ovo"})
    with pytest.raises(ConfigError, match=message):
        teacher_of(tmp_path, 3, estimator=pairs)
    (tmp_path / "a.skops").write_bytes(dumps(estimator.set_params(svc__decision_function_shape="ovr")))
    said = teacher_of(tmp_path, 3, path="a.skops").predict(COLUMNS)["logits"]
    inputs = (FEATURES - FEATURES.mean(axis=0)) / FEATURES.std(axis=0)
    assert np.allclose(said, estimator.decision_function(inputs), atol=1e-4)
    (tmp_path / "two.skops").write_bytes(dumps(SVC(decision_function_shape="ovo").fit(FEATURES, three > 0)))
    assert len(teacher_of(tmp_path, 2, path="two.skops").outputs) == 1, "a pair of classes is all there are"


def test_it_is_the_fitted_part_of_an_estimator_whose_scores_count(tmp_path):
    from sklearn.ensemble import StackingClassifier
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import GridSearchCV
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import SVC

    three, ovo = np.minimum(LABELS, 2), SVC(decision_function_shape="ovo")
    of_pairs = [
        GridSearchCV(SVC(), {"decision_function_shape": ["ovo"]}, cv=2),
        GridSearchCV(ovo, {"C": [1, 2]}, cv=2),
        StackingClassifier([("ridge", RidgeClassifier())], ovo, cv=2),
    ]
    for number, estimator in enumerate(of_pairs):
        (tmp_path / f"{number}.skops").write_bytes(dumps(estimator.fit(FEATURES, three)))
        with pytest.raises(ConfigError, match="scores pairs of classes"):
            teacher_of(tmp_path, 3, path=f"{number}.skops")
    of_classes = [
        OneVsRestClassifier(ovo),
        GridSearchCV(ovo, {"decision_function_shape": ["ovr"]}, cv=2),
        StackingClassifier([("pairs", ovo)], RidgeClassifier(), cv=2),
    ]
    inputs = (FEATURES - FEATURES.mean(axis=0)) / FEATURES.std(axis=0)
    for number, estimator in enumerate(of_classes):
        (tmp_path / f"{number}.skops").write_bytes(dumps(estimator.fit(inputs, three)))
        said = teacher_of(tmp_path, 3, path=f"{number}.skops").predict(COLUMNS)["logits"]
        assert (said.argmax(dim=1).numpy() == estimator.predict(inputs)).mean() > 0.95
    search = Factory(
        path="sklearn.model_selection:GridSearchCV",
        arguments={"estimator": SVC(), "param_grid": {"decision_function_shape": ["ovo"]}, "cv": 2},
    )
    with pytest.raises(ConfigError, match="scores pairs of classes"):
        teacher_of(tmp_path, 3, estimator=search).fit([(COLUMNS, three)])


@pytest.mark.filterwarnings("default:X does not have valid feature names")
@pytest.mark.parametrize(("columns", "fits"), [("abcd", True), ("abdc", False), ("efgh", True)])
def test_columns_in_another_order_are_refused(tmp_path, columns, fits):
    estimator = LogisticRegression(max_iter=2000).fit(FEATURES, LABELS)
    estimator.feature_names_in_ = np.array(list("abcd"), dtype=object)
    (tmp_path / "a.skops").write_bytes(dumps(estimator))
    task = TabularClassification(4, columns=list(columns))
    arguments = {"path": "a.skops", "probe": {"features": FEATURES[:1]}, "task": task}
    if fits:
        teacher_of(tmp_path, **arguments)
        return
    with pytest.raises(
        ConfigError, match="fitted on the columns a, b, c, d and is given a, b, d, c: the same in another"
    ):
        teacher_of(tmp_path, **arguments)


def test_a_class_without_rows_is_improbable_whatever_the_batch(tmp_path):
    """Scores of `decision_function` have no floor of their own."""
    from sklearn.svm import LinearSVC

    known = LABELS % 3
    (tmp_path / "a.skops").write_bytes(dumps(LinearSVC().fit(FEATURES, known)))
    teacher = teacher_of(tmp_path, path="a.skops")
    logits = teacher.predict(COLUMNS)["logits"]
    assert logits.softmax(dim=1)[:, 3].numpy() == pytest.approx(1e-6, rel=0.01)
    alone = torch.cat([teacher.predict({"features": FEATURES[[row]]})["logits"] for row in range(60)])
    torch.testing.assert_close(alone, logits)


def test_who_has_learnt_nothing_says_so(tmp_path):
    with pytest.raises(TeacherError, match="has not seen any rows: give the teacher `fit_on: SPLIT`"):
        _ = teacher_of(tmp_path, estimator=BOOSTING).fingerprint
    (tmp_path / "a.skops").write_bytes(dumps(KNeighborsClassifier(3).fit(FEATURES, LABELS)))
    with pytest.raises(ConfigError, match="is ready; leave fit_on out"):
        teacher_of(tmp_path, path="a.skops").fit(blocks())


def test_a_ready_estimator_is_tried_on_a_row_at_once(tmp_path):
    (tmp_path / "a.skops").write_bytes(dumps(KNeighborsClassifier(3).fit(FEATURES[:, :2], LABELS)))
    with pytest.raises(TeacherError, match=r"KNeighborsClassifier failed on inputs of shape \[1, 4\]"):
        teacher_of(tmp_path, path="a.skops", probe={"features": FEATURES[:1]})


def test_the_code_of_an_estimator_is_among_what_it_reads(tmp_path):
    (tmp_path / "mine.py").write_text("from sklearn.linear_model import LogisticRegression\n")
    found = [SklearnTeacher.reads({"estimator": {"factory": "mine.py:LogisticRegression"}}, tmp_path)]
    (tmp_path / "mine.py").write_text("from sklearn.linear_model import RidgeClassifier as LogisticRegression\n")
    found.append(SklearnTeacher.reads({"estimator": {"factory": "mine.py:LogisticRegression"}}, tmp_path))
    assert found[0]["mine@"] != found[1]["mine@"]
    assert found[0]["sklearn"] == found[1]["sklearn"]
    assert SklearnTeacher.reads({"path": "a.skops"}, tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give estimator .* or path"),
        ({"path": "nowhere.skops"}, "there is no file"),
        ({"path": "pickled.skops"}, "is no skops file.*A pickle is not loaded"),
        ({"path": "scaler.skops"}, "is no classifier"),
        ({"path": "own.skops"}, "types that are not known to be safe: .*Fraction"),
        ({"path": "cut.skops"}, "is no skops file|cannot be loaded"),
        ({"estimator": Factory(path="sklearn.svm:SVR")}, "is no classifier"),
        ({"estimator": BOOSTING, "smallest": 0.5}, "smallest is 0.5"),
    ],
)
def test_what_is_no_estimator_is_refused(tmp_path, arguments, message):
    from fractions import Fraction

    from sklearn.preprocessing import StandardScaler

    fitted = LogisticRegression(max_iter=2000).fit(FEATURES, LABELS)
    (tmp_path / "pickled.skops").write_bytes(pickle.dumps(fitted))
    (tmp_path / "scaler.skops").write_bytes(dumps(StandardScaler().fit(FEATURES)))
    (tmp_path / "cut.skops").write_bytes(dumps(fitted)[:1000])
    fitted.extra = Fraction(1, 2)
    (tmp_path / "own.skops").write_bytes(dumps(fitted))
    with pytest.raises(ConfigError, match=message):
        teacher_of(tmp_path, **arguments)


def test_classes_that_the_task_has_not_are_refused(tmp_path):
    (tmp_path / "a.skops").write_bytes(dumps(LogisticRegression(max_iter=2000).fit(FEATURES, LABELS + 3)))
    with pytest.raises(TeacherError, match=r"classes are \[3, 4, 5, 6\]; expected class numbers from 0 to 3"):
        teacher_of(tmp_path, path="a.skops").predict(COLUMNS)


def test_an_estimator_that_fails_is_the_teachers_error(tmp_path):
    (tmp_path / "a.skops").write_bytes(dumps(LogisticRegression(max_iter=2000).fit(FEATURES[:, :2], LABELS)))
    with pytest.raises(TeacherError, match=r"LogisticRegression failed on inputs of shape \[60, 4\]"):
        teacher_of(tmp_path, path="a.skops").predict(COLUMNS)


class Forgetful(LogisticRegression):
    """Has memory for 20 rows."""

    def predict_proba(self, X):
        if len(X) > 20:
            torch.empty(2**50)
        return super().predict_proba(X)


def test_an_estimator_that_runs_out_of_memory_is_shown_fewer_rows(tmp_path):
    teacher = teacher_of(tmp_path, estimator=Factory(path=f"{__name__}:Forgetful"))
    teacher.fit(blocks())
    ask = Asking(teacher)
    assert ask(COLUMNS, 60)["logits"].shape == (60, 4)
    assert ask.at_once == 15


# Tables, names of classes


PEOPLE = pd.DataFrame(
    {
        "town": ["Ulm", "Bonn", None, "Ulm", "Kiel", "Bonn"] * 5,
        "age": pd.Series([31, 64, 8, np.nan, 47, 25] * 5, dtype=np.float32),
    }
)
BUYS = np.array(["no", "yes", "no", "no", "yes", "no"] * 5)
ABOUT_PEOPLE = TabularClassification(
    2, columns=["age"], categorical=["town"], missing="allow", class_names=["yes", "no"]
)


def people():
    """A pipeline as a user would store it, of columns by name in an order of its own; and the same rows as prepared."""
    parts = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["town"]), (StandardScaler(), ["age"]))
    pipeline = make_pipeline(parts, HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=2, random_state=0))
    rows = pa.RecordBatch.from_pandas(PEOPLE, preserve_index=False)
    return pipeline, ABOUT_PEOPLE.to_inputs(rows, str)


def test_a_ready_pipeline_is_given_a_table_and_may_name_its_classes(tmp_path):
    pipeline, prepared = people()
    with_nan = PEOPLE.assign(town=PEOPLE["town"].where(PEOPLE["town"].notna(), np.nan))
    (tmp_path / "a.skops").write_bytes(dumps(pipeline.fit(with_nan, BUYS)))
    one = {name: take(each, np.array([0])) for name, each in prepared.items()}
    teacher = SklearnTeacher(
        tmp_path, 2, ABOUT_PEOPLE.default_preprocess(), path="a.skops", frame=True, task=ABOUT_PEOPLE, probe=one
    )
    expected = pipeline.predict_proba(with_nan)[:, ::-1]  # the estimator's classes are no, yes; the task's yes, no
    assert np.allclose(teacher.predict(prepared)["logits"].softmax(dim=1), expected, atol=1e-6)
    assert teacher.fingerprint["preprocess_state"] is None


def test_a_pipeline_may_be_fitted_on_tables_here(tmp_path):
    pipeline, prepared = people()
    factory = Factory(path="sklearn.pipeline:Pipeline", arguments={"steps": pipeline.steps})
    preprocess = ABOUT_PEOPLE.default_preprocess()
    teacher = SklearnTeacher(tmp_path, 2, preprocess, estimator=factory, frame=True, task=ABOUT_PEOPLE)
    labels = (BUYS == "no").astype(np.int64)
    labels[3] = -1
    teacher.fit([({name: take(each, rows) for name, each in prepared.items()}, labels[rows]) for rows in TWO_BLOCKS])
    with_nan = PEOPLE.assign(town=PEOPLE["town"].where(PEOPLE["town"].notna(), np.nan))
    reference = people()[0].fit(with_nan[labels >= 0], labels[labels >= 0])
    said = teacher.predict(prepared)["logits"].softmax(dim=1)
    assert np.allclose(said, reference.predict_proba(with_nan), atol=1e-6)


TWO_BLOCKS = (np.arange(20), np.arange(20, 30))


def test_a_column_that_the_task_has_not_is_named(tmp_path):
    pipeline, prepared = people()
    (tmp_path / "a.skops").write_bytes(dumps(pipeline.fit(PEOPLE.fillna({"town": "?"}), BUYS)))
    task = TabularClassification(2, columns=["age"], missing="allow")
    numbers = {"features": prepared["features"][:1]}
    with pytest.raises(ConfigError, match="fitted on a column 'town'; the task has age"):
        SklearnTeacher(tmp_path, 2, task.default_preprocess(), path="a.skops", frame=True, task=task, probe=numbers)


def test_several_labels_per_row_are_refused(tmp_path):
    several = KNeighborsClassifier().fit(FEATURES, np.stack([LABELS > 0, LABELS > 1], axis=1).astype(np.int64))
    (tmp_path / "a.skops").write_bytes(dumps(several))
    with pytest.raises(TeacherError, match="of one label per row"):
        teacher_of(tmp_path, 2, path="a.skops", probe={"features": FEATURES[:1]})


def test_a_stack_knows_after_fitting_only_that_it_has_probabilities(tmp_path):
    arguments = {"estimators": [("a", LogisticRegression(max_iter=500))], "cv": 2}
    stack = Factory(path="sklearn.ensemble:StackingClassifier", arguments=arguments)
    teacher = teacher_of(tmp_path, 2, estimator=stack)
    teacher.fit([(COLUMNS, (LABELS > 0).astype(np.int64))])
    assert teacher.predict(COLUMNS)["logits"].shape == (60, 2)
