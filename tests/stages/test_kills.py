"""Real SIGKILLs: what was committed stays, is never computed twice, and the end result has the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from kdpipe.store import TargetStore
from projects import forget_rows_shown, make_project, params, project_in, rows_shown, tree

NUM_KILLS = 25
NUM_KILLS_BEFORE_A_RECORD = 8
NUM_ROWS = 1797
SHARD_ROWS = 64

# A server that has imported everything and never ran a kernel: each child is a real process, ready in milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["kdpipe_stages.cache_teacher", "kdpipe_stages.train_student", "torch._dynamo"])


def cache_in(folder, kill_before_record=None):
    from kdpipe.store.records import CommitLog
    from kdpipe_stages import cache_teacher

    if kill_before_record is not None:
        add, calls = CommitLog.add, iter(range(10**6))

        def add_or_die(log, record):
            if next(calls) == kill_before_record:
                os.kill(os.getpid(), signal.SIGKILL)
            add(log, record)

        CommitLog.add = add_or_die
    cache_teacher.run(project_in(folder), "big")


def train_in(folder):
    from kdpipe_stages import train_student

    train_student.run(project_in(folder))


def run(target, *arguments):
    child = processes.Process(target=target, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def seconds_of(target, folder, started):
    """How long a child works, from when `started()` turns true to its end."""
    child = processes.Process(target=target, args=(folder,))
    child.start()
    while child.is_alive() and not started():
        time.sleep(0.001)
    began = time.monotonic()
    child.join()
    return time.monotonic() - began


def run_and_kill(target, folder, started, seconds):
    """Kill a child `seconds` after `started()` turns true; returns whether it was still alive then."""
    child = processes.Process(target=target, args=(folder,))
    child.start()
    while child.is_alive() and not started():
        time.sleep(0.001)
    time.sleep(seconds)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def committed_rows(folder):
    """Rows of all shards that have a commit record in the work area."""
    total = 0
    for manifest in (folder / "data" / ".work").glob("*/manifest.json"):
        store = TargetStore.open(manifest.parent)
        total += store.num_rows - sum(shard.num_rows for _, shard in store.missing())
    return total


@pytest.fixture
def quick_disk():
    """A folder in memory where there is one: a SIGKILL loses nothing of it, and hundreds of fsyncs cost nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def trained(quick_disk, monkeypatch):
    """A project with a trained teacher whose capture takes 29 shards and some 5 ms each."""
    from kdpipe_stages import prepare_data, train_teacher

    monkeypatch.setenv("TEACHER_SECONDS", "0.005")
    folder = quick_disk / "project"
    make_project(folder, targets={"big": {"batch_size": 64, "shard_rows": SHARD_ROWS}})
    prepare_data.run(project_in(folder))
    train_teacher.run(project_in(folder), "big")
    return folder


def start_afresh(folder):
    shutil.rmtree(folder / "data" / "targets", ignore_errors=True)
    for manifest in (folder / "data" / ".work").glob("*/manifest.json"):
        shutil.rmtree(manifest.parent)
    forget_rows_shown(folder)


def check_restart(folder, expected):
    """Restart a killed capture: only uncommitted shards are shown, and the bytes are those of an uninterrupted one."""
    committed = committed_rows(folder)
    forget_rows_shown(folder)
    assert run(cache_in, folder) == 0
    assert rows_shown(folder) == NUM_ROWS - committed
    assert tree(folder / "data" / "targets") == expected


def test_cache_teacher_killed_at_random_moments(trained):
    assert run(cache_in, trained) == 0
    expected = tree(trained / "data" / "targets")
    assert len(list((trained / "data" / "targets" / "big" / "logits").glob("c.*"))) >= 20
    log, generator = trained / "calls.log", np.random.default_rng(0)
    start_afresh(trained)
    seconds = seconds_of(cache_in, trained, log.exists)
    kills = partial = 0
    for _ in range(10 * NUM_KILLS):
        start_afresh(trained)
        moment = generator.uniform(0, seconds)
        killed = run_and_kill(cache_in, trained, log.exists, moment)
        if not killed or committed_rows(trained) == NUM_ROWS:
            continue  # it had made its last commit
        kills += 1
        partial += committed_rows(trained) > 0
        check_restart(trained, expected)
        if kills == NUM_KILLS:
            break
    assert kills == NUM_KILLS
    assert partial > NUM_KILLS // 2, "most kills should fall between the first and the last commit"


def test_cache_teacher_killed_between_a_rename_and_its_record(trained):
    assert run(cache_in, trained) == 0
    expected = tree(trained / "data" / "targets")
    moments = np.random.default_rng(1).choice(-(-NUM_ROWS // SHARD_ROWS), NUM_KILLS_BEFORE_A_RECORD, replace=False)
    for shard in moments.tolist():
        start_afresh(trained)
        assert run(cache_in, trained, shard) == -signal.SIGKILL
        assert committed_rows(trained) == shard * SHARD_ROWS
        check_restart(trained, expected)


def test_train_student_killed_at_random_moments(quick_disk):
    from kdpipe_stages import prepare_data, train_teacher

    student = params()["student"]
    student["train"] |= {"epochs": 4, "checkpoint_every_s": 0.02}
    student["model"] = {"factory": "kdpipe.models.mlp:MLP", "hidden": [32], "dropout": 0.2}
    student |= {"seeds": 1, "baselines": ["labels_only"]}
    folder = quick_disk / "project"
    make_project(folder, student=student)
    prepare_data.run(project_in(folder))
    train_teacher.run(project_in(folder), "big")
    assert run(cache_in, folder) == 0
    assert run(train_in, folder) == 0
    expected = tree(folder / "data" / "models" / "student")
    generator = np.random.default_rng(0)
    kills = resumed = 0

    def checkpoints():
        return list((folder / "data" / ".work").glob("*/*/seed-0/checkpoint*"))

    def finished():
        return list((folder / "data" / ".work").glob("*/*/seed-0/model.json"))

    def forget_students():
        for trained_student in (folder / "data" / ".work").glob("*/student"):
            shutil.rmtree(trained_student.parent)
        shutil.rmtree(folder / "data" / "models" / "student")

    forget_students()
    seconds = seconds_of(train_in, folder, checkpoints)
    for _ in range(10 * NUM_KILLS):
        forget_students()
        killed = run_and_kill(train_in, folder, checkpoints, generator.uniform(0, seconds))
        if killed and len(finished()) < 2:  # neither before its first step nor after its last
            kills += 1
            resumed += bool(checkpoints())
        assert run(train_in, folder) == 0
        assert tree(folder / "data" / "models" / "student") == expected
        if kills == NUM_KILLS:
            break
    assert kills == NUM_KILLS
    assert resumed > NUM_KILLS // 4, "kills should leave checkpoints to resume from"
