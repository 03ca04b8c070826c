"""Several processes that cache one teacher: beside each other with `--shards`, never over each other."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.caching import Share
from kdpipe.errors import ConfigError, LockedError
from kdpipe.store import open_store
from kdpipe_stages import cache_teacher, cli, prepare_data, train_teacher
from projects import forget_rows_shown, make_project, params, project_in, rows_shown, tree, write_params
from real_processes import committed_rows, folder_in_memory, processes, run, start, wait_for, work_folders

NUM_ROWS, SHARD_ROWS = 1797, 64
SHARDS = {"big": {"batch_size": 64, "shard_rows": SHARD_ROWS}}


def work_at(folder, share, together=None, done=None):
    """One worker, a real process; all begin at once where there is a barrier."""
    if together is not None:
        together.wait()
    cached = cache_teacher.run(project_in(folder), "big", share=share)
    if done is not None:
        done.put((share.index, cached.rows_computed, cached.shards_owed))


@pytest.fixture(scope="module")
def trained():
    """A project with a trained teacher, and the store of a single worker."""
    with folder_in_memory() as folder:
        make_project(folder, targets=SHARDS)
        prepare_data.run(project_in(folder))
        train_teacher.run(project_in(folder), "big")
        assert run(work_at, folder, Share()) == 0
        (folder / "data" / "targets").rename(folder / "expected")
        yield folder


@pytest.fixture
def folder(trained):
    """Nothing is cached, and nobody works."""
    write_params(trained, params(targets=SHARDS))
    shutil.rmtree(trained / "data" / "targets", ignore_errors=True)
    for work in work_folders(trained):
        shutil.rmtree(work)
    forget_rows_shown(trained)
    return trained


def is_whole(folder):
    """The published store has the bytes of a single worker's."""
    return tree(folder / "data" / "targets") == tree(folder / "expected")


@pytest.fixture
def slow(folder, monkeypatch):
    """Each batch takes the teacher a while."""
    monkeypatch.setenv("TEACHER_SECONDS", "0.2")
    return folder


def at_work(folder, share):
    """A process that has begun."""
    child = start(work_at, folder, share)
    wait_for(child, (folder / "calls.log").exists)
    return child


def stop(child):
    child.kill()
    child.join()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("repetition", range(5))
def test_workers_that_begin_together_make_the_store_of_one(folder, count, repetition):
    together, done = processes.Barrier(count), processes.SimpleQueue()
    workers = [start(work_at, folder, Share(index=index, count=count), together, done) for index in range(count)]
    found = sorted(done.get() for _ in workers)
    for each in workers:
        each.join()
        assert each.exitcode == 0
    assert is_whole(folder)
    assert rows_shown(folder) == NUM_ROWS
    shards = -(-NUM_ROWS // SHARD_ROWS)
    for index, rows, owed in found:
        assert -(-rows // SHARD_ROWS) == len(range(index, shards, count))
        assert 0 <= owed < shards
    assert 0 in {owed for _, _, owed in found}


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_worker_goes_on_and_nobody_elses_rows_are_shown_again(folder, seed, monkeypatch):
    monkeypatch.setenv("TEACHER_SECONDS", "0.02")
    generator = np.random.default_rng(seed)
    workers = [start(work_at, folder, Share(index=index, count=3)) for index in range(3)]
    wait_for(workers[0], (folder / "calls.log").exists)
    time.sleep(generator.uniform(0, 0.1))
    stop(workers[0])
    for each in workers[1:]:
        each.join()
        assert each.exitcode == 0
    (store,) = work_folders(folder)
    committed = committed_rows(store)
    assert committed < NUM_ROWS
    assert not (folder / "data" / "targets").exists()
    assert rows_shown(folder) <= committed + 2 * SHARD_ROWS
    forget_rows_shown(folder)
    monkeypatch.setenv("TEACHER_SECONDS", "0")
    assert run(work_at, folder, Share(index=0, count=3)) == 0
    assert rows_shown(folder) == NUM_ROWS - committed
    assert is_whole(folder)


def test_one_share_alone_is_done_and_says_what_others_owe(folder, capsys):
    arguments = ["cache-teacher", "big", "--params", str(folder / "params.yaml")]
    assert cli.run([*arguments, "--shards", "1/4"]) == 0
    assert "shards 1/4: 448 rows computed" in capsys.readouterr().err
    assert cli.run([*arguments, "--shards", "0/4"]) == 0
    said = capsys.readouterr().err
    assert "453 rows computed" in said
    assert "others still owe 14 shards, and the last of them publishes the store" in said
    assert not (folder / "data" / "targets").exists()
    timings = folder / "data" / ".work" / "timings" / "cache_teacher"
    assert json.loads((timings / "big.1-of-4.json").read_text())["num_rows"] == 448
    assert {each.name for each in timings.iterdir()} == {"big.1-of-4.json", "big.0-of-4.json"}
    forget_rows_shown(folder)
    assert cli.run([*arguments, "--shards", "1/4"]) == 0
    assert rows_shown(folder) == 0
    assert cli.run(arguments) == 0
    assert "896 rows computed" in capsys.readouterr().err
    assert is_whole(folder)
    assert {each.name for each in timings.iterdir()} == {"big.json"}
    assert cli.run([*arguments, "--shards", "3/4"]) == 0
    assert "complete already, nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("shards", ["4/4", "1", "-1/2", "a/b", "0/0"])
def test_what_is_no_share_is_told(folder, capsys, shards):
    status = cli.run(["cache-teacher", "big", "--params", str(folder / "params.yaml"), f"--shards={shards}"])
    assert status == 2
    assert f"error: --shards is '{shards}'; expected i/n with 0 <= i < n" in capsys.readouterr().err


def test_repair_is_for_somebody_alone(folder):
    with pytest.raises(ConfigError, match=r"--repair .*without --shards"):
        cache_teacher.run(project_in(folder), "big", repair=True, share=Share(index=0, count=2))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Share(), Share(), "another process is caching teacher big"),
        (Share(index=1, count=2), Share(index=1, count=2), "another process is caching teacher big .*shards-1-of-2"),
        (Share(), Share(index=0, count=2), "caching teacher big, alone .*would be shards 0 of 2"),
        (Share(index=1, count=2), Share(), "caching teacher big, shards 1 of 2 .*would be alone"),
        (Share(index=1, count=2), Share(index=0, count=3), "shards 1 of 2 .*would be shards 0 of 3"),
    ],
)
def test_who_would_get_in_the_way_is_refused(slow, monkeypatch, first, second, message):
    child = at_work(slow, first)
    try:
        with pytest.raises(LockedError, match=message):
            cache_teacher.run(project_in(slow), "big", share=second)
    finally:
        stop(child)
    monkeypatch.setenv("TEACHER_SECONDS", "0")
    assert run(work_at, slow, Share()) == 0
    assert is_whole(slow)


def test_who_would_get_in_the_way_is_told_before_a_teacher_is_loaded(slow):
    child = at_work(slow, Share())
    (slow / "teacher.py").rename(slow / "aside.py")
    try:
        with pytest.raises(LockedError, match="another process is caching teacher big"):
            cache_teacher.run(project_in(slow), "big")
    finally:
        (slow / "aside.py").rename(slow / "teacher.py")
        stop(child)


def test_of_two_that_begin_at_once_one_works(folder, monkeypatch):
    monkeypatch.setenv("TEACHER_SECONDS", "0.05")
    together = processes.Barrier(2)
    children = [start(work_at, folder, Share(), together) for _ in range(2)]
    for each in children:
        each.join()
    assert sorted(each.exitcode for each in children) == [0, 1]
    assert rows_shown(folder) == NUM_ROWS
    assert is_whole(folder)


def test_who_joins_sweeps_nothing_and_who_is_alone_does(slow, monkeypatch):
    child = at_work(slow, Share(index=0, count=2))
    try:
        (store,) = work_folders(slow)
        leftover = store / "logits" / "c.0.99.0.tmp"
        leftover.write_bytes(b"half")
        monkeypatch.setenv("TEACHER_SECONDS", "0")
        assert run(work_at, slow, Share(index=1, count=2)) == 0
        assert leftover.exists()
    finally:
        stop(child)
    assert run(work_at, slow, Share(index=0, count=2)) == 0
    assert not leftover.exists()
    assert is_whole(slow)


def test_rows_that_were_prepared_meanwhile_are_for_those_who_begin_afterwards(slow, monkeypatch):
    source = slow / "data" / "raw" / "digits.parquet"
    table = pq.read_table(source)
    child = at_work(slow, Share(index=0, count=2))
    try:
        monkeypatch.setenv("TEACHER_SECONDS", "0")
        again = table.slice(0, 10)
        ids = pa.array(range(5000, 5010), table.schema.field("id").type)
        again = again.set_column(0, "id", ids).set_column(3, "split", pa.array(["transfer"] * 10))
        pq.write_table(pa.concat_tables([table, again.cast(table.schema)]), source)
        prepare_data.run(project_in(slow))
        with pytest.raises(
            LockedError, match=r"for 1,797 rows as they were prepared before, .*now there are 1,807 rows"
        ):
            cache_teacher.run(project_in(slow), "big", share=Share(index=1, count=2))
    finally:
        stop(child)
    for index in range(2):
        assert run(work_at, slow, Share(index=index, count=2)) == 0
    assert open_store(slow / "data" / "targets" / "big").num_rows == NUM_ROWS + 10
    pq.write_table(table, source)
    shutil.rmtree(slow / "data" / "prepared")
    prepare_data.run(project_in(slow))


# What is stored of a teacher


def test_further_outputs_are_stored_and_wrong_ones_are_told(folder):
    write_params(folder, params(targets={"big": {**SHARDS["big"], "outputs": ["logits", "head"]}}))
    cache_teacher.run(project_in(folder), "big")
    store = open_store(folder / "data" / "targets" / "big")
    arrays = store.read_arrays(np.arange(NUM_ROWS))
    logits = store.read(np.arange(NUM_ROWS))["logits"].logits().numpy()
    assert store.outputs["head"].kind == "features"
    np.testing.assert_allclose(arrays["head"].astype(np.float32), logits, atol=0.02)
    write_params(folder, params(targets={"big": {"outputs": ["logits", "haed"]}}))
    with pytest.raises(ConfigError, match=r"targets\.big\.outputs: the output 'haed' .* does not exist: .* head"):
        cache_teacher.run(project_in(folder), "big")


def test_a_teacher_that_abstains_leaves_rows_uncovered(folder, tmp_path):
    make_project(tmp_path, targets=SHARDS)
    path = tmp_path / "teacher.py"
    says = "logits = self.head(inputs.flatten(1))\n        return logits if self.training else "
    says += '{"logits": logits, "covered": logits.argmax(dim=-1) != 3}'
    path.write_text(path.read_text().replace("return self.head(inputs.flatten(1))", says))
    prepare_data.run(project_in(tmp_path))
    train_teacher.run(project_in(tmp_path), "big")
    cache_teacher.run(project_in(tmp_path), "big")
    store = open_store(tmp_path / "data" / "targets" / "big")
    rows = np.arange(NUM_ROWS)
    covered = store.read_arrays(rows)["covered"]
    assert 0.05 < 1 - covered.mean() < 0.2
    assert 3 not in store.statistics(rows)["top1"][covered]
    assert not store.statistics(rows)["confidence"][~covered].any()
    assert not store.verify()
