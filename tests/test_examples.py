"""The recipes of examples/, small: on some rows of their data sets where these are there, and on rows made up."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

import hub_server
from kdpipe.config import load_module, resolve
from kdpipe.data.sources.digits import write_digits
from kdpipe.errors import ConfigError, DataError
from kdpipe.losses import AttentionTransfer
from kdpipe.models.resnet import ResNet
from kdpipe.store import TargetStore
from kdpipe.targets import FeatureTargets
from kdpipe_stages import cache_teacher, check, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.building import WEIGHTS
from projects import REPOSITORY, project_in, write_params
from toy_datasets import clothes, news, passengers, persons, photos, play, reviews
from toy_text import save_bert, save_tokenizer

EXAMPLES = REPOSITORY / "examples"
DATASETS = Path(os.environ.get("KDPIPE_DATASETS", REPOSITORY.parent / "shared" / "datasets"))


def example(recipe, folder, rows, teacher=None, **student):
    """A copy of a recipe about the rows of a table, or a text, with other settings of its teacher and its student."""
    copied = shutil.copytree(EXAMPLES / recipe, folder / recipe, ignore=shutil.ignore_patterns("data", ".dvc*"))
    params = yaml.safe_load((copied / "params.yaml").read_text())
    if isinstance(rows, str):
        (folder / "rows.txt").write_text(rows)
        params["data"]["path"] = "../rows.txt"
    else:
        pyarrow.csv.write_csv(rows, folder / "rows.csv")
        params["data"]["path"] = "../rows.csv"
    for name in params["teachers"]:
        params["teachers"][name] |= teacher or {}
    params["student"] |= student
    write_params(copied, params)
    return copied


def run(project):
    """Every stage, as the commands run them."""
    check.run(project)
    prepare_data.run(project)
    for teacher in project.params.teachers:
        train_teacher.run(project, teacher)
        cache_teacher.run(project, teacher)
    train_student.run(project)
    return evaluate.run(project)


def data_set(path):
    """Where a data set lies; skips where it is absent."""
    if not (DATASETS / path).is_file():
        pytest.skip(f"no {DATASETS / path} (env KDPIPE_DATASETS)")
    return DATASETS / path


def rows_of(path):
    """A data set's table."""
    with gzip.open(data_set(path)) as file:
        return pyarrow.csv.read_csv(file)


@pytest.fixture(params=["titanic", "made up"])
def titanic(request):
    return rows_of("titanic/titanic.csv.gz") if request.param == "titanic" else passengers()


def test_rules(tmp_path, titanic):
    train = {"epochs": 10, "learning_rate": 0.05, "threads": 1}
    folder = example("rules", tmp_path, titanic, seeds=1, train=train)
    project = project_in(folder)
    metrics = run(project)
    assert metrics["teacher"]["accuracy"] > 0.7
    assert metrics["student"]["accuracy"] > 0.7
    ids = project.prepared_data().inputs.sample_ids.tolist()
    assert 0.9 < TargetStore.open(project.store("rules")).targets(ids).covered.float().mean() < 1


def test_a_student_begins_with_the_rules(tmp_path, titanic):
    barely = {"epochs": 1, "learning_rate": 1e-9, "threads": 1}
    folder = example("rules", tmp_path, titanic, seeds=1, init_from="data/initial/rules.safetensors", train=barely)
    project = project_in(folder)
    prepare_data.run(project)
    divergence = resolve("initial_weights.py:write_weights", folder, "test")(project).divergence
    assert max(divergence.values()) < 0.5
    train_teacher.run(project, "rules")
    cache_teacher.run(project, "rules")
    train_student.run(project)
    metrics = evaluate.run(project)
    for arm in ("student", "baseline"):
        assert metrics[arm]["agreement"] > 0.8
        assert metrics[arm]["kl_to_teacher"] < 0.2


def test_rules_are_compared(tmp_path, monkeypatch, capsys):
    folder = example("rules", tmp_path, passengers(), train={"epochs": 1, "threads": 1})
    script = load_module("compare.py:compare", folder, "test")
    monkeypatch.setattr(script, "LABELS", (20,))
    comparison = script.compare(2)
    assert list(comparison["students"]) == [f"20 labels, from {each}" for each in script.BEGINNINGS]
    assert all(len(accuracies) == 2 for row in comparison["students"].values() for accuracies in row.values())
    script.show(comparison)
    shown = capsys.readouterr().out
    assert "coverage: 9" in shown
    assert shown.count("labels, from ") == 2
    draws = [project_in(folder / "data" / "comparison" / f"draw-{number}").prepared_data() for number in (0, 1)]
    tests = [set(data.inputs.sample_ids[data.rows_of(["test"])].tolist()) for data in draws]
    assert tests[0] != tests[1]


@pytest.fixture(params=["adult", "made up"])
def adult(request):
    """Some rows of both splits, the marks among them, one row twice."""
    if request.param == "made up":
        return persons()
    rows = rows_of("adult/adult.csv.gz")
    return rows.take(np.append(np.arange(0, len(rows), 40), 0))


def test_any_framework(tmp_path, capsys, adult):
    train = {"epochs": 10, "batch_size": 64, "learning_rate": 0.01, "threads": 1}
    folder = example("any_framework", tmp_path, adult, seeds=2, labelled_fraction=0.1, train=train)
    project = project_in(folder)
    metrics = run(project)
    assert metrics["teacher"]["auc"] > 0.8
    assert metrics["student"]["auc"] > 0.75
    assert metrics["student"]["balanced_accuracy"] < metrics["student"]["accuracy"]
    load_module("gains.py:show", folder, "test").show([folder / "per_seed.json"])
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["accuracy", "balanced_accuracy", "auc"]
    assert f"gain {100 * metrics['gain']['over_baseline']['mean']:+.2f} [" in shown[0]
    inputs = project.prepared_data().inputs
    assert len(inputs) == len(adult)
    known = project.task().column_values(inputs.read(np.arange(len(inputs))))["occupation"]
    missing = np.array([value is None for value in known])
    assert missing.tolist() == [value.as_py() == "?" for value in adult["occupation"]]


@pytest.fixture(params=["sst2", "made up"])
def sst2(request):
    """Some rows of each split, and the least accuracy that a teacher gets from them in no time."""
    if request.param == "made up":
        return reviews(), 0.95
    rows = pq.read_table(data_set("sst2/sst2.parquet"))
    some = [np.flatnonzero(np.array(rows["split"]) == split)[:300] for split in ("train", "validation", "test")]
    return rows.take(np.concatenate(some)), 0.4


def quick(epochs):
    """A training on few rows."""
    return {"epochs": epochs, "batch_size": 16, "learning_rate": 0.002, "threads": 1}


def test_text_transformer(tmp_path, sst2):
    rows, least = sst2
    folder = example(
        "text_transformer", tmp_path, rows, {"train": quick(3)}, seeds=1, labelled_fraction=0.1, train=quick(6)
    )
    metrics = run(project_in(folder))
    assert metrics["teacher"]["accuracy"] > least
    assert metrics["student"]["kl_to_teacher"] < 0.5 * metrics["baseline"]["kl_to_teacher"]
    assert metrics["student"]["parameters"] < metrics["teacher"]["parameters"]


def test_text_students_are_compared(tmp_path, capsys):
    folder = example("text_transformer", tmp_path, reviews(), {"train": quick(1)}, seeds=1, train=quick(1))
    run(project_in(folder))
    shutil.rmtree(folder / "data" / "models" / "teachers")
    script = load_module("compare.py:compare", folder, "test")
    comparison = script.compare(draws=2, seeds=2)
    assert list(comparison) == ["LSTM, 1%", "Transformer, 1%", "LSTM, 100%", "Transformer, 100%"]
    assert [len(accuracies) for row in comparison.values() for accuracies in row.values()] == [2] * 8
    assert min(comparison["LSTM, 100%"]["student"]) > 0.5
    script.show(comparison)
    assert capsys.readouterr().out.count(" | ") == 5 * 4


def test_a_checkpoint_of_the_hub_is_one_parameter(tmp_path):
    rows = reviews()
    words = sorted({word for text in rows["text"].to_pylist() for word in text.split()})
    settings = (EXAMPLES / "text_transformer" / "checkpoint.yaml").read_text()
    params = yaml.safe_load(settings)
    teacher = params["teachers"]["bert"]
    hub = teacher["model"]["hub"]
    assert settings.count(hub) == 1
    name, commit = hub.split("@")
    there = tmp_path / "models" / name
    save_tokenizer(save_bert(there, num_classes=2, vocab_size=5 + len(words)), words)
    teacher["train"] |= quick(1) | {"learning_rate": 1e-9}
    folder = example(
        "text_transformer", tmp_path, rows, {key: teacher[key] for key in ("model", "preprocess", "train")}
    )
    code = "from kdpipe_stages.cli import run; assert not run(['prepare-data']) and not run(['train-teacher', 'bert'])"
    with hub_server.hub(tmp_path, commit) as environment:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=os.environ | environment, capture_output=True, check=False
        )
    assert done.returncode == 0, done.stderr.decode()
    trained = load_file(project_in(folder).teacher_model("bert") / WEIGHTS)
    for key, weights in load_file(there / "model.safetensors").items():
        torch.testing.assert_close(trained[key], weights, rtol=0, atol=1e-6)


@pytest.fixture(params=["tinyshakespeare", "made up"])
def shakespeare(request):
    """Some of the text."""
    if request.param == "made up":
        return play()
    with gzip.open(data_set("tinyshakespeare/input.txt.gz"), "rt") as file:
        return file.read(9000)


def test_language_model(tmp_path, shakespeare):
    folder = example("language_model", tmp_path, shakespeare, {"train": quick(3)}, seeds=1, train=quick(6))
    project = project_in(folder)
    metrics = run(project)
    for arm in ("student", "baseline"):
        assert metrics[arm]["nll"] < 0.8 * np.log(257)
        assert metrics[arm]["perplexity"] == pytest.approx(np.exp(metrics[arm]["nll"]))
    inputs = project.prepared_data().inputs
    targets = TargetStore.open(project.store("gpt")).targets(inputs.sample_ids.tolist())
    assert targets.ids.shape == (len(inputs), 128, 16)
    counted = inputs.read(np.arange(len(inputs)))["counted"]
    np.testing.assert_array_equal(targets.covered.numpy(), counted)


def test_ways_to_store_a_language_model_are_compared(tmp_path, capsys):
    folder = example("language_model", tmp_path, play(), {"train": quick(2)}, seeds=2, train=quick(2))
    run(project_in(folder))
    script = load_module("compare.py:compare", folder, "test")
    comparison = script.compare(seeds=2)
    losses, sizes = comparison["losses"], comparison["bytes per token"]
    assert list(losses) == ["top 16", "labels only", "head 12, 8 draws", "50 draws", "dense", "live teacher"]
    np.testing.assert_allclose(losses["dense"]["test"], losses["live teacher"]["test"], atol=1e-3)
    assert sizes["top 16"] < sizes["dense"]
    assert losses["labels only"]["test"] != losses["top 16"]["test"]
    script.show(comparison)
    assert capsys.readouterr().out.count("live teacher |") == 1


def test_unbalanced(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(EXAMPLES / "unbalanced", tmp_path / "unbalanced", ignore=shutil.ignore_patterns("data"))
    pq.write_table(clothes(), tmp_path / "rows.parquet")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["data"]["path"] = "../rows.parquet"
    params["data"]["source"] |= {"ratio": 10, "largest": 80}
    params["teachers"]["resnet"]["model"] |= {"width": 4}
    params["teachers"]["resnet"]["train"] |= {"epochs": 1}
    params["student"] |= {"seeds": 2}
    params["student"]["train"] |= {"epochs": 1}
    write_params(folder, params)
    script = load_module("compare.py:compare", folder, "test")
    monkeypatch.setattr(script, "TEACHERS", {"plain teacher": {}})
    found = script.compare()
    assert list(found) == [
        f"{teacher} | {share:.0%} | {way}"
        for teacher in script.TEACHERS
        for share in script.SHARES
        for way in script.WAYS
    ]
    counts = json.loads((folder / "data" / "comparison" / "data" / "prepared" / "labels" / "classes.json").read_text())
    assert counts["train"]["0"] > 4 * counts["train"]["9"]
    whole = [here for name, here in found.items() if "100%" in name]
    assert all(len(here[arm]) == 2 for here in whole for arm in ("student", "baseline"))
    assert "no labelled row" in found["plain teacher | 1% | class weights"]
    script.show(found)
    assert capsys.readouterr().out.count("refused: ") == 3


def brightness_network(path):
    """A network that says of images, channels last, how near their brightness is to that of each class of `clothes`."""
    centres = (25 * np.arange(10) + 5.5) / 255
    weights = np.repeat(2000 * centres[np.newaxis] / 784, 784, axis=0).astype(np.float32)
    tensors = {"w": weights, "b": (-1000 * centres**2).astype(np.float32)}
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["rows", 28, 28, 1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 10])
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["logits"]),
    ]
    held = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = helper.make_graph(nodes, "network", [images], [logits], held)
    path.parent.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_keras_through_onnx(tmp_path):
    folder = shutil.copytree(EXAMPLES / "keras_onnx", tmp_path / "keras_onnx", ignore=shutil.ignore_patterns("data"))
    pq.write_table(clothes(), tmp_path / "rows.parquet")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["data"]["path"] = "../rows.parquet"
    params["student"] |= {"seeds": 1, "train": quick(3)}
    write_params(folder, params)
    brightness_network(folder / "data" / "teacher.onnx")
    metrics = run(project_in(folder))
    assert metrics["teacher"]["accuracy"] == 1
    assert metrics["student"]["kl_to_teacher"] < metrics["baseline"]["kl_to_teacher"]


def imported_table(folder):
    copy = shutil.copytree(EXAMPLES / "imported_table", folder / "table", ignore=shutil.ignore_patterns("data"))
    write_digits(copy / "data" / "raw" / "digits.parquet")
    return copy


def test_a_graph_network_propagates_by_a_symmetric_matrix(tmp_path):
    script = load_module("graph_network.py:write", imported_table(tmp_path), "test")
    features = np.random.default_rng(0).normal(size=(30, 4))
    near = script.neighbourhoods(features)
    dense = near.toarray().astype(np.float64)
    np.testing.assert_array_equal(dense, dense.T)
    assert np.abs(np.linalg.eigvalsh(dense)).max() == pytest.approx(1, abs=1e-6)
    values = torch.from_numpy(features).requires_grad_()
    torch.testing.assert_close(script.Propagation.apply(values, near), torch.from_numpy(dense @ features))
    assert torch.autograd.gradcheck(lambda each: script.Propagation.apply(each, near.astype(np.float64)), (values,))


def test_imported_table(tmp_path):
    folder = imported_table(tmp_path)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["student"] |= {"seeds": 1, "train": quick(20)}
    write_params(folder, params)
    project = project_in(folder)
    prepare_data.run(project)
    load_module("graph_network.py:write", folder, "test").write(project)
    metrics = run(project)
    assert metrics["teacher"]["accuracy"] > 0.75
    assert metrics["gain"]["over_baseline"]["mean"] > 0.01


def test_an_imported_table_is_compared(tmp_path, monkeypatch, capsys):
    script = load_module("compare.py:compare", imported_table(tmp_path), "test")
    monkeypatch.setattr(script, "TRAIN", {30: {"epochs": 1}})
    found = script.compare(2)
    assert [len(of) for of in found["30"].values()] == [2, 2, 2]
    assert found["30"]["teacher"][0] != found["30"]["teacher"][1]
    script.show(found)
    assert capsys.readouterr().out.count(" | over the teacher |") == 1


def test_ensemble(tmp_path, adult):
    folder = example("ensemble", tmp_path, adult, seeds=1, labelled_fraction=0.1, train=quick(5))
    project = project_in(folder)
    metrics = run(project)
    stores = {name: TargetStore.open(project.store(name)) for name in ("boosting", "network", "rules")}
    ids = project.prepared_data().inputs.sample_ids.tolist()
    covered = {name: store.targets(ids).covered for name, store in stores.items()}
    assert covered["boosting"] is covered["network"] is None
    assert 0.3 < covered["rules"].float().mean() < 1
    assert metrics["student"]["auc"] > 0.75
    assert {"teacher", "teacher_network", "teacher_rules"} <= set(metrics)


def test_teachers_are_removed_in_turn(tmp_path, capsys):
    script = load_module("compare.py:compare", example("ensemble", tmp_path, persons(), train=quick(2)), "test")
    found = script.compare(1)
    names = ["boosting", "network", "rules"]
    assert list(found["auc"]) == [
        "labels only",
        "all three",
        *(f"without {name}" for name in names),
        *(f"{name} alone" for name in names),
        *(f"({name} itself)" for name in names),
    ]
    assert {len(of) for row in found.values() for of in row.values()} == {1}
    students = [of for arm, of in found["auc"].items() if not arm.startswith("(")]
    assert len({tuple(of) for of in students}) == len(students)
    script.show({metric: {arm: 2 * of for arm, of in row.items()} for metric, row in found.items()})
    assert capsys.readouterr().out.count(" | over all three |") == 2


def test_tabular(tmp_path, adult):
    train = {"epochs": 10, "batch_size": 64, "learning_rate": 0.02, "threads": 1}
    teacher = {"train": quick(10) | {"split": "train"}}
    folder = example("tabular", tmp_path, adult, teacher, seeds=2, labelled_fraction=0.1, train=train)
    project = project_in(folder)
    metrics = run(project)
    assert metrics["teacher"]["auc"] > 0.75
    assert metrics["student"]["auc"] > 0.75
    data = project.prepared_data()
    taught, transfer = (set(data.rows_of([split]).tolist()) for split in ("train", "transfer"))
    assert not taught & transfer
    script = load_module("coefficients.py:write", folder, "test")
    script.write(project)
    table = pyarrow.csv.read_csv(folder / script.FILE)
    sizes = np.abs(table["coefficient"].to_numpy())
    assert (np.diff(sizes) <= 0).all()
    assert table["std"].to_numpy().max() > 0
    encoder = project.preprocess(project.params.student.preprocess, project.task(), "student.preprocess")
    described = json.loads((project.student_models / "student" / "seed-0" / "model.json").read_text())
    encoder.load_state(described["preprocess_state"])
    rows = data.rows_of(["test"])
    by_name = script.coefficients(project, 0)
    assert set(by_name) == set(table["feature"].to_pylist())
    values = np.array([by_name[name] for name in encoder.feature_names()])
    log_odds = encoder(data.inputs.read(rows)).numpy() @ values + by_name["intercept"]
    per_seed = json.loads((folder / "per_seed.json").read_text())
    assert np.mean((log_odds > 0) == data.labels[rows]) == pytest.approx(per_seed["student"][0]["accuracy"], abs=1e-5)
    mlp = {"factory": "kdpipe.models.mlp:MLP", "hidden": [4]}
    changed = yaml.safe_load((folder / "params.yaml").read_text())
    changed["student"]["model"] = mlp
    write_params(folder, changed)
    train_student.run(project_in(folder))
    with pytest.raises(ConfigError, match=r"coefficients are those of .*found kdpipe\.models\.mlp:MLP of 2 classes"):
        script.write(project_in(folder))


def test_tabular_students_are_compared(tmp_path, monkeypatch, capsys):
    folder = example("tabular", tmp_path, persons(), {"train": quick(2)}, train=quick(2))
    script = load_module("compare.py:compare", folder, "test")
    monkeypatch.setattr(script, "TRAIN", {0.5: {"weight_decay": 0.1}, 1.0: {}})
    found = script.compare(2)
    assert list(found) == ["50%", "100%"]
    assert {len(of) for metrics in found.values() for arms in metrics.values() for of in arms.values()} == {2}
    script.show(found)
    assert capsys.readouterr().out.count(" | gain |") == 1
    draws = [project_in(folder / "data" / "comparison" / f"draw-{number}").prepared_data() for number in (0, 1)]
    seen = [set(data.inputs.sample_ids[data.rows_of(["transfer"])].tolist()) for data in draws]
    assert seen[0] != seen[1]


def pairs_about(rows, folder, **network):
    """The recipe of saved pairs about other rows: where they lie is changed, and what else is given of the network."""
    pyarrow.csv.write_csv(rows, folder / "rows.csv")
    copied = shutil.copytree(
        EXAMPLES / "saved_pairs", folder / "saved_pairs", ignore=shutil.ignore_patterns("data", ".dvc*")
    )
    settings = yaml.safe_load((copied / "network.yaml").read_text()) | {"rows": "../rows.csv"} | network
    (copied / "network.yaml").write_text(yaml.safe_dump(settings))
    return copied


def test_saved_pairs(tmp_path, adult):
    folder = pairs_about(adult, tmp_path)
    script = load_module("save_pairs.py:save", folder, "test")
    settings = script.settings_in(folder)
    script.save(settings, folder / script.FILE)
    assert script.num_parameters(settings) == (6 + 1) * 128 + (128 + 1) * 128 + 128 + 1
    pairs = pq.read_table(folder / script.FILE).to_pandas()
    assert set(pairs["split"][pairs["label"].notna()]) == {"validation", "test"}
    assert set(pairs["split"]) == {"validation", "test", "real", "alike", "ranges"}
    project = project_in(folder)
    metrics = run(project)
    assert set(metrics) == {"gain", "student", "teacher"}
    assert metrics["student"]["agreement"] > 0.75
    assert metrics["student"]["kl_to_teacher"] < 0.15
    assert metrics["student"]["entropy"] > 0
    assert metrics["teacher"]["entropy"] > 0
    assert metrics["student"]["parameters"] == (4 + 1) * 16 + (16 + 1) * 2


def test_saved_pairs_are_in_the_order_of_class_names(tmp_path):
    folder = pairs_about(persons(), tmp_path, num_synthetic=10, hidden=[8])
    script = load_module("save_pairs.py:save", folder, "test")

    def logits(names):
        params = yaml.safe_load((folder / "params.yaml").read_text())
        params["task"]["class_names"] = names
        write_params(folder, params)
        script.save(script.settings_in(folder), folder / script.FILE)
        return np.stack(pq.read_table(folder / script.FILE)["logits"].to_numpy())

    np.testing.assert_array_equal(logits([">50K", "<=50K"]), logits(["<=50K", ">50K"])[:, ::-1])
    with pytest.raises(ConfigError, match=r"the network knows the classes .*; task\.class_names are \['a', 'b'\]"):
        logits(["a", "b"])


def test_rows_behind_saved_pairs_may_be_parquet_and_are_looked_at(tmp_path):
    folder = pairs_about(persons(), tmp_path, num_synthetic=10, hidden=[8])
    script = load_module("save_pairs.py:save", folder, "test")
    settings = script.settings_in(folder)
    script.save(settings, folder / "csv.parquet")
    pq.write_table(persons(), folder / "rows.parquet")
    script.save(settings | {"rows": folder / "rows.parquet"}, folder / "parquet.parquet")
    assert pq.read_table(folder / "csv.parquet").equals(pq.read_table(folder / "parquet.parquet"))
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        script.save(settings | {"rows": folder / "nowhere.csv"}, folder / "wrong.parquet")
    with pytest.raises(ConfigError, match=r"network\.yaml: .*rows\.parquet has no column 'earns'; it has age, "):
        script.save(settings | {"rows": folder / "rows.parquet", "label": "earns"}, folder / "wrong.parquet")
    rows = persons()
    rows = rows.set_column(0, "age", pa.array([None, *rows["age"].to_pylist()[1:]]))
    pq.write_table(rows, folder / "rows.parquet")
    with pytest.raises(ConfigError, match=r"network\.yaml: .*rows\.parquet has rows without 'age'"):
        script.save(settings | {"rows": folder / "rows.parquet"}, folder / "wrong.parquet")
    assert not (folder / "wrong.parquet").exists()


@pytest.mark.parametrize(
    ("recipe", "script", "message"),
    [
        ("tabular", "coefficients.py", "there is no trained model"),
        ("rules", "initial_weights.py", "Run `kdpipe prepare-data`"),
        ("imported_table", "graph_network.py", "Run `kdpipe prepare-data`"),
        ("saved_pairs", "save_pairs.py", "adult.csv.gz"),
    ],
)
def test_scripts_of_recipes_end_as_commands_do(tmp_path, recipe, script, message, capsys):
    copied = shutil.copytree(EXAMPLES / recipe, tmp_path / "a" / "b" / recipe, ignore=shutil.ignore_patterns("data"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(copied / script), run_name="__main__")
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_pairs_on_synthetic_inputs_are_compared(tmp_path, capsys):
    folder = pairs_about(persons(), tmp_path, num_synthetic=400, hidden=[16])
    script = load_module("compare.py:compare", folder, "test")
    found = script.compare(2)
    assert list(found) == ["network", "real", "alike", "ranges", "real, all columns"]
    assert {len(of) for metrics in found.values() for of in metrics.values()} == {2}
    assert found["alike"] != found["real"]
    assert found["network"]["kl_to_teacher"] == [0, 0]
    settings = yaml.safe_load((folder / "network.yaml").read_text())
    (folder / "network.yaml").write_text(yaml.safe_dump(settings | {"hidden": [2]}))
    assert script.compare(1)["network"]["entropy"] != found["network"]["entropy"][:1]
    script.show(found)
    assert capsys.readouterr().out.count("real, all columns |") == 2


@pytest.fixture(params=["cifar10", "made up"])
def cifar10(request):
    """Some rows of both splits, and the least accuracy that a teacher gets from them in no time."""
    if request.param == "made up":
        return photos(), 0.5
    rows = pq.read_table(data_set("cifar10_jpeg/cifar10_jpeg.parquet"))
    some = [np.flatnonzero(np.array(rows["split"]) == split)[:400] for split in ("train", "test")]
    return rows.take(np.concatenate(some)), 0.1


def vision(folder, rows, params="params.yaml"):
    """A copy of the recipe about the rows of a table, with small networks that learn for a moment."""
    copied = shutil.copytree(EXAMPLES / "vision", folder / "vision", ignore=shutil.ignore_patterns("data", ".dvc*"))
    pq.write_table(rows, folder / "rows.parquet")
    settings = yaml.safe_load((copied / params).read_text())
    settings["data"]["path"] = "../rows.parquet"
    settings["student"] |= {"seeds": 1, "labelled_fraction": 0.5}
    for trained in (settings["student"], *settings["teachers"].values()):
        trained["train"] |= {"epochs": 2, "batch_size": 32, "num_workers": 0, "threads": 1}
    write_params(copied, settings)
    return copied, settings


def test_vision(tmp_path, cifar10):
    rows, least = cifar10
    folder, settings = vision(tmp_path, rows)
    settings["data"]["source"]["num_rows"] = 300
    settings["teachers"]["resnet"]["model"] |= {"depth": 8, "width": 8}
    write_params(folder, settings)
    project = project_in(folder)
    metrics = run(project)
    data = project.prepared_data()
    assert len(data.rows_of(["train", "validation"])) == 300
    assert len(data.rows_of(["test"])) == np.sum(np.array(rows["split"]) == "test")
    assert metrics["teacher"]["accuracy"] > least
    history = json.loads((project.student_models / "student" / "seed-0" / "history.json").read_text())
    assert all(0 < entry["resnet.AttentionTransfer stages.4 to attention.2"] < 2**0.5 for entry in history)
    store, ids = TargetStore.open(project.store("resnet")), data.inputs.sample_ids[data.rows_of(["train"])].tolist()
    assert store.targets(ids, output="attention.2").values.shape == (len(ids), 1, 4, 4)


def test_attention_is_that_of_the_features():
    torch.manual_seed(0)
    settings = {"input_shape": (3, 32, 32), "num_classes": 10, "depth": 14, "width": 4}
    model = load_module("attention.py:AttentiveResNet", EXAMPLES / "vision", "test").AttentiveResNet(**settings).eval()
    plain = ResNet(**settings).eval()
    plain.load_state_dict(model.state_dict())
    inputs = torch.randn(5, 3, 32, 32)
    said, features = model(inputs), plain.stem(inputs)
    torch.testing.assert_close(said["logits"], plain(inputs))
    for stage, attention in enumerate(said["attention"]):
        features = plain.blocks[2 * stage : 2 * stage + 2](features)
        student = torch.randn(5, 7, *features.shape[2:])
        losses = [AttentionTransfer()(student, FeatureTargets(values=each)) for each in (attention, features)]
        torch.testing.assert_close(*losses)
        assert attention.shape == (5, 1, *features.shape[2:])


@pytest.mark.parametrize("path", sorted((EXAMPLES / "vision").glob("gpu_*.yaml")), ids=lambda path: path.stem)
def test_settings_for_a_gpu(tmp_path, path):
    if "torchvision" in path.read_text():
        pytest.importorskip("torchvision")
    folder, _ = vision(tmp_path, photos(), path.name)
    assert check.run(project_in(folder))[-1].startswith("features: AttentionTransfer of ")


RENAMED = {"split": "fold", "label": "y", "income": "y"}


def renamed(recipe, folder, rows, source):
    """The prepared rows of a copy whose table has `fold` and `y` for columns, with keywords of its source."""
    copied = shutil.copytree(EXAMPLES / recipe, folder / recipe, ignore=shutil.ignore_patterns("data", ".dvc*"))
    names = [RENAMED.get(name, name) for name in rows.column_names]
    pq.write_table(rows.rename_columns(names), folder / "rows.parquet")
    params = yaml.safe_load((copied / "params.yaml").read_text())
    params["data"] |= {"path": "../rows.parquet"}
    params["data"]["columns"] |= {"label": "y", "split": "fold"}
    params["data"]["source"] |= source
    write_params(copied, params)
    project = project_in(copied)
    prepare_data.run(project)
    return project.prepared_data()


@pytest.mark.parametrize(
    ("recipe", "rows", "source"),
    [
        ("vision", photos, {"num_rows": 20, "split_column": "fold"}),
        ("tabular", persons, {"split_column": "fold"}),
        ("unbalanced", clothes, {"ratio": 5, "largest": 20, "split_column": "fold", "label_column": "y"}),
    ],
)
def test_columns_of_other_names(tmp_path, recipe, rows, source):
    as_it_is = {key: value for key, value in source.items() if not key.endswith("_column")}
    for absent in source.keys() - as_it_is.keys():
        with pytest.raises(
            ConfigError, match=rf"data\.source\.{absent} is '\w+', but .* no column of that name; they have .*fold"
        ):
            renamed(recipe, tmp_path / absent, rows(), {key: source[key] for key in source if key != absent})
    data = renamed(recipe, tmp_path / "named", rows(), source)
    assert len(data.rows_of(["test"])) == rows()["split"].to_pylist().count("test")
    learnt = len(data.rows_of(["train", "validation"]))
    assert 0 < learnt < rows()["split"].to_pylist().count("train")


def test_a_long_tail_is_as_large_as_the_rows_allow(tmp_path):
    rows = clothes()
    few = np.array(rows["label"]) == 8
    keeps = ~few | (np.cumsum(few) <= 20)
    columns = {"ratio": 5, "split_column": "fold", "label_column": "y"}
    data = renamed("unbalanced", tmp_path, rows.filter(keeps), columns)
    in_train = np.array(rows["label"])[keeps & (np.array(rows["split"]) == "train")]
    there, counts = np.bincount(in_train), np.bincount(data.labels[data.rows_of(["train", "validation"])])
    largest = int(min(there * 5 ** (np.arange(10) / 9)))
    assert counts.tolist() == [round(largest * 5 ** (-c / 9)) for c in range(10)]
    assert largest < there[0]
    with pytest.raises(DataError, match=r"rows of 'train' are of class 8, and \d+ are to be kept. Give a smaller"):
        renamed("unbalanced", tmp_path / "more", rows.filter(keeps), columns | {"largest": largest + 5})
    with pytest.raises(ConfigError, match=r"ratio 0.0 of 10 classes; expected at least 1"):
        renamed("unbalanced", tmp_path / "none", rows, columns | {"ratio": 0})


@pytest.mark.parametrize(("recipe", "rows"), [("vision", photos), ("unbalanced", clothes)])
def test_a_split_that_no_row_is_of_is_refused(tmp_path, recipe, rows):
    columns = {"split_column": "fold"} | ({"label_column": "y"} if recipe == "unbalanced" else {})
    with pytest.raises(ConfigError, match=r"data\.source\.split: no row is of split 'trian' in 'fold'"):
        renamed(recipe, tmp_path, rows(), columns | {"split": "trian"})


@pytest.mark.parametrize("label", ["boot", 2.5, None, 10, -1])
def test_a_long_tail_is_of_classes_by_number(tmp_path, label):
    table = clothes()
    labels = pa.array([label] * len(table), pa.string() if label is None else None)
    table = table.set_column(table.schema.get_field_index("label"), "label", labels)
    columns = {"split_column": "fold", "label_column": "y"}
    with pytest.raises(DataError, match=rf"column 'y' has {label!r} in a row of 'train'; .* from 0 to 9"):
        renamed("unbalanced", tmp_path, table, columns)


@pytest.fixture(params=["ag_news", "made up"])
def ag_news(request):
    """Some rows of both splits, and the least accuracy that a teacher gets from them in no time."""
    if request.param == "made up":
        return news(), 0.95
    rows = pq.read_table(data_set("ag_news_small/ag_news_small.parquet"))
    some = [np.flatnonzero(np.array(rows["split"]) == split)[:200] for split in ("train", "test")]
    return rows.take(np.concatenate(some)), 0.3


def test_text_lstm(tmp_path, ag_news):
    rows, least = ag_news
    small, train = {"factory": "reader.py:Reader", "width": 32, "hidden": 24}, quick(6) | {"learning_rate": 0.01}
    folder = example(
        "text_lstm", tmp_path, rows, {"model": small, "train": train}, seeds=1, labelled_fraction=0.1, train=train
    )
    project = project_in(folder)
    metrics = run(project)
    assert metrics["teacher"]["accuracy"] > least
    assert metrics["student"]["kl_to_teacher"] < metrics["baseline"]["kl_to_teacher"]
    store, ids = TargetStore.open(project.store("lstm")), project.prepared_data().inputs.sample_ids[:5].tolist()
    hidden = store.targets(ids, output="1").values
    assert hidden.shape == (5, 2 * small["hidden"])
    weights = load_file(project.teacher_model("lstm") / WEIGHTS)
    logits = hidden.float() @ weights["head.weight"].T + weights["head.bias"]
    expected = store.targets(ids).log_probs(1.0)
    torch.testing.assert_close(logits.log_softmax(dim=-1), expected, rtol=0, atol=0.02)
