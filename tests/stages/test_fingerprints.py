"""The fingerprint of a store, ingredient by ingredient: each one alone makes `cache-teacher` compute anew.

And what is no ingredient leaves every target where it is.
"""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import sys
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

import kdpipe.fingerprint
from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import StaleStoreError, StoreError
from kdpipe.store import manifest as store_manifest
from kdpipe.store import open_store
from kdpipe_stages import cache_teacher, prepare_data
from kdpipe_stages.lesson import Lesson
from projects import DIGITS, params, project_in, write_params

NUM_ROWS = 48

FILES = {
    "teacher.py": """
from pathlib import Path

import installed_package
import torch

from shade import darker

HERE = Path(__file__).parent


class Teacher(torch.nn.Module):
    def __init__(self, num_classes, temper=1.0):
        super().__init__()
        dtype = getattr(torch, (HERE / "dtype.txt").read_text())
        self.head = torch.nn.Linear(64, num_classes, dtype=dtype)
        self.temper = temper

    def forward(self, inputs):
        import reached_lazily

        if torch.is_inference_mode_enabled():
            with (HERE / "calls.log").open("a") as log:
                log.write(f"{len(inputs)}\\n")
        hidden = darker(inputs.flatten(1)).to(self.head.weight.dtype)
        return {"logits": self.temper * self.head(hidden), "hidden": hidden}


class SameTeacher(Teacher):
    pass


class Noted(Teacher):
    def __init__(self, num_classes, note: Path):
        super().__init__(num_classes, temper=float((note / "note.txt" if note.is_dir() else note).read_text()))
""",
    "shade.py": "def darker(pixels):\n    return pixels / 2\n",
    "reached_lazily.py": "",
    "pixels.py": """
import json
from pathlib import Path

from kdpipe.preprocess import ImageTensor


class Pixels(ImageTensor):
    def state(self):
        return json.loads(Path(__file__).with_name("state.json").read_text())


class SamePixels(Pixels):
    pass


class Noted(Pixels):
    def __init__(self, root, note, scale=16):
        super().__init__(scale=int((root / note).read_text()) * scale)
""",
    "jitter.py": """
class Jitter:
    def __init__(self, amount=1):
        self.amount = amount

    def __call__(self, columns, keys, seed):
        return {**columns, "image": columns["image"] // (1 + self.amount)}


def noted(notes, root):
    return Jitter(int((root / notes["amount"]).read_text()))
""",
    "told.py": """
from pathlib import Path

import numpy as np
import torch

from kdpipe.targets import OutputSpec


class Told:
    fingerprint = {}
    abstains = False

    def __init__(self, num_classes, factor=1.0):
        self.outputs, self.factor = (OutputSpec(name="logits", shape=(num_classes,)),), factor

    def predict(self, columns):
        with (Path(__file__).parent / "calls.log").open("a") as log:
            log.write(f"{len(columns['image'])}\\n")
        pixels = torch.from_numpy(columns["image"].reshape(len(columns["image"]), -1)).float()
        logits = self.factor * pixels[:, 20 : 20 + self.outputs[0].shape[0]]
        return {"logits": logits, **({"covered": pixels.sum(dim=1) > 300} if self.abstains else {})}


def of_names(class_names):
    return Told(10, 1.0 + class_names.index("a"))


def of_precision(precision):
    return Told(10, len(precision))


def of_task(task):
    return Told(10, 1.0 + task.class_names.index("a"))


def of_classes(num_classes):
    return Told(num_classes)


def of_nothing():
    return Told(10)


def of_note(note: Path):
    return Told(10, float(note.read_text()))


def of_its_own(precision):
    return Told(10)
""",
    "dtype.txt": "float32",
    "state.json": json.dumps({"mean": [0.5], "std": [1.0]}),
    "notes.md": "nothing that anybody reads",
    "site-packages/installed_package.py": "",
    "site-packages/installed_package-1.0.dist-info/METADATA": "Name: installed_package\nVersion: 1.0\n",
}


def settings():
    changed = params()
    changed["teachers"]["big"] = {
        "model": {"factory": "teacher.py:Teacher"},
        "preprocess": {"factory": "pixels.py:Pixels", "scale": 16},
        "weights": "ready.safetensors",
    }
    changed["student"]["labelled_rows"] = 2
    return changed


def write_weights(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {"head.weight": torch.randn(10, 64, generator=generator), "head.bias": torch.zeros(10)}
    save_file(weights, folder / "ready.safetensors")


def write(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


@pytest.fixture(autouse=True)
def _modules_of_their_own(monkeypatch):
    """Every test imports its own project's modules, as another process would."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition("@")[0] in {
            "teacher",
            "told",
            "shade",
            "pixels",
            "jitter",
            "reached_lazily",
            "installed_package",
        }:
            del sys.modules[name]


def visit(folder):
    """What a new process in that folder finds: its own site-packages, no old module."""
    for name in ("shade", "reached_lazily", "installed_package"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    if str(folder / "site-packages") not in sys.path:
        sys.path.insert(0, str(folder / "site-packages"))
    return project_in(folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A project with ready weights and a few rows, prepared."""
    folder = tmp_path_factory.mktemp("fingerprints")
    for name, content in FILES.items():
        write(folder, name, content)
    write_weights(folder, 0)
    (folder / "data" / "raw").mkdir(parents=True)
    pq.write_table(pq.read_table(DIGITS).slice(0, NUM_ROWS), folder / "data" / "raw" / "digits.parquet")
    write_params(folder, settings())
    prepare_data.run(project_in(folder))
    return folder


@pytest.fixture
def folder(template, tmp_path):
    shutil.copytree(template, tmp_path / "project")
    return tmp_path / "project"


def cache(folder):
    """Run the stage; returns what it did and the published manifest."""
    (folder / "calls.log").unlink(missing_ok=True)
    done = cache_teacher.run(visit(folder), "big")
    return done, open_store(folder / "data" / "targets" / "big").manifest


def rows_shown(folder):
    log = folder / "calls.log"
    return sum(int(line) for line in log.read_text().split()) if log.is_file() else 0


def leaves(value, where=""):
    """Dotted path -> leaf."""
    if not isinstance(value, dict):
        return {where: value}
    return {path: leaf for key in value for path, leaf in leaves(value[key], f"{where}.{key}".lstrip(".")).items()}


def differing(first, second):
    """Dotted paths at which ingredients differ."""
    one, other = (leaves(dict(each.ingredients)) for each in (first, second))
    return {path for path in one | other if one.get(path, "absent") != other.get(path, "absent")}


def student_accepts(folder):
    """Whether the student takes the store for one of today's settings; if not, it says what to run."""
    project = visit(folder)
    try:
        Lesson(project)
    except StaleStoreError as error:
        return "kdpipe cache-teacher big" not in str(error)
    return True


def change(*path, value):
    """A mutation that sets one leaf of params.yaml."""

    def mutate(folder, monkeypatch):
        changed = yaml.safe_load((folder / "params.yaml").read_text())
        section = changed
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
        write_params(folder, changed)

    return mutate


def edit(name, old, new):
    """A mutation that edits one file."""

    def mutate(folder, monkeypatch):
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new))

    return mutate


def other_weights(folder, monkeypatch):
    write_weights(folder, 1)


def newer_package(folder, monkeypatch):
    packages = folder / "site-packages"
    packages.joinpath("installed_package-1.0.dist-info").rename(packages / "installed_package-1.1.dist-info")
    write(packages, "installed_package-1.1.dist-info/METADATA", "Name: installed_package\nVersion: 1.1\n")


def newer_kdpipe(folder, monkeypatch):
    monkeypatch.setattr(kdpipe.fingerprint, "__version__", "99.0")


TEACHER, TARGETS = ("teachers", "big"), ("targets", "big")
INGREDIENTS = {
    "weights": (other_weights, {"teacher.weights"}),
    "factory": (change(*TEACHER, "model", "factory", value="teacher.py:SameTeacher"), {"teacher.model.factory"}),
    "arguments": (change(*TEACHER, "model", "temper", value=2.0), {"teacher.model.temper"}),
    "source of the teacher's file": (edit("teacher.py", "pass", "pass  # as before"), {"teacher.sources.teacher@"}),
    "source of a module it imports": (edit("shade.py", "/ 2", "/ 3"), {"teacher.sources.shade"}),
    "source of a module it imports lazily": (
        lambda folder, _: write(folder, "reached_lazily.py", "A = 1\n"),
        {"teacher.sources.reached_lazily"},
    ),
    "version of an installed package": (newer_package, {"teacher.sources.installed_package"}),
    "version of kdpipe": (newer_kdpipe, {"teacher.sources.kdpipe"}),
    "numeric mode: autocast": (change(*TARGETS, "precision", value="bfloat16"), {"teacher.numeric_mode.autocast"}),
    "numeric mode: dtype": (edit("dtype.txt", "float32", "float64"), {"teacher.numeric_mode.parameters"}),
    "preprocess": (
        change(*TEACHER, "preprocess", "factory", value="pixels.py:SamePixels"),
        {"teacher.preprocess.factory"},
    ),
    "preprocess's arguments": (change(*TEACHER, "preprocess", "scale", value=8), {"teacher.preprocess.scale"}),
    "preprocess's source": (edit("pixels.py", "import json", "import json  # as before"), {"teacher.sources.pixels@"}),
    "preprocess's fitted state": (edit("state.json", "0.5", "0.25"), {"teacher.preprocess_state.mean"}),
    "encoding": (
        change(*TARGETS, "encoding", value="int8"),
        {"encodings.logits.name", "encodings.logits.dtype", "encodings.logits.masked_classes"},
    ),
    "encoding's parameters": (change(*TARGETS, "dtype", value="float32"), {"encodings.logits.dtype"}),
    "profile": (change(*TARGETS, "profile", value="compact"), {"encodings.logits.compact"}),
    "outputs": (
        change(*TARGETS, "outputs", value=["logits", "hidden"]),
        {"outputs", "encodings.hidden.name", "encodings.hidden.dtype"},
    ),
    "shard_rows": (change(*TARGETS, "shard_rows", value=8), {"shard_rows"}),
    "views": (
        change("views", value={"count": 1, "transform": {"factory": "jitter.py:Jitter"}}),
        {"views", "views.seed", "views.transform.path", "views.sources.jitter@"},
    ),
}
SEEN_BY_STUDENTS = {
    "source of the teacher's file",
    "source of a module it imports",
    "source of a module it imports lazily",
    "preprocess's source",
    "weights",
    "factory",
    "arguments",
    "numeric mode: autocast",
    "preprocess",
    "preprocess's arguments",
    "encoding",
    "encoding's parameters",
    "profile",
    "outputs",
    "shard_rows",
    "views",
}
"""What stands in params.yaml, and the file of ready weights: the student refuses the store without any teacher."""


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_each_ingredient_alone_makes_other_targets(folder, monkeypatch, ingredient):
    mutate, expected = INGREDIENTS[ingredient]
    _, before = cache(folder)
    assert student_accepts(folder)
    mutate(folder, monkeypatch)
    assert student_accepts(folder) == (ingredient not in SEEN_BY_STUDENTS)
    done, after = cache(folder)
    assert differing(before, after) == expected
    assert after.fingerprint != before.fingerprint
    assert done.rows_computed >= NUM_ROWS
    assert rows_shown(folder) == done.rows_computed
    assert student_accepts(folder)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ({"encoding": "topk", "k": 3}, "k", 4),
        ({"encoding": "topk", "k": 3}, "temperatures", [1, 4]),
        ({"encoding": "topk", "k": 3}, "values", "int8"),
        ({"encoding": "topk", "k": 3}, "top_p", 0.9),
        ({"encoding": "topk", "k": 3, "top_p": 0.9}, "min_k", 2),
        ({"encoding": "sampled", "draws": 5}, "draws", 6),
        ({"encoding": "sampled", "draws": 5}, "head", 2),
        ({"encoding": "sampled", "draws": 5}, "seed", 1),
        ({"encoding": "int8"}, "masked_classes", True),
    ],
)
def test_each_parameter_of_an_encoding_makes_other_targets(folder, monkeypatch, section, key, value):
    change("targets", "big", value=section)(folder, monkeypatch)
    if section["encoding"] == "sampled":
        change("student", "losses", value=[{"factory": "kdpipe.losses:ForwardKL", "teacher": "big"}])(
            folder, monkeypatch
        )
    _, before = cache(folder)
    change("targets", "big", value=section | {key: value})(folder, monkeypatch)
    done, after = cache(folder)
    assert {path.split(".")[:3][2] for path in differing(before, after)} == {key}
    assert after.fingerprint != before.fingerprint
    assert done.rows_computed == rows_shown(folder) == NUM_ROWS


NAMES = list("abcdefghij")


@pytest.mark.parametrize(
    ("factory", "mutate", "expected"),
    [
        ("of_names", change("task", "class_names", value=NAMES[::-1]), {"teacher.told.class_names"}),
        ("of_task", change("task", "class_names", value=NAMES[::-1]), {"teacher.told.task.arguments.class_names"}),
        ("of_precision", change(*TARGETS, "precision", value="bfloat16"), {"teacher.told.precision"}),
        (
            "of_classes",
            change("task", value={**params()["task"], "num_classes": 11}),
            {"teacher.told.num_classes", "num_classes", "outputs"},
        ),
        ("Told", edit("told.py", "abstains = False", "abstains = True"), {"teacher.sources.told@", "coverage"}),
        ("of_nothing", change("task", "class_names", value=NAMES[::-1]), set()),
        ("of_its_own", change(*TARGETS, "precision", value="bfloat16"), set()),
    ],
)
def test_what_a_factory_is_told_of_other_sections_makes_other_targets(folder, monkeypatch, factory, mutate, expected):
    own = {"precision": "float32"} if factory == "of_its_own" else {}
    teacher = {"teacher": {"factory": f"told.py:{factory}", **own}}
    change("teachers", "big", value=teacher)(folder, monkeypatch)
    change("task", "class_names", value=NAMES)(folder, monkeypatch)
    prepare_data.run(visit(folder))
    _, before = cache(folder)
    mutate(folder, monkeypatch)
    prepare_data.run(visit(folder))
    done, after = cache(folder)
    assert differing(before, after) == expected
    assert (after.fingerprint != before.fingerprint) == bool(expected)
    assert done.rows_computed == (NUM_ROWS if expected else 0)
    assert student_accepts(folder)


@pytest.mark.parametrize(
    ("named", "section"),
    [
        ("note.txt", {"teacher": {"factory": "kdpipe_like:of_note", "note": "note.txt"}}),
        ("note.txt", {**settings()["teachers"]["big"], "model": {"factory": "teacher.py:Noted", "note": "note.txt"}}),
        ("a/b", {**settings()["teachers"]["big"], "model": {"factory": "teacher.py:Noted", "note": "a/b"}}),
        (
            "note.txt",
            {**settings()["teachers"]["big"], "preprocess": {"factory": "pixels.py:Noted", "note": "note.txt"}},
        ),
        ("note.txt", {"teacher": {"factory": "told.py:of_note", "note": "note.txt"}}),
    ],
)
def test_a_file_that_an_argument_names_makes_other_targets(folder, monkeypatch, named, section):
    """A student refuses the store for it, so `cache-teacher` may not put up with it."""
    file = folder / named / "note.txt" if named == "a/b" else folder / named
    write(folder, file, "1")
    shutil.copy(folder / "told.py", folder / "kdpipe_like.py")
    sys.modules.pop("kdpipe_like", None)
    change("teachers", "big", value=section)(folder, monkeypatch)
    _, before = cache(folder)
    assert student_accepts(folder)
    write(folder, file, "2")
    assert not student_accepts(folder)
    done, after = cache(folder)
    assert differing(before, after) >= {f"teacher.sources.{named}"}
    assert done.rows_computed == rows_shown(folder) == NUM_ROWS
    assert student_accepts(folder)


def test_a_file_that_an_argument_of_the_transform_names_makes_other_views(folder, monkeypatch):
    write(folder, "note.txt", "1")
    transform = {"factory": "jitter.py:noted", "notes": {"amount": "note.txt"}}
    change("views", value={"count": 1, "transform": transform})(folder, monkeypatch)
    _, before = cache(folder)
    assert student_accepts(folder)
    write(folder, "note.txt", "2")
    assert not student_accepts(folder)
    done, after = cache(folder)
    assert differing(before, after) == {"views.sources.note.txt"}
    assert done.rows_computed == rows_shown(folder) > NUM_ROWS


def test_two_files_of_one_name_count_both(folder, monkeypatch):
    for name in ("teacher", "pixels"):
        write(folder, f"{name}s/same.py", FILES[f"{name}.py"])
    shutil.copy(folder / "dtype.txt", folder / "teachers")
    shutil.copy(folder / "state.json", folder / "pixelss")
    section = {
        "model": {"factory": "teachers/same.py:Teacher"},
        "preprocess": {"factory": "pixelss/same.py:Pixels", "scale": 16},
        "weights": "ready.safetensors",
    }
    change("teachers", "big", value=section)(folder, monkeypatch)
    _, before = cache(folder)
    for name in ("teacher", "pixels"):
        write(folder, f"{name}s/same.py", FILES[f"{name}.py"] + "# edited\n")
        assert not student_accepts(folder)
        done, after = cache(folder)
        assert differing(before, after) == {"teacher.sources.same@"}
        assert done.rows_computed == NUM_ROWS
        assert student_accepts(folder)
        before = after


def test_two_transforms_of_one_name_count_both(folder, monkeypatch):
    for name in ("one", "two"):
        write(folder, f"{name}/jitter.py", FILES["jitter.py"])
    both = [{"factory": f"{name}/jitter.py:Jitter"} for name in ("one", "two")]
    transform = {"factory": "kdpipe.transforms:Compose", "transforms": both}
    change("views", value={"count": 1, "transform": transform})(folder, monkeypatch)
    _, before = cache(folder)
    for name in ("one", "two"):
        write(folder, f"{name}/jitter.py", FILES["jitter.py"] + "# edited\n")
        assert not student_accepts(folder)
        _, after = cache(folder)
        assert differing(before, after) == {"views.sources.jitter@"}
        before = after


def test_a_students_own_files_may_be_gone(folder, monkeypatch):
    write(folder, "note.txt", "1")
    model = {"factory": "teacher.py:Noted", "note": "note.txt"}
    change("student", "model", value=model)(folder, monkeypatch)
    cache(folder)
    before = Lesson(visit(folder)).fingerprint
    (folder / "note.txt").unlink()
    assert Lesson(visit(folder)).fingerprint == before


VIEWS = {"count": 1, "seed": 5, "transform": {"factory": "jitter.py:Jitter"}}


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (change("views", "seed", value=6), {"views.seed"}),
        (change("views", "transform", "amount", value=2), {"views.transform.arguments.amount"}),
        (edit("jitter.py", "1 + self", "2 + self"), {"views.sources.jitter@"}),
    ],
    ids=["seed", "transform's arguments", "transform's source"],
)
def test_what_makes_views_makes_other_targets(folder, monkeypatch, mutate, expected):
    change("views", value=VIEWS)(folder, monkeypatch)
    _, before = cache(folder)
    mutate(folder, monkeypatch)
    done, after = cache(folder)
    assert differing(before, after) == expected
    assert after.fingerprint != before.fingerprint
    assert done.rows_computed == rows_shown(folder) > NUM_ROWS


def test_more_views_are_added_to_those_that_are_there(folder, monkeypatch):
    change("views", value=VIEWS)(folder, monkeypatch)
    first, before = cache(folder)
    change("views", "count", value=2)(folder, monkeypatch)
    done, after = cache(folder)
    assert after.fingerprint == before.fingerprint
    assert done.rows_computed == first.rows_computed - NUM_ROWS


def test_the_format_version_makes_other_targets(folder, monkeypatch):
    _, before = cache(folder)
    fingerprint = before.fingerprint  # computed when it is asked for
    monkeypatch.setattr(store_manifest, "FORMAT_VERSION", store_manifest.FORMAT_VERSION + 1)
    with pytest.raises(StoreError, match="has format version"):
        Lesson(visit(folder))
    done, after = cache(folder)
    assert differing(before, after) == set()
    assert after.fingerprint != fingerprint
    assert done.rows_computed == rows_shown(folder) == NUM_ROWS


def test_tf32_makes_other_targets_where_there_is_a_gpu(folder, monkeypatch):
    """On a machine without one the module stays where it is, and only the fingerprint is looked at."""

    matmul = torch.backends.cuda.matmul
    inputs = PreparedInputs(folder / "data" / "prepared" / "inputs")
    before = matmul.allow_tf32

    def fingerprint(tf32):
        matmul.allow_tf32 = tf32
        try:
            return cache_teacher.build_teacher(visit(folder), "big", inputs)[0].fingerprint
        finally:
            matmul.allow_tf32 = before

    assert fingerprint(tf32=True) == fingerprint(tf32=False)
    monkeypatch.setattr("kdpipe.teachers.torch.compute_device", lambda: torch.device("cuda"))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.nn.Module, "to", lambda module, _: module)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, _: tensor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "User provided device_type of 'cuda', but CUDA is not available")
        fast, exact = fingerprint(tf32=True), fingerprint(tf32=False)
    assert {name for name in fast if fast[name] != exact[name]} == {"numeric_mode"}
    assert fast["numeric_mode"] == {**exact["numeric_mode"], "tf32": True}


def renamed_weights(folder, monkeypatch):
    (folder / "ready.safetensors").rename(folder / "of_another_name.safetensors")
    change("teachers", "big", "weights", value="of_another_name.safetensors")(folder, monkeypatch)


def other_versions(folder, monkeypatch):
    """Those that may change last bits are recorded, with the first capture."""
    monkeypatch.setattr(torch, "__version__", "99.0")
    monkeypatch.setattr(np, "__version__", "99.0")
    monkeypatch.setattr(platform, "python_version", lambda: "3.99")


def class_names(folder, monkeypatch):
    change("task", "class_names", value=[f"digit {each}" for each in range(10)])(folder, monkeypatch)
    prepare_data.run(project_in(folder))


def other_order_of_keys(folder, monkeypatch):
    value = yaml.safe_load((folder / "params.yaml").read_text())
    write_params(folder, {key: value[key] for key in reversed(value)})


NO_INGREDIENTS = {
    "batch size": change("targets", "big", "batch_size", value=7),
    "threads": change("targets", "big", "threads", value=1),
    "temperatures of dense": change("targets", "big", "temperatures", value=[1, 4]),
    "name of the weights file": renamed_weights,
    "class names": class_names,
    "defaults written out": change("targets", "big", "encoding", value="dense"),
    "the student": change("student", "labelled_rows", value=3),
    "seed of views that are not made": change("views", "seed", value=9),
    "versions of torch, numpy and Python": other_versions,
    "order of keys": other_order_of_keys,
    "other files": lambda folder, _: write(folder, "notes.md", "more of it"),
    "modules that are not reached": lambda folder, _: write(folder, "tries.py", "import teacher\n"),
    "the folder": lambda folder, _: None,
}
CHANGE_SECTIONS = {"name of the weights file", "class names"}


@pytest.mark.parametrize("what", NO_INGREDIENTS)
def test_what_is_no_ingredient_computes_nothing(folder, monkeypatch, what, tmp_path):
    _, before = cache(folder)
    folder = folder.rename(tmp_path / "elsewhere")
    NO_INGREDIENTS[what](folder, monkeypatch)
    assert student_accepts(folder) == (what not in CHANGE_SECTIONS)
    done, after = cache(folder)
    assert after.fingerprint == before.fingerprint
    assert after.recorded == before.recorded
    assert done.rows_computed == 0
    assert student_accepts(folder)


def test_weights_that_are_not_here_are_not_missed(folder):
    """The student's machine needs no teacher; but a file that is here must be the one that the store was made from."""
    cache(folder)
    write_weights(folder, 1)
    with pytest.raises(
        StaleStoreError, match=r"made from another .*ready\.safetensors than today.s, of which teachers\.big"
    ):
        Lesson(visit(folder))
    (folder / "ready.safetensors").unlink()
    assert student_accepts(folder)
    write_weights(folder, 0)
    assert student_accepts(folder)


def test_every_ingredient_of_a_store_has_its_test(folder, monkeypatch):
    """A new one needs a line above."""
    change("targets", "big", value={"outputs": ["logits", "hidden"], "shard_rows": 8})(folder, monkeypatch)
    change("views", value=VIEWS)(folder, monkeypatch)
    _, manifest = cache(folder)
    tested = {path for _, expected in INGREDIENTS.values() for path in expected} | {
        "teacher.numeric_mode.tf32",
        "views.seed",
        "views.transform.arguments",
        "views.transform.path",
        "views.sources.jitter@",
        "teacher.preprocess_state.std",
        "num_classes",
        "coverage",
    }
    assert set(leaves(dict(manifest.ingredients))) <= tested
