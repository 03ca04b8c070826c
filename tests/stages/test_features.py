"""Students that learn from a teacher's features: by params.yaml, with projectors, resumed, checked."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields

import pytest
import torch
import yaml

import kdpipe.losses as kdpipe_losses
from kdpipe.checkpoint import read_weights
from kdpipe.errors import ConfigError, CorruptStoreError, StaleStoreError
from kdpipe.losses import needs_whole_batch
from kdpipe.store import TargetStore
from kdpipe_stages import cache_teacher, check, evaluate, train_student
from kdpipe_stages.cli import run
from kdpipe_stages.lesson import Lesson
from projects import REPOSITORY, cache, fails, make_project, params, project_in, write_params

TEACHER = """
import torch


class Teacher(torch.nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.ReLU(inplace=True))
        self.hidden = torch.nn.Linear(6, 12)
        self.head = torch.nn.Linear(12, num_classes)

    def forward(self, inputs):
        return self.head(self.hidden(self.body(inputs).mean(dim=(2, 3))).relu())
"""
STUDENT = """
import torch


class Student(torch.nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Dropout(0.2)
        )
        self.pool = torch.nn.Flatten()
        self.head = torch.nn.Linear(4, num_classes)

    def forward(self, inputs):
        return self.head(self.pool(self.layers(inputs).mean(dim=(2, 3))))
"""
KL = {"factory": "kdpipe.losses:ForwardKL", "teacher": "big", "temperature": 4, "weight": 0.9}


def on_features(loss, output, student_output, **options):
    factory = {"factory": f"kdpipe.losses:{loss}", "teacher": "big", "output": output}
    return {**factory, "student_output": student_output, **options}


ATTENTION = on_features("AttentionTransfer", "body", "layers.1", weight=2.0)
HINT = on_features("HintMSE", "hidden", "pool", projector="linear")


def settings(*losses, train=None, **student):
    value = params()
    value["targets"]["big"]["outputs"] = ["logits", "body", "hidden"]
    value["student"] |= {"model": {"factory": "student.py:Student"}, "seeds": 1, "baselines": []} | student
    value["student"]["losses"] = list(losses)
    value["student"]["train"] |= {"epochs": 1} | (train or {})
    return value


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A project with a complete store of logits and two features."""
    folder = tmp_path_factory.mktemp("features")
    make_project(folder)
    (folder / "teacher.py").write_text(TEACHER)
    (folder / "student.py").write_text(STUDENT)
    write_params(folder, settings(KL))
    cache(folder)
    return folder


@pytest.fixture
def folder(cached, tmp_path):
    shutil.copytree(cached, tmp_path, dirs_exist_ok=True)
    return tmp_path


def project_with(folder, *losses, **options):
    write_params(folder, settings(*losses, **options))
    return project_in(folder)


def model_of(project, arm="student", seed=0):
    return project.student_models / arm / f"seed-{seed}" / "model.safetensors"


def history_of(project):
    return json.loads((project.student_models / "student" / "seed-0" / "history.json").read_text())


@pytest.mark.parametrize(
    "losses",
    [
        [ATTENTION, HINT, on_features("HintMSE", "body", "layers.0", projector="conv1x1")],
        [on_features("CosineFeature", "hidden", "pool", projector="mlp"), on_features("RKD", "hidden", "", weight=0.1)],
        [
            on_features("SimilarityPreserving", "hidden", "pool", weight=300),
            on_features("RKD", "hidden", "pool", weight=0.1, angle_weight=1),
            on_features("ForwardKL", "logits", "pool", projector="linear"),
        ],
    ],
)
def test_a_student_learns_from_features_beside_logits(folder, losses):
    project = project_with(folder, KL, *losses, train={"epochs": 2})
    compared = [
        f"{each['factory'].split(':')[1]} of {each['output']} by {each['student_output'] or 'logits'}"
        for each in losses
    ]
    assert f"features: {', '.join(compared)}" in check.run(project)
    train_student.run(project)
    history = history_of(project)
    for each in losses:
        named = f"big.{each['factory'].split(':')[1]} {each['student_output'] or 'logits'} to {each['output']}"
        assert history[-1][named] < history[0][named]
    assert set(read_weights(model_of(project))) == {
        f"{layer}.{part}" for layer in ("layers.0", "head") for part in ("weight", "bias")
    }
    assert evaluate.run(project)["student"]["parameters"] == 4 * 10 + 10 * 5


def test_a_student_with_projectors_starts_as_one_without(folder):
    start = {"train": {"learning_rate": 1e-30, "optimizer": "sgd"}}
    weights = []
    for losses in ([KL], [KL, HINT, ATTENTION]):
        project = project_with(folder, *losses, **start)
        train_student.run(project)
        weights.append(model_of(project).read_bytes())
    assert weights[0] == weights[1]


def test_baselines_do_not_see_features(folder):
    weights = {}
    for name, losses in (("plain", [KL]), ("features", [KL, HINT, ATTENTION])):
        project = project_with(folder, *losses, baselines=["labels_only"])
        train_student.run(project)
        weights[name] = {arm: model_of(project, arm).read_bytes() for arm in ("labels_only", "student")}
    assert weights["plain"]["labels_only"] == weights["features"]["labels_only"]
    assert weights["plain"]["student"] != weights["features"]["student"]


def test_an_interrupted_training_with_projectors_ends_as_an_uninterrupted_one(folder, tmp_path_factory):
    losses = [KL, ATTENTION, HINT]
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder, alone, dirs_exist_ok=True)
    expected = project_with(alone, *losses)
    train_student.run(expected)

    def interrupt(progress):
        if progress.now.step == 7:
            raise KeyboardInterrupt

    project = project_with(folder, *losses, train={"checkpoint_every_s": 0.0})
    with pytest.raises(KeyboardInterrupt):
        train_student.run(project, interrupt)
    steps = []
    train_student.run(project, lambda progress: steps.append(progress.now.step))
    assert steps[0] == 8
    assert model_of(project).read_bytes() == model_of(expected).read_bytes()
    assert history_of(project) == history_of(expected)


def test_what_is_heard_and_through_what_are_in_the_fingerprint(folder):
    changed = [
        [KL],
        [KL, ATTENTION],
        [KL, ATTENTION | {"student_output": "layers.2"}],
        [KL, HINT],
        [KL, HINT | {"projector": "mlp"}],
    ]
    assert len({Lesson(project_with(folder, *losses)).fingerprint for losses in changed}) == len(changed)
    plain = Lesson(project_with(folder, KL)).fingerprint
    spelt = {**KL, "student_output": "", "projector": None}
    assert Lesson(project_with(folder, spelt)).fingerprint == plain


WRONG = [
    (
        ATTENTION | {"student_output": "layer.1"},
        r"student\.losses\.1\.student_output: the output 'layer\.1' of the student does not exist: forward gives "
        r"logits; all names, with those of submodules: logits, layers, layers\.0, layers\.1, layers\.2, pool, head",
    ),
    (
        HINT | {"projector": None},
        r"student\.losses\.1: on hidden of big: student features have shape \[1, 4\], the teacher's \[1, 12\]; "
        r"expected the same\. A projector changes",
    ),
    (
        on_features("HintMSE", "body", "layers.1"),
        r"student features have shape \[1, 4, 8, 8\], the teacher's \[1, 6, 8, 8\].*conv1x1",
    ),
    (
        on_features("HintMSE", "body", "pool", projector="conv1x1"),
        r"projector: conv1x1 .* found \[4\] of the student and \[6, 8, 8\] of the teacher",
    ),
    (on_features("AttentionTransfer", "hidden", "pool"), r"expected \[B, D, H, W\] or \[B, T, D\]"),
    (on_features("HintMSE", "logits", "head"), "HintMSE is a loss on features, and got logits"),
    (on_features("ForwardKL", "hidden", ""), "a loss on logits got features"),
]


@pytest.mark.parametrize(("loss", "message"), WRONG)
def test_what_cannot_be_compared_is_refused_by_check_and_before_training(folder, loss, message):
    project = project_with(folder, KL, loss)
    with pytest.raises(ConfigError, match=message):
        check.run(project)
    with pytest.raises(ConfigError, match=message):
        train_student.run(project)


def test_check_tells_of_features_before_anything_is_cached(tmp_path):
    make_project(tmp_path)
    (tmp_path / "teacher.py").write_text(TEACHER)
    (tmp_path / "student.py").write_text(STUDENT)
    assert "features: HintMSE of hidden by pool" in check.run(project_with(tmp_path, KL, HINT))
    with pytest.raises(ConfigError, match=r"\[1, 4\], the teacher's \[1, 12\]"):
        check.run(project_with(tmp_path, KL, HINT | {"projector": None}))


def test_a_wrong_output_is_one_message(folder, capsys, monkeypatch):
    write_params(folder, settings(KL, ATTENTION | {"student_output": "nowhere"}))
    monkeypatch.chdir(folder)
    message = fails(capsys, "train-student")
    assert message.count("\n") == 1
    assert "the output 'nowhere' of the student does not exist" in message
    assert run(["check"]) == 1


def test_losses_that_leave_the_logits_untrained_are_refused(folder):
    project = project_with(folder, ATTENTION, label_weight=0, train={"epochs": 1})
    for stage in (check, train_student):
        with pytest.raises(ConfigError, match="nothing trains the logits of the student"):
            stage.run(project)
    train_student.run(project_with(folder, ATTENTION, label_weight=0.1))


@pytest.mark.parametrize("kind", ["conv", 1])
def test_an_unknown_projector_is_refused(folder, kind):
    with pytest.raises(ConfigError, match=r"student\.losses\.0\.projector: .*'linear', 'conv1x1' or 'mlp'"):
        project_with(folder, HINT | {"projector": kind})


# The guide

GUIDE = (REPOSITORY / "docs" / "guides" / "losses.md").read_text()


def blocks(language):
    return re.findall(f"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_the_guides_settings_are_valid(folder):
    written = [yaml.safe_load(each) for each in blocks("yaml") if "student_output" in each]
    assert len(written) == 2
    for each in written:
        value = settings(KL)
        value["targets"]["big"] |= each["targets"]["big"]
        value["student"] |= each["student"]
        write_params(folder, value)
        assert (
            f"{each['student']['losses'][-1]['factory'].split(':')[1]} of hidden by pool"
            in check.run(project_in(folder))[-1]
        )


def test_the_guides_own_loop_runs(folder):
    (loop,) = [each for each in blocks("python") if "student_hidden" in each]
    store = TargetStore.open(project_in(folder).store("big"))
    names = {"store": store, "sample_ids": store.sample_ids[:8].tolist(), "student_hidden": torch.randn(8, 4)}
    names["projector"] = torch.nn.Linear(4, 12)
    exec(loop, names)
    expected = (names["projector"](names["student_hidden"]) - names["hidden"].values.float()).square().mean()
    torch.testing.assert_close(names["feature_loss"], expected)


def test_the_guides_table_is_of_all_losses_on_features_and_their_defaults():
    rows = dict(re.findall(r"^\| `(\w+)` \|(.* \| .*)\|$", GUIDE.split("On a teacher's features")[1], re.MULTILINE))
    kinds = {name: getattr(kdpipe_losses, name) for name in kdpipe_losses.__all__ if name in rows}
    assert set(kinds) == {"HintMSE", "CosineFeature", "AttentionTransfer", "SimilarityPreserving", "RKD", "SimKD"}
    for name, kind in kinds.items():
        options = re.split(r"(?<!\\)\|", rows[name])[1]
        said = {key: yaml.safe_load(value) for key, value in re.findall(r"`(\w+): ([^`]+)`", options)}
        assert said == {each.name: each.default for each in fields(kind)}
        assert ("whole batches" in rows[name]) == needs_whole_batch(kind())


# SimKD: the student takes over the teacher's last layer


SIMKD = on_features("SimKD", "hidden.act", "pool", projector="mlp")


def reusing(*losses, classifier="head", **options):
    value = settings(*(losses or [SIMKD]), **{"label_weight": 0, **options})
    value["targets"]["big"] |= {"classifier": classifier, "outputs": ["logits", "body", "hidden", "hidden.act"]}
    return value


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A project whose store keeps the last layer, and what goes into it."""
    folder = tmp_path_factory.mktemp("simkd")
    make_project(folder)
    activated = (
        TEACHER.replace("torch.nn.Linear(6, 12)", "Activated(6, 12)")
        .replace(".relu()", "")
        .replace(
            "class Teacher",
            """class Activated(torch.nn.Linear):
    def __init__(self, *widths):
        super().__init__(*widths)
        self.act = torch.nn.ReLU()

    def forward(self, inputs):
        return self.act(super().forward(inputs))


class Teacher""",
        )
    )
    (folder / "teacher.py").write_text(activated)
    (folder / "student.py").write_text(STUDENT)
    write_params(folder, reusing())
    cache(folder)
    return folder


@pytest.fixture
def reusable(kept, tmp_path):
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_store_keeps_the_teachers_last_layer(reusable):
    project = project_in(reusable)
    store = TargetStore.open(project.store("big"))
    classifier = store.classifier()
    weights = read_weights(project.teacher_model("big") / "model.safetensors")
    assert torch.equal(classifier.weight, weights["head.weight"])
    assert torch.equal(classifier.bias, weights["head.bias"])
    assert store.manifest.classifier["shape"] == [10, 12]
    assert (store.path / "classifier.safetensors").read_bytes() == classifier.content
    assert store.verify() == []
    features = store.targets(store.sample_ids[:5].tolist(), output="hidden.act").values
    logits = torch.nn.functional.linear(features.float(), classifier.weight, classifier.bias)
    torch.testing.assert_close(store.targets(store.sample_ids[:5].tolist()).logits(), logits, rtol=0.01, atol=0.01)


def test_asking_for_the_last_layer_computes_no_targets_anew(reusable):
    write_params(reusable, reusing(classifier=None))
    project = project_in(reusable)
    assert cache_teacher.run(project, "big").rows_computed == 0
    store = TargetStore.open(project.store("big"))
    assert store.classifier() is None
    assert not (store.path / "classifier.safetensors").exists()
    write_params(reusable, reusing())
    project = project_in(reusable)
    with pytest.raises(StaleStoreError, match=r'targets\.classifier was null, params\.yaml says "head"'):
        train_student.run(project)
    cached = cache_teacher.run(project, "big")
    assert (cached.rows_computed, cached.published) == (0, True)
    assert TargetStore.open(project.store("big")).classifier() is not None
    assert not cache_teacher.run(project, "big").published


def test_a_damaged_last_layer_is_seen_and_repaired(reusable):
    project = project_in(reusable)
    for folder in (project.store("big"), project.work(TargetStore.open(project.store("big")).fingerprint)):
        path = folder / "classifier.safetensors"
        content = bytearray(path.read_bytes())
        path.unlink()
        content[-1] ^= 1
        path.write_bytes(content)
    store = TargetStore.open(project.store("big"))
    assert [str(each) for each in store.verify()] == ["classifier.safetensors is absent or was changed"]
    with pytest.raises(CorruptStoreError, match=r"classifier\.safetensors is absent or differs"):
        train_student.run(project)
    cached = cache_teacher.run(project, "big", repair=True)
    assert (cached.rows_computed, cached.published) == (0, True)
    assert TargetStore.open(project.store("big")).verify() == []


@pytest.mark.parametrize("losses", [[SIMKD], [SIMKD, KL, ATTENTION, HINT]])
def test_a_student_predicts_by_the_teachers_last_layer(reusable, losses):
    write_params(reusable, reusing(*losses, train={"epochs": 8}, baselines=["labels_only"]))
    project = project_in(reusable)
    check.run(project)
    train_student.run(project)
    weights = read_weights(model_of(project))
    own, projector = ({name for name in weights if name.startswith(part)} for part in ("student.", "projector."))
    assert len(own) == 4
    assert len(projector) == 4
    classifier = TargetStore.open(project.store("big")).classifier()
    assert set(weights) - own - projector == {"classifier.weight", "classifier.bias"}
    assert torch.equal(weights["classifier.weight"], classifier.weight)
    assert torch.equal(weights["classifier.bias"], classifier.bias)
    history = history_of(project)
    name = "big.SimKD projected to hidden.act"
    assert history[-1][name] < 0.5 * history[0][name]
    metrics = evaluate.run(project)
    assert metrics["student"]["parameters"] == 90 + (4 * 12 + 12) + (12 * 12 + 12) + (12 * 10 + 10)
    assert metrics["baseline"]["parameters"] == 90
    assert metrics["student"]["agreement"] > 0.3
    assert set(read_weights(model_of(project, "labels_only"))) == {name.removeprefix("student.") for name in own}


def test_the_last_layer_is_in_the_fingerprint_of_who_reuses_it(reusable):
    def fingerprints(classifier):
        write_params(reusable, reusing(SIMKD, classifier=classifier))
        cache_teacher.run(project_in(reusable), "big")
        reused = Lesson(project_in(reusable)).fingerprint
        write_params(reusable, reusing(KL, classifier=classifier))
        return reused, Lesson(project_in(reusable)).fingerprint

    reused, plain = fingerprints("head")
    reused_other, plain_other = fingerprints("hidden")
    assert reused != reused_other
    assert plain == plain_other


def test_an_interrupted_reuse_ends_as_an_uninterrupted_one(reusable, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(reusable, alone, dirs_exist_ok=True)
    train_student.run(project_in(alone))

    def interrupt(progress):
        if progress.now.step == 7:
            raise KeyboardInterrupt

    write_params(reusable, reusing(train={"checkpoint_every_s": 0.0}))
    project = project_in(reusable)
    with pytest.raises(KeyboardInterrupt):
        train_student.run(project, interrupt)
    train_student.run(project)
    assert model_of(project).read_bytes() == model_of(project_in(alone)).read_bytes()


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ([SIMKD, SIMKD], {}, "so does another loss; leave one"),
        (
            [SIMKD | {"student_output": "", "projector": None}],
            {},
            "name what goes into that layer as student_output",
        ),
        ([SIMKD], {"classifier": None}, r"does not keep; name it as targets\.big\.classifier"),
        ([SIMKD], {"classifier": "body.0"}, r"no nn\.Linear 'body\.0'; it has hidden, head"),
        ([SIMKD | {"projector": None}], {}, r"\[1, 4\], the teacher's \[1, 12\]"),
    ],
)
def test_what_cannot_be_reused_is_refused_by_check(reusable, losses, options, message):
    write_params(reusable, reusing(*losses, **options))
    with pytest.raises(ConfigError, match=message):
        check.run(project_in(reusable))


def test_features_that_do_not_go_into_the_last_layer_are_refused(reusable):
    write_params(reusable, reusing(SIMKD | {"output": "body", "student_output": "layers", "projector": "conv1x1"}))
    with pytest.raises(ConfigError, match=r"classifier takes 12 numbers, its features have shape \[6, 8, 8\]"):
        train_student.run(project_in(reusable))


def test_ranks_are_refused_where_the_students_own_last_layer_is_not_trained(reusable, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="gets no gradient on any of 2 ranks; train in one process"):
        Lesson(project_in(reusable))


def test_a_teacher_without_a_module_has_no_layer_to_keep(reusable):
    value = reusing()
    value["teachers"]["big"] = {"teacher": {"factory": "teacher.py:Teacher"}}
    write_params(reusable, value)
    with pytest.raises(ConfigError, match=r"targets\.big\.classifier: it is a layer of teachers\.big\.model"):
        project_in(reusable)
