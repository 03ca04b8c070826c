from __future__ import annotations

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from kdpipe.data.columns import Ragged
from kdpipe.errors import ConfigError, DataError
from kdpipe.preprocess import ImageTensor, Preprocess, Standardize, offers
from kdpipe.preprocess.named import NamedPreprocess

COLOUR = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), np.uint8)
GREY = COLOUR[..., :1]
FEATURES = np.random.default_rng(1).normal(50, [0.1, 30], (40, 2)).astype(np.float32)


def encoded(images):
    """PNG bytes: the pixels are kept exactly."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
        files.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, files)]).astype(np.int64)
    return Ragged(values=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)


# What holds for every preprocess


FITTED = [
    pytest.param(ImageTensor, {"image": COLOUR}, id="colour"),
    pytest.param(lambda: ImageTensor(scale=16), {"image": GREY}, id="grey"),
    pytest.param(lambda: ImageTensor(size=(3, 5)), {"image": COLOUR}, id="resized"),
    pytest.param(lambda: ImageTensor(mean=[0.1, 0.2, 0.3], std=[1, 2, 3]), {"image": COLOUR}, id="given"),
    pytest.param(ImageTensor, {"image": encoded(COLOUR)}, id="encoded"),
    pytest.param(Standardize, {"features": FEATURES[:5]}, id="features"),
]


def take(columns, rows):
    return {name: each.take(rows) if isinstance(each, Ragged) else each[rows] for name, each in columns.items()}


@pytest.mark.parametrize(("make", "columns"), FITTED)
def test_a_preprocess_is_one(make, columns):
    preprocess = make()
    assert isinstance(preprocess, Preprocess)
    preprocess.fit([columns])
    tensor = preprocess(columns)
    assert tensor.dtype == torch.float32
    assert tensor.device.type == "cpu"
    assert tensor.isfinite().all()
    assert len(tensor) == 5


@pytest.mark.parametrize(("make", "columns"), FITTED)
def test_a_row_becomes_the_same_whatever_stands_beside_it(make, columns):
    preprocess = make()
    preprocess.fit([columns])
    whole = preprocess(columns)
    for rows in ([3], [4, 0, 0, 2], [1, 2, 3, 4, 0]):
        assert torch.equal(preprocess(take(columns, np.array(rows))), whole[rows])


@pytest.mark.parametrize(("make", "columns"), FITTED)
def test_state_travels_as_json(make, columns):
    fitted, other = make(), make()
    fitted.fit([columns])
    other.load_state(json.loads(json.dumps(dict(fitted.state()))))
    assert other.state() == fitted.state()
    assert torch.equal(other(columns), fitted(columns))


@pytest.mark.parametrize(("make", "columns"), FITTED)
def test_the_rows_are_left_as_they_were(make, columns):
    before = {name: each.values.copy() if isinstance(each, Ragged) else each.copy() for name, each in columns.items()}
    preprocess = make()
    preprocess.fit([columns])
    preprocess(columns).mul_(0)
    for name, each in columns.items():
        np.testing.assert_array_equal(each.values if isinstance(each, Ragged) else each, before[name])


@pytest.mark.parametrize("preprocess", [ImageTensor(), Standardize()])
def test_what_was_not_fitted_says_so(preprocess):
    with pytest.raises(ConfigError, match="train the model here"):
        preprocess.state()
    with pytest.raises(ConfigError, match="train the model here"):
        preprocess({"image": COLOUR, "features": FEATURES})


# Learning mean and std


def cuts(length):
    return st.lists(st.integers(1, length - 1), unique=True).map(sorted)


@given(cuts(len(FEATURES)))
def test_columns_are_standardized_however_the_rows_are_cut_into_blocks(at):
    preprocess = Standardize()
    preprocess.fit({"features": block} for block in np.split(FEATURES, at))
    state = preprocess.state()
    np.testing.assert_allclose(state["mean"], FEATURES.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(state["std"], FEATURES.astype(np.float64).std(axis=0), rtol=1e-9)
    standard = preprocess({"features": FEATURES})
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-3)
    torch.testing.assert_close(standard.std(dim=0, correction=0), torch.ones(2), rtol=0, atol=1e-3)


@given(cuts(len(COLOUR)))
def test_pixels_are_normalised_per_channel_however_the_rows_are_cut_into_blocks(at):
    preprocess = ImageTensor(scale=100)
    preprocess.fit({"image": block} for block in np.split(COLOUR, at))
    pixels = COLOUR.reshape(-1, 3) / 100
    np.testing.assert_allclose(preprocess.state()["mean"], pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(preprocess.state()["std"], pixels.std(axis=0), rtol=1e-12)


def test_large_numbers_far_from_zero_keep_their_spread():
    values = (1e6 + np.arange(100, dtype=np.float32)).reshape(-1, 1)
    preprocess = Standardize()
    preprocess.fit({"features": block} for block in np.split(values, 10))
    np.testing.assert_allclose(preprocess.state()["std"], values.astype(np.float64).std(axis=0), rtol=1e-9)


@given(npst.arrays(np.float32, 1, elements=st.floats(-1e6, 1e6, width=32)), st.integers(1, 50), st.integers(1, 7))
def test_a_constant_column_counts_as_std_1(value, num_rows, block_rows):
    rows = np.repeat(value, num_rows).reshape(-1, 1)
    preprocess = Standardize()
    preprocess.fit({"features": rows[start : start + block_rows]} for start in range(0, num_rows, block_rows))
    assert preprocess.state()["std"] == [1.0]


@given(st.integers(0, 255), st.integers(1, 30))
def test_a_constant_channel_counts_as_std_1(pixel, num_rows):
    """Though a 255th has no end in binary, so that the mean of equal pixels is a little off."""
    preprocess = ImageTensor()
    preprocess.fit([{"image": np.full((num_rows, 3, 5, 1), pixel, np.uint8)}] * 3)
    assert preprocess.state()["std"] == [1.0]


def test_given_mean_and_std_are_not_learnt():
    preprocess = ImageTensor(mean=[0.5], std=[0.25])
    preprocess.fit([{"image": GREY}])
    assert preprocess.state() == {"mean": [0.5], "std": [0.25]}
    expected = (torch.from_numpy(GREY).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.testing.assert_close(preprocess({"image": GREY}), expected)


@pytest.mark.parametrize("given_one", [{"mean": [0.5]}, {"std": [0.5]}])
def test_half_of_the_moments_is_refused(given_one):
    with pytest.raises(ConfigError, match="give both mean and std, or neither"):
        ImageTensor(**given_one)


def test_columns_of_another_number_than_mean_and_std_are_refused():
    for length in (1, 3):
        with pytest.raises(ConfigError, match=f"{length} numbers as mean and {length} as std, .* 2 columns of numbers"):
            Standardize([0.0] * length, [1.0] * length)({"features": FEATURES})
    with pytest.raises(ConfigError, match="2 numbers as mean and 1 as std"):
        Standardize([0.0, 0.0], [1.0])({"features": FEATURES})


def test_rows_of_another_kind_are_refused():
    with pytest.raises(ConfigError, match=r"a column `features` of numbers; rows here have image uint8 \[5, 6, 4, 3\]"):
        Standardize().fit([{"image": COLOUR}])
    with pytest.raises(ConfigError, match=r"a column `image`; rows here have features float32 \[40, 2\]"):
        ImageTensor().fit([{"features": FEATURES}])


# A preprocess by another's name


class Own(Standardize):
    """Gives, or raises, what it is told to."""

    def __init__(self, found):
        super().__init__([0.0, 0.0], [1.0, 1.0])
        self._found = found
        self.offers = {"vocab_size": 7}

    def __call__(self, columns):
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (ValueError("bad row"), r"own fails on features float32 \[40, 2\]: ValueError: bad row"),
        (DataError("row 3 is bad"), "^row 3 is bad"),
        (torch.zeros(3, 2), r"own gives \[3, 2\] for features float32 \[40, 2\]; expected one row for each of the 40"),
        ({"ids": torch.zeros(40, 2), "mask": torch.zeros(39)}, r"own gives ids \[40, 2\], mask \[39\] for"),
        (torch.tensor(1.0), r"own gives \[\] for"),
        ([1, 2], "own gives list for .*; expected a tensor with one row for each of the 40"),
        ({}, "own gives dict for"),
        (None, "own gives nothing for"),
    ],
)
def test_what_a_preprocess_of_ones_own_does_wrong_is_named(found, message):
    with pytest.raises((ConfigError, DataError), match=message):
        NamedPreprocess("own", Own(found))({"features": FEATURES})


def test_a_fit_that_fails_is_named():
    class Fails(Standardize):
        def fit(self, blocks):
            raise KeyError("age")

    with pytest.raises(ConfigError, match="own fit fails: KeyError: 'age'"):
        NamedPreprocess("own", Fails()).fit([{"features": FEATURES}])


def test_settings_that_are_missing_are_named_by_their_key():
    named = NamedPreprocess("teachers.big.preprocess: Standardize", Standardize())
    for use in (named.state, lambda: named({"features": FEATURES})):
        with pytest.raises(ConfigError, match=r"^teachers\.big\.preprocess: Standardize: .* knows no mean and std"):
            use()


def test_a_named_preprocess_is_the_other_one_by_all_else():
    named = pickle.loads(pickle.dumps(copy.deepcopy(NamedPreprocess("own", Own(torch.zeros(40))))))  # noqa: S301 - just written
    assert isinstance(named, Preprocess)
    assert isinstance(named, Own)
    assert type(named) is NamedPreprocess
    assert named({"features": FEATURES}).shape == (40,)
    assert offers(named) == {"vocab_size": 7}
    assert named.state() == {"mean": [0.0, 0.0], "std": [1.0, 1.0]}
    assert not hasattr(named, "lengths")
    named.load_state({"mean": [1.0], "std": [2.0]})
    assert named.state() == {"mean": [1.0], "std": [2.0]}


# Images


def test_channels_of_another_number_than_mean_and_std_are_refused():
    for length in (1, 2):
        with pytest.raises(ConfigError, match=f"{length} numbers as mean and {length} as std, .* have 3 channels"):
            ImageTensor([0.5] * length, [0.5] * length)({"image": COLOUR})


def test_a_size_without_pixels_is_refused():
    with pytest.raises(ConfigError, match=r"size is \[0, 4\]; expected height and width of at least 1 pixel"):
        ImageTensor(size=(0, 4))


def identity(**arguments):
    return ImageTensor(mean=[0, 0, 0], std=[1, 1, 1], scale=1, **arguments)


def test_channels_come_first():
    tensor = identity()({"image": COLOUR})
    assert tensor.shape == (5, 3, 6, 4)
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), COLOUR)


@pytest.mark.parametrize("images", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("size", [None, (3, 5), (6, 4), (12, 2)])
def test_encoded_and_plain_rows_become_the_same(images, size):
    preprocess = ImageTensor(size=size)
    preprocess.fit([{"image": images}])
    assert torch.equal(preprocess({"image": encoded(images)}), preprocess({"image": images}))
    assert preprocess({"image": images}).shape[2:] == (size or (6, 4))


def test_resizing_is_bilinear_height_first():
    resized = identity(size=(3, 5))({"image": COLOUR})[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(
        resized, np.asarray(Image.fromarray(COLOUR[0]).resize((5, 3), Image.Resampling.BILINEAR))
    )


@pytest.mark.parametrize("shape", [(1, 4, 3), (6, 1, 3), (1, 1, 3), (1, 4, 1), (6, 1, 1), (1, 1, 1)])
def test_images_one_pixel_high_or_wide_are_resized_too(shape):
    images = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    preprocess = ImageTensor(mean=[0.0] * shape[2], std=[1.0] * shape[2], size=(8, 8), scale=1)
    channels = [[Image.fromarray(image[..., channel]) for channel in range(shape[2])] for image in images]
    expected = [[np.asarray(each.resize((8, 8), Image.Resampling.BILINEAR)) for each in row] for row in channels]
    np.testing.assert_array_equal(preprocess({"image": images}).numpy(), np.array(expected, np.float32))


def test_encoded_images_of_several_sizes_need_a_size():
    rows = encoded([COLOUR[0], COLOUR[1][:3]])
    with pytest.raises(DataError, match=r"several shapes: \(3, 4, 3\), \(6, 4, 3\); expected one.*size"):
        identity()({"image": rows})
    assert identity(size=(4, 4))({"image": rows}).shape == (2, 3, 4, 4)


def test_encoded_images_grey_and_coloured_mix_by_channels_alone():
    mixed = {"image": encoded([COLOUR[0], GREY[1]])}
    with pytest.raises(
        DataError, match=r"several shapes: \(4, 4, 1\), \(4, 4, 3\); .* set its `channels` to 1"
    ) as caught:
        identity(size=(4, 4))(mixed)
    assert "give it a size" not in str(caught.value)
    coloured = identity(channels=3)(mixed).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(coloured, [COLOUR[0], np.repeat(GREY[1], 3, axis=-1)])
    grey = ImageTensor(mean=[0], std=[1], scale=1, channels=1)(mixed).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(grey[..., 0], [np.asarray(Image.fromarray(COLOUR[0]).convert("L")), GREY[1][..., 0]])


def test_a_block_of_grey_images_among_colour_ones_is_refused():
    blocks = [{"image": encoded([COLOUR[0]])}, {"image": encoded([GREY[0]])}]
    with pytest.raises(DataError, match=r"images of 3 and of 1 channels; .* set its `channels`"):
        ImageTensor().fit(blocks)
    preprocess = ImageTensor(channels=3)
    preprocess.fit(blocks)
    assert len(preprocess.state()["mean"]) == 3


@pytest.mark.parametrize("images", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_hold_for_pixels_too(images, channels):
    preprocess = ImageTensor(channels=channels)
    preprocess.fit([{"image": images}])
    assert preprocess({"image": images}).shape == (len(images), channels, 6, 4)
    assert torch.equal(preprocess({"image": encoded(images)}), preprocess({"image": images}))


def test_other_channels_than_grey_or_colour_are_refused():
    with pytest.raises(ConfigError, match=r"channels is 2; expected 1 \(grey\) or 3 \(colour\)"):
        ImageTensor(channels=2)


def test_of_many_shapes_five_are_listed():
    rows = encoded([np.zeros((height, 2, 3), np.uint8) for height in range(1, 9)])
    with pytest.raises(DataError, match=r"shapes: \(1, 2, 3\), .*\(5, 2, 3\) and 3 more; .* give it a size\.$"):
        identity()({"image": rows})
