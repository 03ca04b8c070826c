"""Labelling rules as a teacher, and rules that reshape what another teacher says.

Shapes: B rows, L rules, C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe import durable
from kdpipe.data.columns import Columns
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.errors import ConfigError, TeacherError
from kdpipe.fingerprint import canonical_json
from kdpipe.inputs import LOGITS
from kdpipe.targets import OutputSpec
from kdpipe.teachers.base import COVERED, Teacher, abstains
from kdpipe.teachers.rules.combining import BELIEF, Evidence, LabelModel, fit_label_model, weighted_vote
from kdpipe.teachers.rules.rule_set import ABSTAIN, Rules, RuleSet, RuleTask, digests_of, is_covered

FILE = "label_model.json"
_COMBINE = ("vote", "label_model")
_MIN_RULES = 3
_SUM_TOLERANCE = 1e-3


class RulesTeacher:
    """Labelling rules, combined to class probabilities; it abstains from rows in which no rule votes.

    `rules` is a YAML file below `root`, or the list in it. `combine: vote` adds up the rules' weights
    (`weighted_vote`); `combine: label_model` learns from rows what each vote is worth (`fit_label_model`, which
    explains `belief`) and must be fitted. `class_balance` is a share per class among the rows that rules cover, by name
    or in order; or `labels`: that of those rows' labels. Without it a vote takes classes as equally frequent, and a
    label model estimates their shares from the votes. Rules are tried on `probe`, a prepared row, at once. Raises
    `ConfigError`.
    """

    abstains = True

    def __init__(
        self,
        rules: Rules,
        task: RuleTask,
        root: Path = Path(),
        combine: Literal["vote", "label_model"] = "vote",
        class_balance: list[float] | dict[str, float] | Literal["labels"] | None = None,
        belief: float = BELIEF,
        probe: Columns | None = None,
    ) -> None:
        self.rules = RuleSet.read(rules, task, root)
        self._combine, self._belief, self._given_balance = combine, belief, class_balance
        self._class_balance = None if class_balance == "labels" else _shares(class_balance, task)
        self._model: LabelModel | None = None
        self.outputs = (OutputSpec(name=LOGITS, shape=(task.num_classes,)),)
        if combine not in _COMBINE:
            raise ConfigError(f"combine is {combine!r}; expected {' or '.join(_COMBINE)}")
        if combine == "label_model" and len(self.rules.names) < _MIN_RULES:
            raise ConfigError(
                f"combine: a label model needs {_MIN_RULES} rules or more, as it learns from how they agree; here are "
                f"{len(self.rules.names)}. Take combine: vote."
            )
        if combine == "vote" and class_balance == "labels":
            raise ConfigError("class_balance: a vote sees no labels; give a share per class, or leave it out")
        if not 0 <= belief < math.inf:
            raise ConfigError(f"belief is {belief}; expected a number of rows per row, 0 or above")
        if probe is not None:
            self.rules.votes(probe)

    @staticmethod
    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        """Digests of the rules file and of the code that its rules reach."""
        return digests_of(arguments.get("rules"), root)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The rules with the code that they reach, how they are combined, and what the label model learnt."""
        return {
            "kind": "rules",
            "rules": self.rules.identity,
            "combine": self._combine,
            "class_balance": self._given_balance,
            "label_model": None if self._combine == "vote" else _to_json(self.label_model),
        }

    @property
    def label_model(self) -> LabelModel:
        """What was learnt from rows. Raises `TeacherError` where nothing was."""
        if self._model is None:
            raise TeacherError(
                "a label model must see rows first: give the teacher `fit_on: SPLIT` and run `kdpipe train-teacher`, "
                "or call fit; combine: vote needs none"
            )
        return self._model

    @property
    def evidence(self) -> Evidence:
        """What the rules' votes say about the classes."""
        if self._combine == "label_model":
            return self.label_model.evidence
        num_classes = self.rules.num_classes
        uniform = np.full(num_classes, 1 / num_classes)
        return weighted_vote(self.rules.weights, uniform if self._class_balance is None else self._class_balance)

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """`logits`, the log-posterior `[B, C]`, and `covered [B]`: whether any rule votes."""
        votes = self.rules.votes(columns)
        log_posterior = self.evidence.log_posterior(votes).astype(np.float32)
        return {LOGITS: torch.from_numpy(log_posterior), COVERED: torch.from_numpy(is_covered(votes))}

    def fit(self, blocks: Iterable[tuple[Columns, NDArray[np.int64]]]) -> None:
        """Fit the label model; labels `[B]` count for `class_balance: labels` only.

        Raises `ConfigError` where nothing is to be learnt, `TeacherError` where rules never meet.
        """
        if self._combine == "vote":
            raise ConfigError("rules with combine: vote learn nothing from rows; leave fit_on out")
        votes, counts = [], np.zeros(self.rules.num_classes, np.int64)
        for columns, labels in blocks:
            votes.append(self.rules.votes(columns))
            known = labels[is_covered(votes[-1]) & (labels != MISSING_LABEL)]
            counts += np.bincount(known, minlength=len(counts))
        balance = _balance_of(counts) if self._given_balance == "labels" else self._class_balance
        self._model = fit_label_model(votes, self.rules.weights, self.rules.num_classes, balance, self._belief)

    def save(self, folder: Path) -> None:
        """Write `label_model.json`, with the rules' accuracies for people to read."""
        accuracies = dict(zip(self.rules.names, self.label_model.accuracies.tolist(), strict=True))
        content = {"rules": self.rules.identity, "accuracies": accuracies, **_to_json(self.label_model)}
        durable.write_text(folder / FILE, canonical_json(content) + "\n")

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote. Raises `TeacherError` where that is of other rules."""
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if content["rules"] != self.rules.identity:
            raise TeacherError(f"{folder / FILE} was learnt from other rules than today's. Fit the teacher again.")
        self._model = LabelModel(
            class_balance=np.array(content["class_balance"]), vote_probs=np.array(content["vote_probs"])
        )


class ConstrainedTeacher:
    """Another teacher, its distribution drawn towards what rules say: posterior regularisation with a fixed teacher.

    q(y|x) ∝ p(y|x) exp(-strength * sum_l weight_l (1 - r_l(x, y))) (Hu et al. 2016, eq. 4), where r_l is 0 where rule
    l votes for a class other than y, else 1. With strength 1 a weight is the log-odds that a rule adds to the
    teacher's; Hu et al. take 6. Rows in which no rule votes are left as they are; so are features, and what the teacher
    covers. `teacher` is the name of one in params.yaml (`teacher_of` gives it), or a `Teacher`; it must say logits of
    all classes. Rules are tried on `probe`, a prepared row, at once. Raises `ConfigError`.
    """

    def __init__(
        self,
        teacher: str | Teacher,
        rules: Rules,
        task: RuleTask,
        strength: float = 1.0,
        root: Path = Path(),
        teacher_of: Callable[[str], Teacher] | None = None,
        probe: Columns | None = None,
    ) -> None:
        if not 0 < strength < math.inf:
            raise ConfigError(f"strength is {strength}; expected a number above 0")
        self._teacher = _named(teacher, teacher_of)
        self._rules, self._strength = RuleSet.read(rules, task, root), float(strength)
        self.abstains, self.outputs = abstains(self._teacher), self._teacher.outputs
        logits = next(output for output in self.outputs if output.name == LOGITS)
        if logits.shape != (task.num_classes,):
            raise ConfigError(
                f"teacher: {teacher!r} says logits of shape {list(logits.shape)} about a row; rules are about one "
                f"label per row, of {task.num_classes} classes"
            )
        if probe is not None:
            self._rules.votes(probe)

    @staticmethod
    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        """Digests of the rules file and of the code that its rules reach."""
        return digests_of(arguments.get("rules"), root)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """That of the teacher, the rules with the code that they reach, and the strength."""
        return {
            "kind": "constrained",
            "teacher": dict(self._teacher.fingerprint),
            "rules": self._rules.identity,
            "strength": self._strength,
        }

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """What the teacher says, with other logits `[B, C]` where a rule votes. Raises `TeacherError` for sparse ones.

        The logits of q are unnormalised, like the teacher's.
        """
        said = self._teacher.predict(columns)
        logits = said.get(LOGITS)
        if not isinstance(logits, Tensor):
            raise TeacherError("rules reshape logits of all classes; this teacher knows its first k only")
        votes = self._rules.votes(columns)[:, :, None]
        broken = (votes != ABSTAIN) & (votes != np.arange(self._rules.num_classes))
        penalty = torch.from_numpy((broken * self._rules.weights[:, None]).sum(axis=1)).to(logits.device)
        return {**said, LOGITS: (logits.double() - self._strength * penalty).to(logits.dtype)}


def _named(teacher: str | Teacher, teacher_of: Callable[[str], Teacher] | None) -> Teacher:
    if isinstance(teacher, str) and teacher_of is not None:
        return teacher_of(teacher)
    if not isinstance(teacher, Teacher):
        raise ConfigError(f"teacher: expected the name of another teacher of params.yaml (found {teacher!r})")
    return teacher


def _shares(given: Sequence[float] | Mapping[str, float] | None, task: RuleTask) -> NDArray[np.float64] | None:
    """Shares per class `[C]`, checked and made to sum to 1 exactly."""
    if given is None:
        return None
    names = list(task.class_names or [str(number) for number in range(task.num_classes)])
    if isinstance(given, Mapping) and set(given) != set(names):
        raise ConfigError(f"class_balance names {', '.join(map(str, given))}; the classes are {', '.join(names)}")
    shares = np.array([given[name] for name in names] if isinstance(given, Mapping) else given, np.float64)
    if shares.shape != (len(names),) or not (shares > 0).all() or not abs(shares.sum() - 1) <= _SUM_TOLERANCE:
        raise ConfigError(
            f"class_balance is {given}; expected {len(names)} shares above 0, one for each class, that sum to 1"
        )
    return np.asarray(shares / shares.sum())


def _balance_of(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    if not counts.all():
        raise TeacherError(
            f"class_balance: labels: the rows that rules cover have {counts.tolist()} labels of the classes; expected "
            "some of each. Give a share per class."
        )
    return np.asarray(counts / counts.sum())


def _to_json(model: LabelModel) -> dict[str, Any]:
    return {"class_balance": model.class_balance.tolist(), "vote_probs": model.vote_probs.tolist()}
