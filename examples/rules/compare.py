"""What rules are worth: 20, 100 and all labels, as targets and as first weights, by vote and by label model.

`python compare.py [test|validation]`, after `kdpipe prepare-data`: 20 draws of the labels; paired by draw. Writes
comparison.json, works below data/comparison, and goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from initial_weights import weights_from_rules

from kdpipe_stages import cache_teacher, evaluate, prepare_data, train_student, train_teacher
from kdpipe_stages.project import Project

LABELS = (20, 100, None)
TEACHERS = ("rules", "learnt")
FIRST_WEIGHTS = (None, "rules.safetensors")
DRAWS = 20


class Comparison:
    """The project of `params.yaml` in a folder of its own, with other settings each time."""

    def __init__(self, params: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._params = folder, yaml.safe_load(params.read_text())
        self._params["data"]["path"] = str((params.parent / self._params["data"]["path"]).resolve())
        shutil.copyfile(params.parent / "rules.yaml", folder / "rules.yaml")
        project = self._project({}, "test")
        prepare_data.run(project)
        for name in TEACHERS:
            train_teacher.run(project, name)
            cache_teacher.run(project, name)
        safetensors.torch.save_file(dict(weights_from_rules(project).state_dict), folder / "rules.safetensors")

    def metrics(self, teacher: str, split: str, **student: Any) -> Mapping[str, Any]:
        """metrics.json of one student, and of the same model on labels only."""
        loss = self._params["student"]["losses"][0] | {"teacher": teacher}
        project = self._project(student | {"losses": [loss], "seeds": 1}, split)
        train_student.run(project)
        return evaluate.run(project)

    def _project(self, student: Mapping[str, Any], split: str) -> Project:
        path = self._folder / "params.yaml"
        params = self._params | {"student": self._params["student"] | student, "evaluate": {"split": split}}
        path.write_text(yaml.safe_dump(params))
        return Project(path)
