"""Several teachers as one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdpipe.losses as kdpipe_losses
from kdpipe.errors import ConfigError
from kdpipe.losses import ForwardKL, LossTerm, SoftTargetCE, forward_kl, kd_loss, mixed, valid_rows, values_of
from kdpipe.targets import DenseTargets, FeatureTargets, SampledTargets
from loss_definitions import DEFINED, random_logits, softmax, value_and_gradient
from toy_targets import dense_of, sparse_of

ROWS, CLASSES = 6, 5
STUDENT = random_logits(0, ROWS, CLASSES)
TEACHERS = [random_logits(seed, ROWS, CLASSES) for seed in (1, 2, 3)]
LABELS = torch.tensor([0, 1, 4, -1, 2, 3])
COVERED = [
    torch.tensor([True, True, True, True, False, False]),
    torch.tensor([True, False, True, True, True, False]),
    torch.tensor([True, True, False, True, False, False]),
]
LOSSES = {name: each.make(kdpipe_losses) for name, each in DEFINED.items()}
OF_LOGITS = {name for name in LOSSES if "logit_mse" in name or "standardised" in name}


def close(found, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def everybody() -> list[DenseTargets]:
    return [dense_of(each) for each in TEACHERS]


def some() -> list[DenseTargets]:
    return [dense_of(each, covered) for each, covered in zip(TEACHERS, COVERED, strict=True)]


# What a mixture is


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
    temperature=st.floats(0.2, 20),
)
def test_probabilities_are_averaged_at_every_temperature(seed, weights, temperature):
    teachers = [random_logits(seed + index, 3, 4) for index in range(len(weights))]
    targets = mixed([dense_of(each) for each in teachers], tuple(weights))
    expected = sum(weight * softmax(each, temperature) for weight, each in zip(weights, teachers, strict=True))
    close(targets.log_probs(temperature).exp(), expected / sum(weights))
    close(torch.log_softmax(targets.softened(temperature), dim=-1), targets.log_probs(temperature))


def test_the_mean_is_of_equal_weights():
    close(mixed(everybody()).log_probs(3.0), mixed(everybody(), (2.0, 2.0, 2.0)).log_probs(3.0))
    assert (mixed(everybody()).log_probs() - mixed(everybody(), (1.0, 1.0, 2.0)).log_probs()).abs().max() > 0.01


def test_order_does_not_matter():
    targets, again = some(), some()[::-1]
    close(mixed(targets, (1.0, 2.0, 3.0)).log_probs(), mixed(again, (3.0, 2.0, 1.0)).log_probs())
    close(mixed(targets, "confidence", LABELS).log_probs(), mixed(again, "confidence", LABELS).log_probs(), 1e-7)


def test_a_class_is_ruled_out_where_every_teacher_does():
    one, two = TEACHERS[0].clone(), TEACHERS[1].clone()
    one[:, 0], two[:, :2] = -math.inf, -math.inf
    log_probs = mixed([dense_of(one), dense_of(two)]).log_probs(2.0)
    assert torch.isneginf(log_probs[:, 0]).all()
    close(log_probs[:, 1], torch.log_softmax(one / 2, dim=-1)[:, 1] - math.log(2))
    assert torch.isfinite(ForwardKL()(STUDENT, mixed([dense_of(one), dense_of(two)]))).all()


def test_far_logits_and_narrow_numbers():
    """In log space: where both teachers give a class nothing that a float32 could hold, it is not lost."""
    far = [torch.tensor([[0.0, -200.0, -300.0]]), torch.tensor([[0.0, -300.0, -200.0]])]
    found = mixed([dense_of(each, dtype=torch.float16) for each in far]).log_probs()
    assert found.dtype == torch.float32
    close(found, torch.tensor([[0.0, -200 - math.log(2), -200 - math.log(2)]]), 1e-6)
    wide = mixed([dense_of(TEACHERS[0].half()), dense_of(TEACHERS[1])])
    assert wide.log_probs().dtype == torch.float64


# Teachers that do not cover a row


def test_absent_teachers_are_left_out_row_by_row():
    found = mixed(some(), (1.0, 2.0, 3.0))
    for row in range(ROWS):
        there = [index for index in range(3) if COVERED[index][row]]
        if not there:
            continue
        expected = mixed([dense_of(TEACHERS[index]) for index in there], tuple(index + 1.0 for index in there))
        close(found.log_probs(2.0)[row], expected.log_probs(2.0)[row])
    assert found.covered.tolist() == [True, True, True, True, True, False]
    assert torch.isfinite(found.log_probs()).all()


def test_a_row_that_nobody_covers_is_not_valid():
    value = kd_loss(STUDENT, mixed(some()), temperature=2.0)
    shown = slice(0, ROWS - 1)
    close(value, kd_loss(STUDENT[shown], mixed([each[shown] for each in some()]), temperature=2.0))
    nobody = [dense_of(each, torch.zeros(ROWS, dtype=torch.bool)) for each in TEACHERS]
    assert kd_loss(STUDENT, mixed(nobody)) == 0


def test_one_teacher_that_covers_every_row_covers_every_row():
    assert mixed([dense_of(TEACHERS[0]), some()[1]]).covered is None


# Confidence


def confidence(row: int) -> dict[int, float]:
    """CA-MKD's weights of the teachers that cover a row, written out."""
    there = [index for index in range(3) if COVERED[index][row]]
    label = int(LABELS[row])
    if label < 0 or len(there) == 1:
        return {index: 1 / len(there) for index in there}
    cross_entropy = {index: -math.log(softmax(TEACHERS[index])[row, label]) for index in there}
    total = sum(math.exp(each) for each in cross_entropy.values())
    return {index: (1 - math.exp(each) / total) / (len(there) - 1) for index, each in cross_entropy.items()}


def test_confidence_is_ca_mkds():
    weights = mixed(some(), "confidence", LABELS).log_weights.exp()
    for row in range(ROWS - 1):
        expected = confidence(row)
        close(weights[row], torch.tensor([expected.get(index, 0.0) for index in range(3)], dtype=torch.float64))
    close(weights.sum(dim=-1), torch.ones(ROWS, dtype=torch.float64))


def test_who_gives_the_label_more_counts_more():
    sure, unsure = torch.tensor([[9.0, 0, 0]]), torch.tensor([[0.0, 9, 0]])
    weights = mixed([dense_of(sure), dense_of(unsure)], "confidence", torch.tensor([0])).log_weights.exp()
    assert weights[0, 0] > 0.99


def test_teachers_that_rule_the_label_out():
    out = torch.tensor([[-math.inf, 0.0, 1.0]])
    fine = torch.tensor([[1.0, 0.0, 1.0]])
    label = torch.tensor([0])
    found = mixed([dense_of(out), dense_of(fine)], "confidence", label).log_weights.exp()
    close(found, torch.tensor([[0.0, 1.0]]), 1e-6)
    both = mixed([dense_of(out), dense_of(out), dense_of(fine)], "confidence", label).log_weights.exp()
    close(both, torch.tensor([[0.25, 0.25, 0.5]]), 1e-6)


def test_tokens_have_weights_of_their_own():
    tokens = [random_logits(seed, 2, 3, CLASSES) for seed in (1, 2)]
    labels = torch.tensor([[0, -1, 2], [3, 1, -1]])
    found = mixed([dense_of(each) for each in tokens], "confidence", labels)
    flat = mixed([dense_of(each.flatten(0, 1)) for each in tokens], "confidence", labels.flatten())
    close(found.log_probs(2.0).flatten(0, 1), flat.log_probs(2.0))


# Losses on a mixture


@pytest.mark.parametrize("name", [each for each in LOSSES if each not in OF_LOGITS | {"nkd"}])
def test_a_loss_sees_a_teacher_that_says_the_mixture(name):
    loss, labels = LOSSES[name], LABELS.clamp(min=0)
    targets = mixed(everybody(), (1.0, 2.0, 3.0))
    probs = sum(weight * softmax(each, loss.temperature) for weight, each in zip((1, 2, 3), TEACHERS, strict=True)) / 6
    one = dense_of(loss.temperature * probs.log())
    close(value_and_gradient(loss, STUDENT, targets, labels), value_and_gradient(loss, STUDENT, one, labels), 1e-8)


def test_nkd_mixes_at_both_of_its_temperatures():
    labels = LABELS.clamp(min=0)
    at = {t: sum(softmax(each, t) for each in TEACHERS) / 3 for t in (1.0, 3.0)}
    is_label = torch.nn.functional.one_hot(labels, CLASSES).bool()
    p_y, q_y = at[1.0][is_label], softmax(STUDENT)[is_label]
    others = [each[~is_label].view(ROWS, -1) for each in (at[3.0], softmax(STUDENT, 3.0))]
    p, q = (each / each.sum(dim=-1, keepdim=True) for each in others)
    expected = -p_y * q_y.log() - 1.5 * 9 * (p * q.log()).sum(dim=-1)
    close(values_of(LOSSES["nkd"], STUDENT, mixed(everybody()), labels), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_teachers_of_one_mind_are_one_teacher(name):
    loss, labels = LOSSES[name], LABELS.clamp(min=0)
    targets = mixed([dense_of(TEACHERS[0])] * 3, "confidence", labels)
    if name in OF_LOGITS:
        with pytest.raises(ConfigError, match="a mixture of teachers has probabilities and no logits"):
            values_of(loss, STUDENT, targets, labels)
        return
    one = value_and_gradient(loss, STUDENT, dense_of(TEACHERS[0]), labels)
    close(value_and_gradient(loss, STUDENT, targets, labels), one, 1e-8)


@pytest.mark.parametrize("loss", [ForwardKL(temperature=3.0), SoftTargetCE(temperature=3.0)])
def test_a_linear_loss_is_the_weighted_sum_of_terms(loss):
    """Forward KL up to a constant, the teachers' own disagreement; cross-entropy exactly."""
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    targets = mixed(everybody(), tuple(weights.tolist()))
    differences, gradients = [], []
    for student in (STUDENT, random_logits(9, ROWS, CLASSES)):
        student.requires_grad_()
        of_terms = sum(weight * loss(student, each) for weight, each in zip(weights, everybody(), strict=True))
        of_mixture = loss(student, targets)
        differences.append((of_terms - of_mixture).detach())
        gradients.append([torch.autograd.grad(each.sum(), student)[0] for each in (of_terms, of_mixture)])
    disagreement = sum(
        weight * forward_kl(targets.log_probs(3.0), dense_of(torch.log_softmax(each / 3, dim=-1)))
        for weight, each in zip(weights, TEACHERS, strict=True)
    )
    expected = 9 * disagreement if isinstance(loss, ForwardKL) else torch.zeros(ROWS, dtype=torch.float64)
    for difference, (of_terms, of_mixture) in zip(differences, gradients, strict=True):
        close(difference, expected)
        close(of_terms, of_mixture)


# Terms, devices, rows


def test_a_term_listens_to_the_teachers_that_it_names():
    said = {name: {"logits": each} for name, each in zip("abc", some(), strict=True)}
    term = LossTerm(teacher=("c", "a"), output="logits", loss=ForwardKL(), weight=1.0, mix=(1.0, 2.0))
    targets = term.targets(said, LABELS)
    close(targets.log_probs(), mixed([said["c"]["logits"], said["a"]["logits"]], (1.0, 2.0)).log_probs())
    assert term.teachers == ("c", "a")
    assert replace(term, teacher="b").targets(said, None) is said["b"]["logits"]
    for loss in (ForwardKL(), LOSSES["dkd"]):
        term = replace(term, loss=loss)
        assert torch.equal(term.valid(said, LABELS), valid_rows(loss, targets, LABELS))


def test_rows_and_device_of_a_mixture():
    whole = mixed(some(), "confidence", LABELS)
    part = whole[torch.tensor([4, 1])].to(torch.device("cpu"))
    again = mixed([each[torch.tensor([4, 1])] for each in some()], "confidence", LABELS[[4, 1]])
    close(part.log_probs(2.0), again.log_probs(2.0))
    assert torch.equal(part.covered, again.covered)
    assert part.shape == (2, CLASSES)


# What cannot be mixed


DRAWS = SampledTargets(
    ids=torch.zeros(ROWS, 1, dtype=torch.int64), weights=torch.ones(ROWS, 1), entropy=torch.zeros(ROWS), num_classes=5
)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (sparse_of(TEACHERS[1], 2, (1.0,)), "target 2 of 2 cannot be mixed exactly: it holds the top k classes and"),
        (DRAWS, "it holds draws. Cache with encoding: dense or int8, or give each teacher a loss of its own"),
        (FeatureTargets(values=torch.zeros(ROWS, CLASSES)), "it holds features"),
        (mixed([dense_of(TEACHERS[0])]), "it holds a mixture"),
        (dense_of(TEACHERS[1][:, :4]), r"target 2 of 2 has shape \[6, 4\], the first \[6, 5\]"),
    ],
)
def test_only_dense_targets_of_the_same_classes_are_mixed(second, message):
    with pytest.raises(ConfigError, match=message):
        mixed([dense_of(TEACHERS[0]), second])


@pytest.mark.parametrize("mix", [(1.0,), (1.0, 2.0, 3.0, 4.0), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, math.inf, 1.0)])
def test_weights_are_one_positive_number_per_teacher(mix):
    with pytest.raises(ConfigError, match=r"expected mean, confidence, or one number above 0 for each of 3 teachers"):
        mixed(everybody(), mix)


@pytest.mark.parametrize("mix", ["means", {"big": 2, "small": 1}, 1.0, ("1", "2", "3")])
def test_another_mix_is_refused(mix):
    with pytest.raises(ConfigError, match=r"mix is .*; expected mean, confidence, or one number above 0"):
        mixed(everybody(), mix)


def test_what_is_no_targets_cannot_be_mixed():
    with pytest.raises(ConfigError, match="there are no targets to mix"):
        mixed([])
    with pytest.raises(ConfigError, match="targets to mix are a DenseTargets; expected a list"):
        mixed(everybody()[0])
    with pytest.raises(ConfigError, match=r"target 2 of 2 are a tensor of torch\.float64"):
        mixed([everybody()[0], TEACHERS[1]])
    with pytest.raises(ConfigError, match="mix: confidence got the label 99"):
        mixed(everybody(), "confidence", torch.full_like(LABELS, 99))


@pytest.mark.parametrize("labels", [None, LABELS[:2]])
def test_confidence_needs_labels(labels):
    with pytest.raises(ConfigError, match=r"mix: confidence (needs|got) labels.*shape \[6\], a label per row"):
        mixed(everybody(), "confidence", labels)


def test_what_a_silent_teacher_left_behind_is_not_looked_at():
    """NaN, as of a teacher that was asked and gave none; of a row without any teacher, too."""
    covered = torch.tensor(np.arange(ROWS) % 2 == 0)
    student = torch.zeros(TEACHERS[0].shape, dtype=torch.float64, requires_grad=True)

    def loss_of(left, everywhere):
        there = torch.where(covered.unsqueeze(-1), TEACHERS[1], left)
        silent = replace(dense_of(there), covered=covered)
        both = [silent, dense_of(TEACHERS[0])] if everywhere else [silent, silent]
        value = kd_loss(student, mixed(both))
        return value, torch.autograd.grad(value, student)[0]

    for everywhere in (True, False):
        for one, other in zip(loss_of(torch.nan, everywhere), loss_of(1.0, everywhere), strict=True):
            assert torch.equal(one, other)


def test_weights_do_not_depend_on_what_a_silent_teacher_left_behind():
    covered = torch.tensor(np.arange(ROWS) % 2 == 0)
    left = [dense_of(each, covered) for each in (TEACHERS[1], 100 * TEACHERS[2])]
    first, second = (mixed([dense_of(TEACHERS[0]), each], "confidence", LABELS) for each in left)
    close(first.log_probs()[~covered], second.log_probs()[~covered])
