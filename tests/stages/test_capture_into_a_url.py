"""Captures into an object store: a real S3 server over loopback, real processes, clones of a project."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
import socket
from contextlib import contextmanager, suppress
from itertools import chain, count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.caching import Share
from kdpipe.errors import (
    ConfigError,
    CorruptStoreError,
    IncompleteStoreError,
    StaleStoreError,
    StoreError,
    StoreNotFoundError,
)
from kdpipe.store import open_store
from kdpipe.store.objects import Objects
from kdpipe.store.uploading import Uploading
from kdpipe_stages import cache_teacher, cli, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.lesson import open_checked_store
from projects import (
    digits,
    fails,
    forget_rows_shown,
    make_project,
    params,
    project_in,
    replace_digits,
    rows_shown,
    tree,
    write_params,
)
from real_processes import folder_in_memory, processes, start, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NUM_ROWS, SHARD_ROWS, BATCH_SIZE = 1797, 256, 64
ARRAYS = 3  # of a dense store
_numbers = count()


def settings(url=None, **targets):
    """With a url or without; everything else is the same."""
    big = {"batch_size": BATCH_SIZE, "shard_rows": SHARD_ROWS, **targets}
    return params(targets={"big": big if url is None else {**big, "url": url}})


@contextmanager
def s3_server(port=0):
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    running = ThreadedMotoServer(port=port, verbose=False)
    running.start()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield "http://{}:{}".format(*running.get_host_and_port())


@pytest.fixture(autouse=True)
def credentials(server, tmp_path, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("KDPIPE_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def trained():
    """A project with a trained teacher and the store of the local disk."""
    with folder_in_memory() as folder:
        make_project(folder, **{"targets": settings()["targets"]})
        prepare_data.run(project_in(folder))
        train_teacher.run(project_in(folder), "big")
        cache_teacher.run(project_in(folder), "big")
        yield folder


@pytest.fixture
def url():
    """A folder in a new bucket."""
    import s3fs

    bucket = f"bucket-{next(_numbers)}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}/targets/big"


@pytest.fixture
def clones(trained, url):
    """Makes clones of the project, as on other machines: the same rows and teacher, nothing cached."""
    with folder_in_memory() as folder:

        def clone(**targets):
            made = folder / f"clone-{next(_numbers)}"
            shutil.copytree(trained, made, ignore=shutil.ignore_patterns(".work", "targets", "calls.log"))
            write_params(made, settings(url, **targets))
            return made

        yield clone


def objects(url):
    """Every object below a url: name -> content."""
    there = Objects(url)
    return there.read_all([*there.sizes("")])


def shards_here(folder):
    return [path for path in (folder / "data").rglob("c.*") if "models" not in path.parts]


def committed(url):
    """Rows of the shards whose records are at work there."""
    records = [json.loads(each) for name, each in objects(url).items() if "/commits/" in name]
    return sum(each["stop"] - each["start"] for each in records)


def cache_in(folder, share=None, together=None):
    """One worker, a real process; all begin at once where there is a barrier."""
    if together is not None:
        together.wait()
    cache_teacher.run(project_in(folder), "big", share=share or Share())


class Killed(BaseException):
    """What stops a capture at once, for as far as the object store can tell."""


def is_whole(url, trained):
    """The url holds the bytes of the local store, and nothing else."""
    return objects(url) == tree(trained / "data" / "targets" / "big")


# A capture


def test_the_url_holds_the_store_of_the_local_disk_and_the_disk_its_description(trained, clones, url, capsys):
    folder = clones()
    most = []
    cached = cache_teacher.run(project_in(folder), "big", lambda _: most.append(len(shards_here(folder))))
    assert cached.published
    assert cached.rows_computed == NUM_ROWS
    assert is_whole(url, trained)
    assert max(most) <= 2 * ARRAYS
    published = tree(folder / "data" / "targets" / "big")
    assert json.loads(published.pop("remote.json")) == {"url": url}
    local = tree(trained / "data" / "targets" / "big")
    assert published == {name: each for name, each in local.items() if "/c." not in name}
    assert not shards_here(folder)
    assert not list((folder / "data" / ".work").glob("*/manifest.json"))
    forget_rows_shown(folder)
    assert cli.run(["cache-teacher", "big", "--params", str(folder / "params.yaml")]) == 0
    said = capsys.readouterr().err
    assert "complete already, nothing to do; store of 1,797 rows" in said
    assert said.endswith(f"bytes, at {url}\n")
    assert rows_shown(folder) == 0


def test_a_student_of_such_a_store_is_that_of_the_local_one(trained, clones, url, tmp_path):
    folder = clones()
    cache_in(folder)
    metrics = []
    for each in (folder, trained):
        train_student.run(project_in(each))
        evaluate.run(project_in(each))
        metrics.append((each / "metrics.json").read_bytes())
    assert metrics[0] == metrics[1]
    store, local = (open_store(each / "data" / "targets" / "big") for each in (folder, trained))
    assert open_checked_store(project_in(folder), "big").state_digest() == local.state_digest()
    assert store.verify() == []
    rows = np.arange(NUM_ROWS)
    for name, values in local.read_arrays(rows).items():
        np.testing.assert_array_equal(store.read_arrays(rows)[name], values)
    for command in (["inspect"], ["verify"], ["export-targets", "--out", str(tmp_path / "table.parquet")]):
        assert cli.run([*command[:1], str(folder / "data" / "targets" / "big"), *command[1:]]) == 0
    assert (tmp_path / "table.parquet").is_file()


def test_what_a_killed_capture_committed_is_not_computed_again_elsewhere(trained, clones, url, monkeypatch):
    folder, other = clones(), clones()
    monkeypatch.setenv("TEACHER_SECONDS", "0.03")
    child = start(cache_in, folder)
    wait_for(child, lambda: committed(url) >= 2 * SHARD_ROWS)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    done = committed(url)
    assert 0 < done < NUM_ROWS
    with pytest.raises(StoreNotFoundError, match="there is no target store"):
        open_store(url)
    monkeypatch.setenv("TEACHER_SECONDS", "0")
    cache_in(other)
    assert rows_shown(other) == NUM_ROWS - done
    assert is_whole(url, trained)
    forget_rows_shown(folder)
    cache_in(folder)  # finds everything, and describes it here, too
    assert rows_shown(folder) == 0
    assert tree(folder / "data" / "targets") == tree(other / "data" / "targets")


def test_a_record_never_precedes_its_files(clones, monkeypatch):
    import s3fs

    folder, stops = clones(), 0
    for step in count():
        bucket = f"bucket-{next(_numbers)}"
        s3fs.S3FileSystem().mkdir(bucket)
        write_params(folder, settings(f"s3://{bucket}", shard_rows=1024))
        with monkeypatch.context() as patched:
            stopped_at(patched, step, while_capturing=True)
            with pytest.raises(Killed):
                cache_in(folder)
        there = objects(f"s3://{bucket}")
        assert there.keys().isdisjoint({"manifest.json", "extent.json"})
        digests = {hashlib.sha256(each).hexdigest() for each in there.values()}
        records = [json.loads(each) for name, each in there.items() if "/commits/" in name]
        assert all(sha256 in digests for each in records for _, sha256, _ in each["files"].values())
        stops += 1
        shutil.rmtree(folder / "data" / ".work")
        if len(records) == 2:
            break
    assert stops == 1 + 1 + 2 * (ARRAYS + 1)


def test_views_go_there_too(clones, url):
    folder, local = clones(), clones()
    views = {"count": 1, "seed": 3, "transform": {"factory": "kdpipe.transforms:Flip"}}
    for each, there in ((folder, url), (local, None)):
        write_params(each, settings(there) | {"views": views})
        cache_in(each)
    assert objects(url) == tree(local / "data" / "targets" / "big")
    forget_rows_shown(folder)
    cache_in(folder)
    assert rows_shown(folder) == 0
    assert objects(url) == tree(local / "data" / "targets" / "big")


def test_workers_on_two_machines_make_the_store_of_one(trained, clones, url):
    folders, together = [clones(), clones()], processes.Barrier(2)
    workers = [start(cache_in, each, Share(index=index, count=2), together) for index, each in enumerate(folders)]
    for each in workers:
        each.join()
        assert each.exitcode == 0
    assert [rows_shown(each) for each in folders] == [4 * SHARD_ROWS, 3 * SHARD_ROWS + 5]
    assert is_whole(url, trained)
    assert any((each / "data" / "targets" / "big" / "remote.json").is_file() for each in folders)


def test_a_worker_says_what_others_owe(clones, url, capsys):
    folder = clones()
    arguments = ["cache-teacher", "big", "--params", str(folder / "params.yaml"), "--shards"]
    assert cli.run([*arguments, "0/2"]) == 0
    assert "others still owe 4 shards, and the last of them publishes the store" in capsys.readouterr().err
    assert not (folder / "data" / "targets").exists()
    assert cli.run([*arguments, "1/2"]) == 0
    assert open_store(url).missing() == []


# Publishing


@pytest.mark.parametrize("repetition", range(2))
def test_two_that_publish_at_once(trained, clones, url, repetition, monkeypatch):
    folders, together = [clones() for _ in range(2)], processes.Barrier(2)
    with monkeypatch.context() as patched:
        stopped_at(patched, 0)
        with pytest.raises(Killed):
            cache_in(folders[0])
    assert committed(url) == NUM_ROWS
    forget_rows_shown(folders[0])
    workers = [start(cache_in, each, None, together) for each in folders]
    for each in workers:
        each.join()
        assert each.exitcode == 0
    assert [rows_shown(each) for each in folders] == [0, 0]
    assert is_whole(url, trained)
    assert tree(folders[0] / "data" / "targets") == tree(folders[1] / "data" / "targets")


def grow(folder, num_rows):
    table = digits(folder)
    again = table.slice(0, num_rows)
    ids = pa.array(range(5000, 5000 + num_rows), table.schema.field("id").type)
    again = again.set_column(0, "id", ids).set_column(3, "split", pa.array(["transfer"] * num_rows))
    replace_digits(folder, pa.concat_tables([table, again.cast(table.schema)]))
    prepare_data.run(project_in(folder))


CHANGES = ("upload", "write", "copy", "withdraw", "remove")


def stopped_at(monkeypatch, step, while_capturing=False):
    """Every change of the object store is counted, or of its publishing; from the given one on none is made."""
    made = count()
    publishing = [True] if while_capturing else []
    publish = Uploading.publish

    def counted_publish(*arguments):
        publishing.append(True)
        publish(*arguments)

    monkeypatch.setattr(Uploading, "publish", counted_publish)
    for name in CHANGES:
        change = getattr(Objects, name)

        def counted(*arguments, change=change):
            if publishing and next(made) >= step:
                raise Killed
            return change(*arguments)

        monkeypatch.setattr(Objects, name, counted)


def test_publishing_that_stops_at_any_step_shows_nothing_half_and_goes_on(trained, clones, url, monkeypatch):
    import s3fs

    grown, expected = clones(shard_rows=1024), clones()
    write_params(expected, settings(shard_rows=1024))
    for each in (grown, expected):
        grow(each, 10)
    cache_in(expected)
    whole = tree(expected / "data" / "targets" / "big")
    cache_in(clones(shard_rows=1024))
    before = objects(url)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("KDPIPE_CACHE", str(grown / "cache"))
        reader = open_store(url)
    first = reader.read(np.array([3]))["logits"].logits()
    stops = 0
    for step in chain((0, 1, 2), count(8)):  # 3 to 7 write the description's files, one by one
        s3fs.S3FileSystem().rm(url, recursive=True)
        for name, content in before.items():
            Objects(url).write(name, content)
        shutil.rmtree(grown / "data" / ".work", ignore_errors=True)
        shutil.rmtree(grown / "data" / "targets", ignore_errors=True)
        with monkeypatch.context() as patched:
            stopped_at(patched, step)
            try:
                cache_in(grown)
            except Killed:
                stops += 1
            else:
                break
        with suppress(StoreNotFoundError):
            assert open_store(url).verify() == []
        forget_rows_shown(grown)
        shutil.rmtree(grown / "data" / ".work", ignore_errors=True)
        cache_in(grown)
        assert rows_shown(grown) == 0
        assert objects(url) == whole
    assert stops == 9
    assert objects(url) == whole
    np.testing.assert_array_equal(reader.read(np.array([3]))["logits"].logits(), first)
    with pytest.raises(CorruptStoreError, match="published anew"):
        reader.read(np.array([NUM_ROWS - 1]))


# What changes later


def test_growth_computes_what_is_new_and_older_descriptions_are_stale(clones, url):
    folder, other = clones(), clones()
    cache_in(folder)
    cache_in(other)
    forget_rows_shown(folder)
    grow(folder, 100)
    cache_in(folder)
    assert rows_shown(folder) == 100 + NUM_ROWS % SHARD_ROWS
    assert open_store(folder / "data" / "targets" / "big").num_rows == NUM_ROWS + 100
    assert open_store(url).verify() == []
    stale = r"clone-\d+/data/targets/big describes another store than the one at s3://.*: .* differs.*kdpipe cache-t"
    with pytest.raises(StaleStoreError, match=stale):
        train_student.run(project_in(other))
    forget_rows_shown(other)
    grow(other, 100)
    cache_in(other)
    assert rows_shown(other) == 0
    assert open_checked_store(project_in(other), "big").num_rows == NUM_ROWS + 100


def test_other_settings_replace_the_store(clones, url):
    folder = clones()
    cache_in(folder)
    write_params(folder, settings(url, encoding="topk", k=3))
    with pytest.raises(StaleStoreError, match="was made from other settings"):
        open_checked_store(project_in(folder), "big")
    cache_in(folder)
    assert open_store(url).verify() == []
    there = set(objects(url))
    assert there == set(open_store(url).file_names())
    assert "logits/zarr.json" not in there


def test_what_a_description_replaces_here_is_kept_or_left_alone(trained, clones, url, capsys):
    folder = clones()
    published = folder / "data" / "targets" / "big"
    published.mkdir(parents=True)
    (published / "mine.txt").write_text("of somebody")
    assert "holds mine.txt, and no target store" in fails(
        capsys, "cache-teacher", "big", "--params", str(folder / "params.yaml")
    )
    shutil.rmtree(published)
    shutil.copytree(trained / "data" / "targets" / "big", published)
    write_params(folder, settings(url, encoding="int8"))
    cache_teacher.run(project_in(folder), "big")
    assert "remote.json" in tree(published)
    forget_rows_shown(folder)
    write_params(folder, settings(None))
    assert cache_teacher.run(project_in(folder), "big").rows_computed == 0
    assert tree(published) == tree(trained / "data" / "targets" / "big")


def test_shards_that_a_stopped_replacement_has_replaced_are_not_believed(trained, clones, url, monkeypatch):
    folder = clones()
    cache_in(folder)
    write_params(folder, settings(url, precision="bfloat16"))
    with monkeypatch.context() as patched:
        stopped_at(patched, 4)  # when the shards of the newer store are in place
        with pytest.raises(Killed):
            cache_in(folder)
    assert objects(url)["logits/c.0.0.0"] != tree(trained / "data" / "targets" / "big")["logits/c.0.0.0"]
    write_params(folder, settings(url))
    cache_in(folder)
    assert open_store(url).verify() == []
    there = {name: each for name, each in objects(url).items() if not name.startswith(".work/")}
    assert there == tree(trained / "data" / "targets" / "big")


def test_damage_there_is_told_and_repaired(trained, clones, url, capsys):
    folder = clones()
    cache_in(folder)
    content = bytearray(Objects(url).read("logits/c.0.3.0"))
    content[100] ^= 1
    Objects(url).write("logits/c.0.3.0", bytes(content))
    message = fails(capsys, "verify", str(folder / "data" / "targets" / "big"))
    assert "view 0, shard 3: c.0.3.0 of logits differs from its checksum" in message
    forget_rows_shown(folder)
    cache_teacher.run(project_in(folder), "big", repair=True)
    assert rows_shown(folder) == SHARD_ROWS
    assert is_whole(url, trained)
    Objects(url).write("commits.parquet", b"nothing")
    message = fails(capsys, "cache-teacher", "big", "--params", str(folder / "params.yaml"))
    assert f"{url}/commits.parquet differs from" in message
    assert "--repair" in message
    forget_rows_shown(folder)
    cache_teacher.run(project_in(folder), "big", repair=True)
    assert rows_shown(folder) == 0  # the description of this disk vouches for what lies there
    assert is_whole(url, trained)
    Objects(url).write("commits.parquet", b"nothing")
    other = clones()
    cache_teacher.run(project_in(other), "big", repair=True)
    assert rows_shown(other) == NUM_ROWS
    assert is_whole(url, trained)


@pytest.mark.parametrize("name", ["manifest.json", "commits.parquet", "commits.parquet.sha256"])
def test_a_description_that_is_lost_there_is_told_and_repaired(trained, clones, url, capsys, name):
    folder = clones()
    cache_in(folder)
    Objects(url).withdraw(name)
    message = fails(capsys, "cache-teacher", "big", "--params", str(folder / "params.yaml"))
    assert f"{url}/{name} is absent" in message
    assert "--repair" in message
    forget_rows_shown(folder)
    cache_teacher.run(project_in(folder), "big", repair=True)
    assert rows_shown(folder) == 0
    assert is_whole(url, trained)
    Objects(url).withdraw(name)
    other = clones()
    cache_teacher.run(project_in(other), "big", repair=True)
    assert rows_shown(other) == NUM_ROWS, "nothing here describes it"
    assert is_whole(url, trained)


def test_verify_reads_what_lies_there_now_whatever_was_fetched_before(clones, url):
    folder = clones()
    cache_in(folder)
    published = folder / "data" / "targets" / "big"
    assert open_store(published).verify() == []
    store = open_store(url)
    store.read(np.arange(NUM_ROWS))  # all shards are in the mirror
    content = Objects(url).read("logits/c.0.3.0")
    Objects(url).write("logits/c.0.3.0", content[:-1])
    Objects(url).withdraw("statistics/c.0.2.0")
    found = {(each.shard, each.what.partition(" has ")[0]) for each in open_store(published).verify()}
    assert found == {(3, "c.0.3.0 of logits"), (2, "c.0.2.0 of statistics is absent")}
    cache_teacher.run(project_in(folder), "big", repair=True)
    assert open_store(published).verify() == open_store(url).verify() == []


def test_shards_of_equal_bytes_are_published_each(clones, url):
    folder = clones()
    table = folder / "said.parquet"
    ids = project_in(folder).prepared_data().inputs.sample_ids[5:].tolist()
    said = np.eye(10, dtype=np.float32)[np.arange(len(ids)) % 10]
    logits = pa.FixedSizeListArray.from_arrays(pa.array(said.reshape(-1)), 10)
    pq.write_table(pa.table({"sample_id": ids, "logits": logits}), table)
    changed = settings(url)
    changed["teachers"]["big"] = {"table": "said.parquet"}
    write_params(folder, changed)
    cache_teacher.run(project_in(folder), "big")
    contents = [
        hashlib.sha256(each).hexdigest() for name, each in objects(url).items() if name.startswith("covered/c.")
    ]
    assert len(set(contents)) < len(contents) == -(-NUM_ROWS // SHARD_ROWS)
    assert open_store(url).verify() == []


def test_a_replacement_that_stops_before_its_log_is_completed(clones, url, monkeypatch):
    """At every third step of publishing over a store of other settings; more views of it are no leftovers."""
    folder = clones()
    cache_in(folder)
    whole = settings(url, encoding="topk", k=3)
    for step in count(step=3):
        write_params(folder, settings(url))
        cache_in(folder)
        write_params(folder, whole)
        with monkeypatch.context() as patched:
            stopped_at(patched, step)
            try:
                cache_in(folder)
                break
            except Killed:
                pass
        cache_in(folder)
        assert open_store(url).verify() == []
        assert set(objects(url)) == set(open_store(url).file_names()), step
    assert step > 8


def test_a_store_that_is_gone_is_told(clones, url):
    import s3fs

    folder = clones()
    cache_in(folder)
    s3fs.S3FileSystem().rm(url, recursive=True)
    gone = r"data/targets/big describes a store at s3://.*, but there is no target store at .*kdpipe cache-teacher"
    with pytest.raises(StaleStoreError, match=gone):
        open_checked_store(project_in(folder), "big")
    write_params(folder, settings())
    with pytest.raises(StaleStoreError, match=r"there is no target store at .* Or remove .*data/targets/big"):
        cache_in(folder)


# From a disk to a url and back


def test_a_store_moves_to_a_url_and_back_without_the_teacher(trained, clones, url):
    folder = clones()
    write_params(folder, settings())
    cache_in(folder)
    forget_rows_shown(folder)
    write_params(folder, settings(url))
    cache_in(folder)
    assert is_whole(url, trained)
    (work,) = (path.parent for path in (folder / "data" / ".work").glob("*/manifest.json"))
    assert cli.run(["gc", "--remove-earlier", "--params", str(folder / "params.yaml")]) == 0
    assert not work.exists()
    assert not shards_here(folder)
    write_params(folder, settings())
    cache_in(folder)
    assert rows_shown(folder) == 0
    assert tree(folder / "data" / "targets") == tree(trained / "data" / "targets")


def test_what_a_stopped_worker_left_here_is_listed_and_goes_when_it_is_named(clones, url, capsys, monkeypatch):
    folder = clones()
    with monkeypatch.context() as patched:
        stopped = count()

        def write(self, name, content, write=Objects.write):
            if next(stopped) == 3:
                raise Killed
            write(self, name, content)

        patched.setattr(Objects, "write", write)
        with pytest.raises(Killed):
            cache_in(folder)
    arguments = ["gc", "--params", str(folder / "params.yaml")]
    assert cli.run([*arguments, "--json"]) == 0
    (holding,) = json.loads(capsys.readouterr().out)["holdings"]
    assert holding["state"] == "unfinished"
    assert holding["what"].endswith(f"on their way to {url}")
    forget_rows_shown(folder)
    there = committed(url)
    assert there == 2 * SHARD_ROWS
    assert len(shards_here(folder)) == ARRAYS  # committed here, but not there
    cache_in(folder)
    assert rows_shown(folder) == NUM_ROWS - there - SHARD_ROWS


def test_a_server_that_stops_in_the_middle(trained, clones, monkeypatch, capsys):
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    url = f"s3://bucket-{next(_numbers)}/big"
    folder = clones()
    write_params(folder, settings(url))
    arguments = ("cache-teacher", "big", "--params", str(folder / "params.yaml"))
    s3fs.S3FileSystem.clear_instance_cache()
    message = fails(capsys, "check", "--params", str(folder / "params.yaml"))
    assert f"{url} cannot be read" in message
    message = fails(capsys, *arguments)
    assert f"{url} cannot be read" in message
    assert "AWS_ENDPOINT_URL" in message
    with s3_server(port) as running:
        s3fs.S3FileSystem().mkdir(url.split("/")[2])

        def stop_half_way(now):
            if now.rows_done > NUM_ROWS // 2:
                running.stop()

        with pytest.raises(StoreError, match=r"cannot be written: .*AWS_ENDPOINT_URL"):
            cache_teacher.run(project_in(folder), "big", stop_half_way)
    assert not (folder / "data" / "targets").exists()
    shown = rows_shown(folder)
    with s3_server(port):
        s3fs.S3FileSystem.clear_instance_cache()
        cache_in(folder)
        assert rows_shown(folder) <= NUM_ROWS + 2 * SHARD_ROWS
        assert shown < rows_shown(folder)
        assert is_whole(url, trained)


# What is refused


@pytest.mark.parametrize(
    "wrong", ["s3://name:a-secret@bucket/big", "s3://a-secret@bucket", "s3://bucket/big?k=a-secret"]
)
def test_a_url_with_a_secret_is_refused_without_telling_it(clones, capsys, wrong):
    folder = clones()
    write_params(folder, settings(wrong))
    message = fails(capsys, "check", "--params", str(folder / "params.yaml"))
    assert "targets.big.url: it holds a user, a password or a query" in message
    assert "AWS_ACCESS_KEY_ID" in message
    assert "a-secret" not in message


@pytest.mark.parametrize(
    "wrong", ["data/elsewhere", "file:///tmp/targets", "memory://x", "s3://", "s3:///x", "s3://bucket//folder"]
)
def test_a_url_that_is_none_is_refused(clones, wrong):
    folder = clones()
    write_params(folder, settings(wrong))
    with pytest.raises(ConfigError, match=r"targets\.big\.url: '.*' is none; expected s3://bucket/folder, or null"):
        project_in(folder)


def test_two_teachers_of_one_url_are_refused(clones, url):
    folder = clones()
    changed = settings(url)
    changed["teachers"]["other"] = changed["teachers"]["big"]
    changed["targets"]["other"] = {"url": f"{url}/"}
    write_params(folder, changed)
    with pytest.raises(ConfigError, match=r"targets\.other\.url: it is that of targets\.big, too"):
        project_in(folder)


def test_a_bucket_that_does_not_exist(clones, capsys):
    folder = clones()
    write_params(folder, settings("s3://no-such-bucket/big"))
    message = fails(capsys, "cache-teacher", "big", "--params", str(folder / "params.yaml"))
    assert "s3://no-such-bucket/big cannot be written" in message


def test_a_reader_is_told_of_shards_that_are_not_there(clones, url):
    folder = clones()
    cache_in(folder)
    Objects(url).withdraw("logits/c.0.2.0")
    with pytest.raises(IncompleteStoreError, match="shard 2 of view 0 is not committed"):
        open_store(folder / "data" / "targets" / "big").read(np.array([2 * SHARD_ROWS]))


def test_a_teachers_last_layer_goes_to_the_url_and_away_again(clones, url):
    here = clones(classifier="head")
    cache_teacher.run(project_in(here), "big")
    kept = open_store(url).classifier()
    assert kept.content == open_store(project_in(here).store("big")).classifier().content
    assert open_store(url).verify() == []
    write_params(here, settings(url))
    cached = cache_teacher.run(project_in(here), "big")
    assert (cached.rows_computed, cached.published) == (0, True)
    assert open_store(url).classifier() is None
    assert open_store(url).verify() == []
