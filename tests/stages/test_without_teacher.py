"""`train-student` and `evaluate` where the teacher's code, weights and packages are absent, and the source's code."""

from __future__ import annotations

import subprocess
import sys

from kdpipe_stages.cli import run
from projects import make_project, params, write_params

FORBIDDEN = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("kdpipe.teachers", "kdpipe.caching", "teacher")):
            raise ImportError(f"{name} is absent here")

sys.meta_path.insert(0, Absent())
from kdpipe_stages.cli import run
for command in ("train-student", "evaluate"):
    assert run([command]) == 0, command
assert not [name for name in sys.modules if name.startswith(("kdpipe.teachers", "kdpipe.caching"))]
"""


def test_student_and_evaluation_need_no_teacher(tmp_path, monkeypatch):
    import shutil

    make_project(tmp_path)
    (tmp_path / "rows.py").write_text("from kdpipe.data.sources import Table\n\n\nclass Rows(Table):\n    pass\n")
    sections = params()
    sections["data"]["source"] = {"factory": "rows.py:Rows"}
    write_params(tmp_path, sections)
    monkeypatch.chdir(tmp_path)
    for command in ("prepare-data", "train-teacher", "cache-teacher"):
        assert run([command]) == 0
    for absent in ("teacher.py", "rows.py"):
        (tmp_path / absent).unlink()
    shutil.rmtree(tmp_path / "data" / "models")
    shutil.rmtree(tmp_path / "data" / ".work")
    subprocess.run([sys.executable, "-c", FORBIDDEN], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "metrics.json").is_file()
