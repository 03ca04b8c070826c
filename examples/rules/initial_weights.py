"""The logistic regression nearest to rules.yaml, as the student's first weights: `python initial_weights.py FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch

from kdpipe.teachers.rules import LinearWeights, RulesTeacher, linear_from_rules
from kdpipe_stages.project import Project


def weights_from_rules(project: Project) -> LinearWeights:
    """Weights on the inputs that the student will see; they need its rows, and no label."""
    task, data, student = project.task(), project.prepared_data(), project.params.student
    factory = project.teacher("rules").teacher
    assert factory is not None
    teacher = RulesTeacher(task=task, root=project.root, **factory.arguments)
    preprocess = project.preprocess(student.preprocess, task, "student.preprocess")
    rows = data.inputs.read(data.rows_of(student.distil_on))
    preprocess.fit([rows])
    return linear_from_rules(teacher, preprocess, [rows])


if __name__ == "__main__":
    weights = weights_from_rules(Project(Path("params.yaml")))
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(dict(weights.state_dict), path)
    for name, nats in weights.divergence.items():
        print(f"{nats:8.4f} nats  {name}")
