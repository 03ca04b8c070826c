"""`kdpipe estimate` on a real project: the numbers against the store that caching then makes, and what it leaves."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest

from kdpipe.config import parse
from kdpipe.encodings import Dense, Int8, Sampled, TopK
from kdpipe.errors import ConfigError, TeacherError
from kdpipe.store import open_store
from kdpipe_stages import cache_teacher, deep_verify, estimate, prepare_data, train_teacher
from kdpipe_stages.cli import run
from kdpipe_stages.params import TargetsSection, logits_encoding
from projects import LOGGING_TEACHER, make_project, params, project_in, tree, write_params

NUM_ROWS = 1797


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    """The disk is measured with small files."""
    monkeypatch.setattr(estimate, "PROBE_BYTES", 2**17)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project whose teacher is trained, and whose targets are not cached."""
    return ready(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def ready(folder, teacher=LOGGING_TEACHER, **sections):
    make_project(folder, **sections)
    (folder / "teacher.py").write_text(teacher)
    project = project_in(folder)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    return folder


def settings(folder, loss=None, **targets):
    """Other targets, and other arguments of the student's loss."""
    changed = params(targets={"big": {"batch_size": 64, **targets}})
    changed["student"]["losses"][0].update(loss or {})
    write_params(folder, changed)
    return project_in(folder)


def by_name(found):
    return {each["name"]: each for each in found["encodings"]}


def test_nothing_is_left_behind_and_the_teacher_sees_the_sample_only(folder):
    before, folders = tree(folder / "data"), set(folder.rglob("*"))
    found = estimate.run(project_in(folder), "big", 200)
    assert tree(folder / "data") == before
    assert {each.name for each in set(folder.rglob("*")) - folders} <= {"calls.log", "__pycache__"}
    shown = [int(each) for each in (folder / "calls.log").read_text().split()]
    assert shown == [64, 64, 64, 8]
    assert found["sample"] == {"rows": 200, "positions": 200, "batch_size": 64}


def test_a_work_area_made_for_the_probe_is_removed(folder):
    (folder / "data" / ".work").rename(folder / "elsewhere")
    estimate.run(project_in(folder), "big", 100)
    assert not (folder / "data" / ".work").exists()


def test_fidelity_is_the_same_in_every_run_and_on_the_same_rows_after_growth(folder):
    first, second = (estimate.run(project_in(folder), "big", 100) for _ in range(2))
    for each, other in zip(first["encodings"], second["encodings"], strict=True):
        moving = ("needed_mb_per_s",)
        assert {key: value for key, value in each.items() if key not in moving} == {
            key: value for key, value in other.items() if key not in moving
        }
    data = project_in(folder).prepared_data()
    small, large = estimate.sampled_rows(data, 50), estimate.sampled_rows(data, 500)
    assert set(small) < set(large)
    assert list(large) == sorted(large)


@pytest.mark.parametrize(
    "targets",
    [
        {"encoding": "dense", "dtype": "float16"},
        {"encoding": "int8", "profile": "compact"},
        {"encoding": "topk", "k": 3, "values": "int8", "temperatures": [1, 4], "outputs": ["logits", "head"]},
    ],
)
def test_bytes_are_those_of_the_store_that_caching_makes(folder, targets):
    """All but what the last partial shard adds; compressed ones depend on the rows of a shard."""
    project = settings(folder, shard_rows=64, **targets)
    found = estimate.run(project, "big", 1024)
    (own,) = [each for each in found["encodings"] if each["in_params"]]
    cache_teacher.run(project, "big")
    store = open_store(project.store("big"))
    files = [record.files for record in store.records.values() if record.stop - record.start == 64]
    logits = [sum(file.num_bytes for name, file in each.items() if name.split(".")[0] == "logits") for each in files]
    compact = targets.get("profile") == "compact"
    estimated = own["bytes_per_row_compact" if compact else "bytes_per_row"]
    assert estimated == pytest.approx(sum(logits) / len(logits) / 64, rel=0.1 if compact else 1e-9)
    beside = store.layouts.keys() - {each for each in store.layouts if each.split(".")[0] == "logits"}
    assert found["other_bytes_per_row"] == sum(store.layouts[each].row_bytes for each in beside)
    assert found["rows_to_show"] == store.num_rows == NUM_ROWS


def test_seconds_and_break_even_are_those_of_the_rows(folder):
    found = estimate.run(project_in(folder), "big", 128)
    seconds = 1 / found["teacher_rows_per_s"]
    pays = found["break_even"]
    assert found["teacher_hours"] == pytest.approx(NUM_ROWS * seconds / 3600)
    assert pays["teacher_hours_per_student"] == pytest.approx(2 * pays["rows"] * seconds / 3600)
    assert pays["students"] == math.ceil(NUM_ROWS / (2 * pays["rows"]))
    assert pays["students_per_run"] == 2
    for each in found["encodings"]:
        assert each["needed_mb_per_s"] == pytest.approx(each["bytes_per_row"] * found["teacher_rows_per_s"] / 1e6)
        assert each["bytes"] == pytest.approx(each["bytes_per_row"] * NUM_ROWS)
    speed = found["disk"]["write_mb_per_s"]
    assert 0 < speed["lowest"] <= speed["median"] <= speed["highest"]
    assert found["disk"]["writes"] >= 3


def test_a_student_of_one_epoch_needs_several_to_pay(folder):
    changed = params()
    changed["student"]["train"]["epochs"] = 1
    changed["student"]["distil_on"] = ["validation"]
    transform = {"factory": "views.py:Same"}
    changed["views"] = {"count": 3, "seed": 1, "transform": transform, "splits": ["validation"]}
    source = "class Same:\n    def __call__(self, columns, keys, seed):\n        return dict(columns)\n"
    (folder / "views.py").write_text(source)
    write_params(folder, changed)
    found = estimate.run(project_in(folder), "big", 64)
    rows = found["break_even"]["rows"]
    assert found["rows_to_show"] == NUM_ROWS + 3 * rows
    dense = by_name(found)["dense float16"]
    assert dense["bytes"] == pytest.approx(dense["bytes_per_row"] * 4 * NUM_ROWS)
    assert dense["bytes_compact"] == pytest.approx(dense["bytes_per_row_compact"] * (NUM_ROWS + 3 * rows))
    assert found["break_even"]["students"] == math.ceil((NUM_ROWS + 3 * rows) / rows)


def test_the_temperatures_are_those_of_targets_and_losses_and_one_and_four(folder):
    found = estimate.run(settings(folder, {"temperature": 3}, temperatures=[1, 2]), "big", 64)
    assert found["temperatures"] == [1, 2, 3, 4]
    assert found["loss_temperatures"] == [3]
    topk = by_name(found)["topk 5 float16"]
    served = {each["temperature"]: each["gradient_error"] is not None for each in topk["at"]}
    assert served == {1: True, 2: True, 3: True, 4: False}
    assert not topk["refused"]
    assert "sampled" in by_name(found)["sampled 10"]["refused"]
    assert not by_name(found)["int8"]["refused"]


@pytest.mark.parametrize("k", [4, 10])
def test_what_cannot_serve_the_loss_is_never_recommended(folder, monkeypatch, k):
    """Though no disk is slow enough for it and dense is out. The encoding of params.yaml has one line of the table."""
    monkeypatch.setattr("kdpipe.estimating.DENSE_CLASSES", 1)
    found = estimate.run(settings(folder, {"temperature": 2.5}, encoding="topk", k=k), "big", 64)
    assert len(by_name(found)) == len(found["encodings"])
    own = by_name(found)[f"topk {k} float16"]
    assert own["in_params"]
    assert "temperature 2.5 is not stored" in own["refused"]
    assert found["recommended"]["name"] != own["name"]
    assert not by_name(found)[found["recommended"]["name"]]["refused"]


def test_what_may_be_recommended_stores_the_temperatures_of_the_losses(folder):
    found = estimate.run(settings(folder, {"temperature": 2.5}, temperatures=[1, 4]), "big", 64)
    topk = [each for each in found["encodings"] if each["settings"]["encoding"] == "topk"]
    assert [each["settings"]["temperatures"] for each in topk] == [[1, 2.5, 4]] * len(topk)
    assert topk
    assert not any(each["refused"] for each in topk)


def test_the_recommendation_can_be_pasted(folder, monkeypatch):
    monkeypatch.setattr("kdpipe.estimating.DENSE_CLASSES", 1)
    found = estimate.run(settings(folder, {"temperature": 1}, temperatures=[1]), "big", 64)
    recommended = found["recommended"]
    assert recommended["settings"]["batch_size"] == 64
    assert "the smallest with a gradient error within 5%" in recommended["reason"]
    again = estimate.run(settings(folder, {"temperature": 1}, **recommended["settings"]), "big", 64)
    assert again["recommended"]["settings"] == recommended["settings"]
    (own,) = [each for each in again["encodings"] if each["in_params"]]
    assert own["name"] == recommended["name"]


def test_an_encoding_of_params_that_is_no_candidate_is_measured_too(folder):
    found = estimate.run(settings(folder, encoding="topk", k=7, top_p=0.9, temperatures=[1, 4]), "big", 64)
    (own,) = [each for each in found["encodings"] if each["in_params"]]
    assert own["name"] == "topk 7 float16 p 0.9"
    assert own["settings"] == {"encoding": "topk", "k": 7, "top_p": 0.9, "temperatures": [1.0, 4.0]}


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        (Dense(), {"encoding": "dense"}),
        (Dense(dtype="float32", compact=True), {"encoding": "dense", "dtype": "float32", "profile": "compact"}),
        (Int8(), {"encoding": "int8"}),
        (Int8(masked_classes=True), {"encoding": "int8", "masked_classes": True}),
        (TopK(k=3), {"encoding": "topk", "k": 3, "temperatures": [1.0]}),
        (
            TopK(k=3, values="int8", top_p=0.5, min_k=2, temperatures=[4]),
            {"encoding": "topk", "k": 3, "values": "int8", "top_p": 0.5, "min_k": 2, "temperatures": [1.0, 4.0]},
        ),
        (Sampled(draws=8), {"encoding": "sampled", "draws": 8}),
        (
            Sampled(draws=8, head=2, seed=1, stratified=True),
            {"encoding": "sampled", "draws": 8, "head": 2, "seed": 1, "stratified": True},
        ),
    ],
)
def test_settings_are_what_differs_from_the_defaults_and_say_the_same_encoding(encoding, expected):
    assert estimate.settings_of(encoding) == expected
    assert logits_encoding(parse(TargetsSection, expected, "params.yaml")) == encoding


def test_the_table_holds_every_number_and_json_is_the_same(folder, capsys):
    arguments = ["--params", str(folder / "params.yaml"), "--rows", "100"]
    assert run(["estimate", "big", *arguments]) == 0
    shown = capsys.readouterr()
    assert run(["estimate", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["big"]
    lines = shown.out.splitlines()
    assert max(len(line.rstrip()) for line in lines[:5]) <= 100
    assert "…" not in shown.out
    for each in found["encodings"]:
        (line,) = [line for line in lines if re.match(rf"[> ][* ] {re.escape(each['name'])} ", line)]
        cells = line[len(each["name"]) + 3 :].split()
        assert cells[0] == f"{each['bytes_per_row']:,.0f}"
        assert len(cells) == 7 + 3 * len(found["temperatures"]) - 1
        assert cells[-1] == ("-" if each["at"][-1]["kl"] is None else f"{100 * each['at'][-1]['gradient_error']:.2f}")
    assert ">* dense float16" in shown.out
    assert "targets: {big: {encoding: dense, batch_size: 64}}" in shown.out
    assert "caching has paid after 1 student;" in shown.out
    assert "cannot serve the student: sampled 10, sampled 2 head 2: student.losses.0" in shown.out


def test_a_table_has_nothing_to_estimate_and_the_other_teachers_are_estimated(folder, capsys):
    changed = params()
    changed["teachers"] = {"said": {"table": "data/raw/said.parquet"}, **changed["teachers"]}
    arguments = ["--params", str(write_params(folder, changed)), "--rows", "64"]
    assert run(["estimate", *arguments]) == 0
    shown = capsys.readouterr()
    assert "said: what it said is in data/raw/said.parquet; there is nothing to estimate" in shown.err
    assert "recommended: dense float16" in shown.out
    assert run(["estimate", *arguments, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["big"]
    assert run(["estimate", "said", *arguments]) == 1
    assert "what it said is in data/raw/said.parquet; there is no model" in capsys.readouterr().err


def test_a_full_disk_is_a_clear_error(folder, small_disk, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "PROBE_BYTES", 2**20)
    (folder / "data" / ".work").rename(folder / "elsewhere")
    (folder / "data" / ".work").symlink_to(small_disk)
    assert run(["estimate", "--params", str(folder / "params.yaml"), "--rows", "64"]) == 1
    message = capsys.readouterr().err
    assert "the disk is full" in message
    assert str(folder / "data" / ".work") in message
    assert not list(small_disk.rglob("*"))


def test_wrong_uses_are_one_message(folder):
    with pytest.raises(ConfigError, match="--rows is 0; expected 1 or more"):
        estimate.run(project_in(folder), "big", 0)
    with pytest.raises(ConfigError, match="no teacher 'small'"):
        estimate.run(project_in(folder), "small")
    (folder / "data" / "models" / "teachers" / "big" / "model.json").unlink()
    with pytest.raises(ConfigError, match="train-teacher big"):
        estimate.run(project_in(folder), "big")


RETURNS = "        return self.head(inputs.flatten(1))"


def test_nan_names_a_sample(tmp_path):
    says = RETURNS.replace("return ", "logits = ") + "\n        return logits if self.training else logits / 0 * 0"
    ready(tmp_path, LOGGING_TEACHER.replace(RETURNS, says))
    with pytest.raises(TeacherError, match=r"NaN or infinite for 64 positions, such as of \d+-"):
        estimate.run(project_in(tmp_path), "big", 64)


WITH_GRADIENTS = """
import torch

from kdpipe.targets import OutputSpec


class Own:
    outputs = (OutputSpec(name="logits", shape=(10,)),)
    fingerprint = {"own": 1}

    def __init__(self):
        self.weights = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).div_(16).requires_grad_()

    def predict(self, columns):
        return {"logits": torch.from_numpy(columns["image"]).flatten(1).float() @ self.weights}
"""


def test_answers_that_require_gradients_are_asked_for_without_them(tmp_path):
    """By every command that asks a teacher by factory."""
    (tmp_path / "own.py").write_text(WITH_GRADIENTS)
    make_project(tmp_path, teachers={"big": {"teacher": {"factory": "own.py:Own"}}})
    project = project_in(tmp_path)
    prepare_data.run(project)
    assert estimate.run(project, "big", 64)["encodings"]
    cache_teacher.run(project, "big")
    assert deep_verify.run(project, project.store("big"), 64)[-1].endswith("is what big says")


TOKENS = LOGGING_TEACHER.replace(
    RETURNS,
    """        logits = self.head(inputs.flatten(1))
        if self.training:
            return logits
        tokens = torch.stack([logits, logits / 2, -logits], dim=1)
        masked = tokens.masked_fill(torch.arange(10) == 9, -torch.inf)
        return {"logits": masked, "covered": tokens[..., 0] > 0}""",
)


def test_tokens_masked_classes_and_abstention(tmp_path):
    """Positions are what the teacher speaks about; bytes are of all of them."""
    ready(tmp_path, TOKENS, targets={"big": {"batch_size": 64, "shard_rows": 64, "encoding": "dense"}})
    changed = params()
    changed["student"]["losses"] = [{"factory": "kdpipe.losses:ReverseKL", "teacher": "big", "temperature": 2}]
    changed["targets"]["big"]["shard_rows"] = 64
    write_params(tmp_path, changed)
    project = project_in(tmp_path)
    found = estimate.run(project, "big", 256)
    assert 0.2 * 3 * 256 < found["sample"]["positions"] < 0.8 * 3 * 256
    assert found["other_bytes_per_row"] == 3 * 13
    assert by_name(found)["int8"]["settings"] == {"encoding": "int8", "masked_classes": True}
    assert all(each["kl"] < 1e-4 for each in by_name(found)["int8"]["at"])
    cache_teacher.run(project, "big")
    store = open_store(project.store("big"))
    files = [record.files for record in store.records.values() if record.stop - record.start == 64]
    written = sum(files[0][each].num_bytes for each in ("logits", "logits.row_max"))
    assert by_name(found)["dense float16"]["bytes_per_row"] == written / 64


def test_a_teacher_of_many_classes_is_measured_on_few_positions(folder, monkeypatch):
    monkeypatch.setattr(estimate, "MAX_LOGITS", 400)
    found = estimate.run(project_in(folder), "big", 128)
    assert found["sample"]["positions"] == 40
    assert len(found["encodings"]) >= 10
