from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from kdpipe import durable
from kdpipe.durable import (
    Workers,
    is_held,
    link_tree,
    make_folder,
    only_writer,
    publish,
    sweep_temporaries,
    write_bytes,
    write_text,
)
from kdpipe.errors import LockedError, StoreError


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Writing one file


def test_what_is_written_is_read(tmp_path):
    write_bytes(tmp_path / "file", b"\0\xff")
    assert (tmp_path / "file").read_bytes() == b"\0\xff"
    write_text(tmp_path / "file", "é\n")
    assert (tmp_path / "file").read_bytes() == "é\n".encode()
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_whatever_holds_bytes_can_be_written(tmp_path, kind):
    write_bytes(tmp_path / "file", kind(b"content"))
    assert (tmp_path / "file").read_bytes() == b"content"


def test_the_old_file_is_replaced_and_not_written_into(tmp_path):
    """Whoever has the old one open, or a second name for it, keeps it."""
    write_bytes(tmp_path / "file", b"old")
    os.link(tmp_path / "file", tmp_path / "second name")
    with (tmp_path / "file").open("rb") as reader:
        write_bytes(tmp_path / "file", b"new!")
        assert reader.read() == b"old"
    assert (tmp_path / "second name").read_bytes() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new!"


@contextmanager
def largest_file(num_bytes):
    """The kernel refuses to let this process's files grow longer."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [5_000, 500_000])
def test_a_write_that_fails_leaves_the_old_content_and_no_temporary(tmp_path, size):
    """Both where the buffer fails to be flushed and where the write itself fails."""
    write_bytes(tmp_path / "file", b"old")
    with largest_file(1000), pytest.raises(OSError, match="File too large") as caught:
        write_bytes(tmp_path / "file", b"n" * size)
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [5_000, 500_000])
def test_a_full_disk_leaves_the_old_content_and_no_temporary(small_disk, size):
    write_bytes(small_disk / "file", b"old")
    filling = small_disk / "filling"
    with suppress(OSError), filling.open("wb", buffering=0) as file:
        while file.write(b"f" * 4096):
            pass
    with pytest.raises(OSError, match="No space left"):
        write_bytes(small_disk / "file", b"n" * size)
    assert (small_disk / "file").read_bytes() == b"old"
    assert names_in(small_disk) == ["file", "filling"]
    filling.unlink()
    write_bytes(small_disk / "file", b"n" * 5_000)
    assert (small_disk / "file").read_bytes() == b"n" * 5_000


def test_a_folder_that_is_not_there_is_the_callers_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "absent" / "file", b"content")


def test_a_writer_killed_in_between_leaves_the_old_content(tmp_path):
    """It writes without end; some of its writes are under way when it is killed."""
    script = """
import sys
from pathlib import Path
from kdpipe.durable import write_bytes
for number in range(10**9):
    write_bytes(Path(sys.argv[1]), bytes([number % 256]) * 300_000)
    print(number, flush=True)
"""
    path = tmp_path / "file"
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as writer:
        for _ in range(5):
            writer.stdout.readline()
        writer.kill()
    content = path.read_bytes()
    assert len(content) == 300_000
    assert len(set(content)) == 1
    sweep_temporaries(tmp_path)
    assert names_in(tmp_path) == ["file"]


def test_content_is_on_disk_before_it_has_its_name_and_the_name_before_the_call_returns(tmp_path, system_calls):
    script = """
import sys
from pathlib import Path
from kdpipe.durable import write_text
write_text(Path(sys.argv[1]), "content")
"""
    assert system_calls(script, tmp_path / "file", within=tmp_path) == [
        f"fsync {tmp_path}/file.tmp",
        f"rename {tmp_path}/file.tmp",
        f"fsync {tmp_path}",
    ]


def test_a_folder_and_its_parents_have_their_names_on_disk(tmp_path, system_calls):
    script = """
import sys
from pathlib import Path
from kdpipe.durable import make_folder
make_folder(Path(sys.argv[1]))
make_folder(Path(sys.argv[1]))
"""
    calls = system_calls(script, tmp_path / "a" / "b" / "c", within=tmp_path)
    assert calls == [f"fsync {tmp_path}", f"fsync {tmp_path}/a", f"fsync {tmp_path}/a/b"]
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_folders_that_are_there_stay(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("content")
    make_folder(tmp_path / "a")
    assert names_in(tmp_path / "a") == ["file"]


def test_a_name_of_ones_own_takes_away_what_gone_processes_left(tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    for process in (killed.pid, os.getppid()):
        (tmp_path / f".a[b].{process}.tmp").mkdir()
    (tmp_path / f".a[b].c.{killed.pid}.tmp").write_text("of c")
    (tmp_path / f".ab.{killed.pid}.tmp").write_text("of ab")
    assert durable.own_temporary(tmp_path / "a[b]").name == f".a[b].{os.getpid()}.tmp"
    assert names_in(tmp_path) == sorted(
        [f".a[b].{os.getppid()}.tmp", f".a[b].c.{killed.pid}.tmp", f".ab.{killed.pid}.tmp"]
    )


def test_leftovers_are_swept_wherever_they_are(tmp_path):
    (tmp_path / "a" / "b.tmp" / "c").mkdir(parents=True)
    for name in ("a/b.tmp/c/file", "a/file.tmp", "a/file", "tmp"):
        (tmp_path / name).write_text(name)
    sweep_temporaries(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/file", "tmp"]


# One writer


HOLDER = """
import sys, time
from pathlib import Path
from kdpipe.durable import only_writer
with only_writer(Path(sys.argv[1]), "writing here"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_holds(lock_file):
    command = [sys.executable, "-c", HOLDER, lock_file]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        yield holder
        holder.stdin.close()


def test_another_process_is_excluded_until_the_writer_ends(tmp_path):
    lock_file = tmp_path / "locks" / "store"
    with another_process_holds(lock_file):
        with pytest.raises(LockedError) as caught, only_writer(lock_file, "caching the teacher"):
            pytest.fail("two writers")
        assert isinstance(caught.value, StoreError)
        assert isinstance(caught.value, BlockingIOError)
        assert "another process is caching the teacher" in str(caught.value)
        assert str(lock_file) in str(caught.value)
        with only_writer(tmp_path / "locks" / "another store", "writing"):
            pass
    with only_writer(lock_file, "caching the teacher"):
        pass


def test_a_killed_writer_holds_nothing(tmp_path):
    with another_process_holds(tmp_path / "lock") as holder:
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
        with only_writer(tmp_path / "lock", "writing"):
            pass


def test_the_lock_excludes_a_second_writer_in_this_process_and_ends_with_an_error(tmp_path):
    def write_and_fail():
        with only_writer(tmp_path / "lock", "writing"):
            with pytest.raises(LockedError), only_writer(tmp_path / "lock", "writing"):
                pytest.fail("two writers")
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            write_and_fail()


def test_who_waits_gets_the_lock_when_the_writer_ends(tmp_path):
    lock_file, order = tmp_path / "lock", []

    def wait():
        with only_writer(lock_file, "waiting", wait=True):
            order.append("second")

    with only_writer(lock_file, "writing"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def test_a_lock_is_held_while_its_process_lives(tmp_path):
    lock_file = tmp_path / "lock"
    assert not is_held(lock_file)
    assert not lock_file.exists()
    with another_process_holds(lock_file) as holder:
        assert is_held(lock_file)
        holder.kill()
        holder.wait()
        assert not is_held(lock_file)
    with only_writer(lock_file, "writing"):
        assert is_held(lock_file)


def test_who_looks_whether_a_lock_is_held_is_in_nobodys_way(tmp_path):
    lock_file, stop = tmp_path / "lock", threading.Event()

    def look():
        while not stop.wait(0.002):
            is_held(lock_file)

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(20):
        with only_writer(lock_file, "writing"):
            pass
    stop.set()
    looking.join()


# Several workers


@contextmanager
def working(folder, index, count):
    """Somebody who entered through the door and works at a part."""
    workers = Workers(folder / "locks" / "store", "caching the teacher")
    with ExitStack() as held:
        with workers.door():
            held.enter_context(workers.part(index, count))
        yield workers


def test_parts_of_one_count_work_beside_each_other(tmp_path):
    with working(tmp_path, 0, 3), working(tmp_path, 2, 3) as workers:
        assert [path.name for path in workers.held()] == ["store.shards-0-of-3", "store.shards-2-of-3"]
        with working(tmp_path, 1, 3):
            assert len(workers.held()) == 3
    assert workers.held() == []


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((0, 1), (0, 1), "another process is caching the teacher .*locks/store\\)"),
        ((1, 2), (1, 2), "another process is caching the teacher .*store.shards-1-of-2"),
        ((0, 1), (0, 2), "caching the teacher, alone .*would be shards 0 of 2"),
        ((1, 2), (0, 1), "caching the teacher, shards 1 of 2 .*would be alone"),
        ((1, 2), (0, 12), "caching the teacher, shards 1 of 2 .*would be shards 0 of 12"),
        ((1, 12), (0, 2), "caching the teacher, shards 1 of 12 .*would be shards 0 of 2"),
    ],
)
def test_parts_that_exclude_each_other(tmp_path, first, second, message):
    with working(tmp_path, *first):
        with pytest.raises(LockedError, match=message), working(tmp_path, *second):
            pytest.fail("two writers")
        with working(tmp_path / "another", *second):
            pass
    with working(tmp_path, *second):
        pass


def test_the_door_is_passed_one_by_one(tmp_path):
    inside = most = 0

    def pass_through():
        nonlocal inside, most
        for _ in range(5):
            with Workers(tmp_path / "store", "working").door():
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=pass_through) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert most == 1


# Publishing


def tree(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_published_is_exactly_the_parts(tmp_path):
    work = tree(tmp_path / "work", manifest="m", deep__er__array="a", left="")
    other = tree(tmp_path / "other", chunk="c")
    (work / "half.tmp").write_text("half")
    publish({"": work, "arrays/one": other}, tmp_path / "out" / "store")
    expected = {"manifest": "m", "deep/er/array": "a", "left": "", "arrays/one/chunk": "c"}
    assert contents(tmp_path / "out" / "store") == expected
    publish({"sub": other}, tmp_path / "out" / "store")
    assert contents(tmp_path / "out" / "store") == {"sub/chunk": "c"}
    assert names_in(tmp_path / "out") == ["store"]


def test_published_files_are_the_same_files_under_a_second_name(tmp_path):
    work = tree(tmp_path / "work", manifest="m")
    publish({"": work}, tmp_path / "store")
    assert (tmp_path / "store" / "manifest").samefile(work / "manifest")
    before = (tmp_path / "store" / "manifest").stat()
    publish({"": work}, tmp_path / "store")
    after = (tmp_path / "store" / "manifest").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_link_to_nothing_is_no_file(tmp_path):
    """As where DVC's cache was emptied behind a folder that it checked out."""
    pulled = tree(tmp_path / "pulled", manifest="m")
    (pulled / "log").symlink_to(tmp_path / "cache" / "log")
    publish({"": pulled}, tmp_path / "work")
    assert contents(tmp_path / "work") == {"manifest": "m"}


def test_a_file_behind_a_link_outlives_the_link(tmp_path):
    """As in a folder that DVC checked out with cache.type symlink."""
    cache, pulled = tree(tmp_path / "cache", manifest="m"), tmp_path / "pulled"
    pulled.mkdir()
    (pulled / "manifest").symlink_to(cache / "manifest")
    publish({"": pulled}, tmp_path / "work")
    (cache / "manifest").unlink()
    assert contents(tmp_path / "work") == {"manifest": "m"}


def test_a_staging_folder_may_be_named_and_is_gone_afterwards(tmp_path):
    staging = tmp_path / "work" / "staging"
    tree(staging, left="by a killed publishing")
    for content in ("old", "new"):
        publish({"": tree(tmp_path / content, file=content)}, tmp_path / "deep" / "store", staging)
        assert contents(tmp_path / "deep" / "store") == {"file": content}
        assert not staging.exists()
        assert names_in(tmp_path / "deep") == ["store"]


def test_a_folder_on_another_disk_gets_copies(tmp_path, small_disk):
    work = tree(tmp_path / "work", manifest="m", deep__array="a")
    link_tree(work, small_disk / "store")
    assert contents(small_disk / "store") == {"manifest": "m", "deep/array": "a"}
    assert not (small_disk / "store" / "manifest").samefile(work / "manifest")


@pytest.mark.parametrize("elsewhere", ["destination", "staging"])
def test_publishing_to_another_disk(tmp_path, small_disk, elsewhere):
    """There the staging folder that is named cannot be renamed; nothing that was published is lost."""
    there = {"destination": tmp_path, "staging": tmp_path, elsewhere: small_disk}
    destination, staging = there["destination"] / "out" / "store", there["staging"] / "work" / "staging"
    for content in ("old", "new"):
        publish({"": tree(tmp_path / content, file=content)}, destination, staging)
        assert contents(destination) == {"file": content}
        assert names_in(destination.parent) == ["store"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_published_through(tmp_path, there):
    target, link = tmp_path / "big" / "store", tmp_path / "out" / "store"
    if there:
        tree(target, file="old")
    link.parent.mkdir()
    link.symlink_to(Path("..", "big", "store"))
    publish({"": tree(tmp_path / "work", file="new")}, link, tmp_path / "staging")
    assert link.is_symlink()
    assert contents(target) == {"file": "new"}
    assert names_in(tmp_path) == ["big", "out", "work"]


def test_a_file_in_the_way_is_told(tmp_path):
    tree(tmp_path, store="not a folder")
    with pytest.raises(FileExistsError, match="remove it"):
        publish({"": tree(tmp_path / "work", file="new")}, tmp_path / "store")
    assert (tmp_path / "store").read_text() == "not a folder"


def test_an_exchange_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    """By two renames, where the system has no exchange: the second one fails."""
    monkeypatch.setattr(durable.ctypes, "CDLL", lambda *_, **__: object())
    tree(tmp_path / "store", file="old")
    rename, calls = Path.rename, []

    def fails_at_second(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EXDEV, "cannot")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_at_second)
    with pytest.raises(OSError, match="cannot"):
        publish({"": tree(tmp_path / "work", file="new")}, tmp_path / "store")
    assert contents(tmp_path / "store") == {"file": "old"}


def test_copies_are_on_disk_as_their_originals_were(tmp_path, small_disk, system_calls):
    work = tree(tmp_path / "work", manifest="m", deep__array="a")
    script = """
import sys
from pathlib import Path
from kdpipe.durable import link_tree
link_tree(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    calls = system_calls(script, work, small_disk / "store", within=small_disk)
    assert sorted(calls) == [f"fsync {small_disk}/store/deep/array", f"fsync {small_disk}/store/manifest"]


def test_published_names_are_on_disk_before_the_folder_has_its_own(tmp_path, system_calls):
    work = tree(tmp_path / "work", file="f", deep__file="d")
    script = """
import sys
from pathlib import Path
from kdpipe.durable import publish
publish({"": Path(sys.argv[1])}, Path(sys.argv[2]))
"""
    out = tmp_path / "out"
    calls = system_calls(script, work, out / "store", within=out)
    assert sorted(calls[:2]) == [f"fsync {out}/.store.tmp", f"fsync {out}/.store.tmp/deep"]
    assert calls[2:] == [f"rename {out}/.store.tmp", f"fsync {out}"]


def test_a_killed_publishing_is_no_hindrance(tmp_path):
    (tmp_path / ".store.tmp").mkdir()
    (tmp_path / ".store.tmp" / "half").write_text("half")
    publish({"": tree(tmp_path / "work", manifest="m")}, tmp_path / "store")
    assert contents(tmp_path / "store") == {"manifest": "m"}
    assert names_in(tmp_path) == ["store", "work"]


READER = """
import os, sys
destination, stop = sys.argv[1:]
reads = 0
seen = set()
print("reading", flush=True)
while not os.path.exists(stop):
    folder = os.open(destination, os.O_RDONLY)  # raises where for an instant there is no folder
    try:
        names = set(os.listdir(folder))
        versions = set()
        for name in ("first", "second"):
            try:
                with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
                    versions.add(file.read())
            except FileNotFoundError:  # this folder was replaced since it was opened, and is being removed
                break
        else:
            assert len(versions) == 1, versions
            seen |= versions
        own = {name for name in names if name.startswith("only-")}
        assert len(own) <= 1 and own <= {f"only-{version}" for version in versions or {"a", "b"}}, (names, versions)
        reads += 1
    finally:
        os.close(folder)
print(reads, *sorted(seen))
"""


def test_a_reader_sees_the_old_folder_or_the_new_one(tmp_path):
    parts = {
        version: tree(tmp_path / version, **{"first": version, "second": version, f"only-{version}": ""})
        for version in ("a", "b")
    }
    destination, stop = tmp_path / "store", tmp_path / "stop"
    publish({"": parts["a"]}, destination)
    command = [sys.executable, "-c", READER, destination, stop]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "reading\n"
        for number in range(200):
            publish({"": parts["ab"[number % 2]]}, destination)
        stop.touch()
        reads, errors = reader.communicate(timeout=60)
    assert errors == ""
    assert int(reads.split()[0]) > 100
    assert reads.split()[1:] == ["a", "b"]
