"""The benchmarks, small: that they run and print a table, not how fast they are."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import (
    encodings,
    end_to_end,
    gains,
    gradient_log,
    loss_cost,
    measuring,
    offline_online,
    open_and_memory,
    peers,
    preparing,
    read_store,
    views,
)
from benchmarks.gains import cifar10_augmented, cifar10_unseen, cifar10_views, digits, fashion_mnist, features, teachers
from kdpipe.losses import LOSSES


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


def test_loss_cost(capsys):
    loss_cost.main(rounds=2, shapes={"images": (4, 6), "tokens": (2, 3, 8), "features": (4, 3, 2, 2)})
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in loss_cost.FEATURES)
    assert all(f"| {name}, dense |" in printed for name in LOSSES if name != "topk_renorm_kl")
    assert printed.count("| forward_kl, sampled |") == printed.count("| cross-entropy |") - 1 == 2


def test_gradient_log(capsys):
    gradient_log.main(steps=10, num_rows=4, rounds=2)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in gradient_log.models())


def lines_of(printed):
    return [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines() if line.startswith("| ")]


def test_gains_on_digits(capsys, monkeypatch):
    few = {name: digits.LOSSES[name] for name in ("ForwardKL", "LogitMSE, centred")}
    monkeypatch.setattr(digits, "LOSSES", few)
    digits.main(num_seeds=2, epochs=1)
    found = lines_of(capsys.readouterr().out)
    assert found[2:] == ["ForwardKL", gains.LABELS_ONLY, gains.SMOOTHED, "teacher big", "LogitMSE, centred"]


def pictures(path, side, channels):
    """Images whose brightness tells the class, as a Parquet file like the data sets'."""
    random = np.random.default_rng(0)
    labels = np.arange(240) % 10
    pixels = 25 * labels[:, np.newaxis] + random.integers(0, 9, (len(labels), side * side * channels))
    images = pa.FixedSizeListArray.from_arrays(pa.array(pixels.astype(np.uint8).reshape(-1)), pixels.shape[1])
    split = np.where(random.random(len(labels)) < 0.3, "test", "train")
    pq.write_table(pa.table({"id": np.arange(len(labels)), "label": labels, "split": split, "image": images}), path)
    return path


def test_gains_on_fashion_mnist(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "SHARES", (0.5,))
    rows = pictures(tmp_path / "rows.parquet", 28, 1)
    fashion_mnist.main(num_seeds=2, epochs=1, teacher_epochs=1, path=rows)
    printed = capsys.readouterr().out
    assert "labels for 50% of the rows" in printed
    assert lines_of(printed)[2:] == ["cached targets", gains.LABELS_ONLY, gains.SMOOTHED, "teacher resnet"]


@pytest.fixture
def few_views(monkeypatch):
    monkeypatch.setattr(cifar10_views, "VIEWS", (3, 2, 1))


@pytest.mark.usefixtures("few_views")
def test_gains_of_views(capsys, tmp_path):
    rows = pictures(tmp_path / "rows.parquet", 32, 3)
    cifar10_views.main(num_seeds=2, epochs=1, teacher_epochs=1, num_rows=100, path=rows)
    printed = capsys.readouterr().out
    assert "of the 91 training rows, and of view 1" in printed
    found = lines_of(printed)
    assert [name for name in found if "view" in name] == [
        "3 cached views",
        "2 cached views",
        "1 cached views",
        cifar10_views.CLEAN,
        "no views, targets of the clean row",
    ]


@pytest.mark.usefixtures("few_views")
@pytest.mark.parametrize("bench", [cifar10_unseen, cifar10_augmented])
def test_gains_of_views_of_rows_that_the_teacher_has_not_learnt(capsys, tmp_path, bench):
    rows = pictures(tmp_path / "rows.parquet", 32, 3)
    bench.main(num_seeds=2, epochs=1, teacher_epochs=1, num_rows=50, path=rows)
    printed = capsys.readouterr().out
    assert "training rows, and of view 1" in printed
    assert {"3 cached views", "1 cached views", cifar10_views.CLEAN} <= set(lines_of(printed))


def test_gains_of_several_teachers(capsys, monkeypatch):
    monkeypatch.setattr(teachers, "OTHERS", {"linear": teachers.OTHERS["linear"]})
    teachers.main(num_seeds=2, epochs=1, teacher_epochs=1)
    found = lines_of(capsys.readouterr().out)
    assert {"big alone", "linear alone", "mean of all", "all by confidence", "teacher linear"} <= set(found)


def test_gains_of_features(capsys, monkeypatch):
    monkeypatch.setattr(features, "LOSSES", {name: features.LOSSES[name] for name in ("HintMSE", "AttentionTransfer")})
    features.main(num_seeds=2, epochs=1, teacher_epochs=1)
    found = lines_of(capsys.readouterr().out)
    assert {"ForwardKL and HintMSE", "AttentionTransfer and labels", gains.LABELS_ONLY} <= set(found)


def test_offline_is_online(capsys):
    offline_online.main(num_seeds=2, epochs=1, steps=5)
    printed = capsys.readouterr().out
    assert "| live teacher |" in printed
    apart = float(re.search(r"\|cached - live\| \S+ \(\S+?-(\S+)\)", printed)[1])
    assert apart < 1e-5
