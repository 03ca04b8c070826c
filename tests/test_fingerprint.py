from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdpipe
from kdpipe.config import resolve
from kdpipe.fingerprint import (
    brief,
    canonical_json,
    digest,
    digest_file,
    digest_path,
    files_in,
    source_digests,
    uniform_by_id,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)

# Values and files


@given(JSON)
def test_canonical_json_keeps_the_value(value):
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), JSON, min_size=2), st.randoms())
def test_the_order_of_keys_is_no_matter(value, random):
    keys = list(value)
    random.shuffle(keys)
    assert canonical_json({key: value[key] for key in keys}) == canonical_json(value)


@given(JSON, JSON)
def test_digests_are_equal_where_the_texts_are(first, second):
    assert (digest(first) == digest(second)) == (canonical_json(first) == canonical_json(second))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", float("nan"), [float("inf")], {"a": np.float32(1)}])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        digest(value)


def test_a_digest_is_the_sha256_of_the_text(tmp_path):
    (tmp_path / "file").write_bytes(b'{"a":[1,"\xc3\xa9"]}')
    expected = hashlib.sha256(b'{"a":[1,"\xc3\xa9"]}').hexdigest()
    assert digest({"a": [1, "é"]}) == digest_file(tmp_path / "file") == expected


# Draws by id

IDS = st.lists(st.text(max_size=8), unique=True, min_size=1, max_size=30)


@given(IDS, st.integers(0, 2**40), st.data())
def test_a_draw_depends_on_its_id_only(ids, seed, data):
    """Under any growth and any order."""
    some = data.draw(st.lists(st.sampled_from(ids)))
    drawn = dict(zip(ids, uniform_by_id(ids, seed, "split"), strict=True))
    assert uniform_by_id(some, seed, "split").tolist() == [drawn[each] for each in some]
    assert all(0 <= each < 1 for each in drawn.values())


def test_draws_are_uniform_and_independent_between_seeds_and_purposes():
    ids = [f"row {i}" for i in range(4000)]
    draws = [uniform_by_id(ids, seed, purpose) for seed in (0, 1) for purpose in ("split", "labelled")]
    for each in draws:
        counts, _ = np.histogram(each, bins=10, range=(0, 1))
        assert (abs(counts - 400) < 100).all()
    correlations = np.corrcoef(draws)[np.triu_indices(4, 1)]
    assert (abs(correlations) < 0.06).all()


def test_draws_are_the_same_in_every_version():
    """Splits of prepared data hang on them."""
    assert uniform_by_id(["a", "é"], 0, "split").tolist() == [0.024039897679702188, 0.3865173567065998]


# The code that a factory reaches


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder on `sys.path` whose modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "") or sys.modules[name]):
            del sys.modules[name]


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    importlib.invalidate_caches()


FILES = {
    "fp_net.py": """
import json
import numpy
import rich
from fp_plain import fp_other
from fp_pack import part
from fp_pack.deep import inner as renamed
import fp_loose.spaced

class Net:
    def forward(self):
        import fp_lazy
        from fp_lazy_pack.member import value
        return fp_lazy, value, importlib.import_module("fp_named"), import_module("." + "x"), __import__("fp_dunder")

    def backward(self):
        from importlib import import_module as load

        return load("fp_alias"), importlib.import_module(name="fp_keyword"), json.dumps("fp_text")
""",
    "fp_plain.py": "fp_other = 1\ntry:\n    import fp_not_there\nexcept ImportError:\n    pass\n",
    "fp_pack/__init__.py": "from .from_init import something\n",
    "fp_pack/from_init.py": "from . import part\nsomething = lambda: import_module('.by_name', __package__)\n",
    "fp_pack/by_name.py": "",
    "fp_pack/part.py": "from . import sibling\nfrom .sibling import name\n",
    "fp_pack/sibling.py": "name = 1\n",
    "fp_pack/deep/__init__.py": "",
    "fp_pack/deep/inner.py": "from ..deep.beside import thing\nfrom ..uncle import uncle\n",
    "fp_pack/deep/beside.py": "thing = 1\n",
    "fp_pack/uncle.py": "uncle = 1\n",
    "fp_loose/spaced.py": "import fp_net\n",
    "fp_lazy.py": "from fp_star import *\nraise RuntimeError('imported while its digest was taken')\n",
    "fp_lazy_pack/__init__.py": "raise RuntimeError('imported while its digest was taken')\n",
    "fp_lazy_pack/member.py": "import fp_behind_lazy\nvalue = 1\n",
    "fp_behind_lazy.py": "",
    "fp_named.py": "lambda: (import_module('.relative_to_nothing'), import_module('.within', 'fp_pack'))\n",
    "fp_pack/within.py": "lambda: (import_module('...beyond', 'fp_pack'), __import__('fp_broken'))\n",
    "fp_broken.py": "def :\n",
    "fp_dunder.py": "",
    "fp_alias.py": "",
    "fp_keyword.py": "",
    "fp_star/__init__.py": "__all__ = ['fp_first', 'not_there'] + ['later']\n__all__ += ['added']\n",
    "fp_star/fp_first.py": "",
    "fp_star/later.py": "",
    "fp_star/added.py": "",
}
BESIDE = {"fp_star/other.py": "", "fp_text.py": "", "fp_other.py": "", "fp_pack/other.py": "", "fp_net.txt": ""}


def test_every_reached_module_has_its_own_digest(project):
    write(project, FILES | BESIDE)
    found = source_digests(importlib.import_module("fp_net").Net)
    expected = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): digest_file(project / name)
        for name in FILES
    }
    assert found == expected | {"rich": importlib.metadata.version("rich")}


@pytest.mark.parametrize("edited", FILES | BESIDE)
def test_an_edit_shows_where_the_module_is_reached(project, edited):
    write(project, FILES | BESIDE)
    net = importlib.import_module("fp_net").Net
    before = source_digests(net)
    with (project / edited).open("a") as file:
        file.write("# edited\n")
    after = source_digests(net)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    name = edited.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert changed == ({name} if edited in FILES else set())


def test_lazy_modules_are_followed_without_being_imported(project):
    write(project, FILES)
    source_digests(importlib.import_module("fp_net").Net)
    assert not {"fp_lazy", "fp_lazy_pack", "fp_lazy_pack.member", "fp_behind_lazy"} & set(sys.modules)


def test_a_module_of_the_project_may_take_the_name_of_one_of_the_standard_library(project):
    """`this` is not imported by anybody, so that the project's is found first."""
    write(project, {"fp_shadow.py": "import json\nimport sys\ndef f():\n    import this\n", "this.py": "a = 1\n"})
    shadow = importlib.import_module("fp_shadow")
    assert set(source_digests(shadow.f)) == {"fp_shadow", "this"}


def test_a_module_of_the_project_may_be_called_as_one_of_the_standard_library(project):
    write(project, {"fp_std/__init__.py": "", "fp_std/net.py": "from .json import a\n", "fp_std/json.py": "a = 1\n"})
    net = importlib.import_module("fp_std.net")
    net.Net = type("Net", (), {"__module__": "fp_std.net"})
    assert set(source_digests(net.Net)) == {"fp_std", "fp_std.net", "fp_std.json"}


def test_a_factory_in_a_file_reaches_modules_beside_it(project):
    write(project, {"fp_file.py": "from fp_size import WIDTH\ndef net(): ...\n", "fp_size.py": "WIDTH = 3\n"})
    found = source_digests(resolve("fp_file.py:net", project, "model"))
    assert digest_file(project / "fp_file.py") in found.values()
    assert found["fp_size"] == digest_file(project / "fp_size.py")
    assert len(found) == 2


def test_a_factory_in_a_file_has_the_same_digests_wherever_the_project_lies(project):
    found = []
    for name in ("here", "there"):
        write(project / name, {"fp_moved.py": "def net(): ...\n"})
        found.append(source_digests(resolve("fp_moved.py:net", project / name, "model")))
    assert found[0] == found[1]


def test_a_factory_in_a_file_may_be_called_as_a_module_that_it_reaches(project):
    write(project, {"fp_same.py": "WIDTH = 3\n", "fp_nets/fp_same.py": "from fp_same import WIDTH\ndef net(): ...\n"})
    found = source_digests(resolve("fp_nets/fp_same.py:net", project, "model"))
    expected = [digest_file(project / name) for name in ("fp_same.py", "fp_nets/fp_same.py")]
    assert sorted(found.values()) == sorted(expected)


def test_kdpipe_and_installed_packages_count_by_version(project):
    import torch

    from kdpipe.models.mlp import MLP

    assert source_digests(MLP) == {"kdpipe": kdpipe.__version__}
    assert source_digests(torch.nn.Linear) == {}, "torch's version is recorded elsewhere"
    write(project, {"fp_uses.py": "import torch.nn\nfrom PIL import Image\nimport kdpipe.views\nclass Net: ...\n"})
    found = source_digests(importlib.import_module("fp_uses").Net)
    assert found == {
        "fp_uses": digest_file(project / "fp_uses.py"),
        "PIL": f"pillow {importlib.metadata.version('pillow')}",
        "kdpipe": kdpipe.__version__,
    }


def test_a_version_does_not_depend_on_what_was_imported_before(project):
    """scikit-learn's distribution has another name than its package."""
    write(project, {"fp_sk.py": "def net():\n    import sklearn.linear_model\n    return sklearn\n"})
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from fp_sk import net
from kdpipe.fingerprint import source_digests
before = source_digests(net)
assert "sklearn" not in sys.modules
net()
assert source_digests(net) == before
print(before["sklearn"])
"""
    done = subprocess.run([sys.executable, "-c", script, project], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"scikit-learn {importlib.metadata.version('scikit-learn')}"


def test_a_folders_digest_is_of_names_and_bytes(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_text("1")
    (tmp_path / "sub" / "b").write_text("2")
    before = digest_path(tmp_path)
    assert digest_path(tmp_path / "a") == digest_file(tmp_path / "a")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "note").write_text("hidden")
    for name in ("README.md", "training_args.bin", "sub/runs/events", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("how the model came to be")
    assert digest_path(tmp_path) == before
    (tmp_path / "sub" / "b").rename(tmp_path / "sub" / "c")
    renamed = digest_path(tmp_path)
    (tmp_path / "sub" / "c").write_text("3")
    assert len({before, renamed, digest_path(tmp_path)}) == 3


def test_a_folders_files_are_those_of_folders_that_are_links_too(tmp_path):
    model, hub = tmp_path / "model", tmp_path / "hub"
    (hub / "deep").mkdir(parents=True)
    (hub / "deep" / "a").write_text("1")
    model.mkdir()
    (model / "inner").symlink_to(hub)
    (hub / "deep" / "around").symlink_to(hub)
    (model / "around").symlink_to(tmp_path)
    for name in ("this", "that"):
        (model / name).mkdir()
        (model / name / "other").symlink_to(model / {"this": "that", "that": "this"}[name])
        (model / name / name).write_text(name)
    own = ["that/other/this", "that/that", "this/other/that", "this/this"]
    assert files_in(model) == ["inner/deep/a", *own]
    assert files_in(tmp_path / "absent") == []
    before = digest_path(model)
    (hub / "deep" / "a").write_text("2")
    assert digest_path(model) != before


def test_a_long_state_is_told_by_its_digest():
    state = {"mean": [0.5], "vocabulary": {str(number): number for number in range(2000)}}
    assert brief(state) == {"mean": [0.5], "vocabulary": f"sha256:{digest(state['vocabulary'])}"}
