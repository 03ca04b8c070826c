"""The logistic regression nearest to rules.yaml, as the student's first weights: `python initial_weights.py`."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from kdpipe.teachers.rules import LinearWeights, RulesTeacher, linear_from_rules
from kdpipe_stages.cli import plain_errors
from kdpipe_stages.project import Project

FILE = Path("data") / "initial" / "rules.safetensors"


def write_weights(project: Project) -> LinearWeights:
    """Write `FILE`: weights on the inputs that the student will see; they need its rows, and no label."""
    task, data, student = project.task(), project.prepared_data(), project.params.student
    factory = project.teacher("rules").teacher
    assert factory is not None
    teacher = RulesTeacher(task=task, root=project.root, **factory.arguments)
    preprocess = project.preprocess(student.preprocess, task, "student.preprocess")
    rows = data.inputs.read(data.rows_of(student.distil_on))
    preprocess.fit([rows])
    weights = linear_from_rules(teacher, preprocess, [rows])
    path = project.root / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(dict(weights.state_dict), path)
    return weights


if __name__ == "__main__":
    with plain_errors():
        found = write_weights(Project(Path(__file__).with_name("params.yaml")))
    print("nats away from the rules, where each of them votes:")
    for name, nats in found.divergence.items():
        print(f"{nats:6.3f}  {name}")
