"""Tables through the real command line: exports, stores of tables alone, teachers of which there is only a table."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kdpipe.encodings import Dense, TopK
from kdpipe.store import open_store
from kdpipe_stages.cli import run
from projects import make_project, params, project_in, tree, write_params

NUM_ROWS = 1797


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A project with a complete store, and that store as a table; not to be changed."""
    folder = tmp_path_factory.mktemp("captured")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in ("prepare-data", "train-teacher", "cache-teacher"):
            assert run([command]) == 0
        assert run(["export-targets", "data/targets/big"]) == 0
    return folder


@pytest.fixture
def folder(captured, tmp_path, monkeypatch):
    """A project with prepared rows and big.parquet, and no teacher but that table."""
    shutil.copytree(captured, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("models", "targets", ".work"))
    (tmp_path / "teacher.py").unlink()
    monkeypatch.chdir(tmp_path)
    of_table(tmp_path, "big.parquet")
    return tmp_path


def of_table(folder, path, targets=None, temperature=4):
    """params.yaml with a teacher of which there is only a table."""
    value = params(teachers={"big": {"table": path}}, targets={"big": targets or {}})
    value["student"]["losses"][0]["temperature"] = temperature
    write_params(folder, value)


def fails(capsys, *arguments, status=1):
    """Run a command that must fail; returns its message."""
    capsys.readouterr()
    assert run(arguments) == status
    message = capsys.readouterr().err
    assert message.startswith("error: ") == (status == 1)
    assert "Traceback" not in message
    return message


def key_of(sample_id):
    return sample_id.rpartition("-")[0]


def test_a_table_stands_in_for_the_teacher(captured, folder, capsys):
    """A shuffled table by keys, without some rows: everything after it works, and says what was not covered."""
    table = pq.read_table("big.parquet")
    table = table.take(np.random.default_rng(0).permutation(NUM_ROWS)[:1700])
    ids = table["sample_id"].to_pylist()
    table = table.set_column(0, "sample_id", pa.array([int(key_of(each)) for each in ids]))
    pq.write_table(table, "big.parquet")
    for command in ("check", "train-teacher", "cache-teacher"):
        assert run([command]) == 0
    assert "its table has no line for 97 rows; they are not covered" in capsys.readouterr().err
    ours, theirs = (open_store(project_in(each).store("big")) for each in (folder, captured))
    targets = ours.targets(ours.sample_ids)
    assert int(targets.covered.sum()) == 1700
    assert set(ours.sample_ids[targets.covered.numpy()].tolist()) == set(ids)
    torch.testing.assert_close(targets[targets.covered].log_probs(2.0), theirs.targets(ids_of(ours)).log_probs(2.0))
    for command in ("train-student", "evaluate"):
        assert run([command]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["teacher"]["accuracy"] > 0.5
    assert "parameters" not in metrics["teacher"]
    assert not list((folder / "data" / "targets").rglob("*.tmp"))


def ids_of(store):
    targets = store.targets(store.sample_ids)
    return store.sample_ids[targets.covered.numpy()].tolist()


def test_what_is_complete_is_not_read_again(folder, capsys):
    assert run(["cache-teacher"]) == 0
    before = tree(folder / "data" / "targets")
    capsys.readouterr()
    assert run(["cache-teacher"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert tree(folder / "data" / "targets") == before
    table = pq.read_table("big.parquet")
    pq.write_table(table.slice(0, 1000), "big.parquet")
    assert run(["cache-teacher"]) == 0
    assert len(ids_of(open_store("data/targets/big"))) == 1000


def test_two_workers_share_a_table(folder):
    assert run(["cache-teacher", "--shards", "0/2"]) == 0
    assert not (folder / "data" / "targets").exists()
    assert run(["cache-teacher", "--shards", "1/2"]) == 0
    shared = tree(folder / "data" / "targets")
    shutil.rmtree(folder / "data" / ".work")
    shutil.rmtree(folder / "data" / "targets")
    assert run(["cache-teacher"]) == 0
    assert tree(folder / "data" / "targets") == shared


def test_log_probs_of_a_server_teach_a_student(folder):
    table = pq.read_table("big.parquet")
    log_probs = torch.log_softmax(torch.from_numpy(np.stack(table["logits"].to_numpy(zero_copy_only=False))), dim=-1)
    top = log_probs.double().sort(dim=-1, descending=True, stable=True)
    top_ids, top_values = top.indices[:, :4], top.values[:, :4]
    with open("server.jsonl", "w") as file:
        for sample_id, ids, values in zip(table["sample_id"].to_pylist(), top_ids, top_values, strict=True):
            line = {"sample_id": sample_id, "class_ids": ids.tolist(), "log_probs": values.tolist()}
            file.write(json.dumps(line) + "\n")
    of_table(folder, "server.jsonl", {"encoding": "topk", "k": 3}, temperature=1)
    for command in ("check", "cache-teacher", "train-student", "evaluate"):
        assert run([command]) == 0
    store = open_store("data/targets/big")
    assert isinstance(store.encodings["logits"], TopK)
    targets = store.targets(table["sample_id"].to_pylist())
    assert (targets.ids == top_ids[:, :3].sort(dim=-1).values).all()
    kept = torch.log1p(-top_values[:, :3].exp().sum(dim=-1))
    torch.testing.assert_close(targets.tails[:, 0].double(), kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "targets", "message"),
    [
        ({"sample_id": ["x"]}, {}, "1 of 1 sample ids are none of the 1797 prepared rows, such as 'x'"),
        ({"logits": [[0.0] * 9]}, {}, "targets.big: .*is about 9 classes; 10 are expected"),
        ({"logits": [[float("nan")] * 10]}, {}, "NaN, .inf or all -inf, such as 0-"),
        (
            {},
            {"encoding": "sampled", "draws": 4},
            "targets.big: .* cannot be stored as sampled; expected encoding: dense",
        ),
        ({}, {"outputs": ["logits", "pooled"]}, "no column 'pooled'"),
        ({"logits": None, "class_ids": [[1]], "log_probs": [[-0.5]]}, {}, "stored as dense; expected encoding: topk"),
        (
            {"logits": None, "class_ids": [[1]], "log_probs": [[-0.5]]},
            {"encoding": "topk", "k": 2, "temperatures": [4]},
            "no tail_log_mass at temperature 4",
        ),
    ],
)
def test_wrong_tables_give_one_error_and_no_store(folder, capsys, change, targets, message):
    first = pq.read_table("big.parquet")["sample_id"][0].as_py()
    columns = {"sample_id": [first], "logits": [[0.0] * 10], **change}
    pq.write_table(pa.table({key: each for key, each in columns.items() if each is not None}), "wrong.parquet")
    of_table(folder, "wrong.parquet", targets)
    import re

    assert re.search(message, fails(capsys, "cache-teacher")), message
    assert not (folder / "data" / "targets").exists()


def test_damaged_and_absent_tables(folder, capsys):
    content = (folder / "big.parquet").read_bytes()
    (folder / "big.parquet").write_bytes(content[: len(content) // 2])
    for command in ("check", "cache-teacher"):
        assert "big.parquet is damaged or no table" in fails(capsys, command)
    (folder / "big.parquet").unlink()
    for command in ("check", "train-teacher", "cache-teacher"):
        assert "there is no table at" in fails(capsys, command)


def test_views_that_a_table_lacks(folder, capsys):
    (folder / "same.py").write_text(
        "class Same:\n    def __call__(self, columns, keys, seed):\n        return columns\n"
    )
    views = {"count": 2, "transform": {"factory": "same.py:Same"}}
    write_params(folder, params(teachers={"big": {"table": "big.parquet"}}, views=views))
    message = fails(capsys, "cache-teacher")
    assert "has no line about view 1, but views.count is 2" in message
    assert not (folder / "data" / "targets").exists()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"table": "a.parquet", "weights": "b.pt"}, "give one of train .* found weights and table"),
        ({}, "found none"),
        ({"weights": "b.pt"}, "teachers.big.model: missing"),
        ({"table": "a.parquet", "model": {"factory": "a:B"}}, "needs no model"),
    ],
)
def test_a_teacher_is_one_thing(folder, capsys, teacher, message):
    import re

    write_params(folder, params(teachers={"big": teacher}))
    assert re.search(message, fails(capsys, "check"))


def test_a_store_of_a_table_alone(captured, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = str(captured / "data" / "targets" / "big")
    for table_format in ("parquet", "arrow", "npz"):
        assert run(["export-targets", source, "--format", table_format]) == 0
        assert capsys.readouterr().out == f"big.{table_format}: 1,797 rows\n"
        assert run(["import-targets", f"big.{table_format}", f"of_{table_format}"]) == 0
        assert capsys.readouterr().out.startswith(f"of_{table_format}: 1,797 rows, 1 views, ")
        store, original = open_store(f"of_{table_format}"), open_store(source)
        assert store.encodings == original.encodings
        torch.testing.assert_close(
            store.targets(original.sample_ids).log_probs(), original.targets(original.sample_ids).log_probs()
        )
    command = ["import-targets", "big.npz", "narrow", "--encoding", "topk", "--k", "4", "--values", "int8"]
    assert run([*command, "--temperature", "2"]) == 0
    assert open_store("narrow").encodings["logits"] == TopK(k=4, values="int8", temperatures=(2.0,))
    assert run(["import-targets", "big.npz", "wide", "--dtype", "float32", "--num-classes", "10"]) == 0
    assert open_store("wide").encodings["logits"] == Dense(dtype="float32")
    assert not open_store("wide").digests.any()
    assert run(["verify", "wide"]) == 0


def test_commands_refuse_and_leave_nothing(captured, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = str(captured / "data" / "targets" / "big")
    assert "the choices are parquet, arrow, npz" in fails(capsys, "export-targets", source, "--format", "csv")
    assert "ends in .npz" in fails(capsys, "export-targets", source, "--format", "npz", "--out", "a.parquet")
    assert "expected a number from 0 up" in fails(capsys, "export-targets", source, "--view", "first")
    assert "views 0..0; view 1 was asked" in fails(capsys, "export-targets", source, "--view", "1")
    assert "it holds logits" in fails(capsys, "export-targets", source, "--output", "hidden")
    assert "no target store" in fails(capsys, "export-targets", "nowhere")
    assert "No such file" in fails(capsys, "export-targets", source, "--out", "nowhere/a.parquet")
    assert run(["export-targets", source]) == 0
    assert "exists already" in fails(capsys, "export-targets", source)
    assert run(["export-targets", source, "--force"]) == 0
    imports = ("import-targets", "big.parquet", "made")
    assert "the choices for a table are dense, int8, topk" in fails(capsys, *imports, "--encoding", "sampled")
    assert "--k: encoding 'dense' has no such parameter" in fails(capsys, *imports, "--k", "3")
    assert "--k: encoding 'topk' needs it" in fails(capsys, *imports, "--encoding", "topk")
    assert "is about 10 classes; 11 are expected" in fails(capsys, *imports, "--num-classes", "11")
    assert "float16, float32" in fails(capsys, *imports, "--dtype", "float8")
    table = pq.read_table("big.parquet")
    logits = [*table["logits"].to_pylist()[:-1], [float("nan")] * 10]
    pq.write_table(table.set_column(table.schema.names.index("logits"), "logits", [logits]), "late.parquet")
    assert "such as 1796-" in fails(capsys, "import-targets", "late.parquet", "made")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["big.parquet", "late.parquet"]
    assert run(imports) == 0
    assert "made exists already" in fails(capsys, *imports)
