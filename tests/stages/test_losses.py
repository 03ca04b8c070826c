"""Losses in the stages: what they need is checked before any work, and what the guide says is so."""

from __future__ import annotations

import re
import shutil
from dataclasses import MISSING, fields

import numpy as np
import pytest
import torch
import yaml

from kdpipe.errors import ConfigError
from kdpipe.losses import LOSSES, kd_loss, needs_labels, needs_whole_batch
from kdpipe.store import open_store
from kdpipe_stages import cache_teacher, check, train_student, train_teacher
from kdpipe_stages.building import label_loss, plan_json
from kdpipe_stages.lesson import Lesson
from kdpipe_stages.params import TrainSection
from projects import REPOSITORY, cache, make_project, params, project_in, write_params

GUIDE = (REPOSITORY / "docs" / "guides" / "losses.md").read_text()


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A project with a complete store."""
    folder = tmp_path_factory.mktemp("losses")
    make_project(folder)
    cache(folder)
    return folder


@pytest.fixture
def folder(cached, tmp_path):
    shutil.copytree(cached, tmp_path, dirs_exist_ok=True)
    return tmp_path


def settings(loss, train=None, **student):
    value = params()
    value["student"] |= {"losses": [{"teacher": "big", "weight": 0.9, **loss}], "seeds": 1, "baselines": []} | student
    value["student"]["train"] |= {"epochs": 1} | (train or {})
    return value


def named(name, **options):
    return {"factory": f"kdpipe.losses:{LOSSES[name].__name__}", **options}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "topk_renorm_kl"])
def test_every_loss_trains_a_student(folder, name):
    write_params(folder, settings(named(name)))
    project = project_in(folder)
    check.run(project)
    assert [each.arm for each in train_student.run(project).trained] == ["student"]


def test_the_kept_head_alone_trains_a_student_of_sparse_targets(folder):
    write_params(
        folder, settings(named("topk_renorm_kl", temperature=3)) | {"targets": {"big": {"encoding": "topk", "k": 4}}}
    )
    project = project_in(folder)
    check.run(project)
    cache_teacher.run(project, "big")
    assert train_student.run(project).trained


@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if needs_labels(kind())])
def test_a_loss_that_needs_labels_needs_one_at_least(folder, name):
    write_params(folder, settings(named(name), labelled_rows=0, label_weight=0))
    with pytest.raises(
        ConfigError, match=rf"student\.losses\.0: {LOSSES[name].__name__} learns from labelled rows only"
    ):
        train_student.run(project_in(folder))


@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if needs_whole_batch(kind())])
def test_a_loss_on_whole_batches_refuses_parts_of_them(folder, name, monkeypatch):
    write_params(folder, settings(named(name), {"batch_size": 64, "micro_batch_size": 32}))
    message = rf"student\.losses\.0: {LOSSES[name].__name__} relates .*micro_batch_size: 32 cuts batches of 64 up"
    with pytest.raises(ConfigError, match=message):
        check.run(project_in(folder))
    with pytest.raises(ConfigError, match=message):
        train_student.run(project_in(folder))
    write_params(folder, settings(named(name), {"batch_size": 64, "micro_batch_size": 64}))
    check.run(project_in(folder))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="each of 2 ranks has a share of it"):
        Lesson(project_in(folder))


@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        (named("dkd"), {"encoding": "topk", "k": 4}, "DKD: these targets hold the top k classes and their tail"),
        (named("dist"), {"encoding": "sampled", "draws": 5}, "DIST is not linear in the teacher's probabilities"),
        (named("topk_renorm_kl"), {}, "TopKRenormKL is about the kept classes"),
        (named("gjsd", beta=0), {}, r"student\.losses\.0: beta is 0"),
        (named("logit_mse", of="probs"), {}, r"student\.losses\.0\.of: .*'logits' or 'probabilities'"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_by_check(folder, loss, targets, message):
    write_params(folder, settings(loss) | {"targets": {"big": targets}})
    with pytest.raises(ConfigError, match=message):
        check.run(project_in(folder))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            named("forward_kl", projector="linear"),
            r"student\.losses\.0\.projector: .* name the output .* student_output",
        ),
        (named("dkd", beta=float("nan")), r"student\.losses\.0\.beta: nan; expected a finite number"),
        (named("nkd", gamma=float("inf")), r"student\.losses\.0\.gamma: inf; expected a finite number"),
        (named("dkd", beta=-3), r"student\.losses\.0: beta is -3\.0; expected a number from 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_check(folder, loss, message):
    write_params(folder, settings(loss))
    with pytest.raises(ConfigError, match=message):
        check.run(project_in(folder))


@pytest.mark.parametrize(
    ("loss", "student", "train", "message"),
    [
        (named("forward_kl"), {"labelled_rows": 0}, {}, "label_weight is above 0 but no row has a label"),
        (named("dkd"), {"labelled_rows": 0, "label_weight": 0}, {}, "DKD learns from labelled rows only"),
        (
            named("forward_kl"),
            {"labelled_rows": 0, "label_weight": 0, "baselines": ["labels_only"]},
            {},
            "set baselines",
        ),
        (named("forward_kl"), {"labelled_rows": 3}, {"class_weights": "balanced"}, r"student\.train\.class_weights"),
        (
            {**named("forward_kl"), "factory": "kdpipe.losses:BalancedKL"},
            {"labelled_rows": 3},
            {},
            "no labelled row of class",
        ),
    ],
)
def test_check_knows_what_labels_the_student_may_know(folder, loss, student, train, message):
    changed = settings(loss, train)
    changed["student"] |= student
    write_params(folder, changed)
    with pytest.raises(ConfigError, match=message):
        check.run(project_in(folder))


# Labels of rare classes


def losses_of(folder, **train):
    """The loss on labels of each of 4 rows, and the labels that the student knows."""
    write_params(folder, settings(named("forward_kl"), train))
    lesson = Lesson(project_in(folder))
    known = lesson.labels[lesson.rows]
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, -1, 0, 9])
    return lesson.label_loss(logits, labels, 0.0), logits, labels, np.bincount(known[known >= 0])


def test_class_weights_and_logit_adjustment_are_of_the_labels_that_the_student_knows(folder):
    plain, logits, labels, counts = losses_of(folder)
    assert counts.sum() == 150
    weights = 150 / (10 * counts)
    balanced, *_ = losses_of(folder, class_weights="balanced")
    torch.testing.assert_close(balanced, plain * torch.from_numpy(weights)[labels].float())
    assert np.average(weights, weights=counts) == pytest.approx(1)
    listed, *_ = losses_of(folder, class_weights=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    torch.testing.assert_close(listed, plain * (labels + 1))
    adjusted, *_ = losses_of(folder, logit_adjustment=0.5)
    shifted = logits + 0.5 * torch.from_numpy(counts / 150).log().float()
    expected = torch.nn.functional.cross_entropy(shifted, labels, ignore_index=-1, reduction="none")
    torch.testing.assert_close(adjusted, expected)


def test_every_arm_and_a_teacher_learn_from_balanced_labels(folder):
    def weights():
        project = project_in(folder)
        train_student.run(project)
        train_teacher.run(project, "big")
        paths = [*project.student_models.rglob("*.safetensors"), *project.teacher_model("big").rglob("*.safetensors")]
        return {path.parent.parent.name: path.read_bytes() for path in paths}

    value = settings(named("forward_kl"), baselines=["labels_only", "label_smoothing"])
    write_params(folder, value)
    before = weights()
    value["student"]["train"]["class_weights"] = "balanced"
    write_params(folder, value)
    students = weights()
    assert len(before) == 4
    assert all((students[name] != before[name]) == (name != "teachers") for name in before)
    value["teachers"]["big"]["train"]["logit_adjustment"] = 1.0
    write_params(folder, value)
    project = project_in(folder)
    train_teacher.run(project, "big")
    assert next(project.teacher_model("big").rglob("*.safetensors")).read_bytes() != before["teachers"]


def test_what_is_not_asked_of_labels_is_in_no_fingerprint():
    """So that a training of an earlier kdpipe is found again."""
    plain = TrainSection(epochs=1)
    assert not {"class_weights", "logit_adjustment"} & set(plan_json(plain))
    asked = plan_json(TrainSection(epochs=1, class_weights="balanced", logit_adjustment=1.0))
    assert (asked["class_weights"], asked["logit_adjustment"]) == ("balanced", 1.0)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"class_weights": [1, 2]}, r"student\.train\.class_weights has 2 numbers, and the task 10 classes"),
        ({"class_weights": "balance"}, r"""class_weights: Input should be 'balanced' \(found "balance"\)"""),
        ({"class_weights": [*[1] * 9, -1]}, r"class_weights\.9: .*greater than or equal to 0"),
        ({"logit_adjustment": 0}, r"logit_adjustment: .*greater than 0"),
    ],
)
def test_wrong_balances_are_refused_by_check(folder, train, message):
    write_params(folder, settings(named("forward_kl"), train))
    with pytest.raises(ConfigError, match=message):
        check.run(project_in(folder))


def test_a_class_of_which_no_label_is_known_has_no_share(folder):
    task = project_in(folder).task()
    labels = np.array([0, 1, 2, 3, 4, 5, 7, 8, -1])
    for train in ({"class_weights": "balanced"}, {"logit_adjustment": 1.0}):
        with pytest.raises(ConfigError, match=rf"here\.{next(iter(train))}: class 6, 9 has no labelled row"):
            label_loss(task, TrainSection(epochs=1, **train), labels, "here")


# The guide


def table_of_losses():
    """Name for `kd_loss` -> cells of its line."""
    lines = re.findall(r"^\| `(\w+)` \| `(\w+)` \|(.*)\|$", GUIDE, re.MULTILINE)
    return {name: (factory, re.split(r"(?<!\\)\|", rest)) for factory, name, rest in lines}


def test_the_guides_table_is_of_all_losses_their_defaults_and_needs(folder):
    table = table_of_losses()
    assert list(table) == list(LOSSES)
    for name, (factory, (_, defaults, targets, _)) in table.items():
        kind = LOSSES[name]
        assert factory == kind.__name__
        said = {key: yaml.safe_load(value) for key, value in re.findall(r"`(\w+): ([^`]+)`", defaults)}
        assert said == {each.name: each.default for each in fields(kind) if each.default is not MISSING}
        assert ("labels" in targets) == needs_labels(kind())
        assert ("whole batches" in targets) == needs_whole_batch(kind())
        assert ("sampled" in targets) == getattr(kind, "linear_in_targets", False)


def blocks(language):
    return re.findall(f"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_the_guides_own_loop_runs(folder):
    store = open_store(folder / "data" / "targets" / "big")
    targets = store.targets(store.sample_ids[:8].tolist())
    student_logits, labels = torch.randn(8, 10), torch.arange(8)
    (loop,) = [each for each in blocks("python") if "kd_loss(student_logits" in each]
    names = {"student_logits": student_logits, "targets": targets, "others_targets": targets, "labels": labels}
    names["teacher_logits"] = targets.logits()
    exec(loop, names)
    assert names["loss"] == kd_loss(student_logits, targets, loss=names["DKD"](beta=2.0), labels=labels)


def test_the_guides_settings_are_valid(folder):
    whole = yaml.safe_load(blocks("yaml")[0])
    (train,) = [yaml.safe_load(each) for each in blocks("yaml") if each.startswith("train:")]
    value = settings(named("forward_kl"), train["train"] | {"epochs": 1})
    value["student"] |= whole["student"]
    value["teachers"]["small"] = value["teachers"]["big"]
    value["targets"]["small"] = value["targets"]["big"]
    write_params(folder, value)
    assert "losses: ForwardKL of big, DKD of small" in check.run(project_in(folder))


def test_the_guides_several_teachers_are_valid(folder):
    (several,) = [yaml.safe_load(each) for each in blocks("yaml") if "mix:" in each]
    value = settings(named("forward_kl"))
    value["student"] |= several["student"]
    for name in ("small", "rules"):
        value["teachers"][name], value["targets"][name] = value["teachers"]["big"], value["targets"]["big"]
    write_params(folder, value)
    assert "losses: ForwardKL of big and small and rules, ReverseKL of big" in check.run(project_in(folder))
    schedules = re.findall(r"^\| `({kind: .*?})` \|", GUIDE, re.MULTILINE)
    assert len(schedules) == 3
    for written in schedules:
        value["student"]["losses"][0]["schedule"] = value["student"]["label_schedule"] = yaml.safe_load(written)
        write_params(folder, value)
        check.run(project_in(folder))


@pytest.mark.parametrize("written", ["constant", {"kind": "constant"}])
def test_a_constant_schedule_may_be_named(folder, written):
    loss = {"factory": "kdpipe.losses:ForwardKL", "teacher": "big", "schedule": written}
    write_params(folder, settings({}, losses=[loss]))
    check.run(project_in(folder))


def test_the_guides_own_loss_trains_a_student(folder):
    (source,) = [each for each in blocks("python") if each.startswith("# my_losses.py")]
    (folder / "my_losses.py").write_text(source)
    (losses,) = [yaml.safe_load(each)["losses"] for each in blocks("yaml") if "my_losses" in each]
    write_params(folder, settings({}, losses=losses))
    project = project_in(folder)
    check.run(project)
    assert train_student.run(project).trained


WRONG_LOSS = """
class Wrong:
    temperature = 1.0

    def __call__(self, logits, targets):
        {body}

    def unscaled(self, values):
        return {unscaled}
"""


@pytest.mark.parametrize(
    ("body", "unscaled", "named"),
    [
        ("return logits.sum(dim=-1)", "None", r"Wrong\.unscaled gives no tensor of shape \[1\]; expected the values"),
        ("return logits.sum(dim=-1)", "3", r"Wrong\.unscaled gives no tensor"),
        (
            "return logits.sum(dim=-1, keepdim=True)",
            "values",
            r"student.losses.0: .*Wrong gives a tensor of torch.float32 \[1, 1\]; expected",
        ),
        (
            "return logits.detach().sum(dim=-1)",
            "values",
            "student.losses.0: .*Wrong has no gradient in the student's numbers",
        ),
        (
            "return {}['key']",
            "values",
            "student.losses.0: Wrong fails on one made-up row of logits of big: KeyError: 'key'",
        ),
    ],
)
def test_a_loss_of_ones_own_that_cannot_teach_is_refused(folder, body, unscaled, named):
    (folder / "my_losses.py").write_text(WRONG_LOSS.format(body=body, unscaled=unscaled))
    write_params(folder, settings({}, losses=[{"factory": "my_losses.py:Wrong", "teacher": "big"}]))
    with pytest.raises(ConfigError, match=named):
        check.run(project_in(folder))


def test_a_loss_of_ones_own_has_a_temperature(folder):
    code = WRONG_LOSS.format(body="return logits.sum(dim=-1)", unscaled="values")
    (folder / "my_losses.py").write_text(code.replace("temperature = 1.0", "temperature = None"))
    write_params(folder, settings({}, losses=[{"factory": "my_losses.py:Wrong", "teacher": "big"}]))
    with pytest.raises(ConfigError, match=r"student\.losses\.0: .*temperature is None; expected a number above 0"):
        check.run(project_in(folder))
