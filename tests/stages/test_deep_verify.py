"""`kdpipe verify --deep`: honest stores pass whatever the encoding; what a teacher did not say is found."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from kdpipe.config import Factory
from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import ConfigError, CorruptStoreError, DataError, StaleStoreError, TeacherError
from kdpipe.store import TargetStore
from kdpipe.views import row_keys
from kdpipe_stages import cache_teacher, deep_verify, prepare_data, stores, train_teacher
from kdpipe_stages.cli import run
from projects import (
    LOGGING_TEACHER,
    forget_rows_shown,
    make_project,
    params,
    project_in,
    rows_shown,
    tree,
    write_params,
)
from stages.test_text import make as make_text

NUM_ROWS = 1797
RETURNS = "        return self.head(inputs.flatten(1))"
ABSTAINING = LOGGING_TEACHER.replace(
    RETURNS,
    """        logits = self.head(inputs.flatten(1))
        if self.training:
            return logits
        return {"logits": logits, "covered": logits.argmax(-1) != 3, "halves": inputs.flatten(1)[:, :32] / 2}""",
)
TOKENS = LOGGING_TEACHER.replace(
    RETURNS,
    """        logits = self.head(inputs.flatten(1))
        if self.training:
            return logits
        tokens = torch.stack([logits, logits / 2, -logits], dim=1)
        return {"logits": tokens, "covered": tokens[..., 0] > 0, "pooled": logits}""",
)
# An answer depends on the other rows of its batch.
SOCIABLE = LOGGING_TEACHER.replace(
    RETURNS, RETURNS + " + (0 if self.training else SIZE * inputs.flatten(1)[:, :10].mean(0))"
)
# What it says today depends on a file.
FORGETFUL = LOGGING_TEACHER.replace(
    RETURNS,
    """        logits = self.head(inputs.flatten(1))
        broken = LOG.with_name("broken").exists() and not self.training and len(inputs) > 1
        return logits.masked_fill(torch.arange(10) == 4, torch.nan) if broken else logits""",
)
NOISE = """
import numpy as np

from kdpipe.random_numbers import uniform


class Noise:
    def __call__(self, columns, keys, seed):
        noise = uniform(keys, (64,), seed).reshape(-1, *columns["image"].shape[1:])
        return {**columns, "image": np.clip(columns["image"] + 8 * noise, 0, 16).astype(np.uint8)}
"""
DENSE = {"encoding": "dense"}
TOPK = {"encoding": "topk", "k": 3, "temperatures": [1, 4]}
SAMPLED = {"encoding": "sampled", "draws": 8, "head": 2}
TARGETS = {
    "dense": DENSE,
    "float32": {"encoding": "dense", "dtype": "float32"},
    "int8": {"encoding": "int8", "profile": "compact"},
    "topk": TOPK,
    "topk int8": {**TOPK, "values": "int8", "profile": "compact", "top_p": 0.95},
    "sampled": SAMPLED,
    "bfloat16": {"encoding": "int8", "precision": "bfloat16"},
}


def cached(folder, targets=DENSE, teacher=LOGGING_TEACHER, **sections):
    """A project with a published store; the count of rows shown starts at 0."""
    settings = params(targets={"big": {"batch_size": 48, "shard_rows": 128, **targets}}, **sections)
    if targets["encoding"] == "sampled":
        settings["student"]["losses"][0]["temperature"] = 1
    make_project(folder)
    write_params(folder, settings)
    (folder / "teacher.py").write_text(teacher)
    (folder / "views.py").write_text(NOISE)
    project = project_in(folder)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    cache_teacher.run(project, "big")
    forget_rows_shown(folder)
    return project


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function that gives a project with a published store of one of `TARGETS`, made once and copied."""
    made = {}

    def copy(folder, name="dense"):
        if name not in made:
            made[name] = cached(tmp_path_factory.mktemp("published"), TARGETS[name]).root
        shutil.copytree(made[name], folder, dirs_exist_ok=True)
        return project_in(folder)

    return copy


def rewrite(project, shards, change, view=0):
    """Commit other targets for shards of the published store, as if another model had said so."""
    store = TargetStore.open(project.store("big"))
    wanted = [record.rows_computed for record in store.records.values() if record.view == view]
    store.want_in_views(np.concatenate(wanted))
    for shard in (store.shards[each] for each in shards):
        rows = np.arange(shard.start, shard.stop)
        arrays = store.reader.read(list(store.layouts.values()), view, rows)
        keys = row_keys(store.sample_ids[rows].tolist(), view)
        logits = change(live(project, store.sample_ids[rows]))
        for suffix, each in store.encodings["logits"].encode(logits, keys).items():
            arrays[f"logits{suffix}"] = each
        store.write(view, shard, arrays, store.records[view, shard.index].batch_size)
    store.finish()
    assert "every checksum matches" in stores.verify(project.store("big"))[0]
    return store


def live(project, sample_ids):
    inputs = PreparedInputs(project.prepared / "inputs")
    teacher, _ = cache_teacher.build_teacher(project, "big", inputs)
    order = np.argsort(inputs.sample_ids)
    return teacher.predict(inputs.read(order[np.searchsorted(inputs.sample_ids, sample_ids, sorter=order)]))["logits"]


def other_weights(logits):
    return logits @ torch.randn(10, 10, generator=torch.Generator().manual_seed(0)) / 3


@pytest.mark.parametrize("name", TARGETS)
def test_an_honest_store_gives_identical_bytes(published, tmp_path, name):
    project = published(tmp_path, name)
    before = tree(tmp_path / "data")
    first, *lines, last = deep_verify.run(project, project.store("big"))
    assert f"{NUM_ROWS:,} rows again, of 15 of 15 shards" in first
    assert f"{NUM_ROWS:,} rows give identical bytes" in first
    assert [line.partition(":")[0] for line in lines] == ["logits"]
    assert "control, live against live" in lines[0]
    assert last == f"{project.store('big')} is what big says"
    assert tree(tmp_path / "data") == before
    assert rows_shown(tmp_path) == 3 * NUM_ROWS


@pytest.mark.parametrize("name", [each for each in TARGETS if each != "bfloat16"])
def test_one_shard_of_other_weights_is_found(published, tmp_path, name):
    project = published(tmp_path, name)
    store = rewrite(project, [6], other_weights)
    with pytest.raises(CorruptStoreError, match=r"what is stored is not what its teacher 'big' says") as caught:
        deep_verify.run(project, project.store("big"))
    message = str(caught.value)
    assert f"{NUM_ROWS - 128:,} rows give identical bytes" in message
    if "sampled" not in name:
        assert "in shards 6; the worst:" in message
    worst = message.partition("the worst: ")[2].partition(" (")[0]
    assert store.rows_of([worst])[0] // 128 == 6
    assert "Remove" in message
    assert "kdpipe cache-teacher big" in message


@pytest.mark.parametrize("name", TARGETS)
def test_a_store_of_other_weights_is_found_in_few_rows(published, tmp_path, name):
    project = published(tmp_path, name)
    rewrite(project, range(15), other_weights)
    with pytest.raises(CorruptStoreError, match="0 rows give identical bytes"):
        deep_verify.run(project, project.store("big"), 100)


@pytest.mark.parametrize("name", ["dense", "float32", "int8", "topk"])
def test_two_swapped_rows_are_found_and_named(published, tmp_path, name):
    project = published(tmp_path, name)

    def swap(logits):
        rows = torch.arange(len(logits))
        a, b = 0, int((logits.argmax(-1) != logits[0].argmax(-1)).nonzero()[0])
        rows[a], rows[b] = b, a
        return logits[rows]

    store = rewrite(project, [2], swap)
    with pytest.raises(
        CorruptStoreError, match=r"2 rows are further off than any of the control, in shards 2"
    ) as caught:
        deep_verify.run(project, project.store("big"))
    assert store.sample_ids[256] in str(caught.value).partition("the worst: ")[2]


@pytest.mark.parametrize("name", TARGETS)
def test_last_bits_of_another_device_pass(published, tmp_path, name, monkeypatch):
    """Noise as large as the rounding of the teacher's precision, in every logit: no byte need be the same."""
    project = published(tmp_path, name)
    monkeypatch.setattr(deep_verify, "compute_device", lambda: torch.device("meta"))
    generator, step = torch.Generator().manual_seed(0), 2.0**-8 if name == "bfloat16" else 2.0**-20

    def noisy(logits):
        return logits * (1 + step * torch.randn(logits.shape, generator=generator))

    rewrite(project, range(15), noisy)
    lines = deep_verify.run(project, project.store("big"))
    assert lines[-1].endswith("is what big says")
    if name in ("float32", "bfloat16"):
        assert f"{NUM_ROWS:,} rows give identical bytes" not in lines[0]
    if name == "bfloat16":  # here it would be too much
        monkeypatch.undo()
        with pytest.raises(CorruptStoreError, match="; compared on "):
            deep_verify.run(project, project.store("big"))


def test_one_draw_that_falls_otherwise_passes(published, tmp_path):
    """Of one row, one of eight draws: rounding may do that."""
    project = published(tmp_path, "sampled")
    store = TargetStore.open(project.store("big"))
    rows = np.arange(128)
    arrays = dict(store.read_arrays(rows))
    row = int((arrays["logits.ids"][:, 0] < 9).argmax())
    arrays["logits.ids"] = arrays["logits.ids"].copy()
    arrays["logits.ids"][row, 0] += 1
    store.write(0, store.shards[0], arrays, 48)
    store.finish()
    lines = deep_verify.run(project, project.store("big"))
    assert f"{NUM_ROWS - 1:,} rows give identical bytes" in lines[0]


def test_few_rows_are_taken_from_many_shards_in_whole_batches(published, tmp_path):
    project = published(tmp_path)
    (first, *_) = deep_verify.run(project, project.store("big"), 300)
    assert "of 7 of 15 shards" in first or "of 8 of 15 shards" in first
    assert 300 <= rows_shown(tmp_path) / 3 < 300 + 48
    assert deep_verify.run(project, project.store("big"), 300)[0] == first
    with pytest.raises(ConfigError, match="--rows is 0"):
        deep_verify.run(project, project.store("big"), 0)


@pytest.mark.parametrize("features", ["float16", "float32", "int8"])
def test_features_and_a_teacher_that_abstains(tmp_path, features):
    targets = {**DENSE, "outputs": ["logits", "head", "halves"], "features": features}
    project = cached(tmp_path, targets, ABSTAINING)
    first, *lines, _ = deep_verify.run(project, project.store("big"))
    assert f"{NUM_ROWS:,} rows give identical bytes" in first
    assert [line.partition(":")[0] for line in lines] == ["logits", "head", "halves"]
    store = TargetStore.open(project.store("big"))
    shard = store.shards[4]
    rows = np.arange(shard.start, shard.stop)
    arrays = dict(store.read_arrays(rows))
    arrays["halves"] = arrays["halves"][::-1].copy()
    store.write(0, shard, arrays, 48)
    store.finish()
    with pytest.raises(CorruptStoreError, match=r"\nhalves: .* in shards 4; the worst") as caught:
        deep_verify.run(project, project.store("big"))
    assert "\nlogits: KL" in str(caught.value)
    assert "\nlogits: expected" not in str(caught.value)


def test_maps_of_a_teacher_that_abstains(tmp_path):
    # As many places as a batch has rows; a flat output of the same numbers beside it.
    maps = ABSTAINING.replace('"halves":', '"maps": inputs.flatten(1).repeat(1, 6).reshape(-1, 48, 8), "halves":')
    maps = maps.replace("[:, :32] / 2}", ".repeat(1, 6)}")
    targets = {**DENSE, "outputs": ["logits", "maps", "halves"], "features": "int8"}
    project = cached(tmp_path, targets, maps)
    lines = deep_verify.run(project, project.store("big"))[1:-1]
    error = {line.partition(":")[0]: float(re.search(r"own error ([^,]+)", line)[1]) for line in lines}
    assert 0 < error["maps"] < 3 * error["halves"]
    store = TargetStore.open(project.store("big"))
    rows = np.arange(0, 128)
    arrays = dict(store.read_arrays(rows))
    place = np.arange(48) % 2 == 1
    arrays["maps"][:, place] = arrays["maps"][:, place][..., ::-1]
    store.write(0, store.shards[0], arrays, 48)
    store.finish()
    with pytest.raises(CorruptStoreError, match=r"\nmaps: .* in shards 0; the worst"):
        deep_verify.run(project, project.store("big"))


def test_maps_of_rows_whose_tokens_are_masked(tmp_path):
    tokens = TOKENS.replace('"pooled": logits}', '"pooled": logits, "maps": logits[:, :9].reshape(-1, 3, 3, 1)}')
    project = cached(tmp_path, {**DENSE, "outputs": ["logits", "pooled", "maps"]}, tokens)
    assert f"{NUM_ROWS:,} rows give identical bytes" in deep_verify.run(project, project.store("big"))[0]


def test_another_coverage_is_found(tmp_path):
    project = cached(tmp_path, DENSE, ABSTAINING)
    store = TargetStore.open(project.store("big"))
    rows = np.arange(0, 128)
    arrays = dict(store.read_arrays(rows))
    arrays["covered"] = ~arrays["covered"]
    store.write(0, store.shards[0], arrays, 48)
    store.finish()
    with pytest.raises(CorruptStoreError, match=r"128 rows are further off .* in shards 0; the worst: \S+ \(inf\)"):
        deep_verify.run(project, project.store("big"))


@pytest.mark.parametrize(
    ("array", "change", "found"),
    [
        ("logits", lambda values: values + np.float16("nan"), r"logits: inf in the mean"),
        ("logits", lambda values: values - np.float16("inf"), r"logits: inf in the mean"),
        (
            "logits.row_max",
            lambda values: values + np.float32("nan"),
            "the largest logit of 128 rows is off, in shards 2;",
        ),
        ("logits.row_max", lambda values: values + 0.01, "largest logit of 128 rows is off, in shards 2;"),
    ],
)
def test_numbers_that_the_teacher_did_not_say_are_found(published, tmp_path, array, change, found):
    project = published(tmp_path)
    store = TargetStore.open(project.store("big"))
    shard = store.shards[2]
    arrays = dict(store.read_arrays(np.arange(shard.start, shard.stop)))
    arrays[array] = change(arrays[array])
    store.write(0, shard, arrays, 48)
    store.finish()
    with pytest.raises(CorruptStoreError, match=found):
        deep_verify.run(project, project.store("big"))


def test_batches_of_a_token_budget_are_made_again(tmp_path):
    make_text(tmp_path, num_rows=300)
    texts = pq.read_table(tmp_path / "texts.parquet")
    lengths = np.random.default_rng(0).integers(1, 90, 300).tolist()
    pq.write_table(texts.set_column(1, "text", [["abcdef "[k % 7] * k for k in lengths]]), tmp_path / "texts.parquet")
    # Its last bits depend on how many rows it sees at once.
    (tmp_path / "models.py").write_text(
        """
import torch
import yaml


class Teacher(torch.nn.Module):
    def __init__(self, vocab_size, num_classes):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, num_classes)

    def forward(self, input_ids, attention_mask):
        counts = attention_mask.unsqueeze(-1)
        logits = (self.embed(input_ids) * counts).sum(dim=1) / counts.sum(dim=1)
        return logits if self.training else logits * (1 + 2**-9 * (len(input_ids) % 7) / 7)
"""
    )
    settings = yaml.safe_load((tmp_path / "params.yaml").read_text())
    train = {"epochs": 1, "batch_size": 16, "learning_rate": 0.01}
    settings["teachers"]["big"] = {"model": {"factory": "models.py:Teacher"}, "train": train}
    settings["targets"] = {"big": {"dtype": "float32", "batch_size": 64, "shard_rows": 128, "batch_tokens": 400}}
    write_params(tmp_path, settings)
    project = project_in(tmp_path)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    cache_teacher.run(project, "big")
    assert "300 rows give identical bytes" in deep_verify.run(project, project.store("big"))[0]
    assert "big saw 1" in deep_verify.run(project, project.store("big"), 10)[0]


def test_tokens(tmp_path):
    project = cached(tmp_path, {**DENSE, "outputs": ["logits"]}, TOKENS)
    assert f"{NUM_ROWS:,} rows give identical bytes" in deep_verify.run(project, project.store("big"))[0]
    rewrite(project, [3], lambda logits: logits.flip(-1))
    with pytest.raises(CorruptStoreError, match="in shards 3"):
        deep_verify.run(project, project.store("big"))


def test_augmented_views_are_shown_again(tmp_path):
    views = {"count": 2, "seed": 5, "transform": {"factory": "views.py:Noise"}, "splits": ["train"]}
    project = cached(tmp_path, views=views)
    store = TargetStore.open(project.store("big"))
    shown = NUM_ROWS + 2 * len(project.prepared_data().rows_of(["train"]))
    first, *_ = deep_verify.run(project, project.store("big"), 10**6)
    assert f"big saw {shown:,} rows again, of {len(store.records)} of {len(store.records)} shards" in first
    assert f"{shown:,} rows give identical bytes" in first
    rewrite(project, [5], lambda logits: logits, view=2)  # what the clean rows get, not the view
    with pytest.raises(CorruptStoreError, match="in shards 5"):
        deep_verify.run(project, project.store("big"), 10**6)


def test_the_control_shows_a_teacher_whose_answers_depend_on_their_neighbours_a_little(tmp_path):
    project = cached(tmp_path, TARGETS["float32"], SOCIABLE.replace("SIZE", "0.1"))
    lines = deep_verify.run(project, project.store("big"))
    stored, control = (float(lines[1].partition(each)[2].split()[0].strip(",;")) for each in ("nats,", "batches: "))
    assert f"{NUM_ROWS:,} rows give identical bytes" in lines[0]
    assert stored < 1e-9
    assert control > 1e-5


@pytest.mark.parametrize("name", ["dense", "float32", "int8", "topk", "topk int8", "sampled"])
def test_a_teacher_whose_answers_depend_on_their_neighbours_is_refused_whatever_the_encoding(tmp_path, name):
    """What is stored is what it says in the store's batches, but that is no answer about a row."""
    project = cached(tmp_path, TARGETS[name], SOCIABLE.replace("SIZE", "10"))
    with pytest.raises(TeacherError, match="depends on the other rows of its batch") as caught:
        deep_verify.run(project, project.store("big"))
    message = str(caught.value)
    assert f"{NUM_ROWS:,} rows give identical bytes" in message
    assert "is what big says" not in message
    found, explained = re.search(
        r"logits: KL.* in other batches (\S+); rounding explains up to (\S+)$", message
    ).groups()
    assert float(found) > float(explained)
    assert "kdpipe cache-teacher big" in message


def test_features_that_depend_on_their_neighbours_are_refused(tmp_path):
    mixed = ABSTAINING.replace("inputs.flatten(1)[:, :32] / 2", "inputs.flatten(1) - inputs.flatten(1).mean(0)")
    project = cached(tmp_path, {**DENSE, "outputs": ["logits", "halves"]}, mixed)
    with pytest.raises(TeacherError, match=r"\nhalves: \|live - live\| / \|live\| in other batches") as caught:
        deep_verify.run(project, project.store("big"))
    assert "\nlogits: KL(live || live)" not in str(caught.value)


@pytest.mark.parametrize(
    "change", ["torch.randn(10)", "torch.arange(10) * (counted() % 2)", "0.01 * torch.arange(10) * counted()"]
)
def test_a_teacher_that_answers_otherwise_when_asked_again_is_refused(tmp_path, change):
    noisy = LOGGING_TEACHER.replace(RETURNS, f"{RETURNS} + (0 if self.training else {change})")
    noisy += "\n\nCALLS = []\n\n\ndef counted():\n    CALLS.append(None)\n    return len(CALLS)\n"
    project = cached(tmp_path, TARGETS["float32"], noisy)
    with pytest.raises(TeacherError, match="'big' answers the same batch otherwise when it is asked again") as caught:
        deep_verify.run(project, project.store("big"))
    assert re.search(r"\nlogits: KL.* nats, asked again \S+; rounding explains up to \S+$", str(caught.value))


# In float64, far from 0; what it says today depends on a file.
OFFSET = LOGGING_TEACHER.replace(
    RETURNS,
    """        logits = self.head(inputs.flatten(1))
        if self.training:
            return logits
        other = LOG.with_name("other").exists()
        return logits.double() * (0.9 if other else 1) + 1e9""",
)


def test_what_float64_adds_to_all_classes_explains_nothing(tmp_path):
    project = cached(tmp_path, TARGETS["float32"], OFFSET)
    assert deep_verify.run(project, project.store("big"))[-1].endswith("is what big says")
    (tmp_path / "other").touch()
    with pytest.raises(CorruptStoreError, match="0 rows give identical bytes"):
        deep_verify.run(project, project.store("big"))


def test_a_teacher_that_says_nan_today_is_refused(tmp_path):
    project = cached(tmp_path, DENSE, FORGETFUL)
    assert deep_verify.run(project, project.store("big"))[-1].endswith("is what big says")
    (tmp_path / "broken").touch()
    with pytest.raises(TeacherError, match=r"logits are NaN or infinite for \d+ of \d+ samples"):
        deep_verify.run(project, project.store("big"))


def test_batches_of_one_row_have_a_control(tmp_path):
    project = cached(tmp_path, {**DENSE, "batch_size": 1})
    assert "50 rows again" in deep_verify.run(project, project.store("big"), 50)[0]


def test_a_store_whose_rows_lie_in_another_order_here(published, tmp_path):
    """A store made elsewhere, and the same rows prepared in another order: batches are the store's."""
    project = published(tmp_path)
    source = tmp_path / "data" / "raw" / "digits.parquet"
    table = pq.read_table(source)
    pq.write_table(table.take(np.random.default_rng(0).permutation(NUM_ROWS)), source)
    shutil.rmtree(project.prepared)
    prepare_data.run(project)
    ids = PreparedInputs(project.prepared / "inputs").sample_ids
    assert ids.tolist() != TargetStore.open(project.store("big")).sample_ids.tolist()
    assert f"{NUM_ROWS:,} rows give identical bytes" in deep_verify.run(project, project.store("big"))[0]


def test_rows_that_are_not_prepared_here_or_are_damaged(published, tmp_path):
    project = published(tmp_path)
    (segment,) = (project.prepared / "inputs").glob("segment-*")
    content = bytearray((segment / "image.npy").read_bytes())
    content[5000] ^= 1
    (segment / "image.npy").write_bytes(content)
    with pytest.raises(DataError, match="differs from its digest"):
        deep_verify.run(project, project.store("big"))
    shutil.rmtree(project.prepared)
    source = tmp_path / "data" / "raw" / "digits.parquet"
    table = pq.read_table(source)
    keep = np.array([split == "train" or index % 2 == 1 for index, split in enumerate(table["split"].to_pylist())])
    pq.write_table(table.filter(keep), source)
    prepare_data.run(project)
    with pytest.raises(StaleStoreError, match=r"rows that are not prepared here.*such as \d+-.*prepare-data"):
        deep_verify.run(project, project.store("big"))


def test_another_teacher_or_other_settings_are_refused(published, tmp_path):
    project = published(tmp_path)
    for changed, expected in (
        ({"encoding": "int8"}, r"encodings\.logits\.name"),
        ({**DENSE, "precision": "bfloat16"}, r"teacher\.numeric_mode\.autocast differ"),
    ):
        write_params(tmp_path, params(targets={"big": {"batch_size": 48, "shard_rows": 128, **changed}}))
        with pytest.raises(StaleStoreError, match=rf"made by another teacher, or with other settings.*{expected}"):
            deep_verify.run(project_in(tmp_path), project.store("big"))
    changed = params(targets={"big": {"batch_size": 7, "shard_rows": 128}})
    write_params(tmp_path, changed)
    assert deep_verify.run(project_in(tmp_path), project.store("big"))[-1].endswith("says")
    changed["teachers"]["big"]["train"]["seed"] = 1
    write_params(tmp_path, changed)
    train_teacher.run(project_in(tmp_path), "big")
    with pytest.raises(StaleStoreError, match=r"teacher\.weights differ.*cache-teacher big"):
        deep_verify.run(project_in(tmp_path), project.store("big"))


def test_the_store_says_which_teacher_it_is_of(published, tmp_path):
    project = published(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(project.store("big"), elsewhere)
    assert deep_verify.run(project, elsewhere)[-1] == f"{elsewhere} is what big says"
    changed = params()
    changed["teachers"]["small"] = changed["teachers"].pop("big")
    changed["student"]["losses"][0]["teacher"] = "small"
    del changed["targets"]
    write_params(tmp_path, changed)
    with pytest.raises(ConfigError, match=r"a store of the teacher 'big'; .*params\.yaml has small.*--params"):
        deep_verify.run(project_in(tmp_path), elsewhere)


def test_the_command(published, tmp_path, capsys):
    project = published(tmp_path)
    store, settings = str(project.store("big")), str(tmp_path / "params.yaml")
    assert run(["verify", store, "--deep", "--rows", "100", "--params", settings]) == 0
    out = capsys.readouterr().out
    assert "every checksum matches" in out
    assert "is what big says" in out
    rewrite(project, range(15), other_weights)
    assert run(["verify", store]) == 0
    assert run(["verify", store, "--deep", "--params", settings]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "what is stored is not what its teacher 'big' says, though every checksum matches" in error
    assert run(["verify", store, "--rows", "5"]) == 2
    victim = project.store("big") / "logits" / "c.0.3.0"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    assert run(["verify", store, "--deep", "--params", settings]) == 1
    assert "differs from its checksum" in capsys.readouterr().err


def test_a_table_has_no_model_to_show_rows_to(published, tmp_path):
    project = published(tmp_path)
    assert isinstance(project.teacher("big").model, Factory)
    changed = params()
    changed["teachers"]["big"] = {"table": "data/raw/said.parquet"}
    write_params(tmp_path, changed)
    with pytest.raises(ConfigError, match="there is no model to show rows to"):
        deep_verify.run(project_in(tmp_path), project.store("big"))
