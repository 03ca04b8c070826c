from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.answers import Answers, Distance
from kdpipe.encodings import Sampled
from kdpipe.errors import ConfigError
from kdpipe.evaluation import (
    METRICS,
    answer_metrics,
    check_metrics,
    distance_metrics,
    expected_calibration_error,
    gain_text,
    keeps_probabilities,
    mean_text,
    paired_gain,
    reliability,
)
from kdpipe.store.manifest import STATISTICS
from kdpipe.store.statistics import teacher_statistics
from kdpipe.targets import DenseTargets, OutputSpec, Targets
from toy_targets import dense_of, sparse_of


def random_logits(seed: int, num_rows: int = 40, num_classes: int = 4) -> torch.Tensor:
    return 3 * torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(seed))


def random_labels(num_classes: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, num_classes, 40))


def answers_of(logits: torch.Tensor, labels: torch.Tensor) -> Answers:
    return Answers.of_logits(logits, labels, keep_probabilities=True)


def beside(logits: torch.Tensor, **teachers: torch.Tensor | DenseTargets) -> dict[str, float]:
    """Agreement and distances of logits from teachers, given by their logits or targets."""
    labels = torch.full((len(logits),), -1)
    targets = {name: each if isinstance(each, DenseTargets) else dense_of(each) for name, each in teachers.items()}
    said = {name: teacher_said(each, labels) for name, each in targets.items()}
    distances = {name: Distance.of_logits(logits, each) for name, each in targets.items()}
    return distance_metrics(Answers.of_logits(logits, labels), said, distances)


def teacher_said(targets: Targets, labels: torch.Tensor, logits: torch.Tensor | None = None) -> Answers:
    """A teacher's answers as its store has them."""
    values = teacher_statistics(targets.logits() if logits is None else logits)
    noted = dict(zip(STATISTICS, values.T, strict=True))
    return Answers.of_targets(noted, targets, labels, keep_probabilities=True)


def test_metrics_are_their_definitions():
    logits, teacher, labels = random_logits(0), random_logits(1), random_labels()
    p = scipy.special.softmax(teacher.double().numpy(), axis=1)
    q = scipy.special.softmax(logits.double().numpy(), axis=1)
    truth, top1 = labels.numpy(), q.argmax(axis=1)
    found = answer_metrics(answers_of(logits, labels), [*METRICS]) | beside(logits, big=teacher)
    assert found == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(truth, top1),
            "ece": expected_calibration_error(q.max(axis=1), top1 == truth),
            "entropy": scipy.stats.entropy(q, axis=1).mean(),
            "macro_f1": sklearn.metrics.f1_score(truth, top1, average="macro"),
            "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(truth, top1),
            "auc": sklearn.metrics.roc_auc_score(truth, q, multi_class="ovr"),
            "nll": sklearn.metrics.log_loss(truth, q),
            "perplexity": scipy.stats.gmean(1 / q[np.arange(40), truth]),
            "agreement": np.mean(top1 == p.argmax(axis=1)),
            "kl_to_teacher": scipy.stats.entropy(p, q, axis=1).mean(),
            "reverse_kl_to_teacher": scipy.stats.entropy(q, p, axis=1).mean(),
        },
        abs=1e-6,
    )
    assert 0 < found["accuracy"] < 1
    assert 0 < found["agreement"] < 1


def test_two_classes_have_the_curve_of_the_second():
    logits, labels = random_logits(0, num_classes=2), random_labels(2)
    share_above = [
        (labels[None, labels == 1] >= 0) & (logits[labels == 1, 1] - logits[labels == 1, 0] > each[1] - each[0])
        for each in logits[labels == 0]
    ]
    found = answer_metrics(answers_of(logits, labels), ["auc"])["auc"]
    assert found == pytest.approx(float(torch.stack(share_above).float().mean()), abs=1e-6)
    assert 0.2 < found < 0.8


def test_imbalance_shows_in_all_but_accuracy():
    labels = torch.tensor([0] * 95 + [1] * 5)
    always_0 = torch.tensor([1.0, 0.0]).expand(100, 2)
    found = answer_metrics(answers_of(always_0, labels), ["macro_f1", "balanced_accuracy", "auc"])
    assert found["accuracy"] == 0.95
    assert found["balanced_accuracy"] == found["auc"] == 0.5
    assert found["macro_f1"] == pytest.approx(0.95 / 1.95)


def test_classes_without_rows():
    """Class 3 has no row, so it has no curve. Recall is of the others, F1 of classes that are labels or answers."""
    logits, labels = random_logits(0), random_labels().clamp(max=2)
    found = answer_metrics(answers_of(logits, labels), ["macro_f1", "balanced_accuracy", "auc"])
    top1 = logits.argmax(dim=-1)
    assert math.isnan(found["auc"])
    assert found["balanced_accuracy"] == pytest.approx(
        np.mean([float((top1[labels == each] == each).float().mean()) for each in range(3)])
    )
    f1 = [
        2 * int(((top1 == each) & (labels == each)).sum()) / int((top1 == each).sum() + (labels == each).sum())
        for each in range(4)
    ]
    assert f1[3] == 0
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    only = answer_metrics(answers_of(logits, torch.zeros(40, dtype=torch.int64)), ["balanced_accuracy", "auc"])
    assert math.isnan(only["auc"])
    assert only["balanced_accuracy"] == only["accuracy"]


@given(seed=st.integers(0, 1000))
def test_a_teacher_agrees_with_itself(seed):
    logits = random_logits(seed)
    found = beside(logits, itself=logits)
    assert found["agreement"] == 1
    assert 0 <= found["kl_to_teacher"] < 1e-6
    assert 0 <= found["reverse_kl_to_teacher"] < 1e-6
    assert answer_metrics(answers_of(logits, logits.argmax(dim=-1)))["accuracy"] == 1


def test_missing_labels_are_ignored():
    logits, labels = random_logits(2), random_labels()
    some = torch.where(torch.arange(40) % 3 == 0, labels, -1)
    found = answer_metrics(answers_of(logits, some), [*METRICS])
    only = answer_metrics(answers_of(logits[::3], labels[::3]), [*METRICS])
    everyone = answer_metrics(answers_of(logits, labels), [*METRICS])
    assert found["entropy"] == everyone["entropy"] != only["entropy"]
    for key in {*found} - {"entropy"}:
        assert found[key] == only[key] != everyone[key]


def test_without_labels_there_is_no_accuracy():
    found = answer_metrics(answers_of(random_logits(0), torch.full((40,), -1)), [*METRICS])
    assert math.isfinite(found["entropy"])
    assert all(math.isnan(found[key]) for key in {*found} - {"entropy"})
    assert set(found) == {"accuracy", "ece", "entropy", *METRICS}


def test_several_teachers_are_told_apart():
    logits = random_logits(0)
    found = beside(logits, same=logits, other=random_logits(1))
    keys = ("agreement", "kl_to_teacher", "reverse_kl_to_teacher")
    assert found["agreement"] == 1 > found["agreement_other"]
    assert found["kl_to_teacher"] < 1e-6 < found["kl_to_teacher_other"]
    assert found["reverse_kl_to_teacher"] < 1e-6 < found["reverse_kl_to_teacher_other"]
    assert set(found) == {*keys, *(f"{key}_other" for key in keys)}


def test_rows_that_the_teacher_abstains_from_are_left_out_of_what_is_about_it():
    logits, teacher, labels = random_logits(0), random_logits(1), random_labels()
    covered = torch.arange(40) % 3 == 0
    found, there = beside(logits, big=dense_of(teacher, covered)), beside(logits[covered], big=teacher[covered])
    whole = beside(logits, big=teacher)
    assert found == pytest.approx(there, abs=1e-9)
    assert all(found[key] != whole[key] for key in found)
    part = teacher_said(dense_of(teacher, covered), labels)
    alone = teacher_said(dense_of(teacher[covered]), labels[covered])
    assert answer_metrics(part, [*METRICS]) == answer_metrics(alone, [*METRICS])
    nobody = dense_of(teacher, torch.zeros(40, dtype=torch.bool))
    assert all(math.isnan(value) for value in beside(logits, big=nobody).values())


def test_a_teachers_numbers_are_those_of_its_logits_where_the_targets_tell():
    logits, labels = random_logits(0), random_labels()
    alone = answer_metrics(answers_of(logits, labels), [*METRICS])
    assert answer_metrics(teacher_said(dense_of(logits), labels), [*METRICS]) == pytest.approx(alone, abs=1e-6)
    every_class = teacher_said(sparse_of(logits, 4, (1.0,)), labels, logits)
    without_auc = {key: value for key, value in alone.items() if key != "auc"}
    assert answer_metrics(every_class, [*METRICS]) == pytest.approx(without_auc, abs=1e-6)


def test_what_the_targets_do_not_tell_of_a_teacher_is_left_out():
    logits, labels = random_logits(0), random_labels()
    for k in (1, 2, 3):
        found = answer_metrics(teacher_said(sparse_of(logits, k, (1.0,)), labels, logits), [*METRICS])
        assert set(found) == {"accuracy", "ece", "entropy", "macro_f1", "balanced_accuracy"}
    right = answer_metrics(teacher_said(sparse_of(logits, 1, (1.0,)), logits.argmax(dim=-1), logits), ["nll"])
    assert right["nll"] == pytest.approx(float(-torch.log_softmax(logits, dim=-1).amax(dim=-1).mean()), abs=1e-6)
    covered = torch.arange(40) < 20
    silent = replace(sparse_of(logits, 1, (1.0,)), covered=covered)
    elsewhere = torch.where(covered, logits.argmax(dim=-1), logits.argmin(dim=-1))
    assert "nll" in answer_metrics(teacher_said(silent, elsewhere, logits), ["nll"])
    encoding, output = Sampled(draws=8), OutputSpec(name="logits", shape=(4,))
    drawn = encoding.decode(encoding.encode(logits, np.arange(40, dtype=np.uint64)), output)
    found = answer_metrics(teacher_said(drawn, labels, logits), [*METRICS])
    assert set(found) == {"accuracy", "ece", "entropy", "macro_f1", "balanced_accuracy"}
    assert Distance.of_logits(logits, drawn).reverse_kl is None
    distance = {"big": Distance.of_logits(random_logits(1), drawn)}
    assert set(
        distance_metrics(answers_of(random_logits(1), labels), {"big": teacher_said(drawn, labels, logits)}, distance)
    ) == {
        "agreement",
        "kl_to_teacher",
    }


def test_numbers_beyond_all_bounds_are_told_as_such():
    impossible = torch.tensor([[0.0, -torch.inf], [-2000.0, 0.0]])
    found = answer_metrics(answers_of(impossible, torch.tensor([1, 0])), ["nll", "perplexity"])
    assert found["nll"] == found["perplexity"] == math.inf
    far = answer_metrics(answers_of(impossible[1:], torch.tensor([0])), ["nll", "perplexity"])
    assert (far["nll"], far["perplexity"]) == (2000, math.inf)


def test_probabilities_are_kept_of_few_classes_only():
    assert keeps_probabilities(["auc"], 100)
    assert not keeps_probabilities(["auc"], 101)
    assert not keeps_probabilities(["nll"], 2)
    without = Answers.of_logits(random_logits(0), random_labels())
    assert "auc" not in answer_metrics(without, ["auc"])


def test_a_metric_that_does_not_exist_lists_those_that_do():
    check_metrics([*METRICS])
    with pytest.raises(ConfigError, match="the task names the metric 'f1'; there are macro_f1, balanced_accuracy, auc"):
        check_metrics(["f1"])


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


def test_gains_and_means_as_text():
    gain = paired_gain([0.5, 0.7, 0.6], [0.4, 0.5, 0.4])
    assert gain_text([0.5, 0.7, 0.6], [0.4, 0.5, 0.4]) == "+16.67 [2.32, 31.01]: BEATS"
    assert gain.interval(scale=1, digits=1) == "+0.2 [0.0, 0.3]"
    assert gain_text([0.5], [0.75], digits=0) == "-25: UNDECIDED"
    assert mean_text([0.5, 0.7, 0.6]) == "60.00 ± 10.00"
    assert mean_text([0.5], scale=1, digits=1) == "0.5"
