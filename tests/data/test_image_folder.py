from __future__ import annotations

import io
import os

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.data.sources import ImageFolder
from kdpipe.data.sources.base import BLOCK_BYTES
from kdpipe.errors import DataError
from kdpipe.tasks.image import ImageClassification


def png(value, size=(4, 3)):
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(folder, *names):
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(value))
    return folder


def read(source):
    return pa.Table.from_batches(list(source.batches())).to_pylist()


def test_folders_are_classes(tmp_path):
    write(tmp_path, "dog/1.png", "cat/2.PNG", "cat/deep/1.jpeg")
    assert read(ImageFolder(tmp_path)) == [
        {"id": "cat/2.PNG", "image": png(1), "label": "cat"},
        {"id": "cat/deep/1.jpeg", "image": png(2), "label": "cat"},
        {"id": "dog/1.png", "image": png(0), "label": "dog"},
    ]


def test_images_of_a_flat_folder_have_no_label(tmp_path):
    write(tmp_path, "1.png", "2.webp")
    assert [(row["id"], row["label"]) for row in read(ImageFolder(tmp_path))] == [("1.png", None), ("2.webp", None)]


@pytest.mark.parametrize("stray", ["alone.png", "zebra.png"])
@pytest.mark.parametrize("split", [None, "train"])
def test_an_image_beside_class_folders_is_refused(tmp_path, stray, split):
    folder = tmp_path / split if split else tmp_path
    write(folder, "cat/1.png", stray)
    with pytest.raises(DataError, match=rf"{folder / stray} lies beside class folders; expected every image in one"):
        read(ImageFolder(tmp_path, split_folders=split is not None))


def test_classes_are_not_taken_for_splits(tmp_path):
    write(tmp_path, "cat/1.png", "dog/2.png")
    with pytest.raises(
        DataError, match=r"one level of folders only; with split_folders expected SPLIT/CLASS/name\.png"
    ):
        read(ImageFolder(tmp_path, split_folders=True))


def test_splits_may_lie_above_classes(tmp_path):
    write(tmp_path, "train/cat/1.png", "test/2.png")
    assert read(ImageFolder(tmp_path, split_folders=True)) == [
        {"id": "test/2.png", "image": png(1), "split": "test", "label": None},
        {"id": "train/cat/1.png", "image": png(0), "split": "train", "label": "cat"},
    ]


def test_an_image_beside_the_splits_is_refused(tmp_path):
    write(tmp_path, "train/cat/1.png", "2.png")
    with pytest.raises(DataError, match=r"2\.png lies in no split's folder; expected SPLIT/CLASS/name\.png"):
        read(ImageFolder(tmp_path, split_folders=True))


def test_hidden_files_are_left_out_and_others_refused_unless_they_are_ignored(tmp_path):
    write(tmp_path, "cat/1.png", "cat/.DS_Store", ".git/config", "cat/photo.heic", "cat/notes.txt")
    with pytest.raises(DataError, match=r"notes\.txt: expected files ending in \.png, .*such as \[\"\*\.txt\"\]"):
        read(ImageFolder(tmp_path))
    with pytest.raises(DataError, match=r"photo\.heic: expected files ending in"):
        read(ImageFolder(tmp_path, ignore=["*.txt"]))
    assert [row["id"] for row in read(ImageFolder(tmp_path, ignore=["*.txt", "photo.*"]))] == ["cat/1.png"]


def test_images_are_read_when_they_are_asked_for(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(os.urandom(BLOCK_BYTES // 2))
    batches = ImageFolder(tmp_path).batches()
    assert next(batches)["id"].to_pylist() == ["0.png", "1.png"]
    (tmp_path / "3.png").write_bytes(b"other")
    assert next(batches)["image"].to_pylist()[-1] == b"other"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "cat" / "1.png").write_bytes(b""), r"cat/1\.png is empty; expected an image"),
        (lambda path: (path / "cat" / "1.png").unlink(), r"holds no image"),
        (lambda path: (path / "cat").rename(path / "_cat"), r"holds no image"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, damage, message):
    write(tmp_path, "cat/1.png")
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        read(ImageFolder(tmp_path))


def test_an_absent_folder_and_a_file_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent is nothing; expected a folder of images, CLASS/name\.png"):
        read(ImageFolder(tmp_path / "absent"))
    (tmp_path / "file.png").write_bytes(png(0))
    with pytest.raises(DataError, match=r"file\.png is a file; expected a folder of images"):
        read(ImageFolder(tmp_path / "file.png"))


def prepared(tmp_path, source, columns):
    task = ImageClassification(num_classes=2, class_names=["cat", "dog"], shape=(4, 3, 3))
    schema = RowSchema(to_inputs=task.to_inputs, to_labels=task.to_labels)
    prepare(source, schema, columns, SplitPlan(shares={"train": 1.0}), tmp_path / "prepared")
    return PreparedData(tmp_path / "prepared")


@pytest.mark.parametrize("id_column", ["id", None])
@pytest.mark.parametrize("content", [png(0)[: len(png(0)) // 2], b"no image"])
def test_a_corrupt_image_is_named_by_its_path(tmp_path, content, id_column):
    write(tmp_path / "images", "cat/1.png", "dog/2.png")
    (tmp_path / "images" / "dog" / "2.png").write_bytes(content)
    with pytest.raises(DataError, match=r"the image of row 1 \(id dog/2\.png\) cannot be decoded"):
        prepared(tmp_path, ImageFolder(tmp_path / "images"), SourceColumns(id=id_column, label="label"))


def test_a_moved_image_is_a_new_row_by_path_and_the_same_by_content(tmp_path):
    images = write(tmp_path / "images", "cat/1.png", "dog/2.png")
    for column in ("id", None):
        first = prepared(tmp_path / str(column), ImageFolder(images), SourceColumns(id=column, label="label"))
        assert first.labels.tolist() == [0, 1]
        (images / "cat" / "1.png").rename(images / "dog" / "1.png")
        again = prepared(tmp_path / str(column), ImageFolder(images), SourceColumns(id=column, label="label"))
        assert again.labels.tolist() == ([-1, 1, 1] if column else [1, 1])
        (images / "dog" / "1.png").rename(images / "cat" / "1.png")
