"""Language models through the stages: blocks, per-token targets, prompts left out."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import DataError
from kdpipe.store import TargetStore
from kdpipe.tasks.language import LanguageModelling
from kdpipe_stages import cache_teacher, check, evaluate, prepare_data, train_student, train_teacher
from projects import project_in, write_params

MODELS = """
import torch


class Bigram(torch.nn.Module):
    def __init__(self, vocab_size, num_classes, width=16):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.head = torch.nn.Linear(width, num_classes)

    def forward(self, input_ids):
        return {"scores": self.head(self.embedding(input_ids))}


class Next(torch.nn.Module):
    '''After token t it is sure of (3 t + 1) mod V: what it says is a function of the content alone.'''

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids):
        after = (3 * input_ids + 1) % self.num_classes
        return 8 * self.scale * torch.nn.functional.one_hot(after, self.num_classes).float()
"""
LETTERS = "abcdefghij"
LENGTH = 12


def documents(seed=0, count=40):
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list(LETTERS), random.integers(1, 40))) for _ in range(count)]


def make(folder, texts, teacher=None, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    splits = ["test" if place % 4 == 0 else "train" for place in range(len(texts))]
    table = {"name": [f"d{place}" for place in range(len(texts))], "text": texts, "split": splits}
    table |= {"question": ["q?" for _ in texts]}
    pq.write_table(pa.table(table), folder / "documents.parquet")
    (folder / "models.py").write_text(MODELS)
    train = {"epochs": 15, "batch_size": 16, "learning_rate": 0.05}
    whole = {
        "data": {
            "source": {"factory": "kdpipe.data.sources:Table"},
            "path": "documents.parquet",
            "columns": {"id": "name", "split": "split"},
        },
        "task": {"factory": "kdpipe.tasks.language:LanguageModelling", "block_tokens": LENGTH},
        "teachers": {
            "big": teacher or {"model": {"factory": "models.py:Bigram"}, "logits": "scores", "train": train},
        },
        "targets": {"big": {"encoding": "topk", "k": 8, "temperatures": [1, 2], "batch_size": 16}},
        "student": {
            "model": {"factory": "models.py:Bigram", "width": 4},
            "logits": "scores",
            "losses": [{"factory": "kdpipe.losses:ForwardKL", "teacher": "big", "temperature": 2}],
            "train": train,
            "baselines": ["labels_only"],
        },
    }
    write_params(folder, whole | sections)
    return project_in(folder)


def test_a_language_model_learns_from_cached_tokens(tmp_path):
    project = make(tmp_path, documents())
    prepare_data.run(project)
    assert not prepare_data.warnings(project), "of a vocabulary, most splits lack some"
    check.run(project)
    train_teacher.run(project, "big")
    cached = cache_teacher.run(project, "big")
    assert cached.num_rows == len(PreparedInputs(project.prepared / "inputs"))
    train_student.run(project)
    metrics = evaluate.run(project)
    store = TargetStore.open(project.store("big"))
    inputs = PreparedInputs(project.prepared / "inputs").read(np.arange(store.num_rows))
    covered = store.targets(store.sample_ids).covered
    assert torch.equal(covered, torch.from_numpy(np.asarray(inputs["counted"])))
    assert 9 < metrics["student"]["perplexity"] < 20, "ten letters and the end"
    assert metrics["student"]["kl_to_teacher"] < 0.2
    assert json.loads((tmp_path / "metrics.json").read_text())["teacher"]["accuracy"] > 0


SURE = {"model": {"factory": "models.py:Next"}, "weights": "sure.safetensors"}


@pytest.fixture
def sure(tmp_path):
    """A project whose teacher says a function of each token."""
    from safetensors.torch import save_file

    save_file({"scale": torch.ones(())}, tmp_path / "sure.safetensors")

    def build(texts, **sections):
        return make(tmp_path, texts, SURE, **sections)

    return build


def said_about(project, view=0):
    """Per sample id: tokens that the store's most probable class was said about, and that class, where it counts."""
    store = TargetStore.open(project.store("big"))
    inputs = PreparedInputs(project.prepared / "inputs")
    rows = np.arange(len(inputs))
    columns, ids = inputs.read(rows), inputs.sample_ids
    top1 = store.statistics(store.rows_of(ids.tolist()))["top1"]
    counted = np.asarray(columns["counted"])
    tokens = np.asarray(columns["tokens"])[:, :-1]
    return {key: (tokens[row][counted[row]], top1[row][counted[row]]) for row, key in enumerate(ids)}


@pytest.mark.parametrize(
    "task",
    [
        {},
        {"pack": True},
        {"prompt_column": "question"},
        {"block_tokens": 5},
        {"tokenizer": "vocabulary.json", "vocab_size": 270},
    ],
)
def test_every_token_meets_what_the_teacher_said_about_it(sure, tmp_path, task):
    whole = {"factory": "kdpipe.tasks.language:LanguageModelling", "block_tokens": LENGTH, **task}
    columns = {"split": "split"} if task.get("pack") else {"id": "name", "split": "split"}
    data = {"source": {"factory": "kdpipe.data.sources:Table"}, "path": "documents.parquet", "columns": columns}
    project = sure(documents(), task=whole, data=data)
    prepare_data.run(project)
    cache_teacher.run(project, "big")
    classes = project.task().num_classes
    found = said_about(project)
    assert sum(len(tokens) for tokens, _ in found.values()) > 300
    for tokens, top1 in found.values():
        assert np.array_equal(top1, (3 * tokens + 1) % classes)


def test_documents_added_and_moved_leave_the_others_targets_as_they_were(sure, tmp_path):
    texts = documents()
    project = sure(texts)
    prepare_data.run(project)
    cache_teacher.run(project, "big")
    before = said_about(project)
    table = pq.read_table(tmp_path / "documents.parquet")
    more = pa.table({"name": ["new"], "text": ["abcabc"], "split": ["train"], "question": ["q?"]})
    order = np.random.default_rng(0).permutation(len(texts))
    pq.write_table(pa.concat_tables([more, table.take(order)]), tmp_path / "documents.parquet")
    assert prepare_data.run(project).num_new == 1
    cache_teacher.run(project, "big")
    after = said_about(project)
    assert set(after) - set(before) == {key for key in after if key.startswith("new/")}
    for key, (tokens, top1) in before.items():
        assert np.array_equal(after[key][0], tokens)
        assert np.array_equal(after[key][1], top1)


def test_the_student_meets_its_own_tokens(sure, tmp_path):
    """With a learner of one table of transitions, distilled from a sure teacher, every counted token is told right."""
    project = sure(
        documents(),
        student={
            "model": {"factory": "models.py:Bigram", "width": 64},
            "logits": "scores",
            "label_weight": 0,
            "losses": [{"factory": "kdpipe.losses:ForwardKL", "teacher": "big", "temperature": 1}],
            "train": {"epochs": 30, "batch_size": 16, "learning_rate": 0.05},
            "baselines": [],
        },
    )
    prepare_data.run(project)
    cache_teacher.run(project, "big")
    train_student.run(project)
    assert evaluate.run(project)["student"]["agreement"] == 1


def test_another_tokenizer_at_the_same_path_is_told(tmp_path):
    """Its tokens are other ones, though params.yaml says the same."""
    task = {"factory": "kdpipe.tasks.language:LanguageModelling", "block_tokens": LENGTH, "tokenizer": "tokens.json"}
    teacher = {"model": {"factory": "models.py:Next"}, "weights": "next.safetensors"}
    save_file({"scale": torch.ones(())}, tmp_path / "next.safetensors")
    project = make(tmp_path, documents(), teacher, task=task | {"vocab_size": 270})
    prepare_data.run(project)
    project = make(tmp_path, documents(), teacher, task=task)
    prepare_data.run(project)
    cache_teacher.run(project, "big")
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens": []}))
    for stage in (lambda: cache_teacher.run(project, "big"), lambda: train_student.run(project)):
        with pytest.raises(DataError, match=r"made with other settings: tokenizer changed\. Run `kdpipe prepare-data`"):
            stage()
    prepare_data.run(project)
    assert cache_teacher.run(project, "big").rows_computed == 0


def test_a_student_of_another_vocabulary_is_told_so(tmp_path):
    from kdpipe.errors import ConfigError

    project = make(tmp_path, documents())
    prepare_data.run(project)
    project.params.student.model.arguments["num_classes"] = 300
    with pytest.raises(ConfigError, match=r"forward gives \[.*300\]; expected logits"):
        check.run(project)


def test_it_is_the_same_task_whatever_the_folder(tmp_path):
    assert LanguageModelling(tmp_path).num_classes == 257
