"""A store on an S3 server: a real server process's protocol over loopback."""

from __future__ import annotations

import multiprocessing
import shutil
import socket

import numpy as np
import pytest
import torch

from kdpipe.errors import ConfigError, CorruptStoreError, IncompleteStoreError, StoreError, StoreNotFoundError
from kdpipe.store import TargetStream, open_store
from store.test_stream import NUM_ROWS, check, store_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("KDPIPE_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    name = f"bucket-{tmp_path.name.replace('_', '-').lower()}"
    files.mkdir(name)
    store_of(tmp_path / "store", num_views=2)
    files.put(str(tmp_path / "store"), f"{name}/targets", recursive=True)
    return files, name


def fetched(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("c.*") if path.is_file())


def test_a_remote_store_reads_as_a_local_one(bucket, tmp_path):
    _, name = bucket
    store = open_store(f"s3://{name}/targets")
    rows = np.array([5, 2000, 6])
    check(rows, store.read(rows, view=1), view=1)
    assert fetched(tmp_path) == ["c.1.0", "c.1.0.0", "c.1.3", "c.1.3.0"]
    targets = store.targets(["row-7", "row-2602"])
    check(np.array([7, 2602]), {"logits": targets})
    assert store.missing() == [] == store.verify()
    met = []
    for batch, said in TargetStream(store, batch_size=100):
        check(batch, said)
        met += batch.tolist()
    assert sorted(met) == list(range(NUM_ROWS))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_what_was_fetched_is_not_fetched_again(bucket, tmp_path):
    files, name = bucket
    check(np.array([0]), open_store(f"s3://{name}/targets").read(np.array([0])))
    files.rm(f"{name}/targets/logits", recursive=True)
    again = open_store(f"s3://{name}/targets")
    check(np.array([1]), again.read(np.array([1])))
    files.invalidate_cache()
    with pytest.raises(IncompleteStoreError, match="not committed"):
        again.read(np.array([2000]))


def test_a_store_published_anew_is_fetched_anew(bucket, tmp_path):
    files, name = bucket
    check(np.array([0]), open_store(f"s3://{name}/targets").read(np.array([0])))
    shutil.rmtree(tmp_path / "store")
    store_of(tmp_path / "store", num_rows=900, num_views=1)
    files.rm(f"{name}/targets", recursive=True)
    files.put(str(tmp_path / "store"), f"{name}/targets", recursive=True)
    assert open_store(f"s3://{name}/targets").num_rows == 900


def test_damage_on_the_way_is_found(bucket):
    files, name = bucket
    path = f"{name}/targets/logits/c.0.0.0"
    content = bytearray(files.cat_file(path))
    content[1000] ^= 1
    files.pipe_file(path, bytes(content))
    with pytest.raises(CorruptStoreError, match="differs from its checksum"):
        open_store(f"s3://{name}/targets").read(np.array([0]))


def test_a_store_published_anew_while_it_is_open_is_never_mixed(bucket, tmp_path):
    files, name = bucket
    store = open_store(f"s3://{name}/targets")
    check(np.array([0]), store.read(np.array([0])))
    content = bytearray(files.cat_file(f"{name}/targets/logits/c.0.1.0"))
    files.pipe_file(f"{name}/targets/logits/c.0.3.0", bytes(content))
    with pytest.raises(CorruptStoreError, match="published anew"):
        store.read(np.array([1600]))


def test_what_does_not_belong_together_is_never_kept(bucket):
    files, name = bucket
    log = files.cat_file(f"{name}/targets/commits.parquet")
    rows = files.cat_file(f"{name}/targets/rows.parquet")
    files.pipe_file(f"{name}/targets/commits.parquet", b"of a newer store")
    with pytest.raises(CorruptStoreError, match=r"commits\.parquet differs .* published anew"):
        open_store(f"s3://{name}/targets")
    files.pipe_file(f"{name}/targets/commits.parquet", log)
    files.pipe_file(f"{name}/targets/rows.parquet", b"of a newer store")
    store = open_store(f"s3://{name}/targets")
    with pytest.raises(CorruptStoreError, match=r"rows\.parquet differs .* published anew"):
        store.targets(["row-7"])
    files.pipe_file(f"{name}/targets/rows.parquet", rows)
    assert open_store(f"s3://{name}/targets").verify() == []


def test_nothing_there(bucket):
    _, name = bucket
    for url in (f"s3://{name}/elsewhere", "s3://no-such-bucket/targets"):
        with pytest.raises(
            StoreNotFoundError, match=r"there is no target store at s3://.* or its bucket does not exist"
        ):
            open_store(url)


def test_a_url_without_its_package():
    with pytest.raises(ConfigError, match=r"nosuch://x/y cannot be opened: .* local path"):
        open_store("nosuch://x/y")


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No credentials anywhere, and a server that nobody runs."""
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("KDPIPE_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    return monkeypatch


def refused(url):
    """The message of a store that cannot be reached; it tells what to set."""
    with pytest.raises(StoreError) as caught:
        open_store(url)
    message = str(caught.value)
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in message
    assert "AWS_ENDPOINT_URL" in message
    return message


def test_no_credentials(alone):
    assert refused("s3://bucket/targets").startswith("s3://bucket/targets cannot be read: NoCredentialsError: Unable")


def test_no_such_profile(alone):
    alone.setenv("AWS_PROFILE", "nobody")
    assert "The config profile (nobody) could not be found" in refused("s3://bucket/targets")


def test_no_server(alone):
    alone.setenv("AWS_ACCESS_KEY_ID", "name")
    alone.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    message = refused("s3://bucket/targets")
    assert "Could not connect to the endpoint URL" in message
    assert "a-secret" not in message


@pytest.mark.parametrize("url", ["s3://name:a-se/cret@bucket/targets", "s3://bucket/targets?token=a-se/cret"])
def test_no_message_tells_what_a_url_keeps_to_itself(alone, url):
    alone.setenv("AWS_ACCESS_KEY_ID", "name")
    alone.setenv("AWS_SECRET_ACCESS_KEY", "test")
    message = refused(url)
    assert "bucket/targets" in message
    assert "a-se" not in message
    assert "cret" not in message


def test_a_server_that_stops_while_a_store_is_open(alone, tmp_path):
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    alone.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    alone.setenv("AWS_ACCESS_KEY_ID", "test")
    alone.setenv("AWS_SECRET_ACCESS_KEY", "test")
    files = s3fs.S3FileSystem()
    files.mkdir("short-lived")
    store_of(tmp_path / "store", num_views=2)
    files.put(str(tmp_path / "store"), "short-lived/targets", recursive=True)
    store = open_store("s3://short-lived/targets")
    server.stop()
    with pytest.raises(StoreError, match=r"s3://short-lived/targets cannot be read: .* AWS_ENDPOINT_URL"):
        store.read(np.array([0]))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def _sum_of_a_row(store):
    return float(store.read(np.array([3]))["logits"].logits().sum())


def test_a_store_goes_to_another_process_by_its_url(bucket):
    _, name = bucket
    store = open_store(f"s3://{name}/targets")
    expected = float(store.read(np.array([3]))["logits"].logits().sum())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_sum_of_a_row, (store,)) == expected
    assert torch.is_tensor(store.read(np.array([3]))["logits"].values)
