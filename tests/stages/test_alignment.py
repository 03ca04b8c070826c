"""Every row meets what its own teacher said: tasks x sources x preprocesses x views x ways of reading.

The teacher's class is a function of the row's content. What the student gets as input is turned back into that content,
so that input, targets and label of each row in each batch are held against each other.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import chain
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from kdpipe.batches import Rows, shuffle_of
from kdpipe.data.prepared import PreparedInputs
from kdpipe.order import BatchOrder
from kdpipe.store import TargetStore
from kdpipe.store.aligned import AlignedTargets
from kdpipe.tasks.base import token_labels
from kdpipe_stages import cache_teacher, prepare_data, train_student
from kdpipe_stages.building import fit_preprocess, stream_of
from kdpipe_stages.lesson import Lesson
from kdpipe_stages.params import TrainSection
from projects import project_in, write_params

C = 7
NUM_ROWS = 48

# The teacher's side: the same functions of raw columns, and of a module's inputs, as `class_of` of each kind below.
SAID = """
import json
from pathlib import Path

import numpy as np
import torch

from kdpipe.data.columns import Ragged
from kdpipe.random_numbers import uniform

LOG = Path(__file__).with_name("shown.jsonl")
C = 7


def log(rows):
    with LOG.open("a") as file:
        file.writelines(json.dumps(row) + "\\n" for row in rows)


def sure(classes, num_classes=C):
    return 8.0 * np.eye(num_classes, dtype=np.float32)[classes]


def of_numbers(columns):
    numbers = np.nan_to_num(columns["features"]).astype(np.int64)
    log(numbers.tolist())
    kinds = columns.get("category.kind")
    letters = 0 if kinds is None else np.array([int(kinds.row(i)[0]) for i in range(len(kinds))])
    return sure((3 * numbers[:, 0] + 5 * numbers[:, 1] + letters) % C)


def of_images(columns):
    colours = columns["image"][:, 0, 0].astype(np.int64)
    log(colours.tolist())
    return sure(colours @ [3, 5, 1] % C)


def of_texts(columns):
    texts = [columns["text"].row(i) for i in range(len(columns["text"]))]
    log([text.tobytes().decode() for text in texts])
    return sure([int((np.arange(1, 1 + len(text)) * text).sum()) % C for text in texts])


def of_tokens(columns):
    tokens = columns["tokens"][:, :-1].astype(np.int64)
    return sure(np.cumsum(tokens * np.arange(1, 1 + tokens.shape[1]), axis=1) % 257, 257)


class OfColours(torch.nn.Module):
    '''Of images of a size of its own, normalised in its own way.'''

    def forward(self, inputs):
        colours = (255 * (inputs * 0.5 + 0.25)).round().long()[:, :, 2, 1]
        log(colours.tolist())
        return torch.from_numpy(sure((colours @ torch.tensor([3, 5, 1]) % C).numpy()))


class OfBytes(torch.nn.Module):
    '''Of bytes that are padded to the batch's longest row.'''

    def forward(self, input_ids, attention_mask):
        place = torch.arange(1, 1 + input_ids.shape[1])
        counted = (place < attention_mask.sum(dim=1, keepdim=True)) * place * (input_ids - 3)
        return torch.from_numpy(sure((counted.sum(dim=1) % C).numpy()))


class Shift:
    '''A view of numbers and images: others, as the key says.'''

    def __call__(self, columns, keys, seed):
        drawn = (100 * uniform(keys, (2,), seed)).astype(int)
        if "image" in columns:
            shift = np.pad(drawn, ((0, 0), (0, 1)))[:, np.newaxis, np.newaxis].astype(np.uint8)
            return {**columns, "image": columns["image"] + shift}
        return {**columns, "features": columns["features"] + drawn.astype(np.float32)}


class Cased:
    '''A view of texts: of as many bytes.'''

    def __call__(self, columns, keys, seed):
        text = columns["text"]
        upper = np.repeat(uniform(keys, (1,), seed)[:, 0] < 0.5, np.diff(text.offsets))
        small = (text.values >= 97) & (text.values <= 122)
        return {**columns, "text": Ragged(values=text.values - np.uint8(32) * (upper & small), offsets=text.offsets)}


class Raw:
    '''A student's preprocess of its own: several inputs by name.'''

    def fit(self, blocks):
        pass

    def state(self):
        return {}

    def load_state(self, state):
        pass

    def __call__(self, columns):
        kinds = columns["category.kind"]
        letters = torch.tensor([int(kinds.row(i)[0]) for i in range(len(kinds))])
        return {"numbers": torch.from_numpy(np.nan_to_num(columns["features"])), "letters": letters}


class Same:
    '''A loss that insists on it.'''

    temperature = 1.0

    def __call__(self, logits, targets):
        told = targets.log_probs(1.0).argmax(dim=-1)
        assert torch.equal(logits.argmax(dim=-1), told), "a row met what was said about another one"
        return 0 * logits.sum(dim=-1)

    def unscaled(self, values):
        return values
"""


READER = """
import torch


class Reader(torch.nn.Module):
    '''A student that knows what the teacher says.'''

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        numbers = (inputs * 2 + 1).round().long()
        told = (3 * numbers[:, 0] + 5 * numbers[:, 1]) % 7
        return self.scale * torch.nn.functional.one_hot(told, 7)
"""


class Numbers:
    """Rows (a, b)."""

    task: ClassVar = {"factory": "kdpipe.tasks.tabular:TabularClassification", "num_classes": C, "columns": ["a", "b"]}
    student: ClassVar = {"factory": "kdpipe.preprocess:Standardize", "mean": [1.0, 1.0], "std": [2.0, 2.0]}
    teachers: ClassVar = {
        "function": {
            "teacher": {"factory": "kdpipe.teachers.ensemble:FunctionTeacher", "function": "said.py:of_numbers"}
        }
    }
    view = "Shift"
    batches: ClassVar = {}

    @staticmethod
    def raw(i):
        return (i, i * i % 50)

    @classmethod
    def table(cls, rows):
        raws = [cls.raw(i) for i in rows]
        return {"a": [a for a, _ in raws], "b": [b for _, b in raws], "label": [sum(raw) % C for raw in raws]}

    @staticmethod
    def decode(inputs):
        return [tuple(row) for row in (inputs * 2 + 1).round().long().tolist()]

    @staticmethod
    def class_of(raw):
        return (3 * raw[0] + 5 * raw[1]) % C

    label_of = staticmethod(lambda raw: sum(raw) % C)


class Mixed(Numbers):
    """Rows (a, b, letter); some b are missing."""

    task: ClassVar = {**Numbers.task, "categorical": ["kind"], "missing": "allow"}
    student: ClassVar = {"factory": "said.py:Raw"}

    @staticmethod
    def raw(i):
        return (i, 0 if i % 5 == 0 else i * i % 50, "xyz"[i % 3])

    @classmethod
    def table(cls, rows):
        raws = [cls.raw(i) for i in rows]
        columns = {
            "a": [raw[0] for raw in raws],
            "b": [raw[1] or None for raw in raws],
            "kind": [raw[2] for raw in raws],
        }
        return {**columns, "label": [cls.label_of(raw) for raw in raws]}

    @staticmethod
    def decode(inputs):
        letters = map(chr, inputs["letters"].tolist())
        return [(a, b, letter) for (a, b), letter in zip(inputs["numbers"].long().tolist(), letters, strict=True)]

    @staticmethod
    def class_of(raw):
        return (3 * raw[0] + 5 * raw[1] + ord(raw[2])) % C

    label_of = staticmethod(lambda raw: sum(raw[:2]) % C)


PIXELS = {"factory": "kdpipe.preprocess:ImageTensor"}


class Images:
    """Rows are images of one colour."""

    task: ClassVar = {"factory": "kdpipe.tasks.image:ImageClassification", "num_classes": C, "shape": [4, 5, 3]}
    student: ClassVar = {**PIXELS, "mean": [0.5, 0.5, 0.5], "std": [0.125, 0.25, 0.5], "size": [3, 3]}
    teachers: ClassVar = {
        "function": {
            "teacher": {"factory": "kdpipe.teachers.ensemble:FunctionTeacher", "function": "said.py:of_images"}
        },
        "module": {
            "model": {"factory": "said.py:OfColours"},
            "preprocess": {**PIXELS, "mean": [0.25] * 3, "std": [0.5] * 3, "size": [6, 2]},
            "weights": "none.safetensors",
        },
    }
    view = "Shift"
    batches: ClassVar = {}

    @staticmethod
    def raw(i):
        return (i, 7 * i % 90, 13 * i % 250)

    @classmethod
    def pixels(cls, i):
        return np.broadcast_to(np.array(cls.raw(i), np.uint8), (4, 5, 3))

    @classmethod
    def table(cls, rows):
        flat = pa.array(np.concatenate([cls.pixels(i).ravel() for i in rows]))
        return {"image": pa.FixedSizeListArray.from_arrays(flat, 60), "label": [cls.label_of(cls.raw(i)) for i in rows]}

    @staticmethod
    def decode(inputs):
        colours = 255 * (inputs[:, :, 1, 1] * torch.tensor([0.125, 0.25, 0.5]) + 0.5)
        return [tuple(colour) for colour in colours.round().long().tolist()]

    @staticmethod
    def class_of(raw):
        return (3 * raw[0] + 5 * raw[1] + raw[2]) % C

    label_of = staticmethod(lambda raw: raw[2] % C)


class ImagesOfSeveralSizes(Images):
    task: ClassVar = {
        "factory": "kdpipe.tasks.image:ImageClassification",
        "num_classes": C,
        "keep_encoded": True,
        "class_names": [f"class {number}" for number in range(C)],
    }

    @classmethod
    def encoded(cls, i):
        file = io.BytesIO()
        Image.new("RGB", (3 + i % 4, 9 - i % 5), cls.raw(i)).save(file, "PNG")
        return file.getvalue()

    @classmethod
    def table(cls, rows):
        labels = [f"class {cls.label_of(cls.raw(i))}" for i in rows]
        return {"image": [cls.encoded(i) for i in rows], "label": labels}


class Texts:
    """Rows are texts of different lengths."""

    task: ClassVar = {"factory": "kdpipe.tasks.text:TextClassification", "num_classes": C}
    student: ClassVar = {"factory": "kdpipe.preprocess:Utf8Bytes", "max_length": 70}
    teachers: ClassVar = {
        "function": {
            "teacher": {"factory": "kdpipe.teachers.ensemble:FunctionTeacher", "function": "said.py:of_texts"}
        },
        "module": {
            "model": {"factory": "said.py:OfBytes"},
            "preprocess": {"factory": "kdpipe.preprocess:Utf8Bytes", "max_length": 90},
            "weights": "none.safetensors",
        },
    }
    view = "Cased"
    batches: ClassVar = {}

    @staticmethod
    def raw(i):
        return f"row {i}: " + "é, so on"[: i % 9] * (i % 5)

    @classmethod
    def table(cls, rows):
        texts = [cls.raw(i) for i in rows]
        return {"text": texts, "label": [cls.label_of(text) for text in texts]}

    @staticmethod
    def decode(inputs):
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        rows = [
            bytes(ids - 3 for ids in row[: n - 1]) for row, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)
        ]
        return [row.decode() for row in rows]

    @staticmethod
    def class_of(raw):
        return sum((place + 1) * byte for place, byte in enumerate(raw.encode())) % C

    label_of = staticmethod(lambda raw: len(raw.encode()) % C)


class TextsByLength(Texts):
    """The teacher is shown rows of like length together."""

    batches: ClassVar = {"batch_tokens": 80}


class TextsWithoutLabels(Texts):
    label_of = staticmethod(lambda raw: -1)


class NumbersWithoutLabels(Numbers):
    label_of = staticmethod(lambda raw: -1)


# Sources: each writes rows of these numbers below `folder` and gives the data section that reads them.

COLUMNS = {"id": "key", "label": "label", "split": "split"}
WHOLE = {"validation_fraction": 0.0}


def split_of(i):
    return "test" if i % 4 == 0 else "train"


def table_of(kind, rows):
    return pa.table({"key": [f"r{i}" for i in rows], **kind.table(rows), "split": [split_of(i) for i in rows]})


def parquet(kind, folder, rows):
    pq.write_table(table_of(kind, rows), folder / "rows.parquet")
    return {
        "source": {"factory": "kdpipe.data.sources:Table"},
        "path": "rows.parquet",
        "columns": COLUMNS,
        "splits": WHOLE,
    }


def csv(kind, folder, rows):
    pa.csv.write_csv(table_of(kind, rows), folder / "rows.csv")
    return {"source": {"factory": "kdpipe.data.sources:Table"}, "path": "rows.csv", "columns": COLUMNS, "splits": WHOLE}


def json_lines(kind, folder, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in table_of(kind, rows).to_pylist()]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "source": {"factory": "kdpipe.data.sources:Table"},
        "path": "rows.jsonl",
        "columns": COLUMNS,
        "splits": WHOLE,
    }


def folder_of_parquet(kind, folder, rows):
    (folder / "rows").mkdir(exist_ok=True)
    for number, start in enumerate(range(0, len(rows), 10)):
        pq.write_table(table_of(kind, rows[start : start + 10]), folder / "rows" / f"{number}.parquet")
    return {"source": {"factory": "kdpipe.data.sources:Table"}, "path": "rows", "columns": COLUMNS, "splits": WHOLE}


def numpy(kind, folder, rows):
    """Without a key: a row's content is its name."""
    arrays = {name: np.array(values) for name, values in kind.table(rows).items() if name != "image"}
    if kind is Images:
        arrays["image"] = np.stack([kind.pixels(i) for i in rows])
    np.savez(folder / "rows.npz", split=np.array([split_of(i) for i in rows]), **arrays)
    columns = {"label": "label", "split": "split"}
    return {"source": {"factory": "kdpipe.data.sources:NumPy"}, "path": "rows.npz", "columns": columns, "splits": WHOLE}


def image_folder(kind, folder, rows):
    for i in rows:
        path = folder / "images" / split_of(i) / f"class {kind.label_of(kind.raw(i))}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kind.encoded(i))
    return {
        "source": {"factory": "kdpipe.data.sources:ImageFolder", "split_folders": True},
        "path": "images",
        "columns": {"id": "id", "label": "label", "split": "split"},
        "splits": WHOLE,
    }


def lines(kind, folder, rows):
    (folder / "rows.txt").write_text("".join(f"{kind.raw(i)}\n" for i in rows))
    source = {"factory": "kdpipe.data.sources:TextFile"}
    return {"source": source, "path": "rows.txt", "splits": {**WHOLE, "shares": {"train": 0.7, "test": 0.3}}}


def synthetic(kind, folder, rows):
    number = {"kind": "categorical", "values": list(range(90))}
    return {
        "source": {
            "factory": "kdpipe.data.sources:Synthetic",
            "num_rows": len(rows),
            "columns": {"a": number, "b": number},
        },
        "columns": {"id": "id"},
        "splits": {**WHOLE, "shares": {"train": 0.7, "test": 0.3}},
    }


def make(folder, kind, source, teacher="function", rows=range(NUM_ROWS), **sections):
    """A project of these rows, prepared; the teacher's store has 16 rows per shard."""
    folder.mkdir(exist_ok=True)
    (folder / "said.py").write_text(SAID)
    (folder / "reader.py").write_text(READER)
    (folder / "none.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    whole = {
        "data": source(kind, folder, rows),
        "task": kind.task,
        "teachers": {"big": kind.teachers[teacher]},
        "targets": {"big": {"batch_size": 5, "shard_rows": 16, **kind.batches}},
        "student": {
            "model": {"factory": "reader.py:Reader"},
            "preprocess": kind.student,
            "losses": [{"factory": "kdpipe.losses:ForwardKL", "teacher": "big", "temperature": 1}],
            "label_weight": 0,
            "train": {"epochs": 2, "batch_size": 10},
            "baselines": [],
        },
        **sections,
    }
    write_params(folder, whole)
    project = project_in(folder)
    prepare_data.run(project)
    return project


def epochs(project, **held):
    """Batches of two epochs, as the training loop gets them."""
    lesson = Lesson(project)
    inputs, views = lesson.data.inputs, project.views()
    seen = range(views.num_views)
    targets = {"big": AlignedTargets(lesson.stores["big"], inputs, lesson.rows, seen)}
    preprocess = project.preprocess(lesson.section.preprocess, lesson.task, "student.preprocess")
    fit_preprocess(preprocess, inputs, lesson.rows)
    rows = Rows(
        inputs=inputs,
        rows=lesson.rows,
        preprocess=preprocess,
        labels=lesson.labels,
        targets=targets,
        views=views,
        token_labels=token_labels(lesson.task),
    )
    order = BatchOrder(rows=rows.rows, batch_size=10, seed=3, shuffle=shuffle_of(targets.values()))
    stream = stream_of(TrainSection(epochs=2, **held), rows, order)
    steps = stream.steps_per_epoch
    return [[*stream.from_step(epoch * steps, (epoch + 1) * steps)] for epoch in range(2)]


WAYS = ({}, {"ram_budget_mb": 0}, {"ram_budget_mb": 0, "num_workers": 2})


def check_batches(project, kind, **held):
    """That targets and labels are those of the content that the student sees; what it sees in each epoch."""
    seen = []
    for batches in epochs(project, **held):
        raws = [raw for batch in batches for raw in kind.decode(batch.inputs)]
        said = [batch.targets["big"]["logits"].log_probs(1.0).argmax(dim=-1).tolist() for batch in batches]
        assert [*chain(*said)] == [kind.class_of(raw) for raw in raws]
        if project.views().count == 0:  # a view changes the content, not the label
            assert [*chain(*(batch.labels.tolist() for batch in batches))] == [kind.label_of(raw) for raw in raws]
        seen.append(raws)
    return seen


CASES = [
    (Numbers, csv, "function"),
    (Numbers, json_lines, "function"),
    (Numbers, folder_of_parquet, "function"),
    (Numbers, numpy, "function"),
    (NumbersWithoutLabels, synthetic, "function"),
    (Mixed, parquet, "function"),
    (Mixed, csv, "function"),
    (Images, parquet, "module"),
    (Images, numpy, "function"),
    (ImagesOfSeveralSizes, image_folder, "module"),
    (ImagesOfSeveralSizes, parquet, "module"),
    (Texts, csv, "module"),
    (TextsByLength, csv, "module"),
    (Texts, json_lines, "function"),
    (TextsWithoutLabels, lines, "module"),
    (Texts, numpy, "function"),
]
NAMES = [f"{kind.__name__}-{source.__name__}-{teacher}" for kind, source, teacher in CASES]


@pytest.mark.parametrize(("kind", "source", "teacher"), CASES, ids=NAMES)
def test_every_row_meets_its_own_targets_however_it_is_read(tmp_path, kind, source, teacher):
    project = make(tmp_path, kind, source, teacher)
    cache_teacher.run(project, "big")
    first = None
    for held in WAYS:
        seen = check_batches(project, kind, **held)
        assert seen[0] != seen[1], "another order"
        assert Counter(seen[0]) == Counter(seen[1])
        if source not in (lines, synthetic):  # their splits are drawn
            assert sorted(seen[0]) == sorted(kind.raw(i) for i in range(NUM_ROWS) if split_of(i) == "train")
        assert first in (None, seen), "the same batches, however they are read"
        first = seen


@pytest.mark.parametrize(
    ("kind", "source", "teacher"),
    [(Numbers, csv, "function"), (Images, parquet, "module"), (Images, numpy, "function"), (Texts, csv, "module")],
)
@pytest.mark.parametrize("held", WAYS[1:], ids=["here", "by workers"])
def test_every_view_meets_its_own_targets(tmp_path, kind, source, teacher, held):
    views = {"count": 2, "seed": 5, "transform": {"factory": f"said.py:{kind.view}"}}
    project = make(tmp_path, kind, source, teacher, views=views)
    cache_teacher.run(project, "big")
    clean = {kind.raw(i) for i in range(NUM_ROWS)}
    for seen in check_batches(project, kind, **held):
        assert len(set(seen) - clean) > 12


def targets_by_id(project):
    """Every array of the store, by sample id."""
    store = TargetStore.open(project.store("big"))
    arrays = store.read_arrays(np.arange(store.num_rows))
    return {
        key: {name: values[row].tobytes() for name, values in arrays.items()}
        for row, key in enumerate(store.sample_ids.tolist())
    }


@pytest.mark.parametrize(("kind", "source", "teacher"), CASES, ids=NAMES)
def test_rows_added_and_moved_change_nothing_for_the_others(tmp_path, kind, source, teacher):
    project = make(tmp_path, kind, source, teacher)
    cache_teacher.run(project, "big")
    before, shown = targets_by_id(project), tmp_path / "shown.jsonl"
    shown.unlink(missing_ok=True)
    rows = [*range(NUM_ROWS, NUM_ROWS + 6), *np.random.default_rng(0).permutation(NUM_ROWS).tolist()]
    project = make(tmp_path, kind, source, teacher, rows if source is not synthetic else range(len(rows)))
    assert cache_teacher.run(project, "big").rows_computed == 6
    after = targets_by_id(project)
    assert len(after) == NUM_ROWS + 6
    assert before.items() <= after.items()
    if shown.exists() and source is not synthetic:
        found = {
            tuple(row) if isinstance(row, list) else row for row in map(json.loads, shown.read_text().splitlines())
        }
        probed = {tuple(kind.raw(0)[:2]) if kind is Mixed else kind.raw(0)}
        new = {tuple(kind.raw(i)[:2]) if kind is Mixed else kind.raw(i) for i in rows[:6]}
        assert found - probed == new - probed
    check_batches(project, kind)


@pytest.mark.parametrize("held", WAYS, ids=["in memory", "here", "by workers"])
def test_the_training_stage_hands_each_row_its_own_targets(tmp_path, held):
    """A student that knows the answer, and a loss that fails at the first row whose targets are another's."""
    train = {"epochs": 2, "batch_size": 10, "micro_batch_size": 3, **held}
    views = {} if held == {} else {"views": {"count": 2, "transform": {"factory": "said.py:Shift"}}}
    project = make(tmp_path, Numbers, csv, **views)
    cache_teacher.run(project, "big")
    params = yaml.safe_load(project.params_file.read_text())
    params["student"] |= {"train": train, "losses": [{"factory": "said.py:Same", "teacher": "big"}]}
    write_params(tmp_path, params)
    train_student.run(project_in(tmp_path))
    (tmp_path / "reader.py").write_text(READER.replace("(inputs * 2 + 1)", "(inputs * 2 + 2)"))
    with pytest.raises(AssertionError, match="met what was said about another one"):
        train_student.run(project_in(tmp_path))


# Tokens

END = 256


class Documents:
    """Texts of 0 to 30 bytes, read as bytes, with an end after each."""

    task: ClassVar = {"factory": "kdpipe.tasks.language:LanguageModelling", "block_tokens": 11}
    student = None
    batches: ClassVar = {}
    teachers: ClassVar = {
        "function": {
            "teacher": {"factory": "kdpipe.teachers.ensemble:FunctionTeacher", "function": "said.py:of_tokens"}
        }
    }

    @staticmethod
    def raw(i):
        return "".join(chr(97 + (i * i + 3 * place) % 26) for place in range(i * 7 % 31))

    @classmethod
    def table(cls, rows):
        return {"text": [cls.raw(i) for i in rows], "question": [f"{i}?" for i in rows]}


class Packed(Documents):
    task: ClassVar = {**Documents.task, "pack": True}


class AfterPrompts(Documents):
    task: ClassVar = {**Documents.task, "prompt_column": "question"}


def documents(kind, folder, rows):
    data = parquet(kind, folder, rows)
    return {**data, "columns": {"split": "split", **({} if kind is Packed else {"id": "key"})}}


def paragraphs(kind, folder, rows):
    (folder / "rows.txt").write_text("\n\n".join(kind.raw(i) for i in rows))
    source = {"factory": "kdpipe.data.sources:TextFile", "documents": "paragraphs"}
    return {"source": source, "path": "rows.txt", "splits": {**WHOLE, "shares": {"train": 1.0}}}


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (Documents, documents),
        (Documents, paragraphs),
        (Packed, documents),
        (Packed, paragraphs),
        (AfterPrompts, documents),
    ],
)
@pytest.mark.parametrize("encoding", [{}, {"encoding": "topk", "k": 3}])
def test_every_token_meets_its_own_targets_and_the_next_token(tmp_path, kind, source, encoding):
    targets = {"big": {"batch_size": 5, "shard_rows": 16, **encoding}}
    project = make(tmp_path, kind, source, targets=targets)
    cache_teacher.run(project, "big")
    in_split = [i for i in range(NUM_ROWS) if source is paragraphs or split_of(i) == "train"]
    for held in WAYS:
        for batches in epochs(project, **held):
            predicted = Counter()
            for batch in batches:
                tokens, labels = batch.inputs["input_ids"].numpy(), batch.labels.numpy()
                said, counted = batch.targets["big"]["logits"], labels != -1
                prefixes = np.cumsum(tokens * np.arange(1, 12), axis=1) % 257
                assert torch.equal(said.covered, torch.from_numpy(counted))
                assert np.array_equal(most_probable(said)[counted], prefixes[counted])
                assert np.array_equal(labels[:, :-1][counted[:, :-1]], tokens[:, 1:][counted[:, :-1]])
                assert not counted[tokens == END].any(), "the next document is not predicted"
                predicted.update(labels[counted].tolist())
            assert predicted == Counter(token for i in in_split for token in predicted_of(kind, i))


def predicted_of(kind, i):
    """Of a document: every token but its first; of an answer, every token."""
    tokens = [*kind.raw(i).encode(), END]
    return tokens if kind is AfterPrompts else tokens[1:]


def most_probable(said):
    best = said.log_probs(1.0).numpy()
    if not hasattr(said, "ids"):
        return best.argmax(axis=-1)
    return np.take_along_axis(said.ids.numpy(), best[..., :-1].argmax(axis=-1)[..., np.newaxis], axis=-1)[..., 0]


def test_a_teacher_of_other_rows_would_be_found_out(tmp_path):
    """The proof can fail: with a teacher that says of each row what belongs to its neighbour."""
    project = make(tmp_path, Numbers, csv)
    wrong = SAID.replace(
        "return sure((3 * numbers[:, 0]", "numbers = np.roll(numbers, 1, axis=0)\n    return sure((3 * numbers[:, 0]"
    )
    (tmp_path / "said.py").write_text(wrong)
    cache_teacher.run(project, "big")
    assert len(PreparedInputs(project.prepared / "inputs")) == NUM_ROWS
    with pytest.raises(AssertionError):
        check_batches(project, Numbers)
