"""The house rules: what the wheel holds, what `--help` costs, what the README names."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import fields

import pytest
import yaml

from kdpipe_stages.params import TargetsSection
from projects import REPOSITORY

TEMPLATES = REPOSITORY / "stages" / "kdpipe_stages" / "templates" / "digits"
STAGES = {"prepare-data", "train-teacher", "cache-teacher", "train-student", "evaluate"}


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom kdpipe_stages.cli import run\nassert run(['--help']) == 0\nassert 'torch' not in sys.modules"
    )
    assert "cache-teacher" in python(code)


def test_importing_kdpipe_costs_nothing():
    assert python("import sys, kdpipe\nprint('torch' in sys.modules, 'numpy' in sys.modules)").split() == [
        "False",
        "False",
    ]


def test_the_wheel_holds_two_packages_and_the_templates(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", tmp_path, REPOSITORY]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"kdpipe", "kdpipe_stages"}
    assert {f"kdpipe_stages/templates/digits/{name}" for name in ("params.yaml", "dvc.yaml")} <= set(names)
    assert "kdpipe/py.typed" in names


def test_the_demos_files_are_the_repositorys():
    for name in ("params.yaml", "dvc.yaml"):
        assert (REPOSITORY / name).read_text() == (TEMPLATES / name).read_text()


def commands():
    from typer.main import get_command

    from kdpipe_stages.cli import app

    return get_command(app).commands


def test_every_command_has_help_and_stands_in_the_readme():
    readme = (REPOSITORY / "README.md").read_text()
    for name, command in commands().items():
        assert command.help, name
        assert f"`kdpipe {name}" in readme, name


def test_stage_names_agree():
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    assert {name.replace("_", "-") for name in stages} == STAGES
    assert set(commands()) >= STAGES
    for name, stage in stages.items():
        assert stage.get("do", stage)["cmd"].split()[:2] == ["kdpipe", name.replace("_", "-")]


def test_every_params_section_is_read_by_a_stage():
    sections = set(yaml.safe_load((REPOSITORY / "params.yaml").read_text()))
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"].values()
    read = {each.partition(".")[0] for stage in stages for each in stage.get("do", stage)["params"]}
    assert sections == read


def test_every_key_of_targets_stands_in_its_guide():
    guide = (REPOSITORY / "docs" / "guides" / "store.md").read_text()
    rows = [line for line in guide.splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert {each.name for each in fields(TargetsSection)} <= named


def test_the_readme_is_short_and_its_links_exist():
    readme = (REPOSITORY / "README.md").read_text()
    assert readme.count("\n") < 200
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert target.startswith("http") or (REPOSITORY / target).exists(), target


def test_decisions_are_listed():
    folder = REPOSITORY / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    records = [path.name for path in folder.glob("[0-9]*.md")]
    assert records
    assert all(name in index for name in records)


def test_constraints_pin_every_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    pinned = {line.partition("==")[0].lower() for line in (REPOSITORY / "constraints.txt").read_text().splitlines()}
    for requirement in wanted:
        assert re.split(r"[<>=\[]", requirement)[0].lower().replace("_", "-") in {
            each.replace("_", "-") for each in pinned
        }


@pytest.mark.parametrize("module", ["kdpipe.errors"])
def test_every_error_is_raised_somewhere(module):
    import importlib

    sources = "".join(path.read_text() for root in ("pipeline", "stages") for path in (REPOSITORY / root).rglob("*.py"))
    roots = {"KdpipeError", "StoreError"}
    for name, value in vars(importlib.import_module(module)).items():
        if isinstance(value, type) and name not in roots:
            assert f"raise {name}(" in sources, name
