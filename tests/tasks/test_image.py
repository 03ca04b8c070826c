from __future__ import annotations

import io
import warnings
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.data.sources import Digits, Table
from kdpipe.errors import ConfigError, DataError
from kdpipe.preprocess import ImageTensor
from kdpipe.tasks.base import Task
from kdpipe.tasks.image import ImageClassification

COLOUR = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
GREY = COLOUR[..., :1]


def name_of(position):
    return f"row {100 + position}"


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    picture = (
        image
        if isinstance(image, Image.Image)
        else Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    )
    picture.save(file, kind, **options)
    return file.getvalue()


def decoded(file, mode):
    return np.asarray(Image.open(io.BytesIO(file)).convert(mode)).reshape(6, 5, -1)


def inputs(task, images, kind=None):
    return task.to_inputs(pa.RecordBatch.from_arrays([pa.array(images, kind)], ["image"]), name_of)["image"]


def refusal(task, images, kind=None):
    with pytest.raises(DataError) as caught:
        inputs(task, images, kind)
    return str(caught.value)


def classification(**arguments):
    return ImageClassification(num_classes=3, **arguments)


def test_it_is_a_task():
    assert isinstance(classification(), Task)
    assert isinstance(classification().default_preprocess(), ImageTensor)


# Encoded images


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("images", [COLOUR, GREY], ids=["colour", "grey"])
def test_encoded_images_become_their_pixels(images, kind):
    found = inputs(classification(), [encode(image) for image in images], kind)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, images)


def test_jpeg_is_read_too():
    files = [encode(image, "JPEG", quality=95) for image in COLOUR]
    np.testing.assert_array_equal(inputs(classification(), files), [decoded(file, "RGB") for file in files])


def test_the_image_column_of_hugging_face_datasets_is_read():
    rows = [{"bytes": encode(image), "path": None} for image in COLOUR]
    values = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    for start in (0, 2):
        batch = pa.RecordBatch.from_arrays([values.slice(start)], ["image"])
        np.testing.assert_array_equal(classification().to_inputs(batch, name_of)["image"], COLOUR[start:])


def test_another_column_may_hold_the_images():
    batch = pa.RecordBatch.from_arrays([pa.array([encode(COLOUR[0])])], ["photo"])
    assert classification(column="photo").to_inputs(batch, name_of)["image"].shape == (1, 6, 5, 3)
    with pytest.raises(DataError, match="there is no column 'image'; the source has photo"):
        classification().to_inputs(batch, name_of)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_a_given_shape_makes_all_images_grey_or_coloured(mode):
    file = encode(Image.fromarray(COLOUR[0]).convert(mode), "TIFF")
    for channels, wanted in ((1, "L"), (3, "RGB")):
        found = inputs(classification(shape=(6, 5, channels)), [file])
        np.testing.assert_array_equal(found[0], decoded(file, wanted))


@pytest.mark.parametrize(("first", "second"), [(COLOUR, GREY), (GREY, COLOUR)], ids=["colour first", "grey first"])
def test_without_a_shape_colours_are_never_lost_silently(first, second):
    message = refusal(classification(), [encode(first[0]), encode(second[1])])
    assert "the image of row 101 has shape [6, 5, " in message
    assert "to make all grey or all colour give task.shape" in message


def test_images_of_several_sizes_name_the_row_and_the_way_out():
    files = [encode(COLOUR[0]), encode(COLOUR[1][:4])]
    message = refusal(classification(), files)
    assert "the image of row 101 has shape [4, 5, 3], expected [6, 5, 3]" in message
    assert "set task.keep_encoded: true and give each preprocess a size" in message


@pytest.mark.parametrize(("channels", "expected"), [(1, "[8, 8, 1]"), (3, "[8, 8, 3]")])
def test_a_given_shape_that_is_not_the_files_is_told_beside_theirs(channels, expected):
    task = classification(shape=(8, 8, channels))
    colour = refusal(task, [encode(COLOUR[0])])
    assert f"the image of row 100 has height 6, width 5 and mode RGB; task.shape is {expected}. " in colour
    assert "Set task.shape: [6, 5, 1] (made grey) or [6, 5, 3] (colour); for images of several sizes" in colour
    grey = refusal(task, [encode(GREY[0])])
    assert f"has height 6, width 5 and mode L; task.shape is {expected}. Set task.shape: [6, 5, 1]; for " in grey
    assert grey.endswith("set task.keep_encoded: true and give each preprocess a size, and leave task.shape out.")


def test_the_size_of_the_first_image_holds_for_later_blocks():
    task = classification()
    inputs(task, [encode(COLOUR[0])])
    assert "the image of row 100 has shape [4, 5, 3], expected [6, 5, 3]" in refusal(task, [encode(COLOUR[1][:4])])


@pytest.mark.parametrize("keep_encoded", [False, True])
@pytest.mark.parametrize(
    "broken", [b"", b"no image", encode(COLOUR[0])[:60], encode(COLOUR[0], "JPEG")[:-200], b"\x89PNG\r\n\x1a\n"]
)
def test_an_undecodable_image_names_its_row(broken, keep_encoded):
    message = refusal(classification(keep_encoded=keep_encoded), [encode(COLOUR[0]), broken])
    assert message.startswith("the image of row 101 cannot be decoded: ")
    assert message.endswith("Repair or remove that row.")


FILES = [encode(COLOUR[0], kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]


@given(st.sampled_from(FILES), st.data())
def test_damaged_bytes_are_an_image_or_a_data_error(file, data):
    damaged = bytearray(file)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(file)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd files that it reads all the same
        with suppress(DataError):
            assert inputs(classification(), [bytes(damaged)]).dtype == np.uint8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_images_of_more_than_8_bits_are_refused(kind):
    deep = Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000)
    for task in (classification(), classification(shape=(6, 5, 1)), classification(keep_encoded=True)):
        message = refusal(task, [encode(deep, kind)])
        assert "the image of row 100 has more than 8 bits per channel (mode I;16)" in message


def test_a_missing_image_names_its_row():
    file = encode(COLOUR[0])
    assert refusal(classification(), [file, None, None], pa.binary()) == (
        "column 'image' has no image in row 101 (2 such rows)"
    )


def test_an_image_by_its_path_alone_names_its_row():
    file = encode(COLOUR[0])
    rows = [{"bytes": file}, {"bytes": None}]
    message = refusal(classification(), rows, pa.struct({"bytes": pa.binary()}))
    assert message.startswith("the image of row 101 has no bytes (1 rows without); expected the file's bytes in column")
    rows = [{"bytes": file, "path": None}, *[{"bytes": None, "path": f"photos/{i}.png"} for i in range(2)]]
    for keep_encoded in (False, True):
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        message = refusal(classification(keep_encoded=keep_encoded), rows, kind)
        assert message.startswith("the image of row 101 has a path ('photos/0.png') and no bytes (2 rows without); ")


def test_a_file_that_is_no_image_is_told_without_its_address_in_memory():
    message = refusal(classification(), [b"a text file named .png"])
    assert "row 100 cannot be decoded: it is no image that Pillow knows. Repair or remove that row." in message


def test_kept_images_are_the_files_bytes():
    files = [encode(COLOUR[0]), encode(COLOUR[1][:4], "JPEG"), encode(GREY[2])]
    batch = pa.RecordBatch.from_arrays([pa.array([b"before", *files])], ["image"]).slice(1)
    kept = classification(keep_encoded=True).to_inputs(batch, name_of)["image"]
    assert [kept.row(i).tobytes() for i in range(3)] == files


# Pixel lists


@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(2), st.just(3), st.sampled_from([1, 3]))), st.data())
def test_pixel_lists_are_row_major(images, data):
    shape = images.shape[1:]
    fixed = pa.list_(pa.uint8(), int(np.prod(shape)))
    values = pa.array(
        [image.ravel().tolist() for image in images], data.draw(st.sampled_from([fixed, pa.list_(pa.uint8())]))
    )
    start = data.draw(st.integers(0, len(images) - 1))
    batch = pa.RecordBatch.from_arrays([values], ["image"]).slice(start)
    found = classification(shape=shape).to_inputs(batch, name_of)["image"]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, images[start:])


PIXELS = pa.list_(pa.uint8())


@pytest.mark.parametrize(
    ("shape", "images", "kind", "message"),
    [
        ((2, 2, 1), [[1] * 4, [1] * 5, [1]], PIXELS, "row 101 has 5 pixels; task.shape [2, 2, 1] asks 4"),
        ((2, 2, 3), [[1] * 4], pa.list_(pa.uint8(), 4), "row 100 has 4 pixels; task.shape [2, 2, 3] asks 12"),
        ((2, 2, 1), [[1] * 4, []], PIXELS, "row 101 has 0 pixels"),
        ((2, 2, 1), [[1] * 4, None], PIXELS, "column 'image' has no image in row 101 (1 such rows)"),
        ((2, 2, 1), [[1] * 4, [1, 2, None, 4]], PIXELS, "the image of row 101 has empty pixels"),
        (None, [[1] * 4], PIXELS, "task.shape is missing: pixel lists do not tell height, width and channels"),
        ((2, 2, 1), [[1] * 4], pa.list_(pa.int64()), "column 'image' has type list<item: int64>; expected encoded"),
        ((2, 2, 1), [[0.5] * 4], pa.list_(pa.float32()), "column 'image' has type list<item: float>; expected encoded"),
        (None, ["photos/1.png"], pa.string(), "column 'image' has type string; expected encoded images or lists of"),
    ],
)
def test_what_are_no_pixels_of_the_shape_is_refused(shape, images, kind, message):
    assert message in refusal(classification(shape=shape), images, kind)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_a_shape_of_other_channels_is_refused(channels):
    with pytest.raises(ConfigError, match=rf"task\.shape is \[8, 8, {channels}\]; expected height, width and 1 or 3"):
        classification(shape=(8, 8, channels))


def test_a_shape_beside_kept_images_is_refused():
    with pytest.raises(
        ConfigError, match=r"task\.shape is \[8, 8, 3\] beside .* `size` and `channels` of each preprocess"
    ):
        classification(shape=(8, 8, 3), keep_encoded=True)


# Labels


def test_labels_go_by_class_names():
    task = classification(class_names=["a", "b", "c"])
    assert task.to_labels(pa.array(["c", None, "a"]), name_of).tolist() == [2, -1, 0]
    with pytest.raises(DataError, match="found d in row 100"):
        task.to_labels(pa.array(["d"]), name_of)


def test_the_label_loss_is_cross_entropy():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    expected = torch.tensor([-torch.log_softmax(logits[0], dim=0)[2], 0])
    torch.testing.assert_close(classification().label_loss(logits, torch.tensor([2, -1])), expected)


# From a file to a model's input


def prepared(folder, files, task, **columns):
    table = pa.table({"id": list(range(len(files))), "image": pa.array(files, pa.binary()), **columns})
    pq.write_table(table, folder / "images.parquet")
    schema = RowSchema(to_inputs=task.to_inputs, to_labels=task.to_labels)
    names = SourceColumns(id="id", label="label" if "label" in columns else None)
    prepare(Table(folder / "images.parquet", batch_rows=2), schema, names, SplitPlan(shares={"all": 1}), folder / "out")
    return PreparedData(folder / "out")


def test_kept_images_of_several_sizes_reach_a_resizing_preprocess(tmp_path):
    images = [COLOUR[0], COLOUR[1][:4], COLOUR[2][:, :3]]
    data = prepared(tmp_path, [encode(image) for image in images], classification(keep_encoded=True))
    preprocess = ImageTensor(mean=[0, 0, 0], std=[1, 1, 1], size=(6, 5), scale=1)
    found = preprocess(data.inputs.read(np.array([2, 0, 1]))).permute(0, 2, 3, 1).numpy()
    for row, image in zip(found, [images[2], images[0], images[1]], strict=True):
        resized = Image.fromarray(image).resize((5, 6), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(row, np.asarray(resized))
    with pytest.raises(DataError, match="preprocess ImageTensor: give it a size"):
        ImageTensor(mean=[0, 0, 0], std=[1, 1, 1])(data.inputs.read(np.array([2, 0])))


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        ([encode(COLOUR[0])] * 2 + [b"x"], [0, 1, 2], r"the image of row 2 \(id 2\) cannot be decoded"),
        (
            [encode(COLOUR[0])] * 2 + [encode(COLOUR[0][:3])],
            [0, 1, 2],
            r"the image of row 2 \(id 2\) has shape \[3, 5, 3\]",
        ),
        ([encode(COLOUR[0])] * 3, [0, 1, 7], r"found 7 in row 2 \(id 2\)"),
    ],
)
def test_a_bad_row_is_named_by_number_and_id(tmp_path, files, labels, message):
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, files, classification(), label=labels)


def test_digits_are_prepared_pixel_by_pixel(tmp_path):
    from sklearn.datasets import load_digits

    task = ImageClassification(num_classes=10, shape=(8, 8, 1))
    schema = RowSchema(to_inputs=task.to_inputs, to_labels=task.to_labels)
    columns = SourceColumns(id="id", label="label", split="split")
    prepare(Digits(tmp_path / "digits.parquet"), schema, columns, SplitPlan(), tmp_path / "out")
    data, bunch = PreparedData(tmp_path / "out"), load_digits()
    np.testing.assert_array_equal(data.inputs.read(np.arange(1797))["image"][..., 0], bunch.images)
    np.testing.assert_array_equal(data.labels, bunch.target)
    assert {name: len(data.rows_of([name])) for name in data.split_names} == {"train": 1197, "test": 600}
