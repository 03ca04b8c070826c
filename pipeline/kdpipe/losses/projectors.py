"""Projectors: from the width of a student's features to that of its teacher's, learnt beside the student."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from kdpipe.errors import ConfigError

Projector = Literal["linear", "conv1x1", "mlp"]
Shape = tuple[int, ...]


def make_projector(kind: Projector, student: Shape, teacher: Shape, seed: int) -> nn.Module:
    """A module from features `[B, *student]` to `[B, *teacher]`; other random numbers stay as they were.

    `linear` and `mlp` (twice as deep, with a ReLU) change the last axis, `conv1x1` the first of maps `[D, H, W]`.
    Raises `ConfigError` where anything else differs.
    """
    axis = 0 if kind == "conv1x1" else -1
    fits = 0 < len(student) == len(teacher) and (kind != "conv1x1" or len(student) == 3)
    if not fits or _without(student, axis) != _without(teacher, axis):
        expected = "[D, H, W] with the same H and W" if kind == "conv1x1" else "[D] or [T, D] with the same T"
        raise ConfigError(
            f"projector: {kind} takes features of a row of shape {expected}, and gives another D; found "
            f"{list(student)} of the student and {list(teacher)} of the teacher"
        )
    width_in, width_out = student[axis], teacher[axis]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "conv1x1":
            return nn.Conv2d(width_in, width_out, kernel_size=1)
        if kind == "linear":
            return nn.Linear(width_in, width_out)
        return nn.Sequential(nn.Linear(width_in, width_out), nn.ReLU(), nn.Linear(width_out, width_out))


def _without(shape: Shape, axis: int) -> Shape:
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]
