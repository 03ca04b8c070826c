"""Every teacher passes the contract that users run on their own; of each of its tests, a teacher that fails there.

`teachers.<name>.table` is no `Teacher`: it cannot be shown rows. tests/stages/test_tables.py is about it.
"""

from __future__ import annotations

import inspect
import io
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

from completions_server import CLASSES, VOCABULARY, Process, running
from kdpipe.config import Factory, parse, resolve
from kdpipe.errors import TeacherError
from kdpipe.huggingface import quietly
from kdpipe.models.mlp import MLP
from kdpipe.models.pretrained import causal_lm, image_classifier
from kdpipe.models.transformer import Transformer
from kdpipe.preprocess import ImageTensor, PretrainedTokenizer, Standardize, Tokenizer
from kdpipe.preprocess.tokens import TokenIds
from kdpipe.skops_files import dumps
from kdpipe.targets import OutputSpec
from kdpipe.tasks.image import ImageClassification
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.tasks.text import TextClassification
from kdpipe.teachers.ensemble import Ensemble, FunctionTeacher
from kdpipe.teachers.onnx import OnnxTeacher
from kdpipe.teachers.pretrained import PretrainedTeacher
from kdpipe.teachers.rules import ConstrainedTeacher, RulesTeacher
from kdpipe.teachers.server import ServedClassifier, ServedLanguageModel
from kdpipe.teachers.sklearn import SklearnTeacher
from kdpipe.teachers.torch import TorchTeacher
from kdpipe.testing import LearnerContract, TeacherContract
from kdpipe_stages.params import TargetsSection, TeacherSection
from projects import REPOSITORY
from toy_text import save_bert, save_tokenizer

FEATURES = np.random.default_rng(0).normal(3, 2, (12, 4)).astype(np.float32)
LABELS = (FEATURES[:, 0] > 3).astype(np.int64) + (FEATURES[:, 1] > 3)
NUMBERS = TabularClassification(num_classes=3, columns=["a", "b", "c", "d"])
TEXTS = ["a fine film", "", "not fine at all, a film of 300 minutes", "电影很好看", "so so " * 30]


def first(columns):
    return {
        name: column[:1] if isinstance(column, np.ndarray) else column.take(np.arange(1))
        for name, column in columns.items()
    }


def fitted(preprocess, columns):
    preprocess.fit([columns])
    return preprocess


def seeded(seed, make):
    torch.manual_seed(seed)
    return make()


class OfNumbers(TeacherContract):
    """Of a table of numbers."""

    def columns(self):
        return {"features": FEATURES.copy()}

    @property
    def preprocess(self):
        return fitted(Standardize(), self.columns())

    def module(self, model, num_classes=3, outputs=("logits",), **settings):
        probe = first(self.columns())
        identity = {"weights": [each.flatten().tolist() for each in model.state_dict().values()]}
        return TorchTeacher(model, self.preprocess, num_classes, identity, probe, outputs, **settings)


class TestModule(OfNumbers):
    def teacher(self, folder):
        return self.module(seeded(0, lambda: MLP(input_shape=(4,), num_classes=3, hidden=[5])))

    def another(self, folder):
        return self.module(seeded(1, lambda: MLP(input_shape=(4,), num_classes=3, hidden=[5])))


class TestModuleWithFeatures(OfNumbers):
    def of(self, seed):
        layers = seeded(seed, lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
        return self.module(layers, outputs=["1", "logits"])

    def teacher(self, folder):
        return self.of(0)

    def another(self, folder):
        return self.of(1)


class TestSigmoidHead(OfNumbers):
    def teacher(self, folder):
        return self.module(seeded(0, lambda: nn.Linear(4, 1)), num_classes=2)

    def another(self, folder):
        return self.module(seeded(1, lambda: nn.Linear(4, 1)), num_classes=2)


class Shy(nn.Linear):
    """Says nothing of rows that begin with a small number: NaN."""

    def forward(self, inputs):
        logits, covered = super().forward(inputs), inputs[:, 0] > 0
        return {"logits": logits.masked_fill(~covered.unsqueeze(-1), torch.nan), "covered": covered}


class TestModuleThatAbstains(OfNumbers):
    def teacher(self, folder):
        return self.module(seeded(0, lambda: Shy(4, 3)))

    def another(self, folder):
        return self.module(seeded(1, lambda: Shy(4, 3)))


class TestImagesOfSeveralSizes(TeacherContract):
    def columns(self):
        files = []
        for row in range(5):
            file = io.BytesIO()
            noise = np.random.default_rng(row).integers(0, 256, (4 + row, 9 - row, 3), np.uint8)
            Image.fromarray(noise).save(file, "PNG")
            files.append(file.getvalue())
        return ImageClassification(3, keep_encoded=True).to_inputs(pa.record_batch({"image": files}), str)

    def of(self, seed):
        columns = self.columns()
        model = seeded(seed, lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        preprocess = fitted(ImageTensor(size=(6, 6)), columns)
        identity = {"weights": model[0].weight.flatten().tolist()}
        return TorchTeacher(model, preprocess, 3, identity, first(columns))

    def teacher(self, folder):
        return self.of(0)

    def another(self, folder):
        return self.of(1)


class TestTransformerOfPairs(TeacherContract):
    """Its batches are as long as their longest row."""

    def columns(self):
        task = TextClassification(3, pair_column="pair")
        return task.to_inputs(pa.record_batch({"text": TEXTS, "pair": TEXTS[1:] + TEXTS[:1]}), str)

    def of(self, seed):
        columns = self.columns()
        preprocess = fitted(Tokenizer(vocab_size=300, max_length=48, token_type_ids=False), columns)
        model = seeded(seed, lambda: Transformer(num_classes=3, width=16, heads=2, layers=1, **preprocess.offers))
        return TorchTeacher(model, preprocess, 3, {"seed": seed}, first(columns))

    def teacher(self, folder):
        return self.of(0)

    def another(self, folder):
        return self.of(1)


class TestCheckpoint(TeacherContract):
    """A folder of Hugging Face Transformers."""

    def columns(self):
        return TextClassification(3).to_inputs(pa.record_batch({"text": TEXTS}), str)

    def of(self, folder, seed):
        save_tokenizer(save_bert(folder / "bert", seed=seed))
        preprocess = PretrainedTokenizer(path=folder / "bert", max_length=24)
        return PretrainedTeacher(3, preprocess, first(self.columns()), path=folder / "bert")

    def teacher(self, folder):
        return self.of(folder, 0)

    def another(self, folder):
        return self.of(folder, 1)


VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 3,
}


class TestCheckpointOfImages(TestImagesOfSeveralSizes):
    def of(self, folder, seed):
        torch.manual_seed(seed)
        model = image_classifier(3, config=VIT, input_shape=(3, 6, 6))
        with quietly():
            model.save_pretrained(folder / "vit")
        preprocess = fitted(ImageTensor(size=(6, 6)), self.columns())
        probe = first(self.columns())
        return PretrainedTeacher(3, preprocess, probe, path=folder / "vit", auto="image_classification")

    def teacher(self, folder):
        return self.of(folder, 0)

    def another(self, folder):
        return self.of(folder, 1)


class OfTokens(TeacherContract):
    """Of blocks of 6 tokens, of which some do not count."""

    def columns(self):
        random = np.random.default_rng(0)
        tokens = random.integers(0, 250, (5, 7)).astype(np.int32)
        return {"tokens": tokens, "counted": random.random((5, 6)) < 0.7}


class Reader(nn.Module):
    """What it says at a token depends on all tokens before it."""

    def __init__(self, num_classes):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 8)
        self.state = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, input_ids):
        states, last = self.state(self.embedding(input_ids))
        return {"scores": self.head(states), "states": states, "last": last.transpose(0, 1)}


class TestLanguageModelWithFeatures(OfTokens):
    def of(self, seed):
        preprocess, model = TokenIds(VOCABULARY, 6), seeded(seed, lambda: Reader(VOCABULARY))
        outputs = ["logits", "states", "last"]
        return TorchTeacher(
            model, preprocess, VOCABULARY, {"seed": seed}, first(self.columns()), outputs, logits="scores"
        )

    def teacher(self, folder):
        return self.of(0)

    def another(self, folder):
        return self.of(1)


class TestCheckpointOfTokens(OfTokens):
    def of(self, folder, seed):
        torch.manual_seed(seed)
        model = causal_lm(VOCABULARY, config={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2})
        with quietly():
            model.save_pretrained(folder / "gpt2")
        preprocess, probe = TokenIds(VOCABULARY, 6), first(self.columns())
        return PretrainedTeacher(VOCABULARY, preprocess, probe, path=folder / "gpt2", auto="causal_lm")

    def teacher(self, folder):
        return self.of(folder, 0)

    def another(self, folder):
        return self.of(folder, 1)


class TestOnnx(OfNumbers):
    def of(self, folder, scale, **settings):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"]),
            helper.make_node("Relu", ["x"], ["hidden"]),
        ]
        weights = numpy_helper.from_array(scale * np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32), "w")
        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])]
        names = ("logits", "probabilities", "hidden")
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        graph = helper.make_graph(nodes, "net", given, results, [weights])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, folder / "net.onnx")
        return OnnxTeacher(folder / "net.onnx", 3, self.preprocess, first(self.columns()), **settings)

    def teacher(self, folder):
        return self.of(folder, 1, outputs=["logits", "hidden"])

    def another(self, folder):
        return self.of(folder, 2, outputs=["logits", "hidden"])


class TestOnnxOfProbabilities(TestOnnx):
    def teacher(self, folder):
        return self.of(folder, 1, logits="probabilities", probabilities=True)

    def another(self, folder):
        return self.of(folder, 2, logits="probabilities", probabilities=True)


class TestEstimatorFittedHere(LearnerContract, OfNumbers):
    def labels(self):
        return np.where(np.arange(len(LABELS)) == 3, -1, LABELS)

    def of(self, folder, depth):
        estimator = Factory(path="sklearn.tree:DecisionTreeClassifier", arguments={"max_depth": depth})
        return SklearnTeacher(folder, 3, self.preprocess, estimator=estimator)

    def untaught(self, folder):
        return self.of(folder, 3)

    def another(self, folder):
        shallow = self.of(folder, 1)
        shallow.fit([(self.columns(), self.labels())])
        shallow.save(folder)
        shallow.load(folder)
        return shallow


class TestNeighbours(OfNumbers):
    """Ready, of classes that are not all."""

    def of(self, folder, neighbours):
        from sklearn.neighbors import KNeighborsClassifier

        estimator = KNeighborsClassifier(neighbours).fit(self.preprocess(self.columns()).numpy(), LABELS.clip(max=1))
        (folder / "a.skops").write_bytes(dumps(estimator))
        return SklearnTeacher(folder, 3, self.preprocess, path="a.skops", probe=first(self.columns()))

    def teacher(self, folder):
        return self.of(folder, 3)

    def another(self, folder):
        return self.of(folder, 5)


class TestScores(TestNeighbours):
    """`decision_function`, of classes that are not all."""

    def of(self, folder, strength):
        from sklearn.svm import LinearSVC

        estimator = LinearSVC(C=strength).fit(self.preprocess(self.columns()).numpy(), LABELS.clip(max=1))
        (folder / "a.skops").write_bytes(dumps(estimator))
        return SklearnTeacher(folder, 3, self.preprocess, path="a.skops")


RULES = [
    {"name": "small a", "when": {"column": "a", "below": 2}, "label": 0, "weight": 2},
    {"name": "large a", "when": {"column": "a", "above": 4}, "label": 1},
    {"name": "large b", "when": {"column": "b", "above": 3}, "label": 2},
]


class TestRules(OfNumbers):
    def teacher(self, folder):
        return RulesTeacher(RULES, NUMBERS, folder)

    def another(self, folder):
        return RulesTeacher([{**RULES[0], "weight": 1}, *RULES[1:]], NUMBERS, folder)


class TestLabelModel(LearnerContract, OfNumbers):
    def labels(self):
        return LABELS

    def untaught(self, folder):
        return RulesTeacher(RULES, NUMBERS, folder, combine="label_model", class_balance="labels")

    def another(self, folder):
        teacher = RulesTeacher(RULES, NUMBERS, folder, combine="label_model", class_balance=[0.1, 0.1, 0.8])
        teacher.fit([(self.columns(), self.labels())])
        return teacher


class TestRulesUponAnother(OfNumbers):
    def of(self, strength):
        return ConstrainedTeacher(TestModule().teacher(None), RULES, NUMBERS, strength)

    def teacher(self, folder):
        return self.of(1.0)

    def another(self, folder):
        return self.of(2.0)


class TestEnsemble(OfNumbers):
    members = (TestModule, TestRules)

    def of(self, folder, weights):
        made = {each.__name__: each().teacher(folder) for each in self.members}
        return Ensemble(list(made), made.__getitem__, weights)

    def teacher(self, folder):
        return self.of(folder, [1.0, 1.0])

    def another(self, folder):
        return self.of(folder, [1.0, 3.0])


class TestEnsembleOfWhoAbstains(TestEnsemble):
    members = (TestModuleThatAbstains, TestRules)


class TestFunction(OfNumbers):
    def of(self, folder, factor):
        (folder / "said.py").write_text(f"def speak(columns):\n    return columns['features'][:, :3] * {factor}\n")
        return FunctionTeacher(folder, "said.py:speak", 3, first(self.columns()))

    def teacher(self, folder):
        return self.of(folder, 1)

    def another(self, folder):
        return self.of(folder, 2)


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """A real server, in a process of its own."""
    with running(tmp_path_factory.mktemp("server")) as server:
        OfAServer.server = server
        yield


class OfAServer(TeacherContract):
    server: Process


class TestServedLanguageModel(OfTokens, OfAServer):
    def of(self, k):
        return ServedLanguageModel(VOCABULARY, k, first(self.columns()), "toy", self.server.section())

    def teacher(self, folder):
        return self.of(4)

    def another(self, folder):
        return self.of(3)


REVIEWS = np.array(["dull", "fine!", "grand!!", "what?"])


class TestServedClassifier(OfAServer):
    def columns(self):
        return {"rows": np.arange(4)}

    def of(self, prompt):
        values = SimpleNamespace(num_classes=2, column_values=lambda columns: {"text": REVIEWS[columns["rows"]]})
        return ServedClassifier(values, "toy", self.server.section(), prompt, CLASSES)

    def teacher(self, folder):
        return self.of("{text}")

    def another(self, folder):
        return self.of("{text}!")


# The contract itself


class Broken:
    """A teacher of two classes, but for one thing that is wrong with it."""

    made = 0

    def __init__(self, wrong, scale=1.0):
        Broken.made += 1
        self.wrong, self.scale, self.asked, self.number = wrong, scale, 0, Broken.made
        self.outputs = () if wrong == "no logits" else (OutputSpec(name="logits", shape=(2,)),)
        self.abstains = wrong in ("abstains in silence", "covers nothing")
        if wrong == "keeps too much":
            self.num_kept = 1

    @property
    def fingerprint(self):
        if self.wrong == "no fingerprint of its own":
            return {}
        return {"scale": self.scale, **({"number": self.number} if self.wrong == "counts itself" else {})}

    def lengths(self, columns):
        lengths = np.arange(1, 1 + len(columns["features"]))
        return lengths if self.wrong == "lengths by place" else columns["features"][:, 0].astype(np.int64).clip(min=1)

    def predict(self, columns):
        self.asked += 1
        features = columns["features"]
        logits = torch.from_numpy(features[:, :2] * self.scale)
        change = {
            "one class more": lambda: torch.from_numpy(features[:, :3] * self.scale),
            "NaN": lambda: torch.where(logits > 3, torch.nan, logits),
            "infinite": lambda: torch.where(logits > 3, torch.inf, logits),
            "no class": lambda: torch.where(logits[:, :1] > 3, -torch.inf, logits),
            "softmax": lambda: logits.softmax(-1).bfloat16().float(),
            "tires": lambda: logits / self.asked,
            "is never the same": lambda: logits * self.number,
            "normalises over the batch": lambda: logits - logits.mean(dim=0),
            "speaks by place": lambda: logits + torch.arange(len(logits)).unsqueeze(-1),
        }
        said = {"logits": change.get(self.wrong, lambda: logits)()}
        if self.wrong == "writes into rows":
            features += 1
        if self.wrong in ("covers unasked", "covers nothing"):
            said["covered"] = torch.full((len(logits),), self.wrong == "covers unasked")
        if self.wrong == "keeps too much":
            return self.kept(logits)
        return said

    @staticmethod
    def kept(logits):
        log_prob, ids = logits.log_softmax(dim=-1).max(dim=-1, keepdim=True)
        return {"class_ids": ids, "log_probs": log_prob, "tail_log_mass": log_prob[:, 0]}


class Forgetful(Broken):
    """A learner, but for one thing that is wrong with it."""

    mean = None

    @property
    def fingerprint(self):
        if self.mean is None and self.wrong != "speaks unlearnt":
            raise TeacherError("it has not learnt anything")
        return {"scale": self.scale}

    def fit(self, blocks):
        means = [columns["features"].mean() for columns, _ in blocks]
        self.mean = float(means[-1] if self.wrong == "remembers the last block" else np.mean(means))

    def save(self, folder):
        (folder / "mean").write_text(f"{self.mean}" + (f" {self.number}" if self.wrong == "signs" else ""))

    def load(self, folder):
        mean = float((folder / "mean").read_text().split()[0])
        self.mean = round(mean, 1) if self.wrong == "rounds" else mean

    def predict(self, columns):
        return {"logits": super().predict(columns)["logits"] + (self.mean or 0) * torch.tensor([0, 1])}


def broken_contract(wrong, kind=Broken):
    class TestBroken(TeacherContract if kind is Broken else LearnerContract):
        def columns(self):
            return {"features": FEATURES.copy()}

        def another(self, folder):
            if kind is Broken:
                return kind(wrong, 1 if wrong == "says the same" else 2)
            learnt = kind(wrong, 2)
            learnt.fit([(self.columns(), self.labels())])
            return learnt

        def teacher(self, folder):
            return kind(wrong) if kind is Broken else super().teacher(folder)

        def untaught(self, folder):
            return kind(wrong)

        def labels(self):
            return LABELS

    return TestBroken()


def failures(contract, folder):
    failed = set()
    for name in dir(contract):
        if name.startswith("test_"):
            (folder / name).mkdir()
            try:
                getattr(contract, name)(folder / name)
            except (Exception, pytest.fail.Exception):
                failed.add(name)
    return failed


@pytest.mark.parametrize("kind", [Broken, Forgetful])
def test_a_teacher_without_fault_fails_nowhere(tmp_path, kind):
    assert failures(broken_contract(None, kind), tmp_path) == set()


FINITE = "test_its_logits_are_finite_or_rule_a_class_out"
OTHERWISE = "test_who_says_otherwise_has_another_fingerprint"
COVERS = "test_it_tells_what_it_covers_if_and_only_if_it_abstains"
AGAIN, BY_ITSELF = "test_it_says_the_same_again", "test_a_row_is_spoken_about_by_itself"


@pytest.mark.parametrize(
    ("wrong", "tests"),
    [
        ("no logits", {"test_it_is_a_teacher"}),
        ("counts itself", {"test_its_fingerprint_is_json_and_that_of_its_like"}),
        ("no fingerprint of its own", {OTHERWISE}),
        ("says the same", {OTHERWISE}),
        ("one class more", {"test_it_says_what_it_promises"}),
        ("abstains in silence", {COVERS}),
        ("covers unasked", {COVERS}),
        ("covers nothing", {COVERS, OTHERWISE}),
        ("NaN", {FINITE}),
        ("infinite", {FINITE}),
        ("no class", {FINITE}),
        ("softmax", {"test_its_logits_are_no_probabilities"}),
        ("keeps too much", {"test_what_it_keeps_are_classes_and_their_mass"}),
        ("tires", {AGAIN, BY_ITSELF}),
        ("is never the same", {"test_its_like_says_the_same"}),
        ("normalises over the batch", {BY_ITSELF}),
        ("speaks by place", {BY_ITSELF}),
        ("lengths by place", {"test_it_tells_the_length_of_a_row_by_itself"}),
        ("writes into rows", {"test_it_leaves_the_rows_as_they_are", AGAIN, BY_ITSELF}),
    ],
)
def test_a_fault_fails_its_own_tests(tmp_path, wrong, tests):
    assert failures(broken_contract(wrong), tmp_path) == tests


@pytest.mark.parametrize(
    ("wrong", "tests"),
    [
        ("signs", {"test_the_same_rows_leave_the_same_bytes"}),
        ("rounds", {"test_it_says_what_it_said_before_it_was_saved"}),
        ("remembers the last block", {"test_it_learns_from_blocks_as_from_all_rows_at_once"}),
        ("speaks unlearnt", {"test_who_has_learnt_nothing_says_so"}),
    ],
)
def test_a_learners_fault_fails_its_own_test(tmp_path, wrong, tests):
    assert failures(broken_contract(wrong, Forgetful), tmp_path) == tests


GUIDE = (REPOSITORY / "docs" / "guides" / "teachers.md").read_text()


def test_users_run_it_on_their_own(tmp_path):
    """The guide's example, as it stands there; and one whose rows depend on their batch."""
    mine, tests = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "my_teachers.py").write_text(mine)
    (tmp_path / "centred.py").write_text(
        mine.replace("- self._centres", "- apart_from(columns) - self._centres") + APART
    )
    (tmp_path / "test_mine.py").write_text(tests)
    (tmp_path / "test_centred.py").write_text(tests.replace("my_teachers", "centred"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 25 passed" in found.stdout, found.stdout + found.stderr
    assert f"FAILED test_centred.py::TestCentres::{BY_ITSELF}" in found.stdout


APART = """

def apart_from(columns):
    return columns["features"].mean(axis=0)
"""


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL))
def test_every_kind_in_the_guide_is_spelt_right(block):
    read = yaml.safe_load(block)
    for name, section in read["teachers"].items():
        given = parse(TeacherSection, section, name)
        for factory in (given.teacher, given.preprocess):
            if factory is not None and factory.path.startswith("kdpipe."):
                takes = inspect.signature(resolve(factory.path, REPOSITORY, name)).parameters
                runtime = given.runtime or {} if factory is given.teacher else {}
                assert {*factory.arguments, *runtime} <= {*takes}
    for name, section in read.get("targets", {}).items():
        assert name in read["teachers"]
        parse(TargetsSection, section, name)
