"""What a transform may do: the same row for the same key, whatever its batch, in the layout that it was given."""

from __future__ import annotations

import numpy as np
import pytest

from kdpipe.data.columns import Ragged, take
from kdpipe.errors import ConfigError
from kdpipe.random_numbers import uniform
from kdpipe.views import PROBE_ROWS, ViewSpec, row_keys

NUM_ROWS = 20
IDS = [f"id-{row}" for row in range(NUM_ROWS)]


def columns():
    """Pixels, numbers of several sizes (some of them missing), and words."""
    random = np.random.default_rng(0)
    numbers = random.normal(size=(NUM_ROWS, 3)).astype(np.float32) * np.float32([1e-3, 1.0, 1e6])
    numbers[3, 1] = np.nan
    lengths = random.integers(0, 4, NUM_ROWS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return {
        "image": random.integers(0, 256, (NUM_ROWS, 6, 6, 1)).astype(np.uint8),
        "numbers": numbers,
        "words": Ragged(values=random.integers(0, 9, offsets[-1]), offsets=offsets),
    }


def spec(transform, **settings):
    return ViewSpec(count=2, seed=3, transform=transform, **settings)


def changing(name, change):
    """A transform of one column, given its values and the rows' keys."""

    def transform(columns, keys, seed):
        return {**columns, name: change(columns[name], keys)}

    return transform


def noise(values, keys):
    return (values + 40 * uniform(keys, values.shape[1:], 0)).clip(0, 255).astype(values.dtype)


def longer(words, keys):
    """Every row twice, by its key in another order."""
    rows = [np.roll(np.tile(words.row(row), 2), int(key) % 5) for row, key in enumerate(keys)]
    return Ragged(values=np.concatenate(rows), offsets=2 * words.offsets)


@pytest.mark.parametrize(
    "transform",
    [
        lambda columns, keys, seed: columns,
        changing("image", noise),
        changing("numbers", noise),
        changing("words", longer),
        changing("words", lambda words, keys: take(words, np.arange(len(words)))),
    ],
)
def test_what_depends_on_the_key_alone_passes(transform):
    spec(transform).probe(columns(), IDS)


def test_no_transform_and_the_clean_view_are_the_rows_themselves():
    rows = columns()
    ViewSpec(count=2).probe(rows, IDS)
    assert ViewSpec(count=2).of(rows, IDS, 1) is rows
    assert spec(changing("image", noise)).of(rows, IDS, 0) is rows


class Forgetful:
    """Draws anew at every call."""

    def __init__(self):
        self.random = np.random.default_rng(0)

    def __call__(self, columns, keys, seed):
        return {**columns, "image": self.random.permuted(columns["image"], axis=1)}


@pytest.mark.parametrize(
    ("transform", "column", "way"),
    [
        (Forgetful(), "image", "a second time"),
        (changing("image", lambda image, keys: image[::-1]), "image", "in another order"),
        (changing("image", lambda image, keys: np.roll(image, 1, axis=0)), "image", "in another order"),
        (changing("image", lambda image, keys: (image - image.mean(0)).astype(np.uint8)), "image", "one by one"),
        (changing("image", lambda image, keys: (image * (255 / image.max())).astype(np.uint8)), "image", "one by one"),
        (changing("numbers", lambda x, keys: x - np.nan_to_num(x).mean(axis=0)), "numbers", "one by one"),
        (changing("numbers", lambda x, keys: x + np.float32(1e-3) * x[:1]), "numbers", "in another order"),
        (changing("words", lambda words, keys: take(words, np.arange(len(words))[::-1])), "words", "in another order"),
    ],
)
def test_what_depends_on_the_batch_is_refused(transform, column, way):
    name = getattr(transform, "__name__", type(transform).__name__)
    with pytest.raises(
        ConfigError, match=rf"^views\.transform: {name} makes another '{column}' .*them {way}"
    ) as caught:
        spec(transform).probe(columns(), IDS)
    assert "kdpipe.random_numbers.uniform(keys, shape, seed)" in str(caught.value)


def test_rounding_in_batches_of_other_sizes_passes():
    """A pixel in 576 by one step, a float by its last bits."""

    def rounded(columns, keys, seed):
        image = columns["image"].copy()
        image[0, 0, 0, 0] ^= keys.tolist() == row_keys(IDS[:1], 1).tolist()
        return {**columns, "image": image, "numbers": columns["numbers"] * np.float32(1 + 5e-7 * len(keys))}

    only_first = {name: take(column, np.arange(PROBE_ROWS)) for name, column in columns().items()}
    spec(rounded).probe(only_first, IDS)


def test_few_rows_are_shown():
    shown = []

    def transform(columns, keys, seed):
        shown.append(len(keys))
        return columns

    spec(transform).probe(columns(), IDS)
    assert sorted(shown) == [1] * PROBE_ROWS + [PROBE_ROWS] * 3
    spec(transform).probe({name: take(column, np.arange(1)) for name, column in columns().items()}, IDS[:1])


GIVEN = r"image uint8 \[20, 6, 6, 1\], numbers float32 \[20, 3\], words of 20 ragged rows of int64"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda columns: None, "nothing"),
        (lambda columns: [columns["image"]], "a list"),
        (lambda columns: {}, "no columns"),
        (lambda columns: {"image": columns["image"]}, r"image uint8 \[20, 6, 6, 1\](?=;)"),
        (lambda columns: {**columns, "more": columns["image"]}, r".*, more uint8 \[20, 6, 6, 1\], "),
        (lambda columns: {0: columns["image"], None: columns["image"]}, "0 uint8"),
        (lambda columns: {**columns, "image": columns["image"][1:]}, r"image uint8 \[19, 6, 6, 1\]"),
        (lambda columns: {**columns, "image": columns["image"][:, 1:]}, r"image uint8 \[20, 5, 6, 1\]"),
        (lambda columns: {**columns, "image": columns["image"] / 255}, r"image float64 \[20, 6, 6, 1\]"),
        (lambda columns: {**columns, "image": columns["image"].tolist()}, "image as a list"),
        (lambda columns: {**columns, "words": take(columns["words"], np.arange(5))}, ".*words of 5 ragged rows of"),
        (lambda columns: {**columns, "words": columns["words"].values}, r".*words int64 \["),
    ],
)
def test_another_layout_is_refused_in_the_words_of_the_one_that_was_given(change, found):
    def Crop(columns, keys, seed):
        return change(columns)

    message = rf"^views\.transform: Crop gives {found}.*; expected the layout that it was given: {GIVEN}$"
    with pytest.raises(ConfigError, match=message):
        spec(Crop).of(columns(), IDS, 2)


def test_an_error_of_a_transform_is_told_with_what_it_was_given():
    class Failing:
        def __call__(self, columns, keys, seed):
            raise KeyError("pixels")

    with pytest.raises(
        ConfigError, match=rf"^views\.transform: Failing fails on {GIVEN}: KeyError: 'pixels'$"
    ) as caught:
        spec(Failing()).of(columns(), IDS, 1)
    assert isinstance(caught.value.__cause__, KeyError)
