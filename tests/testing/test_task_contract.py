"""Every task passes the contract that users run on their own; of each of its tests, a task that fails there."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from kdpipe.preprocess import ImageTensor, Tokenizer
from kdpipe.tasks.image import ImageClassification
from kdpipe.tasks.language import LanguageModelling
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.tasks.text import TextClassification
from kdpipe.testing import TaskContract

LABELS = [2, None, 0, 1, None]
TEXTS = ["a fine film", "", "nicht ganz so fein", "电影很好看", "a fine film, but long"]


def png(height, width, colour):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


class TestPixels(TaskContract):
    def task(self, folder):
        return ImageClassification(3, shape=(2, 3, 1))

    def batch(self):
        pixels = pa.array(np.arange(30, dtype=np.uint8))
        return pa.record_batch({"image": pa.FixedSizeListArray.from_arrays(pixels, 6), "label": LABELS})


class TestEncodedImages(TaskContract):
    def task(self, folder):
        return ImageClassification(3, shape=(4, 5, 1), class_names=["cat", "dog", "fish"])

    def batch(self):
        images = [png(4, 5, (40 * row, 7, 9)) for row in range(5)]
        return pa.record_batch({"image": images, "label": ["fish", "", "cat", None, "dog"]})


class TestEncodedImagesOfSeveralSizes(TaskContract):
    def task(self, folder):
        return ImageClassification(3, keep_encoded=True)

    def batch(self):
        images = [png(4 + row, 9 - row, (40 * row, 7, 9)) for row in range(5)]
        return pa.record_batch({"image": images, "label": LABELS})

    def preprocess(self, task):
        return ImageTensor(size=(6, 6))


class TestTexts(TaskContract):
    def task(self, folder):
        return TextClassification(3)

    def batch(self):
        return pa.record_batch({"text": TEXTS, "label": LABELS})


class TestPairsOfTexts(TaskContract):
    def task(self, folder):
        return TextClassification(3, column="premise", pair_column="hypothesis")

    def batch(self):
        return pa.record_batch({"premise": TEXTS, "hypothesis": TEXTS[1:] + TEXTS[:1], "label": LABELS})

    def preprocess(self, task):
        return Tokenizer(vocab_size=300, max_length=16)


class TestNumbers(TaskContract):
    def task(self, folder):
        return TabularClassification(3, columns=["x", "y"])

    def batch(self):
        return pa.record_batch({"y": [1.5, 2, 3, 4, 4], "x": [1, 1, 2, 3, 5], "label": LABELS})


class TestCategoriesAndMissingValues(TaskContract):
    def task(self, folder):
        return TabularClassification(3, columns=["age"], categorical=["deck", "class"], missing="allow")

    def batch(self):
        return pa.record_batch(
            {
                "class": [1, 2, None, 3, 1],
                "deck": ["A", None, "", "B", "A"],
                "age": [None, 8.5, 30, float("nan"), 22],
                "label": LABELS,
            }
        )


class TestCategories(TaskContract):
    def task(self, folder):
        return TabularClassification(3, categorical=["deck"])

    def batch(self):
        return pa.record_batch({"deck": list("ABCDE"), "label": LABELS})


DOCUMENTS = ["a fine film", "", "nicht ganz so fein", "电影很好看", "it is long, but fine"]


class TestDocuments(TaskContract):
    label_column = None

    def task(self, folder):
        return LanguageModelling(folder, block_tokens=6)

    def batch(self):
        return pa.record_batch({"text": DOCUMENTS})


class TestPackedDocuments(TestDocuments):
    def task(self, folder):
        return LanguageModelling(folder, block_tokens=6, pack=True)


class TestPromptsAndAVocabularyOfTheirOwn(TestDocuments):
    def task(self, folder):
        return LanguageModelling(
            folder,
            tokenizer="vocabulary.json",
            vocab_size=270,
            end_token="<end>",
            prompt_column="question",
            block_tokens=6,
            num_classes=300,
        )

    def batch(self):
        return pa.record_batch({"text": DOCUMENTS, "question": [f"{place}. film?" for place in range(5)]})


# The contract itself


class Broken(TabularClassification):
    """Numbers and categories, but for one thing that is wrong with them."""

    def __init__(self, wrong):
        super().__init__(num_classes=3, columns=["x"], categorical=["kind"])
        self.wrong = wrong
        if wrong == "metrics":
            self.metrics = ["acuracy"]

    def to_inputs(self, batch, name_of):
        columns = dict(super().to_inputs(batch, name_of))
        features = columns["features"]
        if self.wrong == "a row too few":
            columns["features"] = features[:-1] if len(features) == 5 else features
        if self.wrong == "loses what differs":
            columns["features"] = np.minimum(features, 2)
        if self.wrong == "numbers rows":
            columns["features"] = features + np.arange(len(features))[:, np.newaxis]
        if self.wrong == "is normalised over the batch":
            columns["features"] = features - features.min(axis=0)
        return columns

    def to_labels(self, values, name_of):
        labels = super().to_labels(values, name_of)
        if self.wrong == "labels of another kind":
            return labels.astype(np.int32)
        if self.wrong == "counts from 1":
            return np.where(labels >= 0, labels + 1, -1)
        return np.sort(labels) if self.wrong == "sorts labels" else labels

    def default_preprocess(self):
        preprocess = super().default_preprocess()
        if self.wrong == "forgets":
            return Wrapped(preprocess, load_state=lambda state: None)
        if self.wrong == "inputs of the batch":
            return Wrapped(preprocess, change=lambda inputs: inputs - inputs.mean(dim=0))
        return preprocess

    def column_values(self, columns):
        values = super().column_values(columns)
        return {"prepared": values["x"]} if self.wrong == "columns of other names" else values

    def label_loss(self, logits, labels, smoothing=0.0):
        if self.wrong == "sums over the batch":
            return super().label_loss(logits, labels, smoothing) * len(labels)
        if self.wrong == "mean loss":
            return super().label_loss(logits, labels, smoothing).mean()
        if self.wrong == "learns what is missing":
            return super().label_loss(logits, labels.clamp(min=0), smoothing)
        if self.wrong == "gain":
            return 1 / (1 + super().label_loss(logits, labels, smoothing)) * (labels >= 0)
        if self.wrong == "does not smooth":
            return super().label_loss(logits, labels)
        return super().label_loss(logits, labels, smoothing)


class Wrapped:
    """A preprocess of which one thing is changed."""

    def __init__(self, preprocess, load_state=None, change=lambda inputs: inputs):
        self.fit, self.state, self.load_state = preprocess.fit, preprocess.state, load_state or preprocess.load_state
        self._preprocess, self._change = preprocess, change

    def __call__(self, columns):
        return self._change(self._preprocess(columns))


class Restless(LanguageModelling):
    """Its rows are other ones in every pass."""

    passes = 0

    def documents(self, batch):
        self.passes += 1
        return super().documents(batch.slice(0, 4 + self.passes % 2))


class Unfit:
    """No task."""

    num_classes, class_names = 3, None


def broken_contract(wrong):
    class TestBroken(TaskContract):
        def task(self, folder):
            return Broken(wrong)

        def batch(self):
            return pa.record_batch({"x": [3.0, 1, 2, 4, 5], "kind": list("aabba"), "label": LABELS})

    return TestBroken()


class TestRestless(TestDocuments):
    __test__ = False

    def task(self, folder):
        return Restless(folder, block_tokens=6)


class Shifted(LanguageModelling):
    """It predicts the token itself, or the second one."""

    def token_labels(self, columns):
        tokens, counted = columns["tokens"], columns["counted"]
        moved = np.roll(tokens, -self.ahead, axis=1)[:, :-1].astype(np.int64)
        return np.where(counted, moved, -1)


class TestShifted(TestDocuments):
    __test__ = False
    ahead = 0

    def task(self, folder):
        task = Shifted(folder, block_tokens=6)
        task.ahead = self.ahead
        return task


CONTRACT = [name for name in vars(TaskContract) if name.startswith("test_")]


def failures(contract, folder):
    failed = set()
    for name in CONTRACT:
        (folder / name).mkdir()
        try:
            getattr(contract, name)(folder / name)
        except Exception:
            failed.add(name)
    return failed


def test_a_task_without_fault_fails_nowhere(tmp_path):
    assert failures(broken_contract(None), tmp_path) == set()


ORDER, OTHERS = "test_rows_do_not_depend_on_their_order", "test_rows_do_not_depend_on_others"
KINDS, STAY = "test_labels_are_class_numbers_or_missing", "test_labels_stay_with_their_rows"
LOSS, LEAST = (
    "test_the_label_loss_is_per_row_and_leaves_missing_labels_out",
    "test_the_label_loss_is_least_at_the_label",
)


@pytest.mark.parametrize(
    ("wrong", "tests"),
    [
        ("metrics", {"test_it_is_a_task"}),
        ("loses what differs", {"test_rows_of_different_content_stay_different"}),
        ("numbers rows", {ORDER, OTHERS}),
        ("is normalised over the batch", {OTHERS}),
        ("sorts labels", {STAY}),
        ("forgets", {"test_a_preprocess_makes_inputs_and_keeps_what_it_learnt"}),
        ("inputs of the batch", {"test_a_rows_input_does_not_depend_on_others"}),
        ("columns of other names", {"test_columns_by_name_have_a_value_per_row"}),
        ("learns what is missing", {LOSS}),
        ("sums over the batch", {"test_the_label_loss_of_a_row_is_its_own"}),
        ("gain", {LEAST}),
        ("does not smooth", {LEAST}),
    ],
)
def test_a_fault_fails_its_own_tests(tmp_path, wrong, tests):
    assert failures(broken_contract(wrong), tmp_path) == tests


@pytest.mark.parametrize(
    ("wrong", "test"),
    [
        ("a row too few", "test_there_is_a_prepared_row_for_each"),
        ("labels of another kind", KINDS),
        ("counts from 1", KINDS),
        ("mean loss", LOSS),
    ],
)
def test_a_fault_that_spreads_fails_its_test_too(tmp_path, wrong, test):
    assert test in failures(broken_contract(wrong), tmp_path)


@pytest.mark.parametrize(
    "change", [lambda inputs: inputs["input_ids"], lambda inputs: {"tokens": inputs["input_ids"].int()}]
)
def test_tokens_may_be_the_only_input(tmp_path, change):
    contract = TestDocuments()
    contract.preprocess = lambda task: Wrapped(task.default_preprocess(), change=change)
    assert failures(contract, tmp_path) == set()


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_language_model_predicts_the_next_token_and_no_other(tmp_path, ahead):
    contract = TestShifted()
    contract.ahead = ahead
    assert failures(contract, tmp_path) == {"test_each_label_is_the_token_after_its_own"}
    (tmp_path / "tags").mkdir()
    contract.predicts_next_token = False
    assert failures(contract, tmp_path / "tags") == set()


def test_rows_of_documents_must_come_again(tmp_path):
    assert failures(TestRestless(), tmp_path) >= {"test_every_pass_gives_the_same_rows"}


def test_what_is_no_task_is_told_apart(tmp_path):
    contract = broken_contract(None)
    contract.task = lambda folder: Unfit()
    assert "test_it_is_a_task" in failures(contract, tmp_path)
