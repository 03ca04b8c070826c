"""Rules as the first weights of a logistic regression (`student.init_from`).

Shapes: N rows, D inputs, L rules, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor

from kdpipe.data.columns import Columns
from kdpipe.errors import ConfigError, DataError
from kdpipe.preprocess import Preprocess
from kdpipe.teachers.rules.rule_set import ABSTAIN, is_covered
from kdpipe.teachers.rules.teacher import RulesTeacher

Floats = NDArray[np.float64]
_MAX_ITERATIONS = 2000


@dataclass(frozen=True, kw_only=True)
class LinearWeights:
    """Weights of a `kdpipe.models.linear.Linear`, and how far they are from saying what the rules say.

    `divergence` is, by rule, the mean KL (in nats) of the regression from the rules over the rows in which that rule
    votes: 0 where all is expressed; inf where it votes in no row, so that the weights know nothing of it.
    """

    state_dict: Mapping[str, Tensor]
    divergence: Mapping[str, float]


def linear_from_rules(teacher: RulesTeacher, preprocess: Preprocess, blocks: Iterable[Columns]) -> LinearWeights:
    """Weights of the logistic regression on `preprocess`'s inputs that is nearest to the rules.

    Nearest in mean KL(rules || regression) over the prepared rows that the rules cover; no labels are needed. It is
    exact where the rules' log-posterior is linear in the inputs (rules about 0/1 columns), an approximation elsewhere
    (an interval, say): see `LinearWeights.divergence`. Of equally near weights, small ones. Rules as the initial
    weights of a network: Towell & Shavlik 1994, "Knowledge-based artificial neural networks". All rows are held in
    memory. Raises `DataError` where rules cover none of them or an input is not finite, `ConfigError` for a preprocess
    of more than one tensor.
    """
    inputs_ND, votes_NL = _covered_rows(teacher, preprocess, blocks)
    target_NC = teacher.evidence.log_posterior(votes_NL)
    weight_CD = _nearest(np.column_stack([inputs_ND, np.ones(len(inputs_ND))]), target_NC)
    state = {
        "head.weight": torch.tensor(weight_CD[:, :-1]).float(),
        "head.bias": torch.tensor(weight_CD[:, -1]).float(),
    }
    kl_N = _divergence(log_softmax(inputs_ND @ weight_CD[:, :-1].T + weight_CD[:, -1], axis=1), target_NC)
    votes_at = {name: votes_NL[:, rule] != ABSTAIN for rule, name in enumerate(teacher.rules.names)}
    return LinearWeights(
        state_dict=state,
        divergence={name: float(kl_N[at].mean()) if at.any() else math.inf for name, at in votes_at.items()},
    )


def _nearest(inputs_ND: Floats, target_NC: Floats) -> Floats:
    """Weights `[C, D]` of least mean KL, a convex problem, by L-BFGS from 0 on."""
    shape = (target_NC.shape[1], inputs_ND.shape[1])

    def loss(flat: Floats) -> tuple[float, Floats]:
        log_probs_NC = log_softmax(inputs_ND @ flat.reshape(shape).T, axis=1)
        gradient_CD = (np.exp(log_probs_NC) - np.exp(target_NC)).T @ inputs_ND / len(inputs_ND)
        return float(_divergence(log_probs_NC, target_NC).mean()), gradient_CD.reshape(-1)

    options = {"maxiter": _MAX_ITERATIONS, "maxfun": 2 * _MAX_ITERATIONS, "ftol": 1e-15, "gtol": 1e-9}
    found = scipy.optimize.minimize(loss, np.zeros(math.prod(shape)), jac=True, method="L-BFGS-B", options=options)
    weights: Floats = found.x.reshape(shape)
    return weights


def _divergence(log_probs_NC: Floats, target_NC: Floats) -> Floats:
    """KL(target || model) `[N]`, in nats."""
    divergence: Floats = (np.exp(target_NC) * (target_NC - log_probs_NC)).sum(axis=1)
    return divergence


def _covered_rows(
    teacher: RulesTeacher, preprocess: Preprocess, blocks: Iterable[Columns]
) -> tuple[Floats, NDArray[np.int64]]:
    """Flattened inputs `[N, D]` and votes `[N, L]` of the rows in which a rule votes."""
    inputs, votes = [], []
    for block in blocks:
        made = preprocess(block)
        if not isinstance(made, Tensor):
            raise ConfigError(
                f"a logistic regression takes one tensor; {type(preprocess).__name__} makes {', '.join(made)}"
            )
        said = teacher.rules.votes(block)
        covered = is_covered(said)
        inputs.append(made.flatten(1).numpy()[covered].astype(np.float64))
        votes.append(said[covered])
    if not sum(len(each) for each in votes):
        raise DataError("weights from rules need rows in which a rule votes: here are none")
    found = np.concatenate(inputs)
    wrong = (~np.isfinite(found)).any(axis=1).sum()
    if wrong:
        raise DataError(
            f"{type(preprocess).__name__} makes NaN or infinite numbers of {wrong} rows, which a logistic regression "
            "cannot take; fill missing numbers (ColumnEncoder does)"
        )
    return found, np.concatenate(votes)
