from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from kdpipe import answers
from kdpipe.answers import Answers, Distance, examine, predict, teacher_answers
from kdpipe.batches import Rows
from kdpipe.data.prepared import PreparedData
from kdpipe.data.preparing import RowSchema, SourceColumns, SplitPlan, prepare
from kdpipe.encodings import Dense
from kdpipe.errors import ConfigError, TrainingError
from kdpipe.inputs import Head
from kdpipe.models.mlp import MLP
from kdpipe.store import TargetStore
from kdpipe.store.aligned import AlignedTargets
from kdpipe.store.manifest import Manifest
from kdpipe.store.statistics import teacher_statistics
from kdpipe.targets import OutputSpec
from toy_rows import NUM_CLASSES, NUM_FEATURES, Blocks, Features, prepared, said, store_of
from toy_targets import dense_of

NUM_TOKENS = 6
LENGTH = 5


def same(left, right, tolerance=0.0):
    """Whether two `Answers` or two `Distance`s are equal."""
    for field in dataclasses.fields(left):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        assert (ours is None) == (theirs is None), field.name
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=field.name)
    return True


@pytest.fixture
def rows(tmp_path):
    """25 of 30 rows in an order of their own, with a teacher's store."""
    data = prepared(tmp_path / "prepared", 30, segments=[11])
    chosen = np.random.default_rng(0).permutation(30)[:25]
    teacher = AlignedTargets(store_of(tmp_path / "store", data, seed=0), data.inputs, chosen)
    preprocess = Features(np.float64)
    return Rows(inputs=data.inputs, rows=chosen, preprocess=preprocess, labels=data.labels, targets={"big": teacher})


def network():
    torch.manual_seed(0)
    return MLP((NUM_FEATURES,), NUM_CLASSES, hidden=[8], dropout=0.5).double()


def test_predictions_keep_the_order_of_rows(rows):
    model = network().train()
    found = list(predict(model, rows, 4, Head()))
    assert rows.preprocess.calls == 7
    assert not model.training
    assert np.concatenate([batch.rows for batch, _ in found]).tolist() == rows.rows.tolist()
    logits = torch.cat([logits for _, logits in found])
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        alone = torch.cat([model(rows.preprocess(rows.inputs.read(np.array([row])))) for row in rows.rows]).float()
    torch.testing.assert_close(logits.cpu(), alone)


def test_blocks_are_the_whole(rows, monkeypatch):
    logits = torch.cat([logits for _, logits in predict(network(), rows, 25, Head())]).cpu()
    labels = torch.from_numpy(rows.labels[rows.rows])
    keys = rows.inputs.read(rows.rows)["features"][:, 0].astype(np.int64)
    teacher = dense_of(said(keys), dtype=torch.float16)
    expected = Answers.of_logits(logits, labels, keep_probabilities=True)
    for numbers in (2**22, 3 * NUM_CLASSES, 1):
        monkeypatch.setattr(answers, "NUMBERS_AT_ONCE", numbers)
        for batch_size in (1, 4, 25, 100):
            found, distances = examine(network(), rows, batch_size, Head(), keep_probabilities=True)
            assert same(found, expected, tolerance=1e-5)
            assert same(distances["big"], Distance.of_logits(logits, teacher), tolerance=1e-5)
    assert examine(network(), rows, 4, Head())[0].probabilities is None


def test_a_teacher_answers_from_its_store(rows):
    found = teacher_answers(rows, rows.targets["big"], 4, keep_probabilities=True)
    keys = rows.inputs.read(rows.rows)["features"][:, 0].astype(np.int64)
    there = Answers.of_logits(said(keys), torch.from_numpy(rows.labels[rows.rows]), keep_probabilities=True)
    np.testing.assert_allclose(found.probabilities, there.probabilities, atol=1e-3)
    np.testing.assert_allclose(found.nll, there.nll, atol=1e-2)
    assert found.labels.tolist() == there.labels.tolist()
    assert not found.top1.any()  # this store's statistics are all 0, whatever its targets are
    assert not found.confidence.any()
    assert rows.preprocess.calls == 0


class TokenModel(torch.nn.Module):
    """Logits `[B, T, C]`, a table's row per token; takes tensors by name and gives them by name."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(3 * torch.randn(NUM_TOKENS, NUM_TOKENS, generator=generator))
        self.lengths = []

    def forward(self, input_ids, attention_mask):
        self.lengths.append(input_ids.shape[1])
        assert attention_mask.shape == input_ids.shape
        return {"hidden": input_ids, "scores": self.table[input_ids]}


class TokenInputs:
    """Tokens and their mask."""

    def fit(self, blocks):
        pass

    def state(self):
        return {}

    def load_state(self, state):
        pass

    def __call__(self, columns):
        ids = torch.from_numpy(np.asarray(columns["tokens"], np.int64)[:, :-1])
        return {"input_ids": ids, "attention_mask": torch.from_numpy(np.asarray(columns["present"]))}


def token_labels(columns):
    return np.where(columns["present"], np.asarray(columns["tokens"], np.int64)[:, 1:], -1)


def token_rows(folder, *, encoding=None, covered=None):
    """Rows of 1 to 4 of 5 tokens, some hidden, with a store of teacher logits `[T, C]`; `covered [N, T]`."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, NUM_TOKENS, (12, LENGTH + 1)).astype(np.int32)
    lengths = np.array([3, 1, 4, 2, 4, 3, 1, 2, 3, 4, 2, 1])
    present = np.arange(LENGTH) < lengths[:, np.newaxis]
    table = pa.table({"id": range(12), "split": ["test"] * 12})

    def to_inputs(batch, name_of):
        keys = batch.column(0).to_numpy()
        return {"tokens": tokens[keys], "present": present[keys]}

    schema = RowSchema(to_inputs=to_inputs, to_labels=lambda values, name_of: np.zeros(len(values), np.int64))
    columns = SourceColumns(id="id", label="id", split="split")
    prepare(Blocks(table), schema, columns, SplitPlan(), folder / "prepared")
    data = PreparedData(folder / "prepared")
    logits = 3 * torch.randn(12, LENGTH, NUM_TOKENS, generator=torch.Generator().manual_seed(1))
    encoding, output = encoding or Dense(dtype="float32"), OutputSpec(name="logits", shape=logits.shape[1:])
    manifest = Manifest(
        ingredients={"teacher": "toy"},
        outputs=[output],
        encodings={"logits": encoding.to_json()},
        temperatures=[1.0],
        num_classes=NUM_TOKENS,
        class_names=None,
        shard_rows=5,
        coverage=covered is not None,
    )
    store = TargetStore.create(folder / "store", manifest, data.inputs.sample_ids, data.inputs.digests)
    for view, shard in store.missing():
        part = slice(shard.start, shard.stop)
        arrays = {f"logits{suffix}": values for suffix, values in encoding.encode(logits[part]).items()}
        arrays["statistics"] = teacher_statistics(logits[part])
        if covered is not None:
            arrays["covered"] = covered[part]
        store.write(view, shard, arrays, batch_size=5)
    store.finish()
    chosen = np.arange(12)[::-1].copy()
    rows = Rows(
        inputs=data.inputs,
        rows=chosen,
        preprocess=TokenInputs(),
        labels=data.labels,
        targets={"big": AlignedTargets(TargetStore.open(folder / "store"), data.inputs, chosen)},
        token_labels=token_labels,
    )
    return rows, tokens[chosen], present[chosen], logits[torch.from_numpy(chosen)]


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_tokens_that_do_not_count_are_not_there(tmp_path, monkeypatch, batch_size):
    rows, tokens, present, teacher = token_rows(tmp_path)
    monkeypatch.setattr(answers, "NUMBERS_AT_ONCE", 4 * NUM_TOKENS)
    model = TokenModel()
    ids, labels = (torch.from_numpy(each[present].astype(np.int64)) for each in (tokens[:, :-1], tokens[:, 1:]))
    found, distances = examine(model, rows, batch_size, Head("scores", NUM_TOKENS))
    with torch.inference_mode():
        logits = model.table[ids]
    flat = teacher[torch.from_numpy(present)]
    assert len(found.labels) == present.sum() < present.size
    assert same(found, Answers.of_logits(logits, labels), tolerance=1e-6)
    assert same(distances["big"], Distance.of_logits(logits, dense_of(flat)), tolerance=1e-5)
    assert same(teacher_answers(rows, rows.targets["big"], batch_size), Answers.of_logits(flat, labels), tolerance=1e-5)
    assert max(model.lengths) == 4  # the fifth token is hidden in every row


def test_tokens_that_the_teacher_is_silent_about(tmp_path):
    covered = np.random.default_rng(1).random((12, LENGTH)) < 0.5
    rows, tokens, present, teacher = token_rows(tmp_path, covered=covered)
    found = teacher_answers(rows, rows.targets["big"], 5)
    spoken = covered[::-1]
    assert found.spoken.tolist() == spoken[present].tolist()
    labelled = found.labelled()
    both = present & spoken
    flat, labels = teacher[torch.from_numpy(both)], torch.from_numpy(tokens[:, 1:][both].astype(np.int64))
    assert same(labelled, Answers.of_logits(flat, labels), tolerance=1e-5)


def test_a_row_whose_label_must_not_be_known_has_no_tokens(tmp_path):
    rows, _, present, _ = token_rows(tmp_path)
    labels = rows.labels.copy()
    labels[rows.rows[:3]] = -1
    found, _ = examine(TokenModel(), dataclasses.replace(rows, labels=labels), 5, Head("scores"))
    assert len(found.labels) == present[3:].sum()


@pytest.mark.parametrize("counted", [0, 1])
def test_rows_none_of_whose_tokens_counts(tmp_path, counted):
    rows, *_ = token_rows(tmp_path)
    labels = np.full(12, -1)
    labels[:counted] = 0
    few = dataclasses.replace(rows, labels=labels)
    found, distances = examine(TokenModel(), few, 5, Head("scores"))
    assert len(found.labels) == len(distances["big"].kl) == [0, 3][counted]


class Gives(torch.nn.Module):
    """Some logits, whatever the input."""

    def __init__(self, *shape, value=0.0):
        super().__init__()
        self._shape, self._value = shape, value

    def forward(self, input_ids, attention_mask):
        return torch.full((len(input_ids), *self._shape), self._value)


@pytest.mark.parametrize("shape", [(NUM_TOKENS,), (3, NUM_TOKENS)])
def test_logits_that_are_not_one_vector_per_label_are_refused(tmp_path, shape):
    rows, *_ = token_rows(tmp_path)
    with pytest.raises(ConfigError, match=r"for labels of shape \[12, 5\]; expected one vector per token that counts"):
        examine(Gives(*shape), rows, 12, Head())


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    rows, *_ = token_rows(tmp_path)
    with pytest.raises(TrainingError, match="NaN"):
        examine(Gives(4, NUM_TOKENS, value=torch.nan), rows, 12, Head())
