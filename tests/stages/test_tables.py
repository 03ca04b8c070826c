"""Tables through the real command line: exports, stores of tables alone, teachers of which there is only a table."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kdpipe.data.prepared import PreparedInputs
from kdpipe.encodings import Dense, Sampled, TopK
from kdpipe.errors import KdpipeError
from kdpipe.store import open_store
from kdpipe_stages import cache_teacher, check, evaluate, prepare_data, train_student
from kdpipe_stages.cli import run
from projects import REPOSITORY, cache, fails, make_project, params, project_in, tree, write_params
from stages.test_language import LENGTH, documents
from stages.test_language import make as make_language
from store.test_tables import store_of

NUM_ROWS = 1797


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A project with a complete store, and that store as a table; not to be changed."""
    folder = tmp_path_factory.mktemp("captured")
    make_project(folder)
    cache(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
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
    said = capsys.readouterr().err
    assert "1,700 of 1,797 rows read from big.parquet; store of 1,797 rows" in said
    assert "covers 1,700 of 1,797 rows" in said
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
    assert "big: 1,797 rows read from big.parquet; store of 1,797 rows" in capsys.readouterr().err
    assert run(["cache-teacher"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert tree(folder / "data" / "targets") == before
    table = pq.read_table("big.parquet")
    pq.write_table(table.slice(0, 1000), "big.parquet")
    assert run(["cache-teacher"]) == 0
    assert len(ids_of(open_store("data/targets/big"))) == 1000


def test_another_table_than_the_stores_is_told(folder, capsys):
    """The student needs no table; but one that is here must be the one that the store was made from."""
    assert run(["cache-teacher"]) == 0
    table = pq.read_table("big.parquet")
    pq.write_table(table.slice(0, 1000), "big.parquet")
    message = fails(capsys, "train-student")
    assert "was made from another" in message
    assert "big.parquet than today" in message
    assert "kdpipe cache-teacher big" in message
    (folder / "big.parquet").unlink()
    assert run(["train-student"]) == 0


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
        ({"logits": [[float("nan")] * 10]}, {}, r"NaN, \+inf, all -inf or beyond float32, such as 0-"),
        ({"sample_id": ["0-" + "0" * 16]}, {}, "1 of 1 sample ids are none of the 1797 prepared rows, such as '0-0000"),
        ({"logits": [[[0.0] * 10]]}, {}, "targets.big: .*wrong.parquet is about tokens, .* needs targets of rows"),
        ({"views": [0]}, {}, "has a column 'views', which is not read; did you mean 'view'"),
        ({"covered": [None]}, {}, "column covered holds null"),
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
    assert re.search(message, fails(capsys, "cache-teacher")), message
    assert not (folder / "data" / "targets").exists()


def test_a_row_that_two_lines_are_about(folder, capsys):
    """By its id and by its key."""
    first = pq.read_table("big.parquet")["sample_id"][0].as_py()
    for ids in ([first, first], [first, key_of(first)]):
        pq.write_table(pa.table({"sample_id": ids, "logits": [[0.0] * 10] * 2}), "twice.parquet")
        of_table(folder, "twice.parquet")
        assert "1 lines are about a sample and view that an earlier line is about" in fails(capsys, "cache-teacher")
    assert not (folder / "data" / "targets").exists()


def test_columns_that_are_not_read_are_named(folder, capsys):
    table = pq.read_table("big.parquet").append_column("review", pa.array(["good"] * NUM_ROWS))
    pq.write_table(table, "big.parquet")
    assert run(["cache-teacher"]) == 0
    assert "cache-teacher  big: columns of its table that are not read: review\n" in capsys.readouterr().err
    assert run(["import-targets", "big.parquet", "made"]) == 0
    assert "import-targets  columns that are not read: review\n" in capsys.readouterr().err


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


SHADE = """
class Shade:
    def __call__(self, columns, keys, seed):
        return {**columns, "image": columns["image"] // 2}
"""


def test_views_that_a_table_is_not_about(folder, captured, capsys, monkeypatch):
    shutil.copytree(captured, folder / "first", ignore=shutil.ignore_patterns("targets", ".work"))
    (folder / "shade.py").write_text(SHADE)
    (folder / "first" / "shade.py").write_text(SHADE)
    views = {"count": 1, "seed": 3, "transform": {"factory": "shade.py:Shade"}}
    write_params(folder / "first", params(views=views))
    monkeypatch.chdir(folder / "first")
    cache(folder / "first")
    assert run(["export-targets", "data/targets/big", "--out", "../views.parquet"]) == 0
    monkeypatch.chdir(folder)
    sections = {"teachers": {"big": {"table": "views.parquet"}}}
    write_params(folder, params(views=views, **sections))
    assert run(["cache-teacher"]) == 0
    before = tree(folder / "data" / "targets")
    write_params(folder, params(views={**views, "seed": 4}, **sections))
    assert "views.parquet is about other views: it was exported from" in fails(capsys, "cache-teacher")
    assert tree(folder / "data" / "targets") == before


def test_classes_of_another_order_than_the_tables(folder, capsys):
    table = pq.read_table("big.parquet")
    about = json.loads(table.schema.metadata[b"kdpipe"]) | {"class_names": [f"digit {each}" for each in range(10)]}
    pq.write_table(table.replace_schema_metadata({b"kdpipe": json.dumps(about)}), "big.parquet")
    value = params(teachers={"big": {"table": "big.parquet"}})
    for names, expected in (
        ([f"digit {each}" for each in (1, 0, *range(2, 10))], "as number 0, and task.class_names has it as number 1"),
        (["none", *(f"digit {each}" for each in range(1, 10))], None),
        ([f"digit {each}" for each in range(10)], None),
    ):
        value["task"]["class_names"] = names
        write_params(folder, value)
        assert run(["prepare-data"]) == 0
        if expected is None:
            assert run(["cache-teacher"]) == 0
        else:
            assert expected in fails(capsys, "cache-teacher")
            assert not (folder / "data" / "targets").exists()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"table": "a.parquet", "weights": "b.pt"}, "give one of train .* found weights and table"),
        ({}, "found none"),
        ({"weights": "b.pt"}, "teachers.big.model: missing"),
        ({"table": "a.parquet", "model": {"factory": "a:B"}}, "does not go with table"),
    ],
)
def test_a_teacher_is_one_thing(folder, capsys, teacher, message):
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


@pytest.mark.parametrize(("longest", "everywhere"), [(5, False), (LENGTH, False), (LENGTH, True)])
def test_a_table_teaches_a_language_model(tmp_path, longest, everywhere):
    """Rows are as long as they were prepared, whatever the table has; what it lacks, or the task, is not covered."""
    texts = [text[:longest] for text in documents()]
    project = make_language(tmp_path, texts, {"table": "said.jsonl"})
    prepare_data.run(project)
    inputs = PreparedInputs(project.prepared / "inputs")
    columns = inputs.read(np.arange(len(inputs)))
    counted = np.asarray(columns["counted"])
    lines, others = [], np.log(-np.expm1(-0.1) / 256)  # 256 classes share the rest
    rest = [np.log(256) + others / temperature for temperature in (1, 2)]
    for sample_id, tokens, counts in zip(inputs.sample_ids.tolist(), columns["tokens"], counted, strict=True):
        places = range(LENGTH if everywhere else int(counts.nonzero()[0].max(initial=-1)) + 1)
        ids = [[int(tokens[place + 1])] if counts[place] or everywhere else [] for place in places]
        line = {"sample_id": sample_id, "class_ids": ids, "log_probs": [[-0.1] * len(each) for each in ids]}
        lines.append({**line, "tail_log_mass": [rest if each else [] for each in ids]})
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert max(len(line["class_ids"]) for line in lines) == longest
    check.run(project)
    cache_teacher.run(project, "big")
    store = open_store(project.store("big"))
    targets = store.targets(inputs.sample_ids.tolist())
    assert torch.equal(targets.covered, torch.from_numpy(counted))
    assert (targets.ids[targets.covered][:, 0].numpy() == np.asarray(columns["tokens"])[:, 1:][counted]).all()
    train_student.run(project)
    assert evaluate.run(project)["student"]["perplexity"] < 20, "ten letters and the end"


def test_tables_of_other_tokens_than_the_rows_have(tmp_path):
    project = make_language(tmp_path, documents(), {"table": "said.jsonl"}, targets={"big": {}})
    prepare_data.run(project)
    (sample_id, *_) = PreparedInputs(project.prepared / "inputs").sample_ids.tolist()
    for logits, message in (
        ([[0.0] * 257] * (LENGTH + 1), f"has rows of up to {LENGTH + 1} tokens; expected at most {LENGTH}"),
        ([0.0] * 257, "is about rows, in one list each; the task needs targets of tokens, in lists of lists"),
    ):
        (tmp_path / "said.jsonl").write_text(json.dumps({"sample_id": sample_id, "logits": logits}))
        with pytest.raises(KdpipeError, match=message):
            cache_teacher.run(project, "big")


@dataclass
class Logprob:
    """What vLLM says of a token."""

    logprob: float
    rank: int
    decoded_token: str


def test_the_guide_s_example_of_a_server_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    """Prompts of 1 to 7 tokens; of each but the first the 4 most probable tokens, and the token itself."""
    guide = (REPOSITORY / "docs" / "guides" / "tables.md").read_text()
    (example,) = [each for each in re.findall("```python\n(.*?)```", guide, re.DOTALL) if "server.jsonl" in each]
    (command,) = re.findall("^kdpipe (import-targets server.jsonl .*)$", guide, re.MULTILINE)
    log_probs = torch.log_softmax(torch.from_numpy(np.random.default_rng(0).normal(size=(7, 7, 32000))) * 5, dim=-1)
    best = log_probs.argsort(dim=-1, descending=True)
    answers, expected = [], {}
    for row in range(7):
        said = [None]
        for token in range(1, row + 1):
            ids = {*best[row, token, :4].tolist(), 31000 + row}
            said.append(
                {each: Logprob(float(log_probs[row, token, each]), 1, "") for each in sorted(ids, reverse=True)}
            )
            expected[row, token] = {each: float(log_probs[row, token, each]) for each in sorted(ids)}
        answers.append((f"prompt-{row}", said))
    monkeypatch.chdir(tmp_path)
    exec(example, {"answers": answers})
    assert run(command.split()) == 0
    assert "import-targets  28 of 49 tokens are not covered\n" in capsys.readouterr().err
    targets = open_store("targets/server").targets([key for key, _ in answers])
    assert {(row, token) for row, token in targets.covered.nonzero().tolist()} == set(expected)
    for (row, token), probs in expected.items():
        used = targets.head[row, token] > -torch.inf
        assert targets.ids[row, token][used].tolist() == list(probs)
        torch.testing.assert_close(
            targets.head[row, token][used].double(), torch.tensor(list(probs.values())).double(), rtol=2**-11, atol=0
        )
        rest = np.log(1 - np.exp(list(probs.values())).sum())
        assert targets.tails[row, token].tolist() == pytest.approx([rest], rel=1e-5)


@pytest.mark.parametrize("table_format", ["parquet", "arrow", "npz"])
def test_features_come_back_with_the_logits(tmp_path, monkeypatch, capsys, table_format):
    monkeypatch.chdir(tmp_path)
    original = store_of(tmp_path / "store", TopK(k=3), num_views=2, coverage=True, features=(4,))
    assert run(["export-targets", "store", "--format", table_format]) == 0
    assert run(["import-targets", f"store.{table_format}", "again"]) == 0
    assert "not read" not in capsys.readouterr().err
    again = open_store("again")
    assert again.encodings == original.encodings
    ids = original.sample_ids
    for view in (0, 1):
        for output in ("logits", "hidden"):
            ours, theirs = (each.targets(ids, view, output) for each in (original, again))
            assert torch.equal(ours.covered, theirs.covered)
            ours, theirs = ours[ours.covered], theirs[theirs.covered]
            assert (
                torch.equal(ours.values, theirs.values) if output == "hidden" else torch.equal(ours.head, theirs.head)
            )


def test_a_store_of_a_table_alone_is_not_for_training(folder, capsys):
    """Nothing is known of the rows' content."""
    assert run(["import-targets", "big.parquet", "data/targets/big"]) == 0
    message = fails(capsys, "train-student")
    assert "is a store of a table alone" in message
    assert "Name the table as teachers.big.table, remove the store and run `kdpipe cache-teacher big`" in message


def test_temperatures_that_a_table_cannot_serve(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    columns = {"sample_id": ["a"], "class_ids": [[0, 1]], "log_probs": [[-0.7, -1.0]]}
    pq.write_table(pa.table(columns), "head.parquet")
    command = ["import-targets", "head.parquet", "made", "--num-classes", "5"]
    message = fails(capsys, *command, "--temperature", "4")
    assert "--temperature is 4, but head.parquet has its tails at 1, as it has no tail_log_mass" in message
    assert run([*command, "--temperature", "1"]) == 0
    store_of(tmp_path / "store", TopK(k=2, temperatures=(4.0,)))
    assert run(["export-targets", "store"]) == 0
    command = ["import-targets", "store.parquet", "other"]
    message = fails(capsys, *command, "--temperature", "2", "--temperature", "4")
    assert "--temperature is 2, 4, but store.parquet has its tails at 1, 4;" in message
    assert run([*command, "--temperature", "1", "--temperature", "4", "--k", "1"]) == 0
    assert open_store("other").encodings["logits"] == TopK(k=1, temperatures=(1.0, 4.0))
    pq.write_table(pa.table({"sample_id": ["a"], "logits": [[0.0, 1.0]]}), "all.parquet")
    message = fails(capsys, "import-targets", "all.parquet", "third", "--temperature", "4", status=2)
    assert "encoding 'dense' serves every temperature" in message


def test_draws_do_not_come_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store_of(tmp_path / "store", Sampled(draws=4))
    assert run(["export-targets", "store"]) == 0
    assert "Copy the store's folder instead" in fails(capsys, "import-targets", "store.parquet", "made")


def test_commands_refuse_and_leave_nothing(captured, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = str(captured / "data" / "targets" / "big")
    assert "the choices are parquet, arrow, npz" in fails(capsys, "export-targets", source, "--format", "csv", status=2)
    assert "ends in .npz" in fails(capsys, "export-targets", source, "--format", "npz", "--out", "a.parquet", status=2)
    assert "expected a number from 0 up" in fails(capsys, "export-targets", source, "--view", "first", status=2)
    assert "views 0..0; view 1 was asked" in fails(capsys, "export-targets", source, "--view", "1")
    assert "it holds logits" in fails(capsys, "export-targets", source, "--output", "hidden")
    assert "no target store" in fails(capsys, "export-targets", "nowhere")
    assert "No such file" in fails(capsys, "export-targets", source, "--out", "nowhere/a.parquet")
    assert run(["export-targets", source]) == 0
    assert "exists already" in fails(capsys, "export-targets", source)
    Path("big.parquet.tmp").write_text("somebody else's")
    assert run(["export-targets", source, "--force"]) == 0
    assert Path("big.parquet.tmp").read_text() == "somebody else's"
    Path("big.parquet.tmp").unlink()
    imports = ("import-targets", "big.parquet", "made")
    assert "the choices for a table are dense, int8, topk" in fails(capsys, *imports, "--encoding", "sampled", status=2)
    assert "--k: encoding 'dense' has no such parameter" in fails(capsys, *imports, "--k", "3", status=2)
    assert "--k: encoding 'topk' needs it" in fails(capsys, *imports, "--encoding", "topk")
    assert "is about 10 classes; 11 are expected" in fails(capsys, *imports, "--num-classes", "11")
    assert "float16, float32" in fails(capsys, *imports, "--dtype", "float8")
    table = pq.read_table("big.parquet")
    logits = [*table["logits"].to_pylist()[:-1], [float("nan")] * 10]
    pq.write_table(table.set_column(table.schema.names.index("logits"), "logits", [logits]), "late.parquet")
    assert "such as 1796-" in fails(capsys, "import-targets", "late.parquet", "made")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["big.parquet", "late.parquet"]
    Path("folder.parquet").mkdir()
    assert "which is a folder" in fails(capsys, "export-targets", source, "--out", "folder.parquet", "--force")
    killed = subprocess.Popen(["true"])
    killed.wait()
    for leftover in (f".made.{killed.pid}.tmp", f".made.{os.getppid()}.tmp"):
        Path(leftover).mkdir()
    assert run(imports) == 0
    assert [each.name for each in tmp_path.glob(".made*")] == [f".made.{os.getppid()}.tmp"]
    assert "made exists already" in fails(capsys, *imports)
    table = pq.read_table("big.parquet")
    masked = [[[-math.inf, *each[1:]] for each in table["logits"].to_pylist()]]
    pq.write_table(table.set_column(table.schema.names.index("logits"), "logits", masked), "masked.parquet")
    as_int8 = ("import-targets", "masked.parquet", "masked", "--encoding", "int8")
    assert "--masked-classes" in fails(capsys, *as_int8)
    assert run([*as_int8, "--masked-classes"]) == 0
    assert torch.isneginf(open_store(Path("masked")).read(np.arange(9))["logits"].values[:, 0]).all()
    assert "--masked-classes: encoding 'dense' has no" in fails(
        capsys, "import-targets", "masked.parquet", "dense", "--encoding", "dense", "--masked-classes", status=2
    )
    assert "lies in the target store" in fails(capsys, "import-targets", "big.parquet", "made/again")
    assert "lies in the target store" in fails(capsys, "export-targets", source, "--out", "made/big.parquet")
    monkeypatch.chdir("made")
    assert "made.parquet lies in the target store" in fails(capsys, "export-targets", ".")
    assert run(["export-targets", ".", "--out", "../here.parquet"]) == 0
