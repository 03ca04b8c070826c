from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import unicodedata
from functools import partial

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data.columns import Ragged, take
from kdpipe.errors import ConfigError, DataError
from kdpipe.huggingface import quietly
from kdpipe.preprocess import Preprocess, PretrainedTokenizer, Tokenizer, Utf8Bytes, offers
from toy_text import TEXTS, ragged, save_tokenizer

ONE = {"text": ragged(TEXTS)}
PAIRS = {"text": ragged(TEXTS), "pair": ragged(TEXTS[::-1])}
LONG = "word " * 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


MAKERS = {
    "bytes": lambda _: Utf8Bytes(max_length=24),
    "bpe": lambda _: Tokenizer(vocab_size=300, max_length=24),
    "bpe, lower case": lambda _: Tokenizer(vocab_size=300, max_length=24, lowercase=True),
    "word": lambda _: Tokenizer(vocab_size=12, max_length=24, kind="word"),
    "wordpiece": lambda _: Tokenizer(vocab_size=200, max_length=24, kind="wordpiece"),
    "pretrained": lambda folder: PretrainedTokenizer(path=folder, max_length=24),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request, folder):
    return partial(request.param, folder)


EITHER = pytest.mark.parametrize("columns", [ONE, PAIRS], ids=["one", "pairs"])


def fitted(make, columns):
    preprocess = make()
    preprocess.fit([columns])
    return preprocess


# What holds for every one


@EITHER
def test_rows_are_tokens_padded_on_the_right_to_one_length(make, columns):
    preprocess = fitted(make, columns)
    assert isinstance(preprocess, Preprocess)
    inputs = preprocess(columns)
    assert {"input_ids", "attention_mask"} <= set(inputs) <= {"input_ids", "attention_mask", "token_type_ids"}
    for tensor in inputs.values():
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((len(TEXTS), 24), torch.int64, "cpu")
    mask = inputs["attention_mask"]
    assert mask.tolist() == [[1] * length + [0] * (24 - length) for length in preprocess.lengths(columns)]
    assert preprocess.lengths(columns).dtype == np.int64
    assert preprocess.lengths(columns).min() > 0
    known = offers(preprocess)
    assert (inputs["input_ids"][mask == 0] == known["pad_id"]).all()
    assert inputs["input_ids"].min() >= 0
    assert inputs["input_ids"].max() < known["vocab_size"]
    assert known["max_length"] == 24


@EITHER
def test_a_row_becomes_the_same_whatever_stands_beside_it(make, columns):
    preprocess = fitted(make, columns)
    whole = preprocess(columns)
    for rows in ([3], [4, 0, 0, 7, 1], [5, 6], []):
        part = preprocess({name: take(column, np.array(rows, np.int64)) for name, column in columns.items()})
        assert {name: tensor.tolist() for name, tensor in part.items()} == {
            name: tensor[rows].tolist() for name, tensor in whole.items()
        }


@EITHER
def test_state_travels_as_json(make, columns):
    before, other = fitted(make, columns), make()
    other.load_state(json.loads(json.dumps(dict(before.state()))))
    assert other.state() == before.state()
    assert offers(other) == offers(before)
    assert all(torch.equal(tensor, other(columns)[name]) for name, tensor in before(columns).items())


@EITHER
def test_workers_of_a_loader_make_the_same(make, columns):
    """Though the main process has tokenised before they were forked."""
    preprocess = fitted(make, columns)
    here = preprocess(columns)
    batches = torch.utils.data.DataLoader([columns] * 3, batch_size=None, num_workers=2, collate_fn=preprocess)
    unpickled = pickle.loads(pickle.dumps(preprocess))  # noqa: S301
    for there in (*batches, unpickled(columns)):
        assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())


def test_long_texts_fill_the_row(make):
    columns = {"text": ragged([LONG, LONG + "more"])}
    preprocess = fitted(make, columns)
    assert preprocess.lengths(columns).tolist() == [24, 24]


def test_of_a_pair_the_longer_text_is_cut_first(make):
    short = {"text": ragged(["a", LONG, LONG]), "pair": ragged([LONG, "a", LONG])}
    preprocess = fitted(make, {"text": ragged(["a", LONG])})
    inputs = preprocess(short)
    alone = preprocess({"text": ragged(["a"])})["input_ids"][0].tolist()
    alone = alone[: alone.index(offers(preprocess)["pad_id"])]
    marks = [place for place, token in enumerate(inputs["input_ids"][2].tolist()) if token == alone[-1]]
    assert len(marks) == 2
    assert abs((marks[1] - marks[0]) - (marks[0] + 1)) <= 2, "both are cut to half of it"
    assert inputs["input_ids"][0].tolist()[: len(alone)] == alone
    assert inputs["input_ids"][1].tolist()[-len(alone) + 1 :] == alone[1:] or isinstance(preprocess, Utf8Bytes)
    assert preprocess.lengths(short).tolist() == [24] * 3


@pytest.mark.parametrize("max_length", [4, 0, -3])
def test_rows_too_short_for_a_pair_are_refused(folder, max_length):
    makers = [
        Utf8Bytes,
        partial(Tokenizer, vocab_size=300),
        partial(PretrainedTokenizer, path=folder),
    ]
    for each in makers:
        with pytest.raises(ConfigError, match=rf"max_length is {max_length}; expected at least 5 tokens"):
            each(max_length=max_length)


def test_rows_without_text_and_rows_that_are_no_text_are_refused(make):
    preprocess = fitted(make, ONE)
    with pytest.raises(DataError, match="no column 'text' of text; they have features"):
        preprocess({"features": np.zeros((2, 3), np.float32)})
    broken = Ragged(values=np.frombuffer("é".encode()[:1], np.uint8), offsets=np.array([0, 1]))
    if not isinstance(preprocess, Utf8Bytes):
        with pytest.raises(DataError, match="not UTF-8"):
            preprocess({"text": broken})


# Bytes


@given(st.lists(st.text(max_size=9), min_size=1, max_size=5), st.data())
def test_bytes_can_be_read_back(texts, data):
    pairs = data.draw(st.none() | st.lists(st.text(max_size=9), min_size=len(texts), max_size=len(texts)))
    columns = {"text": ragged(texts)} | ({"pair": ragged(pairs)} if pairs is not None else {})
    inputs = Utf8Bytes(max_length=80)(columns)
    for row, text in enumerate(texts):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        said = [text] if pairs is None else [text, pairs[row]]
        assert ids == [*itertools.chain.from_iterable([*(byte + 3 for byte in each.encode()), 1] for each in said)]


# Vocabularies that are learnt here


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "word"])
@pytest.mark.parametrize("block_rows", [1, 3, 8])
def test_the_vocabulary_depends_on_the_rows_only(kind, block_rows):
    whole, other = (Tokenizer(vocab_size=290, max_length=24, kind=kind) for _ in range(2))
    whole.fit([PAIRS])
    order = np.random.default_rng(0).permutation(len(TEXTS))
    starts = range(0, len(order), block_rows)
    blocks = [
        {name: take(column, order[start : start + block_rows]) for name, column in PAIRS.items()} for start in starts
    ]
    other.fit(iter(blocks))
    assert other.state() == whole.state()


LEARN = """
import sys
import numpy as np
from kdpipe.fingerprint import digest
from kdpipe.preprocess import Tokenizer
from toy_text import ragged
draws = np.random.default_rng(0).zipf(1.3, (3000, 12)) % 6000
texts = ["".join(chr(0x4E00 + each) + (" " if each % 3 else "") for each in row) for row in draws.tolist()]
texts += [" ".join("abcdefghijklm"[: 1 + each % 13] + str(each % 97) for each in row) for row in draws.tolist()]
for kind in ("bpe", "wordpiece", "word"):
    tokenizer = Tokenizer(vocab_size=1200, max_length=16, kind=kind)
    tokenizer.fit([{"text": ragged(texts)}])
    print(kind, tokenizer.offers["vocab_size"], digest(dict(tokenizer.state())))
"""


def test_every_process_learns_the_same_vocabulary_with_any_number_of_threads():
    running = []
    for parallel, threads, seed in (("false", "1", "0"), ("true", "1", "1"), ("true", "5", "2")):
        settings = {"TOKENIZERS_PARALLELISM": parallel, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
        running.append(
            subprocess.Popen([sys.executable, "-c", LEARN], env=environment, stdout=subprocess.PIPE, text=True)
        )
    found = [process.communicate(timeout=120)[0] for process in running]
    assert len(set(found)) == 1
    assert "bpe 1200" in found[0]


BPE = Tokenizer(vocab_size=300, max_length=4000)
BPE.fit([ONE])


@given(st.text())
def test_nothing_is_unknown_to_bpe(text):
    tokenizer = BPE
    inputs = tokenizer({"text": ragged([text])})
    ids = inputs["input_ids"][0][inputs["attention_mask"][0] == 1].tolist()
    assert (ids[0], ids[-1]) == (2, 3)
    assert 1 not in ids
    read = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.state()["tokenizer"])).decode(ids)
    assert read.removeprefix(" ") == unicodedata.normalize("NFC", text).removeprefix(" ")


def words_of(tokenizer, text, **columns):
    vocabulary = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.state()["tokenizer"]))
    inputs = tokenizer({"text": ragged([text]), **{name: ragged([each]) for name, each in columns.items()}})
    return [vocabulary.id_to_token(each) for each in inputs["input_ids"][0][inputs["attention_mask"][0] == 1].tolist()]


def test_words_are_those_that_occur_most():
    tokenizer = Tokenizer(vocab_size=7, max_length=12, kind="word")
    tokenizer.fit([{"text": ragged(["b a, c c", "a a b b b"])}])
    assert words_of(tokenizer, "a b c d, B") == ["[CLS]", "a", "b", "c", "[UNK]", "[UNK]", "[UNK]", "[SEP]"]
    assert words_of(tokenizer, "") == ["[CLS]", "[SEP]"]
    assert words_of(tokenizer, "a", pair="b") == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]


def test_lower_case_is_a_choice():
    for lowercase, expected in (
        (True, ["[CLS]", "film", "film", "[SEP]"]),
        (False, ["[CLS]", "film", "[UNK]", "[SEP]"]),
    ):
        tokenizer = Tokenizer(vocab_size=9, max_length=12, kind="word", lowercase=lowercase)
        tokenizer.fit([{"text": ragged(["film film"])}])
        assert words_of(tokenizer, "film FILM") == expected


def test_characters_of_words_without_spaces_are_words():
    tokenizer = Tokenizer(vocab_size=9, max_length=12, kind="word")
    tokenizer.fit([{"text": ragged(["电影很好"])}])
    assert words_of(tokenizer, "好电影 very") == ["[CLS]", "好", "电", "影", "[UNK]", "[SEP]"]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "word"])
def test_special_tokens_in_a_text_are_text(kind):
    tokenizer = Tokenizer(vocab_size=300, max_length=64, kind=kind)
    tokenizer.fit([{"text": ragged(["[SEP] [PAD] x"])}])
    inputs = tokenizer({"text": ragged(["x [SEP] [PAD] [CLS] x"])})
    ids = inputs["input_ids"][0][inputs["attention_mask"][0] == 1].tolist()
    assert [ids.count(special) for special in (0, 2, 3)] == [0, 1, 1]


def test_token_types_tell_the_texts_of_a_pair_where_they_are_wanted():
    wanted, plain = (
        Tokenizer(vocab_size=300, max_length=9, kind="word", token_type_ids=each) for each in (True, False)
    )
    for tokenizer in (wanted, plain):
        tokenizer.fit([{"text": ragged(["a b"])}])
    pair = {"text": ragged(["a b"]), "pair": ragged(["b"])}
    assert wanted(pair)["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0]]
    assert "token_type_ids" not in plain(pair)
    assert "token_type_ids" not in wanted({"text": pair["text"]})


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "word"])
@pytest.mark.parametrize("texts", [[], ["", ""]], ids=["no rows", "empty rows"])
def test_a_vocabulary_of_nothing_is_the_special_tokens(kind, texts):
    tokenizer = Tokenizer(vocab_size=300, max_length=8, kind=kind)
    tokenizer.fit([{"text": ragged(texts)}])
    assert tokenizer.offers["vocab_size"] == {"bpe": 260, "wordpiece": 4, "word": 4}[kind]
    assert tokenizer({"text": ragged(["new"])})["attention_mask"].any()


@pytest.mark.parametrize(("kind", "vocab_size", "smallest"), [("bpe", 259, 260), ("word", 4, 5), ("bpe", -1, 260)])
def test_a_vocabulary_too_small_is_refused(kind, vocab_size, smallest):
    message = rf"vocab_size is {vocab_size}; expected at least {smallest}: the special tokens \[PAD\]"
    with pytest.raises(ConfigError, match=message):
        Tokenizer(vocab_size=vocab_size, max_length=8, kind=kind)


def test_what_was_not_fitted_says_so():
    tokenizer = Tokenizer(vocab_size=300, max_length=8)
    for act in (tokenizer.state, partial(tokenizer, ONE), partial(tokenizer.lengths, ONE), partial(offers, tokenizer)):
        with pytest.raises(ConfigError, match="no vocabulary yet: train the model here"):
            act()


# Tokenizers that are ready


@EITHER
def test_a_folders_tokenizer_is_that_of_transformers(folder, columns):
    with quietly() as transformers:
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = [TEXTS] if columns is ONE else [TEXTS, TEXTS[::-1]]
    expected = theirs(*texts, truncation=True, max_length=16, padding="max_length")
    inputs = PretrainedTokenizer(path=folder, max_length=16)(columns)
    for name, tensor in inputs.items():
        assert tensor.tolist() == expected[name]
    assert ("token_type_ids" in inputs) == (columns is PAIRS)


def test_a_tokenizer_json_is_a_tokenizer_too(tmp_path):
    learnt = Tokenizer(vocab_size=300, max_length=24)
    learnt.fit([PAIRS])
    (tmp_path / "own.json").write_text(json.dumps(learnt.state()["tokenizer"]))
    texts = {"text": ragged([text.replace("[SEP]", "") for text in TEXTS])}
    ready = PretrainedTokenizer(path=tmp_path / "own.json", max_length=24, pad_token="[PAD]")
    assert offers(ready) == offers(learnt)
    assert all(torch.equal(tensor, learnt(texts)[name]) for name, tensor in ready(texts).items())
    assert ready.state()["files"].keys() == {"own.json"}


def test_the_tokenizers_own_rule_says_where_texts_are_cut(tmp_path):
    save_tokenizer(tmp_path / "left", truncation_side="left", padding_side="left")
    columns = {"text": ragged(["a a a a a fine film", "a"])}
    ids = PretrainedTokenizer(path=tmp_path / "left", max_length=5)(columns)["input_ids"]
    assert ids.tolist() == [[2, 5, 6, 7, 3], [2, 5, 3, 0, 0]]


def test_token_types_are_as_the_tokenizer_says(tmp_path):
    save_tokenizer(tmp_path, model_input_names=["input_ids", "attention_mask"])
    assert "token_type_ids" not in PretrainedTokenizer(path=tmp_path, max_length=9)(PAIRS)
    assert "token_type_ids" in PretrainedTokenizer(path=tmp_path, max_length=9, token_type_ids=True)(PAIRS)


def test_another_tokenizer_in_the_same_place_is_refused(tmp_path):
    before = PretrainedTokenizer(path=save_tokenizer(tmp_path), max_length=9)
    assert before.state()["files"].keys() == {"vocab.txt", "tokenizer_config.json"}
    (tmp_path / "model.safetensors").write_bytes(b"weights may change")
    PretrainedTokenizer(path=tmp_path, max_length=9).load_state(before.state())
    save_tokenizer(tmp_path, words=["a", "film", "fine"])
    with pytest.raises(ConfigError, match=r"not the one that the model was trained with: vocab\.txt differs"):
        PretrainedTokenizer(path=tmp_path, max_length=9).load_state(before.state())


def test_fingerprints_cover_the_tokenizers_files_alone(tmp_path):
    save_tokenizer(tmp_path / "own")
    before = PretrainedTokenizer.reads({"path": "own", "max_length": 9}, tmp_path)
    assert before.keys() == {"own/vocab.txt", "own/tokenizer_config.json"}
    (tmp_path / "own" / "model.safetensors").write_bytes(b"weights may change")
    (tmp_path / "own" / "config.json").write_text("{}")
    assert PretrainedTokenizer.reads({"path": "own", "max_length": 9}, tmp_path) == before
    save_tokenizer(tmp_path / "own", words=["a", "film", "fine"])
    assert PretrainedTokenizer.reads({"path": "own", "max_length": 9}, tmp_path) != before
    assert PretrainedTokenizer.reads({"hub": "a/b@0"}, tmp_path) == {}


def test_a_tokenizer_that_names_no_padding_needs_a_token(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0, "<end>": 7}, unk_token="x"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="names no token to pad with: give pad_token"):
        PretrainedTokenizer(path=tmp_path / "tokenizer.json", max_length=6)
    with pytest.raises(ConfigError, match="has no token '<pad>'"):
        PretrainedTokenizer(path=tmp_path / "tokenizer.json", max_length=6, pad_token="<pad>")
    ready = PretrainedTokenizer(path=tmp_path / "tokenizer.json", max_length=6, pad_token="<end>")
    assert offers(ready) == {"vocab_size": 8, "pad_id": 7, "max_length": 6}, "ids may have holes"
    assert ready({"text": ragged(["x"])})["input_ids"].tolist() == [[0, 7, 7, 7, 7, 7]]


# Packages


def test_an_absent_package_is_named_with_its_extra(monkeypatch, folder):
    tokenizer = Tokenizer(vocab_size=300, max_length=8)
    for name in ("tokenizers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"needs the package tokenizers: pip install 'kdpipe\[text\]'"):
        tokenizer.fit([ONE])
    with pytest.raises(
        ConfigError, match=r"^this needs the package transformers: pip install 'kdpipe\[transformers\]'$"
    ):
        PretrainedTokenizer(path=folder, max_length=8)


def test_they_are_imported_only_where_they_are_needed():
    code = (
        "import sys, kdpipe.preprocess, kdpipe.tasks.text, kdpipe.models.pretrained, kdpipe.teachers.pretrained\n"
        "assert not {'tokenizers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
