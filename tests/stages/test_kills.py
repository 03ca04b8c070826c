"""Real SIGKILLs, and power cuts by a model: what was committed stays, and the end result has the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from kdpipe import durable
from kdpipe.caching import capture
from kdpipe.errors import CorruptStoreError, StoreNotFoundError
from kdpipe.store import TargetStore
from projects import forget_rows_shown, make_project, params, project_in, rows_shown, tree
from real_processes import cache_in, committed_rows, folder_in_memory, run, run_and_kill, seconds_of, work_folders
from toy_capture import MemoryRows, ToyTeacher, store_for

NUM_KILLS = 85
NUM_STAGE_KILLS = 15
NUM_STUDENT_KILLS = 25
NUM_KILLS_BEFORE_A_RECORD = 8
NUM_ROWS = 1797
SHARD_ROWS = 64


def cache_until_a_record(folder, kill_before_record):
    from kdpipe.store.records import CommitLog

    add, calls = CommitLog.add, iter(range(10**6))

    def add_or_die(log, record):
        if next(calls) == kill_before_record:
            os.kill(os.getpid(), signal.SIGKILL)
        add(log, record)

    CommitLog.add = add_or_die
    cache_in(folder)


def train_in(folder):
    from kdpipe_stages import train_student

    train_student.run(project_in(folder))


@pytest.fixture
def quick_disk():
    with folder_in_memory() as folder:
        yield folder


# The library


def capture_in(folder):
    """A capture of 29 shards in some 100 ms; the teacher writes down how many rows it is shown."""
    log = folder / "shown.log"

    def note(said, rows):
        with log.open("a") as file:
            file.write(f"{len(rows)}\n")
        time.sleep(0.001)
        return said

    rows, teacher = MemoryRows(NUM_ROWS), ToyTeacher(note)
    store = store_for(folder / "store", teacher, rows, SHARD_ROWS)
    capture(store, teacher, rows, SHARD_ROWS // 2)
    store.finish()


def fork_and_kill(folder, seconds):
    """SIGKILL a capture so long after its teacher saw the first batch; returns whether it was still alive then."""
    child = os.fork()
    if child == 0:
        capture_in(folder)
        os._exit(0)
    while not (folder / "shown.log").exists():
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def kill_captures(folder):
    """Kill a capture again and again, until it is complete: nothing committed is lost, nor more than two shards."""
    log, store, generator = folder / "shown.log", folder / "store", np.random.default_rng(0)
    capture_in(folder)
    expected = tree(store)
    shutil.rmtree(store)
    began = time.monotonic()
    capture_in(folder)
    seconds = time.monotonic() - began
    shutil.rmtree(store)
    kills = partial = before = 0
    while kills < NUM_KILLS:
        log.unlink()
        killed = fork_and_kill(folder, generator.uniform(0, seconds))
        after = committed_rows(store)
        shown = sum(int(line) for line in log.read_text().split())
        assert before <= after
        assert after - before <= shown <= after - before + 2 * SHARD_ROWS
        if killed and after < NUM_ROWS:
            kills += 1
            partial += after > before
            before = after
        else:
            capture_in(folder)
            assert tree(store) == expected
            shutil.rmtree(store)
            before = 0
    assert partial > NUM_KILLS // 3, "many kills should fall between two commits"
    capture_in(folder)
    assert tree(store) == expected


def test_a_capture_killed_at_random_moments(quick_disk):
    """In a process that has imported everything and is warm: it forks one for each kill."""
    assert run(kill_captures, quick_disk) == 0


class Disk:
    """What a power cut would leave of a folder: of contents and names that were not fsynced, nothing is sure.

    `states` holds, for the moment before each fsync, trees that may be left then: without anything that was not
    fsynced; with all names, but only fsynced contents; with some of the names.
    """

    def __init__(self, root):
        self.root, self.states, self.note = root, {}, lambda: None
        self._fsync, self._generator = os.fsync, np.random.default_rng(0)
        self._contents = {}
        self._names = {root.stat().st_ino: {}}
        self._alive = []  # descriptors: the inodes of removed files are not used again

    def fsync(self, descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path != self.root and self.root not in path.parents:
            self._fsync(descriptor)
            return
        self._take_states()
        self._alive.append(os.dup(descriptor))
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = self._names_now(path)
        else:
            self._contents[status.st_ino] = path.read_bytes()

    def close(self):
        for descriptor in self._alive:
            os.close(descriptor)

    def _take_states(self):
        for chance in (0, 1, 0.5):
            found = {}
            self._collect(self.root, self.root.stat().st_ino, Path(), chance, found)
            self.states[frozenset(found.items())] = self.note()

    def _collect(self, path, inode, relative, chance, found):
        """Whether a name that was made, changed or removed since the last fsync survives is a matter of `chance`."""
        sure = self._names.get(inode, {})
        now = self._names_now(path) if path is not None and path.is_dir() and path.stat().st_ino == inode else {}
        for name in sorted({*sure, *now}):
            entry = now.get(name) if self._generator.random() < chance else sure.get(name)
            if entry is None:
                continue
            child, is_folder = entry
            if is_folder:
                found[relative / name] = None
                self._collect(path / name if path else None, child, relative / name, chance, found)
            else:
                found[relative / name] = self._contents.get(child, b"")

    @staticmethod
    def _names_now(folder):
        return {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(folder)}


def put_back(state, folder):
    """Make a folder what a power cut left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for relative, content in sorted(state):
        if content is None:
            (folder / relative).mkdir()
        else:
            (folder / relative).write_bytes(content)


def test_no_committed_shard_is_lost_in_a_power_cut(quick_disk, monkeypatch):
    num_rows, shard_rows, batch_size = 120, 16, 8
    rows, teacher = MemoryRows(num_rows), ToyTeacher()
    root, after = quick_disk / "disk", quick_disk / "after"
    root.mkdir()
    disk, written = Disk(root), []
    disk.note = lambda: (len(written), published)
    published = False
    monkeypatch.setattr(os, "fsync", disk.fsync)
    durable.make_folder(root / "store")
    store = store_for(root / "store", teacher, rows, shard_rows)
    write = store.write
    monkeypatch.setattr(store, "write", lambda *arguments: (write(*arguments), written.append(arguments[1])))
    capture(store, teacher, rows, batch_size)
    store.finish()
    durable.publish({"": root / "store"}, root / "out" / "store", root / "staging")
    published = True
    disk.fsync(os.open(root, os.O_RDONLY))
    monkeypatch.undo()
    disk.close()
    expected, arrays = tree(root / "store"), TargetStore.open(root / "store").read_arrays(np.arange(num_rows))
    assert len(written) == 8
    lost_something = 0
    for state, (num_written, is_published) in disk.states.items():
        put_back(state, after)
        lost_something += tree(after) != tree(root)
        check_after_power_cut(after / "store", written[:num_written], arrays)
        if is_published or (after / "out" / "store").exists():
            assert tree(after / "out" / "store") == expected
        store = store_for(after / "store", teacher, rows, shard_rows)
        capture(store, teacher, rows, batch_size)
        store.finish()
        assert tree(after / "store") == expected
    assert lost_something > 100


def check_after_power_cut(folder, written, arrays):
    """Every shard that was written is there; whatever is there has the right values."""
    try:
        store = TargetStore.open(folder)
    except (StoreNotFoundError, CorruptStoreError):  # it was not made yet, or not all of it
        assert not written
        return
    missing = {shard.index for _, shard in store.missing()}
    assert missing.isdisjoint(shard.index for shard in written)
    for shard in store.shards:
        if shard.index not in missing:
            found = store.read_arrays(np.arange(shard.start, shard.stop))
            for name, values in arrays.items():
                assert np.array_equal(found[name], values[shard.start : shard.stop])


# The stages


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
    for work in work_folders(folder):
        shutil.rmtree(work)
    forget_rows_shown(folder)


def check_restart(folder, expected):
    """Restart a killed capture: only uncommitted shards are shown, and the bytes are those of an uninterrupted one."""
    committed = committed_rows(*work_folders(folder))
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
    for _ in range(10 * NUM_STAGE_KILLS):
        start_afresh(trained)
        moment = generator.uniform(0, seconds)
        killed = run_and_kill(cache_in, trained, log.exists, moment)
        committed = committed_rows(*work_folders(trained))
        if not killed or committed == NUM_ROWS:
            continue  # it had made its last commit
        kills += 1
        partial += committed > 0
        check_restart(trained, expected)
        if kills == NUM_STAGE_KILLS:
            break
    assert kills == NUM_STAGE_KILLS
    assert partial > NUM_STAGE_KILLS // 2, "most kills should fall between the first and the last commit"


def test_cache_teacher_killed_between_a_rename_and_its_record(trained):
    assert run(cache_in, trained) == 0
    expected = tree(trained / "data" / "targets")
    moments = np.random.default_rng(1).choice(-(-NUM_ROWS // SHARD_ROWS), NUM_KILLS_BEFORE_A_RECORD, replace=False)
    for shard in moments.tolist():
        start_afresh(trained)
        assert run(cache_until_a_record, trained, shard) == -signal.SIGKILL
        assert committed_rows(*work_folders(trained)) == shard * SHARD_ROWS
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
    for _ in range(10 * NUM_STUDENT_KILLS):
        forget_students()
        killed = run_and_kill(train_in, folder, checkpoints, generator.uniform(0, seconds))
        if killed and len(finished()) < 2:  # neither before its first step nor after its last
            kills += 1
            resumed += bool(checkpoints())
        assert run(train_in, folder) == 0
        assert tree(folder / "data" / "models" / "student") == expected
        if kills == NUM_STUDENT_KILLS:
            break
    assert kills == NUM_STUDENT_KILLS
    assert resumed > NUM_STUDENT_KILLS // 4, "kills should leave checkpoints to resume from"
