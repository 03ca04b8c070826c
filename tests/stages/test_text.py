"""Text through the stages: teacher and student have tokenizers of their own on the same rows."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from kdpipe.data.columns import texts_of
from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import ConfigError, StaleStoreError
from kdpipe.store import TargetStore
from kdpipe_stages import cache_teacher, check, evaluate, prepare_data, train_student, train_teacher
from projects import project_in, write_params
from toy_text import BERT, save_bert, save_tokenizer

MODELS = """
import torch


class LastByte(torch.nn.Module):
    '''Sure of the class that the last byte of a text says.'''

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask):
        last = input_ids.gather(1, attention_mask.sum(dim=1, keepdim=True) - 2)[:, 0]
        return 6 * self.scale * torch.nn.functional.one_hot(last % self.num_classes, self.num_classes).float()
"""
ENDS = ["fine", "bad ", "so so", "❤", "好"]
TRAIN = {"epochs": 12, "batch_size": 16, "learning_rate": 0.02}
WORDS = {"factory": "kdpipe.preprocess:Tokenizer", "kind": "word", "vocab_size": 64, "max_length": 16}
BPE = {"factory": "kdpipe.preprocess:Tokenizer", "kind": "bpe", "vocab_size": 300, "max_length": 32}
LSTM = {"factory": "kdpipe.models.lstm:LSTM", "width": 16, "hidden": 16}
SURE = {"model": {"factory": "models.py:LastByte"}, "weights": "sure.safetensors"}
CHECKPOINT = {
    "teacher": {"factory": "kdpipe.teachers.pretrained:PretrainedTeacher", "path": "bert"},
    "preprocess": {"factory": "kdpipe.preprocess:PretrainedTokenizer", "path": "bert", "max_length": 16},
}


def class_of(text):
    """What `LastByte` says: of one of three."""
    return (text.encode()[-1] + 3) % 3 if text else 1 % 3


def make(folder, teacher=SURE, num_rows=120, **student):
    random = np.random.default_rng(0)
    texts = [
        " ".join([*random.choice(["the", "film", "was", "a", "very", "story"], 3), random.choice(ENDS)])
        for _ in range(num_rows)
    ]
    texts[7] = "x " * 2000 + "bad "
    splits = ["test" if place % 4 == 0 else "train" for place in range(num_rows)]
    labels = [class_of(text) for text in texts]
    table = {"id": [f"t{place}" for place in range(num_rows)], "text": texts, "label": labels, "split": splits}
    pq.write_table(pa.table(table), folder / "texts.parquet")
    (folder / "models.py").write_text(MODELS)
    save_file({"scale": torch.ones(())}, folder / "sure.safetensors")
    whole = {
        "data": {
            "source": {"factory": "kdpipe.data.sources:Table"},
            "path": "texts.parquet",
            "columns": {"id": "id", "label": "label", "split": "split"},
        },
        "task": {"factory": "kdpipe.tasks.text:TextClassification", "num_classes": 3},
        "teachers": {"big": teacher},
        "targets": {"big": {"batch_size": 16, "shard_rows": 32}},
        "student": {
            "model": LSTM,
            "preprocess": WORDS,
            "labelled_rows": 6,
            "losses": [{"factory": "kdpipe.losses:ForwardKL", "teacher": "big", "temperature": 2}],
            "label_weight": 0,
            "train": TRAIN,
            "baselines": [],
            **student,
        },
    }
    write_params(folder, whole)
    return project_in(folder)


def run(project):
    prepare_data.run(project)
    check.run(project)
    if project.teacher("big").train is not None:
        train_teacher.run(project, "big")
    cache_teacher.run(project, "big")
    train_student.run(project)
    return evaluate.run(project)


def test_every_row_has_what_its_own_text_says(tmp_path):
    project = make(tmp_path, num_rows=100)
    metrics = run(project)
    store, inputs = TargetStore.open(project.store("big")), PreparedInputs(project.prepared / "inputs")
    texts = texts_of(inputs.read(np.arange(len(inputs)))["text"])
    order = np.random.default_rng(1).permutation(len(inputs))
    said = store.targets(inputs.sample_ids[order].tolist()).log_probs(1.0).argmax(dim=-1)
    short = [place for place, row in enumerate(order) if len(texts[row]) < 200]
    assert len(short) == 99
    assert [int(said[place]) for place in short] == [class_of(texts[order[place]]) for place in short]
    assert metrics["student"]["agreement"] > 0.95, "it reads words where the teacher reads bytes"


def test_a_transformer_teaches_an_lstm(tmp_path):
    teacher = {
        "model": {"factory": "kdpipe.models.transformer:Transformer", "width": 16, "heads": 2, "layers": 1},
        "preprocess": BPE,
        "train": TRAIN,
    }
    project = make(tmp_path, teacher)
    metrics = run(project)
    note = json.loads((project.teacher_model("big") / "model.json").read_text())
    assert note["preprocess_state"]["tokenizer"]["model"]["type"] == "BPE"
    assert metrics["teacher"]["accuracy"] > 0.9
    assert metrics["student"]["agreement"] > 0.9
    said = cache_teacher.run(project, "big")
    assert said.rows_computed == 0, "the same vocabulary, so the same fingerprint"


def test_a_checkpoint_teaches_a_bert_of_a_configuration(tmp_path):
    save_tokenizer(save_bert(tmp_path / "bert"), words=["film", "fine", "bad", "the", "was", "very", "a"])
    factory = "kdpipe.models.pretrained:sequence_classifier"
    project = make(tmp_path, CHECKPOINT, model={"factory": factory, "config": BERT}, train={**TRAIN, "epochs": 2})
    metrics = run(project)
    assert metrics["student"]["kl_to_teacher"] < 0.1
    assert metrics["teacher"]["parameters"] > 1000


def test_a_vocabulary_that_the_student_has_not_embedded_is_refused_before_any_work(tmp_path):
    save_tokenizer(save_bert(tmp_path / "bert"), words=["film", "fine"])
    factory = "kdpipe.models.pretrained:sequence_classifier"
    project = make(tmp_path, SURE, model={"factory": factory, "config": {**BERT, "vocab_size": 5}})
    prepare_data.run(project)
    with pytest.raises(ConfigError, match="the model has embeddings for 5 tokens, its tokenizer makes"):
        check.run(project)


def test_another_tokenizer_in_the_teachers_folder_is_another_teacher(tmp_path):
    save_tokenizer(save_bert(tmp_path / "bert"), words=["film", "fine"])
    project = make(tmp_path, CHECKPOINT)
    prepare_data.run(project)
    assert cache_teacher.run(project, "big").rows_computed == 120
    assert cache_teacher.run(project, "big").rows_computed == 0
    save_tokenizer(tmp_path / "bert", words=["fine", "film"])
    assert cache_teacher.run(project, "big").rows_computed == 120


def test_another_tokenizer_of_the_student_is_another_student(tmp_path):
    save_tokenizer(tmp_path / "words", words=["film", "fine"])
    preprocess = {"factory": "kdpipe.preprocess:PretrainedTokenizer", "path": "words", "max_length": 16}
    project = make(tmp_path, preprocess=preprocess, train={**TRAIN, "epochs": 1})
    run(project)
    assert not train_student.run(project).trained
    save_tokenizer(tmp_path / "words", words=["fine", "film"])
    with pytest.raises(ConfigError, match=r"vocab\.txt differs|was trained with other"):
        evaluate.run(project)
    assert train_student.run(project).trained


def test_a_store_of_another_preprocess_is_stale(tmp_path):
    project = make(tmp_path)
    prepare_data.run(project)
    cache_teacher.run(project, "big")
    teacher = {**SURE, "preprocess": {"factory": "kdpipe.preprocess:Utf8Bytes", "max_length": 9}}
    with pytest.raises(StaleStoreError, match=r"preprocess"):
        train_student.run(make(tmp_path, teacher))
