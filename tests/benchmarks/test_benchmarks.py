"""The benchmarks, small: that they run and print a table, not how fast they are."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from benchmarks import encodings, end_to_end, measuring, open_and_memory, peers, preparing, read_store, views


def test_read_store(capsys):
    read_store.main(num_rows=70_000, num_classes=4, rounds=2)
    printed = capsys.readouterr().out
    assert f"| {read_store.STREAM} |" in printed
    assert f"| {read_store.CHECKED} |" in printed


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers(capsys, tmp_path, name):
    if missing := peers.PEERS[name].missing():
        pytest.skip(f"{', '.join(missing)} is not installed; it is a part of `make bench-peers` only")
    peers.main(num_rows=3000, num_classes=8, rounds=1, only=name, folder=tmp_path)
    assert len(capsys.readouterr().out.splitlines()) > len(read_store.NAMES) + 5


def test_end_to_end(capsys):
    end_to_end.main(num_rows=600, num_classes=10, hidden=8, rounds=2)
    assert "| store, read ahead |" in capsys.readouterr().out


def test_open_and_memory(capsys):
    open_and_memory.main(num_shards=12, shard_rows=4, num_rows=70_000, num_classes=4, rounds=1)
    assert "| `TargetStore.open` |" in capsys.readouterr().out


def test_preparing(capsys, tmp_path):
    preparing.main(tiny_rows=300, num_rows=1000, rounds=1, kinds=["tables of 2 numbers"], folder=tmp_path)
    printed = capsys.readouterr().out
    assert "| tables of 2 numbers | 0 | 300 | " in printed
    assert "| 200 JPEG images of 64 pixels | pyarrow and PIL alone |" in printed
    assert list(tmp_path.iterdir()) == []


def test_views(capsys):
    views.main({16: (8, 3)}, rounds=1)
    printed = capsys.readouterr().out
    assert all(f"| 16 | {name} | " in printed for name in views.BUILT_IN)


def test_encodings(capsys, tmp_path):
    words = " ".join(f"w{rank}" for rank in np.random.default_rng(0).zipf(1.5, 4000))
    (tmp_path / "words.txt.gz").write_bytes(gzip.compress(words.encode()))
    sizes = encodings.Sizes(
        tokens=128,
        error_tokens=64,
        vision_classes=(20, 200),
        vocabularies=(400,),
        kept=(8, 16),
        draws=2000,
        speed_rows=32,
        rounds=2,
        width=8,
        epochs=1,
    )
    encodings.main(sizes, text=str(tmp_path), cache=tmp_path / "cache", folder=tmp_path)
    printed = capsys.readouterr().out
    assert "| int8, compact |" in printed
    assert "| head 12 + 8, stratified |" in printed
    assert "| its own ids, the words in random order |" in printed
    assert list((tmp_path / "cache").glob("*.safetensors"))


def test_interval_holds_the_mean():
    mean, low, high = measuring.interval_95([1.0, 2.0, 3.0])
    assert low < mean == 2.0 < high
    assert high - mean == pytest.approx(4.303 / 3**0.5, rel=1e-3)
