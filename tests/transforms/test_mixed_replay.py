"""Teacher and student see the same mixed pixels, and labels know who was mixed: 10,000 views, dumped and compared."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdpipe.batches import BatchStream, Rows
from kdpipe.caching import capture
from kdpipe.order import BatchOrder
from kdpipe.store import TargetStore
from kdpipe.transforms import Blur, Compose, CutMix, Erasing, Flip, Mixup, RandomResizedCrop
from kdpipe.views import PartnerPlan, ViewSpec
from toy_capture import manifest_for
from transforms.test_replay import NUM_ROWS, NUM_VIEWS, SHAPE, Dump, ImageRows, Pixels

SPLITS = np.where(np.arange(NUM_ROWS) % 5 == 3, "extra", "train")
MIXES = {
    "mixup": Compose([RandomResizedCrop(), Flip(), Mixup(alpha=1.0), Erasing(probability=0.5)]),
    "cutmix": Compose([Flip(), CutMix(probability=0.8), Blur()]),
}


def views_of(name, inputs):
    plan = PartnerPlan(inputs.sample_ids, SPLITS)
    return ViewSpec(count=NUM_VIEWS, seed=17, transform=MIXES[name], partners=plan)


@pytest.fixture(scope="module")
def inputs():
    return ImageRows()


def given_to_the_teacher(folder, inputs, views, shard_rows, batch_size):
    """`[1 + views, N, H, W, C]`: a capture goes view by view, row by row."""
    teacher = Dump()
    store = TargetStore.create(
        folder, manifest_for(teacher, shard_rows), inputs.sample_ids, inputs.digests, views.num_views, splits=SPLITS
    )
    capture(store, teacher, inputs, batch_size, views=views)
    return np.concatenate(teacher.images).reshape(1 + NUM_VIEWS, NUM_ROWS, *SHAPE)


@pytest.fixture(scope="module")
def dumped(inputs, tmp_path_factory):
    """By mix: what a capture in batches of 100 shows the teacher."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        name: given_to_the_teacher(folder / name, inputs, views_of(name, inputs), shard_rows=512, batch_size=100)
        for name in MIXES
    }


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize(("batch_size", "seed", "num_workers"), [(64, 0, 0), (31, 1, 2), (1000, 2, 2)])
def test_students_see_what_the_teacher_was_given(inputs, dumped, name, batch_size, seed, num_workers):
    views = views_of(name, inputs)
    rows = Rows(inputs=inputs, rows=np.arange(NUM_ROWS), preprocess=Pixels(), labels=np.arange(NUM_ROWS), views=views)
    stream = BatchStream(rows, BatchOrder(rows=rows.rows, batch_size=batch_size, seed=seed), num_workers=num_workers)
    last, compared = NUM_VIEWS * stream.steps_per_epoch, 0
    for (view, planned), batch in zip(stream.plan(0, last), stream.from_step(0, last), strict=True):
        assert np.array_equal(batch.inputs, dumped[name][view, planned])
        assert np.array_equal(batch.labels, planned)
        assert np.array_equal(batch.other_labels, views.partners.of(planned, view, views.seed))
        assert len(batch.share) == len(planned)
        compared += len(batch.rows)
    assert compared == NUM_ROWS * NUM_VIEWS == 10_000


@pytest.mark.parametrize("name", MIXES)
def test_other_shards_and_batches_give_the_teacher_the_same(inputs, dumped, tmp_path, name):
    views = views_of(name, inputs)
    for shard_rows, batch_size in ((64, 33), (1024, 1000)):
        folder = tmp_path / str(shard_rows)
        found = given_to_the_teacher(folder, inputs, views, shard_rows, batch_size)
        assert np.array_equal(found, dumped[name])


def test_the_views_are_mixed(inputs, dumped):
    assert np.array_equal(dumped["mixup"][0], inputs.columns["image"])
    for name, transform in MIXES.items():
        views = replace(views_of(name, inputs), transform=transform)
        alone = replace(views, partners=PartnerPlan(inputs.sample_ids, inputs.sample_ids))  # each its own partner
        rows = np.arange(500)
        unmixed = alone.read(inputs.read, inputs.sample_ids, rows, 1).columns["image"]
        assert (unmixed != dumped[name][1, :500]).any(axis=(1, 2, 3)).mean() > 0.7


IN_ANOTHER_PROCESS = """
import sys
sys.path[:0] = sys.argv[1:2]
import numpy as np
import torch
from transforms.test_mixed_replay import MIXES, ImageRows, views_of

torch.set_num_threads(2)
inputs, rows = ImageRows(), np.arange(0, len(ImageRows()), 10)
np.savez(
    sys.argv[2],
    **{name: views_of(name, inputs).read(inputs.read, inputs.sample_ids, rows, 2).columns["image"] for name in MIXES},
)
"""


def test_another_process_with_other_threads_sees_the_same(dumped, tmp_path):
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(Path(__file__).parents[1]), str(tmp_path / "found.npz")]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    with np.load(tmp_path / "found.npz") as found:
        for name in MIXES:
            assert np.array_equal(found[name], dumped[name][2, ::10])
