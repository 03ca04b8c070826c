"""Labels of rows that a view mixes: both count, in the rows' shares, where both are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.errors import ConfigError
from kdpipe.models.mlp import MLP
from kdpipe.training import TrainPlan, fit
from kdpipe.transforms import Mixup, Noise
from kdpipe.views import PartnerPlan, ViewSpec
from toy_rows import NUM_CLASSES, NUM_FEATURES, distill_term, label_term, lesson, prepared, stream_of

NUM_ROWS = 36
NO_CHECKPOINT = Path("/no such folder/checkpoint")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Float64 rows, each mixed with another one; the labels of about half of them are known."""
    data = prepared(tmp_path_factory.mktemp("mixed"), NUM_ROWS)
    plan = PartnerPlan(data.inputs.sample_ids, np.full(NUM_ROWS, "train"))
    views = ViewSpec(count=1, seed=1, transform=Mixup(alpha=1), partners=plan)
    return replace(lesson(data, num_labelled=NUM_ROWS // 2), views=views)


def model():
    torch.manual_seed(0)
    return MLP((NUM_FEATURES,), NUM_CLASSES, hidden=[8]).double()


def by_hand(rows, logits, view=1):
    """Row by row: the value of those that count, None of the others."""
    shown = rows.views.read(rows.inputs.read, rows.inputs.sample_ids, rows.rows, view)
    values = []
    for row, partner, share, said in zip(rows.rows, shown.partners, shown.share, logits, strict=True):
        own, other = rows.labels[row], rows.labels[partner]
        if MISSING_LABEL in (own, other):
            values.append(None)
            continue
        log_probs = torch.log_softmax(said, dim=0)
        values.append(float(-np.float32(share) * log_probs[own] - (1 - np.float32(share)) * log_probs[other]))
    return values


def test_both_labels_count_in_their_shares(rows):
    batch = rows.batch(rows.rows, view=1)
    with torch.no_grad():
        logits = model()(batch.inputs)
    expected, term = by_hand(rows, logits), label_term()
    valid, values = term.valid(batch).tolist(), term.values(logits, batch).tolist()
    assert valid == [each is not None for each in expected]
    assert 0 < sum(valid) < len(valid)
    for value, wanted in zip(values, expected, strict=True):
        assert wanted is None or value == pytest.approx(wanted, rel=1e-6)
    clean = rows.batch(rows.rows)
    assert clean.other_labels is None
    assert clean.share is None


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_training_takes_the_mean_over_rows_that_count(rows, micro_batch_size):
    with torch.no_grad():
        counted = [each for each in by_hand(rows, model()(rows.batch(rows.rows, view=1).inputs)) if each is not None]
    plan = TrainPlan(steps=1, seed=0, micro_batch_size=micro_batch_size)
    stream = stream_of(rows, batch_size=NUM_ROWS)
    fitted = fit(model(), stream, [distill_term(), label_term()], plan, NO_CHECKPOINT)
    assert fitted.history[0]["label"] == pytest.approx(np.mean(counted), rel=1e-5)


def test_parts_and_copies_of_a_batch_keep_them(rows):
    batch = rows.batch(rows.rows, view=1)
    part = batch.to(torch.device("cpu")).part(slice(3, 9))
    assert torch.equal(part.other_labels, batch.other_labels[3:9])
    assert torch.equal(part.share, batch.share[3:9])
    unmixed = replace(rows, views=ViewSpec(count=1, transform=Noise(std=1))).batch(rows.rows, view=1)
    assert unmixed.part(slice(3)).other_labels is None


def test_labels_of_tokens_are_not_mixed(rows):
    with pytest.raises(ConfigError, match="labels of tokens cannot be mixed"):
        replace(rows, token_labels=lambda columns: np.zeros((1, 1), np.int64))
