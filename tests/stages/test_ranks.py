"""`torchrun -m kdpipe_stages train-student`: two processes, the same students."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from kdpipe.checkpoint import read_weights
from kdpipe_stages import cache_teacher, prepare_data, train_student, train_teacher
from projects import make_project, project_in


def test_two_ranks_train_the_students_of_one(tmp_path):
    make_project(tmp_path)
    project = project_in(tmp_path)
    prepare_data.run(project)
    train_teacher.run(project, "big")
    cache_teacher.run(project, "big")
    train_student.run(project)
    shutil.move(project.student_models, tmp_path / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, "-m", "kdpipe_stages", "train-student"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
        capture_output=True,
    )
    found = sorted(project.student_models.rglob("*.safetensors"))
    assert len(found) == 4
    for path in found:
        alone = read_weights(tmp_path / "alone" / path.relative_to(project.student_models))
        for name, tensor in read_weights(path).items():
            torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=1e-4)
