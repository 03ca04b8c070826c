from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe import evaluation
from kdpipe.encodings import Dense
from kdpipe.evaluation import (
    Answers,
    Said,
    answer_metrics,
    classification_metrics,
    expected_calibration_error,
    paired_gain,
    predict,
    reliability,
)
from kdpipe.models.mlp import MLP
from kdpipe.targets import OutputSpec
from toy_rows import NUM_CLASSES, NUM_FEATURES, Features, prepared


def random_logits(seed: int, num_rows: int = 40, num_classes: int = 4) -> torch.Tensor:
    return 3 * torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(seed))


def said(logits: torch.Tensor) -> Said:
    encoding, output = Dense(dtype="float32"), OutputSpec(name="logits", shape=logits.shape[1:])
    return Said(answers=Answers.of_logits(logits), targets=encoding.decode(encoding.encode(logits), output))


def test_metrics_are_their_definitions():
    logits, teacher = random_logits(0), random_logits(1)
    labels = np.random.default_rng(0).integers(0, 4, 40)
    p = scipy.special.softmax(teacher.double().numpy(), axis=1)
    q = scipy.special.softmax(logits.double().numpy(), axis=1)
    found = classification_metrics(logits, labels, {"big": said(teacher)})
    assert found == pytest.approx(
        {
            "accuracy": np.mean(q.argmax(axis=1) == labels),
            "ece": expected_calibration_error(q.max(axis=1), q.argmax(axis=1) == labels),
            "entropy": scipy.stats.entropy(q, axis=1).mean(),
            "agreement": np.mean(q.argmax(axis=1) == p.argmax(axis=1)),
            "kl_to_teacher": scipy.stats.entropy(p, q, axis=1).mean(),
        },
        abs=1e-6,
    )
    assert 0 < found["accuracy"] < 1
    assert 0 < found["agreement"] < 1


@given(seed=st.integers(0, 1000))
def test_a_teacher_agrees_with_itself(seed):
    logits = random_logits(seed)
    found = classification_metrics(logits, logits.argmax(dim=-1).numpy(), {"itself": said(logits)})
    assert found["agreement"] == found["accuracy"] == 1
    assert 0 <= found["kl_to_teacher"] < 1e-6
    assert found["entropy"] > 0.01


def test_missing_labels_are_ignored():
    logits, teacher = random_logits(2), {"big": said(random_logits(3))}
    labels = np.random.default_rng(0).integers(0, 4, 40)
    some = np.where(np.arange(40) % 3 == 0, labels, -1)
    found = classification_metrics(logits, some, teacher)
    only = classification_metrics(logits[::3], labels[::3], teacher | {"big": said(random_logits(3)[::3])})
    everyone = classification_metrics(logits, labels, teacher)
    assert {key: found[key] for key in ("accuracy", "ece")} == {key: only[key] for key in ("accuracy", "ece")}
    for key in ("entropy", "agreement", "kl_to_teacher"):
        assert found[key] == everyone[key] != only[key]
    assert found["accuracy"] != everyone["accuracy"]


def test_without_labels_there_is_no_accuracy():
    found = classification_metrics(random_logits(0), np.full(40, -1), {})
    assert math.isnan(found["accuracy"])
    assert math.isnan(found["ece"])
    assert math.isfinite(found["entropy"])
    assert set(found) == {"accuracy", "ece", "entropy"}


def test_several_teachers_are_told_apart():
    logits = random_logits(0)
    teachers = {"same": said(logits), "other": said(random_logits(1))}
    found = classification_metrics(logits, np.zeros(40, np.int64), teachers)
    assert found["agreement"] == 1 > found["agreement_other"]
    assert found["kl_to_teacher"] < 1e-6 < found["kl_to_teacher_other"]
    assert not {"agreement_same", "kl_to_teacher_same"} & set(found)


def test_rows_that_the_teacher_abstains_from_are_left_out_of_what_is_about_it():
    logits, labels = random_logits(0), np.random.default_rng(0).integers(0, 4, 40)
    whole, spoken = said(random_logits(1)), np.arange(40) % 3 == 0
    part = replace(whole, answers=replace(whole.answers, spoken=spoken))
    found = classification_metrics(logits, labels, {"big": part})
    there = classification_metrics(logits[spoken], labels[spoken], {"big": said(random_logits(1)[spoken])})
    for key in ("agreement", "kl_to_teacher"):
        assert found[key] == pytest.approx(there[key], abs=1e-9)
        assert found[key] != classification_metrics(logits, labels, {"big": whole})[key]
    assert found["accuracy"] == classification_metrics(logits, labels, {})["accuracy"]
    assert answer_metrics(part.answers, labels) == answer_metrics(
        Answers.of_logits(random_logits(1)[spoken]), labels[spoken]
    )


def test_ece_by_hand():
    # 15 bins of 1/15: 0.95 and 1 lie in the last, 0.55 in the ninth, 0.51 in the eighth.
    confidence = np.array([0.95, 0.95, 0.95, 1.0, 0.55, 0.55, 0.51])
    correct = np.array([True, True, True, False, True, False, True])
    by_hand = 4 / 7 * abs(0.75 - 0.9625) + 2 / 7 * abs(0.5 - 0.55) + 1 / 7 * abs(1 - 0.51)
    assert expected_calibration_error(confidence, correct) == pytest.approx(by_hand)
    bins = reliability(confidence, correct)
    assert [(each.share, each.confidence, each.accuracy) for each in bins] == [
        pytest.approx(expected) for expected in ((1 / 7, 0.51, 1.0), (2 / 7, 0.55, 0.5), (4 / 7, 0.9625, 0.75))
    ]


@pytest.mark.parametrize(("confidence", "correct", "ece"), [(1.0, True, 0.0), (1.0, False, 1.0), (0.0, False, 0.0)])
def test_ece_at_the_edges(confidence, correct, ece):
    assert expected_calibration_error(np.full(3, confidence), np.full(3, correct)) == ece


@given(seed=st.integers(0, 1000), num_rows=st.integers(1, 200))
def test_ece_depends_on_no_order_and_lies_in_its_range(seed, num_rows):
    random = np.random.default_rng(seed)
    confidence, correct = random.uniform(size=num_rows), random.integers(0, 2, num_rows).astype(bool)
    order = random.permutation(num_rows)
    ece = expected_calibration_error(confidence, correct)
    assert abs(correct.mean() - confidence.mean()) - 1e-12 <= ece <= 1
    assert expected_calibration_error(confidence[order], correct[order]) == pytest.approx(ece, abs=1e-12)
    assert sum(each.share for each in reliability(confidence, correct)) == pytest.approx(1)


@given(ours=st.lists(st.floats(0, 1), min_size=2, max_size=8), seed=st.integers(0, 1000))
def test_paired_gain_is_the_t_interval(ours, seed):
    theirs = np.random.default_rng(seed).uniform(size=len(ours))
    gain = paired_gain(ours, theirs.tolist())
    expected = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert gain.mean == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-12)
    opposite = paired_gain(theirs.tolist(), ours)
    assert (opposite.low, opposite.high) == pytest.approx((-gain.high, -gain.low))


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([0.9, 0.92, 0.91], [0.8, 0.83, 0.81], "BEATS"),
        ([0.8, 0.83, 0.81], [0.9, 0.92, 0.91], "WORSE"),
        ([0.9, 0.8, 0.85], [0.8, 0.9, 0.85], "NO DIFFERENCE"),
        ([0.5, 0.5], [0.5, 0.5], "NO DIFFERENCE"),
        ([0.9, 0.9, 0.9], [0.6, 0.9, 0.9], "NO DIFFERENCE"),
        ([0.6, 0.9, 0.9], [0.9, 0.9, 0.9], "NO DIFFERENCE"),
        ([0.9], [0.1], "UNDECIDED"),
    ],
)
def test_verdicts(ours, theirs, verdict):
    gain = paired_gain(ours, theirs)
    assert gain.verdict == verdict
    assert math.isnan(gain.low) == math.isnan(gain.high) == (verdict == "UNDECIDED")
    assert gain.mean == pytest.approx(np.mean(np.subtract(ours, theirs)))


def test_pairing_matters():
    theirs = [0.5, 0.6, 0.7, 0.8]
    assert paired_gain([0.52, 0.62, 0.72, 0.821], theirs).verdict == "BEATS"
    assert paired_gain([0.821, 0.72, 0.62, 0.52], theirs).verdict == "NO DIFFERENCE"


def test_predict_keeps_the_order_of_rows(tmp_path, monkeypatch):
    data = prepared(tmp_path, 30, segments=[11])
    model = MLP((NUM_FEATURES,), NUM_CLASSES, hidden=[8], dropout=0.5).double()
    rows = np.random.default_rng(0).permutation(30)[:25]
    preprocess = Features(np.float64)
    whole = predict(model, data.inputs, rows, preprocess)
    monkeypatch.setattr(evaluation, "PREDICT_ROWS", 4)
    blocks = predict(model.train(), data.inputs, rows, preprocess)
    assert preprocess.calls == 1 + 7
    assert whole.dtype == torch.float32
    assert not model.training
    torch.testing.assert_close(blocks, whole)
    with torch.inference_mode():
        alone = torch.cat([model(preprocess(data.inputs.read(np.array([row])))) for row in rows]).float()
    torch.testing.assert_close(whole, alone)
