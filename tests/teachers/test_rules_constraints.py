from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.errors import ConfigError, TeacherError
from kdpipe.fingerprint import digest
from kdpipe.preprocess import Standardize
from kdpipe.targets import OutputSpec, SparseTargets
from kdpipe.teachers.base import Teacher
from kdpipe.teachers.rules import ConstrainedTeacher, RulesTeacher
from kdpipe.teachers.torch import TorchTeacher

NUM_RULES = 3
RULES = [
    {"name": f"r{rule}", "when": {"column": f"v{rule}", "at_least": 0}, "label": label, "weight": weight}
    for rule, (label, weight) in enumerate([(2, 1.0), (0, 0.5), (2, 3.0)])
]


@dataclass
class Task:
    num_classes: int = 3
    class_names: tuple[str, ...] | None = None


class Told:
    """A teacher that says the prepared columns of its name."""

    def __init__(self, outputs=("logits",), abstains=False, num_classes=3):
        self.outputs = tuple(OutputSpec(name=name, shape=(num_classes,)) for name in outputs)
        self.abstains = abstains
        self.fingerprint = {"kind": "told", "classes": num_classes}

    def predict(self, columns):
        said = {output.name: torch.from_numpy(columns[output.name]) for output in self.outputs}
        return said | ({"covered": torch.from_numpy(columns["covered"])} if self.abstains else {})


def rows_of(num_rows=40, seed=0):
    generator = np.random.default_rng(seed)
    rows = {f"v{rule}": generator.choice([np.nan, 1.0], num_rows) for rule in range(NUM_RULES)}
    return rows | {"logits": generator.normal(0, 3, (num_rows, 3)).astype(np.float32)}


def brute_force(rows, strength):
    """q(y|x), eq. 4 of Hu et al. 2016, a term at a time."""
    result = []
    for index, logits in enumerate(rows["logits"].astype(np.float64)):
        p = np.exp(logits) / np.exp(logits).sum()
        q = np.empty(3)
        for label in range(3):
            exponent = 0.0
            for rule in RULES:
                votes = not np.isnan(rows[rule["when"]["column"]][index])
                satisfied = 1 if not votes or rule["label"] == label else 0
                exponent += strength * rule["weight"] * (1 - satisfied)
            q[label] = p[label] * np.exp(-exponent)
        result.append(q / q.sum())
    return np.array(result)


@given(st.floats(0.1, 8), st.integers(0, 5))
def test_it_is_the_papers_formula(strength, seed):
    rows = rows_of(seed=seed)
    said = ConstrainedTeacher(Told(), RULES, Task(), strength=strength).predict(rows)
    q = torch.softmax(said["logits"].double(), dim=-1).numpy()
    np.testing.assert_allclose(q, brute_force(rows, strength), rtol=1e-4, atol=1e-9)


def test_rows_without_a_vote_are_left_as_they_are():
    rows = rows_of()
    silent = np.isnan(np.stack([rows[f"v{rule}"] for rule in range(NUM_RULES)])).all(axis=0)
    said = ConstrainedTeacher(Told(), RULES, Task()).predict(rows)["logits"].numpy()
    assert silent.any()
    assert np.array_equal(said[silent], rows["logits"][silent])
    assert not np.isclose(said[~silent], rows["logits"][~silent]).all(axis=1).any()


def test_with_strength_one_rules_are_votes_beside_the_teacher():
    rows = rows_of()
    vote = RulesTeacher(RULES, Task()).predict(rows)["logits"]
    constrained = ConstrainedTeacher(Told(), RULES, Task(), strength=1).predict(rows)["logits"]
    product = torch.log_softmax(torch.from_numpy(rows["logits"]) + vote, dim=-1)
    torch.testing.assert_close(torch.log_softmax(constrained, dim=-1), product, rtol=0, atol=1e-5)


def test_a_class_that_the_teacher_rules_out_stays_out():
    rows = rows_of()
    rows["logits"][:, 2] = -np.inf
    said = ConstrainedTeacher(Told(), RULES, Task(), strength=6).predict(rows)["logits"]
    assert torch.isneginf(said[:, 2]).all()
    assert torch.isfinite(said[:, :2]).all()


def test_features_and_coverage_are_the_teachers_own():
    rows = rows_of()
    rows |= {"hidden": rows["logits"] + 1, "covered": np.arange(40) % 2 == 0}
    told = Told(("logits", "hidden"), abstains=True)
    teacher = ConstrainedTeacher(told, RULES, Task())
    said = teacher.predict(rows)
    assert teacher.abstains
    assert teacher.outputs == told.outputs
    assert np.array_equal(said["hidden"], rows["hidden"])
    assert np.array_equal(said["covered"], rows["covered"])
    assert not ConstrainedTeacher(Told(), RULES, Task()).abstains


def test_a_module_is_drawn_towards_the_rules():
    generator = np.random.default_rng(0)
    rows = {"features": generator.normal(size=(20, 2)).astype(np.float32)}
    preprocess = Standardize(mean=[0.0, 0.0], std=[1.0, 1.0])
    module = TorchTeacher(torch.nn.Linear(2, 3), preprocess, 3, {"weights": "w"}, {"features": rows["features"][:1]})

    class Table(Task):
        def column_values(self, columns):
            return {"first": columns["features"][:, 0]}

    rule = {"name": "high", "when": {"column": "first", "above": 0}, "label": 1, "weight": 20}
    teacher = ConstrainedTeacher("big", [rule], Table(), teacher_of={"big": module}.__getitem__)
    assert isinstance(teacher, Teacher)
    high = rows["features"][:, 0] > 0
    said = teacher.predict(rows)["logits"].cpu()
    assert (said[high].argmax(dim=1) == 1).all()
    assert torch.equal(said[~high], module.predict(rows)["logits"].cpu()[~high])


def test_the_fingerprint_covers_teacher_rules_and_strength():
    def fingerprint(teacher=None, rules=RULES, **arguments):
        return digest(dict(ConstrainedTeacher(teacher or Told(), rules, Task(), **arguments).fingerprint))

    other = Told()
    other.fingerprint = {"kind": "other"}
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(other), fingerprint(rules=RULES[:2]), fingerprint(strength=2)}) == 4


@pytest.mark.parametrize("strength", [0, -1, float("nan"), float("inf")])
def test_a_strength_that_means_nothing_is_refused(strength):
    with pytest.raises(ConfigError, match=f"strength is {strength}; expected a number above 0"):
        ConstrainedTeacher(Told(), RULES, Task(), strength=strength)


def test_what_is_no_teacher_is_refused():
    with pytest.raises(ConfigError, match=r"teacher: expected the name of another teacher .*\(found 3\)"):
        ConstrainedTeacher(3, RULES, Task())


def test_logits_of_other_classes_are_refused():
    with pytest.raises(ConfigError, match=r"says logits of shape \[4\] about a row; .* of 3 classes"):
        ConstrainedTeacher(Told(num_classes=4), RULES, Task())


def test_columns_that_do_not_exist_are_refused_at_once():
    probe = {name: values[:1] for name, values in rows_of().items() if name != "v1"}
    with pytest.raises(ConfigError, match=r"rule 2 \(r1\).when.at_least: there is no column 'v1'"):
        ConstrainedTeacher(Told(), RULES, Task(), probe=probe)


def test_a_teacher_of_the_first_k_classes_is_refused():
    class Sparse(Told):
        def predict(self, columns):
            head = torch.zeros(40, 1)
            ids = torch.zeros(40, 1, dtype=torch.int64)
            return {
                "logits": SparseTargets(ids=ids, head=head, tails=head - 9, temperatures=(1.0,), num_classes=3),
            }

    with pytest.raises(TeacherError, match="knows its first k only"):
        ConstrainedTeacher(Sparse(), RULES, Task()).predict(rows_of())
