from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from kdpipe.checkpoint import load_weights
from kdpipe.errors import ConfigError, DataError
from kdpipe.models.linear import Linear
from kdpipe.preprocess import Standardize
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.teachers.rules import RulesTeacher, linear_from_rules

NAMES = ["female", "first", "third", "age"]
TASK = TabularClassification(num_classes=3, columns=NAMES)
BINARY_RULES = [
    {"name": "women", "when": {"column": "female", "is": 1}, "label": 1, "weight": 2},
    {"name": "men", "when": {"column": "female", "is": 0}, "label": 0},
    {"name": "rich", "when": {"column": "first", "above": 0.5}, "label": 1, "weight": 0.5},
    {"name": "poor", "when": {"not": {"column": "third", "is": 0}}, "label": 2, "weight": 1.5},
]
CHILDREN = {"name": "children", "when": {"column": "age", "below": 10}, "label": 1}


def rows_of(num_rows=300, seed=0):
    generator = np.random.default_rng(seed)
    passenger_class = generator.integers(1, 4, num_rows)
    columns = [
        generator.integers(0, 2, num_rows),
        passenger_class == 1,
        passenger_class == 3,
        generator.uniform(0, 80, num_rows),
    ]
    return {"features": np.stack(columns, axis=1).astype(np.float32)}


def fitted():
    preprocess = Standardize()
    preprocess.fit([rows_of()])
    return preprocess


def log_probs_of(weights, rows, tmp_path):
    safetensors.torch.save_file(weights.state_dict, tmp_path / "rules.safetensors")
    model = Linear((len(NAMES),), 3)
    load_weights(model, tmp_path / "rules.safetensors")
    return torch.log_softmax(model(fitted()(rows)), dim=-1).detach()


def split(rows):
    return [{"features": rows["features"][:100]}, {"features": rows["features"][100:]}]


def test_rules_about_binary_columns_are_expressed_exactly(tmp_path):
    teacher = RulesTeacher(BINARY_RULES, TASK, class_balance=[0.5, 0.3, 0.2])
    weights = linear_from_rules(teacher, fitted(), split(rows_of()))
    assert weights.divergence == pytest.approx({rule["name"]: 0.0 for rule in BINARY_RULES}, abs=1e-9)
    new = rows_of(seed=1)
    torch.testing.assert_close(log_probs_of(weights, new, tmp_path), teacher.predict(new)["logits"], rtol=0, atol=1e-4)


def test_a_label_model_about_binary_columns_is_expressed_exactly(tmp_path):
    teacher = RulesTeacher(BINARY_RULES, TASK, combine="label_model", class_balance=[0.5, 0.3, 0.2])
    teacher.fit([(rows_of(), np.full(300, -1))])
    weights = linear_from_rules(teacher, fitted(), [rows_of()])
    new = rows_of(seed=1)
    torch.testing.assert_close(log_probs_of(weights, new, tmp_path), teacher.predict(new)["logits"], rtol=0, atol=1e-4)


def test_what_is_not_linear_is_told_and_approximated():
    rows, preprocess = rows_of(), fitted()
    teacher = RulesTeacher([*BINARY_RULES, CHILDREN], TASK)
    weights = linear_from_rules(teacher, preprocess, [rows])
    assert weights.divergence["children"] == max(weights.divergence.values()) > 0.01
    model, target = Linear((len(NAMES),), 3), teacher.predict(rows)["logits"]
    model.load_state_dict(weights.state_dict)
    inputs = preprocess(rows)
    log_probs = torch.log_softmax(model(inputs), dim=-1)
    kl = (target.exp() * (target - log_probs)).sum(dim=1)
    young = torch.from_numpy(rows["features"][:, 3] < 10)
    assert kl[young].mean().item() == pytest.approx(weights.divergence["children"], abs=1e-5)
    kl.mean().backward()
    for parameter in model.parameters():  # nothing is nearer
        assert parameter.grad.abs().max() < 1e-5


def test_rows_that_no_rule_covers_are_no_matter():
    rules, rows = [CHILDREN], rows_of()
    young = {"features": rows["features"][rows["features"][:, 3] < 10]}
    first, second = (linear_from_rules(RulesTeacher(rules, TASK), fitted(), [each]) for each in (rows, young))
    for name, tensor in first.state_dict.items():
        assert torch.equal(tensor, second.state_dict[name])


def test_columns_that_say_the_same_twice_share_the_weight():
    rows = rows_of()
    teacher = RulesTeacher(BINARY_RULES[:2], TASK)

    class Twice:
        def __call__(self, columns):
            inputs = fitted()(columns)
            return torch.cat([inputs, inputs], dim=1)

    once, twice = (linear_from_rules(teacher, preprocess, [rows]) for preprocess in (fitted(), Twice()))
    halves = once.state_dict["head.weight"] / 2
    torch.testing.assert_close(twice.state_dict["head.weight"], torch.cat([halves, halves], dim=1), rtol=0, atol=1e-5)


def test_rules_that_vote_never_or_always():
    never = {"name": "never", "when": {"column": "age", "above": 1000}, "label": 0}
    always = {"name": "always", "when": {"column": "age", "at_least": 0}, "label": 2, "weight": 3}
    weights = linear_from_rules(RulesTeacher([never, always], TASK), fitted(), [rows_of()])
    assert weights.divergence["never"] == float("inf")
    assert weights.divergence["always"] == pytest.approx(0, abs=1e-9)
    assert weights.state_dict["head.weight"].abs().max() < 1e-5
    torch.testing.assert_close(weights.state_dict["head.bias"], torch.tensor([-1.0, -1.0, 2.0]), rtol=0, atol=1e-4)


def test_no_rows_make_no_weights():
    never = {"name": "never", "when": {"column": "age", "above": 1000}, "label": 0}
    for blocks in ([], [rows_of()]):
        with pytest.raises(DataError, match="weights from rules need rows in which a rule votes"):
            linear_from_rules(RulesTeacher([never], TASK), fitted(), blocks)


def test_inputs_that_are_no_numbers_are_refused():
    rows = rows_of()
    rows["features"][3, 3] = np.nan
    with pytest.raises(DataError, match="Standardize makes NaN or infinite numbers of 1 rows"):
        linear_from_rules(RulesTeacher([CHILDREN, *BINARY_RULES], TASK), fitted(), [rows])


def test_inputs_of_several_tensors_are_refused():
    class Tokens:
        def __call__(self, columns):
            return {"input_ids": torch.zeros(300, 2), "attention_mask": torch.ones(300, 2)}

    with pytest.raises(ConfigError, match="takes one tensor; Tokens makes input_ids, attention_mask"):
        linear_from_rules(RulesTeacher(BINARY_RULES, TASK), Tokens(), [rows_of()])
