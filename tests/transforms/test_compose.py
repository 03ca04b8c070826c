"""Transforms in a row, and functions of one's own; both from Python and from params.yaml."""

from __future__ import annotations

import numpy as np
import pytest

from kdpipe.config import Factory, bind
from kdpipe.data.columns import Ragged
from kdpipe.errors import ConfigError
from kdpipe.random_numbers import uniform
from kdpipe.transforms import Compose, Flip, Noise, PerExample, WordDropout
from kdpipe.views import ViewSpec, row_keys

NUM_ROWS = 300
IDS = [f"id-{row}" for row in range(NUM_ROWS)]
KEYS = row_keys(IDS, 1)
OWN = """
import numpy as np


def invert(example, rng):
    return {"image": 255 - example["image"] if rng.random() < 0.5 else example["image"]}


class Brighter:
    def __call__(self, example, rng):
        return {"image": np.maximum(example["image"], rng.integers(0, 256, dtype=np.uint8))}


def one_argument(example):
    return example
"""


def images():
    return {"image": np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 4, 6, 3)).astype(np.uint8)}


class Draws:
    """Writes down what it draws."""

    def __init__(self):
        self.drawn = None

    def __call__(self, columns, keys, seed):
        self.drawn = uniform(keys, (1,), seed)[:, 0]
        return columns


def test_every_place_draws_from_a_stream_of_its_own():
    three = [Draws(), Draws(), Draws()]
    Compose(three)(images(), KEYS, 5)
    first, second, third = (each.drawn for each in three)
    for one, other in ((first, second), (second, third), (first, uniform(KEYS, (1,), 5)[:, 0])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2
    more = [Draws(), Draws()]
    Compose(more)(images(), KEYS, 5)
    assert np.array_equal(more[1].drawn, second)
    Compose(more)(images(), KEYS, 6)
    assert not np.array_equal(more[1].drawn, second)


def test_the_order_is_that_of_the_list():
    def plus(columns, keys, seed):
        return {"image": columns["image"] // 2 + 10}

    def halved(columns, keys, seed):
        return {"image": columns["image"] // 2}

    found = Compose([plus, halved])(images(), KEYS, 0)["image"]
    assert np.array_equal(found, (images()["image"] // 2 + 10) // 2)


def test_params_yaml_names_transforms_and_functions(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    arguments = {
        "transforms": [
            {"factory": "kdpipe.transforms:Flip", "probability": 1},
            {"factory": "kdpipe.transforms:PerExample", "function": "own.py:invert"},
            {"factory": "kdpipe.transforms:PerExample", "function": "own.py:Brighter"},
        ]
    }
    factory = Factory(path="kdpipe.transforms:Compose", arguments=arguments)
    transform = bind(factory, tmp_path, "views.transform", root=tmp_path).make()
    ViewSpec(count=1, transform=transform).probe(images(), IDS)
    flipped = images()["image"][:, :, ::-1]
    found = transform(images(), KEYS, 0)["image"]
    brighter = np.maximum(flipped, found.min(axis=(1, 2, 3))[:, None, None, None])
    is_plain = (found == brighter).all(axis=(1, 2, 3))
    assert 0.35 < is_plain.mean() < 0.65
    digests = Compose.reads(arguments, tmp_path)
    assert sorted(digests) == ["kdpipe", "own@"]
    (tmp_path / "own.py").write_text(OWN + "# changed\n")
    assert Compose.reads(arguments, tmp_path)["own@"] != digests["own@"]


def test_examples_of_every_kind_of_column():
    random = np.random.default_rng(0)
    lengths = random.integers(0, 5, NUM_ROWS)
    words = Ragged(values=random.integers(0, 9, lengths.sum()), offsets=np.concatenate([[0], np.cumsum(lengths)]))
    columns = {
        "features": random.normal(size=(NUM_ROWS, 3)).astype(np.float32),
        "label": np.arange(NUM_ROWS),
        "words": words,
    }

    def own(example, rng):
        example["features"] += rng.normal(size=3).astype(np.float32)
        kept = rng.random(len(example["words"])) < 0.5
        return {**example, "words": example["words"][kept]}

    before = columns["features"].copy()
    spec = ViewSpec(count=1, transform=PerExample(own))
    spec.probe(columns, IDS)
    found = spec.of(columns, IDS, 1)
    assert np.array_equal(columns["features"], before)
    assert np.array_equal(found["label"], columns["label"])
    assert 0.8 < (found["features"] - before).std() < 1.2
    assert 0 < len(found["words"].values) < len(words.values)
    for row in range(NUM_ROWS):
        assert set(found["words"].row(row)) <= set(words.row(row))
    assert [len(each) for each in spec.of({"words": words.take(np.arange(0))}, [], 1).values()] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transforms": []}, "expected a list of transforms"),
        ({"transforms": {"factory": "kdpipe.transforms:Flip"}}, "expected a list of transforms"),
        ({"transforms": [{"Flip": 1}]}, r"transforms\.0: expected a mapping with a key \"factory\""),
        (
            {"transforms": [{"factory": "kdpipe.transforms:Flip", "probabilty": 1}]},
            r"transforms\.0\.probabilty: .* did you mean 'probability'",
        ),
        (
            {"transforms": [{"factory": "kdpipe.transforms:Flip", "probability": "much"}]},
            r"transforms\.0\.probability: expected a number",
        ),
        ({"transforms": [{"factory": "kdpipe.transforms:Turn"}]}, "has no 'Turn'; it has .*WordDropout"),
        ({"transforms": [3]}, r"transforms\.0: 3 is no Transform"),
    ],
)
def test_lists_that_make_no_sense_are_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        Compose(**arguments, root=tmp_path)


def test_functions_that_make_no_sense_are_refused(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(ConfigError, match=r"own\.py:one_argument does not take \(example, rng\)"):
        PerExample("own.py:one_argument", tmp_path)
    with pytest.raises(ConfigError, match="has no 'other'"):
        PerExample("own.py:other", tmp_path)
    cut = ViewSpec(count=1, transform=PerExample(lambda example, rng: {"image": example["image"][:, :4]}))
    with pytest.raises(ConfigError, match=r"gives image uint8 .*4, 3.*; expected the layout"):
        cut.of(images(), IDS, 1)
    for given, found in (
        (None, "NoneType"),
        ({1: 2}, "a mapping of 1"),
        ({}, "a mapping of nothing"),
        ({"pixels": 1}, "a mapping of pixels"),
    ):
        transform = PerExample(lambda example, rng, given=given: given)
        with pytest.raises(ConfigError, match=f"PerExample's function gave {found}; expected a mapping with image"):
            ViewSpec(count=1, transform=transform).of(images(), IDS, 1)


def test_noise_has_the_wanted_deviation_and_leaves_gaps():
    features = np.zeros((NUM_ROWS * 10, 3), np.float32)
    features[7, 0] = np.nan
    keys = row_keys([f"row {row}" for row in range(len(features))], 1)
    other = np.arange(len(features))
    found = Noise(std=[2.0, 0.5, 0.0])({"features": features, "other": other}, keys, 0)
    assert found["other"] is other
    assert found["features"].dtype == np.float32
    assert np.isnan(found["features"]).sum() == 1
    assert np.isnan(found["features"][7, 0])
    assert np.allclose(np.nanstd(found["features"], axis=0), [2, 0.5, 0], rtol=0.05)
    assert np.abs(np.nanmean(found["features"], axis=0)).max() < 0.15
    assert np.array_equal(Noise(std=0)({"features": features}, keys, 0)["features"], features, equal_nan=True)
    alike = Noise(std=1)({"features": features}, keys, 0)["features"]
    assert np.allclose(np.nanstd(alike, axis=0), 1, rtol=0.05)
    ViewSpec(count=1, transform=Noise(std=3)).probe({"features": features}, [str(row) for row in other])


def texts(*rows):
    encoded = [row.encode() for row in rows]
    values = np.frombuffer(b"".join(encoded), np.uint8)
    return Ragged(values=values, offsets=np.cumsum([0, *map(len, encoded)]))


def rows_of(column):
    return [column.row(row).tobytes().decode() for row in range(len(column))]


def test_word_dropout():
    text = " ".join(f"w{place}é" for place in range(20))
    columns = {"text": texts(*[text] * NUM_ROWS), "pair": texts(*[text] * NUM_ROWS), "other": KEYS}
    found = WordDropout(probability=0.3)(columns, KEYS, 0)
    assert found["other"] is KEYS
    left = [row.split() for row in rows_of(found["text"])]
    assert all(" ".join(words) == row for words, row in zip(left, rows_of(found["text"]), strict=True))
    assert all(words == [each for each in text.split() if each in words] for words in left)
    dropped = 1 - np.array([[word in words for word in text.split()] for words in left])
    assert 0.27 < dropped.mean() < 0.33
    assert (np.abs(dropped.mean(axis=0) - 0.3) < 0.12).all()
    assert rows_of(found["text"]) != rows_of(found["pair"])
    ViewSpec(count=1, transform=WordDropout(probability=0.3)).probe(columns, IDS)


def test_word_dropout_keeps_space_and_one_word():
    given = ["", "   ", "one", " a\tb \n", "a\n\nb  c", "\u00a0x y"]
    keys = KEYS[: len(given)]
    assert rows_of(WordDropout(probability=0)({"text": texts(*given)}, keys, 0)["text"]) == given
    bare = rows_of(WordDropout(probability=1)({"text": texts(*given)}, keys, 0)["text"])
    assert bare[:3] == given[:3]
    assert bare[3] in (" a", "b")
    seen = set()
    for view in range(60):
        seen.add(
            rows_of(WordDropout(probability=0.5)({"text": texts("a\n\nb  c")}, row_keys(["x"], view), 0)["text"])[0]
        )
    assert seen == {"a\n\nb  c", "a\n\nb", "a  c", "b  c", "a", "b", "c"}


@pytest.mark.parametrize(
    ("transform", "columns", "message"),
    [
        (Noise(std=1.0), {"text": texts("a", "b")}, "no column 'features' of numbers"),
        (
            Noise(std=[1.0, 2.0]),
            {"features": np.zeros((2, 3), np.float32)},
            "std has 2 numbers; the table has 3 columns",
        ),
        (WordDropout(), {"features": np.zeros((2, 3), np.float32)}, "no column 'text'"),
        (WordDropout(), {"text": np.zeros((2, 3), np.uint8)}, "no column 'text'"),
        (Flip(), {"text": texts("a", "b")}, "no column 'image'"),
    ],
)
def test_rows_of_another_kind_are_refused(transform, columns, message):
    with pytest.raises(ConfigError, match=message):
        ViewSpec(count=1, transform=transform).of(columns, ["a", "b"], 1)


@pytest.mark.parametrize("std", [-1.0, [1.0, float("nan")], float("inf")])
def test_deviations_that_make_no_sense_are_refused(std):
    with pytest.raises(ConfigError, match=r"Noise: std is .*; expected finite numbers, at least 0"):
        Noise(std=std)
