"""Every folder of examples/, found by listing: copied out of the repository, it works about its new owner's rows."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from benchmarks import recipes
from kdpipe_stages.cli import run
from projects import REPOSITORY, write_params
from real_dvc import commit, git_init, shell
from toy_datasets import write_dataset

EXAMPLES = REPOSITORY / "examples"
RECIPES = sorted(path.parent.name for path in EXAMPLES.glob("*/dvc.yaml"))
LEFT = ("data", "tmp", "cache", "dvc.lock", "metrics.json", "per_seed.json", "timings.json", "__pycache__")
SHARED = re.compile(r"(?:\.\./)+shared/datasets/([\w./]+)")


@pytest.fixture(params=RECIPES)
def recipe(request):
    return EXAMPLES / request.param


def copied(recipe, folder):
    """A recipe in a folder of its own, as its new owner edits it: other rows, one epoch, one seed."""
    copy = shutil.copytree(recipe, folder / recipe.name, ignore=shutil.ignore_patterns(*LEFT))
    for path in copy.glob("*.yaml"):
        path.write_text(SHARED.sub(lambda found: str(write_dataset(found[1], folder / "rows")), path.read_text()))
    params = yaml.safe_load((copy / "params.yaml").read_text())
    trained = [*params["teachers"].values(), params["student"]]
    for each in trained:
        if "train" in each:
            each["train"]["epochs"] = 1
    params["student"]["seeds"] = 1
    write_params(copy, params)
    return copy


def commands(folder):
    """What dvc.yaml runs, in the order in which it is written."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for stage in yaml.safe_load((folder / "dvc.yaml").read_text())["stages"].values():
        if "foreach" not in stage:
            yield stage["cmd"]
            continue
        section = stage["foreach"].strip("${}")
        yield from (stage["do"]["cmd"].replace("${key}", name) for name in params[section])


def section(params, key):
    """What stands at a dotted key; a number counts along a list."""
    for part in key.split("."):
        params = params[int(part)] if isinstance(params, list) else params[part]
    return params


def test_what_dvc_files_name_is_there(recipe):
    params = yaml.safe_load((recipe / "params.yaml").read_text())
    for stage in yaml.safe_load((recipe / "dvc.yaml").read_text())["stages"].values():
        each = stage.get("do", stage)
        for key in each.get("params", []):
            section(params, key.partition(".")[0] if "$" in key else key)
        for path in each["deps"]:
            assert path.startswith(("data/", "$")) or (recipe / path).is_file()


def test_a_recipe_is_listed_and_its_experiments_name_settings(recipe):
    assert f"({recipe.name}/README.md)" in (EXAMPLES / "README.md").read_text()
    params = yaml.safe_load((recipe / "params.yaml").read_text())
    for key in re.findall(r"-S \"?([\w.]+)=", (recipe / "README.md").read_text()):
        section(params, key)


def test_each_recipe_is_a_dvc_project_of_its_own(recipe):
    for name in (".gitignore", ".dvc/config", ".dvc/.gitignore"):
        assert (recipe / name).read_text() == (EXAMPLES / "rules" / name).read_text()
    assert not any("shared/datasets" in path.read_text() for path in recipe.glob("*.py"))


def exported_network(folder):
    """A linear network of images, channels last, in the place of one that Keras exports."""
    weights = np.random.default_rng(0).normal(size=(28 * 28, 10)).astype(np.float32)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["rows", 28, 28, 1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 10])
    nodes = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    graph = helper.make_graph(nodes, "network", [images], [logits], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "data").mkdir()
    onnx.save(model, folder / "data" / "teacher.onnx")


ELSEWHERE = {"make_teacher.py": exported_network}
"""Scripts that run in an environment of their own, and what stands in for their outcome here."""


def test_a_copied_recipe_is_a_project_of_its_own(recipe, tmp_path, monkeypatch, capsys):
    folder = copied(recipe, tmp_path)
    monkeypatch.chdir(folder)
    for command in commands(folder):
        program, *arguments = command.split()
        if program == "kdpipe":
            assert run(arguments) == 0, command
        elif arguments[-1] in ELSEWHERE:
            ELSEWHERE[arguments[-1]](folder)
        else:
            runpy.run_path(str(folder / arguments[0]), run_name="__main__")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["student"]["accuracy"] <= 1
    assert {path.name for path in folder.glob("*.json")} == {"metrics.json", "per_seed.json", "timings.json"}
    capsys.readouterr()
    recipes.show_results([recipes.row(folder)])
    names, _, values = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    cells = dict(zip(names, values, strict=True))
    assert f"{100 * metrics['student']['accuracy']:.2f}" in cells["student, %"]
    assert cells["of student"] == f"{metrics['student']['parameters']:,}"
    assert all(cells[name] for name in ("teacher, %", "bytes per row", "s per epoch of the student"))


def test_recipes_that_there_are_not_are_named_before_any_runs(monkeypatch, capsys):
    monkeypatch.setattr(recipes, "reproduce", lambda folder: pytest.fail(f"{folder} was run"))
    assert recipes.main(["rules", "nope"]) == 1
    assert f"there is no recipe nope; there are {', '.join(RECIPES)}" in capsys.readouterr().err


def test_a_recipe_that_fails_does_not_lose_what_others_came_to(monkeypatch, capsys):
    def reproduce(folder):
        if folder.name == "tabular":
            raise subprocess.CalledProcessError(255, ["dvc", "repro"])
        return {"evaluate": 1.5, "dvc repro": 2.5, "CPU": 2.0}

    def row(folder):
        if folder.name == "vision":
            raise FileNotFoundError("metrics.json")
        return [folder.name] * len(recipes.COLUMNS)

    monkeypatch.setattr(recipes, "reproduce", reproduce)
    monkeypatch.setattr(recipes, "row", row)
    assert recipes.main(["rules", "tabular", "vision", "ensemble"]) == 1
    said = capsys.readouterr()
    assert all(said.out.count(f"\n| {name} |") == 2 for name in ("rules", "ensemble"))
    assert "tabular failed: CalledProcessError" in said.err
    assert "vision failed: FileNotFoundError: metrics.json" in said.err
    assert recipes.main(["rules", "ensemble"]) == 0


def test_under_dvc(tmp_path, monkeypatch, capsys):
    folder = copied(EXAMPLES / "fashion_mnist", tmp_path)
    git_init(folder)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    seconds = recipes.reproduce(folder)
    assert tuple(seconds) == (*recipes.STAGES, "dvc repro", "CPU")
    assert sum(seconds[stage] for stage in recipes.STAGES) < seconds["dvc repro"]
    assert tuple(recipes.reproduce(folder)) == ("dvc repro", "CPU")
    capsys.readouterr()
    recipes.show_seconds({"fashion_mnist": seconds})
    assert f"| {seconds['cache_teacher']:.1f} | {seconds['train_student']:.1f} |" in capsys.readouterr().out
    commit(folder)
    kept = shell(folder, "git", "ls-files").split()
    assert {"dvc.lock", "metrics.json", "per_seed.json"} <= set(kept)
    assert not any(name.startswith("data/") or name == "timings.json" for name in kept)
