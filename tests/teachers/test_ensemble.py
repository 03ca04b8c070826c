from __future__ import annotations

import numpy as np
import pytest
import torch

from kdpipe.errors import ConfigError, TeacherError
from kdpipe.targets import OutputSpec
from kdpipe.teachers.asking import Asking
from kdpipe.teachers.base import Teacher, abstains
from kdpipe.teachers.ensemble import Ensemble, FunctionTeacher

COLUMNS = {"features": np.arange(8, dtype=np.float32).reshape(4, 2)}
PROBE = {"features": COLUMNS["features"][:1]}


class Member:
    """Says the same of every row; abstains where `silent`."""

    def __init__(self, logits, silent=None):
        self.logits, self.silent = torch.tensor(logits), silent
        self.abstains = silent is not None
        self.outputs = (OutputSpec(name="logits", shape=(len(logits),)),)
        self.fingerprint = {"logits": logits}

    def predict(self, columns):
        rows = len(columns["features"])
        said = {"logits": self.logits.expand(rows, -1)}
        return said if self.silent is None else said | {"covered": ~torch.tensor(self.silent)}


def ensemble(weights=None, **members):
    return Ensemble(list(members), members.__getitem__, weights)


def test_it_says_the_mean_of_the_probabilities():
    one, other = [0.0, 1.0, 5.0], [2.0, 2.0, -3.0]
    teacher = ensemble(one=Member(one), other=Member(other))
    assert isinstance(teacher, Teacher)
    assert not abstains(teacher)
    expected = (torch.tensor(one).softmax(0) + torch.tensor(other).softmax(0)) / 2
    torch.testing.assert_close(teacher.predict(COLUMNS)["logits"].softmax(dim=1), expected.expand(4, -1))


def test_weights_count():
    one, other = [0.0, 1.0, 5.0], [2.0, 2.0, -3.0]
    teacher = ensemble([3.0, 1.0], one=Member(one), other=Member(other))
    expected = (3 * torch.tensor(one).softmax(0) + torch.tensor(other).softmax(0)) / 4
    torch.testing.assert_close(teacher.predict(COLUMNS)["logits"].softmax(dim=1), expected.expand(4, -1))


def test_where_a_member_abstains_the_others_speak_and_where_all_do_so_does_the_ensemble():
    one, other = [0.0, 1.0, 5.0], [2.0, 2.0, -3.0]
    members = {
        "one": Member(one, [True, False, False, True]),
        "other": Member(other, [False, False, True, True]),
    }
    teacher = ensemble(**members)
    assert abstains(teacher)
    said = teacher.predict(COLUMNS)
    assert said["covered"].tolist() == [True, True, True, False]
    p, q = torch.tensor(one).softmax(0), torch.tensor(other).softmax(0)
    torch.testing.assert_close(said["logits"][:3].softmax(dim=1), torch.stack([q, (p + q) / 2, p]))
    assert torch.isfinite(said["logits"]).all()
    whole = ensemble(one=members["one"], always=Member(other))
    assert not abstains(whole)
    torch.testing.assert_close(whole.predict(COLUMNS)["logits"][0].softmax(0), q)


class Silent(Member):
    """What it says of rows that it abstains from is no number."""

    def predict(self, columns):
        said = super().predict(columns)
        return {**said, "logits": torch.where(said["covered"].unsqueeze(-1), said["logits"], torch.nan)}


def test_what_is_said_of_rows_that_are_not_covered_is_not_heard():
    other = [2.0, 2.0, -3.0]
    teacher = ensemble(one=Silent([0.0, 1.0, 5.0], silent=[True, False, True, False]), other=Member(other))
    found = teacher.predict(COLUMNS)["logits"].softmax(dim=1)
    torch.testing.assert_close(found[0], torch.tensor(other).softmax(0))
    assert torch.isfinite(found).all()


def test_who_knows_some_classes_only_is_no_member():
    served = Member([0.0, 1.0])
    served.num_kept = 1
    with pytest.raises(ConfigError, match="two knows its most probable classes only"):
        ensemble(one=Member([0.0, 1.0]), two=served)


@pytest.mark.parametrize(
    ("members", "weights", "message"),
    [
        ({}, None, "members is empty"),
        ({"one": Member([0.0, 1.0])}, [1.0, 2.0], "expected a number above 0 for each of"),
        ({"one": Member([0.0, 1.0])}, [0.0], "expected a number above 0"),
        ({"one": Member([0.0, 1.0]), "two": Member([0.0] * 3)}, None, "different shapes per row"),
    ],
)
def test_what_is_no_ensemble_is_refused(members, weights, message):
    with pytest.raises(ConfigError, match=message):
        Ensemble(list(members), members.__getitem__, weights)


def write(tmp_path, body):
    (tmp_path / "said.py").write_text(
        f"import numpy as np\n\n\ndef speak(columns):\n    x = columns['features']\n    {body}\n"
    )


def test_any_function_is_a_teacher(tmp_path):
    write(tmp_path, "return np.stack([x[:, 0], x[:, 1], -x[:, 0]], axis=1)")
    teacher = FunctionTeacher(tmp_path, "said.py:speak", 3, PROBE)
    assert isinstance(teacher, Teacher)
    assert teacher.predict(COLUMNS)["logits"].tolist() == [[k, k + 1, -k] for k in (0, 2, 4, 6)]
    before = teacher.fingerprint
    write(tmp_path, "return np.stack([x[:, 0], x[:, 1], x[:, 0]], axis=1)")
    assert FunctionTeacher(tmp_path, "said.py:speak", 3, PROBE).fingerprint != before


def test_the_file_that_names_a_function_is_covered_too(tmp_path):
    source = "import functools\nimport said\n\nspeak = functools.partial(said.speak, 1)\n"
    (tmp_path / "said.py").write_text("import numpy as np\n\n\ndef speak(c, columns):\n    return np.eye(3)[[c]]\n")
    fingerprints = []
    for text in (source, source.replace("1", "2")):
        (tmp_path / "named.py").write_text(text)
        fingerprints.append(FunctionTeacher(tmp_path, "named.py:speak", 3, PROBE).fingerprint)
    assert fingerprints[0] != fingerprints[1]
    assert "said" in fingerprints[0]["sources"]


@pytest.mark.parametrize(
    "given",
    [
        "x[:, ::-1]",
        "x[:, ::-1].astype('>f4')",
        "x[:, ::-1].astype(np.longdouble)",
        "torch.from_numpy(x).flip(1).bfloat16()",
        "torch.from_numpy(x).flip(1).requires_grad_()",
        "x[:, ::-1].tolist()",
    ],
)
def test_numbers_of_every_kind(tmp_path, given):
    write(tmp_path, f"import torch\n    return {given}")
    logits = FunctionTeacher(tmp_path, "said.py:speak", 2, PROBE).predict(COLUMNS)["logits"]
    assert logits.dtype == torch.float32
    assert logits.tolist() == COLUMNS["features"][:, ::-1].tolist()


def test_a_single_score_is_two_classes(tmp_path):
    write(tmp_path, "return x[:, 0]")
    assert FunctionTeacher(tmp_path, "said.py:speak", 2, PROBE).predict(COLUMNS)["logits"].tolist() == [
        [0, k] for k in (0, 2, 4, 6)
    ]


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('full')", "MemoryError('full')", "torch.empty(2**50)"])
def test_a_function_that_runs_out_of_memory_is_shown_fewer_rows(tmp_path, error):
    write(tmp_path, f"import torch\n    if len(x) > 2:\n        raise {error}\n    return x")
    ask = Asking(FunctionTeacher(tmp_path, "said.py:speak", 2, PROBE))
    assert ask(COLUMNS, 4)["logits"].tolist() == COLUMNS["features"].tolist()
    assert ask.at_once == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return x", r"gave \[1, 2\] for 1 rows; expected logits of shape \[1, …, 3\]"),
        (
            "return None",
            r"gave nothing for 1 rows; expected logits of shape \[1, …, 3\], a NumPy array or tensor",
        ),
        ("return {'logits': x}", "speak gave dict for 1 rows; expected logits"),
        ("return [['a', 'b', 'c']]", "speak gave list for 1 rows; expected logits"),
        (
            "import torch\n    return torch.zeros(1, 3) * 1j",
            r"speak gave \[1, 3\] complex64 for 1 rows; expected",
        ),
        ("raise ValueError('no')", "said.py:speak failed: ValueError: no"),
    ],
)
def test_a_function_that_fails_is_the_teachers_error(tmp_path, body, message):
    write(tmp_path, body)
    with pytest.raises(TeacherError, match=message):
        FunctionTeacher(tmp_path, "said.py:speak", 3, PROBE)
