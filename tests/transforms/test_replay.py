"""The teacher's side and the student's side see the same pixels: 10,000 views, dumped and compared."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from kdpipe.batches import BatchStream, Rows
from kdpipe.caching import capture
from kdpipe.data.columns import take
from kdpipe.data.segments import content_digests
from kdpipe.order import BatchOrder, Shuffle
from kdpipe.transforms import (
    Blur,
    ColourJitter,
    Compose,
    Erasing,
    Flip,
    Grey,
    PadAndCrop,
    PerExample,
    RandAugment,
    RandomResizedCrop,
)
from kdpipe.views import ViewSpec
from toy_capture import NUM_CLASSES, ToyTeacher, store_for

NUM_ROWS, NUM_VIEWS = 2500, 4
SHAPE = (12, 14, 3)


class ImageRows:
    """What `capture` and `Rows` need of prepared inputs: noise."""

    def __init__(self, num_rows=NUM_ROWS):
        self.columns = {"image": np.random.default_rng(0).integers(0, 256, (num_rows, *SHAPE)).astype(np.uint8)}
        self.sample_ids = np.array([f"image-{row:05d}" for row in range(num_rows)])
        self.digests = np.frombuffer(b"".join(content_digests(self.columns)), np.uint8).reshape(num_rows, -1)

    def __len__(self):
        return len(self.sample_ids)

    def read(self, rows):
        return {name: take(column, rows) for name, column in self.columns.items()}


class Dump(ToyTeacher):
    """A teacher that writes down what it is shown."""

    def __init__(self):
        super().__init__()
        self.images = []

    def predict(self, columns):
        self.images.append(columns["image"].copy())
        return {"logits": torch.zeros(len(columns["image"]), NUM_CLASSES)}


def shift_values(example, rng):
    """A user's own transform of one example."""
    example["image"] += rng.integers(0, 9, example["image"].shape, dtype=np.uint8)
    return example


def everything():
    return Compose(
        [
            RandomResizedCrop(),
            PadAndCrop(padding=2),
            Flip(),
            ColourJitter(),
            Grey(probability=0.2),
            Blur(),
            RandAugment(),
            Erasing(probability=0.5),
            PerExample(shift_values),
        ]
    )


def views():
    return ViewSpec(count=NUM_VIEWS, seed=17, transform=everything())


@pytest.fixture(scope="module")
def inputs():
    return ImageRows()


def given_to_the_teacher(folder, inputs, batch_size):
    """`[1 + views, N, H, W, C]`: a capture goes view by view, row by row."""
    teacher = Dump()
    store = store_for(folder, teacher, inputs, shard_rows=512, num_views=1 + NUM_VIEWS)
    capture(store, teacher, inputs, batch_size, views=views())
    return np.concatenate(teacher.images).reshape(1 + NUM_VIEWS, NUM_ROWS, *SHAPE)


@pytest.fixture(scope="module")
def dumped(inputs, tmp_path_factory):
    return given_to_the_teacher(tmp_path_factory.mktemp("store"), inputs, batch_size=100)


class Pixels:
    """A preprocess that changes nothing."""

    def __call__(self, columns):
        return torch.from_numpy(columns["image"].copy())


@pytest.mark.parametrize(("batch_size", "seed", "num_workers"), [(64, 0, 0), (31, 1, 2), (1000, 2, 2)])
def test_students_see_what_the_teacher_was_given(inputs, dumped, batch_size, seed, num_workers):
    rows = Rows(
        inputs=inputs,
        rows=np.arange(NUM_ROWS),
        preprocess=Pixels(),
        labels=np.full(NUM_ROWS, -1),
        views=views(),
    )
    order = BatchOrder(rows=rows.rows, batch_size=batch_size, seed=seed, shuffle=Shuffle(), rank=0, world_size=1)
    stream = BatchStream(rows, order, num_workers=num_workers)
    last = NUM_VIEWS * stream.steps_per_epoch
    compared = 0
    for (view, planned), batch in zip(stream.plan(0, last), stream.from_step(0, last), strict=True):
        assert np.array_equal(batch.rows, planned)
        assert np.array_equal(batch.inputs, dumped[view, batch.rows])
        compared += len(batch.rows)
    assert compared == NUM_ROWS * NUM_VIEWS == 10_000


def test_the_views_are_views(inputs, dumped):
    assert np.array_equal(dumped[0], inputs.columns["image"])
    different = (dumped[:, None] != dumped[None]).any(axis=(3, 4, 5)).mean(axis=2)
    assert (different + np.eye(1 + NUM_VIEWS) > 0.99).all()


def test_another_batch_size_gives_the_teacher_the_same(inputs, dumped, tmp_path):
    assert np.array_equal(given_to_the_teacher(tmp_path / "store", inputs, batch_size=33), dumped)


IN_ANOTHER_PROCESS = """
import sys
sys.path[:0] = sys.argv[1:3]
import hashlib
import numpy as np
import torch
from test_replay import ImageRows, views

torch.set_num_threads(2)
inputs, rows, hashed = ImageRows(), np.arange(0, len(ImageRows()), 10), hashlib.sha256()
for view in (1, 2):
    found = views().of(inputs.read(rows), inputs.sample_ids[rows].tolist(), view)["image"]
    hashed.update(found.tobytes())
print(hashed.hexdigest())
"""


def test_another_process_with_other_threads_sees_the_same(dumped):
    folder = __file__.rpartition("/")[0]
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, folder, folder.rpartition("/")[0]]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()
    assert found == hashlib.sha256(dumped[1:3, ::10].tobytes()).hexdigest()


def test_the_probe_finds_nothing_in_them(inputs):
    views().probe(inputs.columns, inputs.sample_ids.tolist())
