from __future__ import annotations

import gzip
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.errors import ConfigError, TeacherError
from kdpipe.fingerprint import digest
from kdpipe.targets import OutputSpec
from kdpipe.tasks.tabular import TabularClassification
from kdpipe.tasks.text import TextClassification
from kdpipe.teachers.asking import Asking
from kdpipe.teachers.base import Learner, Teacher, abstains
from kdpipe.teachers.rules import RulesTeacher
from kdpipe.teachers.rules.conditions import parse_condition
from projects import REPOSITORY

DATASETS = Path(os.environ.get("KDPIPE_DATASETS", REPOSITORY.parent / "shared" / "datasets"))


@dataclass
class Survival:
    """A task whose prepared columns are the named ones."""

    num_classes: int = 2
    class_names: tuple[str, ...] | None = ("died", "survived")


def text(*values):
    return np.array(values, object)


ROWS = {
    "age": np.array([4, 30, np.nan, 62, 10], np.float32),
    "sex": text("female", "male", "female", "male", None),
    "note": text("A Free upper deck", "freedom is dear", "", "carefree (100 %)", None),
}
WOMEN = {"name": "women", "when": {"column": "sex", "is": "female"}, "label": "survived"}
CHILDREN = {"name": "children", "when": {"column": "age", "below": 10}, "label": "survived", "weight": 0.5}
MEN = {"name": "men", "when": {"column": "sex", "is": "male"}, "label": "died", "weight": 2}
RULES = [WOMEN, CHILDREN, MEN]


def teacher_of(rules=None, task=None, **arguments):
    return RulesTeacher(RULES if rules is None else rules, task or Survival(), **arguments)


def probabilities(teacher, rows=ROWS):
    return torch.softmax(teacher.predict(rows)["logits"].double(), dim=-1).numpy()


# Conditions


def where(spec, rows=ROWS):
    truth = parse_condition(spec, "when")(rows)
    assert not (truth.holds & truth.fails).any()
    return np.flatnonzero(truth.holds).tolist()


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ({"column": "age", "is": 30}, [1]),
        ({"column": "age", "in": [4, 62.0, 7]}, [0, 3]),
        ({"column": "age", "below": 10}, [0]),
        ({"column": "age", "at_most": 10}, [0, 4]),
        ({"column": "age", "above": 30}, [3]),
        ({"column": "age", "at_least": 30}, [1, 3]),
        ({"column": "age", "at_least": 10, "below": 62}, [1, 4]),
        ({"column": "age", "missing": True}, [2]),
        ({"column": "age", "missing": False}, [0, 1, 3, 4]),
        ({"column": "sex", "is": "female"}, [0, 2]),
        ({"column": "sex", "in": ["male", "other"]}, [1, 3]),
        ({"column": "sex", "missing": True}, [4]),
        ({"column": "note", "contains": ["FREE"]}, [0, 1, 3]),
        ({"column": "note", "words": ["free", "dear"]}, [0, 1]),
        ({"column": "note", "contains": "(100 %)"}, [3]),
        ({"column": "note", "matches": r"^[a-z]+ is\b"}, [1]),
        ({"column": "note", "matches": "free"}, [1, 3]),
        ({"column": "note", "is": ""}, [2]),
        ({"all": [{"column": "sex", "is": "male"}, {"column": "age", "above": 40}]}, [3]),
        ({"any": [{"column": "sex", "is": "female"}, {"column": "age", "above": 40}]}, [0, 2, 3]),
        ({"not": {"column": "sex", "is": "female"}}, [1, 3]),
        ({"not": {"column": "age", "below": 10}}, [1, 3, 4]),
        ({"not": {"any": [{"column": "age", "below": 10}, {"column": "sex", "is": "male"}]}}, []),
    ],
    ids=str,
)
def test_conditions_hold_where_they_say(spec, rows):
    assert where(spec) == rows


LEAVES = st.sampled_from(
    [
        {"column": "age", "below": 20},
        {"column": "age", "missing": True},
        {"column": "sex", "is": "female"},
        {"column": "note", "contains": "free"},
    ]
)
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"all": parts}),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"any": parts}),
        inner.map(lambda part: {"not": part}),
    ),
    max_leaves=6,
)


def kleene(spec, row):
    """The reference, a row at a time: True, False, or None where it is not known."""
    if "not" in spec:
        inner = kleene(spec["not"], row)
        return None if inner is None else not inner
    for key, decisive in (("all", False), ("any", True)):
        if key in spec:
            parts = [kleene(part, row) for part in spec[key]]
            return decisive if decisive in parts else None if None in parts else not decisive
    value = row[spec["column"]]
    missing = str(value) in ("None", "nan")
    if "missing" in spec:
        return missing
    if missing:
        return None
    if "below" in spec:
        return bool(value < spec["below"])
    return value == spec["is"] if "is" in spec else spec["contains"] in value.lower()


@given(CONDITIONS)
def test_conditions_are_three_valued_logic(spec):
    truth = parse_condition(spec, "when")(ROWS)
    for index in range(5):
        expected = kleene(spec, {name: values[index] for name, values in ROWS.items()})
        assert (truth.holds[index], truth.fails[index]) == (expected is True, expected is False)


def test_numbers_are_compared_as_the_column_holds_them():
    tenth = {"x": np.array([0.1], np.float32)}
    assert where({"column": "x", "is": 0.1}, tenth) == where({"column": "x", "at_most": 0.1}, tenth) == [0]
    assert where({"column": "x", "below": 0.1}, tenth) == []
    assert where({"column": "x", "below": 1e300}, tenth) == [0]
    whole = {"x": np.array([1, 2])}
    assert where({"column": "x", "is": 1.5}, whole) == []
    assert where({"column": "x", "below": 1.5}, whole) == [0]
    assert where({"column": "x", "is": True}, {"x": np.array([True, False])}) == [0]


def test_whole_numbers_that_float32_does_not_hold_are_no_conditions():
    rows = {"x": np.array([16777216, 16777217]).astype(np.float32)}
    with pytest.raises(ConfigError, match=r"when\.in: 16777217 cannot be told from its neighbours, .*category"):
        parse_condition({"column": "x", "in": [1, 16777217]}, "when")(rows)
    assert where({"column": "x", "at_least": 16777216}, rows) == [0, 1]
    assert where({"column": "x", "is": 16777215}, rows) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("female", r"when: expected a condition such as .* \(found 'female'\)"),
        ({}, "when: expected a condition"),
        ({"colum": "age", "below": 3}, r"when\.colum: unknown key .*; did you mean 'column'\?"),
        ({"column": "age", "belov": 3}, r"when\.belov: unknown key .*; did you mean 'below'\?"),
        ({"column": 3, "below": 3}, r"when\.column: expected the name of a column \(found 3\)"),
        ({"below": 3}, r"when\.column: expected the name"),
        ({"column": "age"}, "when: what of 'age'"),
        ({"column": "age", "below": "10"}, r"when\.below: expected a number \(found '10'\)"),
        ({"column": "age", "below": math.nan}, r"when\.below: expected a number \(found nan\)"),
        ({"column": "age", "is": None}, r"when\.is: expected a number or text \(found None\)"),
        ({"column": "age", "in": 3}, r"when\.in: expected a list of values \(found 3\)"),
        ({"column": "sex", "in": ["male", 3]}, r"when\.in: expected a number or text \(found 'male'\)"),
        ({"column": "sex", "missing": "yes"}, r"when\.missing: expected true or false \(found 'yes'\)"),
        ({"column": "note", "matches": "(free"}, r"when\.matches: '\(free' is no regular expression: missing \)"),
        ({"column": "note", "matches": ["a"]}, r"when\.matches: expected a regular expression"),
        ({"column": "note", "words": []}, r"when\.words: expected words"),
        ({"column": "note", "words": ["a", False]}, r"when\.words: expected words .*quote"),
        ({"column": "note", "contains": [""]}, r"when\.contains: expected words"),
        ({"all": []}, r"when\.all: expected a list of conditions"),
        ({"all": {"column": "age", "below": 3}}, r"when\.all: expected a list of conditions"),
        ({"all": [{"column": "age", "below": 3}], "column": "sex"}, r"when: 'all' stands alone .*found column"),
        ({"any": [{"column": "age", "below": 3}, {"not": {"colum": 1}}]}, r"when\.any\.1\.not\.colum: unknown key"),
    ],
    ids=str,
)
def test_conditions_that_say_nothing_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_condition(spec, "when")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"column": "agee", "below": 3}, "when.below: there is no column 'agee'; there are age, .*did you mean 'age'"),
        ({"column": "sex", "below": 3}, "when.below: a number, but the column 'sex' is text"),
        ({"column": "sex", "is": True}, "when.is: a number, but the column 'sex' is text; quote it"),
        ({"column": "age", "contains": "a"}, "when.contains: about text, but the column 'age' holds numbers"),
        ({"column": "pixels", "is": 3}, "'pixels' does not hold one number or text per row"),
    ],
    ids=str,
)
def test_conditions_that_do_not_fit_their_column_are_refused(spec, message):
    condition = parse_condition(spec, "when")
    with pytest.raises(ConfigError, match=message):
        condition(ROWS | {"pixels": np.zeros((5, 2))})


# Votes


def test_it_is_a_teacher_that_abstains():
    teacher = teacher_of()
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, Learner)
    assert abstains(teacher)
    assert teacher.outputs == (OutputSpec(name="logits", shape=(2,)),)


def test_it_covers_the_rows_in_which_a_rule_votes():
    assert teacher_of().predict(ROWS)["covered"].tolist() == [True, True, True, True, False]


def test_weights_are_log_odds():
    odds = probabilities(teacher_of())
    assert odds[:, 1] / odds[:, 0] == pytest.approx([math.exp(1.5), math.exp(-2), math.e, math.exp(-2), 1])


def test_logits_are_the_log_posterior():
    logits = teacher_of().predict(ROWS)["logits"]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.logsumexp(dim=-1), torch.zeros(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("balance", [[0.8, 0.2], {"survived": 0.2, "died": 0.8}])
def test_class_balance_multiplies_the_odds(balance):
    uniform, given = probabilities(teacher_of()), probabilities(teacher_of(class_balance=balance))
    assert given[:, 1] / given[:, 0] == pytest.approx(uniform[:, 1] / uniform[:, 0] / 4)


@given(st.lists(st.integers(-1, 3), min_size=5, max_size=5), st.permutations(range(5)))
def test_the_order_of_rules_is_no_matter(votes, order):
    rules = [
        {"name": f"r{index}", "when": {"column": f"v{index}", "is": 1}, "label": max(vote, 0), "weight": 1 + index}
        for index, vote in enumerate(votes)
    ]
    rows = {f"v{index}": np.array([float(vote >= 0)]) for index, vote in enumerate(votes)}
    task = Survival(num_classes=4, class_names=None)
    first = RulesTeacher(rules, task).predict(rows)
    second = RulesTeacher([rules[index] for index in order], task).predict(rows)
    torch.testing.assert_close(first, second)
    expected = np.exp([sum(1 + index for index, vote in enumerate(votes) if vote == label) for label in range(4)])
    np.testing.assert_allclose(torch.softmax(first["logits"], -1)[0], expected / expected.sum(), rtol=1e-5)
    assert bool(first["covered"]) == (max(votes) >= 0)


def test_what_it_says_of_a_row_does_not_depend_on_the_batch():
    teacher = teacher_of()
    whole = teacher.predict(ROWS)["logits"]
    alone = [teacher.predict({name: values[[index]] for name, values in ROWS.items()})["logits"] for index in range(5)]
    assert torch.equal(whole, torch.cat(alone))


def test_tables_are_seen_by_the_sources_column_names():
    task = TabularClassification(num_classes=2, columns=["age", "fare"])
    rows = {"features": np.array([[4, 80], [40, 7]], np.float32)}
    rules = [
        {"name": "children", "when": {"column": "age", "below": 10}, "label": 1},
        {"name": "third class", "when": {"column": "fare", "below": 10}, "label": 0},
    ]
    assert RulesTeacher(rules, task).predict(rows)["logits"].argmax(dim=1).tolist() == [1, 0]
    rules[0]["when"]["column"] = "ages"
    with pytest.raises(ConfigError, match=r"rule 1 \(children\).*there is no column 'ages'; there are age, fare"):
        RulesTeacher(rules, task, probe=rows)


def test_texts_are_seen_by_the_sources_column_names():
    task = TextClassification(num_classes=2, column="review")
    batch = pa.RecordBatch.from_pydict({"review": ["A gréat film", "greatly dull", ""]})
    rows = task.to_inputs(batch, str)
    rules = [{"name": "praise", "when": {"column": "review", "words": ["gréat", "great"]}, "label": 1}]
    said = RulesTeacher(rules, task, probe=rows).predict(rows)
    assert said["covered"].tolist() == [True, False, False]


def test_categories_are_seen_as_text_and_may_be_missing():
    task = TabularClassification(num_classes=2, columns=["age"], categorical=["sex"], missing="allow")
    batch = pa.RecordBatch.from_pydict({"age": [4.0, None, 30.0], "sex": ["female", "male", None]})
    rows = task.to_inputs(batch, str)
    rules = [
        {
            "name": "girls",
            "when": {"all": [{"column": "sex", "is": "female"}, {"column": "age", "below": 9}]},
            "label": 1,
        },
        {"name": "unknown", "when": {"any": [{"column": c, "missing": True} for c in ("age", "sex")]}, "label": 0},
    ]
    assert RulesTeacher(rules, task).rules.votes(rows).tolist() == [[1, -1], [-1, 0], [-1, 0]]


# Files and functions

FUNCTIONS = """
import numpy as np

from shared_words import LUCKY


def by_note(columns):
    return np.array([1 if LUCKY in (note or "").lower() else -1 for note in columns["note"]])


def brightness(columns):
    return np.where(columns["image"].mean(axis=(1, 2, 3)) > 100, 2, -1)


def too_short(columns):
    return np.array([1])


def floats(columns):
    return np.zeros(len(columns["age"]))


def too_high(columns):
    return np.full(len(columns["age"]), 2)


def fails(columns):
    return columns["absent"]
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "shared_words", raising=False)
    (tmp_path / "shared_words.py").write_text("LUCKY = 'free'\n")
    (tmp_path / "my_rules.py").write_text(FUNCTIONS)
    return tmp_path


def function(name, **more):
    return {"name": name, "function": f"my_rules.py:{name}", **more}


def test_rules_are_read_from_a_file(root):
    (root / "rules.yaml").write_text(yaml.safe_dump([*RULES, function("by_note", weight=3)]))
    from_file = teacher_of("rules.yaml", root=root)
    inline = teacher_of([*RULES, function("by_note", weight=3)], root=root)
    assert torch.equal(from_file.predict(ROWS)["logits"], inline.predict(ROWS)["logits"])
    assert from_file.fingerprint == inline.fingerprint
    odds = probabilities(from_file)
    assert odds[1, 1] / odds[1, 0] == pytest.approx(math.exp(3 - 2))


def test_functions_see_prepared_columns_of_any_kind(root):
    images = {"image": np.stack([np.full((2, 2, 1), 200, np.uint8), np.zeros((2, 2, 1), np.uint8)])}
    teacher = teacher_of([function("brightness")], Survival(num_classes=3, class_names=None), root=root)
    said = teacher.predict(images)
    assert said["covered"].tolist() == [True, False]
    assert said["logits"][0].argmax() == 2


def test_a_function_that_runs_out_of_memory_is_shown_fewer_rows(root):
    (root / "large.py").write_text(
        "import numpy as np\nimport torch\n\n\ndef vote(columns):\n"
        "    if len(columns['age']) > 2:\n        torch.empty(2**50)\n"
        "    return np.zeros(len(columns['age']), int)\n"
    )
    ask = Asking(teacher_of([{"name": "large", "function": "large.py:vote"}], root=root))
    assert ask(ROWS, 5)["covered"].tolist() == [True] * 5
    assert ask.at_once == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_short", r"gave int64 of shape \[1\]; expected whole numbers of shape \[5\]"),
        ("floats", r"gave float64 of shape \[5\]; expected whole numbers"),
        ("too_high", r"gave 2; expected whole numbers .*a class in 0\.\.1 or -1"),
        ("fails", "failed: KeyError: 'absent'"),
    ],
)
def test_functions_that_give_no_votes_are_refused(root, name, message):
    with pytest.raises(TeacherError, match=rf"rule 1 \({name}\)\.function: my_rules\.py:{name} {message}"):
        teacher_of([function(name)], root=root, probe=ROWS)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], r"rules: expected a list of rules, each with a name \(found \[\]\)"),
        ({"women": WOMEN}, "rules: expected a list of rules"),
        ("absent.yaml", "there is no file .*absent.yaml"),
        (["women"], r"rule 1: expected a mapping with a name \(found 'women'\)"),
        ([{**WOMEN, "name": ""}], "rule 1: expected a mapping with a name"),
        ([WOMEN, WOMEN], "2 rules have the name 'women'"),
        ([{**WOMEN, "wieght": 2}], r"rule 1 \(women\)\.wieght: unknown key .*did you mean 'weight'\?"),
        ([{**WOMEN, "label": "surived"}], r"label: expected a class: died, survived or .*did you mean 'survived'\?"),
        ([{**WOMEN, "label": 2}], r"label: expected a class: died, survived or a number in 0\.\.1 \(found 2\)"),
        ([{**WOMEN, "label": True}], r"label: expected a class: .* \(found True\)"),
        ([{"name": "women", "when": WOMEN["when"]}], r"label: missing"),
        ([{"name": "women", "label": 1}], "expected either `when` and `label`, or `function`"),
        ([{**WOMEN, "function": "a.py:b"}], "expected either `when` and `label`, or `function`"),
        ([{**WOMEN, "weight": math.nan}], r"rule 1 \(women\)\.weight: expected a number above 0 \(found nan\)"),
        ([{**WOMEN, "weight": 0}], r"weight: expected a number above 0 \(found 0\)"),
        ([{**WOMEN, "weight": math.inf}], r"weight: expected a number above 0 \(found inf\)"),
        ([{**WOMEN, "weight": "2"}], r"weight: expected a number above 0 \(found '2'\)"),
        ([{**WOMEN, "weight": True}], r"weight: expected a number above 0 \(found True\)"),
        ([WOMEN, {**MEN, "when": {"column": "sex", "matches": "("}}], r"rule 2 \(men\)\.when\.matches: '\('"),
        ([function("absent")], "my_rules.py has no 'absent'; it has brightness, by_note"),
        ([function("by_note", label=1)], "a function gives its labels itself"),
        ([{"name": "a", "function": 3}], r"function: expected a path such as .* \(found 3\)"),
    ],
    ids=str,
)
def test_rules_that_cannot_be_used_are_refused(root, rules, message):
    with pytest.raises(ConfigError, match=message):
        teacher_of(rules, root=root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combine": "votes"}, "combine is 'votes'; expected vote or label_model"),
        ({"class_balance": [0.5, 0.4]}, "class_balance is .*expected 2 shares above 0"),
        ({"class_balance": [1.0, 0.0]}, "expected 2 shares above 0"),
        ({"class_balance": [0.5, math.nan]}, "expected 2 shares above 0"),
        ({"class_balance": [0.2, 0.3, 0.5]}, "expected 2 shares above 0"),
        ({"class_balance": {"died": 0.5, "lived": 0.5}}, "names died, lived; the classes are died, survived"),
        ({"class_balance": "labels"}, "a vote sees no labels"),
        ({"belief": -1.0}, "belief is -1.0; expected"),
        ({"belief": math.nan}, "belief is nan; expected"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        teacher_of(**arguments)


def test_a_vote_has_nothing_to_learn():
    with pytest.raises(ConfigError, match="leave fit_on out"):
        teacher_of().fit([(ROWS, np.zeros(5, np.int64))])


def test_the_fingerprint_covers_rules_code_and_settings(root):
    def fingerprint(rules=RULES, **arguments):
        return digest(dict(teacher_of(rules, root=root, **arguments).fingerprint))

    assert fingerprint() == fingerprint()
    changed = [
        fingerprint([WOMEN, CHILDREN, {**MEN, "weight": 2.5}]),
        fingerprint([WOMEN, CHILDREN, {**MEN, "label": "survived"}]),
        fingerprint([WOMEN, CHILDREN, {**MEN, "when": {"column": "age", "above": 60}}]),
        fingerprint([*RULES, function("by_note")]),
        fingerprint(class_balance=[0.6, 0.4]),
        fingerprint(task=Survival(class_names=("survived", "died"))),
    ]
    (root / "shared_words.py").write_text("LUCKY = 'upper'\n")
    changed.append(fingerprint([*RULES, function("by_note")]))
    assert len({fingerprint(), *changed}) == 1 + len(changed)


def test_the_files_that_it_reads_are_known_without_making_it(root):
    (root / "rules.yaml").write_text(yaml.safe_dump([*RULES, function("by_note")]))
    reads = RulesTeacher.reads({"rules": "rules.yaml"}, root)
    assert {"rules.yaml", "my_rules@", "shared_words"} <= set(reads)
    (root / "shared_words.py").write_text("LUCKY = 'upper'\n")
    again = RulesTeacher.reads({"rules": "rules.yaml"}, root)
    assert {name for name in reads if reads[name] != again[name]} == {"shared_words"}


# The guide, on real rows


@pytest.fixture
def guide(tmp_path):
    """The files of docs/guides/rules.md."""
    content = (REPOSITORY / "docs" / "guides" / "rules.md").read_text()
    for language, name in (("yaml", "rules.yaml"), ("python", "my_rules.py")):
        (tmp_path / name).write_text(re.findall(rf"```{language}\n(.*?)```", content, re.DOTALL)[0])
    return tmp_path


def test_the_rules_of_the_guide(guide):
    rows = {
        "Sex": text("female", "male", "male", None),
        "Name": text("Rothes, the Countess. of", "Master. Arthur", "Mr. Sirrah", "Nobody"),
        "Age": np.array([33, 4, np.nan, 50]),
        "Pclass": np.array([1, 3, 3, 2]),
        "SibSp": np.array([0, 4, 3, 0]),
    }
    teacher = teacher_of("rules.yaml", root=guide)
    said = teacher.predict(rows)
    assert said["covered"].tolist() == [True, True, True, False]
    odds = said["logits"][:, 1] - said["logits"][:, 0]
    assert odds.tolist() == pytest.approx([1.5, 2 - 4.5, -5, 0])


def test_rules_about_real_passengers(guide):
    path = DATASETS / "titanic" / "titanic.csv.gz"
    if not path.is_file():
        pytest.skip(f"no {path} (env KDPIPE_DATASETS)")
    with gzip.open(path) as file:
        table = pyarrow.csv.read_csv(file)
    rows = {name: np.array(table[name].to_pylist(), object) for name in ("Name", "Sex")}
    rows |= {name: np.array(table[name].to_pylist(), np.float32) for name in ("Age", "Pclass", "SibSp")}

    def accuracy(rules):
        said = teacher_of(rules, root=guide).predict(rows)
        assert said["covered"].all()
        return (said["logits"].argmax(dim=1).numpy() == table["Survived"].to_numpy()).mean()

    sex_only = accuracy(
        [WOMEN | {"when": {"column": "Sex", "is": "female"}}, MEN | {"when": {"column": "Sex", "is": "male"}}]
    )
    assert sex_only == pytest.approx(0.787, abs=0.0005)  # well known
    assert accuracy("rules.yaml") > sex_only
