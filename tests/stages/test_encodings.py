"""Every encoding through the stages: cached, streamed to a student, evaluated; and what does not fit is refused."""

from __future__ import annotations

import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import ConfigError, StoreError
from kdpipe.store import open_store
from kdpipe_stages import cache_teacher, check, evaluate, prepare_data, stores, train_student, train_teacher
from kdpipe_stages.cache_teacher import build_teacher
from kdpipe_stages.params import PARAMETERS, TargetsSection
from projects import LOGGING_TEACHER, make_project, params, project_in, write_params

ENCODINGS = {
    "dense": {},
    "dense float32 compact": {"dtype": "float32", "profile": "compact"},
    "int8": {"encoding": "int8"},
    "topk": {"encoding": "topk", "k": 4, "temperatures": [1, 4]},
    "topk int8 compact": {
        "encoding": "topk",
        "k": 6,
        "values": "int8",
        "temperatures": [2, 4, 1],
        "profile": "compact",
    },
    "topk top_p": {"encoding": "topk", "k": 8, "top_p": 0.9, "min_k": 2, "temperatures": [4]},
    "sampled": {"encoding": "sampled", "draws": 20},
    "sampled with a head": {"encoding": "sampled", "draws": 8, "head": 3, "profile": "compact"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project whose teacher is trained."""
    folder = tmp_path_factory.mktemp("trained")
    make_project(folder)
    project = project_in(folder)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def settings(targets, temperature=1.0, loss="ForwardKL"):
    student = params()["student"]
    term = {"factory": f"kdpipe.losses:{loss}", "teacher": "big", "temperature": temperature, "weight": 0.9}
    train = {**student["train"], "epochs": 10}
    return params(
        targets={"big": {"batch_size": 64, **targets}},
        student={**student, "losses": [term], "train": train, "seeds": 1, "baselines": []},
    )


@pytest.mark.parametrize("name", ENCODINGS)
def test_each_encoding_teaches(folder, name):
    temperature = 1.0 if name.startswith("sampled") else 4.0
    write_params(folder, settings(ENCODINGS[name], temperature))
    project = project_in(folder)
    check.run(project)
    cache_teacher.run(project, "big")
    assert stores.verify(project.store("big"))
    assert stores.inspect(project.store("big"))["missing_shards"] == 0
    train_student.run(project)
    metrics = evaluate.run(project)
    assert metrics["student"]["kl_to_teacher"] < 2
    assert metrics["student"]["agreement"] > 0.6
    assert metrics["teacher"]["accuracy"] > 0.6


def test_ram_and_read_ahead_train_the_same_student(folder):
    write_params(folder, settings({"encoding": "topk", "k": 4, "temperatures": [4]}, 4.0))
    cache_teacher.run(project_in(folder), "big")
    weights = []
    for budget in (512, 0):
        value = settings({"encoding": "topk", "k": 4, "temperatures": [4]}, 4.0)
        value["student"]["train"]["ram_budget_mb"] = budget
        write_params(folder, value)
        project = project_in(folder)
        shutil.rmtree(project.student_models, ignore_errors=True)
        for path in (folder / "data" / ".work").iterdir():
            if (path / "student").is_dir():
                shutil.rmtree(path)
        train_student.run(project)
        weights.append((project.student_models / "student" / "seed-0" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("targets", "temperature", "loss", "message"),
    [
        ({"encoding": "topk", "k": 4, "temperatures": [1, 2]}, 4.0, "ForwardKL", "temperature 4 is not stored"),
        ({"encoding": "sampled", "draws": 20}, 4.0, "ForwardKL", "temperature 1"),
        ({"encoding": "sampled", "draws": 20}, 1.0, "ReverseKL", "not linear in the teacher's probabilities"),
        ({"encoding": "topk", "k": 11}, 1.0, "ForwardKL", "k is 11"),
    ],
)
def test_a_loss_that_the_targets_cannot_serve_is_refused_before_any_work(folder, targets, temperature, loss, message):
    write_params(folder, settings(targets, temperature, loss))
    project = project_in(folder)
    with pytest.raises(ConfigError, match=message):
        check.run(project)
    if targets.get("k") != 11:
        cache_teacher.run(project, "big")
        with pytest.raises(ConfigError, match=rf"student\.losses\.0: on logits of big: .*{message}"):
            train_student.run(project)


def test_interpolation_only_where_asked_for(folder):
    value = settings({"encoding": "topk", "k": 4, "temperatures": [1, 2, 8]}, 4.0)
    write_params(folder, value)
    with pytest.raises(ConfigError, match="allow_interpolation"):
        check.run(project_in(folder))
    value["student"]["losses"][0]["allow_interpolation"] = True
    write_params(folder, value)
    check.run(project_in(folder))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"k": 3}, r"targets\.big\.k: encoding 'dense' has no such parameter; it has dtype"),
        ({"encoding": "topk"}, r"targets\.big\.k: absent; encoding 'topk' needs it"),
        ({"encoding": "topp", "k": 3}, r"targets\.big\.encoding"),
        ({"outputs": ["pooled"]}, "has no 'logits'"),
        ({"temperatures": [0]}, "expected numbers above 0"),
        ({"temperatures": [1, float("inf")]}, "expected numbers above 0"),
        ({"temperatures": [1, "4"]}, r'targets\.big\.temperatures\.1: expected a number \(found "4"\)'),
        ({"encoding": "topk", "k": True}, r"targets\.big\.k: expected a whole number \(found true\)"),
        ({"encoding": "topk", "k": "3"}, r'targets\.big\.k: expected a whole number \(found "3"\)'),
        ({"encoding": "topk", "k": 3.0}, r"targets\.big\.k: expected a whole number \(found 3\.0\)"),
        ({"encoding": "topk", "k": 70_000}, r"targets\.big: k is 70000 .* k <= 65535"),
        ({"encoding": "topk", "k": 3, "min_k": 2}, r"targets\.big\.min_k: it means nothing without top_p"),
        ({"encoding": "topk", "k": 3, "top_p": 0.9, "min_k": 4}, r"targets\.big: k is 3 and min_k 4"),
        ({"encoding": "sampled", "draws": 3, "stratified": "yes"}, r"targets\.big\.stratified: expected true or false"),
        ({"encodng": "topk"}, r"targets\.big\.encodng: unknown key .* did you mean 'encoding'\?"),
    ],
)
def test_parameters_of_other_encodings_are_refused(folder, targets, message):
    write_params(folder, settings(targets))
    with pytest.raises(ConfigError, match=message):
        project_in(folder)


def test_a_section_has_a_key_for_every_parameter_of_an_encoding():
    keys = {each.name for each in fields(TargetsSection)}
    for encoding, parameters in PARAMETERS.items():
        assert set(parameters) <= keys, encoding
    assert "stratified" in PARAMETERS["sampled"]


def test_a_default_spelled_out_changes_nothing(folder):
    write_params(folder, settings({}))
    cache_teacher.run(project_in(folder), "big")
    write_params(folder, settings({"encoding": "dense", "dtype": "float16", "profile": "fast", "temperatures": [2]}))
    assert cache_teacher.run(project_in(folder), "big").rows_computed == 0
    train_student.run(project_in(folder))


ABSTAINING = LOGGING_TEACHER.replace(
    "        return self.head(inputs.flatten(1))",
    """        logits = self.head(inputs.flatten(1))
        if self.training:
            return logits
        return {"logits": logits, "covered": logits.argmax(-1) != 3, "halves": inputs.flatten(1)[:, :32] / 2}""",
)


@pytest.mark.parametrize("features", ["float16", "float32", "int8"])
def test_features_and_abstention(folder, features):
    (folder / "teacher.py").write_text(ABSTAINING)
    write_params(folder, settings({"outputs": ["logits", "head", "halves"], "features": features}, 4.0))
    project = project_in(folder)
    train_teacher.run(project, "big")
    check.run(project)
    cache_teacher.run(project, "big")
    assert 0 < stores.inspect(project.store("big"))["covered"] < 1
    store = open_store(project.store("big"))
    inputs = PreparedInputs(project.prepared / "inputs")
    teacher, _ = build_teacher(project, "big", inputs)
    rows = np.arange(0, len(inputs), 3)
    live, ids = teacher.predict(inputs.read(rows)), inputs.sample_ids[rows].tolist()
    covered = live["logits"].argmax(-1) != 3
    assert 0 < covered.sum() < len(rows)
    for output in ("head", "halves"):
        stored = store.targets(ids, output=output)
        assert torch.equal(stored.covered, covered)
        scale = live[output].abs().amax(dim=-1, keepdim=True)
        assert torch.allclose(
            stored.values[covered] / scale[covered], live[output][covered] / scale[covered], atol=5e-3
        )
    assert torch.equal(store.targets(ids).covered, covered)
    train_student.run(project)
    metrics = evaluate.run(project)
    assert metrics["student"]["agreement"] > 0.6
    with pytest.raises(StoreError, match="holds no output 'pooled'; it holds logits, head, halves"):
        store.targets(ids, output="pooled")
