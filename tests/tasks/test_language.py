from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.errors import ConfigError, DataError
from kdpipe.tasks.base import Task, TokenTask, rows_of, token_labels
from kdpipe.tasks.language import LanguageModelling

END = 256
SPLITS = SplitPlan(shares={"train": 1.0})


class Documents:
    """A source of an Arrow table, in small blocks."""

    def __init__(self, **columns):
        self._table = pa.table(columns)

    def batches(self):
        return iter(self._table.to_batches(max_chunksize=3))


NO_COLUMNS = SourceColumns()


def rows(task, source, columns=NO_COLUMNS):
    """Every row that the task makes: (id, tokens, labels)."""
    blocks, _ = rows_of(task, source, columns)
    found = []
    for batch in blocks.batches():
        inputs = task.to_inputs(batch, str)
        labels = task.token_labels(inputs)
        ids = batch.column("id").to_pylist()
        found += list(zip(ids, inputs["tokens"].tolist(), labels.tolist(), strict=True))
    return found


def task_of(tmp_path, **arguments):
    return LanguageModelling(tmp_path, **arguments)


def predicted(found):
    """What the rows predict, in order."""
    return [label for _, _, labels in found for label in labels if label != -1]


def test_it_is_a_task_of_tokens(tmp_path):
    task = task_of(tmp_path)
    assert isinstance(task, Task)
    assert isinstance(task, TokenTask)
    assert token_labels(task) == task.token_labels
    assert task.num_classes == 257


def test_each_position_predicts_the_token_after_it(tmp_path):
    found = rows(task_of(tmp_path, block_tokens=4), Documents(text=["abcdefghij", "xy"]))
    tokens = [each[1] for each in found]
    assert tokens == [
        [*b"abcde"],
        [*b"efghi"],
        [*b"ij", END, 0, 0],
        [*b"xy", END, 0, 0],
    ]
    for _, row, labels in found:
        assert all(label in (-1, row[place + 1]) for place, label in enumerate(labels))
    assert [labels for _, _, labels in found] == [
        [*b"bcde"],
        [*b"fghi"],
        [*b"j", END, -1, -1],
        [*b"y", END, -1, -1],
    ]


texts = st.lists(st.text("abcdé🦊 ", max_size=20), min_size=1, max_size=8)


@settings(max_examples=60)
@given(texts=texts, length=st.integers(1, 9), pack=st.booleans())
def test_every_token_but_a_documents_first_is_predicted_once(tmp_path_factory, texts, length, pack):
    task = task_of(tmp_path_factory.getbasetemp(), block_tokens=length, pack=pack)
    found = rows(task, Documents(text=texts))
    assert predicted(found) == [token for text in texts for token in [*text.encode(), END][1:]]


@settings(max_examples=40)
@given(texts=texts, length=st.integers(2, 9), seed=st.integers(0, 99))
def test_documents_added_or_moved_change_nothing_for_the_others(tmp_path_factory, texts, length, seed):
    task = task_of(tmp_path_factory.getbasetemp(), block_tokens=length)
    before = rows(task, Documents(text=texts))
    moved = [texts[place] for place in np.random.default_rng(seed).permutation(len(texts))]
    after = rows(task, Documents(text=["another one", *moved]))
    known = {key: (tokens, labels) for key, tokens, labels in after}
    assert all(known[key] == (tokens, labels) for key, tokens, labels in before)
    assert len(known) == len(after), "ids are unique"


def test_in_packed_rows_documents_follow_each_other_and_none_predicts_the_next(tmp_path):
    task = task_of(tmp_path, block_tokens=4, pack=True)
    found = rows(task, Documents(text=["ab", "cde", "f"]))
    assert [tokens for _, tokens, _ in found] == [
        [*b"ab", END, *b"cd"],
        [*b"de", END, *b"f", END],
    ]
    assert [labels for _, _, labels in found] == [[*b"b", END, -1, *b"d"], [*b"e", END, -1, END]]


def test_packed_rows_hold_documents_of_one_split(tmp_path):
    task = task_of(tmp_path, block_tokens=4, pack=True)
    source = Documents(text=["aaa", "bbb", "aaa", "bbb"], split=["train", "test"] * 2)
    blocks, columns = rows_of(task, source, SourceColumns(split="split"))
    assert columns == SourceColumns(id="id", label="label", split="split")
    for batch in blocks.batches():
        for tokens, split in zip(batch["tokens"].to_pylist(), batch["split"].to_pylist(), strict=True):
            assert set(tokens) - {0, END} == {ord("a" if split == "train" else "b")}


def test_prompts_are_read_but_not_predicted(tmp_path):
    task = task_of(tmp_path, block_tokens=8, prompt_column="question")
    ((_, tokens, labels),) = rows(task, Documents(question=["2+2="], text=["4"]))
    assert tokens == [*b"2+2=4", END, 0, 0, 0]
    assert labels == [-1, -1, -1, ord("4"), END, -1, -1, -1]


def test_ids_are_the_documents_and_the_place_in_it(tmp_path):
    task = task_of(tmp_path, block_tokens=2)
    found = rows(task, Documents(name=["a", "b"], text=["1234", "56"]), SourceColumns(id="name"))
    assert [each[0] for each in found] == ["a/0", "a/1", "b/0"]


@pytest.mark.parametrize("pack", [False, True])
def test_a_document_without_an_id_is_refused(tmp_path, pack):
    with pytest.raises(DataError, match="column 'name' must hold an id for each document; it is empty in the 2th of 2"):
        rows(task_of(tmp_path, pack=pack), Documents(name=["a", None], text=["1", "2"]), SourceColumns(id="name"))


def test_prepared_rows_carry_their_labels(tmp_path):
    task, source = task_of(tmp_path, block_tokens=4), Documents(text=["abcdefghij", "xy", "xy"])
    blocks, columns = rows_of(task, source, SourceColumns())
    prepare(
        blocks, RowSchema(to_inputs=task.to_inputs, to_labels=task.to_labels), columns, SPLITS, tmp_path / "prepared"
    )
    data = PreparedData(tmp_path / "prepared")
    assert data.labels.tolist() == [0] * 5, "two documents of the same content are two"
    columns = data.inputs.read(np.arange(5))
    inputs = task.default_preprocess()(columns)["input_ids"]
    labels = torch.from_numpy(task.token_labels(columns))
    counted = labels != -1
    assert torch.equal(inputs[:, 1:][counted[:, :-1]], labels[:, :-1][counted[:, :-1]])
    assert task.default_preprocess().offers == {"vocab_size": 257, "max_length": 4}


def test_the_loss_is_one_value_per_token(tmp_path):
    task = task_of(tmp_path)
    logits, labels = torch.randn(2, 5, 257), torch.randint(0, 257, (2, 5))
    labels[0, 3] = -1
    loss = task.label_loss(logits, labels)
    assert loss[0, 3] == 0
    assert loss[1, 2] == pytest.approx(-logits[1, 2].log_softmax(0)[labels[1, 2]].item(), rel=1e-5)


def test_a_vocabulary_is_learnt_once_and_kept(tmp_path):
    arguments = {"tokenizer": "made/tokenizer.json", "vocab_size": 300, "end_token": "<end>", "block_tokens": 8}
    source = Documents(text=["the cat and the dog and the bird", "the end 🦊"])
    task = task_of(tmp_path, **arguments)
    assert task.num_classes == 300
    found = rows(task, source)
    written = (tmp_path / "made" / "tokenizer.json").read_bytes()
    again = task_of(tmp_path, **arguments)
    assert rows(again, source) == found
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == written
    library = tokenizers.Tokenizer.from_str(written.decode())
    end = library.token_to_id("<end>")
    sentence = library.encode("the cat and the dog and the bird").ids
    assert len(sentence) < len("the cat and the dog and the bird")
    assert predicted(found)[: len(sentence)] == [*sentence[1:], end]
    assert library.decode([*predicted(found)[len(sentence) :]]).endswith("end 🦊")


WORDS = {"<end>": 0, "the": 3, "cat": 6, "sees": 9, "a": 12, "bird": 40}


def save_words(path):
    """A tokenizer of words, whose ids have holes."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(path))
    return words


def test_a_tokenizer_that_was_saved_while_it_cut_and_filled_rows_does_neither(tmp_path):
    words = save_words(tmp_path / "words.json")
    words.enable_truncation(2)
    words.enable_padding(pad_id=12, pad_token="a", length=9)
    words.save(str(tmp_path / "cutting.json"))
    source = Documents(text=["the cat sees the bird", "the bird", "the cat sees the cat"])
    found, expected = (
        rows(task_of(tmp_path, tokenizer=name, block_tokens=3, end_token="<end>"), source)
        for name in ("cutting.json", "words.json")
    )
    assert found == expected
    assert predicted(found) == [6, 9, 3, 40, 0, 40, 0, 6, 9, 3, 6, 0]


def test_ids_may_have_holes(tmp_path):
    save_words(tmp_path / "words.json")
    assert task_of(tmp_path, tokenizer="words.json").num_classes == 41
    with pytest.raises(ConfigError, match=r"num_classes is 40, but .* has 41 tokens"):
        task_of(tmp_path, tokenizer="words.json", num_classes=40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "nowhere.json"}, "there is no file .*nowhere.json"),
        ({"tokenizer": "folder", "vocab_size": 300}, "expected a name that ends in .json"),
        ({"tokenizer": "broken.json"}, "is no tokenizer.json"),
        ({"end_token": "</s>"}, "bytes have 257 tokens"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"num_classes": 100}, "num_classes is 100, but bytes has 257 tokens"),
    ],
)
def test_what_cannot_be_a_vocabulary_is_refused(tmp_path, arguments, message):
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        task_of(tmp_path, **arguments)


def test_models_may_have_more_outputs_than_there_are_tokens(tmp_path):
    assert task_of(tmp_path, num_classes=512).num_classes == 512


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [1, 2]}, "column 'text' has type int64; expected text"),
        ({"text": ["a", None]}, "no text in 1 rows"),
        ({"words": ["a"]}, "there is no column 'text'"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        rows(task_of(tmp_path), Documents(**columns))
