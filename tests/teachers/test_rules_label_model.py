from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from kdpipe.errors import ConfigError, TeacherError
from kdpipe.fingerprint import digest
from kdpipe.teachers.rules import RulesTeacher
from kdpipe.teachers.rules.combining import fit_label_model, weighted_vote

ACCURACIES = np.array([0.9, 0.8, 0.7, 0.65, 0.6, 0.55])
BALANCE = np.array([0.3, 0.7])


@dataclass
class Task:
    num_classes: int = 2
    class_names: tuple[str, ...] | None = None


def rows_of(num_rows, accuracies=ACCURACIES, balance=BALANCE, coverage=0.6, seed=0):
    """Votes `[N, L]` of independent rules that are right as often as said, and the true classes `[N]`."""
    generator, num_classes = np.random.default_rng(seed), len(balance)
    labels = generator.choice(num_classes, num_rows, p=balance)[:, None]
    shape = (num_rows, len(accuracies))
    wrong = (labels + generator.integers(1, num_classes, shape)) % num_classes
    votes = np.where(generator.random(shape) < accuracies, labels, wrong)
    return np.where(generator.random(shape) < coverage, votes, -1), labels[:, 0]


def model_of(votes, balance=None, **settings):
    num_classes = int(votes.max()) + 1
    return fit_label_model([votes], np.ones(votes.shape[1]), num_classes, balance, **settings)


def right(evidence, votes, labels):
    """Share of covered rows whose most probable class is the true one."""
    covered = (votes >= 0).any(axis=1)
    return (evidence.log_posterior(votes[covered]).argmax(axis=1) == labels[covered]).mean()


@pytest.mark.parametrize("known", [True, False])
def test_it_recovers_how_often_rules_are_right(known):
    votes, _ = rows_of(20_000)
    model = model_of(votes, BALANCE if known else None, belief=0.0)
    np.testing.assert_allclose(model.accuracies, ACCURACIES, atol=0.02)
    np.testing.assert_allclose(model.class_balance, BALANCE, atol=0 if known else 0.02)


def test_it_recovers_them_with_several_classes():
    accuracies, balance = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([0.2, 0.3, 0.5])
    votes, _ = rows_of(20_000, accuracies, balance)
    np.testing.assert_allclose(model_of(votes, balance, belief=0.0).accuracies, accuracies, atol=0.02)


def test_a_rule_that_is_mostly_wrong_is_found_out():
    accuracies = np.array([0.9, 0.8, 0.75, 0.7, 0.2])
    votes, labels = rows_of(20_000, accuracies)
    model = model_of(votes, BALANCE, belief=0.0)
    assert model.accuracies[-1] == pytest.approx(0.2, abs=0.02)
    assert right(model.evidence, votes, labels) > right(weighted_vote(np.ones(5), BALANCE), votes, labels)


@pytest.mark.parametrize("balance", [BALANCE, np.array([0.2, 0.3, 0.5])], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_right_more_often_than_the_majority(balance, seed):
    votes, labels = rows_of(5_000, balance=balance, seed=seed)
    majority = right(weighted_vote(np.ones(votes.shape[1]), balance), votes, labels)
    learnt = right(model_of(votes, balance).evidence, votes, labels)
    true = softmax_of_the_truth(votes, balance).argmax(axis=1)
    covered = (votes >= 0).any(axis=1)
    best = (true[covered] == labels[covered]).mean()
    assert majority + 0.01 < learnt <= best + 0.005
    assert learnt > best - 0.02


def softmax_of_the_truth(votes, balance):
    """P(y | votes) of the process in `rows_of`, term by term."""
    num_classes = len(balance)
    logits = np.tile(np.log(balance), (len(votes), 1))
    for rule, accuracy in enumerate(ACCURACIES):
        for label in range(num_classes):
            said = votes[:, rule] == label
            logits[said] += np.log((1 - accuracy) / (num_classes - 1))
            logits[said, label] += np.log(accuracy * (num_classes - 1) / (1 - accuracy))
    return softmax(logits, axis=1)


def test_its_posterior_is_that_of_the_process():
    votes, _ = rows_of(50_000)
    posterior = np.exp(model_of(votes, BALANCE, belief=0.0).evidence.log_posterior(votes))
    assert np.abs(posterior - softmax_of_the_truth(votes, BALANCE)).mean() < 0.01


def test_rules_that_vote_for_one_class_only_are_told_by_where_they_vote():
    generator = np.random.default_rng(0)
    labels = generator.choice(2, 20_000, p=[0.8, 0.2])
    fires_by_class = np.array([[0.05, 0.6], [0.1, 0.5], [0.3, 0.4], [0.5, 0.1], [0.4, 0.2]])
    fires = generator.random((len(labels), 5)) < fires_by_class[:, labels].T
    votes = np.where(fires, np.array([1, 1, 1, 0, 0]), -1)
    precision = [(labels[fires[:, rule]] == votes[fires[:, rule], rule]).mean() for rule in range(5)]
    model = model_of(votes, np.bincount(labels[fires.any(axis=1)]) / fires.any(axis=1).sum(), belief=0.0)
    np.testing.assert_allclose(model.accuracies, precision, atol=0.05)


def test_with_much_belief_a_vote_is_worth_its_weight():
    votes, _ = rows_of(5_000)
    model = model_of(votes, BALANCE, belief=1e6)
    vote = weighted_vote(np.ones(6), BALANCE)
    for rule in range(6):
        for label in (0, 1):
            alone = np.full((1, 6), -1)
            alone[0, rule] = label
            believed = softmax(np.log(BALANCE) + model.evidence.scores[rule, label])
            np.testing.assert_allclose(believed, np.exp(vote.log_posterior(alone))[0], atol=0.05)


def test_the_order_and_the_blocks_of_rows_are_no_matter():
    votes, _ = rows_of(2_000)
    mixed = np.random.default_rng(1).permutation(votes)
    blocks = [mixed[:7], mixed[7:1500], mixed[1500:]]
    first, second = (fit_label_model(each, np.ones(6), 2, None) for each in ([votes], blocks))
    assert np.array_equal(first.vote_probs, second.vote_probs)
    assert np.array_equal(first.class_balance, second.class_balance)


@given(st.permutations(range(6)), st.integers(0, 5))
def test_the_order_of_rules_is_no_matter(order, seed):
    votes, _ = rows_of(500, seed=seed)
    first, second = model_of(votes, BALANCE), model_of(votes[:, order], BALANCE)
    np.testing.assert_allclose(first.accuracies[order], second.accuracies, atol=1e-4)


def test_names_of_classes_are_no_matter():
    votes, _ = rows_of(2_000)
    swapped = np.where(votes < 0, votes, 1 - votes)
    first, second = model_of(votes, BALANCE), model_of(swapped, BALANCE[::-1])
    np.testing.assert_allclose(first.accuracies, second.accuracies, atol=1e-6)


def test_rows_that_no_rule_is_about_say_nothing():
    votes, _ = rows_of(2_000)
    first = fit_label_model([votes], np.ones(6), 2)
    second = fit_label_model([votes, np.full((5_000, 6), -1)], np.ones(6), 2)
    assert np.array_equal(first.vote_probs, second.vote_probs)


def test_twice_the_rows_are_the_same_knowledge():
    votes, _ = rows_of(5_000)
    np.testing.assert_allclose(
        model_of(votes, BALANCE).accuracies, model_of(np.tile(votes, (2, 1)), BALANCE).accuracies, atol=1e-3
    )


@pytest.mark.parametrize("votes", [np.full((5, 3), -1), np.array([[0, -1, -1], [-1, 1, -1], [-1, -1, 1]])], ids=str)
def test_rules_that_never_meet_teach_nothing(votes):
    with pytest.raises(TeacherError, match="no two of them on any row"):
        fit_label_model([votes], np.ones(3), 2)


def test_no_rows_teach_nothing():
    with pytest.raises(TeacherError, match="no two of them on any row"):
        fit_label_model([], np.ones(3), 2)


# The teacher

RULES = [
    {"name": f"{rule} says {label}", "when": {"column": f"v{rule}", "is": label}, "label": label}
    for rule in range(4)
    for label in (0, 1)
]


def blocks_of(num_rows, labelled=0.5, seed=0):
    votes, labels = rows_of(num_rows, ACCURACIES[:4], seed=seed)
    columns = {f"v{rule}": np.where(votes[:, rule] < 0, np.nan, votes[:, rule]) for rule in range(4)}
    known = np.where(np.arange(num_rows) < labelled * num_rows, labels, -1)
    parts = [slice(0, num_rows // 3), slice(num_rows // 3, num_rows)]
    return [({name: values[part] for name, values in columns.items()}, known[part]) for part in parts], labels


def teacher_of(rules=None, **arguments):
    settings = {"combine": "label_model", "class_balance": BALANCE.tolist()} | arguments
    return RulesTeacher(rules or RULES, Task(), **settings)


def test_it_learns_is_saved_and_speaks(tmp_path):
    blocks, labels = blocks_of(5_000)
    teacher = teacher_of()
    teacher.fit(blocks)
    teacher.save(tmp_path)
    said = [teacher.predict(columns) for columns, _ in blocks]
    logits, covered = (torch.cat([each[key] for each in said]) for key in ("logits", "covered"))
    assert (logits.argmax(dim=1).numpy() == labels)[covered.numpy()].mean() > 0.84
    again = teacher_of()
    again.load(tmp_path)
    assert torch.equal(again.predict(blocks[0][0])["logits"], said[0]["logits"])
    assert again.fingerprint == teacher.fingerprint
    accuracies = json.loads((tmp_path / "label_model.json").read_text())["accuracies"]
    assert list(accuracies) == [rule["name"] for rule in RULES]
    assert accuracies["0 says 1"] > accuracies["3 says 1"]


def test_the_same_rows_make_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        teacher = teacher_of()
        teacher.fit(blocks_of(1_000)[0])
        teacher.save(tmp_path / name)
    first, second = ((tmp_path / name / "label_model.json").read_bytes() for name in ("first", "second"))
    assert first == second


def test_the_fingerprint_covers_what_was_learnt():
    teachers = [teacher_of(), teacher_of()]
    for seed, teacher in enumerate(teachers):
        teacher.fit(blocks_of(1_000, seed=seed)[0])
    assert len({digest(dict(teacher.fingerprint)) for teacher in teachers}) == 2


def test_labels_count_for_the_class_balance_alone():
    (first, second), _ = blocks_of(5_000)
    known = np.concatenate(
        [labels[teacher_of().rules.votes(columns).max(axis=1) >= 0] for columns, labels in (first, second)]
    )
    shares = np.bincount(known[known >= 0]) / (known >= 0).sum()
    by_labels, by_shares = teacher_of(class_balance="labels"), teacher_of(class_balance=shares.tolist())
    by_labels.fit([first, second])
    by_shares.fit([first, second])
    np.testing.assert_allclose(by_labels.label_model.vote_probs, by_shares.label_model.vote_probs, atol=1e-9)


def test_labels_of_one_class_are_no_balance():
    blocks, _ = blocks_of(100, labelled=0)
    with pytest.raises(TeacherError, match=r"class_balance: labels: the rows that rules cover have \[0, 0\]"):
        teacher_of(class_balance="labels").fit(blocks)


def test_it_must_be_fitted_first():
    with pytest.raises(TeacherError, match=r"a label model must see rows first.*fit_on"):
        teacher_of().predict(blocks_of(10)[0][0][0])


def test_it_needs_three_rules():
    with pytest.raises(ConfigError, match=r"a label model needs 3 rules or more, .* here are 2\. Take combine: vote"):
        teacher_of(RULES[:2])


def test_what_was_learnt_from_other_rules_is_refused(tmp_path):
    teacher = teacher_of()
    teacher.fit(blocks_of(1_000)[0])
    teacher.save(tmp_path)
    changed = [{**RULES[0], "when": {"column": "v0", "is": 1}}, *RULES[1:]]
    with pytest.raises(TeacherError, match="learnt from other rules than today's"):
        teacher_of(changed).load(tmp_path)
