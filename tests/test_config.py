from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import field
from pathlib import Path

import pytest
from dvc.utils.serialize import modify_yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kdpipe.config import Bound, Factory, FactoryField, bind, load_yaml, package, parse, resolve, save_yaml
from kdpipe.errors import ConfigError, DataError

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Train:
    epochs: int = Field(gt=0)
    learning_rate: float = 0.1


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Teacher:
    model: FactoryField
    train: Train | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Params:
    teachers: dict[str, Teacher]
    weights: tuple[float, ...] = ()
    plans: tuple[Train, ...] = ()
    names: dict[str, str] = field(default_factory=dict)


NET = {"factory": "nets:Net", "width": 3}


# YAML


def test_yaml_is_read_as_utf_8(tmp_path):
    (tmp_path / "params.yaml").write_bytes("a: [1, é]\n".encode())
    assert load_yaml(tmp_path / "params.yaml") == {"a": [1, "é"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        ("-2.5e+1", -25.0),
        (".5e1", 5.0),
        ("0.001", 0.001),
        ("3", 3),
        (".inf", float("inf")),
        ("'1e-3'", "1e-3"),
        ("2024-01-31", "2024-01-31"),
        ("e3", "e3"),
        ("1e", "1e"),
        ("12e3f", "12e3f"),
        ("1.2.3e4", "1.2.3e4"),
        ("true", True),
        ("FALSE", False),
        ("no", "no"),
        ("On", "On"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("010", 10),
        ("-08", -8),
        ("0o10", 8),
        ("0x1F", 31),
        ("-0b11", -3),
        ("1_000", 1000),
        ("1_0.5", 10.5),
        ("-.INF", float("-inf")),
        ("null", None),
    ],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path, text, value):
    (tmp_path / "params.yaml").write_text(f"a: {text}")
    found = load_yaml(tmp_path / "params.yaml")["a"]
    assert (found, type(found)) == (value, type(value))


TEXTS = [
    "no",
    "yes",
    "On",
    "y",
    "1:30",
    "010",
    "1_000",
    "1e-3",
    ".5",
    "true",
    "null",
    "~",
    "2024-01-31",
    "0x1F",
    ".",
]


def test_texts_that_dvc_writes_anew_stay_texts(tmp_path):
    """`dvc exp run -S` writes params.yaml with the quotes of YAML 1.2."""
    path = tmp_path / "params.yaml"
    path.write_text(f"names: {json.dumps(TEXTS)}\nseed: 1\n")
    with modify_yaml(path) as params:
        params["seed"] = 2
    assert load_yaml(path) == {"names": TEXTS, "seed": 2}


def test_what_is_saved_is_loaded(tmp_path):
    value = {text: text for text in TEXTS} | {"numbers": [1, 0.5, 1e-05, 1e20, float("inf"), True, None], "é": {}}
    save_yaml(value, tmp_path / "params.yaml")
    assert json.dumps(load_yaml(tmp_path / "params.yaml")) == json.dumps(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is no valid YAML"),
        (b"a: \xff\xfe\xfa", "is no valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "is no valid YAML"),
    ],
)
def test_what_is_no_yaml_is_refused(tmp_path, content, message):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"params\.yaml " + message):
        load_yaml(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"params\.yaml, line 3: the key 'a' stands on line 1 already"),
        ("- {name: x}\n- when:\n    below: 1\n    below: 2\n", r"line 4: the key 'below' stands on line 3 already"),
        ("{a: 1, 'a': 2}", r"line 1: the key 'a' stands on line 1 already"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_yaml(tmp_path / "params.yaml")


def test_a_merged_key_may_be_given_again(tmp_path):
    (tmp_path / "params.yaml").write_text("a: &x {b: 1, c: 1}\nd: {<<: *x, b: 2}\n")
    assert load_yaml(tmp_path / "params.yaml")["d"] == {"b": 2, "c": 1}


def test_an_absent_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no .*params\.yaml: expected the run's parameters there. `kdpipe demo DIR`"):
        load_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"params\.yaml cannot be read: Is a directory"):
        load_yaml(tmp_path / "params.yaml")


# Sections


def test_sections_become_frozen_values():
    params = parse(Params, {"teachers": {"big": {"model": NET, "train": {"epochs": 2}}}, "weights": [1, 2]}, "p.yaml")
    assert params.teachers["big"].model == Factory(path="nets:Net", arguments={"width": 3})
    assert params.teachers["big"].model.to_json() == NET
    assert params.teachers["big"].train == Train(epochs=2, learning_rate=0.1)
    assert params.weights == (1.0, 2.0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"teachers": {}, "techers": {}},
            "techers: unknown key (the keys here are names, plans, teachers, weights); did you mean 'teachers'?",
        ),
        (
            {"teachers": {"big": {"model": NET, "train": {"epochs": 1, "epoch": 2}}}},
            "teachers.big.train.epoch: unknown key (the keys here are epochs, learning_rate); did you mean 'epochs'?",
        ),
        (
            {"teachers": {}, "plans": [{"epochs": 1}, {"epochs": 1, "zzz": 0}]},
            "plans.1.zzz: unknown key (the keys here are epochs, learning_rate)",
        ),
        ({"weights": []}, "teachers: missing"),
        ({"teachers": {"big": {}}}, "teachers.big.model: missing"),
        (
            {"teachers": {"big": {"model": NET, "train": {"epochs": "many"}}}},
            'teachers.big.train.epochs: expected a whole number (found "many")',
        ),
        (
            {"teachers": {"big": {"model": NET, "train": {"epochs": 0}}}},
            "teachers.big.train.epochs: Input should be greater than 0 (found 0)",
        ),
        ({"teachers": {}, "weights": 3}, "weights: expected a list (found 3)"),
        (
            {"teachers": {"big": {"model": "nets:Net"}}},
            'teachers.big.model: expected a mapping with a key "factory" such as "package.module:Name" '
            '(found "nets:Net")',
        ),
        (
            {"teachers": {"big": {"model": {"width": 3}}}},
            'teachers.big.model: expected a mapping with a key "factory" such as "package.module:Name" '
            '(found {"width": 3})',
        ),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_path(value, expected):
    with pytest.raises(ConfigError) as caught:
        parse(Params, value, "params.yaml")
    assert str(caught.value) == f"params.yaml: {expected}"


def test_all_wrong_keys_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(Params, {"teachers": {}, "one": 1, "two": 2, "weights": "x"}, "params.yaml")
    message = str(caught.value)
    assert all(part in message for part in ("one: unknown key", "two: unknown key", "weights: expected a list"))


@pytest.mark.parametrize("value", [[], "teachers", None, 3])
def test_what_is_no_mapping_is_refused(value):
    with pytest.raises(ConfigError, match=r"^params\.yaml: expected a mapping \(found "):
        parse(Params, value, "params.yaml")


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"epochs": "3"}, 'epochs: expected a whole number (found "3")'),
        ({"epochs": True}, "epochs: expected a whole number (found true)"),
        ({"epochs": 3.0}, "epochs: expected a whole number (found 3.0)"),
        ({"epochs": None}, "epochs: expected a whole number (found null)"),
        ({"epochs": 3, "learning_rate": "0.1"}, 'learning_rate: expected a number (found "0.1")'),
        ({"epochs": 3, "learning_rate": True}, "learning_rate: expected a number (found true)"),
        (True, "expected a mapping (found true)"),
    ],
)
def test_nothing_passes_as_a_number_that_is_none(train, expected):
    with pytest.raises(ConfigError) as caught:
        parse(Params, {"teachers": {"big": {"model": NET, "train": train}}}, "p.yaml")
    assert str(caught.value) in (f"p.yaml: teachers.big.train.{expected}", f"p.yaml: teachers.big.train: {expected}")


def test_a_whole_number_may_stand_for_another(tmp_path):
    train = parse(Train, {"epochs": 3, "learning_rate": 1}, "p.yaml")
    assert (train.learning_rate, type(train.learning_rate)) == (1.0, float)


# Factories


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project's folder; its modules are forgotten afterwards."""
    (tmp_path / "cfg_nets.py").write_text(NETS)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "own.py").write_text("class Own:\n    made = 1\n")
    (tmp_path / "cfg_needs.py").write_text("import cfg_package_that_is_not_installed\n")
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


NETS = """
from __future__ import annotations
import typing
from collections.abc import Sequence
from pathlib import Path
if typing.TYPE_CHECKING:
    from nowhere import Thing

WIDTH = 3
lower = str.lower  # a callable without a module of its own

class Net:
    def __init__(self, width: int, depth: int = 2, *, sizes: Sequence[float] = (), num_classes: int = 0):
        self.width, self.depth, self.sizes, self.num_classes = width, depth, sizes, num_classes

class Plain:
    pass

class Loose:
    def __init__(self, width, **others):
        self.width, self.others = width, others

def build(file: Path, layers: list[int] | None = None, net: Thing = None, flag: bool = False):
    return file, layers, net, flag

def _private():
    pass
"""


def factory(path="cfg_nets:Net", **arguments):
    return Factory(path=path, arguments=arguments)


def test_a_factory_of_a_project_module_is_made_with_its_arguments(root):
    net = bind(factory(width=3, sizes=[1, 2]), root, "student.model").make()
    assert (net.width, net.depth, list(net.sizes), net.num_classes) == (3, 2, [1.0, 2.0], 0)


def test_binding_calls_nothing(root):
    (root / "cfg_calls.py").write_text("def build():\n    raise RuntimeError('called')\n")
    bound = bind(factory("cfg_calls:build"), root, "student.model")
    with pytest.raises(ConfigError, match=r"^student\.model: cfg_calls:build fails: RuntimeError: called$"):
        bound.make()


def test_an_error_of_kdpipes_own_is_passed_on(root):
    source = "from kdpipe.errors import DataError\ndef build():\n    raise DataError('no rows')\n"
    (root / "cfg_refuses.py").write_text(source)
    with pytest.raises(DataError, match=r"^no rows$"):
        bind(factory("cfg_refuses:build"), root, "student.model").make()


def test_offered_values_are_taken_where_the_signature_names_them_and_params_do_not(root):
    assert bind(factory(width=1), root, "m", num_classes=10, input_shape=(3,)).make().num_classes == 10
    assert bind(factory(width=1, num_classes=4), root, "m", num_classes=10).make().num_classes == 4
    plain = bind(factory("cfg_nets:Plain"), root, "m", num_classes=10)
    assert plain == Bound("m: cfg_nets:Plain", resolve("cfg_nets:Plain", root, "m"), {})
    assert bind(factory("cfg_nets:Loose", width=1), root, "m", root=root, where=3).make().others == {}
    loose = bind(factory("cfg_nets:Loose", width=1, colour="red"), root, "m", num_classes=10).make()
    assert (loose.width, loose.others) == (1, {"colour": "red"})


def test_arguments_become_what_the_annotation_says(root):
    (root / "cfg_typed.py").write_text(
        "from pathlib import Path\ndef build(file: Path, pair: tuple[int, int]): return file, pair"
    )
    assert bind(factory("cfg_typed:build", file="a/b", pair=[1, 2]), root, "m").make() == (root / "a/b", (1, 2))
    assert bind(factory(width=7, sizes=[1, 2]), root, "m").arguments == {"width": 7, "sizes": [1.0, 2.0]}


def test_annotations_that_name_nothing_check_nothing(root):
    assert bind(factory("cfg_nets:build", file="a/b", flag="x"), root, "m").make() == ("a/b", None, None, "x")


def test_a_class_that_pydantic_does_not_know_is_passed_on(root):
    (root / "cfg_unknown.py").write_text("class Thing: ...\ndef build(thing: Thing, width: int): return thing\n")
    assert bind(factory("cfg_unknown:build", thing=[1], width=1), root, "m").make() == [1]
    with pytest.raises(ConfigError, match=r"m\.width: "):
        bind(factory("cfg_unknown:build", thing=[1], width="x"), root, "m")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (
            factory(width=1, with_bias=True),
            "m.with_bias: cfg_nets:Net does not take it; it takes width, depth, sizes, num_classes",
        ),
        (factory("cfg_nets:Plain", width=1), "m.width: cfg_nets:Plain does not take it; it takes nothing"),
        (factory(depth=1), "m.width: missing; cfg_nets:Net needs it"),
        (factory("cfg_nets:Loose", others=1), "m.width: missing; cfg_nets:Loose needs it"),
        (factory(width="wide"), "m.width: expected a whole number (found "),
        (factory(width=2.5), "m.width: expected a whole number (found "),
        (factory(width=None), "m.width: expected a whole number (found "),
        (factory(width="7"), 'm.width: expected a whole number (found "7")'),
        (factory(width=True), "m.width: expected a whole number (found true)"),
        (factory(width=1, sizes=["a"]), 'm.sizes.0: expected a number (found "a")'),
        (factory(width=1, sizes="12"), 'm.sizes: expected a list (found "12")'),
        (
            factory(wdith=1),
            "m.wdith: cfg_nets:Net does not take it; it takes width, depth, sizes, num_classes; did you",
        ),
        (factory("cfg_nets:Nett"), "m: cfg_nets has no 'Nett'; it has Loose, Net, Plain, build"),
        (factory("cfg_nets:WIDTH"), "m: cfg_nets has no 'WIDTH'; it has Loose, Net, Plain, build"),
        (factory("cfg_nest:Net"), "m: there is no module 'cfg_nest' (sought beside params.yaml and installed)"),
        (
            factory("cfg_absent.models:net"),
            "m: cfg_absent.models needs the package 'cfg_absent', which is neither installed nor beside params.yaml. "
            "Install it, or correct the name",
        ),
        (factory("cfg_nets.deeper:Net"), "m: there is no module 'cfg_nets.deeper'"),
        (factory("kdpipe.modles.mlp:MLP"), "m: there is no module 'kdpipe.modles.mlp'"),
        (factory("cfg_needs:Net"), "m: cfg_needs needs the package 'cfg_package_that_is_not_installed'"),
        (factory("models/absent.py:Own"), "m: there is no file "),
        (factory("models/own.py:Other"), "m: models/own.py has no 'Other'; it has Own"),
        (factory("cfg_nets"), 'm: \'cfg_nets\' is no factory; expected "package.module:Name" or "file.py:Name"'),
        (factory("cfg_nets:"), "m: 'cfg_nets:' is no factory"),
        (factory(":Net"), "m: ':Net' is no factory"),
    ],
    ids=lambda each: each.path if isinstance(each, Factory) else "",
)
def test_a_factory_that_does_not_bind_names_the_key_and_the_choices(root, chosen, expected):
    with pytest.raises(ConfigError) as caught:
        bind(chosen, root, "m")
    assert str(caught.value).startswith(expected)


def test_the_guess_at_an_unknown_key_is_among_those_that_are_named(root):
    expected = "it takes nothing beside factory, output; did you mean 'output'?"
    with pytest.raises(ConfigError, match=rf"m\.outptu: .*; {re.escape(expected)}$"):
        bind(factory("cfg_nets:Plain", outptu="hidden"), root, "m", ("factory", "output"))


def test_a_factory_may_stand_in_a_file_beside_params_yaml(root):
    own = resolve("models/own.py:Own", root, "m")
    assert own.made == 1
    assert resolve("models/own.py:Own", root, "m") is own
    assert resolve(f"{root}/models/own.py:Own", Path("/"), "m") is own


def test_an_edited_file_is_another_module(root):
    before = resolve("models/own.py:Own", root, "m")
    (root / "models" / "own.py").write_text("class Own:\n    made = 2\n")
    assert (resolve("models/own.py:Own", root, "m").made, before.made) == (2, 1)


def test_the_same_file_elsewhere_is_another_module(root):
    (root / "copies").mkdir()
    (root / "copies" / "own.py").write_bytes((root / "models" / "own.py").read_bytes())
    assert resolve("copies/own.py:Own", root, "m") is not resolve("models/own.py:Own", root, "m")


def test_a_file_may_import_its_neighbours_beside_params_yaml(root):
    (root / "models" / "user.py").write_text("import cfg_nets\nclass User(cfg_nets.Net):\n    pass\n")
    assert bind(factory("models/user.py:User", width=4), root, "m").make().width == 4


def test_a_file_that_fails_is_tried_again(root):
    path = root / "models" / "failing.py"
    path.write_text(
        "import sys\nif not hasattr(sys, 'cfg_ready'):\n    raise RuntimeError('not ready')\ndef net(): ...\n"
    )
    with pytest.raises(ConfigError, match="cannot be imported: RuntimeError: not ready"):
        resolve("models/failing.py:net", root, "m")
    sys.cfg_ready = True
    try:
        assert callable(resolve("models/failing.py:net", root, "m"))
    finally:
        del sys.cfg_ready


def test_a_factory_of_kdpipe_gets_what_params_yaml_says(root):
    bound = bind(factory("kdpipe.tasks.image:ImageClassification", num_classes=10, shape=[8, 8, 1]), root, "task")
    assert bound.arguments == {"num_classes": 10, "shape": (8, 8, 1)}
    with pytest.raises(ConfigError, match=r"^task\.shape\.2: missing \(found \[8, 8\]\)$"):
        bind(factory("kdpipe.tasks.image:ImageClassification", num_classes=10, shape=[8, 8]), root, "task")


def test_a_package_that_is_absent_is_named_with_the_extra_that_brings_it(monkeypatch, root):
    assert package("json", "none") is __import__("json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs the package tokenizers: pip install 'kdpipe\[text\]'"):
        package("tokenizers", "text")
    (root / "cfg_wants.py").write_text("import cfg_nothing")
    monkeypatch.syspath_prepend(root)
    with pytest.raises(ModuleNotFoundError, match="cfg_nothing"):
        package("cfg_wants", "text")
