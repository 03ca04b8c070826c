from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import hub_server
from kdpipe.data.sources import HuggingFace
from kdpipe.errors import ConfigError, DataError
from kdpipe.tasks.image import ImageClassification

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """No progress bars, and a cache that is thrown away."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def photos(folder, count=3):
    """Images as bytes, but for the last, which lies in a file; classes, one of them unknown."""
    (folder / "last.png").write_bytes(png(count - 1))
    images = [{"bytes": png(value), "path": None} for value in range(count - 1)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    columns = {
        "image": [*images, {"bytes": None, "path": str(folder / "last.png")}],
        "label": [0, 1, -1][:count],
        "text": ["a", None, "c"][:count],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def read(source):
    return pa.Table.from_batches(list(source.batches()))


def test_images_become_bytes_and_unknown_classes_null(tmp_path):
    photos(tmp_path).save_to_disk(tmp_path / "saved")
    assert read(HuggingFace(tmp_path / "saved")).to_pylist() == [
        {"image": png(0), "label": 0, "text": "a"},
        {"image": png(1), "label": 1, "text": None},
        {"image": png(2), "label": None, "text": "c"},
    ]
    assert read(HuggingFace(tmp_path / "saved", label_names=True))["label"].to_pylist() == ["cat", "dog", None]


def arrays(shape, rows):
    features = datasets.Features({"image": datasets.Array3D(shape, "uint8"), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": rows, "label": list(range(len(rows)))}, features=features)


def test_arrays_become_lists_that_are_images(tmp_path):
    pixels = np.arange(5 * 48, dtype=np.uint8).reshape(5, 4, 4, 3)
    arrays((4, 4, 3), pixels).save_to_disk(tmp_path / "saved")
    batches = list(HuggingFace(tmp_path / "saved").batches())
    task = ImageClassification(num_classes=5, shape=[4, 4, 3])
    shown = [task.to_inputs(batch, str)["image"] for batch in batches]
    np.testing.assert_array_equal(np.concatenate(shown), pixels)


@pytest.mark.parametrize(
    ("shape", "rows", "wrong"),
    [
        ((None, 2, 1), [np.zeros((height, 2, 1), np.uint8).tolist() for height in (1, 2)], r"shape \[None, 2, 1\]"),
        ((1, 2, 1), [[[[1], [2]]], None], "empty rows"),
    ],
)
def test_arrays_of_several_shapes_are_refused(tmp_path, shape, rows, wrong):
    arrays(shape, rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=f"a column of arrays with {wrong}; expected arrays of one shape"):
        read(HuggingFace(tmp_path / "saved"))


def test_splits_become_a_column(tmp_path):
    rows = photos(tmp_path)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "saved")
    assert read(HuggingFace(tmp_path / "saved"))["split"].to_pylist() == ["train"] * 3 + ["test"]
    chosen = read(HuggingFace(tmp_path / "saved", splits=["test"]))
    assert chosen.select(["text", "split"]).to_pylist() == [{"text": None, "split": "test"}]
    with pytest.raises(ConfigError, match=r"data\.source\.splits: .*saved has no 'dev'; it has train, test"):
        read(HuggingFace(tmp_path / "saved", splits=["dev"]))


def test_a_column_named_split_stands_for_itself(tmp_path):
    rows = datasets.Dataset.from_dict({"x": [1, 2], "split": ["a", "b"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    assert read(HuggingFace(tmp_path / "saved", splits=["train"]))["split"].to_pylist() == ["a", "b"]
    with pytest.raises(DataError, match="a column 'split' beside its splits train, test"):
        read(HuggingFace(tmp_path / "saved"))


def test_a_data_set_without_splits_takes_none(tmp_path):
    photos(tmp_path).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match="has no splits; leave `splits` out"):
        read(HuggingFace(tmp_path / "saved", splits=["train"]))


def test_rows_come_in_the_order_that_was_chosen(tmp_path):
    rows = datasets.Dataset.from_dict({"x": list(range(5000))}).shuffle(seed=0)
    expected = rows["x"][:]
    rows.save_to_disk(tmp_path / "saved")
    assert read(HuggingFace(tmp_path / "saved"))["x"].to_pylist() == expected


def test_splits_of_other_columns_are_refused(tmp_path):
    rows = photos(tmp_path)
    datasets.DatasetDict({"a": rows, "b": rows.remove_columns("label")}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        DataError, match=r"split 'b' of .*saved has other columns than the first: 'label' \(absent here"
    ):
        read(HuggingFace(tmp_path / "saved"))


def test_by_name_splits_are_loaded_too(tmp_path):
    """A folder of Parquet files is loaded as a data set of the hub is."""
    (tmp_path / "hub").mkdir()
    photos(tmp_path).to_parquet(tmp_path / "hub" / "train-0.parquet")
    photos(tmp_path, 1).to_parquet(tmp_path / "hub" / "test-0.parquet")
    table = read(HuggingFace(name=str(tmp_path / "hub")))
    assert table["split"].to_pylist() == ["train"] * 3 + ["test"]
    assert table["image"].to_pylist()[:2] == [png(0), png(1)]
    assert table["label"].to_pylist() == [0, 1, None, 0]


def test_rows_come_from_the_hub(tmp_path):
    for name in ("whole", "cut"):
        folder = tmp_path / "datasets" / "someone" / name
        folder.mkdir(parents=True)
        photos(tmp_path).to_parquet(folder / f"{name}.parquet")
    script = """
from kdpipe.data.sources import HuggingFace
print([batch["label"].to_pylist() for batch in HuggingFace(name="someone/whole").batches()])
next(HuggingFace(name="someone/cut").batches())
"""
    with hub_server.hub(tmp_path, cut="cut.parquet") as environment:
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=False
        )
    assert done.stdout == "[[0, 1, None]]\n"
    assert "DataError: someone/cut of the hub cannot be loaded: peer closed connection" in done.stderr


def test_without_the_hub_the_way_around_is_named(tmp_path):
    script = """
import sys
from pathlib import Path
from kdpipe.data.sources import HuggingFace
next(HuggingFace(name="nobody/nothing").batches())
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "DataError: nobody/nothing of the hub cannot be reached" in done.stderr
    assert "save_to_disk(FOLDER)`, and give data.path: FOLDER" in done.stderr


def test_without_the_package_the_extra_is_named(tmp_path):
    script = """
import sys
sys.modules["datasets"] = None
from pathlib import Path
from kdpipe.data.sources import HuggingFace
next(HuggingFace(Path(sys.argv[1])).batches())
"""
    command = [sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ConfigError: this needs the package datasets: pip install 'kdpipe[datasets]'" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "found neither"),
        ({"path": True, "name": "x"}, "found both"),
        ({"path": True, "config": "x"}, "config and revision are for a data set of the hub"),
    ],
)
def test_one_of_path_and_name_is_given(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        HuggingFace(**{**options, "path": tmp_path if options.get("path") else None})


def damaged(folder):
    for path in folder.glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (damaged, "saved cannot be loaded"),
        (lambda folder: (folder / "state.json").write_text("{"), "saved cannot be loaded"),
        (lambda folder: (folder / "state.json").unlink(), "saved cannot be loaded: .*neither a `Dataset`"),
        (lambda folder: folder.rename(folder.with_name("moved")), "saved cannot be loaded: .*not found"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, break_it, message):
    photos(tmp_path).save_to_disk(tmp_path / "saved")
    break_it(tmp_path / "saved")
    with pytest.raises(DataError, match=message):
        read(HuggingFace(tmp_path / "saved"))


@pytest.mark.parametrize("given", ["hub", "hub/train-0.parquet"])
def test_for_parquet_files_the_source_that_reads_them_is_named(tmp_path, given):
    (tmp_path / "hub").mkdir()
    photos(tmp_path).to_parquet(tmp_path / "hub" / "train-0.parquet")
    with pytest.raises(
        DataError,
        match=r"cannot be loaded: .*[^.]\. These .* read them by data\.source: \{factory: kdpipe\.data\.sources:Table",
    ):
        read(HuggingFace(tmp_path / given))


def test_images_may_lie_in_files_of_their_own(tmp_path):
    """The data set of a folder of images names them only; one that is gone by then is told."""
    for number in range(70):
        (tmp_path / "hub" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / "cat" / f"{number:02}.png").write_bytes(png(number))
    batches = HuggingFace(name=str(tmp_path / "hub")).batches()
    assert next(batches)["image"].to_pylist() == [png(number) for number in range(64)]
    (tmp_path / "hub" / "cat" / "69.png").unlink()
    with pytest.raises(DataError, match=r"cannot be read: .*69\.png"):
        next(batches)
