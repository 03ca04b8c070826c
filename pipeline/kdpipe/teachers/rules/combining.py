"""From votes to class probabilities: by the rules' weights, or by a label model that learns what votes are worth.

Both are log-linear in the votes: the log-posterior is a bias per class, and a score per rule, vote and class.
Shapes: N rows, L rules, C classes, U different rows of votes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from kdpipe.errors import TeacherError
from kdpipe.teachers.rules.rule_set import ABSTAIN, is_covered

Floats = NDArray[np.float64]
BELIEF = 0.25
"""Rows that the rules' weights are worth, for every row."""
_MAX_ITERATIONS = 2000
_CONVERGED = 1e-6
"""No class probability of any row changes by more in an iteration."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What votes say: `bias [C]`, and `scores [L, C + 1, C]` per rule, vote (the last one: abstains) and class."""

    bias: Floats
    scores: Floats

    def log_posterior(self, votes: NDArray[np.int64]) -> Floats:
        """Log-probabilities `[N, C]` of votes `[N, L]`."""
        said = self.scores[np.arange(votes.shape[1]), votes]  # -1 takes the last one
        posterior: Floats = log_softmax(self.bias + said.sum(axis=1), axis=-1)
        return posterior


def weighted_vote(weights: Floats, class_balance: Floats) -> Evidence:
    """q(y|x) ∝ class_balance(y) exp(sum of the weights `[L]` of the rules that vote for y).

    A rule's weight is the log-odds, for the class that it votes for against each other one, that its vote adds.
    """
    num_classes = len(class_balance)
    scores = np.zeros((len(weights), num_classes + 1, num_classes))
    scores[:, :num_classes] = weights[:, None, None] * np.eye(num_classes)
    return Evidence(bias=np.log(class_balance), scores=scores)


@dataclass(frozen=True, kw_only=True)
class LabelModel:
    """Dawid and Skene's model of rules: given the class, they vote independently of each other.

    `class_balance [C]` is P(y); `vote_probs [L, C, C + 1]` is P(rule's vote | y), where the last vote is to abstain.
    """

    class_balance: Floats
    vote_probs: Floats

    @property
    def evidence(self) -> Evidence:
        """P(y | votes) ∝ P(y) prod_l P(vote_l | y)."""
        return Evidence(bias=np.log(self.class_balance), scores=np.log(self.vote_probs).transpose(0, 2, 1))

    @property
    def accuracies(self) -> Floats:
        """How often each rule is right where it votes, `[L]`."""
        joint = (self.class_balance[:, None] * self.vote_probs)[:, :, :ABSTAIN]
        accuracies: Floats = np.trace(joint, axis1=1, axis2=2) / joint.sum(axis=(1, 2))
        return accuracies


def fit_label_model(
    votes: Iterable[NDArray[np.int64]],
    weights: Floats,
    num_classes: int,
    class_balance: Floats | None = None,
    belief: float = BELIEF,
) -> LabelModel:
    """Learn from blocks of votes `[N, L]` how often each rule gives each vote in each class, without labels.

    Expectation maximisation (Dawid & Skene 1979; for labelling rules Ratner et al. 2016, 2019), from the weighted vote
    on. Rows in which no rule votes are left out: they may lie outside of what all rules are about. `class_balance [C]`,
    that of the others, is estimated too where it is not given. The rules' weights are prior knowledge, a Dirichlet
    prior worth `belief` rows for every row: with 0 the rules' agreement alone counts. Raises `TeacherError` where there
    is none: no rows, or in no row two rules that vote.
    """
    patterns, counts = _distinct(votes)
    if not len(patterns) or ((patterns != ABSTAIN).sum(axis=1) < 2).all():
        raise TeacherError(
            "a label model learns from rules that vote on the same rows; here are no two of them on any row. Give it "
            "more rows, broader rules, or combine: vote."
        )
    shape = (patterns.shape[1], num_classes + 1, num_classes)
    balance = np.full(num_classes, 1 / num_classes) if class_balance is None else class_balance
    given = _one_hot(patterns, num_classes)
    prior = belief * (given.T @ counts).reshape(*shape[:2], 1) * _believed(weights, balance) + balance
    vote = weighted_vote(weights, balance)
    posterior = softmax(vote.bias + given @ vote.scores.reshape(-1, num_classes), axis=1)
    for _ in range(_MAX_ITERATIONS):
        rows = counts[:, None] * posterior
        if class_balance is None:
            balance = (rows.sum(axis=0) + 1) / (counts.sum() + num_classes)
        expected = (given.T @ rows).reshape(shape) + prior
        vote_probs = expected / expected.sum(axis=1, keepdims=True)
        before = posterior
        posterior = softmax(np.log(balance) + given @ np.log(vote_probs.reshape(-1, num_classes)), axis=1)
        if np.abs(posterior - before).max() < _CONVERGED:
            break
    return LabelModel(class_balance=balance, vote_probs=vote_probs.transpose(0, 2, 1))


def _distinct(votes: Iterable[NDArray[np.int64]]) -> tuple[NDArray[np.int64], Floats]:
    """Different rows of votes `[U, L]`, sorted, and how many rows each of them stands for `[U]`; without empty ones."""
    parts = [np.unique(block[is_covered(block)], axis=0, return_counts=True) for block in votes]
    if not parts:
        return np.empty((0, 0), np.int64), np.empty(0)
    patterns, at = np.unique(np.concatenate([part[0] for part in parts]), axis=0, return_inverse=True)
    counts: Floats = np.bincount(at.reshape(-1), weights=np.concatenate([part[1] for part in parts])).astype(np.float64)
    return patterns, counts


def _one_hot(patterns: NDArray[np.int64], num_classes: int) -> scipy.sparse.csr_array:
    """`[U, L (C + 1)]`: 1 at each rule's vote."""
    num_patterns, num_rules = patterns.shape
    width = num_classes + 1
    columns = np.arange(num_rules) * width + np.where(patterns == ABSTAIN, num_classes, patterns)
    rows = np.repeat(np.arange(num_patterns), num_rules)
    shape = (num_patterns, num_rules * width)
    return scipy.sparse.csr_array((np.ones(columns.size), (rows, columns.reshape(-1))), shape=shape)


def _believed(weights: Floats, balance: Floats) -> Floats:
    """P(y | one rule's vote) `[L, C + 1, C]` by the weighted vote; to abstain says nothing."""
    alone = weighted_vote(weights, balance)
    believed: Floats = softmax(alone.bias + alone.scores, axis=-1)
    return believed
