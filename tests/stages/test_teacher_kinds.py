"""Each kind of teacher, distilled end to end on small real data: scikit-learn's tables and what it says about them.

What is stored is what the live teacher says, and the student says the same far more often than by chance.
"""

from __future__ import annotations

import re

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from completions_server import CLASSES, running
from kdpipe.data.prepared import PreparedData
from kdpipe.huggingface import quietly
from kdpipe.models.pretrained import causal_lm, image_classifier, sequence_classifier
from kdpipe.skops_files import dumps
from kdpipe.store import TargetStore
from kdpipe.targets import DenseTargets
from kdpipe_stages import cache_teacher, check, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.teachers import build_teacher
from projects import project_in, write_params
from stages.test_rules import RULES
from toy_text import BERT, SPECIAL, save_tokenizer

TRAIN = {"epochs": 15, "batch_size": 16, "learning_rate": 0.05}
LINEAR = {"factory": "kdpipe.models.linear:Linear"}
SPLITS = {"shares": {"train": 0.7, "test": 0.3}, "validation_fraction": 0.0}


def write_table(folder, name):
    """One of scikit-learn's data sets as CSV; the sections of params.yaml that read it."""
    bunch = getattr(datasets, f"load_{name}")()
    columns = [each.replace(" (cm)", "") for each in map(str, bunch.feature_names)]
    arrays = {column: bunch.data[:, index] for index, column in enumerate(columns)}
    pa.csv.write_csv(pa.table({"key": range(len(bunch.data)), **arrays, "label": bunch.target}), folder / "rows.csv")
    return {
        "data": {
            "source": {"factory": "kdpipe.data.sources:Table"},
            "path": "rows.csv",
            "columns": {"id": "key", "label": "label"},
            "splits": SPLITS,
        },
        "task": {
            "factory": "kdpipe.tasks.tabular:TabularClassification",
            "num_classes": len(bunch.target_names),
            "columns": columns,
            "class_names": None,
        },
    }


def given(name):
    """A `Standardize` of the whole data set, for teachers that are ready; and its rows and labels so."""
    bunch = getattr(datasets, f"load_{name}")()
    mean, std = bunch.data.mean(axis=0), bunch.data.std(axis=0) + 1e-6
    preprocess = {"factory": "kdpipe.preprocess:Standardize", "mean": mean.tolist(), "std": std.tolist()}
    return preprocess, ((bunch.data - mean) / std).astype(np.float32), bunch.target


def write(folder, sections, teachers, student=None, targets=None):
    """params.yaml of a student of the teacher `big`."""
    whole = {
        **sections,
        "teachers": teachers,
        "targets": {"big": {"dtype": "float32", "shard_rows": 64} if targets is None else targets},
        "student": {
            "model": LINEAR,
            "losses": [{"factory": "kdpipe.losses:ForwardKL", "teacher": "big", "temperature": 1}],
            "label_weight": 0,
            "train": TRAIN,
            "baselines": [],
            **(student or {}),
        },
    }
    write_params(folder, whole)
    return project_in(folder)


def distil(project):
    """Every stage; the metrics."""
    prepare_data.run(project)
    check.run(project)
    for name in project.params.teachers:
        train_teacher.run(project, name)
    cache_teacher.run(project, "big")
    train_student.run(project)
    metrics = evaluate.run(project)
    assert cache_teacher.run(project, "big").rows_computed == 0, "the same teacher"
    return metrics


def check_store(project):
    """That the store holds what the live teacher says; its targets."""
    data, store = PreparedData(project.prepared), TargetStore.open(project.store("big"))
    rows = np.arange(len(data.inputs))
    teacher, _ = build_teacher(project, "big", data.inputs)
    live = teacher.predict(data.inputs.read(rows))
    ids = data.inputs.sample_ids.tolist()
    said = store.targets(ids)
    assert (said.covered is None) == ("covered" not in live)
    covered = torch.ones(said.covered.shape if said.covered is not None else len(rows)).bool()
    if said.covered is not None:
        assert torch.equal(said.covered, live["covered"])
        covered = said.covered
    if isinstance(said, DenseTargets):
        expected = live["logits"].log_softmax(dim=-1)[covered]
        torch.testing.assert_close(said.log_probs()[covered], expected, atol=1e-3, rtol=1e-3)
    else:
        head = live["log_probs"].float()[covered] if "log_probs" in live else None
        if head is None:
            head = live["logits"].log_softmax(dim=-1).gather(-1, said.ids.long())[covered]
        torch.testing.assert_close(said.head[covered], head, atol=1e-2, rtol=1e-3)
    return said, covered


def check_agreement(project, metrics, least=0.25):
    """That the student agrees far beyond the share of the teacher's favourite class; `least`: of what is beyond it."""
    check_store(project)
    data, store = PreparedData(project.prepared), TargetStore.open(project.store("big"))
    rows = data.rows_of(["test"])
    covered = store.targets(data.inputs.sample_ids[rows].tolist()).covered
    top1 = store.statistics(store.rows_of(data.inputs.sample_ids[rows].tolist()))["top1"].astype(int)
    top1 = top1[covered.numpy()] if covered is not None else top1
    favourite = np.bincount(top1.ravel()).max() / top1.size
    agreement = metrics["student"]["agreement"]
    assert favourite < 0.95, "the teacher says one thing of all rows"
    assert agreement > favourite + least * (1 - favourite), (agreement, favourite)


# Modules


def test_a_module_that_is_trained_here(tmp_path):
    module = {"model": {"factory": "kdpipe.models.mlp:MLP", "hidden": [16], "dropout": 0.2}, "train": TRAIN}
    project = write(tmp_path, write_table(tmp_path, "wine"), {"big": module})
    check_agreement(project, distil(project), least=0.7)


def test_a_module_with_ready_weights(tmp_path):
    preprocess, inputs, labels = given("iris")
    ready = LogisticRegression(max_iter=200).fit(inputs, labels)
    weights = {"head.weight": ready.coef_, "head.bias": ready.intercept_}
    save_file(
        {name: torch.tensor(each).float().contiguous() for name, each in weights.items()}, tmp_path / "a.safetensors"
    )
    module = {"model": LINEAR, "preprocess": preprocess, "weights": "a.safetensors"}
    project = write(tmp_path, write_table(tmp_path, "iris"), {"big": module})
    metrics = distil(project)
    check_agreement(project, metrics, least=0.7)
    assert metrics["teacher"]["accuracy"] > 0.9


def test_a_module_with_a_single_logit(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\nclass Single(torch.nn.Linear):\n"
        "    def __init__(self, input_shape):\n        super().__init__(input_shape[0], 1)\n"
    )
    module = {"model": {"factory": "mine.py:Single"}, "train": TRAIN}
    project = write(tmp_path, write_table(tmp_path, "breast_cancer"), {"big": module})
    check_agreement(project, distil(project), least=0.7)


def test_a_module_with_features(tmp_path):
    module = {"model": {"factory": "kdpipe.models.mlp:MLP", "hidden": [16]}, "train": TRAIN}
    targets = {"dtype": "float32", "outputs": ["logits", "layers.0"], "features": "float32"}
    project = write(tmp_path, write_table(tmp_path, "wine"), {"big": module}, targets=targets)
    check_agreement(project, distil(project), least=0.7)
    data = PreparedData(project.prepared)
    live = build_teacher(project, "big", data.inputs)[0].predict(data.inputs.read(np.arange(178)))["layers.0"]
    stored = TargetStore.open(project.store("big")).targets(data.inputs.sample_ids.tolist(), output="layers.0")
    torch.testing.assert_close(stored.values, live)


def write_images(folder):
    """Some of scikit-learn's digits as Parquet; the sections of params.yaml that read it, and all digits."""
    bunch = datasets.load_digits()
    images = pa.FixedSizeListArray.from_arrays(pa.array(bunch.data.astype(np.uint8).ravel()), 64)
    split = ["test" if row % 4 == 0 else "train" for row in range(len(images))]
    pq.write_table(pa.table({"image": images, "label": bunch.target, "split": split})[:800], folder / "rows.parquet")
    sections = {
        "data": {
            "source": {"factory": "kdpipe.data.sources:Table"},
            "path": "rows.parquet",
            "columns": {"label": "label", "split": "split"},
        },
        "task": {"factory": "kdpipe.tasks.image:ImageClassification", "num_classes": 10, "shape": [8, 8, 1]},
    }
    return sections, bunch


def test_a_convolution_that_sees_images_of_digits(tmp_path):
    sections, _ = write_images(tmp_path)
    pixels = {"factory": "kdpipe.preprocess:ImageTensor", "scale": 16}
    teacher = {
        "model": {"factory": "kdpipe.models.resnet:ResNet", "depth": 8, "width": 4},
        "preprocess": pixels,
        "train": {"epochs": 3, "batch_size": 32, "learning_rate": 0.02},
    }
    student = {"model": {"factory": "kdpipe.models.mlp:MLP", "hidden": [32]}, "preprocess": pixels}
    project = write(tmp_path, sections, {"big": teacher}, student | {"train": {**TRAIN, "learning_rate": 0.01}})
    check_agreement(project, distil(project), least=0.5)


# Teachers by their factory


def test_an_onnx_file(tmp_path):
    preprocess, inputs, labels = given("wine")
    ready = LogisticRegression(max_iter=200).fit(inputs, labels)
    weights = {"w": ready.coef_.T.astype(np.float32), "b": ready.intercept_.astype(np.float32)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["z"]), helper.make_node("Softmax", ["z"], ["p"])]
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs.shape[1]])
    said = helper.make_tensor_value_info("p", TensorProto.FLOAT, ["rows", 3])
    constants = [numpy_helper.from_array(each, name) for name, each in weights.items()]
    graph = helper.make_graph(nodes, "net", [shape], [said], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "a.onnx")
    teacher = {"factory": "kdpipe.teachers.onnx:OnnxTeacher", "path": "a.onnx", "probabilities": True}
    project = write(tmp_path, write_table(tmp_path, "wine"), {"big": {"teacher": teacher, "preprocess": preprocess}})
    metrics = distil(project)
    check_agreement(project, metrics, least=0.7)
    assert metrics["teacher"]["accuracy"] > 0.95
    otherwise = {"big": {"teacher": {**teacher, "logits": "p"}, "preprocess": preprocess}}
    project = write(tmp_path, write_table(tmp_path, "wine"), otherwise)
    assert cache_teacher.run(project, "big").rows_computed == 178, "the same file, asked otherwise, is another teacher"


SKLEARN = "kdpipe.teachers.sklearn:SklearnTeacher"
FOREST = {
    "teacher": {
        "factory": SKLEARN,
        "estimator": {"factory": "sklearn.ensemble:RandomForestClassifier", "n_estimators": 20, "min_samples_leaf": 3},
    },
    "fit_on": "train",
}


def test_an_estimator_that_is_fitted_here(tmp_path):
    project = write(tmp_path, write_table(tmp_path, "breast_cancer"), {"big": FOREST})
    metrics = distil(project)
    check_agreement(project, metrics, least=0.7)
    assert metrics["teacher"]["accuracy"] > 0.9
    assert train_teacher.run(project, "big").skipped


def test_neighbours_are_a_teacher_of_examples(tmp_path):
    estimator = {"factory": "sklearn.neighbors:KNeighborsClassifier", "n_neighbors": 7}
    teacher = {"teacher": {"factory": SKLEARN, "estimator": estimator}, "fit_on": "train"}
    project = write(tmp_path, write_table(tmp_path, "wine"), {"big": teacher})
    check_agreement(project, distil(project), least=0.7)


def test_an_estimator_that_is_ready(tmp_path):
    preprocess, inputs, labels = given("iris")
    (tmp_path / "a.skops").write_bytes(dumps(SVC(random_state=0).fit(inputs, labels)))
    teacher = {"teacher": {"factory": SKLEARN, "path": "a.skops"}, "preprocess": preprocess}
    project = write(tmp_path, write_table(tmp_path, "iris"), {"big": teacher})
    check_agreement(project, distil(project), least=0.5)


RULES_OF_IRIS = [
    {**rule, "label": ["setosa", "versicolor", "virginica"].index(rule["label"])} for rule in RULES if "when" in rule
]


@pytest.mark.parametrize("combine", ["vote", "label_model"])
def test_rules(tmp_path, combine):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES_OF_IRIS))
    rules = {"factory": "kdpipe.teachers.rules:RulesTeacher", "rules": "rules.yaml", "combine": combine}
    teacher = {"teacher": rules} | ({"fit_on": "train"} if combine == "label_model" else {})
    project = write(tmp_path, write_table(tmp_path, "iris"), {"big": teacher})
    check_agreement(project, distil(project), least=0.5)


def test_rules_upon_another_teacher(tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES_OF_IRIS))
    factory = "kdpipe.teachers.rules:ConstrainedTeacher"
    teachers = {
        "net": {"model": LINEAR, "train": TRAIN},
        "big": {"teacher": {"factory": factory, "teacher": "net", "rules": "rules.yaml", "strength": 2}},
    }
    project = write(tmp_path, write_table(tmp_path, "iris"), teachers)
    check_agreement(project, distil(project), least=0.5)


def test_an_ensemble_of_what_is_trained_here(tmp_path):
    teachers = {
        "net": {"model": {"factory": "kdpipe.models.mlp:MLP", "hidden": [16]}, "train": TRAIN},
        "forest": FOREST,
        "big": {
            "teacher": {
                "factory": "kdpipe.teachers.ensemble:Ensemble",
                "members": ["net", "forest"],
                "weights": [2, 1],
            }
        },
    }
    project = write(tmp_path, write_table(tmp_path, "wine"), teachers)
    check_agreement(project, distil(project), least=0.7)
    inputs = PreparedData(project.prepared).inputs
    rows = inputs.read(np.arange(len(inputs)))
    net, forest = (
        build_teacher(project, name, inputs)[0].predict(rows)["logits"].softmax(dim=1) for name in ("net", "forest")
    )
    said, _ = check_store(project)
    torch.testing.assert_close(said.log_probs().exp(), (2 * net + forest) / 3, atol=1e-4, rtol=1e-3)


def test_a_function(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\n\ndef speak(columns):\n"
        "    length, width = columns['features'][:, 2], columns['features'][:, 3]\n"
        "    return np.stack([9 - 4 * length, 0 * length, length - 4.8 + 4 * (width - 1.7)], axis=1)\n"
    )
    teacher = {"factory": "kdpipe.teachers.ensemble:FunctionTeacher", "function": "mine.py:speak"}
    project = write(tmp_path, write_table(tmp_path, "iris"), {"big": {"teacher": teacher}})
    metrics = distil(project)
    check_agreement(project, metrics, least=0.7)
    assert metrics["teacher"]["accuracy"] > 0.85


def test_a_table_of_what_one_said(tmp_path):
    """There is no model to ask: the estimator that wrote the table stands beside it here."""
    _, inputs, labels = given("wine")
    probabilities = LogisticRegression(max_iter=200).fit(inputs, labels).predict_proba(inputs)
    said = pa.array(np.log(probabilities).tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"sample_id": range(len(labels)), "logits": said}), tmp_path / "said.parquet")
    project = write(tmp_path, write_table(tmp_path, "wine"), {"big": {"table": "said.parquet"}})
    metrics = distil(project)
    inputs = PreparedData(project.prepared).inputs
    keys = [int(each.partition("-")[0]) for each in inputs.sample_ids]
    stored = TargetStore.open(project.store("big")).targets(inputs.sample_ids.tolist())
    assert np.allclose(stored.log_probs().exp(), probabilities[keys], atol=1e-4)
    assert metrics["student"]["agreement"] > 0.8


# Text: what scikit-learn says about its data sets


def sentences():
    """English sentences, and which data set each is about."""
    found, labels = [], []
    for label, name in enumerate(("iris", "wine", "breast_cancer")):
        text = re.sub(r"[=:.\-*|\s]+", " ", getattr(datasets, f"load_{name}")().DESCR).split()
        parts = [" ".join(text[start : start + 12]) for start in range(0, len(text), 6)]
        found += parts
        labels += [label] * len(parts)
    return found, labels


WORDS = {
    "factory": "kdpipe.preprocess:Tokenizer",
    "kind": "word",
    "vocab_size": 600,
    "max_length": 24,
    "lowercase": True,
}
READER = {
    "model": {"factory": "kdpipe.models.lstm:LSTM", "width": 16, "hidden": 16},
    "preprocess": WORDS,
    "train": {"epochs": 15, "batch_size": 16, "learning_rate": 0.02},
}


def write_texts(folder, texts, **columns):
    pq.write_table(pa.table({"text": texts, **columns}), folder / "rows.parquet")
    return {
        "source": {"factory": "kdpipe.data.sources:Table"},
        "path": "rows.parquet",
        "columns": {each: each for each in columns},
        "splits": SPLITS,
    }


def trained(model, inputs, loss_of, steps, rate):
    """A model after some steps on batches of 32."""
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=rate), torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(next(iter(inputs.values()))), (32,), generator=generator)
        loss = loss_of(model(**{name: each[rows] for name, each in inputs.items()}).logits, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_checkpoint_that_classifies_texts(tmp_path):
    texts, labels = sentences()
    words = sorted({word.lower() for text in texts for word in re.findall("[A-Za-z]+", text)})[:600]
    save_tokenizer(tmp_path / "bert", words)
    torch.manual_seed(0)
    model = sequence_classifier(3, config=BERT, vocab_size=len(SPECIAL) + len(words), pad_id=0)
    with quietly() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "bert"))
        inputs = dict(tokenizer(texts, truncation=True, max_length=24, padding=True, return_tensors="pt"))
        target = torch.tensor(labels)
        trained(model, inputs, lambda logits, rows: torch.nn.functional.cross_entropy(logits, target[rows]), 80, 0.004)
        model.save_pretrained(tmp_path / "bert")
    teacher = {
        "teacher": {"factory": "kdpipe.teachers.pretrained:PretrainedTeacher", "path": "bert"},
        "preprocess": {"factory": "kdpipe.preprocess:PretrainedTokenizer", "path": "bert", "max_length": 24},
    }
    sections = {
        "data": write_texts(tmp_path, texts, label=labels),
        "task": {"factory": "kdpipe.tasks.text:TextClassification", "num_classes": 3},
    }
    project = write(tmp_path, sections, {"big": teacher}, READER)
    metrics = distil(project)
    check_agreement(project, metrics, least=0.4)
    assert metrics["teacher"]["accuracy"] > 0.65


VIT = {**BERT, "model_type": "vit", "hidden_size": 32, "patch_size": 4}


def test_a_checkpoint_that_classifies_images(tmp_path):
    sections, digits = write_images(tmp_path)
    torch.manual_seed(0)
    model = image_classifier(10, config=VIT, input_shape=(1, 8, 8))
    inputs, target = {"pixel_values": torch.from_numpy(digits.data / 16).float().view(-1, 1, 8, 8)}, digits.target
    known = torch.from_numpy(target)
    with quietly():
        trained(model, inputs, lambda logits, rows: torch.nn.functional.cross_entropy(logits, known[rows]), 300, 0.005)
        model.save_pretrained(tmp_path / "vit")
    pixels = {"factory": "kdpipe.preprocess:ImageTensor", "scale": 16}
    teacher = {
        "teacher": {
            "factory": "kdpipe.teachers.pretrained:PretrainedTeacher",
            "path": "vit",
            "auto": "image_classification",
        },
        "preprocess": {**pixels, "mean": [0.0], "std": [1.0]},
    }
    student = {"model": {"factory": "kdpipe.models.mlp:MLP", "hidden": [32]}, "preprocess": pixels}
    project = write(tmp_path, sections, {"big": teacher}, student | {"train": {**TRAIN, "learning_rate": 0.01}})
    metrics = distil(project)
    check_agreement(project, metrics, least=0.5)
    assert metrics["teacher"]["accuracy"] > 0.8


BIGRAM = """
import torch


class Bigram(torch.nn.Module):
    def __init__(self, vocab_size, num_classes):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 32)
        self.head = torch.nn.Linear(32, num_classes)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))
"""


def language(folder, texts, teacher, targets):
    (folder / "mine.py").write_text(BIGRAM)
    sections = {
        "data": write_texts(folder, texts),
        "task": {"factory": "kdpipe.tasks.language:LanguageModelling", "block_tokens": 32},
    }
    student = {
        "model": {"factory": "mine.py:Bigram"},
        "train": {"epochs": 8, "batch_size": 8, "learning_rate": 0.05},
    }
    return write(folder, sections, {"big": teacher}, student, targets)


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}


def test_a_checkpoint_that_models_language(tmp_path):
    texts, _ = sentences()
    torch.manual_seed(0)
    model = causal_lm(257, config={**GPT2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, max_length=33)
    blocks = torch.tensor([list(text.encode()[:33]) for text in texts if len(text.encode()) >= 33])

    def next_token(logits, rows):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[rows, 1:].flatten())

    trained(model, {"input_ids": blocks}, next_token, 150, 0.01)
    with quietly():
        model.save_pretrained(tmp_path / "gpt2")
    teacher = {
        "factory": "kdpipe.teachers.pretrained:PretrainedTeacher",
        "path": "gpt2",
        "auto": "causal_lm",
    }
    project = language(tmp_path, texts[::3], {"teacher": teacher}, {"encoding": "topk", "k": 20})
    check_agreement(project, distil(project), least=0.3)


@pytest.fixture
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server")) as server:
        yield server


def test_a_served_language_model(tmp_path, server):
    texts, _ = sentences()
    factory = "kdpipe.teachers.server:ServedLanguageModel"
    teacher = {"teacher": {"factory": factory, "model": "toy"}, "runtime": {"server": server.settings()}}
    project = language(tmp_path, texts[::6], teacher, {"encoding": "topk", "k": 4})
    check_agreement(project, distil(project), least=0.9)


def test_a_served_classifier(tmp_path, server):
    """It is sure of texts with exclamation marks, and says nothing about questions."""
    marks = ["", "! ", "? "]
    texts = [marks[place % 3] + text for place, text in enumerate(sentences()[0])]
    labels = [int(place % 3 == 1) for place in range(len(texts))]
    teacher = {
        "factory": "kdpipe.teachers.server:ServedClassifier",
        "model": "toy",
        "prompt": "About a data set: {text}",
        "answers": CLASSES,
    }
    sections = {
        "data": write_texts(tmp_path, texts, label=labels),
        "task": {"factory": "kdpipe.tasks.text:TextClassification", "num_classes": 2},
    }
    big = {"teacher": teacher, "runtime": {"server": server.settings()}}
    project = write(tmp_path, sections, {"big": big}, READER)
    metrics = distil(project)
    check_agreement(project, metrics, least=0.7)
    _, covered = check_store(project)
    assert covered.float().mean() == pytest.approx(2 / 3, abs=0.02)
