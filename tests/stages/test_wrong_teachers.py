"""Teachers that cannot be used, through the real command line: one message, exit status 1, and what stood stands."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from completions_server import CLASSES, running
from kdpipe.data.prepared import PreparedData
from kdpipe.huggingface import quietly
from kdpipe.models.pretrained import causal_lm
from kdpipe.skops_files import dumps
from kdpipe.store import TargetStore
from kdpipe_stages.cli import run
from kdpipe_stages.lesson import open_checked_store
from kdpipe_stages.made_of import files_of
from kdpipe_stages.project import Project
from kdpipe_stages.teachers import build_teacher
from projects import fails, project_in, tree, write_params
from stages.test_teacher_kinds import FOREST, GPT2, LINEAR, SKLEARN, given, write, write_table, write_texts
from toy_text import save_bert, save_tokenizer

REPOSITORY = Path(__file__).parents[2]
GIVEN, INPUTS, LABELS = given("iris")
FUNCTION = {"teacher": {"factory": "kdpipe.teachers.ensemble:FunctionTeacher", "function": "mine.py:speak"}}
SPEAK = "import numpy as np\n\n\ndef speak(columns):\n    return columns['features'][:, :3]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Prepared rows of iris, and a complete store of what a function says; the current folder, as for a user."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SPEAK)
    write(tmp_path, write_table(tmp_path, "iris"), {"big": FUNCTION})
    assert run(["prepare-data"]) == 0
    assert run(["cache-teacher"]) == 0
    return tmp_path


def change(folder, teachers, **targets):
    """Other teachers; `targets` of big."""
    params = project_in(folder).params
    sections = {"data": write_table(folder, "iris")["data"], "task": params.task.to_json()}
    write(folder, sections, teachers, targets=targets or None)


def refuses(folder, capsys, message, *commands):
    """Every command fails with the same message, and the store is as it was."""
    before = tree(folder / "data" / "targets")
    for command in commands:
        found = fails(capsys, *command.split())
        assert re.search(message, found, re.DOTALL), f"{command}: {found}"
    assert tree(folder / "data" / "targets") == before


def write_network(path, *factors, beside=None):
    """An ONNX file: each class is the sum of the inputs times a factor. Its weights may lie in a file `beside` it."""
    weights = numpy_helper.from_array(np.tile(np.array(factors, np.float32), (4, 1)), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["logits"])
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])
    said = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", weights.dims[1]])
    graph = helper.make_graph([node], "net", [shape], [said], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if beside is None:
        onnx.save(model, path)
    else:
        (path.parent / beside).unlink(missing_ok=True)
        onnx.save(model, path, save_as_external_data=True, location=beside, size_threshold=0)


ONNX = {"teacher": {"factory": "kdpipe.teachers.onnx:OnnxTeacher", "path": "a.onnx"}, "preprocess": GIVEN}
READY = {"teacher": {"factory": SKLEARN, "path": "a.skops"}, "preprocess": GIVEN}
WEIGHTS = {"model": LINEAR, "weights": "a.safetensors", "preprocess": GIVEN}


# Classes, numbers, shapes


def test_a_network_of_another_number_of_classes(folder, capsys):
    write_network(folder / "a.onnx", 1, 2, 3, 4, 5)
    change(folder, {"big": ONNX})
    message = r"a\.onnx gives logits of shape \[1, 5\] for one row; expected \[1, …, 3\] \(task\.num_classes is 3\)"
    refuses(folder, capsys, message, "check", "cache-teacher")


def test_an_estimator_of_other_classes(folder, capsys):
    (folder / "a.skops").write_bytes(dumps(LogisticRegression(max_iter=200).fit(INPUTS, LABELS + 1)))
    change(folder, {"big": READY})
    message = r"the estimator's classes are \[1, 2, 3\]; expected class numbers from 0 to 2"
    refuses(folder, capsys, message, "check", "cache-teacher")


def test_weights_of_other_classes(folder, capsys):
    save_file({"head.weight": torch.ones(5, 4), "head.bias": torch.ones(5)}, folder / "a.safetensors")
    change(folder, {"big": WEIGHTS})
    message = (
        r"does not fit the model Linear: of another shape: head.bias \[5\] for \[3\], head.weight \[5, 4\] for \[3, 4\]"
    )
    refuses(folder, capsys, message, "check", "cache-teacher")


def test_an_estimator_of_other_columns(folder, capsys):
    (folder / "a.skops").write_bytes(dumps(LogisticRegression(max_iter=200).fit(INPUTS[:, :2], LABELS)))
    change(folder, {"big": READY})
    refuses(folder, capsys, r"LogisticRegression failed on inputs of shape \[1, 4\]", "check", "cache-teacher")


NAN = r"the teacher's logits are NaN or infinite for \d+ of \d+ samples of a batch, such as \d+-[0-9a-f]{16}"


def test_a_network_that_says_nan(folder, capsys):
    write_network(folder / "a.onnx", 1, np.nan, 2)
    change(folder, {"big": ONNX})
    refuses(folder, capsys, NAN, "cache-teacher")


ODD = 7.9
SPOILT = {
    "NaN": ("values[odd] = np.nan\n    return values", NAN),
    "infinite": ("values[odd] = np.inf\n    return values", NAN),
    "of another shape later": (
        "return values if not odd.any() else values[:, :2]",
        r"mine\.py:speak gave \[\d+, 2\] for \d+ rows; expected logits of shape \[\d+, …, 3\]",
    ),
    "a row too few later": (
        "return values if not odd.any() else values[1:]",
        r"mine\.py:speak gave \[\d+, 3\] for \d+ rows",
    ),
    "fails later": (
        "assert not odd.any(), 'no such flower'\n    return values",
        r"mine\.py:speak failed: AssertionError: no such flower",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_function_that_goes_wrong_in_a_later_batch(folder, capsys, spoilt):
    """What was committed before stays, and is not computed again once it is mended."""
    body, message = SPOILT[spoilt]
    (folder / "mine.py").write_text(
        "import numpy as np\n\n\ndef speak(columns):\n    values = columns['features'][:, :3].copy()\n"
        f"    odd = np.isclose(columns['features'][:, 0], {ODD})\n    {body}\n"
    )
    change(folder, {"big": FUNCTION}, batch_size=8, shard_rows=8)
    data = PreparedData(folder / "data" / "prepared")
    assert 16 < np.flatnonzero(np.isclose(data.inputs.read(np.arange(150))["features"][:, 0], ODD))[0] < 140
    refuses(folder, capsys, message, "cache-teacher")
    assert len(list((folder / "data" / ".work").rglob("commits/*.json"))) >= 1


# Files


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_truncated_files(folder, capsys):
    save_file({"head.weight": torch.ones(3, 4), "head.bias": torch.ones(3)}, folder / "a.safetensors")
    write_network(folder / "a.onnx", 1, 2, 3)
    (folder / "a.skops").write_bytes(dumps(LogisticRegression(max_iter=200).fit(INPUTS, LABELS)))
    for section, name, message in (
        (WEIGHTS, "a.safetensors", r"a\.safetensors is no safetensors file"),
        (ONNX, "a.onnx", r"a\.onnx is no ONNX model that ONNX Runtime can load"),
        (READY, "a.skops", r"a\.skops is no skops file|a\.skops cannot be loaded"),
    ):
        change(folder, {"big": section})
        assert run(["check"]) == 0
        truncated(folder / name)
        refuses(folder, capsys, message, "check", "cache-teacher")
        (folder / name).unlink()
        refuses(folder, capsys, "there is no (weights )?file", "check", "cache-teacher")


class Attack:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("section", "name", "message"),
    [
        (WEIGHTS, "a.safetensors", "is no safetensors file"),
        ({**WEIGHTS, "weights": "a.pt"}, "a.pt", "no PyTorch file of plain tensors"),
        (ONNX, "a.onnx", "is no ONNX model"),
        (READY, "a.skops", "A pickle is not loaded: it may hold any code"),
    ],
)
def test_a_pickle_with_code_in_place_of_a_file(folder, capsys, section, name, message):
    (folder / name).write_bytes(pickle.dumps(Attack(folder / "attacked")))
    change(folder, {"big": section})
    commands = ("check", "train-teacher", "cache-teacher")
    refuses(folder, capsys, message, *(commands if "weights" in section else commands[::2]))
    assert not (folder / "attacked").exists()
    pickle.loads((folder / name).read_bytes())  # noqa: S301
    assert (folder / "attacked").exists(), "it would have"


def test_a_skops_file_with_code(folder, capsys):
    """A function of os, wrapped in an estimator: skops would import and call it."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    attack = FunctionTransformer(os.system, kw_args={})
    pipeline = make_pipeline(attack, LogisticRegression())
    pipeline.steps[1][1].fit(INPUTS, LABELS)
    (folder / "a.skops").write_bytes(dumps(pipeline))
    change(folder, {"big": READY})
    message = r"holds types that are not known to be safe: .*system.*name them in `trusted:`"
    refuses(folder, capsys, message, "check", "cache-teacher")


# Text and tokens


BERT_TEACHER = {
    "teacher": {"factory": "kdpipe.teachers.pretrained:PretrainedTeacher", "path": "bert"},
    "preprocess": {"factory": "kdpipe.preprocess:PretrainedTokenizer", "path": "bert", "max_length": 12},
}


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Prepared texts, and a checkpoint for them; the current folder."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(save_bert(tmp_path / "bert"))
    sections = {
        "data": write_texts(tmp_path, [f"a fine film {number}" for number in range(20)], label=[0, 1] * 10),
        "task": {"factory": "kdpipe.tasks.text:TextClassification", "num_classes": 3},
    }
    student = {"model": {"factory": "kdpipe.models.lstm:LSTM", "width": 4, "hidden": 4}}

    def build(teacher, **settings):
        return write(tmp_path, sections | settings, {"big": teacher}, student)

    build(BERT_TEACHER)
    assert run(["prepare-data"]) == 0
    assert run(["check"]) == 0
    assert run(["cache-teacher"]) == 0
    return build


def test_a_checkpoint_that_is_damaged(texts, tmp_path, capsys):
    """Truncated, of other classes, with a pickle in place of its weights."""
    save_bert(tmp_path / "bert", num_classes=4)
    refuses(
        tmp_path, capsys, r"returned \[1, 4\] for 1 rows; expected logits .*num_classes is 3", "check", "cache-teacher"
    )
    truncated(tmp_path / "bert" / "model.safetensors")
    refuses(tmp_path, capsys, "bert cannot be read as AutoModelForSequenceClassification", "check", "cache-teacher")
    (tmp_path / "bert" / "model.safetensors").unlink()
    (tmp_path / "bert" / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(tmp_path / "attacked")))
    refuses(tmp_path, capsys, r"pytorch_model\.bin, which would have to be unpickled", "check", "cache-teacher")
    assert not (tmp_path / "attacked").exists()


def test_a_tokenizer_that_is_not_the_checkpoints(texts, tmp_path, capsys):
    save_tokenizer(tmp_path / "other", words=["not", "a", "fine", "film", "##s"])
    preprocess = {**BERT_TEACHER["preprocess"], "path": "other"}
    texts({**BERT_TEACHER, "preprocess": preprocess})
    message = r"comes with another tokenizer than .*: 'not' is 9 there and 5 here"
    refuses(tmp_path, capsys, message, "check", "cache-teacher")


def test_a_padded_vocabulary_says_what_to_set(tmp_path, monkeypatch, capsys):
    """A head of more outputs than there are tokens, as 152,064 for 151,936; then with what the message says."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("padded", 264), ("small", 200)):
        with quietly():
            causal_lm(size, config=GPT2).save_pretrained(tmp_path / name)
    teacher = {"factory": "kdpipe.teachers.pretrained:PretrainedTeacher", "path": "padded", "auto": "causal_lm"}
    task = {"factory": "kdpipe.tasks.language:LanguageModelling", "block_tokens": 8}
    student = {"model": {"factory": "kdpipe.models.pretrained:causal_lm", "config": GPT2}}
    data = write_texts(tmp_path, [f"a fine film {number}" for number in range(9)])

    def build(task, teacher):
        targets = {"encoding": "topk", "k": 4}
        write(tmp_path, {"data": data, "task": task}, {"big": {"teacher": teacher}}, student, targets)
        assert run(["prepare-data"]) == 0

    build(task, teacher)
    message = (
        r"returned \[1, 8, 264\] for 1 rows; expected logits of shape \[1, …, 257\] \(task\.num_classes is 257; where "
        r"a vocabulary is padded, set it to the model's number of outputs, 264, which teacher and student must share\)"
    )
    refuses(tmp_path, capsys, message, "check", "cache-teacher")
    build({**task, "num_classes": 264}, teacher)
    for command in ("check", "cache-teacher", "train-student"):
        assert run([command]) == 0
    assert TargetStore.open(tmp_path / "data" / "targets" / "big").outputs["logits"].shape == (8, 264)
    build(task, {**teacher, "path": "small"})
    refuses(
        tmp_path, capsys, "the model has embeddings for 200 tokens, its tokenizer makes 257", "check", "cache-teacher"
    )


def test_a_language_model_of_another_tokenizer(tmp_path, monkeypatch, capsys):
    """Bytes in place of the checkpoint's tokenizer: its tokens mean something else."""
    monkeypatch.chdir(tmp_path)
    with quietly():
        causal_lm(300, config=GPT2).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    teacher = {"factory": "kdpipe.teachers.pretrained:PretrainedTeacher", "path": "gpt2", "auto": "causal_lm"}
    task = {"factory": "kdpipe.tasks.language:LanguageModelling", "block_tokens": 8, "num_classes": 300}
    student = {"model": {"factory": "kdpipe.models.pretrained:causal_lm", "config": GPT2}}
    sections = {"data": write_texts(tmp_path, ["a fine film"] * 5), "task": task}
    write(tmp_path, sections, {"big": {"teacher": teacher}}, student)
    assert run(["prepare-data"]) == 0
    message = r"another tokenizer than .*: 'byte 0' is unknown there and 0 here. .*task\.tokenizer"
    refuses(tmp_path, capsys, message, "check", "cache-teacher")


# Factories


OWN = """
import torch

from kdpipe.targets import OutputSpec


class Mine:
    outputs = (OutputSpec(name="logits", shape=(3,)),)
    fingerprint = {"mine": 1}
    num_asked = 0

    def predict(self, columns):
        self.num_asked += 1
        return ANSWER


class Half:
    outputs = ()

    def predict(self, columns):
        return {}


class Fails(Mine):
    def __init__(self):
        raise ValueError("no weights today")


class Odd(Mine):
    @property
    def outputs(self):
        raise RuntimeError("it depends")


class Learns(Mine):
    def fit(self, blocks):
        raise ZeroDivisionError("too few rows")

    def save(self, folder):
        pass

    def load(self, folder):
        pass


def a_number():
    return 3
"""
ANSWER = "{'logits': torch.from_numpy(columns['features'][:, :3])}"


def own(name, **section):
    return {"teacher": {"factory": f"own.py:{name}"}, **section}


def write_own(folder, answer=ANSWER):
    (folder / "own.py").write_text(OWN.replace("ANSWER", answer))


@pytest.mark.parametrize(
    ("teachers", "message", "commands"),
    [
        ({"big": own("Half")}, r"big\.teacher: own\.py:Half gave Half, which is no Teacher .*no fingerprint", None),
        ({"big": own("a_number")}, "gave int, .* no Teacher .*no outputs and no fingerprint and no predict", None),
        ({"big": own("Fails")}, r"teachers\.big\.teacher: own\.py:Fails fails: ValueError: no weights today", None),
        ({"big": own("Odd")}, r"teachers\.big fails: RuntimeError: it depends", None),
        ({"big": own("Nobody")}, r"teachers\.big\.teacher: own\.py has no 'Nobody'; it has .*Mine", None),
        (
            {"big": own("Mine", fit_on="train")},
            r"teachers\.big\.fit_on: own\.py:Mine has nothing to learn; leave fit_on out",
            ("check", "train-teacher"),
        ),
        (
            {"big": own("Learns", fit_on="train")},
            r"teachers\.big: fit fails: ZeroDivisionError: too few rows",
            ("train-teacher",),
        ),
        (
            {"big": own("Learns", fit_on="trian")},
            r"teachers\.big\.fit_on: there is no split 'trian'",
            ("check", "train-teacher"),
        ),
        ({"big": {**FOREST, "fit_on": None}}, "has not seen any rows: give the teacher `fit_on: SPLIT`", None),
        (
            {"big": {**READY, "fit_on": "train"}},
            "the estimator of `path` is ready; leave fit_on out",
            ("train-teacher",),
        ),
        ({"big": {**FUNCTION, "runtime": {"sped": 1}}}, r"teachers\.big\.runtime\.sped: .* does not take it", None),
        ({"big": FOREST}, r"there is no trained model in .*big\. Run `kdpipe train-teacher big`", ("cache-teacher",)),
    ],
)
def test_a_factory_that_makes_no_teacher(folder, capsys, teachers, message, commands):
    write_own(folder)
    (folder / "a.skops").write_bytes(dumps(LogisticRegression(max_iter=200).fit(INPUTS, LABELS)))
    change(folder, teachers)
    refuses(folder, capsys, message, *(commands or ("check", "cache-teacher")))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {**FUNCTION, "runtime": {"function": "mine.py:speak"}},
            r"teachers\.big\.runtime\.function: it is given in teachers\.big\.teacher, too",
        ),
        ({**WEIGHTS, "runtime": {}}, r"teachers\.big\.runtime: it does not go with weights"),
        ({**FUNCTION, "logits": "scores"}, r"teachers\.big\.logits: it does not go with teacher"),
    ],
)
def test_keys_that_do_not_go_together(folder, capsys, section, message):
    value = yaml.safe_load((folder / "params.yaml").read_text())
    write_params(folder, value | {"teachers": {"big": section}})
    refuses(folder, capsys, message, "check", "cache-teacher")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("None", r"teachers\.big: predict gave NoneType; expected a dict of tensors"),
        ("{'logits': [1, 2, 3]}", r"teachers\.big: predict gave dict; expected a dict of tensors"),
        ("1 / 0", r"teachers\.big: predict fails: ZeroDivisionError"),
        ("bytearray(1 << 62)", r"the teacher runs out of memory on a single row"),
        ("torch.empty(2**50)", r"the teacher runs out of memory on a single row"),
        ("{'scores': torch.zeros(1, 3)}", "the teacher gave no output 'logits'; it gave scores"),
        ("{'logits': torch.zeros(7, 3)}", r"the teacher's logits have shape \[7, 3\]; expected \[64, 3\]"),
        (ANSWER + " | {'covered': torch.zeros(2)}", None),
    ],
)
def test_a_teacher_that_answers_something_else(folder, capsys, answer, message):
    write_own(folder, answer)
    change(folder, {"big": own("Mine")})
    if message is None:  # it does not abstain: what it covers is not asked
        assert run(["cache-teacher"]) == 0
        return
    refuses(folder, capsys, message, "cache-teacher")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("{'logits': columns['features'][:, :3]}", r"predict gave dict; expected .* \(found logits: ndarray\)"),
        ("1 / 0", r"teachers\.big: predict fails: ZeroDivisionError"),
        ("torch.empty(2**50)", r"the teacher runs out of memory on a single row"),
        ("{'scores': torch.zeros(2, 3)}", r"teachers\.big: the teacher gave no output 'logits'; it gave scores"),
        (
            "{'logits': torch.zeros(1, 3)}",
            r"teachers\.big: the teacher's logits have shape \[1, 3\]; expected \[2, 3\]",
        ),
        (
            "{'logits': torch.from_numpy(columns['features'][:, :3]).softmax(-1)}",
            r"teachers\.big: .* are numbers from 0 to 1 with a sum of 1",
        ),
    ],
)
def test_check_asks_a_teacher_of_ones_own(folder, capsys, answer, message):
    write_own(folder, answer)
    change(folder, {"big": own("Mine")})
    refuses(folder, capsys, message, "check")


def test_check_asks_nobody_whose_parts_have_to_learn(folder, capsys):
    write_own(folder, "1 / 0")
    (folder / "parts.py").write_text(
        "from own import Mine\n\n\ndef of(teacher_of, part):\n    teacher_of(part)\n    return Mine()\n"
    )
    train = {"split": "train", "epochs": 1, "batch_size": 16, "learning_rate": 0.01}
    small = {"model": LINEAR, "preprocess": GIVEN, "train": train}
    change(folder, {"big": {"teacher": {"factory": "parts.py:of", "part": "small"}}, "small": small})
    assert run(["check"]) == 0


def test_a_teacher_of_ones_own_that_runs_out_of_memory_says_the_same(folder, capsys):
    write_own(folder)
    change(folder, {"big": own("Mine")})
    assert run(["cache-teacher"]) == 0
    assert "memory" not in capsys.readouterr().err
    first = TargetStore.open(folder / "data" / "targets" / "big")
    whole = first.targets(first.sample_ids)
    write_own(folder, f"{ANSWER} if len(columns['features']) <= 20 else torch.empty(2**50)")
    assert run(["cache-teacher"]) == 0
    assert "s of teacher, 16 rows at a time as memory ran out; store of 150 rows" in capsys.readouterr().err
    store = TargetStore.open(folder / "data" / "targets" / "big")
    assert {record.batch_size for record in store.records.values()} == {16}
    assert torch.equal(store.targets(first.sample_ids).values, whole.values)


KEPT = {
    "well": "ids, head",
    "in another order": "ids.flip(-1), head.flip(-1)",
    "of a class twice": "ids * 0, head",
    "of a class that is none": "ids + 1, head",
    "of NaN": "ids, head * torch.nan",
    "of too much": "ids, head + 1",
}


@pytest.mark.parametrize("kept", KEPT)
def test_most_probable_classes_that_are_not_well_put(folder, capsys, kept):
    write_own(folder, f"best(*kept(columns), lambda ids, head: ({KEPT[kept]}))")
    (folder / "own.py").write_text(
        (folder / "own.py").read_text()
        + "\n\nclass Best(Mine):\n    num_kept = 2\n\n\n"
        + "def kept(columns):\n    log_probs = torch.from_numpy(columns['features'][:, :3]).log_softmax(dim=1)\n"
        + "    ids = torch.tensor([[1, 2]]).expand(len(log_probs), 2)\n"
        + "    return ids, log_probs[:, 1:].double(), log_probs[:, 0].double()\n\n\n"
        + "def best(ids, head, tail, change):\n    ids, head = change(ids, head)\n"
        + "    return {'class_ids': ids, 'log_probs': head, 'tail_log_mass': tail}\n"
    )
    change(folder, {"big": own("Best")}, encoding="topk", k=2)
    if kept == "well":
        assert run(["check"]) == 0
        assert run(["cache-teacher"]) == 0
        change(folder, {"big": own("Best")}, encoding="int8")
        refuses(folder, capsys, r"temperatures: \[1\] \(found encoding: int8\)$", "check", "cache-teacher")
        change(folder, {"big": own("Best")}, encoding="topk", k=1)
        refuses(folder, capsys, "k is 1, and the teacher gives 2 classes; give both", "check", "cache-teacher")
        return
    ids = kept in ("in another order", "of a class twice", "of a class that is none")
    what = "class ids are not ascending numbers of classes" if ids else "log-probs and tail have another mass than 1"
    refuses(folder, capsys, f"the teacher's {what} for .* such as", "cache-teacher")


def test_logits_of_another_number_of_axes_than_the_students(folder, capsys):
    (folder / "mine.py").write_text(SPEAK.replace("[:, :3]", "[:, None, :3]"))
    message = r"the teacher 'big' gives logits of shape \[1, 3\] for a row, the student \[3\]; expected both alike"
    change(folder, {"big": FUNCTION})
    refuses(folder, capsys, message, "check")
    assert run(["cache-teacher"]) == 0
    refuses(folder, capsys, r"the teacher 'big' gives logits of shape \[1, 3\] for a row", "evaluate")


def test_outputs_that_a_teacher_does_not_give(folder, capsys):
    change(folder, {"big": FUNCTION}, outputs=["logits", "hidden"])
    message = r"targets\.big\.outputs: .*FunctionTeacher gives no 'hidden'; it gives \['logits'\]"
    refuses(folder, capsys, message, "check", "cache-teacher")
    write_network(folder / "a.onnx", 1, 2, 3)
    change(folder, {"big": ONNX}, outputs=["logits", "hidden"])
    refuses(folder, capsys, r"a\.onnx has no output 'hidden'; it has logits", "check", "cache-teacher")


def test_outputs_that_are_not_asked_for_are_not_stored(folder):
    """Rules upon a teacher whose features are stored: theirs are not."""
    mlp = {"factory": "kdpipe.models.mlp:MLP", "hidden": [4]}
    rules = [{"name": "small", "when": {"column": "petal length", "below": 2.5}, "label": 0}]
    factory = "kdpipe.teachers.rules:ConstrainedTeacher"
    teachers = {
        "net": {"model": mlp, "train": {"epochs": 1}},
        "big": {"teacher": {"factory": factory, "teacher": "net", "rules": rules}},
    }
    change(folder, teachers)
    value = yaml.safe_load((folder / "params.yaml").read_text())
    value["targets"]["net"] = {"outputs": ["logits", "layers.0"]}
    write_params(folder, value)
    assert run(["train-teacher", "net"]) == 0
    project = project_in(folder)
    inputs = PreparedData(project.prepared).inputs
    assert [each.name for each in build_teacher(project, "net", inputs)[0].outputs] == ["logits", "layers.0"]
    assert [each.name for each in build_teacher(project, "big", inputs)[0].outputs] == ["logits"]
    assert run(["cache-teacher", "big"]) == 0


# Teachers made of others


def ensemble(*members):
    return {"teacher": {"factory": "kdpipe.teachers.ensemble:Ensemble", "members": list(members)}}


NET = {"model": LINEAR, "train": {"epochs": 1}}


@pytest.mark.parametrize(
    ("teachers", "message", "commands"),
    [
        ({"big": ensemble("big")}, r"teachers\.big: it is made of itself: big of big", None),
        ({"big": ensemble("other"), "other": ensemble("big")}, "big: it is made of itself: big of other of big", None),
        ({"big": ensemble("net", "nobody"), "net": NET}, "there is no teacher 'nobody'", ("check",)),
        (
            {"big": ensemble("said"), "said": {"table": "said.parquet"}},
            "there is no model to show",
            ("cache-teacher big",),
        ),
        ({"big": ensemble()}, "members is empty", None),
        (
            {"big": ensemble("net", "forest"), "net": NET, "forest": FOREST},
            r"there is no trained model in .*net\. Run `kdpipe train-teacher net`",
            ("cache-teacher big",),
        ),
    ],
)
def test_a_teacher_made_of_others_that_cannot_be(folder, capsys, teachers, message, commands):
    change(folder, teachers)
    refuses(folder, capsys, message, *(commands or ("check", "cache-teacher big")))


def test_an_ensemble_is_checked_before_its_members_are_trained(folder, capsys):
    change(folder, {"big": ensemble("net", "forest"), "net": NET, "forest": FOREST})
    assert run(["check"]) == 0
    assert run(["train-teacher"]) == 0
    assert run(["cache-teacher", "big"]) == 0
    shutil.rmtree(folder / "data" / "models" / "teachers" / "forest")
    refuses(folder, capsys, "Run `kdpipe train-teacher forest`", "cache-teacher big")


def test_rules_are_checked_before_any_work(folder, capsys):
    (folder / "rules.yaml").write_text("- {name: small, when: {column: petal lenght, below: 2.5}, label: 0}\n")
    rules = {"factory": "kdpipe.teachers.rules:RulesTeacher", "rules": "rules.yaml"}
    change(folder, {"big": {"teacher": rules}})
    refuses(folder, capsys, "rule 1 .*there is no column 'petal lenght'", "check", "cache-teacher")
    fitted = {"big": {"teacher": {**rules, "combine": "label_model"}}}
    (folder / "rules.yaml").write_text(
        "".join(f"- {{name: r{n}, when: {{column: petal length, above: {n}}}, label: {n % 3}}}\n" for n in range(1, 4))
    )
    change(folder, fitted)
    refuses(
        folder, capsys, "a label model must see rows first: give the teacher `fit_on: SPLIT`", "check", "cache-teacher"
    )


# Servers


@pytest.fixture
def served(tmp_path, monkeypatch, tmp_path_factory):
    """Prepared documents, and a teacher behind a real server; the current folder."""
    monkeypatch.chdir(tmp_path)
    with running(tmp_path_factory.mktemp("server")) as process:
        sections = {
            "data": write_texts(tmp_path, [f"{number} fine films" for number in range(24)]),
            "task": {"factory": "kdpipe.tasks.language:LanguageModelling", "block_tokens": 8},
        }
        targets = {"encoding": "topk", "k": 4, "shard_rows": 8, "batch_size": 4}

        def build(server=MappingProxyType({}), runtime=None, **settings):
            factory = "kdpipe.teachers.server:ServedLanguageModel"
            teacher = {"factory": factory, "model": "toy"}
            runtime = runtime or {"server": process.settings(**{"retries": 1, "at_once": 1, **server})}
            student = {"model": {"factory": "kdpipe.models.pretrained:causal_lm", "config": GPT2}}
            big = {"teacher": teacher, "runtime": runtime}
            write(tmp_path, sections, {"big": big}, student, targets | settings)

        build()
        assert run(["prepare-data"]) == 0
        yield process, build


def test_a_server_that_dies_in_the_middle_and_comes_back(served, tmp_path, capsys):
    server, build = served
    asked = len(PreparedData(tmp_path / "data" / "prepared").inputs)
    assert asked > 40
    server.behave(dies_after=30)
    refuses(tmp_path, capsys, r"does not answer .* What was committed stays: start the server", "cache-teacher")
    server.behave()
    server.start()
    server.folder.joinpath("requests.log").unlink()
    before = {each.name for each in (tmp_path / "data" / ".work").rglob("commits/*.json")}
    assert 2 <= len(before) <= 3
    build()
    assert project_in(tmp_path).params.teachers["big"].runtime["server"]["url"] == server.url, "at another port"
    assert run(["cache-teacher"]) == 0
    assert len(server.requests) == 1 + asked - 8 * len(before), "the probe, and the rows of other shards"
    store = TargetStore.open(tmp_path / "data" / "targets" / "big")
    project = project_in(tmp_path)
    inputs = PreparedData(project.prepared).inputs
    rows = inputs.read(np.arange(len(inputs)))
    targets = store.targets(inputs.sample_ids.tolist())
    best = np.take_along_axis(targets.ids.numpy(), targets.head.numpy().argmax(-1)[..., np.newaxis], -1)[..., 0]
    server.start()
    build()
    assert open_checked_store(project_in(tmp_path), "big").path == store.path, "the student does not mind either"
    assert np.array_equal(best[rows["counted"]], (3 * rows["tokens"][:, :-1] + 1)[rows["counted"]] % 257)


def test_a_server_that_cannot_be_asked(served, tmp_path, capsys):
    server, build = served
    build(encoding="dense", k=None)
    refuses(tmp_path, capsys, "set encoding: topk and k", "check", "cache-teacher")
    build(k=150)
    server.behave(at_most=20)
    refuses(tmp_path, capsys, r"gives 2[01] tokens where 150 were asked; lower k", "check", "cache-teacher")
    server.behave()
    build(temperatures=[1, 2])
    message = (
        r"temperature 1 only; store them with encoding: topk and temperatures: \[1\] "
        r"\(found encoding: topk and temperatures: \[1, 2\]\)$"
    )
    refuses(tmp_path, capsys, message, "check", "cache-teacher")
    server.stop()
    build()
    refuses(tmp_path, capsys, "does not answer", "check", "cache-teacher")


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"retrys": 3}, r"runtime\.server\.retrys: unknown key \(the keys here are .*\); did you mean 'retries'\?"),
        ({"at_once": 0}, r"runtime\.server\.at_once: Input should be greater than 0 \(found 0\)"),
        ({"at_once": "8"}, r'runtime\.server\.at_once: expected a whole number \(found "8"\)'),
        ({"url": None}, r"runtime\.server\.url: expected text \(found null\)"),
    ],
)
def test_a_wrong_key_of_a_server_is_named(served, tmp_path, capsys, server, message):
    _, build = served
    build(server=server)
    refuses(tmp_path, capsys, r"teachers\.big\." + message, "check", "cache-teacher")


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"server": "http://gpu-box"}, r'runtime\.server: expected a mapping \(found "http://gpu-box"\)'),
        ({"server": {}}, r"runtime\.server\.url: missing"),
        ({"sever": {}}, r"runtime\.sever: .* does not take it; it takes .*; did you mean 'server'\?"),
    ],
)
def test_a_wrong_runtime_is_named(served, tmp_path, capsys, runtime, message):
    _, build = served
    build(runtime=runtime)
    refuses(tmp_path, capsys, r"teachers\.big\." + message, "check", "cache-teacher")


@pytest.mark.parametrize("behaviour", [{"hangs_after": 30}, {"busy_after": 30, "retry_after": "1000"}])
def test_ctrl_c_ends_a_capture_that_waits_for_a_server(served, tmp_path, behaviour):
    server, build = served
    build(server={"at_once": 4})
    server.behave(**behaviour)
    (server.folder / "requests.log").write_text("")
    # A shell's background jobs are born ignoring Ctrl-C.
    code = "from signal import *; signal(SIGINT, default_int_handler); from kdpipe_stages.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, "cache-teacher"], stderr=subprocess.PIPE, text=True) as child:
        try:
            while child.poll() is None and len(server.requests) < 31:
                time.sleep(0.01)
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=5)
        finally:
            child.kill()
    assert child.returncode == 1
    assert "error: interrupted" in said
    before = list((tmp_path / "data" / ".work").rglob("commits/*.json"))
    assert before
    server.behave()
    (server.folder / "requests.log").write_text("")
    assert run(["cache-teacher"]) == 0
    assert len(server.requests) == 1 + len(PreparedData(tmp_path / "data" / "prepared").inputs) - 8 * len(before)


def test_classes_of_a_server_that_do_not_fit(folder, capsys, tmp_path_factory):
    with running(tmp_path_factory.mktemp("server")) as server:
        factory = "kdpipe.teachers.server:ServedClassifier"
        teacher = {"factory": factory, "model": "toy", "prompt": "{petal}", "answers": CLASSES}
        runtime = {"server": server.settings()}
        change(folder, {"big": {"teacher": teacher, "runtime": runtime}})
        refuses(
            folder, capsys, r"answers are \[' bad', ' good'\]; expected 3 different texts", "check", "cache-teacher"
        )
        change(folder, {"big": {"teacher": {**teacher, "answers": [*CLASSES, " fair"]}, "runtime": runtime}})
        refuses(
            folder, capsys, r"prompt: 'petal' in '\{petal\}'; the columns are sepal length", "check", "cache-teacher"
        )


# Files of another teacher than the store's


RULED = """
- {name: long, when: {column: petal length, above: 4.8}, label: 2, weight: WEIGHT}
- {name: mine, function: "speaks.py:vote", weight: 1}
"""
MODULE = """
import torch

from helper import WIDE


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(inputs)
"""
VOTE = """
import numpy as np


def vote(columns):
    return np.where(columns['petal width'] < 1, 0, -1)
"""


def other_weights(path):
    drawn = torch.from_numpy(np.random.default_rng().random((3, 5), np.float32))
    save_file({"head.weight": drawn[:, :4].contiguous(), "head.bias": drawn[:, 4].contiguous()}, path)


def other_text(text):
    return lambda path: path.write_text(text)


OTHERS = {
    "weights": (WEIGHTS, "a.safetensors", other_weights),
    "onnx": (ONNX, "a.onnx", lambda path: write_network(path, *np.random.default_rng().normal(size=3))),
    "skops": (READY, "a.skops", None),
    "function": (FUNCTION, "mine.py", other_text(SPEAK + "# and more\n")),
    "rules": (
        {"teacher": {"factory": "kdpipe.teachers.rules:RulesTeacher", "rules": "rules.yaml"}},
        "rules.yaml",
        other_text(RULED.replace("WEIGHT", "3")),
    ),
    "rule's function": (
        {"teacher": {"factory": "kdpipe.teachers.rules:RulesTeacher", "rules": "rules.yaml"}},
        "speaks.py",
        other_text(VOTE.replace("< 1", "< 0.9")),
    ),
    "module": (
        {"model": {"factory": "net.py:Net"}, "weights": "a.safetensors", "preprocess": GIVEN},
        "net.py",
        other_text(MODULE + "# and more\n"),
    ),
    "module's helper": (
        {"model": {"factory": "net.py:Net"}, "weights": "a.safetensors", "preprocess": GIVEN},
        "helper.py",
        other_text("WIDE = 2\n"),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_store_of_another_file_is_told_without_the_teacher(folder, capsys, kind):
    """Of the file in another place nothing is said; put back, or cached anew, it is the teacher's."""
    teacher, name, write_another = OTHERS[kind]
    other_weights(folder / "a.safetensors")
    write_network(folder / "a.onnx", 1, 2, 3)
    (folder / "a.skops").write_bytes(dumps(LogisticRegression(max_iter=200).fit(INPUTS, LABELS)))
    (folder / "rules.yaml").write_text(RULED.replace("WEIGHT", "2"))
    for file, text in {"speaks.py": VOTE, "net.py": MODULE, "helper.py": "WIDE = 1\n"}.items():
        (folder / file).write_text(text)
    change(folder, {"big": teacher})
    assert run(["cache-teacher"]) == 0
    earlier = (folder / name).read_bytes()
    if write_another is None:
        (folder / name).write_bytes(dumps(LogisticRegression(max_iter=200, C=0.1).fit(INPUTS, LABELS)))
    else:
        write_another(folder / name)
    settles = "run `kdpipe train-teacher` and `kdpipe cache-teacher big`"
    message = rf"was made from another \S+{re.escape(name)} than today's, of .*{settles}"
    refuses(folder, capsys, message, "train-student")
    another = (folder / name).read_bytes()
    (folder / name).write_bytes(earlier)
    project = project_in(folder)
    open_checked_store(project, "big")
    (folder / name).unlink()
    open_checked_store(project, "big")
    (folder / name).write_bytes(another)
    for module in ("helper",):
        sys.modules.pop(module, None)
    assert run(["cache-teacher"]) == 0
    open_checked_store(project, "big")


def test_a_file_that_says_the_same_in_other_bytes_needs_no_pass(folder, capsys):
    (folder / "rules.yaml").write_text(RULED.replace("WEIGHT", "2"))
    (folder / "speaks.py").write_text(VOTE)
    change(folder, {"big": {"teacher": {"factory": "kdpipe.teachers.rules:RulesTeacher", "rules": "rules.yaml"}}})
    assert run(["cache-teacher"]) == 0
    (folder / "rules.yaml").write_text("# my rules" + RULED.replace("WEIGHT", "2"))
    refuses(folder, capsys, "rules.yaml", "train-student")
    assert run(["cache-teacher"]) == 0
    assert "0 rows computed" in capsys.readouterr().err
    open_checked_store(project_in(folder), "big")


def refuses_until_cached(folder, capsys, name):
    refuses(folder, capsys, rf"was made from another \S+{re.escape(name)} than today's", "train-student")
    assert run(["cache-teacher"]) == 0
    open_checked_store(project_in(folder), "big")


@pytest.mark.parametrize("kind", ["Ensemble", "ConstrainedTeacher"])
def test_a_store_of_another_members_file_is_told(folder, capsys, kind):
    (folder / "rules.yaml").write_text(RULED.replace("WEIGHT", "2"))
    (folder / "speaks.py").write_text(VOTE)
    other_weights(folder / "a.safetensors")
    arguments = {
        "Ensemble": {"factory": "kdpipe.teachers.ensemble:Ensemble", "members": ["lin", "fn"]},
        "ConstrainedTeacher": {
            "factory": "kdpipe.teachers.rules:ConstrainedTeacher",
            "teacher": "lin",
            "rules": "rules.yaml",
        },
    }[kind]
    change(folder, {"lin": WEIGHTS, "fn": FUNCTION, "big": {"teacher": arguments}})
    assert run(["cache-teacher"]) == 0
    other_weights(folder / "a.safetensors")
    refuses_until_cached(folder, capsys, "a.safetensors")


def test_a_store_of_other_settings_of_a_member_is_told(folder, capsys):
    """Its factory's, and how it was trained, as if the teacher had been named directly."""
    train = {"epochs": 1, "batch_size": 32, "learning_rate": 0.01}
    members = {"lin": {"model": LINEAR, "train": train}, "fn": FUNCTION, "inner": ensemble("lin")}
    change(folder, {**members, "big": ensemble("inner", "fn")})
    for command in ("train-teacher", "cache-teacher"):
        assert run([command]) == 0
    changed = {"model": LINEAR, "train": {**train, "epochs": 2}}
    change(folder, {**members, "lin": changed, "big": ensemble("inner", "fn")})
    message = r"made from other settings: members\.lin\.train\.epochs was 1, params\.yaml says 2"
    refuses(folder, capsys, message, "train-student")
    for command in ("train-teacher", "cache-teacher"):
        assert run([command]) == 0
    open_checked_store(project_in(folder), "big")


def test_a_store_of_other_weights_beside_the_file_is_told(folder, capsys):
    write_network(folder / "a.onnx", 1, 2, 3, beside="a.data")
    change(folder, {"big": ONNX})
    assert run(["cache-teacher"]) == 0
    then = (folder / "a.onnx").read_bytes()
    write_network(folder / "a.onnx", 3, 2, 1, beside="a.data")
    assert (folder / "a.onnx").read_bytes() == then
    refuses_until_cached(folder, capsys, "a.data")


@pytest.mark.parametrize("how", ["trained", "fitted"])
def test_a_store_of_what_was_learnt_before_is_told(folder, capsys, how):
    """New labels: learnt again, and not asked again yet."""
    train = {"epochs": 1, "batch_size": 32, "learning_rate": 0.01}
    change(folder, {"big": FOREST if how == "fitted" else {"model": LINEAR, "train": train}})
    for command in ("train-teacher", "cache-teacher"):
        assert run([command]) == 0
    table = pyarrow.csv.read_csv(folder / "rows.csv")
    flipped = pa.array([2 - each for each in table["label"].to_pylist()])
    flipped = table.set_column(table.schema.get_field_index("label"), "label", flipped)
    pyarrow.csv.write_csv(flipped, folder / "rows.csv")
    for command in ("prepare-data", "train-teacher"):
        assert run([command]) == 0
    refuses_until_cached(folder, capsys, "model.safetensors" if how == "trained" else "estimator.skops")


def test_a_store_knows_each_file_of_a_checkpoint(texts, tmp_path, capsys):
    """A card that is written, weights that are fetched later; but not other weights."""
    checkpoint = tmp_path / "bert"
    texts(BERT_TEACHER)
    assert run(["cache-teacher"]) == 0
    for name in ("README.md", "training_args.bin"):
        (checkpoint / name).write_text("how it came to be")
    open_checked_store(project_in(tmp_path), "big")
    assert run(["cache-teacher"]) == 0
    assert "complete already" in capsys.readouterr().err.splitlines()[-1]
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    open_checked_store(project_in(tmp_path), "big")
    weights.write_bytes(content)
    (checkpoint / "adapter.safetensors").write_bytes(content)
    refuses(tmp_path, capsys, r"was made without \S+bert/adapter\.safetensors, which", "train-student")
    (checkpoint / "adapter.safetensors").unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuses(tmp_path, capsys, r"was made from another \S+bert/model\.safetensors than today's", "train-student")


def test_of_a_package_what_is_imported_counts(folder, capsys):
    (folder / "helpers").mkdir()
    (folder / "helpers" / "__init__.py").write_text("")
    (folder / "helpers" / "scaling.py").write_text("FACTOR = 2\n")
    code = SPEAK.replace("import numpy as np\n", "from helpers.scaling import FACTOR\n")
    (folder / "mine.py").write_text(code.replace(":3]", ":3] * FACTOR"))
    assert run(["cache-teacher"]) == 0
    (folder / "helpers" / "students.py").write_text("WIDTH = 8\n")
    open_checked_store(project_in(folder), "big")
    (folder / "helpers" / "scaling.py").write_text("FACTOR = 3\n")
    refuses(folder, capsys, r"was made from another \S+helpers/scaling\.py than today's", "train-student")


def test_words_are_no_folders(folder, capsys):
    """A folder that is called like a setting's value has nothing to do with the teacher."""
    estimator = {"factory": "sklearn.linear_model:LogisticRegression", "solver": "lbfgs", "max_iter": 200}
    (folder / "lbfgs").mkdir()
    change(folder, {"big": {"teacher": {"factory": SKLEARN, "estimator": estimator}, "fit_on": "train"}})
    for command in ("train-teacher", "cache-teacher"):
        assert run([command]) == 0
    (folder / "lbfgs" / "notes.txt").write_text("new")
    open_checked_store(project_in(folder), "big")


def test_a_store_with_files_is_of_todays_settings_for_the_work_area(folder, capsys):
    shutil.rmtree(folder / "data" / "targets")
    capsys.readouterr()
    assert run(["gc"]) == 0
    assert "current" in capsys.readouterr().out


def test_a_prompt_of_any_length_and_script_is_no_path(served, tmp_path):
    server, _ = served
    long = {"factory": "kdpipe.teachers.server:ServedClassifier", "prompt": "这是一个很长的提示。/" * 60 + "{text}"}
    texts = [f"text number {number}!" for number in range(20)]
    sections = {
        "data": write_texts(tmp_path, texts, label=[0, 1] * 10),
        "task": {"factory": "kdpipe.tasks.text:TextClassification", "num_classes": 2, "column": "text"},
    }
    teacher = {"teacher": {**long, "model": "toy", "answers": CLASSES}, "runtime": {"server": server.settings()}}
    student = {"model": {"factory": "kdpipe.models.lstm:LSTM", "width": 4, "hidden": 4}}
    project = write(tmp_path, sections, {"big": teacher}, student)
    assert run(["prepare-data", "--params", str(project.root / "params.yaml")]) == 0
    assert run(["cache-teacher", "--params", str(project.root / "params.yaml")]) == 0
    open_checked_store(project, "big")


def test_the_installed_library_is_no_file_of_the_project(folder):
    """Though it may lie below the project's folder, as in its own repository."""
    assert files_of(Project(REPOSITORY / "params.yaml"), "big", {"sources": {"kdpipe": "0.1.0"}}).keys() <= {
        "data/models/teachers/big/model.safetensors"
    }
